"""Near-duplicate images: all pairs of 64-bit hashes within a Hamming distance, found without comparing all with all.

Two hashes that differ in at most d bits agree entirely on one of d + 1 bands of bits (pigeonhole): only hashes that share a
band are compared, so the search is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

BITS = 64
COMPARED = 1 << 20  # hashes compared at once: bounds the memory


def look_alikes(
    hashes: np.ndarray, files: np.ndarray, pairs: np.ndarray, distance: int, *, shown: int, advance: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Group images that look alike, and name the closest; neither is slowed or swelled by many equal hashes.

    Args:
        hashes: (N,) uint64, one an image, equal values allowed.
        files: (N,) what tells the image files apart.
        pairs: (N,) the pair that an image belongs to.
        distance: largest number of differing bits, 0 to 63.
        shown: how many examples to name.
        advance: told of every finished band of bits, of `distance + 1`.

    Returns:
        (N,) int64 group numbers: images are in one group if a chain of near-duplicates joins them; and (E, 3) examples: bits
        that differ, and the places of two images of different files and different pairs, closest first.
    """
    if not len(hashes):
        return np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
    unique, inverse = np.unique(hashes, return_inverse=True)
    order = np.lexsort((pairs, inverse))  # an image of the first and one of the last pair stand for all of their hash
    starts = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
    low, high = order[starts[:-1]], order[starts[1:] - 1]
    group, examples = np.arange(len(unique)), _equal(inverse, files, pairs, shown)
    for one, two, bits in close_hashes(unique, distance, advance):
        group = _joined(group, one, two)
        first, second = low[one], low[two]
        first = np.where(pairs[first] == pairs[second], high[one], first)
        second = np.where(pairs[first] == pairs[second], high[two], second)
        found = _rows(bits, first, second)[pairs[first] != pairs[second]]
        found = found[np.argsort(found[:, 0], kind="stable")[: shown * (distance + 1)]]  # each can be found once in every band
        examples = np.unique(np.concatenate([examples, found]), axis=0)[:shown]
    return group[inverse], examples


def hamming(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Differing bits of (N,) and (N,) uint64."""
    return np.bitwise_count(first ^ second)


def close_hashes(
    hashes: np.ndarray, distance: int, advance: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places of hashes within a distance and their differing bits, in chunks; a pair can come once in every band."""
    bands = distance + 1
    for band in range(bands):
        # every bands-th bit: neighbouring bits of a perceptual hash depend on each other, and would fill a few runs
        mask = np.uint64(sum(1 << bit for bit in range(band, BITS, bands)))
        for first, second in _same(hashes & mask):
            bits = hamming(hashes[first], hashes[second])
            close = bits <= distance
            yield first[close], second[close], bits[close]
        advance(1)


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


def _joined(group: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Group numbers (U,) after joining the groups of places `one` and `two`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = group[one], group[two]
    if not np.any(edges[0] != edges[1]):
        return group
    size = int(group.max()) + 1
    graph = coo_matrix((np.ones(len(one), dtype=bool), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)[group]


def _rows(bits: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.stack([bits.astype(np.int64), np.minimum(one, two), np.maximum(one, two)], axis=1)


def _equal(hashes: np.ndarray, files: np.ndarray, pairs: np.ndarray, shown: int) -> np.ndarray:
    """Examples of images of one hash, but of two files and two pairs: each image is held against two of its hash."""
    order = np.lexsort((pairs, files, hashes))
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0, True])
    sizes = np.diff(starts)
    found = []
    for other in (np.repeat(order[starts[:-1]], sizes), np.repeat(order[starts[1:] - 1], sizes)):
        kept = (files[order] != files[other]) & (pairs[order] != pairs[other])
        found.append(_rows(np.zeros(int(kept.sum())), order[kept], other[kept]))
    return np.unique(np.concatenate(found), axis=0)[:shown]
