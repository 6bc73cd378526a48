"""Rounds against one: journeys of equal price, differences paired by seed, and a very small measurement end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.benchmarks import rounds_study
from dedpo_diffusion.evaluation.benchmarks.rounds_study import ARMS, ROUNDS, RoundsSettings, check, journey_of, summarise
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture


@pytest.mark.parametrize("arm", ARMS)
def test_every_journey_has_as_many_pairs_steps_and_answers(arm):
    settings = RoundsSettings(Path("work"), Path("out.json"), pairs=90, steps=30, answers=21)
    made = journey_of(settings, arm, 7, Path("journey"))
    rounds = made["rounds"]
    assert rounds == (ROUNDS if arm.startswith("three") else 1) and made["seed"] == 7
    assert made["limit"] * rounds == 90 and made["steps"] * rounds == 30
    assert round(made["human_share"] * made["limit"]) + (rounds - 1) * made.get("round_votes", 0) == 21


def entry(gains: list[float], given: int) -> dict:
    return {"gains": gains, "given": given, "ended": None if given == len(gains) else "it gained nothing", "seconds": 1.0}


def test_what_is_given_is_what_is_compared():
    one, three = {1: entry([0.1], 1), 2: entry([0.2], 1)}, {1: entry([0.0, 0.3, 0.2], 2), 3: entry([0.1, 0.2], 2)}
    found = summarise({"one": one, "three": three})
    assert found["three"]["gain"]["mean"] == pytest.approx(0.25) and found["three"]["given"] == [2, 2]
    assert found["three"]["minus"]["one"] == {"mean": pytest.approx(0.2), "ci": None}  # seed 1 alone has both
    assert [told["seeds"] for told in found["three"]["rounds"]] == [2, 2, 1]
    assert found["three"]["rounds"][1]["minus_last"]["mean"] == pytest.approx(0.2)
    assert found["three"]["ended"] == ["it gained nothing", None]
    assert found["three"]["last"]["gain"]["mean"] == pytest.approx(0.2)
    assert found["three"]["last"]["minus"]["one"]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"arms": ["two"]}, "give some of one"),
        ({"pairs": 100}, "multiples of 3"),
        ({"seeds": (2, 1)}, "the first and the last seed"),
        ({"strengths": (1.0,)}, "two strengths"),
    ],
)
def test_settings_that_do_not_go_together(wrong, words):
    with pytest.raises(UserError, match=words):
        check(RoundsSettings(Path("work"), Path("out.json"), **wrong))


@pytest.mark.slow
def test_a_very_small_measurement_takes_its_journeys_once(tmp_path):
    small = {"seeds": (0, 0), "arms": ["one", "three"], "pairs": 90, "steps": 6, "answers": 60, "prompts": 4, "compared": 4}
    settings = RoundsSettings(tmp_path / "work", tmp_path / "found.json", **small, train={"optim.batch": "4"}, strengths=(0.5, 1.0))
    rounds_study.run(settings)
    found = json.loads(settings.out.read_text())
    one, three = (found["journeys"][arm]["0"] for arm in ("one", "three"))
    assert len(one["gains"]) == 1 and 2 <= len(three["gains"]) <= 3 and one["gains"] != three["gains"][:1]
    assert 1 <= three["given"] <= len(three["gains"]) and (three["ended"] is None or isinstance(three["ended"], str))
    before = settings.out.read_text()
    rounds_study.run(settings)
    assert settings.out.read_text() == before and not any((tmp_path / "work" / "runs").iterdir())
