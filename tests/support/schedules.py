"""A world so small that a mean over all draws is a sum: 8 timesteps, images with errors in closed form, everything in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dedpo_diffusion.dpo.objectives import objective_loss

STEPS = 8


class SmallWorld:
    """Errors (theta . f_it - y_it)^2 of image i at timestep t; theta is near the reference, and trained.

    Args:
        images: their number.
        seed: of f and y.
    """

    def __init__(self, images: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.logspace(0.5, -1.5, STEPS, dtype=torch.float64)  # gradients fall with the timestep, as they do
        self.features = torch.randn(images, STEPS, 3, generator=generator, dtype=torch.float64) * scale[:, None]
        self.wanted = torch.randn(images, STEPS, generator=generator, dtype=torch.float64) * scale
        self.reference = torch.randn(3, generator=generator, dtype=torch.float64)
        self.theta = self.reference + 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)

    def errors(self, theta: Tensor, images: Tensor, timesteps: Tensor) -> Tensor:
        """(B, K) errors of images (B, K) at timesteps (B,)."""
        at = timesteps[:, None].expand_as(images)
        return ((self.features[images, at] * theta).sum(dim=-1) - self.wanted[images, at]).square()

    def gradient(self, pairs: Sequence[tuple[int, int]], timesteps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Gradient (3,) of the mean weighted loss of pairs of images, each at its timestep."""
        theta = self.theta.clone().requires_grad_()
        images = torch.tensor(pairs)
        reference = self.errors(self.reference, images, timesteps)
        losses = objective_loss(self.errors(theta, images, timesteps), reference, target, weight, beta=2.0)
        [found] = torch.autograd.grad(losses.mean(), theta)
        return found

    def plain(self, pairs: Sequence[tuple[int, int]], target: Tensor, weight: Tensor, chance: Tensor | None = None) -> Tensor:
        """The mean gradient of the plain estimator: every pair at every timestep, by the timesteps' chance (uniform by default)."""
        chance = torch.full((STEPS,), 1 / STEPS, dtype=torch.float64) if chance is None else chance
        at = [torch.full((len(pairs),), t) for t in range(STEPS)]
        return torch.stack([share * self.gradient(pairs, t, target, weight) for share, t in zip(chance, at, strict=True)]).sum(dim=0)
