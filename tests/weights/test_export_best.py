"""`dedpo export --strength best`: the strength that a comparison found best, worked into the file and told there and on the card."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.pipelines import export
from dedpo_diffusion.sampling.strength_folders import strength_folder
from support.adapters import adapted, as_run, random_lora, read_metadata


def at(strength, arm, mean):
    return {"strength": strength, "arm": arm, "gain": {"truth": {"mean": mean, "ci": [mean - 0.1, mean + 0.1]}}, "drift": {}}


def lora(name, best, sha256=None):
    """As `dedpo compare` writes it, of three strengths."""
    arms = {0.5: f"{name}/strength-0.5", 1.0: name, 2.0: f"{name}/strength-2"}
    return {
        "file": f"{name}.safetensors", "sha256": sha256, "strengths": [at(s, arm, s / 10) for s, arm in arms.items()], "choose_by": "truth",
        "best_strength": best, "best_arm": arms.get(best, name), "chosen": [best, best], "by_scorer": {}, "best_minus": {}, "best_wins": {},
        "gain_at_best_strength": {"mean": 0.1875, "ci": [0.125, 0.25]}, "win_rate_at_best_strength": {"mean": 0.5, "ci": [0.4, 0.6]},
    }  # fmt: skip


def write_results(path, **loras):
    arm = {
        "by_scorer": {"truth": {"gain_over_base": {"mean": 0.2, "ci": [0.1, 0.3]}, "win_rate_vs_base": {"mean": 0.5, "ci": [0.4, 0.6]}}},
        "categories": {}, "spread": {}, "people": None, "warnings": [],
    }  # fmt: skip
    names = [each["arm"] for entry in loras.values() for each in entry["strengths"]]
    found = {
        "schema": 3, "verdict": "It is better.", "notes": [], "primary": "truth", "base": "base", "n_images": 8, "n_prompts": 4,
        "resamples": 100, "seed": 0, "scorers": {"truth": {"version": "1", "kind": "scorer", "role": "held_out", "held_out": True}},
        "arms": {"base": arm, **dict.fromkeys(names or ["tuned"], arm)}, "differences": {}, "loras": loras,
    }  # fmt: skip
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def run(tiny_model, tiny_pairs, tmp_path_factory):
    model = adapted(tiny_model)
    return as_run(model, tiny_model, tmp_path_factory.mktemp("runs") / "tuned", data=tiny_pairs)


def call(source, out, *options) -> int:
    return export.main([str(source), "--out", str(out), *map(str, options)])


def same_tensors(a, b) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_run_is_written_at_its_best_strength_which_metadata_and_card_tell(run, tmp_path, capsys, layout):
    results = write_results(tmp_path / "results.json", human=lora("human", 0.5), tuned=lora("tuned", 2.0))
    best, twice = tmp_path / "best" / "tuned.safetensors", tmp_path / "twice.safetensors"
    assert call(run, best, "--format", layout, "--strength", "best", "--results", results) == 0
    said = capsys.readouterr().out
    assert "of 0.5, 1, 2 the best strength of tuned is 2, by truth; that is what is written" in said
    assert call(run, twice, "--format", layout, "--strength", "2") == 0
    assert same_tensors(best, twice)
    made = read_metadata(best)["dedpo_made"]
    assert made.pop("best_strength") == {"lora": "tuned", "by": "truth", "tried": [0.5, 1.0, 2.0], "results": file_digest(results)}
    assert made == read_metadata(twice)["dedpo_made"] == {"strength": 2.0}
    card = (best.parent / "README.md").read_text()
    assert "The change is what was trained times 2. That is the best of the strengths 0.5, 1, 2 of `tuned`, by `truth`." in " ".join(
        line.removeprefix("- ") for line in card.splitlines()
    )
    assert "Here this model is `tuned/strength-2`" in card and "judged at the strength that the other half chose (2)" in card
    assert "+0.188 (+0.125 to +0.250)" in card


def test_the_card_of_what_was_trained_is_that_of_strength_one(run, tmp_path):
    """The samples of all strengths are of this LoRA; without --strength best it is the one of strength 1."""
    out = tmp_path / "share" / "tuned.safetensors"
    assert call(run, out) == 0
    for strength in (0.5, 1.0, 2.0):
        folder = tmp_path / "samples" / "tuned" / strength_folder(strength)
        folder.mkdir(parents=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump({"model": "m", "lora": [str(out)], "strength": [strength]}))
        (folder / "identity.json").write_text(json.dumps({"lora": file_digest(out)}))
    results = write_results(tmp_path / "results.json", tuned=lora("tuned", 2.0))
    assert call(run, out, "--results", results) == 0
    assert "Here this model is `tuned`, its base" in (tmp_path / "share" / "README.md").read_text()


def test_a_best_strength_of_one_is_told_too(run, tmp_path):
    results = write_results(tmp_path / "results.json", tuned=lora("tuned", 1.0))
    assert call(run, tmp_path / "best.safetensors", "--strength", "best", "--results", results) == 0
    assert call(run, tmp_path / "plain.safetensors") == 0
    assert same_tensors(tmp_path / "best.safetensors", tmp_path / "plain.safetensors")
    assert set(read_metadata(tmp_path / "best.safetensors")["dedpo_made"]) == {"best_strength"}


def test_a_file_is_known_by_its_digest_then_by_its_name(tiny_model, tmp_path, capsys):
    file = random_lora(tiny_model, tmp_path / "renamed.safetensors")
    results = write_results(tmp_path / "results.json", renamed=lora("renamed", 0.5), tuned=lora("tuned", 2.0, file_digest(file)))
    out, wanted = tmp_path / "best.safetensors", tmp_path / "twice.safetensors"
    assert call(file, out, "--strength", "best", "--results", results) == 0  # by digest
    assert call(file, wanted, "--strength", "2") == 0
    assert same_tensors(out, wanted) and not (tmp_path / "README.md").exists() and "Warning" not in capsys.readouterr().out
    results = write_results(tmp_path / "results.json", renamed=lora("renamed", 0.5), tuned=lora("tuned", 2.0))
    assert call(file, out, "--strength", "best", "--results", results) == 0
    assert read_metadata(out)["dedpo_made"]["strength"] == 0.5 and "compared another file than" in capsys.readouterr().out
    assert call(file, out, "--strength", "best", "--results", results, "--arm", "tuned/strength-0.5") == 0
    assert read_metadata(out)["dedpo_made"]["strength"] == 2.0


@pytest.mark.parametrize(
    ("loras", "options", "words"),
    [
        ({}, [], "it knows no LoRA at several strengths; sample it at several"),
        ({"human": lora("human", 2.0)}, [], "which of its LoRAs {run} is remains unclear (those are: human); name it with --arm"),
        ({"human": lora("human", 2.0)}, ["--arm", "tuned"], "--arm tuned: no LoRA of {results} that was compared at several strengths"),
        ({"tuned": lora("tuned", 0.0)}, [], "the best strength of tuned is 0, which is the base itself"),
        ({"tuned": lora("tuned", 200.0)}, [], "the best strength is 200.0; give a number other than 0 between -100 and 100"),
        ({"tuned": {**lora("tuned", 2.0), "best_strength": "x"}}, [], "not as `dedpo compare` writes them"),
    ],
)
def test_results_that_do_not_tell(run, tmp_path, capsys, loras, options, words):
    results, out = write_results(tmp_path / "results.json", **loras), tmp_path / "out.safetensors"
    assert call(run, out, "--strength", "best", "--results", results, *options) == 2
    assert words.format(run=run, results=results) in capsys.readouterr().err and not out.exists()


def test_results_of_before_strengths_and_none_at_all(run, tmp_path, capsys):
    results = write_results(tmp_path / "results.json")
    old = {key: value for key, value in json.loads(results.read_text()).items() if key != "loras"}
    results.write_text(json.dumps(old | {"schema": 2}))
    for options, words in ((["--results", results], "it knows no LoRA at several strengths"), ([], "give its --results")):
        assert call(run, tmp_path / "out.safetensors", "--strength", "best", *options) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
