"""Means, paired differences and win rates with intervals that respect the clusters: images of one prompt are no independent draws.

The standard error of every number is that of a bootstrap over clusters: each resample draws as many clusters as there are, with
replacement, and takes the mean over all their rows (Davison and Hinkley 1997, section 3.8). Resampling C clusters gives too
small a spread, by sqrt((C - 1) / C), and percentiles of it are too narrow again, as normal quantiles are beside Student's
("narrowness bias": Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015). So an interval is
his t interval with the bootstrap's standard error, mean +- t (1 - alpha / 2; C - 1) * error * sqrt(C / (C - 1)). Clusters of
unequal size count as fewer: C is N^2 over the sum of their squared sizes, the effective number of clusters of Carter, Schnepel and
Steigerwald (The Review of Economics and Statistics 2017), and 2 at least. The p-value is the smallest alpha whose interval leaves 0
out, so "p < 0.05" and "the 95 % interval excludes 0" are one statement. A rate has Wilson's interval, with the number of
independent answers that its error implies. All numbers of one call share the same resamples.

Clusters that all say the same have no bootstrap error, which is no certainty. A rate then counts each cluster as one answer; a mean
takes the root of its rows' mean square over sqrt(C) as its error, so that a gain that is the same in every row has the p-value of its
win rate, 100 %. Identical models alone, whose differences are all exactly 0, leave no doubt.

What was tried: the percentile interval holds the truth in 93 % of simulations with 25 clusters, in 88 % with 10 and in 76 % with 3;
this one in 95 %, if the values are not very skewed (tests/evaluation/test_coverage.py). Bootstrap-t does better with skewed values and
worse with heavy tails, and has no end where a resample has no spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dedpo_diffusion.core.sample_size import effective_size

RESAMPLES = 10000
LEVEL = 0.95
CHUNK = 1 << 21  # cluster counts taken at once: bounds the memory
ROUNDING = 1e-12  # a cluster whose values cancel to this share of their size has mean 0: the rest is rounding


@dataclass(frozen=True)
class Interval:
    """A mean, the two ends of its interval (NaN where nothing is known of its spread), and a two-sided p-value: of a mean of 0, or of
    a rate of one half."""

    mean: float
    low: float
    high: float
    p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """{"mean": ..., "ci": [low, high] or None}, for results.json."""
        return {"mean": self.mean, "ci": None if math.isnan(self.low) else [self.low, self.high]}

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside of the interval."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class Estimates:
    """Means of K columns over the same N rows, and their standard errors.

    Attributes:
        mean, error: (K,).
        size: (K,) root mean square of the rows' values.
        tied: (K,) whether every value is one half, as all wins of a model over itself are.
        clusters: the effective number of clusters that the rows come from: their number where they are of equal size, else fewer.
    """

    mean: np.ndarray
    error: np.ndarray
    size: np.ndarray
    tied: np.ndarray
    clusters: float

    def interval(self, column: int = 0, *, level: float = LEVEL) -> Interval:
        """Student's interval of one column, and the p-value of a mean of 0; where every value is 0, no width and p 1."""
        mean, quantile = float(self.mean[column]), self._quantile(level)
        error = float(self.error[column] if self._differs(column) else self.size[column] / math.sqrt(self.clusters))
        p = self._p_value(mean / error) if error > 0 else 1.0
        return Interval(mean, mean - quantile * error, mean + quantile * error, p)

    def rate(self, column: int = 0, *, level: float = LEVEL) -> Interval:
        """Wilson's interval of a column of values in [0, 1] (score interval, 1927).

        Its number of independent answers is that which explains the error, p (1 - p) / error^2. Where all clusters are alike,
        as where all rows are 1, the error says nothing; the rows of a cluster count as one answer. Where every value is one half,
        as between identical models, it is one half without doubt. p is of one half.
        """
        p, error = min(1.0, max(0.0, float(self.mean[column]))), float(self.error[column])
        if self.tied[column]:
            return Interval(p, p, p, 1.0)
        inverse = error**2 / (p * (1 - p)) if self._differs(column) and 0 < p < 1 else 1 / self.clusters
        a = self._quantile(level) ** 2 * inverse
        half, chance = math.sqrt(a * p * (1 - p) + a * a / 4), self._p_value((p - 0.5) / math.sqrt(0.25 * inverse))
        return Interval(p, max(0.0, (p + a / 2 - half) / (1 + a)), min(1.0, (p + a / 2 + half) / (1 + a)), chance)

    def _differs(self, column: int) -> bool:
        """Whether the clusters' means differ, by more than rounding."""
        return bool(self.error[column] > ROUNDING * self.size[column])

    def _quantile(self, level: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.clusters - 1, (1 + level) / 2))

    def _p_value(self, statistic: float) -> float:
        from scipy.special import stdtr

        return float(2 * stdtr(self.clusters - 1, -abs(statistic)))


