"""Validation in the course of training: its numbers, that training does not feel it, resume, the best step, what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dedpo_diffusion.dpo.losses import preference_loss
from dedpo_diffusion.dpo.noising import TimestepDraw
from dedpo_diffusion.dpo.objectives import OBJECTIVES
from dedpo_diffusion.training.health import FEW, held_out_symptom
from dedpo_diffusion.training.held_out import held_out_draws, held_out_kind, pair_losses, summarise_held_out, summarise_scores
from dedpo_diffusion.weights.run_folder import best_line
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

SIGMOID = {"kind": "sigmoid", "beta": 200.0, "options": {}, "margin_cap": 10.0}


# ---- the numbers


def errors(pairs: int = 12, draws: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Errors of policy and start (P, K, 2), labels with a tie, timesteps and weights (P, K)."""
    generator = torch.Generator().manual_seed(seed)
    start = 0.2 + 0.1 * torch.rand(pairs, draws, 2, generator=generator)
    policy = start + 0.01 * torch.randn(pairs, draws, 2, generator=generator)
    label = torch.tensor([0.0, 1.0, 0.5, 0.8])[torch.arange(pairs) % 4]
    return policy, start, label, torch.randint(1000, (pairs, draws), generator=generator), torch.ones(pairs, draws)


def test_every_stratum_of_the_timesteps_is_drawn_and_draws_depend_on_seed_and_pair_alone():
    how = TimestepDraw(100, 900)
    for pair in range(20):
        found = held_out_draws(3, pair, 8, (4, 2, 2), how)
        assert ((found.timesteps - 100) // 100).tolist() == list(range(8))
        assert not found.drop_caption.any()
    assert torch.equal(held_out_draws(3, 5, 8, (4, 2, 2), how).noise, held_out_draws(3, 5, 8, (4, 2, 2), how).noise)
    assert not torch.equal(held_out_draws(3, 5, 8, (4, 2, 2), how).noise, held_out_draws(4, 5, 8, (4, 2, 2), how).noise)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_draws_have_the_distribution_of_training(sampling):
    """All strata of many pairs together against draws of training: quantiles agree to the noise of the latter, 4 of its deviations."""
    how = TimestepDraw(50, 650, sampling, -0.5, 0.7)
    mine = how.quantile((torch.arange(20000) + 0.5) / 20000).double()
    drawn = how.draw(20000, torch.Generator().manual_seed(0)).double()
    for share in (0.1, 0.5, 0.9):
        assert abs((drawn < mine.quantile(share)).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / 20000) + 2e-3
    assert mine.min() >= 50 and mine.max() <= 649


def test_a_policy_that_is_its_start_has_loss_log_two_and_no_accuracy():
    policy, start, label, timesteps, weight = errors()
    line = summarise_held_out(start, start, label, timesteps, weight, schedule=1000, objective=SIGMOID)
    assert line["loss"] == pytest.approx(math.log(2)) == line["start_loss"]
    assert line["accuracy"] == 0.5 and line["margin"] == 0.0
    assert line["loss_ci"] == [line["loss"]] * 2


def test_numbers_of_a_validation_by_hand():
    """m = -100 ((e_0 - r_0) - (e_1 - r_1)), mean over draws; three decided pairs, one of them wrong."""
    start = torch.full((4, 2, 2), 0.2)
    policy = start.clone()
    policy[:, 0, 0] += torch.tensor([-0.01, -0.03, 0.02, 0.5])  # margins 1, 3, -2, -50 at the first draw, 0 at the second
    label, timesteps = torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.tensor([[10, 950]] * 4)
    line = summarise_held_out(policy, start, label, timesteps, torch.ones(4, 2), schedule=1000, objective=SIGMOID)
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(3)), math.log1p(math.exp(-2)), math.log1p(math.exp(-50)) + 25]
    np.testing.assert_allclose(line["pair_loss"], [(loss + math.log(2)) / 2 for loss in expected], rtol=1e-5)
    assert line["loss"] == pytest.approx(np.mean(line["pair_loss"]))
    assert line["accuracy"] == pytest.approx(2 / 3)
    assert line["margin"] == pytest.approx((1 - 3 + 2) / 6, abs=1e-5)
    assert [(part["first"], part["count"]) for part in line["buckets"]] == [(0, 3), (900, 3)]
    assert line["buckets"][0]["margin"] == pytest.approx(0.0, abs=1e-5) and line["buckets"][1]["margin"] == 0


