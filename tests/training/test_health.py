"""What a run's curves say: each symptom is found, noise is none, and a run warns or stops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from dedpo_diffusion import preference_step
from dedpo_diffusion.labels.files import read_targets
from dedpo_diffusion.models import tiny
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.training.health import WINDOW, Watch, score_symptom, symptoms
from dedpo_diffusion.training.metrics import summarise
from dedpo_diffusion.weights.run_folder import checkpoints
from support.steps import backbone
from support.steps import batch as batch_of_step
from support.training import arguments, fresh_accelerate_state, metrics  # noqa: F401 - the last but one is a fixture

WELL = {"reference_error": 0.2, "winner_drift": -0.004, "loser_drift": 0.006, "margin_abs_mean": 1.0, "margin_abs_max": 3.0}
WELL |= {"implicit_accuracy": 0.7}
ILL = {
    "both errors rise": {"winner_drift": 0.02, "loser_drift": 0.03},
    "margins are wide": {"margin_abs_mean": 20.0},
    "preferences are reversed": {"implicit_accuracy": 0.2},
    "nothing moves": {"margin_abs_max": 1e-5},
}


def lines(count: int = WINDOW, noise: float = 0.0, seed: int = 0, **changes) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"step": 10 * (k + 1)} | {name: value + noise * abs(value) * rng.normal() for name, value in (WELL | changes).items()}
        for k in range(count)
    ]


def test_a_run_that_does_well_has_no_symptom():
    assert symptoms(lines()) == {}
    assert symptoms(lines(noise=0.3)) == {}
    assert symptoms(lines(winner_drift=0.006, loser_drift=0.012)) == {}  # of 0.2, as in the quickstart, which gains


@pytest.mark.parametrize("name", ILL)
def test_each_symptom_is_found_alone_and_only_with_enough_lines(name):
    assert set(symptoms(lines(noise=0.05, **ILL[name]))) == {name}
    assert symptoms(lines(WINDOW - 1, **ILL[name])) == {}


def test_odd_batches_are_no_symptom():
    """Drifts around 0 as noisy as drifts are: the rule of SURE standard errors on both at once is hardly ever fooled."""
    rng = np.random.default_rng(1)
    fooled = 0
    for _ in range(2000):
        drawn = lines()
        for line in drawn:
            line |= {"winner_drift": 0.02 * rng.normal(), "loser_drift": 0.02 * rng.normal()}
            line["implicit_accuracy"] = rng.binomial(4, 0.5) / 4
        fooled += bool(symptoms(drawn))
    assert fooled <= 10


def test_what_is_not_known_is_no_symptom():
    unknown = dict.fromkeys(("reference_error", "winner_drift", "loser_drift", "margin_abs_mean", "margin_abs_max", "implicit_accuracy"))
    assert symptoms([{"step": 100 * k} | unknown for k in range(WINDOW)]) == {}
    some = lines(**ILL["both errors rise"])
    some[3]["winner_drift"] = None
    assert symptoms(some) == {}


def test_each_is_told_once_also_after_a_resume():
    watch = Watch()
    told = [watch.look(line) for line in lines(2 * WINDOW, **ILL["both errors rise"])]
    assert [bool(words) for words in told] == [k == WINDOW - 1 for k in range(2 * WINDOW)]
    assert "both errors rise" in told[WINDOW - 1][0]
    resumed = Watch(lines(WINDOW - 1, **ILL["both errors rise"]))
    assert resumed.look(lines(**ILL["both errors rise"])[-1])


@pytest.mark.slow
def test_a_run_that_falls_apart_warns_or_stops_and_keeps_its_checkpoint(tiny_model, tiny_pairs, tmp_path, capsys):
    changes = {"optim__learning_rate": 1, "optim__steps": 24, "optim__warmup": 1, "objective__beta": 20000}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "warned", **changes)) == 0
    assert "Warning: step" in capsys.readouterr().out
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "stopped", **changes, health="stop")) == 2
    error = capsys.readouterr().err
    assert "health=stop" in error
    last = metrics(tmp_path / "stopped")[-1]["step"]
    assert WINDOW <= last < 24
    assert checkpoints(tmp_path / "stopped")[-1][0] == 3 * ((last - 1) // 3)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "off", **changes, health="off")) == 0
    assert "Warning" not in capsys.readouterr().out


def test_an_ordinary_run_says_nothing(tiny_model, tiny_pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=16)) == 0
    assert "Warning" not in capsys.readouterr().out


# ---- what a line of metrics says of saturation and gradients


def pairs(margin, pull, labelled=None, target=None) -> dict[str, torch.Tensor]:
    m = torch.tensor(margin, dtype=torch.float64)
    ones, both = torch.ones(len(m)), torch.ones(len(m), 2)
    found = {"margin": m, "pull": torch.tensor(pull, dtype=torch.float64), "loss": ones, "cosine": ones, "target": ones, "weight": ones}
    found |= {"policy": both, "reference": both, "coefficients": both, "bucket": ones.long()}
    return found if labelled is None else found | {"labelled": torch.tensor(labelled)}


def test_saturation_counts_the_pairs_whose_slope_is_below_a_tenth():
    """4 sigmoid(m) sigmoid(-m) = 1 / cosh(m / 2)^2 is a tenth at |m| = 3.6369."""
    edge = 2 * math.acosh(math.sqrt(10))
    found = summarise(pairs([0.0, edge - 1e-6, edge + 1e-6, -50.0], [1.0] * 4), schedule=1000)
    assert edge == pytest.approx(3.6369, abs=1e-4)
    assert found["saturation"] == 0.5


def test_gradient_shares_of_the_largest_tenth_and_of_human_labels():
    pull = [5.0, 3.0, *[1.0] * 18]  # 20 pairs: the tenth is 2 of them
    found = summarise(pairs([0.0] * 20, pull, [0.0, 1.0, 1.0, *[0.0] * 17]), schedule=1000)
    assert found["largest_gradient_share"] == pytest.approx(8 / 26)
    assert found["human_gradient_share"] == pytest.approx(4 / 26)
    assert summarise(pairs([0.0] * 3, [1.0, 2.0, 1.0]), schedule=1000)["largest_gradient_share"] == pytest.approx(0.5)
    nothing = summarise(pairs([0.0] * 3, [0.0] * 3, [1.0] * 3), schedule=1000)
    assert nothing["largest_gradient_share"] is None and nothing["human_gradient_share"] is None


def test_what_nobody_predicted_is_not_known():
    found = summarise(pairs([math.nan] * 3, [1.0] * 3), schedule=1000)
    assert all(found[name] is None for name in ("saturation", "implicit_accuracy", "margin", "human_gradient_share"))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sft"])
def test_a_pairs_pull_is_its_part_of_the_gradient(tiny_model, kind):
    """Doubling a pair's weight doubles its pull alone; for sigmoid it is beta weight |sigmoid(m) - t|, over both images; the gradient of
    the model's parameters is not touched."""
    model, (batch, t, noise) = backbone(tiny_model, trained=True), batch_of_step()
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    options = {"timesteps": t, "noise": noise, "beta": 200.0, "kind": kind, "balance": "none"}
    plain = preference_step(model, batch, **options)
    found = preference_step(model, dataclasses.replace(batch, weight=weights), **options)
    torch.testing.assert_close(found.pull, weights * plain.pull)
    assert not found.pull.requires_grad
    if kind == "sigmoid":
        torch.testing.assert_close(plain.pull, 200.0 * (plain.margin.sigmoid() - batch.target).abs())
    plain.loss.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable().values())


