"""How noisy a visit is: the squared gradient of one draw of a pair against that of the pair itself.

At every visit a pair gets another timestep and other noise. With v_d the gradient of its loss at draw d,

    T = mean over pairs of E |v_d|^2        estimated by inner products of draws with themselves
    P = mean over pairs of |E v_d|^2        estimated by inner products of different draws of one pair

and the noise ratio is kappa = T / P. It is what the power for a run of finite length needs, see `debias.compute`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.records import PairBatch, StepResult
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
    return step_gradient(model, batch, parameters, timesteps=timesteps, noise=noise, scale=scale, **options)[1]


def step_gradient(
    model: Model, batch: PairBatch, parameters: Sequence[Tensor], *, timesteps: Tensor, noise: Tensor, scale: float = 1.0, **options: Any
) -> tuple[StepResult, list[Tensor]]:
    """As `loss_gradient`, and what the step left behind, without its graph."""
    result = preference_step(model, batch, timesteps=timesteps, noise=noise, **options)
    found = torch.autograd.grad(result.loss.mean() * scale, list(parameters), allow_unused=True, materialize_grads=True)
    return replace(result, loss=result.loss.detach()), [value / scale for value in found] if scale != 1 else list(found)


def draw_moments(gradients: Iterable[Sequence[Tensor]]) -> tuple[float, float]:
    """Of the gradients of K >= 2 draws of one pair: the mean inner product of two of them, and the mean of their squared norms.

    The inner products of all K (K - 1) pairs of draws sum to |sum of gradients|^2 - sum of |gradient|^2. So only their sum and one
    gradient are held at a time. The first number is never more than the second.

    Raises:
        ValueError: fewer than two draws.
    """
    count, squares, total = 0, 0.0, list[Tensor]()
    for gradient in gradients:
        squares += squared_norm(gradient)
        if total:
            for held, new in zip(total, gradient, strict=True):
                held += new
        else:
            total = [value.detach().clone() for value in gradient]
        count += 1
    if count < 2:
        raise ValueError(f"inner products of different draws need two of them; got {count}")
    return (squared_norm(total) - squares) / (count * (count - 1)), squares / count


def squared_norm(values: Sequence[Tensor]) -> float:
    """Squared norm, summed in float64, a parameter at a time."""
    return float(torch.stack([torch.dot(value.flatten().double(), value.flatten().double()) for value in values]).sum())


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
    ratio, root = max(1.0, visit / pair), math.sqrt(n)  # it is 1 or more but for rounding
    error = float(np.std(moments[:, 1] - ratio * moments[:, 0], ddof=1)) / (root * pair)
    return NoiseRatio(float(ratio), error, float(visit), float(pair), float(np.std(moments[:, 0], ddof=1)) / root, n)
