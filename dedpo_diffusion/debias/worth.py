"""What labels are worth: agreement, the judge's bias and effective human labels, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias.clusters import cluster_sums, effective_number
from dedpo_diffusion.debias.powers import judge_moments

NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the standard normal
RESAMPLES = 2000
RESAMPLED_GROUPS = 2048  # beyond this many labelled pairs, equal random groups of pairs are resampled


def wilson_interval(hits: float, n: float) -> list[float]:
    """Wilson's 95 % interval of a share; a tie may be half a hit."""
    share, q = hits / n, NORMAL_975**2 / n
    centre = (share + q / 2) / (1 + q)
    half = math.sqrt(q * share * (1 - share) + q**2 / 4) / (1 + q)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def share_interval(hits: np.ndarray, clusters: np.ndarray | None = None) -> list[float]:
    """Wilson's interval of a share of hits (n,), a tie being half of one, at the number of independent cases that tell it as well."""
    effective = effective_number(hits, clusters)
    return wilson_interval(float(hits.mean()) * effective, effective)


def agreement(
    z: np.ndarray, g: np.ndarray, weights: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> dict[str, Any]:  # fmt: skip
    """Share of pairs on which two labels name the same image, over the pairs where neither is 0.5.

    Args:
        z, g: (n,) labels.
        weights: (n,) how many pairs each stands for, up to a factor; None takes them all alike.
        clusters: (n,) of labels that depend on each other; None where they do not.

    Returns:
        `value`, `n` and `ci`, Wilson's at the number of independent equal pairs that would tell the share as precisely. Where clusters
        make that less than n, also how many `clusters` there are, and that number as `independent`.
    """
    decided = (z != 0.5) & (g != 0.5)
    n = int(decided.sum())
    if n == 0:
        return {"value": None, "ci": None, "n": 0}
    hits = ((z > 0.5) == (g > 0.5))[decided]
    of, w = (None if given is None else given[decided] for given in (clusters, weights))
    effective = effective_number(hits, of, w)
    value = int(hits.sum()) / n if w is None or (w == w[0]).all() else float(w @ hits / w.sum())
    found = {"value": value, "ci": wilson_interval(value * effective, effective), "n": n}
    if of is None or effective >= n:
        return found
    return found | {"clusters": len(np.unique(of)), "independent": effective}


def judge_bias(
    z: np.ndarray, g: np.ndarray, h: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> dict[str, Any]:  # fmt: skip
    """Mean of g - z over all pairs with its standard error and normal 95 % interval: a judge's lean towards image 0.

    Args:
        z, g: (n,) labels of the labelled pairs.
        h: (n,) inverse propensities of the labelled pairs, up to a factor; None takes them as equal.
        clusters: (n,) of labels that depend on each other; None where they do not.
    """
    off = g - z
    if len(z) == 0:
        return {"value": None, "se": None, "ci": None}
    weight = np.ones(len(z)) if h is None else h
    value = float(weight @ off / weight.sum())
    left = cluster_sums(weight * (off - value), clusters) ** 2  # linearised: the weights' sum is random too
    n = len(left)
    if n < 2:
        return {"value": value, "se": None, "ci": None}
    se = math.sqrt(float(left.sum() / weight.sum() ** 2 * n / (n - 1)))
    return {"value": value, "se": se, "ci": [value - NORMAL_975 * se, value + NORMAL_975 * se]}


def variance_ratio(sums: np.ndarray, power: float) -> np.ndarray:
    """1 - (2 lam c - lam^2 v) / s: the gradient's variance at margin 0, relative to human labels alone.

    Args:
        sums: (..., 3) sums of `judge_moments` over labelled pairs. Labelled at random this is
            1 - (1 - f)(2 lam c - lam^2 v) / s of plain moments.
        power: lam. By Cauchy-Schwarz the ratio is never below the least p.

    Returns:
        (...), NaN where every human label is a tie (s = 0).
    """
    c, v, s = np.moveaxis(sums, -1, 0)
    gain = 2 * power * c - power**2 * v
    return 1 - np.divide(gain, s, out=np.full_like(s, np.nan), where=s > 0)


def bootstrap_sums(
    terms: np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES, chunk: int = 100, groups: int = RESAMPLED_GROUPS
) -> np.ndarray:
    """Column sums of `resamples` bootstrap resamples of the rows of `terms` (n, k), as (resamples, k).

    More than `groups` rows are first summed in equal random groups, which are resampled instead: the same variance in bounded
    time.
    """
    if len(terms) > groups:
        group = rng.permutation(len(terms)) % groups
        terms = np.stack([np.bincount(group, weights=column, minlength=groups) for column in terms.T], axis=1)
    n = len(terms)
    even = np.full(n, 1 / n)
    chunks = [rng.multinomial(n, even, size=min(chunk, resamples - done)) @ terms for done in range(0, resamples, chunk)]
    return np.concatenate(chunks)


@dataclass(frozen=True)
class Basis:
    """The n labelled pairs by which the worth of a merge of N pairs is told.

    `z`, `mixed`, `even` (n,): human labels, the judges' mixed by their powers, the judges' plain mean; `h` (n,) inverse
    propensities, N / n where labels were taken at random; `power` (n,) of all judges together, NaN for naive merging; `pairs` is N.
    A tuned power is `free` less `back`, (n,), at most what `max_overshoot` allows; a fixed one has neither. `uneven`: some pairs
    were likelier to be labelled. `clusters` (n,): of labels that depend on each other, None where they do not.
    """

    z: np.ndarray
    mixed: np.ndarray
    even: np.ndarray
    h: np.ndarray
    power: np.ndarray
    pairs: int
    free: np.ndarray | None
    back: np.ndarray | None
    max_overshoot: float
    uneven: bool
    clusters: np.ndarray | None = None


@dataclass(frozen=True)
class Worths:
    """Effective human labels, each {value, ci, n_human}, None where a number does not exist: with the powers used, and at power 1."""

    here: dict[str, Any]
    at_one: dict[str, Any]


def no_worth(n_human: int) -> dict[str, Any]:
    """The entry of a worth that does not exist."""
    return {"value": None, "ci": None, "n_human": n_human}


def _entry(terms: np.ndarray, drawn: np.ndarray | None, power: float) -> dict[str, Any]:
    """Worth of n labels with a bootstrap interval, from terms (n, 3) and resampled sums (R, 3) of c, v, s."""
    n = len(terms)
    if power == 0:
        return {"value": float(n), "ci": [float(n), float(n)], "n_human": n}

    def worth(sums: np.ndarray) -> np.ndarray:
        ratio = variance_ratio(sums, power)
        return np.divide(n, ratio, out=np.full_like(ratio, np.nan), where=ratio > 0)

    value = float(worth(terms.sum(axis=0)))
    if math.isnan(value):
        return no_worth(n)
    if drawn is None:
        return {"value": value, "ci": None, "n_human": n}
    told = worth(drawn)
    return {"value": value, "ci": [float(x) for x in np.quantile(told[np.isfinite(told)], [0.025, 0.975])], "n_human": n}


def worths(basis: Basis, seed: int) -> Worths:
    """What the labels are worth, in human labels taken as these were.

    The gradient's variance at margin 0 is a sum over the pairs, whatever the power of each; that of human labels alone, divided by
    it, is the worth of a label. `seed` is that of the bootstrap.
    """
    n, naive = len(basis.z), bool(np.isnan(basis.power).any())
    if n == 0:
        return Worths(no_worth(0), no_worth(0))
    largest = 1.0 if naive else float(basis.power.max())  # a common power is taken out of the sums
    scale = np.ones(n) if naive or largest == 0 else basis.power / largest
    terms = judge_moments(basis.z, basis.mixed, basis.h) * np.stack([scale, scale**2, np.ones(n)], axis=1)
    plain = judge_moments(basis.z, basis.even, basis.h)
    first = second = None
    drawn = cluster_sums(np.concatenate([terms, plain], axis=1), basis.clusters)
    if len(drawn) > 1:
        first, second = np.split(bootstrap_sums(drawn, np.random.default_rng(seed)), 2, axis=1)
    return Worths(no_worth(n) if naive else _entry(terms, first, largest), _entry(plain, second, 1.0))
