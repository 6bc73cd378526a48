"""Near-duplicate images: all pairs of 64-bit hashes within a Hamming distance, found without comparing all with all.

Two hashes that differ in at most d bits agree entirely on one of d + 1 bands of bits (pigeonhole): only hashes that share a
band are compared, so the search is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

BITS = 64
COMPARED = 1 << 22  # hashes compared at once: bounds the memory


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different hashes within a distance.

    Args:
        hashes: (U,) uint64, each value once.
        distance: largest number of differing bits, 0 to 63.

    Returns:
        (P, 2) int64 places i < j in `hashes`, sorted, each pair once.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64(((1 << int(high - low)) - 1) << int(low))
        for first, second in _same(hashes & mask):
            close = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            found.append(np.sort(np.stack([first[close], second[close]], axis=1), axis=1))
        found = [np.unique(np.concatenate(found), axis=0)]
    return found[0]


def _same(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places with equal values, in chunks."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0, True])
    sizes = np.diff(starts)
    last = np.repeat(starts[1:], sizes)  # where the run of each sorted place ends
    follow = last - np.arange(len(values)) - 1  # places behind it in its run
    total = np.concatenate([[0], np.cumsum(follow)])
    begin = 0
    while begin < len(values):
        end = max(begin + 1, int(np.searchsorted(total, total[begin] + COMPARED, side="right")) - 1)
        counts = follow[begin:end]
        first = np.repeat(np.arange(begin, end), counts)
        step = np.arange(len(first)) - np.repeat(total[begin:end] - total[begin], counts) + 1
        if len(first):
            yield order[first], order[first + step]
        begin = end


def groups(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The group of every image: images are in one group if a chain of near-duplicates joins them.

    Args:
        hashes: (N,) uint64, equal values allowed.
        distance: see `near_pairs`.

    Returns:
        (N,) int64 group numbers.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    unique, inverse = np.unique(hashes, return_inverse=True)
    edges = near_pairs(unique, distance)
    graph = coo_matrix((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(len(unique), len(unique)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[inverse]


def hamming(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Differing bits of (N,) and (N,) uint64."""
    return np.bitwise_count(first ^ second)
