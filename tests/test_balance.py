"""Balanced-DPO: gradients change, values do not."""

from __future__ import annotations

import pytest
import torch

from dedpo_diffusion import balance_errors, implicit_rewards, margin, preference_loss
from dedpo_diffusion.balance import balance_coefficients
from dedpo_diffusion.noising import image_errors


def random_errors(seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.exp(2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype))


@pytest.mark.parametrize("mode", ["none", "output", "relative"])
def test_forward_values_are_unchanged_bit_for_bit(mode):
    errors, reference = random_errors(0), random_errors(1)
    assert torch.equal(balance_errors(errors, reference, mode=mode), errors)


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
    for mode in ("none", "output", "relative"):
        factors = balance_coefficients(random_errors(3), random_errors(4), mode=mode)
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


def test_bad_arguments():
    with pytest.raises(ValueError, match="known: none, output, relative"):
        balance_errors(random_errors(0), mode="outputs")
    with pytest.raises(ValueError, match="needs the reference errors"):
        balance_errors(random_errors(0), mode="relative")
