"""Prompts are measured in tokens, whatever their script: by CLIP's own pairs of bytes, or by the tokenizers of a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.models.prompt_tokens import counter_of, model_counter
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pairs.prompt_tokens import TokenCounter, clip_counter
from dedpo_diffusion.pipelines import train, validate
from support.pictures import picture
from support.training import arguments, fresh_accelerate_state  # noqa: F401 - a fixture

CLIP = clip_counter()


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", 0),
        ("a red fox", 3),
        ("A  RED\nFOX", 3),
        ("photo, best quality, 8k", 7),
        ("一只红色的狐狸在雪地里", 28),
        ("\N{FOX FACE}" * 10, None),
        ("рыжая лиса", None),
        ("ثعلب أحمر", None),
    ],
)
def test_tokens_are_those_that_open_clip_finds(prompt, tokens):
    from open_clip.tokenizer import SimpleTokenizer

    [found] = CLIP.lengths([prompt])
    assert found == len(SimpleTokenizer().encode(prompt)) and tokens in (None, found)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="&<>"), max_size=60), max_size=5)
)
def test_any_list_of_ascii_prompts_has_open_clips_lengths(prompts):
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    assert CLIP.lengths(prompts) == [len(reference.encode(prompt)) for prompt in prompts]


def test_scripts_without_blanks_are_long_though_they_are_one_word():
    """75 Chinese signs are one word, and more than CLIP reads; 75 short English words are just not."""
    chinese, english = "红" * 76, " ".join(["fox"] * 75)
    assert len(chinese.split()) == 1
    lengths = CLIP.lengths([chinese, english])
    assert lengths[0] > CLIP.limit >= lengths[1] == 75
    assert CLIP.cut([chinese, english], lengths).startswith("1 of 2 prompts have more than the 75 tokens that CLIP reads")


def test_each_different_prompt_is_counted_once_and_all_keep_their_places():
    asked = []

    def count(prompts):
        asked.extend(prompts)
        return [len(prompt) for prompt in prompts]

    counter = TokenCounter("letters", 3, count)
    assert counter.lengths(["ab", "abcd", "ab", ""]) == [2, 4, 2, 0] and asked == ["ab", "abcd", ""]
    words = counter.cut(["ab", "abcd", "abcde"], [2, 4, 5], lambda place: f"row {place}")
    assert words.startswith("2 of 3 prompts have more than the 3 tokens that letters reads") and words.endswith(
        "the longest has 5 at row 2: 'abcde'"
    )
    assert counter.cut(["ab", "abc"], [2, 3]) is None


def test_a_models_own_tokenizer_counts_and_of_two_the_longer_one(folders):
    from transformers import CLIPTokenizer

    shapes = model_counter("shapes")
    assert (shapes.name, shapes.limit) == ("shapes", 14) and shapes.lengths(["a large red circle"]) == [4]
    for kind in ("sd15", "sdxl"):
        assert model_counter(str(folders[kind])).lengths(["a large red circle"]) == [4]

    tokenizer = CLIPTokenizer.from_pretrained(folders["sd15"], subfolder="tokenizer")
    letters = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "r": 2, "e": 3, "d</w>": 4}, merges=[], model_max_length=9)
    both = counter_of([tokenizer, letters], "two")
    assert both.limit == 7 and both.lengths(["red"]) == [3]


def test_a_model_that_is_not_there_is_refused_before_anything_is_looked_at(tmp_path, tiny_pairs, capsys):
    with pytest.raises(UserError, match="no such folder"):
        model_counter("/nowhere/model")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text("{}")
    assert validate.main([str(tiny_pairs), "--model", str(tmp_path / "m")]) == 2
    assert "it has no tokenizer" in capsys.readouterr().err


@pytest.fixture
def long_pairs(tmp_path):
    """Pairs of which the tiny model, which reads 14 tokens, cuts some."""
    prompts = ["a red circle", "a large " * 10, "红色的圆" * 3]
    with PairWriter(tmp_path / "pairs") as writer:
        for k in range(12):
            writer.add(Pair(f"p{k}", prompts[k % 3], picture(2 * k), picture(2 * k + 1)))
    write_targets(tmp_path / "pairs", "soft", Targets([f"p{k}" for k in range(12)], np.arange(12) % 2.0, np.ones(12)), {"power": 1.0})
    return tmp_path / "pairs"


def test_validate_measures_by_clip_or_by_the_model(long_pairs, tiny_model, capsys):
    assert validate.main([str(long_pairs)]) == 0
    report = json.loads((long_pairs / "validate.json").read_text())["prompts"]
    assert (report["tokens_of"], report["tokens_read"], report["cut"]) == ("CLIP", 75, 0)
    assert validate.main([str(long_pairs), "--model", str(tiny_model)]) == 0
    report = json.loads((long_pairs / "validate.json").read_text())
    assert report["prompts"]["tokens_read"] == 14 and report["prompts"]["cut"] > 0
    assert any(f"prompts have more than the 14 tokens that {tiny_model} reads" in warning for warning in report["warnings"])
    assert "prompts are cut off" in capsys.readouterr().out


@pytest.mark.parametrize("cached", [False, True])
def test_train_says_at_its_start_how_many_prompts_are_cut(long_pairs, tiny_model, tmp_path, capsys, cached):
    more = {"data.cache": tmp_path / "cache"} if cached else {}
    assert train.main(arguments(tiny_model, long_pairs, tmp_path / "run", optim__steps=1, **more)) == 0
    said = capsys.readouterr().out
    assert f"prompts have more than the 14 tokens that {tiny_model} reads, and are cut off there; the longest has" in said
    assert said.index("tokens that") < said.index("objective sigmoid")
