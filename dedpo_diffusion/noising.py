"""The forward process of diffusion, its training targets, and the per-image error.

Noise and timesteps are arguments; `Draws` makes them, as a function of (seed, step) alone, so that a resumed run and
any split of a step into micro-batches or processes sees the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardProcess:
    """x_t = alpha_t x_0 + sigma_t eps, for models that predict eps or v.

    Args:
        alphas_cumprod: (T,) cumulated alphas; alpha_t is the square root.
        prediction: "epsilon", or "v_prediction" (Salimans & Ho, arXiv 2202.00512: v = alpha_t eps - sigma_t x_0).

    Raises:
        ValueError: another prediction type.
    """

    alphas_cumprod: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction!r} is not supported; supported: epsilon, v_prediction")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of shape (B, 1, ..., 1), in the dtype of `like` (B, ...)."""
        cumulated = self.alphas_cumprod.to(like.device)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return cumulated.sqrt().to(like.dtype), (1 - cumulated).sqrt().to(like.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, ..., C, h, w) from x_0 of that shape, noise broadcastable to it, timesteps (B,)."""
        alpha, sigma = self.scales(timesteps, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict at x_t, of the shape of `clean`."""
        if self.prediction == "epsilon":
            return noise.expand_as(clean)
        alpha, sigma = self.scales(timesteps, clean)
        return alpha * noise - sigma * clean

    def clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 implied by a prediction at x_t; the inverse of `add_noise` when the prediction is exact."""
        alpha, sigma = self.scales(timesteps, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha
        return alpha * noisy - sigma * prediction


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, in float32 whatever the inputs' dtype.

    Args:
        prediction: (B, 2, C, h, w).
        target: same shape.

    Returns:
        (B, 2) float32, the mean over (C, h, w).
    """
    return (prediction.float() - target.float()).square().mean(dim=(-3, -2, -1))


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone."""
    words = np.random.SeedSequence((seed, step, stream)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass(frozen=True)
class Draws:
    """All randomness of one step of B pairs.

    `timesteps` (B,) int64; `noise` (B, C, h, w), one draw a pair; `posterior` (B, 2, C, h, w) for sampling the VAE's
    posterior; `drop_caption` (B,) bool.
    """

    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    drop_caption: Tensor

    def part(self, start: int, stop: int) -> Draws:
        """The draws of pairs start to stop - 1."""
        rows = slice(start, stop)
        return Draws(self.timesteps[rows], self.noise[rows], self.posterior[rows], self.drop_caption[rows])

    def to(self, device: torch.device) -> Draws:
        """The same draws on another device."""
        moved = (getattr(self, name).to(device) for name in ("timesteps", "noise", "posterior", "drop_caption"))
        return Draws(*moved)


def draw(seed: int, step: int, pairs: int, shape: tuple[int, int, int], *, timesteps: tuple[int, int], caption_dropout: float) -> Draws:
    """Draw a step's randomness.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        pairs: B, the pairs of the whole step, over all micro-batches and processes.
        shape: (C, h, w) of a latent.
        timesteps: range [first, last) of the uniform timesteps.
        caption_dropout: share of pairs whose caption is dropped.
    """
    generator = step_generator(seed, step)
    return Draws(
        timesteps=torch.randint(*timesteps, (pairs,), generator=generator),
        noise=torch.randn(pairs, *shape, generator=generator),
        posterior=torch.randn(pairs, 2, *shape, generator=generator),
        drop_caption=torch.rand(pairs, generator=generator) < caption_dropout,
    )
