"""Means, paired differences and win rates with intervals that respect the clusters: images of one prompt are no independent draws.

The interval is the percentile bootstrap over clusters: each resample draws as many clusters as there are, with
replacement, and takes the mean over all their rows (Davison and Hinkley 1997, section 3.8). With the same clusters and
seed, every quantity sees the same resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10000
LEVEL = 0.95
CHUNK = 1 << 21  # cluster counts drawn at once: bounds the memory


@dataclass(frozen=True)
class Interval:
    """A mean and the two ends of its interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """{"mean": ..., "ci": [low, high]}, for results.json."""
        return {"mean": self.mean, "ci": [self.low, self.high]}

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside of the interval."""
        return not self.low <= value <= self.high


def mean_interval(values: np.ndarray, clusters: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """The mean of all rows and its clustered percentile-bootstrap interval.

    Args:
        values: (N,) finite numbers.
        clusters: (N,) the cluster (prompt) of each row, in any order.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
        level: nominal coverage.

    Raises:
        ValueError: fewer than two clusters (they tell nothing of their spread), unequal lengths, a value that is not finite.
    """
    sums, counts = _cluster_sums(values, clusters)
    means = _resampled_means(sums, counts, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


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
    """The mean of a - b over paired rows; exactly 0 with an interval of no width where a and b are identical.

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
    a, b = _paired(a, b)
    return mean_interval((a > b) + 0.5 * (a == b), clusters, **options)


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"not paired: {a.shape} and {b.shape}")
    return a, b


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of rows of each cluster, (C,) each."""
    values = np.asarray(values, dtype=np.float64)
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if values.ndim != 1 or values.shape != index.shape:
        raise ValueError(f"values {values.shape} and clusters {index.shape} must be (N,) both")
    if len(names) < 2:
        raise ValueError(f"an interval needs at least two clusters, and there are {len(names)}")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    order = np.lexsort((values, index))  # a fixed order of summation: the order of the rows changes no bit
    return np.bincount(index[order], values[order]), np.bincount(index).astype(np.float64)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples,) means over all rows of C clusters drawn with replacement."""
    rng, clusters = np.random.default_rng(seed), len(sums)
    chunk = max(1, CHUNK // clusters)
    means = []
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(chunk, resamples - start)).astype(np.float64)
        means.append((drawn @ sums) / (drawn @ counts))
    return np.concatenate(means)