def estimates(values: np.ndarray, clusters: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimates:
    """Means of all rows and their clustered bootstrap errors, all columns on the same resamples.

    Args:
        values: (N, K) finite numbers.
        clusters: (N,) the cluster (prompt) of each row, in any order.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: fewer than two clusters (they tell nothing of their spread), unequal lengths, a value that is not finite.
    """
    sums, counts = _cluster_sums(values, clusters)
    n, size = len(counts), counts.sum()
    mean = sums.sum(axis=0) / size
    apart = sums - counts[:, None] * mean  # of resampled means from the mean: where nothing differs, exactly 0
    drawn, chunk = _draws(n, resamples, seed), max(1, CHUNK // n)
    total, squares = np.zeros(len(mean)), np.zeros(len(mean))
    for start in range(0, resamples, chunk):
        part = drawn[start : start + chunk].astype(np.float64)
        shifts = (part @ apart) / (part @ counts)[:, None]
        total += shifts.sum(axis=0)
        squares += (shifts**2).sum(axis=0)
    variance = np.maximum(squares / resamples - (total / resamples) ** 2, 0.0)
    effective = max(2.0, effective_size(counts))
    rows = np.asarray(values, dtype=np.float64)
    extent = np.sqrt(np.sort(rows**2, axis=0).mean(axis=0))  # sorted: the order of the rows changes no bit
    return Estimates(mean, np.sqrt(variance * effective / (effective - 1)), extent, (rows == 0.5).all(axis=0), effective)


@lru_cache(maxsize=2)
def _draws(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn, (resamples, clusters), one byte each; kept, since many quantities share them."""
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK // clusters)
    even, found = np.full(clusters, 1 / clusters), np.empty((resamples, clusters), dtype=np.uint8)
    for start in range(0, resamples, chunk):
        found[start : start + chunk] = rng.multinomial(clusters, even, size=min(chunk, resamples - start))
    return found


def mean_interval(values: np.ndarray, clusters: np.ndarray, *, level: float = LEVEL, **options: Any) -> Interval:
    """The mean of all rows and its clustered interval.

    Args:
        values: (N,) finite numbers.
        clusters: (N,) the cluster (prompt) of each row, in any order.
        level: nominal coverage.
        options: resamples and seed, as in `estimates`.

    Raises:
        ValueError: as in `estimates`.
    """
    return estimates(_column(values), clusters, **options).interval(level=level)


def rate_interval(values: np.ndarray, clusters: np.ndarray, *, level: float = LEVEL, **options: Any) -> Interval:
    """The mean of values in [0, 1] and its clustered interval, which stays in [0, 1]; arguments as in `mean_interval`."""
    return estimates(_column(values), clusters, **options).rate(level=level)


def seed_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """The mean of independent values, such as one a seed, and Student's interval.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        raise ValueError(f"an interval needs at least two values, and there are {len(x)}")
    half = float(t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def paired_difference(a: np.ndarray, b: np.ndarray, clusters: np.ndarray, **options: Any) -> Interval:
    """The mean of a - b over paired rows; exactly 0 with an interval of no width and p 1 where a and b are identical.

    Args:
        a, b: (N,) scores of the same prompts and seeds.
        clusters: (N,) the prompt of each row.
        options: of `mean_interval`.
    """
    a, b = _paired(a, b)
    return mean_interval(a - b, clusters, **options)


def win_rate(a: np.ndarray, b: np.ndarray, clusters: np.ndarray, **options: Any) -> Interval:
    """The share of paired rows in which a is larger, ties as half; exactly 0.5 where a and b are identical.

    Args:
        a, b: (N,) scores of the same prompts and seeds.
        clusters: (N,) the prompt of each row.
        options: of `mean_interval`.
    """
    return rate_interval(wins(a, b), clusters, **options)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) 1 where a is larger, 0 where b is, 0.5 where they are equal."""
    a, b = _paired(a, b)
    return (a > b) + 0.5 * (a == b)


def is_rate(values: np.ndarray) -> bool:
    """Whether values are outcomes, 0, 1 and perhaps one half, so that their mean is a rate."""
    values = np.asarray(values)
    return bool(np.isin(values, (0, 0.5, 1)).all() and np.isin(values, (0, 1)).any())


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"not paired: {a.shape} and {b.shape}")
    return a, b


def _column(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values[:, None] if values.ndim == 1 else values


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums (C, K) and numbers of rows (C,) of the clusters."""
    values = np.asarray(values, dtype=np.float64)
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if values.ndim != 2 or values.shape[:1] != index.shape:
        raise ValueError(f"values {values.shape} and clusters {index.shape} must be of N rows both")
    if len(names) < 2:
        raise ValueError(f"an interval needs at least two clusters, and there are {len(names)}")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    sums = np.empty((len(names), values.shape[1]))
    for k, column in enumerate(values.T):
        order = np.lexsort((column, index))  # a fixed order of summation: the order of the rows changes no bit
        sums[:, k] = np.bincount(index[order], column[order])
        sums[np.abs(sums[:, k]) <= ROUNDING * np.bincount(index[order], np.abs(column[order])), k] = 0.0
    return sums, np.bincount(index).astype(np.float64)


def intervals(columns: Sequence[tuple[np.ndarray, bool]], clusters: np.ndarray, **options: Any) -> list[Interval]:
    """Intervals of several quantities over the same rows, on the same resamples; without ends where the rows are of one cluster.

    Args:
        columns: (N,) values each, and whether they are a rate.
        clusters: (N,).
        options: resamples and seed.
    """
    values = np.stack([np.asarray(column, dtype=np.float64) for column, _ in columns], axis=1)
    if len(np.unique(clusters)) < 2:
        return [Interval(float(mean), np.nan, np.nan) for mean in values.mean(axis=0)]
    found = estimates(values, clusters, **options)
    return [found.rate(k) if rate else found.interval(k) for k, (_, rate) in enumerate(columns)]
