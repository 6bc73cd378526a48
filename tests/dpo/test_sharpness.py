"""How sharp targets are: where the loss is least, medians by weight, and the beta that puts the typical pair where it is wanted."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from scipy.optimize import minimize_scalar

from dedpo_diffusion.dpo.objectives import OBJECTIVES, objective_loss
from dedpo_diffusion.dpo.sharpness import Sharpness, beta_for, error_gap, sharpness, stopping_margins, weighted_median

SOFT = torch.tensor([0.05, 0.3, 0.5, 0.62, 0.97], dtype=torch.float64)
STOPPING = [kind for kind, objective in OBJECTIVES.items() if objective.stop is not None]
BETA = 40.0


def loss_at(gap: float, target: float, kind: str, beta: float = BETA, cap: float | None = None) -> float:
    """Loss of one pair whose error of image 0 has fallen by `gap` against image 1's, which is the only parameter here."""
    reference = torch.ones(1, 2, dtype=torch.float64)
    policy = reference + torch.tensor([[-gap / 2, gap / 2]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return float(objective_loss(policy, reference, target * one, one, kind=kind, beta=beta, margin_cap=cap))


def test_only_objectives_of_the_margin_alone_have_a_stop():
    assert STOPPING == ["sigmoid", "linear", "ipo", "cdpo", "dr_dpo"]
    assert all(stopping_margins(SOFT, kind=kind) is None and sharpness(SOFT, SOFT, kind=kind) is None for kind in ("kto", "mapo", "sft"))


@pytest.mark.parametrize("kind", STOPPING)
@pytest.mark.parametrize("target", SOFT.tolist())
def test_a_model_of_one_parameter_stops_where_it_is_said(kind, target):
    stop = float(stopping_margins(torch.tensor([target], dtype=torch.float64), kind=kind))
    found = minimize_scalar(lambda gap: loss_at(gap, target, kind), bounds=(-1, 1), method="bounded", options={"xatol": 1e-10}).x
    assert found == pytest.approx(error_gap(stop, BETA), abs=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.4, -0.2])
@pytest.mark.parametrize("cap", [None, 10.0])
def test_hard_labels_and_targets_outside_never_stop(target, cap):
    stop = float(stopping_margins(torch.tensor([target], dtype=torch.float64)))
    assert stop == math.copysign(math.inf, target - 0.5)
    losses = [loss_at(math.copysign(gap, stop), target, "sigmoid", cap=cap) for gap in (0.0, 0.1, 0.5, 1.0)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


def test_hard_labels_stop_with_cdpo_and_ipo_and_targets_outside_with_ipo():
    assert stopping_margins(torch.tensor([1.0]).double(), kind="cdpo", options={"flips": 0.2}).item() == pytest.approx(math.log(4))
    assert stopping_margins(torch.tensor([1.0, -0.5]).double(), kind="ipo").tolist() == [0.5, -1.0]


@pytest.mark.parametrize("kind", STOPPING)
def test_images_may_be_swapped(kind):
    target = torch.tensor([0.0, 0.125, 0.25, 0.75, 0.5, 1.0]).double()
    assert torch.allclose(stopping_margins(1 - target, kind=kind), -stopping_margins(target, kind=kind), rtol=1e-12, atol=0)
    swapped, found = (astuple(sharpness(values, torch.arange(1, 7), kind=kind)) for values in (1 - target, target))
    assert swapped == pytest.approx(found, rel=1e-12)


def test_known_values():
    target = torch.tensor([0.5, 0.75, 0.9, 1.0, 1.5, -0.5]).double()
    found = sharpness(target, torch.tensor([4.0, 3.0, 1.0, 1.0, 0.5, 0.5]).double())
    assert found.typical == pytest.approx(math.log(3)) and found.mean == pytest.approx((3 * math.log(3) + math.log(9)) / 8)
    assert (found.hard, found.outside) == pytest.approx((0.1, 0.1))
    hard = sharpness(torch.tensor([0.0, 1.0]), torch.ones(2))
    assert (hard.typical, hard.hard, hard.outside) == (math.inf, 1.0, 0.0) and math.isnan(hard.mean)


def test_a_weight_counts_like_so_many_pairs_and_only_relative_to_the_others():
    target, times = torch.tensor([0.9, 0.2, 0.55, 1.0, 0.4]).double(), torch.tensor([2, 5, 3, 1, 4])
    repeated = torch.repeat_interleave(target, times)
    once = sharpness(target, 7.3 * times.double())
    assert astuple(once) == pytest.approx(astuple(sharpness(repeated, torch.ones(15))))
    assert once.typical == repeated.logit().abs().sort().values[7]


def test_the_median_of_many_equal_shares_is_the_lower_one_whatever_the_rounding():
    for count in (2, 10, 1000, 4242):
        assert weighted_median(torch.arange(count).double(), torch.ones(count).double() / count) == count // 2 - 1


@pytest.mark.parametrize("kind", STOPPING)
def test_the_typical_pair_stops_where_it_is_wanted(kind):
    found = sharpness(SOFT, torch.ones(5), kind=kind)
    for wanted in (0.1, 2.0, 17.0):
        assert error_gap(found.typical, beta_for(BETA, found, wanted)) == pytest.approx(error_gap(wanted, BETA), rel=1e-8)


def test_what_they_are_already_changes_no_bit():
    found = sharpness(SOFT, torch.ones(5))
    assert beta_for(math.pi, found, found.typical) == math.pi


@pytest.mark.parametrize("typical", [0.0, math.inf])
def test_no_beta_moves_ties_or_hard_labels(typical):
    with pytest.raises(ValueError, match="no beta brings a typical margin"):
        beta_for(BETA, Sharpness(typical, 0.0, 0.5, 0.0), 2.0)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_dividing_beta_and_multiplying_logits_stop_alike_and_start_otherwise(factor):
    """The gradient at the start keeps its direction over pairs with beta, and not with logits; at the optimum both are 0."""
    reference = torch.ones(5, 2, dtype=torch.float64)
    sharper = torch.sigmoid(factor * SOFT.logit())

    def pull(target: torch.Tensor, beta: float, gap: torch.Tensor) -> torch.Tensor:
        policy = (reference + torch.stack([-gap / 2, gap / 2], dim=1)).requires_grad_()
        return torch.autograd.grad(objective_loss(policy, reference, target, torch.ones(5), beta=beta).sum(), policy)[0][:, 0]

    start, optimum = torch.zeros(5).double(), 2 * factor * SOFT.logit() / BETA
    plain = pull(SOFT, BETA, start)
    assert torch.allclose(pull(SOFT, BETA / factor, start), plain / factor)
    by_logits = pull(sharper, BETA, start)
    assert (by_logits[0] / plain[0]).item() != pytest.approx((by_logits[3] / plain[3]).item(), rel=0.05)
    for target, beta in ((SOFT, BETA / factor), (sharper, BETA)):
        assert torch.allclose(pull(target, beta, optimum), start, atol=1e-12)
