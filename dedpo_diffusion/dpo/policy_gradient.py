"""Denoising as a policy: each step of a stochastic DDIM sampler is a draw of a Gaussian, whose probability a reward can raise.

    x_p = mean(x_t, prediction) + std z,   z standard normal,   p < t the timestep that the sampler goes to

Song et al., arXiv 2010.02502, eq. 12 and 16. At eta 1 this is DDPM's sampler, at eta 0 it draws nothing, and there is no probability.
The whole of a trajectory is one decision after the other for one reward, that of the image it ends in (Black et al., arXiv 2305.13301).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dedpo_diffusion.dpo.noising import ForwardProcess

END = -1  # the timestep of the clean latent: it carries no noise


def ddim_timesteps(schedule: int, steps: int) -> Tensor:
    """The timesteps (steps + 1,) int64 that a sampler visits: evenly spread down from the last one of the schedule, then `END`.

    Reference: the spacing "trailing" of Lin et al., arXiv 2305.08891, section 3.3.

    Raises:
        ValueError: fewer than 2 steps, or more than the schedule has.
    """
    if not 2 <= steps <= schedule:
        raise ValueError(f"{steps} sampler steps: give a number from 2 to {schedule}")
    visited = [round(schedule * (1 - k / steps)) - 1 for k in range(steps)]
    return torch.tensor([*visited, END])


def _cumulated(process: ForwardProcess, timesteps: Tensor, like: Tensor) -> Tensor:
    """(B, 1, ..., 1) float64: the cumulated alphas at timesteps (B,), 1 at `END`."""
    there = process.alphas_cumprod.to(like.device).double()[timesteps.clamp(min=0)]
    return torch.where(timesteps < 0, torch.ones_like(there), there).view(-1, *[1] * (like.ndim - 1))


def _variance(now: Tensor, then: Tensor) -> Tensor:
    """DDPM's variance of a step between these cumulated alphas, of their shape; DDIM's is eta^2 times it."""
    return ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0)


def step_deviation(process: ForwardProcess, timesteps: Tensor, following: Tensor, *, eta: float) -> Tensor:
    """Standard deviation (B,) float64 of the draw that leads from timesteps (B,) to those that follow; 0 where it leads to `END`."""
    now, then = (_cumulated(process, t, timesteps) for t in (timesteps, following))
    return eta * _variance(now, then).sqrt()


def ddim_mean(process: ForwardProcess, noisy: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor, *, eta: float) -> Tensor:
    """Mean (B, ..., C, h, w) float64 of the draw from x_t of that shape, given the model's prediction of it.

    Args:
        process: of the model: its schedule, and what it predicts.
        noisy: x_t.
        prediction: at x_t, of the same shape; the mean carries its graph.
        timesteps, following: t and p (B,); p is `END` for the last step.
        eta: share of DDPM's noise.
    """
    now, then = (_cumulated(process, t, noisy) for t in (timesteps, following))
    x, found = noisy.double(), prediction.double()
    if process.prediction == "epsilon":
        noise, clean = found, (x - (1 - now).sqrt() * found) / now.sqrt()
    else:
        noise, clean = now.sqrt() * found + (1 - now).sqrt() * x, now.sqrt() * x - (1 - now).sqrt() * found
    return then.sqrt() * clean + (1 - then - eta**2 * _variance(now, then)).clamp(min=0).sqrt() * noise


def log_probability(drawn: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log density (B,) float64 of draws (B, ...) under Gaussians of these means (B, ...) and standard deviations (B,).

    It is that of the whole latent: a sum over its numbers, not their mean, so that the ratio of two is a ratio of probabilities.
    """
    away = (drawn.double() - mean.double()).flatten(1).square().sum(dim=1)
    count = drawn[0].numel()
    return -away / (2 * deviation.square()) - count * (deviation.log() + 0.5 * math.log(2 * math.pi))


def step_kl(mean: Tensor, reference: Tensor, deviation: Tensor) -> Tensor:
    """KL divergence (B,) float64 of Gaussians of one standard deviation (B,) from those around the reference's means (B, ...).

    |mean - reference|^2 / (2 std^2). Summed over a trajectory's steps, its mean over the policy's own trajectories is the divergence of
    the two distributions of trajectories.
    """
    return (mean.double() - reference.double()).flatten(1).square().sum(dim=1) / (2 * deviation.square())


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages (P, K) of K images of P prompts: the reward of each minus the mean reward of the prompt's other images.

    They sum to 0 for each prompt. The baseline does not depend on the image, so the gradient stays unbiased.

    Reference: Kool et al., Buy 4 REINFORCE samples, get a baseline for free, 2019; for diffusion Gupta et al., arXiv 2503.00897.

    Raises:
        ValueError: fewer than two images a prompt.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; give (P, K) with at least two images of each prompt")
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def clipped_loss(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """LOOP's loss (B,): -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), of log probability ratios and advantages A (B,).

    At ratio 1 its gradient is that of REINFORCE, -A grad log pi. Beyond the bound, on the side that the advantage asks for, it is 0.

    Reference: Gupta et al., arXiv 2503.00897; Schulman et al., arXiv 1707.06347, eq. 7.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def squared_advantage_loss(log_ratio: Tensor, advantage: Tensor, *, temperature: float) -> Tensor:
    """APA's loss (B,): lambda / 2 (log(pi / pi_ref) - A / lambda)^2, of log ratios to the reference and advantages A (B,).

    Its minimum is pi proportional to pi_ref exp(A / lambda), the best policy whose KL divergence costs lambda. The factor lambda / 2 is
    this project's: with it the gradient at the reference is REINFORCE's, whatever lambda is.

    Reference: Zhu et al., arXiv 2306.02231.
    """
    return temperature / 2 * (log_ratio - advantage / temperature).square()
