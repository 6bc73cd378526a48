"""How sharp targets are: the margin at which each pair's loss is least, and the beta that puts the typical one where it is wanted.

At margin m the sigmoid loss of a pair with target t has the gradient sigmoid(m) - t, which is 0 at m = logit t. The margin is
-beta / 2 times the change of the difference e_0 - e_1 of the two errors, so that a pair stops once that has changed by 2 logit(t) / beta.
Twice the logits or half the beta put that point twice as far. The two differ on the way: half the beta halves every pair's gradient
at the start, which leaves its direction as it is, and keeps the loss affine in the target; logits can only be doubled of targets strictly
between 0 and 1, and doubling them makes the sure pairs' part in the gradient smaller. So sharpness is set by beta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dedpo_diffusion.dpo.objectives import find_objective


@dataclass(frozen=True)
class Sharpness:
    """How sharp targets are, by weight.

    Attributes:
        typical: median of the sizes of the margins at which pairs stop; those that never stop count as infinitely large.
        mean: of the sizes of those that stop; NaN where none does.
        hard, outside: shares of the weight, in [0, 1], on pairs that never stop, with a target in [0, 1] and outside of it.
    """

    typical: float
    mean: float
    hard: float
    outside: float


def stopping_margins(target: Tensor, *, kind: str = "sigmoid", options: Mapping[str, float] | None = None) -> Tensor | None:
    """Margin at which the loss of each pair is least.

    Args:
        target: t (n,).
        kind, options: as in `objectives.objective_loss`.

    Returns:
        (n,): for the kind sigmoid logit t, and -inf or inf for hard labels and for targets outside [0, 1], whose loss falls for ever.
        None where the objective does not depend on the margin alone.
    """
    objective = find_objective(kind)
    return None if objective.stop is None else objective.stop(target, **{**objective.options, **(options or {})})


def sharpness(
    target: Tensor, weight: Tensor, *, kind: str = "sigmoid", options: Mapping[str, float] | None = None
) -> Sharpness | None:  # fmt: skip
    """How sharp targets are.

    Args:
        target, weight: (n,), the weights not negative and not all 0.
        kind, options: as in `objectives.objective_loss`.

    Returns:
        None where the objective does not depend on the margin alone.
    """
    margins = stopping_margins(target.double(), kind=kind, options=options)
    if margins is None:
        return None
    sizes, share = margins.abs(), weight.double() / weight.double().sum()
    never, inside = sizes.isinf(), (target >= 0) & (target <= 1)
    stops = share[~never]
    mean = float((sizes[~never] * stops).sum() / stops.sum()) if stops.sum() > 0 else math.nan
    return Sharpness(weighted_median(sizes, share), mean, float(share[never & inside].sum()), float(share[never & ~inside].sum()))


def weighted_median(values: Tensor, share: Tensor) -> float:
    """The least of values (n,) that half of the shares (n,), which sum to 1, do not exceed."""
    ordered, place = values.sort()
    reached = share[place].cumsum(dim=0) >= 0.5 - 1e-9  # whatever the rounding
    return float(ordered[int(reached.long().argmax())])


def beta_for(beta: float, found: Sharpness, wanted: float) -> float:
    """The beta with which the typical pair stops where its margin at the given `beta` is `wanted`.

    Raises:
        ValueError: the typical pair stops at margin 0 or never.
    """
    if not 0 < found.typical < math.inf:
        raise ValueError(f"no beta brings a typical margin of {found.typical:g} to {wanted:g}")
    return beta if wanted == found.typical else float(f"{beta * found.typical / wanted:.9g}")  # alike on every machine


def error_gap(margin: float, beta: float) -> float:
    """By how much the preferred image's mean error has then fallen against the other's, compared with the reference: 2 m / beta."""
    return 2 * margin / beta
