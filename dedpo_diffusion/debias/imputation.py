"""Targets by angle: for every pair the best prediction of what people would say, given judge and answers.

A run moves along a direction, and what it can reach grows with the cosine of that direction and the right one, not with the
direction's length: targets are right up to a factor. So the best targets are, up to scale, the best predictions
E[human | everything known]: the adapted judge's label p where nobody answered, and on a labelled pair p moved towards the
answer z,

    t = p + s (z - p),   s = max(keep, c h)

with h = R / p_labelled the inverse propensity (1 / f for labels at random). c = f is imputation, the human label in place;
c = 1 is DeDPO, unbiased for every judge and as noisy as its few stretched labels. What c should be is what the residuals
z - p can tell of a *systematic* error: the James-Stein factor 1 - V / |B|^2 of their mean gradient B with noise V.

At margin 0 a pair pulls by weight * (target - 1/2), so t - 1/2 can be put into the weight, the target or both. It makes a difference
later: a soft target t holds its pair at the margin logit t. Predictions near 1/2 would hold hundreds of pairs at margin 0, against
the few that know something, and take their visits. So every pair gets the same confidence, and its weight says how much is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Correction:
    """How far labelled targets were moved.

    `c` is used, `wanted` the James-Stein factor; `bias` |B|^2 and `noise` V, the squared mean gradient of the residuals over
    `directions` standardised features and what chance alone makes of it (None: fewer than 2 labels); `floor` the labelled
    share f, below which the human label stays in place; `keep` the least part of the way from map to answer; `given` whether
    the user chose c; `capped` whether `max_overshoot` held a target back.
    """

    c: float
    wanted: float
    given: bool
    bias: float | None
    noise: float | None
    directions: int
    floor: float
    keep: float
    capped: bool


def check_correction(method: str, correction: Any, features: Any, rater_agreement: Any, n: int) -> np.ndarray | None:
    """(N, F) features, finite; refuses options that only method adapted takes.

    Raises:
        ValueError: another method, a number out of range, features of another shape or with missing values.
    """
    given = {"correction": correction, "features": features, "rater_agreement": rater_agreement}
    for name, value in given.items():
        if value is not None and method != "adapted":
            raise ValueError(f"{name} belongs to method 'adapted', not {method!r}: leave it out")
    if correction is not None and not 0 <= correction <= 1:
        raise ValueError(f"correction is {correction}: it must lie in [0, 1], where 0 keeps human labels in place and 1 is DeDPO")
    if rater_agreement is not None and not 0.5 <= rater_agreement <= 1:
        raise ValueError(f"rater_agreement is {rater_agreement}: it is how often two people agree on a pair, from 0.5 (chance) to 1")
    if features is None:
        return None
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) != n:
        raise ValueError(f"features has shape {x.shape}: it must be (N, F) for the same {n} pairs")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"features[{bad[0][0]}, {bad[0][1]}] is {x[tuple(bad[0])]}: fill it in, or leave that column out")
    return x


def odd_directions(p: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    """Directions in which a systematic error can show, (N, K), of root mean square 1, without those that are 0 everywhere.

    Each changes sign when the images of a pair are swapped, as the residual does: the judge's own direction p - 1/2, and
    `features` (N, F), differences of what is known of the two images before training.
    """
    columns = (p - 0.5)[:, None] if features is None else np.concatenate([(p - 0.5)[:, None], features], axis=1)
    spread = np.sqrt(np.mean(columns**2, axis=0))
    return columns[:, spread > 0] / spread[spread > 0]


def james_stein(residual: np.ndarray, h: np.ndarray, directions: np.ndarray) -> tuple[float, float | None, float | None]:
    """The factor max(0, 1 - V / |B|^2) by which the mean of noisy vectors is best shrunk, with |B|^2 and V.

    Args:
        residual: (n,) z - p of the labelled pairs, p from maps that never saw them.
        h: (n,) inverse propensities, up to a factor.
        directions: (n, K) of `odd_directions`.

    Returns:
        The factor, 0 for fewer than 2 labels or none of the directions; |B|^2 of B = mean h (z - p) phi; V, the variance of
        that mean, summed over the directions.

    Reference: James and Stein, Proceedings of the Fourth Berkeley Symposium (1961); the positive part.
    """
    n = len(residual)
    if n < 2 or directions.shape[1] == 0:
        return 0.0, None, None
    pull = (h / h.mean() * residual)[:, None] * directions
    mean = pull.mean(axis=0)
    bias, noise = float(mean @ mean), float(np.sum((pull - mean) ** 2)) / (n * (n - 1))
    return (max(0.0, 1 - noise / bias) if bias > 0 else 0.0), bias, noise


def answer_weight(z: np.ndarray, p: np.ndarray, rater_agreement: float | None) -> float:
    """How far a single noisy answer moves the prediction of its own pair: tau^2 / (tau^2 + sigma^2), from 0 to 1.

    Two people agree on a pair with probability A = E[eta^2 + (1 - eta)^2], so one answer's variance around eta is
    sigma^2 = E[eta (1 - eta)] = (1 - A) / 2. The mean of (z - p)^2 is tau^2 + sigma^2, tau^2 being the map's own error. Without A
    the two cannot be told apart from single answers, and the answer counts in full.

    Raises:
        ValueError: A is given and a label is a share of several answers, whose noise is another.
    """
    if rater_agreement is None:
        return 1.0
    if not np.isin(z, (0.0, 0.5, 1.0)).all():
        raise ValueError("rater_agreement is for single answers, and some human labels are shares of several: leave it out")
    total = float(np.mean((z - p) ** 2))
    return min(1.0, max(0.0, 1 - (1 - rater_agreement) / 2 / total)) if total > 0 else 1.0


def hard_targets(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets 0 and 1 and weights of mean 1, with weight * (target - 1/2) in proportion to t - 1/2.

    Args:
        t: (N,) predictions, also outside [0, 1].

    Returns:
        Targets and weights (N,). Pairs of t = 1/2 keep it, and weigh nothing unless all are such.
    """
    sure = np.abs(2 * t - 1)
    total = float(sure.sum())
    return 0.5 + np.sign(t - 0.5) / 2, sure * len(t) / total if total else np.ones(len(t))


def impute(
    z: np.ndarray, p: np.ndarray, h: np.ndarray, *, correction: float | None, features: np.ndarray | None, rater_agreement: float | None,
    max_overshoot: float,
) -> tuple[np.ndarray, Correction]:  # fmt: skip
    """Predictions t (N,) of method adapted, and the correction in them.

    Args:
        z, p, h: (N,) human labels (NaN: none), the judge's, inverse propensities.
        correction: c; None takes the James-Stein factor, and holds every c h at `max_overshoot`.
        features: (N, F) differences known before training, or None.
        rater_agreement: how often two people agree, or None.
        max_overshoot: at least 1.
    """
    rows = ~np.isnan(z)
    directions = odd_directions(p, features)
    wanted, bias, noise = james_stein(z[rows] - p[rows], h[rows], directions[rows])
    keep = answer_weight(z[rows], p[rows], rater_agreement)
    bound = max_overshoot / float(h.max()) if correction is None and rows.any() else 1.0
    c, capped = (min(wanted, bound), wanted > bound) if correction is None else (float(correction), False)
    stretch = np.maximum(keep, c * h[rows])
    target = p.copy()
    target[rows] = z[rows] + (stretch - 1) * (z[rows] - p[rows])  # this form is exact where the label stays in place
    return target, Correction(c, wanted, correction is not None, bias, noise, directions.shape[1], float(rows.mean()), keep, capped)
