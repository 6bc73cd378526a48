"""Denoising steps as draws of Gaussians: their means, probabilities and divergences, advantages, and the two losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.dpo.policy_gradient import (
    END,
    clipped_loss,
    ddim_mean,
    ddim_timesteps,
    leave_one_out,
    log_probability,
    squared_advantage_loss,
    step_deviation,
    step_kl,
)

SHAPE = (3, 4, 5, 5)
CUMULATED = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)  # Stable Diffusion's


def process(prediction: str = "epsilon") -> ForwardProcess:
    return ForwardProcess(CUMULATED, prediction)


def normals(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_is_that_of_diffusers_own_sampler(prediction, eta):
    from diffusers import DDIMScheduler

    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "prediction_type": prediction}
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    scheduler.set_timesteps(20)
    visited = ddim_timesteps(1000, 20)
    assert visited[:-1].tolist() == scheduler.timesteps.tolist() and visited[-1] == END
    noisy, found, noise = normals(3)
    for now, then in zip(visited[:-1].tolist(), visited[1:].tolist(), strict=True):
        t, p = torch.full((3,), now), torch.full((3,), then)
        ours = ForwardProcess(scheduler.alphas_cumprod, prediction)
        deviation = step_deviation(ours, t, p, eta=eta).view(-1, 1, 1, 1)
        made = ddim_mean(ours, noisy, found, t, p, eta=eta) + deviation * noise
        wanted = scheduler.step(found, now, noisy, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(made.float(), wanted, atol=1e-5, rtol=1e-5)


def test_log_probabilities_are_those_of_a_gaussian_written_by_hand():
    drawn, mean = normals(2)
    deviation = torch.tensor([0.05, 0.4, 1.3], dtype=torch.float64)
    found = log_probability(drawn, mean, deviation)
    for row in range(SHAPE[0]):
        by_hand = 0.0
        for x, m in zip(drawn[row].flatten().tolist(), mean[row].flatten().tolist(), strict=True):
            s = deviation[row].item()
            by_hand += -((x - m) ** 2) / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
        assert found[row].item() == pytest.approx(by_hand, rel=1e-6, abs=1e-6)
    own = Normal(mean.double(), deviation.view(-1, 1, 1, 1)).log_prob(drawn.double()).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, own, atol=1e-6, rtol=0)


def test_the_last_step_draws_nothing_and_neither_does_any_at_eta_0():
    visited = ddim_timesteps(1000, 7)
    deviations = step_deviation(process(), visited[:-1], visited[1:], eta=1.0)
    assert (deviations[:-1] > 0.01).all() and deviations[-1] == 0
    assert (step_deviation(process(), visited[:-1], visited[1:], eta=0.0) == 0).all()
    now, then = CUMULATED.double()[visited[:-2]], CUMULATED.double()[visited[1:-1]]
    ddpm = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()  # Ho et al., eq. 7, of the shortened schedule
    torch.testing.assert_close(deviations[:-1], ddpm)


@pytest.mark.parametrize("steps", [1, 1001])
def test_a_number_of_steps_that_no_sampler_takes_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} sampler steps"):
        ddim_timesteps(1000, steps)


def test_the_divergence_is_that_of_the_gaussians_and_zero_at_the_reference():
    mean, other = (values.double() for values in normals(2))
    deviation = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    assert (step_kl(mean, mean, deviation) == 0).all()
    wide = deviation.view(-1, 1, 1, 1)
    wanted = kl_divergence(Normal(mean, wide), Normal(other, wide)).flatten(1).sum(dim=1)
    torch.testing.assert_close(step_kl(mean, other, deviation), wanted)


def test_advantages_are_leave_one_out_and_sum_to_zero():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    wanted = torch.tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards), wanted)
    many = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert leave_one_out(many).sum(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(leave_one_out(many + torch.arange(7.0)[:, None]), leave_one_out(many))  # what a prompt is worth falls out


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_one_image_a_prompt_has_no_others(shape):
    with pytest.raises(ValueError, match="at least two images"):
        leave_one_out(torch.zeros(shape))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0), (1.1, 1.0, -1.1, -1.0), (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -1.0),
        (0.5, -1.0, 0.8, 0.0), (1.5, -1.0, 1.5, 1.0),
    ],
)  # fmt: skip
def test_the_clip_at_known_ratios(ratio, advantage, loss, slope):
    """The slope is that along the ratio: 0 once the ratio is beyond the bound on the side that the advantage asks for."""
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found = clipped_loss(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and log_ratio.grad.item() / ratio == pytest.approx(slope)


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_the_squared_loss_begins_as_reinforce_and_ends_at_the_tilted_reference(temperature):
    advantage = torch.tensor([0.4, -1.0], dtype=torch.float64)
    log_ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    squared_advantage_loss(log_ratio, advantage, temperature=temperature).sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantage)
    at_best = squared_advantage_loss(advantage / temperature, advantage, temperature=temperature)
    assert (at_best == 0).all() and (squared_advantage_loss(advantage / temperature + 0.1, advantage, temperature=temperature) > 0).all()
