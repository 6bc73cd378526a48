"""What an option of the step is worth: which trainings, and a very small comparison end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.benchmarks import step_options
from dedpo_diffusion.evaluation.benchmarks.step_options import OPTIONS, OptionSettings, wanted
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture


def test_every_option_has_the_same_seeds_and_comes_seed_by_seed():
    jobs = wanted(OptionSettings(Path("work"), Path("out.json"), seeds=(3, 4)))
    assert [cell.arm for _, cell, _ in jobs] == ["base"] + ["human_100"] * 2 * len(OPTIONS)
    assert [(name, cell.seed) for name, cell, _ in jobs[1:]] == [(name, seed) for seed in (3, 4) for name in OPTIONS]
    assert len({file for _, _, file in jobs}) == len(jobs)


def test_options_are_known_and_plain_is_among_them():
    for options, words in ((["plain", "fast"], "unknown option 'fast'"), (["equal_noise"], "lack plain")):
        with pytest.raises(UserError, match=words):
            wanted(OptionSettings(Path("work"), Path("out.json"), options))


@pytest.mark.slow
def test_a_very_small_comparison_resumes_and_pairs_by_seed(tmp_path):
    settings = OptionSettings(
        tmp_path / "work", tmp_path / "found.json", ["plain", "equal_noise"], (0, 1), (50.0,), pool=40, pairs=40, steps=2, prompts=2
    )
    step_options.run(settings)
    found = json.loads(settings.out.read_text())
    plain, equal = found["options"]["plain"], found["options"]["equal_noise"]
    assert plain["minus_plain"]["mean"] == 0 and found["seeds"] == [0, 1]
    assert equal["minus_plain"]["mean"] == pytest.approx(equal["gain"]["mean"] - plain["gain"]["mean"])
    assert equal["train"] == OPTIONS["equal_noise"] and plain["gain"]["mean"] != equal["gain"]["mean"]
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work" / "cells").iterdir()}
    step_options.run(settings)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work" / "cells").iterdir()} == kept
