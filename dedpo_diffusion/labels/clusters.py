"""Labels that depend on each other: the K (K - 1) / 2 comparisons of one ranking, and rankings of the same images.

Who ranks four images gives six comparisons, and if the best image is misjudged, three of them are wrong at once. So what is
told of such labels (how often people agree, or a judge with them) counts clusters, as eval/comparison/intervals.py does for
prompts. The standard error of a share of n cases in C clusters is that of their sums,

    error^2 = C / (C - 1) * sum over clusters of (sum over its cases of (hit - share))^2 / n^2,

and the interval is Wilson's at the number of independent cases that would tell the share as well, share (1 - share) / error^2.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from dedpo_diffusion.debias import agreement, wilson_interval

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


def effective_number(hits: np.ndarray, clusters: np.ndarray) -> float:
    """How many independent cases tell the share of `hits` as well.

    Args:
        hits: (n,) bool, n >= 1.
        clusters: (n,) of each case.

    Returns:
        From 1 to n: their number where each is a cluster of its own; the number of clusters where they are all alike.
    """
    _, place, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    n, count, share = len(hits), len(sizes), float(np.mean(hits))
    if count == n:
        return float(n)
    off = np.bincount(place, weights=hits - share)
    error = count / max(count - 1, 1) * float(off @ off) / n**2
    if not 0 < share < 1 or count == 1 or error < 1e-12:
        return float(n**2 / float(sizes @ sizes))
    return min(float(n), max(1.0, share * (1 - share) / error))


def clustered_agreement(human: np.ndarray, judge: np.ndarray, clusters: np.ndarray | None) -> dict[str, Any]:
    """`debias.agreement` of (n,) labels, with an interval that counts clusters; `independent` is the effective number of cases."""
    found = agreement(human, judge)
    decided = (human != 0.5) & (judge != 0.5)
    if clusters is None or not decided.any():
        return found
    hits, of = ((human > 0.5) == (judge > 0.5))[decided], clusters[decided]
    effective = effective_number(hits, of)
    if effective >= found["n"]:
        return found
    interval = wilson_interval(float(hits.mean()) * effective, effective)  # type: ignore[arg-type]
    return found | {"ci": interval, "clusters": len(np.unique(of)), "independent": effective}


def dependent_warnings(human: np.ndarray, judge: np.ndarray | None, clusters: np.ndarray | None) -> list[dict[str, Any]]:
    """A warning if human labels are comparisons of rankings, with the judge's agreement in an interval that counts them so.

    Args:
        human: (N,) labels, NaN where there is none.
        judge: (N,) the judge's, NaN where there is none; None without a judge.
        clusters: (N,) of each label, -1 where there is none; None where labels are independent.
    """
    if clusters is None:
        return []
    labelled = ~np.isnan(human) & (clusters >= 0)
    n, count = int(labelled.sum()), len(np.unique(clusters[labelled]))
    if not count or count == n:
        return []
    text = f"Warning: {n} human labels are comparisons of {count} rankings, and those of one depend on each other"
    found: dict[str, Any] = {"kind": "dependent", "n": n, "clusters": count}
    both = labelled if judge is None else labelled & ~np.isnan(judge)
    known: dict[str, Any] = {"value": None} if judge is None else clustered_agreement(human[both], judge[both], clusters[both])
    if known["value"] is not None and "independent" in known:
        narrow = math.sqrt(known["n"] / known["independent"])
        low, high = known["ci"]
        text += (
            f": the judge agrees with people on {known['value']:.1%} (95 %: {low:.1%} to {high:.1%} with that counted). "
            f"The other intervals here take labels as independent, and should be about {narrow:.1f} times as wide"
        )
        found |= {"agreement": known, "narrow": narrow}
    else:
        text += "; the intervals here take them as independent, and are too narrow"
    return [found | {"text": text + "."}]
