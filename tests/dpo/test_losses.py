"""Errors -> rewards -> margin -> pair loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion import implicit_rewards, margin, preference_loss

TARGETS = torch.tensor([-3.0, 0.0, 0.3, 1.0, 4.0], dtype=torch.float64)


def plain_diffusion_dpo(policy: torch.Tensor, reference: torch.Tensor, winner_first: torch.Tensor, beta: float) -> torch.Tensor:
    """Diffusion-DPO, eq. 14 of arXiv 2311.12908 as its authors compute it: winners and losers apart, hard labels."""
    losses = []
    for e, r, first in zip(policy, reference, winner_first, strict=True):
        w, lose = (0, 1) if first else (1, 0)
        inside = -0.5 * beta * ((e[w] - e[lose]) - (r[w] - r[lose]))
        losses.append(-torch.nn.functional.logsigmoid(inside))
    return torch.stack(losses)


@pytest.mark.parametrize("cap", [None, 10.0])
def test_loss_is_log_two_at_margin_zero_whatever_the_target(cap):
    loss = preference_loss(torch.zeros(5, dtype=torch.float64), TARGETS, margin_cap=cap)
    assert torch.equal(loss, torch.full((5,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("cap", [None, 2.0])
@given(m=st.floats(-30, 30), t=st.floats(-5, 5))
def test_swapping_the_images_and_the_target_changes_nothing(cap, m, t):
    m, t = torch.tensor([m], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(m, t, margin_cap=cap), preference_loss(-m, 1 - t, margin_cap=cap), atol=1e-12, rtol=1e-12)


@given(m=st.floats(-30, 30), a=st.floats(-4, 4), b=st.floats(-4, 4), share=st.floats(0, 1))
def test_loss_is_affine_in_the_target(m, a, b, share):
    m = torch.tensor([m], dtype=torch.float64)
    at = lambda t: preference_loss(m, torch.tensor([t], dtype=torch.float64)).item()  # noqa: E731
    assert at(share * a + (1 - share) * b) == pytest.approx(share * at(a) + (1 - share) * at(b), abs=1e-10)


def test_equals_plain_diffusion_dpo_in_value_and_gradient():
    """Independent writing in a loop over pairs; both in float64, so they agree far below 1e-6."""
    generator = torch.Generator().manual_seed(0)
    policy = (0.1 * torch.rand(16, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = 0.1 * torch.rand(16, 2, generator=generator, dtype=torch.float64)
    first = torch.rand(16, generator=generator) < 0.5
    ours = preference_loss(margin(implicit_rewards(policy, reference, beta=2500.0)), first.double())
    theirs = plain_diffusion_dpo(policy, reference, first, 2500.0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    ours_grad, theirs_grad = (torch.autograd.grad(loss.mean(), policy)[0] for loss in (ours, theirs))
    assert ours_grad.abs().max() > 1
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-6, rtol=1e-6)


def test_known_value():
    """e = (0.1, 0.3), r = (0.2, 0.2), beta 10: rewards -5 * (-0.1, 0.1) = (0.5, -0.5), m = 1.

    softplus(1) = 1.313262; minus 0.25 * 1 is 1.063262.
    """
    rewards = implicit_rewards(torch.tensor([[0.1, 0.3]]), torch.tensor([[0.2, 0.2]]), beta=10.0)
    torch.testing.assert_close(rewards, torch.tensor([[0.5, -0.5]]))
    loss = preference_loss(margin(rewards), torch.tensor([0.25]))
    assert loss.item() == pytest.approx(1.0632617, abs=1e-6)


def test_cap_changes_nothing_inside_and_nothing_to_first_order():
    m = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for t in (0.0, 0.4, 1.0):
        target = torch.full_like(m, t)
        torch.testing.assert_close(preference_loss(m, target, margin_cap=3.0), preference_loss(m, target), atol=0, rtol=0)
    zero = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    capped = torch.autograd.grad(preference_loss(zero, TARGETS, margin_cap=3.0).sum(), zero)[0]
    free = torch.autograd.grad(preference_loss(zero, TARGETS).sum(), zero)[0]
    torch.testing.assert_close(capped, free)


def test_cap_bounds_the_loss_from_below():
    """t = 4, M = 10: the excess 3 can win at most 3 * 10; without the cap the loss falls for ever."""
    m = torch.linspace(0, 1e4, 1001, dtype=torch.float64)
    four = torch.full_like(m, 4.0)
    assert preference_loss(m, four, margin_cap=10.0).min() >= -30
    assert preference_loss(m, four).min() < -2.9e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extreme_margins(dtype):
    m = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype, requires_grad=True)
    loss = preference_loss(m, torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0], dtype=dtype), margin_cap=10.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(m.grad).all()


def test_gradcheck():
    m = torch.linspace(-3, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: preference_loss(x, TARGETS, margin_cap=4.0), m)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: implicit_rewards(torch.zeros(3, 2), torch.zeros(3), beta=1.0), r"\(B, 2\)"),
        (lambda: implicit_rewards(torch.zeros(3, 2), torch.zeros(3, 2), beta=0.0), "beta must be positive"),
        (lambda: preference_loss(torch.zeros(1), torch.zeros(1), kind="hinge"), "known: sigmoid"),
        (lambda: preference_loss(torch.zeros(1), torch.zeros(1), margin_cap=-1.0), "margin_cap must be positive"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