def test_a_run_says_what_part_human_labels_have(tiny_model, tmp_path):
    pairs_folder = tiny.write_pairs(tmp_path / "data", "soft")
    changes = {"optim__steps": 1, "optim__batch": 6, "data__size": 16}
    assert train.main(arguments(tiny_model, pairs_folder, tmp_path / "run", **changes)) == 0
    [line] = metrics(tmp_path / "run")
    merged = read_targets(pairs_folder, "soft")
    part = merged.weight * np.abs(merged.target - 0.5)  # at margin 0, where the balance is the same for both images of a pair
    assert line["human_gradient_share"] == pytest.approx(part[~np.isnan(merged.human)].sum() / part.sum(), rel=0.02)
    assert line["saturation"] == 0.0


def scored(**gains: tuple[float, float]) -> dict:
    return {"step": 1, "scores": {name: {"mean": 1.0, "gain": sum(ci) / 2, "gain_ci": list(ci)} for name, ci in gains.items()}}


def test_a_scorer_that_is_no_reward_and_falls_is_told_and_nothing_else():
    """Twice in a row, surely, and only in a run that learns from a reward."""
    falls, unsure = scored(pickscore=(0.1, 0.3), hps=(-0.4, -0.1)), scored(pickscore=(-0.4, -0.1), hps=(-0.4, 0.1))
    told = score_symptom([unsure, falls, falls], ["pickscore"])
    assert told is not None and told.startswith("hps, which is no reward of this run, fell by 0.25") and "what pickscore overrates" in told
    for lines, rewards in (
        ([falls], ["pickscore"]),
        ([falls, unsure], ["pickscore"]),
        ([falls, falls], []),
        ([falls, falls], ["hps", "pickscore"]),
    ):
        assert score_symptom(lines, rewards) is None
