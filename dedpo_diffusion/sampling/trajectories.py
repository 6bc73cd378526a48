"""Trajectories of a stochastic DDIM sampler, every state kept: from the noise of a seed to a clean latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dedpo_diffusion.core.records import Tensors
from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.dpo.policy_gradient import ddim_mean, log_probability, step_deviation
from dedpo_diffusion.sampling.sampler import initial_noise


@dataclass(frozen=True)
class Trajectories(Tensors):
    """N trajectories of T steps: `states` (N, T + 1, C, h, w) float32, and `log_probability` (N, T) float64 of the draw of each step, 0
    where a step draws nothing."""

    states: Tensor
    log_probability: Tensor


@torch.no_grad()
def sample_trajectories(
    predict: Callable[[Tensor, Tensor], Tensor], process: ForwardProcess, seeds: Sequence[int], *, timesteps: Tensor, eta: float,
    shape: tuple[int, int, int], device: torch.device,
) -> Trajectories:  # fmt: skip
    """N trajectories, sampled as one batch.

    An image's noises are a function of its seed and the latent's shape alone, whatever the device and its company.

    Args:
        predict: the model's prediction, guidance included, of states (N, C, h, w) at timesteps (N,).
        process: of the model.
        seeds: N seeds.
        timesteps: (T + 1,), as `ddim_timesteps` gives them.
        eta: share of DDPM's noise in every step.
        shape: (C, h, w) of a latent.
        device: of the model.
    """
    first, generators = initial_noise(seeds, shape)
    states, found = [first.to(device)], []
    for now, then in zip(timesteps[:-1].tolist(), timesteps[1:].tolist(), strict=True):
        t, p = (torch.full((len(seeds),), value, device=device) for value in (now, then))
        mean, deviation = ddim_mean(process, states[-1], predict(states[-1], t), t, p, eta=eta), step_deviation(process, t, p, eta=eta)
        noise = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device)
        states.append((mean + deviation.view(-1, 1, 1, 1) * noise).float())
        found.append(torch.where(deviation > 0, log_probability(states[-1], mean, deviation), torch.zeros_like(deviation)))
    return Trajectories(torch.stack(states, dim=1), torch.stack(found, dim=1))
