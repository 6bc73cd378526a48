"""What a reader should know beside the verdict: few prompts, collapsed images, and from where on a judge pays for itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.evaluation.comparison.arms import Arm
from dedpo_diffusion.evaluation.comparison.cautions import collapse_sentences, collapsed, few_prompts, judge_pays


def arm(name, scores):
    rows = [{"file": f"{k}.png", "prompt": f"a cross {k}", "prompt_index": k, "seed": 7, "category": None} for k in range(len(scores))]
    return Arm(name, Path(name), rows, {"eye": np.asarray(scores)}, {"eye": "1"}, [])


def drawn(seed, n=200):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=n)
    return base, base + rng.normal(0.3, 0.5, n)


@given(st.integers(0, 200), st.floats(-100, 100), st.floats(0.01, 100))
def test_no_image_of_an_ordinary_arm_has_collapsed_on_any_scale(seed, shift, scale):
    base, scores = drawn(seed)
    assert len(collapsed(scores * scale + shift, base * scale + shift)) == 0


def test_collapsed_images_are_found_worst_first_and_named():
    base, scores = drawn(0)
    scores[[5, 9]] = base.min() - 4, base.min() - 9
    assert collapsed(scores, base).tolist() == [9, 5]
    [text] = collapse_sentences([arm("base", base), arm("tuned", scores), arm("sound", base + 0.1)], "eye")
    assert text.startswith("Single images of tuned collapsed: 2 of 200 ") and "(the worst seed 7, 'a cross 9')" in text


def test_a_drop_to_what_the_base_does_as_well_is_no_collapse():
    base, scores = drawn(1)
    scores[3] = base.min()  # far below its own pair, and no worse than an image of the base
    base[3] = base.max()
    assert len(collapsed(scores, base)) == 0


def test_equal_scores_say_nothing_of_how_far_is_far():
    base = np.ones(50)
    scores = base.copy()
    scores[0] = 0
    assert len(collapsed(scores, base)) == 0


@pytest.mark.parametrize(("n", "few"), [(1, True), (3, True), (9, True), (10, False), (500, False)])
def test_few_prompts_are_said(n, few):
    told = few_prompts(n)
    assert bool(told) is few and (not few or told[0].startswith(f"Only {n} prompt{'s' * (n > 1)}: too few"))


def test_a_judge_pays_from_the_first_agreement_whose_worth_is_a_quarter_more():
    report = {"n": 400, "n_human": 100, "agreement": {"value": 0.7, "ci": [0.6, 0.8]}}
    curve = {"judge": {"agreement": [0.5, 0.7, 0.8, 0.9], "value": [100.0, 118.0, 125.0, 200.0]}}
    [text] = judge_pays("tuned", report | {"curve": curve})
    assert "adds a quarter to 100 human labels if it agrees with people on 80% of the pairs or more" in text
    assert text.endswith("this one agrees with people on 70.0% (60.0% to 80.0%).")
    flat = {"judge": {"agreement": [0.5, 1.0], "value": [100.0, 110.0]}}
    assert "no judge, however good, adds a quarter to 100 human labels" in judge_pays("tuned", report | {"curve": flat})[0]
    assert judge_pays("human", report | {"curve": None}) == []


def test_a_merged_report_has_what_the_sentence_needs():
    rng = np.random.default_rng(0)
    truth = (rng.random(400) < 0.5).astype(float)
    judge = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    human = np.where(np.arange(400) < 100, truth, np.nan)
    report = merge_labels(human, judge).report
    assert {"n", "n_human", "agreement"} <= report.keys() and {"value", "ci"} <= report["agreement"].keys()
