"""Balanced-DPO: gradients change, values do not."""

from __future__ import annotations

import pytest
import torch

from dedpo_diffusion import balance_errors, implicit_rewards, margin, preference_loss
from dedpo_diffusion.dpo.balance import balance_coefficients, probability_scale
from dedpo_diffusion.dpo.noising import image_errors


def random_errors(seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.exp(2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype))


ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)  # Stable Diffusion 1.5


@pytest.mark.parametrize("mode", ["none", "output", "relative", "probability"])
def test_forward_values_are_unchanged_bit_for_bit(mode):
    errors, reference = random_errors(0), random_errors(1)
    assert torch.equal(balance_errors(errors, reference, mode=mode, scale=torch.full((64,), 3.0)), errors)


@pytest.mark.parametrize("target", [-0.7, 0.0, 0.5, 1.0, 1.8])
def test_output_mode_gives_equal_output_space_gradient_norms(target):
    """The norms of dL/d(prediction) of the two images of each pair agree, at errors 100 times apart."""
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(8, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.1, 1.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    prediction = (wanted + scale * torch.randn(wanted.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    errors = (prediction - wanted).square().mean(dim=(-3, -2, -1))
    reference = errors.detach() * 1.05

    def norms(mode: str) -> torch.Tensor:
        m = margin(implicit_rewards(balance_errors(errors, mode=mode), reference, beta=2.0))
        loss = preference_loss(m, torch.full_like(m, target)).sum()
        return torch.autograd.grad(loss, prediction, retain_graph=True)[0].flatten(2).norm(dim=-1)

    plain, balanced = norms("none"), norms("output")
    assert (plain[:, 1] / plain[:, 0]).min() > 3
    torch.testing.assert_close(balanced[:, 0], balanced[:, 1], rtol=1e-10, atol=0)


def test_coefficients_sum_to_two_and_are_positive():
    for mode in ("none", "output", "relative", "probability"):
        factors = balance_coefficients(random_errors(3), random_errors(4), mode=mode, scale=torch.ones(64))
        torch.testing.assert_close(factors.sum(dim=1), torch.full((64,), 2.0))
        assert (factors > 0).all()


def test_swapping_the_images_swaps_the_coefficients():
    errors = random_errors(5)
    torch.testing.assert_close(balance_coefficients(errors.flip(1)), balance_coefficients(errors).flip(1))


def test_coefficients_do_not_depend_on_the_errors_unit():
    """Mean or sum reduction, timestep weights and parametrisation multiply both errors of a pair alike."""
    errors = random_errors(6)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(7)) * 1e4 + 1e-3
    torch.testing.assert_close(balance_coefficients(errors * scale), balance_coefficients(errors), rtol=1e-4, atol=1e-6)


def test_relative_equals_none_at_the_reference():
    errors = random_errors(8)
    assert torch.equal(balance_coefficients(errors, errors.clone(), mode="relative"), torch.ones(64, 2))


def test_known_value():
    """e = (0.01, 0.04): u = ln 2, a_0 = 2 sigmoid(ln 2) = 4/3, a_1 = 2/3; 4/3 * sqrt(0.01) = 2/3 * sqrt(0.04)."""
    torch.testing.assert_close(balance_coefficients(torch.tensor([[0.01, 0.04]])), torch.tensor([[4 / 3, 2 / 3]]))


def test_clip_bounds_the_ratio():
    factors = balance_coefficients(torch.tensor([[1e-12, 1e12]]), clip=1.0)
    torch.testing.assert_close(factors[:, 0] / factors[:, 1], torch.tensor([torch.e]))


def test_no_gradient_flows_through_the_coefficients():
    errors = torch.tensor([[0.2, 0.8]], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(balance_errors(errors).sum(), errors)[0]
    torch.testing.assert_close(gradient, balance_coefficients(errors))


def test_image_errors_are_float32_in_bfloat16():
    zeros = torch.zeros(1, 2, 1, 1, 2, dtype=torch.bfloat16)
    ones = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).expand_as(zeros)
    errors = image_errors(ones, zeros)
    assert errors.dtype == torch.float32
    assert errors.tolist() == [[2.5, 2.5]]


def test_probability_scale_is_the_reverse_steps_log_probability():
    """Against the Gaussian itself: x_{t-1} at the mean that the true noise gives, under the mean that the predicted noise gives.

    log N(true mean; predicted mean, s^2) differs from its largest value by -|difference of the means|^2 / (2 s^2), which is to be
    -scale e / 2 with e the mean squared error of the noise; both in float64 but for the scale, which is float32.
    """
    generator = torch.Generator().manual_seed(9)
    noisy, noise, predicted = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    error = (predicted - noise).square().mean()
    for t in (1, 5, 500, 999):
        alpha, abar, before = ABAR[t] / ABAR[t - 1], ABAR[t], ABAR[t - 1]
        variance = (1 - alpha) * (1 - before) / (1 - abar)

        def mean(eps: torch.Tensor, t: int = t) -> torch.Tensor:
            """x_0 from eps, then the mean of q(x_{t-1} | x_t, x_0): eqs. 7 of arXiv 2006.11239."""
            clean = (noisy - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
            beta = 1 - ABAR[t] / ABAR[t - 1]
            kept = (ABAR[t] / ABAR[t - 1]).sqrt() * (1 - ABAR[t - 1]) * noisy
            return (ABAR[t - 1].sqrt() * beta * clean + kept) / (1 - ABAR[t])

        gap = (mean(predicted) - mean(noise)).square().sum() / (2 * variance)
        scale = probability_scale(ABAR, torch.tensor([t]), noise.numel(), tempering=1.0)
        torch.testing.assert_close(0.5 * scale.double() * error, gap[None], rtol=1e-6, atol=0)


def test_probability_scale_at_the_first_step_uses_the_next_variance():
    """abar = (0.9, 0.72, 0.5): at 0, beta 0.1, alpha 0.9; the posterior variance of 1 is 0.2 * 0.1 / 0.28 = 1 / 14.

    kappa_0 = 0.01 * 14 / (0.9 * 0.1) = 14 / 9; kappa_1 = 0.04 * 14 / (0.8 * 0.28) = 2.5. Five elements, tempering 0.1.
    """
    scale = probability_scale(torch.tensor([0.9, 0.72, 0.5]), torch.tensor([1, 0, 1]), 5, tempering=0.1)
    torch.testing.assert_close(scale, 0.5 * torch.tensor([2.5, 14 / 9, 2.5]))


def test_probability_scale_of_v_prediction():
    """v - v' = (eps - eps') / sqrt(abar) at the same x_t, so the errors are abar times smaller in eps."""
    t = torch.tensor([0, 300, 999])
    for_eps, for_v = (probability_scale(ABAR, t, 64, tempering=0.1, prediction=kind) for kind in ("epsilon", "v_prediction"))
    torch.testing.assert_close(for_v, for_eps * ABAR[t].float())


def test_probability_mode_balances_the_probabilities():
    """a_0 / a_1 = exp(u) with u = log p_0 - log p_1: e = (0.1, 0.3), scale 10: u = 1."""
    factors = balance_coefficients(torch.tensor([[0.1, 0.3]]), mode="probability", scale=torch.tensor([10.0]))
    torch.testing.assert_close(factors[:, 0] / factors[:, 1], torch.tensor([torch.e]))


def residuals(seed: int, count: int = 200) -> torch.Tensor:
    """Residuals (B, 2, 16) of winner and loser: any angle, the loser's up to ten times as long."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 2, 16, generator=generator, dtype=torch.float64)
    drawn[:, 1] += drawn[:, 0] * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return drawn * torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1)


def test_output_balance_lets_neither_image_overrule_the_other():
    """With equal gradient norms the loser's pull along the winner's is at most the winner's own, for every angle and either winner."""
    r = residuals(12)
    errors = r.square().mean(dim=2)
    pull = balance_coefficients(errors) * errors.sqrt()
    cosine = torch.cosine_similarity(r[:, 0], r[:, 1], dim=1)
    assert (pull[:, 1] * cosine <= pull[:, 0] * (1 + 1e-9)).all()
    assert (pull[:, 0] * cosine <= pull[:, 1] * (1 + 1e-9)).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="known: none, output, relative, probability"):
        balance_errors(random_errors(0), mode="outputs")
    with pytest.raises(ValueError, match="needs the reference errors"):
        balance_errors(random_errors(0), mode="relative")
    with pytest.raises(ValueError, match="needs a scale"):
        balance_errors(random_errors(0), mode="probability")
    with pytest.raises(ValueError, match="tempering must be positive"):
        probability_scale(ABAR, torch.tensor([1]), 4, tempering=0.0)
    with pytest.raises(ValueError, match="'sample' is not supported"):
        probability_scale(ABAR, torch.tensor([1]), 4, tempering=1.0, prediction="sample")
