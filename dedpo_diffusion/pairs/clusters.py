"""Labels of pairs that hang together: comparisons of one ranking, pairs of one prompt, pairs that share an image.

Their errors are not independent: who misjudges an image misjudges it in all of its pairs, and a judge that misreads a prompt does so in all
of its pairs. debias/clusters.py makes intervals of clusters; this says which labels are of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from dedpo_diffusion.labels.clusters import MIN_CLUSTERS, joined
from dedpo_diffusion.pairs.dataset import PairReader


def label_clusters(reader: PairReader, human: np.ndarray, ranked: np.ndarray | None = None) -> np.ndarray | None:
    """(N,) the cluster of each human label, -1 where there is none; None where every label is one of its own.

    Labelled pairs of one prompt are of one cluster, and so are those of one ranking. Where fewer than 20 clusters would be left, no
    interval could be told from prompts: pairs are then taken together by the images that they share, and if these leave as few, by
    rankings alone. Intervals hold for the prompts at hand then. An image in pairs of two prompts is not looked for.

    Args:
        reader: of the pairs; images are read in the second case alone, and only of labelled pairs.
        human: (N,) labels, NaN where there is none.
        ranked: (N,) clusters of rankings, below 0 for none; None where there are none.
    """
    rows = np.flatnonzero(~np.isnan(human))
    if len(rows) < 2:
        return None
    rankings = [] if ranked is None else [(("pair", row), ("ranking", int(ranked[row]))) for row in rows.tolist() if ranked[row] >= 0]
    prompts = reader.prompts()
    found = _numbers(rows, [*rankings, *((("pair", row), ("prompt", prompts[row])) for row in rows.tolist())])
    if len(set(found)) < min(MIN_CLUSTERS, len(rows)):
        found = _numbers(rows, [*rankings, *_shared_images(reader, rows)])
    if len(set(found)) < min(MIN_CLUSTERS, len(rows)):
        found = _numbers(rows, rankings)
    if len(set(found)) == len(rows):
        return None
    clusters = np.full(len(human), -1)
    clusters[rows] = found
    return clusters


def _numbers(rows: np.ndarray, edges: Sequence[tuple[Hashable, Hashable]]) -> list[int]:
    """The cluster of each row, by order of first occurrence."""
    component = joined([*((("pair", row), ("pair", row)) for row in rows.tolist()), *edges])
    number: dict[int, int] = {}
    return [number.setdefault(component["pair", row], len(number)) for row in rows.tolist()]


def _shared_images(reader: PairReader, rows: np.ndarray) -> Iterator[tuple[Hashable, Hashable]]:
    """Each of these pairs with its two images, which are one image where their files are, byte for byte."""
    for row in rows.tolist():
        pair = reader.pair(row)
        for image in (pair.image_0, pair.image_1):
            yield ("pair", row), ("image", hashlib.blake2b(image, digest_size=16).digest())
