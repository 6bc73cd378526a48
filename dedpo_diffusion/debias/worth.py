"""What labels are worth: agreement, the judge's bias and effective human labels, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias.powers import judge_moments

NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the standard normal
RESAMPLES = 2000
RESAMPLED_GROUPS = 2048  # beyond this many labelled pairs, equal random groups of pairs are resampled


def wilson_interval(hits: float, n: int) -> list[float]:
    """Wilson's 95 % interval of a share; a tie may be half a hit."""
    share, q = hits / n, NORMAL_975**2 / n
    centre = (share + q / 2) / (1 + q)
    half = math.sqrt(q * share * (1 - share) + q**2 / 4) / (1 + q)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def agreement(z: np.ndarray, g: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """Share of pairs on which two labels name the same image, over the pairs where neither is 0.5.

    Args:
        z, g: (n,) labels.
        weights: (n,) how many pairs each stands for, up to a factor; None takes them all alike. The interval is then Wilson's at
            the number of equal pairs that would tell the share as precisely.
    """
    decided = (z != 0.5) & (g != 0.5)
    n = int(decided.sum())
    if n == 0:
        return {"value": None, "ci": None, "n": 0}
    hits = ((z > 0.5) == (g > 0.5))[decided]
    if weights is None or (weights[decided] == weights[decided][0]).all():
        return {"value": int(hits.sum()) / n, "ci": wilson_interval(int(hits.sum()), n), "n": n}
    w = weights[decided] / weights[decided].sum()
    value = float(w @ hits)
    error, spread = float(w**2 @ (hits - value) ** 2), value * (1 - value)
    effective = spread / error if 0 < value < 1 else 1 / float(w @ w)
    return {"value": value, "ci": wilson_interval(value * effective, effective), "n": n}  # type: ignore[arg-type]


def judge_bias(
    z: np.ndarray, g: np.ndarray, shares: np.ndarray | None = None, code: np.ndarray | None = None, h: np.ndarray | None = None
) -> dict[str, Any]:
    """Mean of g - z over all pairs with its standard error and normal 95 % interval: a judge's lean towards image 0.

    Args:
        z, g: (n,) labels of the labelled pairs.
        shares: (S,) share of all pairs in each stratum, if strata were labelled at rates of their own: then the strata's means
            are weighted with them. None where a stratum has fewer than 2 labels.
        code: (n,) stratum of each labelled pair, with `shares`.
        h: (n,) inverse propensities of the labelled pairs, up to a factor; None takes them as equal in each stratum.
    """
    nothing = {"value": None, "se": None, "ci": None}
    if len(z) == 0:
        return nothing
    if len(z) == 1 and shares is None:
        return nothing | {"value": float(g[0] - z[0])}
    part = np.ones(1) if shares is None else shares
    group = np.zeros(len(z), dtype=np.int64) if code is None else code
    n = np.bincount(group, minlength=len(part))
    if (n < 2).any():
        return nothing
    weight = np.ones(len(z)) if h is None else h
    total = np.bincount(group, weights=weight, minlength=len(part))
    mean = np.bincount(group, weights=weight * (g - z), minlength=len(part)) / total
    left = (weight * (g - z - mean[group])) ** 2  # linearised: the weights' sum is random too
    variance = np.bincount(group, weights=left, minlength=len(part)) / total**2 * n / (n - 1)
    value, se = float(part @ mean), math.sqrt(float(part**2 @ variance))
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
    """The n labelled pairs by which the worth of a merge is told, and S strata of all pairs.

    `z`, `mixed`, `even` (n,): human labels, the judges' mixed by their powers, the judges' plain mean; `h` (n,) inverse
    propensities, the stratum's pairs over its labels where these were taken at random; `power` (n,) of all judges together, NaN
    for naive merging; `code` (n,) stratum. `names` and `pairs` (S,) of the strata. A tuned power is `free` less `back`, (n,), at
    most what `max_overshoot` allows; a fixed one has neither. `uneven`: some pairs of a stratum were likelier to be labelled.
    """

    z: np.ndarray
    mixed: np.ndarray
    even: np.ndarray
    h: np.ndarray
    power: np.ndarray
    code: np.ndarray
    names: list[str]
    pairs: np.ndarray
    free: np.ndarray | None
    back: np.ndarray | None
    max_overshoot: float
    uneven: bool

    def order(self) -> list[np.ndarray]:
        """Rows of each stratum."""
        counts = np.bincount(self.code, minlength=len(self.names))
        return np.split(np.argsort(self.code, kind="stable"), np.cumsum(counts)[:-1])

    def groups(self) -> int:
        """Groups in which a stratum's pairs are resampled."""
        return max(64, RESAMPLED_GROUPS // len(self.names))


@dataclass(frozen=True)
class Worths:
    """Effective human labels, each {value, ci, n_human}, None where a number does not exist.

    `here` with the powers used, `at_one` at power 1, `alone` without the judges; `each` with the powers used, by stratum.
    """

    here: dict[str, Any]
    at_one: dict[str, Any]
    alone: dict[str, Any]
    each: list[dict[str, Any]]


def no_worth(n_human: int) -> dict[str, Any]:
    """The entry of a worth that does not exist."""
    return {"value": None, "ci": None, "n_human": n_human}


def human_worth(n_human: int) -> dict[str, Any]:
    """The entry of human labels alone, counted in labels taken as they were."""
    return {"value": float(n_human), "ci": [float(n_human), float(n_human)], "n_human": n_human}


def _entry(sums: np.ndarray, resampled: np.ndarray | None, power: float, n: int, pairs: int | None) -> dict[str, Any]:
    """Worth of n labels with a bootstrap interval, from sums (4,) and resampled sums (R, 4) of c, v, s and h rho_z^2.

    Counted in labels taken at random from all `pairs`, of which a single one has the variance sum(h rho_z^2) / pairs; None counts
    in labels taken as these were.
    """
    if n == 0:
        return no_worth(0)
    if power == 0 and pairs is None:
        return human_worth(n)

    def worth(terms: np.ndarray) -> np.ndarray:
        ratio, s = variance_ratio(terms[..., :3], power), terms[..., 2]
        base = n if pairs is None else pairs * np.divide(terms[..., 3], s, out=np.full_like(s, np.nan), where=s > 0)
        return np.divide(base, ratio, out=np.full_like(ratio, np.nan), where=ratio > 0)

    value = float(worth(sums))
    if math.isnan(value):
        return no_worth(n)
    if resampled is None:
        return {"value": value, "ci": None, "n_human": n}
    drawn = worth(resampled)
    return {"value": value, "ci": [float(x) for x in np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])], "n_human": n}


