"""Human labels that depend on each other, such as the K (K - 1) / 2 comparisons of one ranking: what counts is their clusters.

Who ranks four images gives six comparisons, and if the best image is misjudged, three of them are wrong at once. The error of a sum
over n labels in C clusters is that of the C sums over each cluster, as of a sample of clusters. A share of hits has

    error^2 = C / (C - 1) * sum over clusters of (sum over its labels of w (hit - share))^2      w summing to 1

and the interval is Wilson's at the number of independent labels that would tell it as well, share (1 - share) / error^2.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def checked_clusters(values: Any, human: np.ndarray) -> np.ndarray | None:
    """(N,) int64, a number for each cluster of labels; None where every labelled pair is one of its own.

    Args:
        values: (N,) numbers; below 0 is a label of its own. None where labels are independent.
        human: (N,) labels, NaN where there is none.

    Raises:
        ValueError: another shape.
    """
    if values is None:
        return None
    given = np.asarray(values, dtype=np.int64)
    if given.shape != human.shape:
        raise ValueError(f"clusters has shape {given.shape}: it must be ({len(human)},), one number for each pair")
    own = np.where(given < 0, -1 - np.arange(len(given)), given)
    number = np.unique(own, return_inverse=True)[1]
    labelled = number[~np.isnan(human)]
    return number if len(np.unique(labelled)) < len(labelled) else None


def cluster_sums(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Sums over each cluster (C, ...) of values (n, ...); the values themselves without clusters (n,)."""
    if clusters is None:
        return values
    names, place = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, place, values)
    return sums


def effective_number(hits: np.ndarray, clusters: np.ndarray | None = None, weights: np.ndarray | None = None) -> float:
    """How many independent labels of equal weight tell the share of `hits` as well.

    Args:
        hits: (n,) bool, n >= 1.
        clusters: (n,) of each label; None where labels are independent.
        weights: (n,) of each label, up to a factor; None takes them alike.

    Returns:
        At most n, and n where labels are independent and alike; the number of clusters where those are alike.
    """
    n = len(hits)
    w = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    even = weights is None or bool((weights == weights[0]).all())
    if even and (clusters is None or len(np.unique(clusters)) == n):
        return float(n)
    share = float(w @ hits)
    off, sizes = cluster_sums(w * (hits - share), clusters), cluster_sums(w, clusters)
    count = len(sizes)
    error = float(off @ off) * (1.0 if clusters is None else count / max(count - 1, 1))
    if not 0 < share < 1 or count == 1 or error < 1e-12:
        return min(float(n), 1 / float(sizes @ sizes))
    effective = share * (1 - share) / error
    return effective if clusters is None else min(float(n), max(1.0, effective))
