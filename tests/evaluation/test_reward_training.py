"""What training on a reward wins: rewards that tell nothing, differences paired by seed, and a very small measurement end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.benchmarks import reward_training
from dedpo_diffusion.evaluation.benchmarks.reward_training import RewardSettings, check, shuffled, summarise
from dedpo_diffusion.training.rewards import Reward
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture


def test_shuffled_rewards_are_the_same_ones_and_no_longer_go_with_their_images(monkeypatch):
    found = np.arange(40.0).reshape(20, 2)
    monkeypatch.setattr(Reward, "score", lambda self, prompts, images, seeds: found)
    reward = object.__new__(Reward)
    with shuffled():
        once, again, other = (reward.score([], [], [seed]) for seed in (1, 1, 2))
    assert (once == again).all() and (once != other).any() and (once != found).any()
    assert (np.sort(once, axis=0) == found).all() and (once[:, 1] == once[:, 0] + 1).all()  # an image's numbers stay together
    assert (reward.score([], [], [1]) == found).all()


def line(gain: float, *, doubted: bool = False) -> list[dict]:
    """What is kept of a training with one look: the truth is best at strength 1, the judge at 2."""
    by_strength = {
        "1": {"gain": {"oracle_reward": gain, "pickscore": gain}, "over_optimised": False},
        "2": {"gain": {"oracle_reward": -gain, "pickscore": 2 * gain}, "over_optimised": doubted},
    }
    return [{"step": 2, "reward": "pickscore", "gain": by_strength["1"]["gain"], "by_strength": by_strength}]


def test_arms_are_compared_within_seeds():
    found = summarise({"raw": {1: line(0.1), 2: line(0.3, doubted=True)}, "shuffled": {2: line(0.2), 3: line(9.0)}})
    [raw] = found["raw"]["looks"]
    assert raw["gain"]["mean"] == pytest.approx(0.2) and raw["gain_of_reward"]["mean"] == pytest.approx(0.2)
    assert raw["by_strength"]["2"]["gain"]["mean"] == pytest.approx(-0.2) and raw["by_strength"]["2"]["over_optimised"] == 1
    assert raw["by_strength"]["2"]["gain_of_reward"]["mean"] == pytest.approx(0.4) and raw["by_strength"]["1"]["over_optimised"] == 0
    assert raw["gain_where_reward_is_highest"]["mean"] == pytest.approx(-0.2)  # the judge would take strength 2
    assert raw["minus"]["shuffled"] == {"mean": pytest.approx(0.1), "ci": None}  # seed 2 alone has both


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"arms": ["oracle", "luck"]}, "give some of oracle"),
        ({"looks": [3]}, "rising even numbers"),
        ({"looks": [4, 2]}, "rising even numbers"),
        ({"seeds": (2, 1)}, "the first and the last seed"),
        ({"strengths": (1.0,)}, "two strengths"),
    ],
)
def test_settings_that_do_not_go_together(wrong, words):
    with pytest.raises(UserError, match=words):
        check(RewardSettings(Path("work"), Path("out.json"), **wrong))


@pytest.mark.slow
def test_a_very_small_measurement_takes_every_reward_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    small = {"seeds": (0, 0), "looks": [2, 4], "strengths": (1.0, 2.0), "pool": 60, "pairs": 60, "share": 0.5, "prompts": 4}
    settings = RewardSettings(tmp_path / "work", tmp_path / "found.json", **small)

    def stopped(argv):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(score, "main", stopped)  # after the first arm's training
        reward_training.run(settings)
    seen, look = [], reward_training._look
    monkeypatch.setattr(reward_training, "_look", lambda results, lora: (seen.append(results["scorers"]), look(results, lora))[1])
    reward_training.run(settings)
    roles = [{name: facts["role"] for name, facts in scorers.items()} for scorers in seen]
    assert {"oracle_reward": "reward", "pickscore": "held_out"} in roles  # as the LoRA's file tells
    assert {"oracle_reward": "held_out", "pickscore": "reward"} in roles
    found = json.loads(settings.out.read_text())
    assert set(found["arms"]) == set(reward_training.ARMS)
    lines = {arm: seeds["0"] for arm, seeds in found["trainings"].items()}
    assert [entry["step"] for entry in lines["raw"]] == [2, 4] and lines["adapted"][0]["reward"] in ("adapted", "pickscore")
    assert len({entry[-1]["gain"]["oracle_reward"] for entry in lines.values()}) == 4  # four rewards, four policies
    assert lines["oracle"][-1]["rollouts"] != lines["shuffled"][-1]["rollouts"]
    assert lines["oracle"][-1]["rollouts"][0] == lines["shuffled"][-1]["rollouts"][0]  # the first is of the model before training
    before = settings.out.read_text()
    reward_training.run(settings)
    assert settings.out.read_text() == before and not any((tmp_path / "work" / "runs").iterdir())
