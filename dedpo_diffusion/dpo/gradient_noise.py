"""How noisy a visit is: the squared gradient of one draw of a pair against that of the pair itself.

At every visit a pair gets another timestep and other noise. With v_d the gradient of its loss at draw d,

    T = mean over pairs of E |v_d|^2        estimated by inner products of draws with themselves
    P = mean over pairs of |E v_d|^2        estimated by inner products of different draws of one pair

and the noise ratio is kappa = T / P. It is what the power for a run of finite length needs, see `debias.compute`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.records import PairBatch
from dedpo_diffusion.debias import NORMAL_975
from dedpo_diffusion.dpo.step import Model, preference_step


@dataclass(frozen=True)
class NoiseRatio:
    """kappa and what it was measured from.

    `value` = `visit` / `pair`, T and P in the units of the loss; `standard_error` of the ratio, `pair_error` of P; `pairs`, their
    number.
    """

    value: float
    standard_error: float
    visit: float
    pair: float
    pair_error: float
    pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the standard error; a visit is at least as noisy as its pair, so it begins at 1 or above."""
        half = NORMAL_975 * self.standard_error
        return max(1.0, self.value - half), self.value + half

    @property
    def sure(self) -> bool:
        """Whether P is told from 0."""
        return self.pair > NORMAL_975 * self.pair_error


def loss_gradient(
    model: Model, batch: PairBatch, parameters: Sequence[Tensor], *, timesteps: Tensor, noise: Tensor, scale: float = 1.0, **options: Any
) -> list[Tensor]:
    """Gradient of the mean loss of a batch, one tensor a parameter, of its shape and dtype.

    Args:
        model, batch, timesteps, noise, options: of `preference_step`.
        parameters: what is trained; zeros come back for one that the loss does not reach.
        scale: factor of the loss in the backward pass, taken out again: float16 holds no small gradients.
    """
    result = preference_step(model, batch, timesteps=timesteps, noise=noise, **options)
    found = torch.autograd.grad(result.loss.mean() * scale, list(parameters), allow_unused=True, materialize_grads=True)
    return [value / scale for value in found] if scale != 1 else list(found)


def draw_moments(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """Of the gradients of two draws of one pair: their inner product, and the mean of their squared norms.

    The sums are float64, a parameter at a time. The first is never more than the second.
    """

    def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        parts = [torch.dot(a.detach().flatten().double(), b.detach().flatten().double()) for a, b in zip(one, other, strict=True)]
        return float(torch.stack(parts).sum())

    return inner(first, second), (inner(first, first) + inner(second, second)) / 2


def noise_ratio(moments: np.ndarray) -> NoiseRatio:
    """kappa = T / P with its standard error, by the delta method for a ratio of means over pairs.

    Args:
        moments: (n, 2) of `draw_moments`, n >= 2 pairs.

    Raises:
        ValueError: fewer pairs, numbers that are not finite, or inner products that are not positive on average.
    """
    if len(moments) < 2 or not np.isfinite(moments).all():
        raise ValueError(f"a noise ratio needs finite moments of 2 pairs or more; got {len(moments)} pairs")
    (pair, visit), n = moments.mean(axis=0), len(moments)
    if not pair > 0:
        raise ValueError(f"gradients of two draws of one pair have nothing in common, on average over {n} pairs")
    ratio, root = visit / pair, math.sqrt(n)
    error = float(np.std(moments[:, 1] - ratio * moments[:, 0], ddof=1)) / (root * pair)
    return NoiseRatio(float(ratio), error, float(visit), float(pair), float(np.std(moments[:, 0], ddof=1)) / root, n)
