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
from dedpo_diffusion.journey.rounds import best_round, curve, curve_words, why_last
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
        ({"strengths": [1.0]}, "rounds compare each LoRA at its best strength; give strengths two numbers or more"),
        ({"round_drift": 0.0}, "round_drift is 0.0; give a number above 0"),
        ({"round_drift": float("nan")}, "round_drift is nan; give a number above 0"),
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


ARMS = ["naive", "naive-round-2", "naive-round-3", "naive-round-4"]
ROLES = {"judge": "made_labels", "held": "held_out", "other": "held_out", "people": "held_out"}


def gap(mean: float, half: float = 0.01) -> dict:
    """A difference with its interval."""
    return {"mean": mean, "ci": [mean - half, mean + half]}


def told(*minus: float, apart: float = 0.2) -> dict:
    """Results of a first round and one for each difference to the round before; nothing else speaks against them."""
    loras = {}
    for number, gain in enumerate([0.0, *minus]):
        last = {ARMS[number - 1]: gap(gain)} if number else {}
        loras[ARMS[number]] = {
            "best_strength": 1.0, "gain_at_best_strength": gap(0.1, 0.1), "best_minus": last, "warnings": [],
            "best_minus_by_scorer": {arm: dict.fromkeys(ROLES, gap(0.02)) for arm in last},
            "strengths": [{"strength": 0.5, "drift": {}}, {"strength": 1.0, "drift": {"clip": gap(0.1)}}],
        }  # fmt: skip
    return {
        "loras": loras, "primary": "held", "base": "base", "scorers": {name: {"role": role} for name, role in ROLES.items()},
        "arms": {"base": {"spread": {"clip": {"diversity": gap(apart)}}}},
    }  # fmt: skip


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
    ended = best < len(minus) + 1
    assert (f"round {best + 1} ended the rounds: it gained nothing" in curve_words(route, found)[-1]) == ended
    assert len(curve_words(route, found)) == len(found) + ended


def ends(results: dict, *, drift: float = 2.0) -> str | None:
    """Why the second round ends the rounds."""
    return why_last(results, ARMS[1], ARMS[0], drift=drift)


def changed(**by_scorer: dict) -> dict:
    results = told(0.02)
    results["loras"][ARMS[1]]["best_minus_by_scorer"][ARMS[0]] |= by_scorer
    return results


def test_nothing_ends_the_rounds_where_every_scorer_gains_and_drift_is_small():
    assert ends(told(0.02)) is None
    assert ends(told(0.0001)) is None


@pytest.mark.parametrize("gain", [0.0, -0.0001, -1.0])
def test_no_gain_on_the_verdicts_scorer_ends_them(gain):
    assert ends(told(gain)) == f"it gained nothing over the round before on held ({gain:+.3f}, {gain - 0.01:+.3f} to {gain + 0.01:+.3f})"


def test_a_rule_of_over_optimisation_against_the_base_ends_them():
    results = told(0.02)
    results["loras"][ARMS[1]]["warnings"] = ["Looks over-optimised: it rises on judge (+0.1), and falls on other (-0.1)."]
    assert ends(results) == "looks over-optimised: it rises on judge (+0.1), and falls on other (-0.1)"
    words = curve_words(
        Route(AlignSettings(model="m", methods=["naive"], rounds=3)),
        curve(Route(AlignSettings(model="m", methods=["naive"], rounds=3)), results),
    )
    assert words[-1].startswith("round 2 ended the rounds: looks over-optimised: it rises on judge") and words[-1].endswith(
        "; round 1 is taken"
    )
    results["loras"][ARMS[0]]["warnings"], results["loras"][ARMS[1]]["warnings"] = results["loras"][ARMS[1]]["warnings"], []
    assert ends(results) is None  # of the round before, which nobody goes back behind


@pytest.mark.parametrize("whom", ["other", "people"])
def test_a_rising_judge_with_a_falling_held_out_scorer_or_people_ends_them(whom):
    assert ends(changed(judge=gap(0.3), **{whom: gap(-0.05)})) == (
        "against the round before it rises on judge (+0.300, +0.290 to +0.310), which made its labels, and falls on "
        f"{whom} (-0.050, -0.060 to -0.040), which had no part in them"
    )
    for judge, other in ((0.005, -0.05), (-0.3, -0.05), (0.3, -0.005), (0.3, 0.05)):  # one of the two is not clear, or goes the other way
        assert ends(changed(judge=gap(judge), **{whom: gap(other)})) is None
    assert ends(changed(judge={"mean": 0.3, "ci": None}, **{whom: gap(-0.05)})) is None


def test_drift_beyond_its_bound_ends_them():
    """0.1 with 0.01 to either side against 2 times 0.04: 0.09 is beyond 0.08; against 2 times 0.046 it is not."""
    assert ends(told(0.02, apart=0.04)) == (
        "its images lie 2.5 times as far from the base's, by clip, as the base's images of one prompt lie apart; round_drift allows 2"
    )
    assert ends(told(0.02, apart=0.046)) is None
    assert ends(told(0.02, apart=0.046), drift=1.9) is not None
    for nothing in ({"clip": {"diversity": None}}, {"clip": {"diversity": gap(0.0)}}, {}):  # one image a prompt, or no embeddings
        results = told(0.02, apart=0.04)
        results["arms"]["base"]["spread"] = nothing
        assert ends(results) is None


def test_results_of_an_earlier_version_are_judged_by_what_they_hold():
    results = changed(judge=gap(0.3), other=gap(-0.05))
    for entry in results["loras"].values():
        del entry["warnings"], entry["best_minus_by_scorer"]
    assert ends(results) is None


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
