"""The forward process of diffusion, its training targets, and the per-image error.

Noise and timesteps are arguments; `Draws` makes them, as a function of (seed, step) alone, so that a resumed run and
any split of a step into micro-batches or processes sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.records import Tensors


@dataclass(frozen=True)
class ForwardProcess:
    """x_t = alpha_t x_0 + sigma_t eps, for models that predict eps or v.

    Args:
        alphas_cumprod: (T,) cumulated alphas; alpha_t is the square root.
        prediction: "epsilon", or "v_prediction" (Salimans & Ho, arXiv 2202.00512: v = alpha_t eps - sigma_t x_0).

    A schedule of zero terminal SNR (Lin et al., arXiv 2305.08891) ends at alphas_cumprod 0: x_T is the noise alone.

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

    def to(self, device: torch.device) -> ForwardProcess:
        """The same with its schedule on a device, where no step has to wait for it."""
        return ForwardProcess(self.alphas_cumprod.to(device), self.prediction)

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
        """x_0 implied by a prediction at x_t; the inverse of `add_noise` when the prediction is exact.

        At alpha_t = 0 a prediction of the noise implies none: x_t is the noise, whatever x_0 was. The result is then not finite.
        """
        alpha, sigma = self.scales(timesteps, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha
        return alpha * noisy - sigma * prediction


def check_betas(betas: Sequence[float]) -> None:
    """Raises ValueError unless all betas of a schedule, or both ends of it, lie between 0 and 1; then so do the cumulated alphas."""
    if not all(0 <= beta <= 1 for beta in betas):  # NaN is neither
        raise ValueError("its noise schedule is broken: a beta is not between 0 and 1")


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, in float32 whatever the inputs' dtype.

    Args:
        prediction: (B, 2, C, h, w).
        target: same shape.

    Returns:
        (B, 2) float32, the mean over (C, h, w).
    """
    return (prediction.float() - target.float()).square().mean(dim=(-3, -2, -1))


def residual_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine of the angle between the residuals, prediction minus target, of a pair's two images: (B, 2, C, h, w) twice -> (B,) float32."""
    residual = (prediction.detach().float() - target.float()).flatten(2)
    return torch.nn.functional.cosine_similarity(residual[:, 0], residual[:, 1], dim=-1)


@dataclass(frozen=True)
class TimestepDraw:
    """How timesteps are drawn, and how much the loss of each counts.

    Args:
        first, last: the range [first, last) of steps of the training schedule.
        sampling: "uniform"; "measured", which is uniform until `timestep_moments` makes of it what was measured; or "logit_normal":
            t = first + (last - first) sigmoid(location + spread * normal), rounded down
            (Esser et al., arXiv 2403.03206, section 3.1).
        location, spread: of the logit-normal; 0 and 1 favour the middle of the range.
        weighting: "none"; "equal_noise", whose weights `timestep_moments` knows; or "min_snr":
            min(SNR, gamma) / SNR for eps, over SNR + 1 for v (Hang et al., arXiv 2303.09556, section 3.4). At SNR 0 their limits: 1 for
            eps, 0 for v.
        gamma: of min-SNR.
        strata: draw n timesteps one from each n-th of their distribution, in random order, rather than independently. Each one by itself is
            distributed as without, so every mean over draws is the same; their spread over a step is even.

    Raises:
        ValueError: an empty range, or a name or number that cannot be used.
    """

    first: int
    last: int
    sampling: str = "uniform"
    location: float = 0.0
    spread: float = 1.0
    weighting: str = "none"
    gamma: float = 5.0
    strata: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"timesteps {self.first}, {self.last}: give a range [first, last) that holds some")
        if self.sampling not in ("uniform", "logit_normal", "measured"):
            raise ValueError(f"unknown timestep sampling {self.sampling!r}; known: uniform, logit_normal, measured")
        if self.weighting not in ("none", "min_snr", "equal_noise"):
            raise ValueError(f"unknown timestep weighting {self.weighting!r}; known: none, min_snr, equal_noise")
        if not (self.spread > 0 and self.gamma > 0):
            raise ValueError(f"timestep spread and gamma must be positive; got {self.spread} and {self.gamma}")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps (count,) int64."""
        if self.strata or self.sampling == "measured":
            return self.quantile(self.shares(count, generator))
        if self.sampling == "uniform":
            return torch.randint(self.first, self.last, (count,), generator=generator)
        place = torch.sigmoid(self.location + self.spread * torch.randn(count, generator=generator, dtype=torch.float64))
        return (self.first + ((self.last - self.first) * place).long()).clamp(max=self.last - 1)  # a sigmoid may round to 1

    def shares(self, count: int, generator: torch.Generator) -> Tensor:
        """Shares (count,) float64 in [0, 1) of the distribution below timesteps to be drawn: uniform, with strata one in each count-th."""
        if not self.strata:
            return torch.rand(count, generator=generator, dtype=torch.float64)
        order = torch.randperm(count, generator=generator)
        return in_strata(order, torch.rand(count, generator=generator, dtype=torch.float64))

    def quantile(self, share: Tensor) -> Tensor:
        """The timesteps (N,) int64 below which these shares (N,) in [0, 1) of the distribution lie."""
        share = share.double()
        if self.sampling == "logit_normal":
            share = torch.sigmoid(self.location + self.spread * torch.special.ndtri(share))
        return (self.first + ((self.last - self.first) * share).long()).clamp(max=self.last - 1)  # a share may round to 1

    def weights(self, process: ForwardProcess, timesteps: Tensor) -> Tensor:
        """Factors (B,) float32 of the pair losses; they stand outside the sigmoid, so that beta keeps its meaning."""
        if self.weighting != "min_snr":
            return torch.ones(timesteps.shape, device=timesteps.device)
        cumulated = process.alphas_cumprod.to(timesteps.device)[timesteps].double()
        if process.prediction == "epsilon":  # min(SNR, gamma) / SNR = min(1, gamma / SNR), with SNR = abar / (1 - abar)
            return (self.gamma * (1 - cumulated) / cumulated).clamp(max=1).float()
        return torch.minimum(cumulated, self.gamma * (1 - cumulated)).float()  # SNR + 1 = 1 / (1 - abar)


def image_noise(noise: Tensor) -> Tensor:
    """The noise of every image, (B, K, C, h, w) as it is, or (B, 1, C, h, w) of noise (B, C, h, w) that all images of a pair share."""
    return noise if noise.ndim == 5 else noise[:, None]


def in_strata(order: Tensor, within: Tensor) -> Tensor:
    """Shares (n,) of which the k-th lies in part order[k] of n equal parts of [0, 1), at the place within[k] in [0, 1) of that part."""
    return (order + within) / len(order)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone."""
    words = np.random.SeedSequence((seed, step, stream)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass(frozen=True)
class Draws(Tensors):
    """All randomness of one step of B pairs.

    `timesteps` (B,) int64; `noise` (B, C, h, w), one draw a pair, or (B, K, C, h, w), one an image, see `image_noise`; `posterior`
    (B, 2, C, h, w), of groups (B, K, C, h, w), for sampling the VAE's posterior; `drop_caption` (B,) bool; `share` (B,) float64, of the
    distribution below the timesteps, where what it means is measured.
    """

    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    drop_caption: Tensor
    share: Tensor | None = None

    def part(self, start: int, stop: int) -> Draws:
        """The draws of pairs start to stop - 1."""
        return self.map(lambda values: values[start:stop])

    @classmethod
    def join(cls, parts: Sequence[Draws]) -> Draws:
        """Several draws as one, in this order."""
        names = [entry.name for entry in fields(cls) if getattr(parts[0], entry.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def draw(
    seed: int, step: int, pairs: int, shape: tuple[int, int, int], *, timesteps: TimestepDraw, caption_dropout: float, stream: int = 0,
    images: int = 2, independent: bool = False,
) -> Draws:  # fmt: skip
    """Draw a step's randomness.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        pairs: B, the pairs of the whole step, over all micro-batches and processes.
        shape: (C, h, w) of a latent.
        timesteps: how they are drawn.
        caption_dropout: share of pairs whose caption is dropped.
        stream: of `step_generator`.
        images: of a visit: 2, or those of a group.
        independent: draw noise for each image, in place of one draw for all of a visit.
    """
    generator = step_generator(seed, step, stream)
    share = timesteps.shares(pairs, generator) if timesteps.sampling == "measured" else None
    return Draws(
        timesteps=timesteps.draw(pairs, generator) if share is None else timesteps.quantile(share),
        noise=torch.randn(*((pairs, images) if independent else (pairs,)), *shape, generator=generator),
        posterior=torch.randn(pairs, images, *shape, generator=generator),
        drop_caption=torch.rand(pairs, generator=generator) < caption_dropout,
        share=share,
    )
