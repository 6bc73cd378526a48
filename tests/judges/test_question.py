"""The question that every vision-language judge asks, and what two answers in both orders say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.judge import probability
from dedpo_diffusion.judges.question import TEMPERATURE, OrderAnswer, both_orders, fitted, read_template

LOGITS = st.floats(-30, 30)


def answered(*logits: float, validity: float = 0.9) -> list[OrderAnswer]:
    return [OrderAnswer(logit, validity, prompt_tokens=10, answer_tokens=1) for logit in logits]


def label(shown: float, swapped: float) -> float:
    return float(probability(both_orders(answered(shown), answered(swapped), min_validity=0.5).scores, TEMPERATURE)[0])


# ---- both orders


@given(LOGITS, LOGITS)
def test_swapping_the_images_turns_the_label_around(shown, swapped):
    assert label(shown, swapped) == pytest.approx(1 - label(swapped, shown), abs=1e-15)


@given(LOGITS, LOGITS, st.floats(-30, 30))
def test_a_lean_to_one_place_cancels(shown, swapped, lean):
    assert label(shown + lean, swapped + lean) == pytest.approx(label(shown, swapped), abs=1e-12)


@given(LOGITS)
def test_orders_that_agree_say_what_one_of_them_says(logit):
    assert label(logit, -logit) == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)


def test_both_orders_by_hand():
    """Log-odds 3 with image 0 first and 1 with image 1 first: the mean of 3 and -1 is 1, and sigmoid(1) = 0.73105857863."""
    assert label(3.0, 1.0) == pytest.approx(0.73105857863, abs=1e-11)


def test_orders_are_consistent_where_both_name_the_same_image():
    found = both_orders(answered(2, -2, 2, -2, 0), answered(-1, 1, 1, -1, 0), min_validity=0.5)
    assert found.extra["order_consistent"] == [True, True, False, False, True]  # undecided twice is consistent


def test_tokens_are_those_of_both_orders_and_the_validity_is_the_lesser():
    found = both_orders(answered(1, 2), [OrderAnswer(0, 0.7, "", 12, 2), OrderAnswer(0, 0.95, "", 13, 1)], min_validity=0.5)
    assert found.extra["prompt_tokens"] == [22, 23] and found.extra["answer_tokens"] == [3, 2]
    assert found.extra["validity"] == [0.7, 0.9] and found.missing == ["", ""]
    np.testing.assert_array_equal(found.scores, [[1, 0], [2, 0]])


@pytest.mark.parametrize("turned", [False, True])
def test_a_pair_is_missing_where_either_order_is(turned):
    sides = [answered(1.0, 2.0), [OrderAnswer(missing="timeout", prompt_tokens=4), *answered(3.0)]]
    found = both_orders(*sides[:: -1 if turned else 1], min_validity=0.5)
    assert found.missing == ["timeout", ""] and np.isnan(found.scores[0]).all() and np.isfinite(found.scores[1]).all()
    assert found.extra["order_consistent"] == [None, False]
    assert found.extra["validity"] == [None, 0.9]
    assert found.extra["prompt_tokens"] == [14, 20]  # what was paid for counts


def test_answers_of_little_validity_are_missing_and_say_so():
    found = both_orders(answered(1.0, validity=0.4), answered(1.0, validity=0.9), min_validity=0.5)
    assert found.missing == ["the model gave the two allowed answers a probability of 0.40 together, less than 0.5"]
    assert np.isnan(found.scores).all() and found.extra["validity"] == [0.4] and found.extra["order_consistent"] == [None]
    assert both_orders(answered(1.0, validity=0.5), answered(1.0, validity=0.5), min_validity=0.5).missing == [""]  # the bound itself


def test_no_pairs_make_no_answers():
    found = both_orders([], [], min_validity=0.5)
    assert found.scores.shape == (0, 2) and found.missing == [] and set(map(len, found.extra.values())) == {0}


def test_orders_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        both_orders(answered(1.0, 2.0), answered(1.0), min_validity=0.5)


# ---- the text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_packages_own_question_says_what_the_prompt_is_and_what_to_answer():
    template = read_template(None)
    asked = template.ask("a cat in a {prompt} hat, {0} % \\1")
    assert "Prompt: a cat in a {prompt} hat, {0} % \\1\n" in asked and asked.endswith("1 or 2.")
    assert template.digest == read_template(None).digest


def test_a_question_of_ones_own(tmp_path):
    template = read_template(write(tmp_path / "own.txt", "\nWhich is nearer to « {prompt} »? {prompt}!\n\n"))
    assert template.ask("café") == "Which is nearer to « café »? café!"
    assert template.digest != read_template(None).digest


def test_the_digest_tells_texts_apart_and_files_not(tmp_path):
    one, same, other = (
        read_template(write(tmp_path / f"{k}.txt", text)) for k, text in enumerate(("{prompt}?", "{prompt}?\n", "{prompt}!"))
    )
    assert one == same and one.digest != other.digest and len(one.digest) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "cannot be read as a text file"),
        (lambda path: path.parent, "cannot be read as a text file"),
        (lambda path: (path.write_bytes(b"\xff\xfe{prompt}"), path)[1], "cannot be read as a text file"),
        (lambda path: write(path, "Which is better, 1 or 2?"), r"does not hold \{prompt\}"),
        (lambda path: write(path, ""), r"does not hold \{prompt\}"),
    ],
)
def test_files_that_hold_no_question(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        read_template(make(tmp_path / "question.txt"))


# ---- the images


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_the_longer_side_is_shrunk_and_the_shape_kept(width, height, most):
    found = fitted(Image.new("RGB", (width, height)), most)
    assert max(found.size) == min(most, max(width, height))
    scale = max(found.size) / max(width, height)
    assert abs(found.width - width * scale) <= 0.5 or found.width == 1
    assert abs(found.height - height * scale) <= 0.5 or found.height == 1


@pytest.mark.parametrize("most", [None, 60, 61])
def test_images_that_fit_are_left_as_they_are(most):
    image = Image.new("RGB", (60, 40))
    assert fitted(image, most) is image
