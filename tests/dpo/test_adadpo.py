"""AdaDPO's coefficient for diffusion: min(P_w / P_l, 2) on the preferred image's gradient alone, and affine in the label."""

from __future__ import annotations

import math

import pytest
import torch

from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.adadpo import adadpo_coefficients, adadpo_loss, told_coefficients
from dedpo_diffusion.dpo.balance import balance_coefficients, probability_scale
from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.dpo.objectives import OBJECTIVES, objective_loss
from dedpo_diffusion.dpo.step import preference_step

KINDS = [name for name, objective in OBJECTIVES.items() if objective.balanced and objective.affine]
FP64 = torch.float64


def drawn(seed: int, count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of policy and reference (B, 2), weights and scales (B,), in float64; log-ratios up to 4."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.rand(2, count, 2, generator=generator, dtype=FP64)
    weight, scale = torch.rand(2, count, generator=generator, dtype=FP64)
    return policy, reference, 0.1 + weight, 8 * scale


def gradient(policy: torch.Tensor, *given: torch.Tensor, **options: object) -> torch.Tensor:
    """Of the summed losses in the errors, (B, 2)."""
    leaf = policy.clone().requires_grad_()
    return torch.autograd.grad(adadpo_loss(leaf, *given, **options).sum(), leaf)[0]


def plain(policy: torch.Tensor, *given: torch.Tensor, **options: object) -> torch.Tensor:
    leaf = policy.clone().requires_grad_()
    return torch.autograd.grad(objective_loss(leaf, *given, **options).sum(), leaf)[0]


def test_hand_worked_coefficients():
    """scale 10: e = (0.1, 0.2): P_0 / P_1 = exp(0.5), P_1 / P_0 = exp(-0.5). e = (0.1, 0.3): e > 2, so 2, and 1 / e."""
    found = adadpo_coefficients(torch.tensor([[0.1, 0.2], [0.1, 0.3], [0.3, 0.1], [0.2, 0.2]]), torch.full((4,), 10.0))
    expected = [[math.exp(0.5), math.exp(-0.5)], [2.0, math.exp(-1)], [math.exp(-1), 2.0], [1.0, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("target", "expected"), [(1.0, [0.5 * math.e**0.5, -0.5]), (0.0, [-0.5, 0.5 * math.e**-0.5])])
def test_a_hand_worked_gradient(target, expected):
    """At margin 0 and beta 2 the plain gradient of -log sigmoid(m) is (0.5, -0.5); the preferred image's gets the coefficient."""
    errors, one = torch.tensor([[0.1, 0.2]], dtype=FP64), torch.ones(1, dtype=FP64)
    coefficients = adadpo_coefficients(errors, 10 * one)
    found = gradient(errors, errors, target * one, one, coefficients, beta=2.0)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=FP64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [-0.7, 0.0, 0.3, 0.5, 1.0, 1.8])
def test_equal_errors_leave_the_gradient_of_none(kind, target):
    policy, reference, weight, scale = drawn(0)
    policy = policy[:, :1].expand(-1, 2).clone()
    coefficients = adadpo_coefficients(policy, scale)
    assert torch.equal(coefficients, torch.ones(64, 2, dtype=FP64))
    given = (reference, torch.full_like(weight, target), weight)
    assert torch.equal(gradient(policy, *given, coefficients, kind=kind, beta=3.0), plain(policy, *given, kind=kind, beta=3.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_values_are_those_of_the_plain_loss_bit_for_bit(kind, cap):
    policy, reference, weight, scale = drawn(1)
    given = (reference, 4 * weight - 1, weight)
    found = adadpo_loss(policy, *given, adadpo_coefficients(policy, scale), kind=kind, beta=3.0, margin_cap=cap)
    assert torch.equal(found, objective_loss(policy, *given, kind=kind, beta=3.0, margin_cap=cap))


@pytest.mark.parametrize("label", [1.0, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_hard_label_the_loser_keeps_its_gradient_and_the_winner_gets_the_coefficient(kind, label):
    policy, reference, weight, scale = drawn(2)
    given = (reference, torch.full_like(weight, label), weight)
    coefficients, winner = adadpo_coefficients(policy, scale), 0 if label else 1
    assert (coefficients[:, winner] == 2).any()
    assert ((coefficients[:, winner] > 1) & (coefficients[:, winner] < 2)).any()
    expected = plain(policy, *given, kind=kind, beta=3.0)
    expected[:, winner] *= coefficients[:, winner]
    torch.testing.assert_close(gradient(policy, *given, coefficients, kind=kind, beta=3.0), expected)


def test_within_the_clip_the_gradients_in_the_two_probabilities_are_equal():
    """What AdaDPO is for: |dL / dP_w| = |dL / dP_l|, with P = exp(-scale e / 2), so that dL / dP = dL / de * (-2 / (scale P))."""
    policy, reference, weight, scale = drawn(3)
    coefficients, label = adadpo_coefficients(policy, scale), torch.ones(64, dtype=FP64)
    found = gradient(policy, reference, label, weight, coefficients, beta=3.0)
    by_probability = found * -2 / (scale[:, None] * torch.exp(-scale[:, None] * policy / 2))
    inside = coefficients[:, 0] < 2
    assert 0 < inside.sum() < 64
    torch.testing.assert_close(by_probability[inside, 0], -by_probability[inside, 1])
    assert (by_probability[~inside, 0].abs() < by_probability[~inside, 1].abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_affine_in_the_label(kind):
    """So merged targets, some of them outside [0, 1], have on average the gradient of the labels that they stand for."""
    policy, reference, weight, scale = drawn(4)
    coefficients = adadpo_coefficients(policy, scale)

    def at(target: float) -> torch.Tensor:
        return gradient(policy, reference, torch.full_like(weight, target), weight, coefficients, kind=kind, beta=3.0)

    for target in (-0.6, 0.25, 0.5, 0.9, 1.7):
        torch.testing.assert_close(at(target), target * at(1.0) + (1 - target) * at(0.0))


def test_the_cap_of_the_margin_bends_both_parts_alike():
    """The part beyond [0, 1] of a target 1.8 is M tanh(-m / M), whose slope is that of -m times sech(m / M)^2: t = 1 + 0.8 sech^2."""
    policy, reference, weight, scale = drawn(5)
    coefficients = adadpo_coefficients(policy, scale)
    m = -1.5 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    bent = 1 + 0.8 / torch.cosh(m / 2).square()
    found = gradient(policy, reference, torch.full_like(weight, 1.8), weight, coefficients, beta=3.0, margin_cap=2.0)
    torch.testing.assert_close(found, gradient(policy, reference, bent, weight, coefficients, beta=3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_images_and_the_label_swaps_the_gradients(kind):
    policy, reference, weight, scale = drawn(6)
    target = 3 * weight - 1
    coefficients, swapped = adadpo_coefficients(policy, scale), adadpo_coefficients(policy.flip(1), scale)
    assert torch.equal(swapped, coefficients.flip(1))
    one = gradient(policy, reference, target, weight, coefficients, kind=kind, beta=3.0, margin_cap=2.0)
    other = gradient(policy.flip(1), reference.flip(1), 1 - target, weight, swapped, kind=kind, beta=3.0, margin_cap=2.0)
    torch.testing.assert_close(other, one.flip(1))


def test_the_ends_of_the_coefficient_are_2_and_the_exponential_of_the_clip():
    far = torch.tensor([[0.0, 1e9], [0.0, 1.0]])
    found = adadpo_coefficients(far, torch.tensor([1.0, 6.0]), clip=3.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, math.exp(-3)], [2.0, math.exp(-3)]]))
    tight = adadpo_coefficients(far, torch.tensor([1.0, 6.0]), clip=0.1)
    torch.testing.assert_close(tight, torch.tensor([[math.exp(0.1), math.exp(-0.1)]] * 2))


def test_within_the_clip_the_ratio_is_that_of_the_probability_balance():
    policy, _, _, scale = drawn(7)
    coefficients = adadpo_coefficients(policy, scale)
    inside = coefficients[:, 0] < 2
    both = balance_coefficients(policy, mode="probability", scale=scale)
    torch.testing.assert_close(coefficients[inside, 0], (both[:, 0] / both[:, 1])[inside])


def test_no_gradient_flows_through_the_coefficient():
    """Through a coefficient with a graph the winner's gradient would be another than the hand-worked one, and so would the loser's."""
    errors = torch.tensor([[0.1, 0.2]], dtype=FP64, requires_grad=True)
    coefficients = adadpo_coefficients(errors, torch.tensor([10.0], dtype=FP64))
    assert not coefficients.requires_grad
    one = torch.ones(1, dtype=FP64)
    loss = adadpo_loss(errors, errors.detach(), one, one, coefficients, beta=2.0)
    found = torch.autograd.grad(loss.sum(), errors)[0]
    torch.testing.assert_close(found, torch.tensor([[0.5 * math.e**0.5, -0.5]], dtype=FP64))


def test_float32_agrees_with_float64():
    policy, reference, weight, scale = drawn(8)
    options = {"beta": 2000.0, "margin_cap": 10.0}
    exact = gradient(policy, reference, weight, weight, adadpo_coefficients(policy, scale), **options)
    low = [value.float() for value in (policy, reference, weight, weight)]
    found = gradient(*low, adadpo_coefficients(low[0], scale.float()), **options)
    assert found.dtype == torch.float32 and exact.dtype == FP64
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)  # a margin of some 100 is rounded to 1e-5


class Given:
    """A model whose policy predicts a leaf, so that the gradient of a whole step can be written out."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        self.process = ForwardProcess(torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0), "epsilon")
        self.noise = torch.randn(6, 4, 3, 3, generator=generator)
        spread = torch.tensor([[0.3, 1.0], [1.0, 0.3]] * 3).view(6, 2, 1, 1, 1)
        drawn = spread * torch.randn(6, 2, 4, 3, 3, generator=generator)
        self.prediction = (self.noise[:, None] + drawn).requires_grad_()
        self.base = self.prediction.detach() + 0.1 * torch.randn(self.prediction.shape, generator=generator)

    def predict(self, noisy, timesteps, conditioning, *, reference=False):
        return self.base if reference else self.prediction


def test_a_step_is_the_formula_at_the_pairs_own_timestep():
    model, t = Given(), torch.tensor([2, 50, 200, 400, 700, 999])
    target, weight = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0, 0.5]), torch.linspace(0.5, 2, 6)
    pairs = PairBatch(torch.zeros_like(model.base), Conditioning(torch.zeros(6, 1, 1)), target, weight)
    result = preference_step(model, pairs, timesteps=t, noise=model.noise, beta=3.0, balance="adadpo", balance_tempering=0.01)
    found = torch.autograd.grad(result.loss.sum(), model.prediction)[0]

    residual = (model.prediction - model.noise[:, None]).detach()
    e, r = residual.square().mean(dim=(2, 3, 4)), (model.base - model.noise[:, None]).square().mean(dim=(2, 3, 4))
    m = -1.5 * ((e - r)[:, 0] - (e - r)[:, 1])
    scale = probability_scale(model.process.alphas_cumprod, t, 36, tempering=0.01)
    ratio = torch.exp(0.5 * scale * (e[:, 1] - e[:, 0]))
    up, down = ratio.clamp(max=2), (1 / ratio).clamp(max=2)
    assert (up[:2] != 1).all()
    first = 1.5 * (target * (1 - m.sigmoid()) * up - (1 - target) * m.sigmoid())  # dL / de_0
    second = 1.5 * (-target * (1 - m.sigmoid()) + (1 - target) * m.sigmoid() * down)
    expected = (weight[:, None] * torch.stack([first, second], 1))[:, :, None, None, None] * 2 * residual / 36
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.loss, weight * (torch.nn.functional.softplus(m) - target * m))
    one = torch.ones(6)
    torch.testing.assert_close(
        result.coefficients, torch.where(target[:, None] >= 0.5, torch.stack([up, one], 1), torch.stack([one, down], 1))
    )


def test_told_coefficients_are_those_of_the_likelier_label():
    found = told_coefficients(torch.tensor([[1.5, 0.5]] * 4), torch.tensor([1.2, 0.5, 0.2, -1.0]))
    assert found.tolist() == [[1.5, 1.0], [1.5, 1.0], [1.0, 0.5], [1.0, 0.5]]


def test_what_it_is_not_for_is_refused():
    policy, reference, weight, scale = (value.float() for value in drawn(10))
    for kind in ("dr_dpo", "kto", "sft"):
        with pytest.raises(ValueError, match=f"affine in the label, which objective '{kind}' is not"):
            adadpo_loss(policy, reference, weight.clamp(0, 1), weight, adadpo_coefficients(policy, scale), kind=kind, beta=3.0)
    with pytest.raises(ValueError, match=r"adadpo looks at the label"):
        balance_coefficients(policy, mode="adadpo")
