"""Which labels depend on each other: the comparisons of one ranking, and rankings of the same images. debias/clusters.py counts them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

MIN_CLUSTERS = 20  # fewer prompts, rankings or pairs make intervals that are too narrow
Node = TypeVar("Node", bound=Hashable)


def joined(edges: Iterable[tuple[Node, Node]]) -> dict[Node, int]:
    """Of each node that an edge names, the number of the component that it is in: all that hang together have one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number: dict[Node, int] = {}
    ends = [(number.setdefault(first, len(number)), number.setdefault(second, len(number))) for first, second in edges]
    if not ends:
        return {}
    graph = coo_matrix((np.ones(len(ends), dtype=bool), np.array(ends).T), shape=(len(number), len(number)))
    component = connected_components(graph, directed=False)[1].tolist()
    return {node: component[place] for node, place in number.items()}


def components(pairs: Sequence[str], rankings: Sequence[str | None]) -> np.ndarray:
    """The cluster of each answer: answers to one pair, or of one ranking, are of one, and so is what hangs together through them.

    Args:
        pairs: (N,) pair_ids.
        rankings: (N,) the ranking of each answer; None for a comparison that was asked alone.

    Returns:
        (N,) int64 numbers of clusters.
    """
    tied = zip(pairs, rankings, strict=True)
    found = joined((("pair", pair), ("pair", pair) if ranking is None else ("ranking", ranking)) for pair, ranking in tied)
    number: dict[int, int] = {}
    return np.array([number.setdefault(found["pair", pair], len(number)) for pair in pairs], dtype=np.int64)