def test_swapping_all_images_and_labels_changes_nothing():
    policy, start, label, timesteps, weight = errors()
    one = summarise_held_out(policy, start, label, timesteps, weight, schedule=1000, objective=SIGMOID)
    other = summarise_held_out(policy.flip(-1), start.flip(-1), 1 - label, timesteps, weight, schedule=1000, objective=SIGMOID)
    assert json.dumps(one) != json.dumps(summarise_held_out(policy, start, 1 - label, timesteps, weight, schedule=1000, objective=SIGMOID))
    for name in ("loss", "accuracy", "margin"):
        assert one[name] == pytest.approx(other[name], rel=1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_has_a_held_out_loss_that_is_a_mean_over_pairs(kind):
    """Taking pairs away leaves the others' losses as they are, which the batch objectives' own losses would not."""
    policy, start, label, _, weight = errors()
    objective = SIGMOID | {"kind": kind, "options": dict(OBJECTIVES[kind].options)}
    whole = pair_losses(policy, start, label, weight, **objective)
    assert torch.equal(whole[:5], pair_losses(policy[:5], start[:5], label[:5], weight[:5], **objective))
    plain = held_out_kind(kind) == "sigmoid"
    assert plain == (kind in ("sigmoid", "dr_dpo", "kto"))
    assert plain == torch.allclose(whole, pair_losses(policy, start, label, weight, **SIGMOID))


def test_timestep_weights_stand_outside_the_loss():
    policy, start, label, _, weight = errors(draws=1)
    twice = pair_losses(policy, start, label, 2 * weight, **SIGMOID)
    torch.testing.assert_close(twice, 2 * pair_losses(policy, start, label, weight, **SIGMOID))
    m = -100 * ((policy - start)[:, 0, 0] - (policy - start)[:, 0, 1]).double()
    torch.testing.assert_close(twice, 2 * preference_loss(m, label.double()), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_none_and_never_best():
    policy, start, label, timesteps, weight = errors()
    policy[3, 1, 0] = torch.nan
    line = summarise_held_out(policy, start, label, timesteps, weight, schedule=1000, objective=SIGMOID)
    assert line["loss"] is None and line["accuracy"] is None and line["loss_ci"] is None and line["pair_loss"][3] is None
    json.dumps(line, allow_nan=False)
    lines = [{"step": 1} | line, {"step": 2, "loss": 0.7}, {"step": 3, "loss": 0.6}, {"step": 4, "loss": 0.6}]
    assert best_line(lines[:1]) is None
    assert best_line(lines)["step"] == 3


def test_without_held_out_pairs_the_first_scorer_decides():
    lines = [{"step": k, "scores": {"a": {"mean": a}, "b": {"mean": -a}}} for k, a in enumerate((0.1, 0.4, 0.4, 0.2))]
    assert best_line(lines)["step"] == 1
    assert best_line([{"step": 1}]) is None


def test_scores_are_paired_and_clustered_by_prompt():
    start = np.array([1.0, 5.0, 2.0, 4.0])
    found = summarise_scores(start + 0.5, start, ["a", "b", "a", "c"])
    assert (found["gain"], found["gain_ci"]) == (pytest.approx(0.5), [pytest.approx(0.5)] * 2)
    assert found["mean"] - found["start"] == pytest.approx(0.5)
    uneven = summarise_scores(start + np.array([3.0, 0.0, 3.0, 0.0]), start, ["a", "b", "a", "c"])
    assert uneven["gain"] == pytest.approx(1.0)  # three prompts, one of which gained 3
    assert summarise_scores(start, start, ["a"] * 4)["gain_ci"] is None


# ---- the symptom


def validations(*means: float, noise: float = 0.0, pairs: int = 40, seed: int = 0) -> list[dict]:
    """Validations whose pairs have losses of their own, much wider than what moves between validations."""
    rng = np.random.default_rng(seed)
    own = rng.normal(0, 0.5, pairs)
    found = [own + mean + noise * rng.normal(size=pairs) for mean in means]
    return [{"step": 10 * k, "loss": float(loss.mean()), "pair_loss": loss.tolist()} for k, loss in enumerate(found)]


def test_a_rise_of_the_held_out_loss_is_told_by_its_best_step():
    start, *lines = validations(0.69, 0.60, 0.55, 0.66, 0.70, noise=0.05)
    assert "step 20" in held_out_symptom(lines, start["pair_loss"])
    assert held_out_symptom(lines[:3], start["pair_loss"]) is None  # one high validation is not enough
    assert held_out_symptom(lines[:2], start["pair_loss"]) is None
    start, *lines = validations(0.69, 0.75, 0.80, noise=0.05)
    assert "before training" in held_out_symptom(lines, start["pair_loss"])
    start, *lines = validations(0.69, 0.5, 0.9, 0.9, pairs=FEW - 1)
    assert held_out_symptom(lines, start["pair_loss"]) is None
    assert held_out_symptom([{"step": 1, "scores": {}}] * 3, []) is None


def test_noise_between_validations_is_no_rise():
    """Policies that are as good as each other, with noise as wide as the pairs': looked at after each of 20 validations."""
    fooled = 0
    for seed in range(300):
        start, *lines = validations(*[0.6] * 21, noise=0.5, seed=seed)
        fooled += any(held_out_symptom(lines[:k], start["pair_loss"]) for k in range(2, 21))
    assert fooled <= 15


def test_copies_of_a_pair_in_one_cluster_make_no_rise_surer():
    start, *lines = validations(0.69, 0.72, 0.72, pairs=12, noise=0.1)
    assert held_out_symptom(lines, start["pair_loss"]) is None
    copied = [line | {"pair_loss": np.repeat(line["pair_loss"], 20).tolist()} for line in (start, *lines)]
    assert held_out_symptom(copied[1:], copied[0]["pair_loss"]) is not None  # as if all were draws of their own
    assert held_out_symptom(copied[1:], copied[0]["pair_loss"], np.repeat(np.arange(12), 20)) is None
    assert held_out_symptom(copied[1:], copied[0]["pair_loss"], np.zeros(240)) is None


def test_copies_of_a_pair_in_one_cluster_narrow_no_interval():
    rng = np.random.default_rng(0)
    start = torch.full((12, 2, 2), 0.2)
    policy, label = start + torch.tensor(rng.normal(0, 0.02, (12, 2, 2)), dtype=torch.float32), torch.tensor([1.0, 0.0, 0.0, 1.0] * 3)
    timesteps, weight = torch.tensor([[10, 950]] * 12), torch.ones(12, 2)
    rows = torch.arange(12).repeat_interleave(3)
    options = {"schedule": 1000, "objective": SIGMOID}
    once = summarise_held_out(policy, start, label, timesteps, weight, **options)
    columns = [values[rows] for values in (policy, start, label, timesteps, weight)]
    copies, alone = (summarise_held_out(*columns, **options, clusters=clusters) for clusters in (rows.numpy(), None))
    for name in ("loss_ci", "accuracy_ci"):
        assert copies[name] == pytest.approx(once[name], abs=1e-9 if name == "loss_ci" else 0.02)  # clusters count C / (C - 1)
        assert alone[name][1] - alone[name][0] < 0.7 * (once[name][1] - once[name][0])
    assert copies["loss"] == pytest.approx(once["loss"]) and copies["accuracy"] == pytest.approx(once["accuracy"])
