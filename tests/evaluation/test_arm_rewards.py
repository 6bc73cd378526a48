"""What arms were trained to raise, by their LoRA files, and what a comparison makes of it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dedpo_diffusion.evaluation.comparison import verdict
from dedpo_diffusion.evaluation.comparison.arms import Arm
from dedpo_diffusion.evaluation.comparison.rewards import reward_names, rewards_of
from support.comparing import gains, results

VERSIONS = {"pickscore": "p-1", "adapted": "a-1", "eye": "e-1"}


def lora(path, kind: str, rewards: list[str], start: str | None = None):
    """A LoRA file that tells how it was trained."""
    told = {"objective": {"kind": kind}, "loop": {"reward": rewards}, "lora": {"start": start}}
    save_file({"w": torch.zeros(1)}, path, {"dedpo_settings": json.dumps(told)})
    return str(path)


def arm(folder, loras) -> Arm:
    """A sample folder of these LoRA files."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump({"lora": loras}))
    return Arm(folder.name, folder, [], {}, {}, [])


def test_a_lora_file_tells_what_it_was_trained_to_raise(tmp_path):
    raised = lora(tmp_path / "a.safetensors", "loop", ["adapted=/x/adapt.json,pickscore=/models/p", "eye"])
    also = lora(tmp_path / "b.safetensors", "apa", ["hps"])
    of_pairs = lora(tmp_path / "c.safetensors", "sigmoid", ["pickscore"])  # settings of every run have a default reward
    arms = [
        arm(tmp_path / "one", [raised]), arm(tmp_path / "two", [raised, also]), arm(tmp_path / "pairs", [of_pairs]),
        arm(tmp_path / "mixed", [raised, of_pairs]), arm(tmp_path / "gone", [str(tmp_path / "none.safetensors")]),
        arm(tmp_path / "base", None),
    ]  # fmt: skip
    one, two = {"adapted", "pickscore", "eye"}, {"adapted", "pickscore", "eye", "hps"}
    assert rewards_of(arms) == ({"one": one, "two": two, "mixed": one}, False)
    assert rewards_of(arms[:2]) == ({"one": one, "two": two}, True)
    for others in range(2, len(arms)):
        assert not rewards_of([arms[0], arms[others]])[1]
    begun = arm(tmp_path / "begun", [lora(tmp_path / "d.safetensors", "loop", ["hps"], start="of_pairs.safetensors")])
    assert rewards_of([begun]) == ({"begun": {"hps"}}, False)  # who made the labels of its beginning is not known
    assert rewards_of([]) == ({}, False)
    assert reward_names("pickscore=openai/x") == ["pickscore"] and reward_names("oracle_reward") == ["oracle_reward"]


@pytest.mark.parametrize(
    ("rewards", "complete", "expected"),
    [
        ({"one": {"adapted", "pickscore"}}, True, ("reward", "reward", "held_out")),
        ({"one": {"pickscore"}}, False, ("reward", "unknown", "unknown")),  # nobody knows what the other arm was trained by
        ({"one": {"pickscore"}, "two": {"adapted"}}, True, ("reward", "reward", "held_out")),
        ({}, False, ("unknown", "unknown", "unknown")),
    ],
)
def test_a_reward_is_not_held_out_and_the_others_are_where_nothing_else_trained(rewards, complete, expected):
    found, notes = verdict.roles(VERSIONS, [], [], rewards, complete)
    assert tuple(found.values()) == expected and notes == []


def test_a_reward_that_is_called_held_out_is_told():
    found, notes = verdict.roles(VERSIONS, ["pickscore"], [], {"one": {"pickscore"}}, False)
    assert found["pickscore"] == "reward" and notes == ["pickscore is called held out, yet one was trained to raise it."]


def test_a_reward_that_rises_alone_is_warned_of():
    found = results({"judge": "made", "eye": "held"}, "judge", arm=gains(judge=0.3, eye=0.0), spread={"arm": {}})
    found["scorers"]["judge"]["role"] = "reward"
    (text,) = verdict.warnings(found, "arm")
    assert text.startswith("Better only on what it was trained by: it rises on judge (+0.300), which it was trained to raise")
    assert "On judge, which was the reward in training, arm is better" in verdict.verdict(found)