def worths(basis: Basis, seed: int) -> Worths:
    """What the labels are worth, in human labels taken at random from all pairs.

    The gradient's variance at margin 0 is a sum over the pairs, whatever the power of each; that of one human label taken at
    random, divided by it, is the worth. Of a stratum it is counted in labels taken at random from the stratum; where
    propensities were uneven, in human labels taken with the same. Pairs are resampled within their strata, whose shares are
    known; `seed` is that of the bootstrap.
    """
    n, naive = len(basis.z), bool(np.isnan(basis.power).any())
    if n == 0:
        return Worths(no_worth(0), no_worth(0), no_worth(0), [no_worth(0) for _ in basis.names])
    largest = 1.0 if naive else float(basis.power.max())  # a common power is taken out of the sums
    scale = np.ones(n) if naive or largest == 0 else basis.power / largest
    terms = judge_moments(basis.z, basis.mixed, basis.h) * np.stack([scale, scale**2, np.ones(n)], axis=1)
    single = (basis.h * (0.5 - basis.z) ** 2)[:, None]
    both = np.concatenate([terms, single, judge_moments(basis.z, basis.even, basis.h), single], axis=1)
    rng, total, each = np.random.default_rng(seed), both.sum(axis=0), []
    redrawn = np.zeros((RESAMPLES, 8)) if n > 1 else None  # a running sum: there may be thousands of strata
    for rows in basis.order():
        part = both[rows].sum(axis=0)
        drawn = bootstrap_sums(both[rows], rng, groups=basis.groups()) if len(rows) > 1 else None
        if redrawn is not None:
            redrawn += part if drawn is None else drawn
        each.append(_entry(part[:4], None if drawn is None else drawn[:, :4], largest, len(rows), None))
    pairs = None if basis.uneven or len(basis.names) == 1 else int(basis.pairs.sum())
    first, second = (None, None) if redrawn is None else (redrawn[:, :4], redrawn[:, 4:])
    at_one, alone = _entry(total[4:], second, 1.0, n, pairs), _entry(total[:4], first, 0.0, n, pairs)
    if naive:
        return Worths(no_worth(n), at_one, alone, [no_worth(len(rows)) for rows in basis.order()])
    return Worths(_entry(total[:4], first, largest, n, pairs), at_one, alone, each)
