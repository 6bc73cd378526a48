"""`dedpo align` in rounds: its lines, its settings, when it ends, and a small whole journey on Shapes that was stopped."""

from __future__ import annotations

import json
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.journey.plan import Route
from dedpo_diffusion.journey.rounds import best_round, curve, curve_words
from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import STAGES, align
from dedpo_diffusion.settings import AlignSettings
from support.aligning import SMALL, align_command, results_of, without_places

ROUNDS = [*SMALL, "--rounds", "2", "--round_votes", "6"]


def test_every_line_is_taken_by_its_stages_own_parser(capsys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert align.main([*ROUNDS, "--rounds", "3", "--out", str(out), "--dry_run", "true"]) == 0
    lines = [shlex.split(line[2:]) for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    stages = [line[1] for line in lines]
    assert stages.count("propose") == stages.count("train") == stages.count("merge") == 3 and stages.count("pairs") == 2
    assert stages.count("compare") == 2 and stages[-1] == "export"
    for _, stage, *arguments in lines:
        module, taken = import_module(f"dedpo_diffusion.{STAGES[stage][0]}"), []
        monkeypatch.setattr(module, "run", taken.append)
        assert module.main(arguments) == 0, capsys.readouterr().err
        assert len(taken) == 1
    seeds = [line[line.index("--seed") + 1] for line in lines if line[1] == "propose"]
    assert len(set(seeds)) == 3
    starts = [Path(line[line.index("--lora.start") + 1]).name for line in lines if "--lora.start" in line]
    assert starts == ["naive.safetensors", "naive-round-2.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0; give 1 or more"),
        ({"round_votes": 5, "rounds": 1}, "round_votes is for rounds: 2 or more"),
        ({"prompts": None, "pairs": "p.csv"}, "rounds need prompts"),
        ({"methods": ["adapted", "naive"]}, "methods names 2; give one"),
        ({"methods": ["tuned"]}, "method tuned takes human labels as a random sample"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message, tmp_path):
    given = {
        "model": "m", "prompts": "parti", "judges": ["pickscore"], "votes": 30, "recipe": "sdxl_lora_12gb.yaml",
        "eval_prompts": "geneval", "scorers": ["hps"], "methods": ["adapted"], "rounds": 2,
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        align.run(AlignSettings(**{"out": tmp_path / "out", **given, **changes}))


def told(*minus: float) -> dict:
    """Results of a first round and one for each difference to the round before."""
    loras = {}
    for number, gain in enumerate([0.0, *minus], start=1):
        arm, last = (["naive", "naive-round-2", "naive-round-3", "naive-round-4"][k] for k in (number - 1, max(number - 2, 0)))
        entry = {"best_strength": 1.0, "gain_at_best_strength": {"mean": 0.1, "ci": [0.0, 0.2]}}
        loras[arm] = entry | {"best_minus": {last: {"mean": gain, "ci": None}} if number > 1 else {}}
    return {"loras": loras}


@pytest.mark.parametrize(
    ("minus", "best"), [((), 1), ((0.01,), 2), ((-0.01,), 1), ((0.01, 0.02, 0.03), 4), ((0.01, 0.0, 0.03), 2), ((0.01, 0.02, -0.1), 3)]
)
def test_the_best_round_is_the_last_before_one_that_gained_nothing(minus, best, tmp_path):
    route = Route(AlignSettings(model="m", methods=["naive"], rounds=4))
    assert best_round(route, tmp_path / "none.json") == 4
    (tmp_path / "results.json").write_text(json.dumps(told(*minus)))
    assert best_round(route, tmp_path / "results.json") == best
    found = curve(route, told(*minus))
    assert [entry["round"] for entry in found] == list(range(1, len(minus) + 2))
    assert ("the last of at most 4" in curve_words(route, found)[-1]) == (len(minus) < 3)


@pytest.mark.slow
def test_two_rounds_stopped_and_resumed_are_two_rounds(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert align.main([*ROUNDS, "--out", str(whole)]) == 0
    for marker in ("rounds/2/round-2/pairs", "rounds/2/data/pairs", "runs/naive-round-2/settings.yaml"):
        process = subprocess.Popen(align_command(stopped, *ROUNDS[len(SMALL) :]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (stopped / marker).exists():
            assert process.poll() is None
        process.kill()
        process.wait()
    assert align.main([*ROUNDS, "--out", str(stopped)]) == 0
    assert without_places(results_of(whole), whole) == without_places(results_of(stopped), stopped)
    capsys.readouterr()
    assert align.main([*ROUNDS, "--out", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "\n$ dedpo" not in shown and "round 1: gain" in shown

    joined = whole / "rounds" / "2" / "data"
    assert len(PairReader(joined)) == 48
    assert read_labels(joined, "human").extra["propensity"] == [0.5] * 12 + [0.25] * 6
    found = results_of(whole)
    assert [entry["arm"] for entry in found["rounds"]] == ["naive", "naive-round-2"]
    assert found["default"] == found["rounds"][0 if found["rounds"][1]["minus_last"]["mean"] <= 0 else 1]["arm"]
    for name in ("aligned.safetensors", "rounds.png", "report.html"):
        assert (whole / name).is_file()
