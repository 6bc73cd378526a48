"""How far people agree with each other, with themselves and with judges; every number with an interval.

Answers fall into three categories: image 0, tie, image 1 (a soft answer counts for the side it leans to). A statistic is
{"value", "ci", "n"}: the number or None where it does not exist, its 95 % interval or None, and how many cases it rests on.
Of several answers of one person to the same pair the first counts, unless it is a hidden repetition of it. The comparisons of one
ranking (the votes' column `ranking`) depend on each other: intervals then count clusters, see debias/clusters.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.debias import agreement, judge_bias, share_interval, wilson_interval
from dedpo_diffusion.labels.clusters import components

CATEGORIES = 3  # image 1, tie, image 0
MIN_RESAMPLED = 20  # pairs that a bootstrap needs: with 10, a 95 % interval holds the truth in as few as 79 % of simulations
MIN_KNOWN = 0.9  # share of the resamples in which a statistic must exist for an interval
DRAWN = 1 << 21  # numbers drawn at once: bounds the memory


def vote_summary(votes: Votes, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What single answers say of the people who gave them.

    Args:
        votes: N answers. Hidden repetitions (`repeat`) measure their rater; everything else leaves them out.
        resamples: bootstrap resamples of the pairs, for the intervals of the agreement between raters.
        seed: of the bootstrap.

    Returns:
        JSON-ready: counts `n_votes` (repetitions left out), `n_pairs`, `n_ties`, `n_anonymous`, `n_soft`, `n_again` (further
        answers of one person to the same pair); `raters`, each with `votes`, `ties`, `left` (share of decided answers for the
        image on the left), `repeats` (share of hidden repetitions answered as the first time), `seconds` (median);
        `between`: `pairs` that two or more people answered, `raw` (share of two people's answers to the same pair that are
        equal) and `alpha` (Krippendorff's, nominal; of two people it is all but Cohen's kappa); and `sentences`.
    """
    answers, names = _answers(votes)
    order = np.argsort(answers.rater, kind="stable")
    starts = np.searchsorted(answers.rater[order], np.arange(len(names) + 1))
    raters = [_rater(votes, answers, order[starts[k] : starts[k + 1]], name) for k, name in enumerate(names)]
    between = _between(answers, np.random.default_rng(seed), resamples)
    label = answers.asked
    report = {
        "n_votes": int(answers.count[label].sum()),
        "n_pairs": len(np.unique(answers.pair[label])),
        "n_ties": int(answers.count[label & (answers.category == 1)].sum()),
        "n_anonymous": int(answers.count[label & (answers.rater < 0)].sum()),
        "n_soft": int(np.sum(label & ~np.isin(votes.label_0, (0.0, 0.5, 1.0)))),
        "n_again": int(np.sum(label & ~answers.first)),
        "raters": raters,
        "between": between,
    }
    return report | {"sentences": [*_rater_sentences(raters), *_between_sentences(between), *_count_sentences(report)]}


def judge_agreement(human: np.ndarray, judge: np.ndarray, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """How often a judge names the same image as people.

    Args:
        human, judge: (N,) label_0, NaN where there is none.
        clusters: (N,) of the human labels, where they depend on each other.

    Returns:
        A statistic over the pairs where both name an image, `ties` (pairs left out since either says 0.5) and `bias`, the
        judge's lean to image 0 relative to people (mean of judge - human).
    """
    both = ~(np.isnan(human) | np.isnan(judge))
    of = None if clusters is None else clusters[both]
    found = agreement(human[both], judge[both], clusters=of)
    return found | {"ties": int(both.sum()) - found["n"], "bias": judge_bias(human[both], judge[both], clusters=of)}


# ---- answers as numbers


@dataclass(frozen=True)
class _Answers:
    """N answers, (N,) each.

    `pair` and `rater` are numbers, -1 for an anonymous rater; `category` 0 image 1, 1 tie, 2 image 0; `count` people; `asked`
    is False for hidden repetitions; `first` marks anonymous answers and each person's first one to a pair; `cluster` is what an
    answer depends on, None where each pair is a cluster of its own.
    """

    pair: np.ndarray
    rater: np.ndarray
    category: np.ndarray
    count: np.ndarray
    asked: np.ndarray
    first: np.ndarray
    cluster: np.ndarray | None


def _answers(votes: Votes) -> tuple[_Answers, list[str]]:
    """The answers, and the names of their raters, sorted."""
    size = len(votes.pair_id)
    place: dict[str, int] = {}
    pair = np.array([place.setdefault(pair_id, len(place)) for pair_id in votes.pair_id], dtype=np.int64)
    names = sorted({rater for rater in votes.rater if rater is not None})
    number: dict[str | None, int] = {None: -1} | {name: k for k, name in enumerate(names)}
    rater = np.array([number[name] for name in votes.rater], dtype=np.int64)
    label_0 = np.asarray(votes.label_0, dtype=np.float64)
    asked = ~np.array(votes.extra.get("repeat") or [False] * size, dtype=bool)
    first = asked & (rater < 0)
    named = np.flatnonzero(asked & (rater >= 0))
    first[named[np.unique(pair[named] * len(names) + rater[named], return_index=True)[1]]] = True
    category = np.where(label_0 > 0.5, 2, np.where(label_0 < 0.5, 0, 1))
    rankings = votes.extra.get("ranking")
    cluster = components(votes.pair_id, rankings) if rankings and any(ranking is not None for ranking in rankings) else None
    return _Answers(pair, rater, category, np.asarray(votes.votes, dtype=np.int64), asked, first, cluster), names


# ---- one rater


def share(hits: np.ndarray, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """A statistic: the share of (n,) true cases, with Wilson's interval; `clusters` (n,) where cases depend on each other."""
    n = len(hits)
    if n and clusters is not None:
        return {"value": float(hits.mean()), "ci": share_interval(hits, clusters), "n": n}
    return {"value": float(hits.mean()), "ci": wilson_interval(int(hits.sum()), n), "n": n} if n else _nothing()


def _nothing(n: int = 0) -> dict[str, Any]:
    return {"value": None, "ci": None, "n": n}


def _rater(votes: Votes, answers: _Answers, rows: np.ndarray, name: str) -> dict[str, Any]:
    """`rows` are this rater's."""
    spent = votes.extra.get("seconds") or [None] * len(votes.pair_id)
    times = [spent[row] for row in rows if spent[row] is not None]
    asked = answers.asked[rows]
    return {
        "rater": name,
        "votes": int(asked.sum()),
        "ties": int((asked & (answers.category[rows] == 1)).sum()),
        "left": _left(votes, answers, rows),
        "repeats": _repeats(answers, rows),
        "seconds": float(np.median(times)) if times else None,
    }


def _left(votes: Votes, answers: _Answers, rows: np.ndarray) -> dict[str, Any]:
    """Share of decided answers, repetitions included, for the image on the left: 0.5 without a habit, sides being random."""
    swapped = votes.extra.get("swapped")
    if swapped is None:
        return _nothing()
    category = answers.category
    known = [row for row in rows if category[row] != 1 and swapped[row] is not None]
    hits = np.array([(category[row] == 2) != swapped[row] for row in known], dtype=bool)
    return share(hits, None if answers.cluster is None else answers.cluster[known])


def _repeats(answers: _Answers, rows: np.ndarray) -> dict[str, Any]:
    """Share of hidden repetitions answered as the first time, in terms of images; sides were swapped in between."""
    earlier = {int(answers.pair[row]): answers.category[row] for row in rows if answers.first[row]}
    again = [row for row in rows if not answers.asked[row] and int(answers.pair[row]) in earlier]
    hits = np.array([answers.category[row] == earlier[int(answers.pair[row])] for row in again], dtype=bool)
    return share(hits, None if answers.cluster is None else answers.cluster[again])


# ---- between raters


def _between(answers: _Answers, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    table = np.zeros((int(answers.pair.max(initial=-1)) + 1, CATEGORIES), dtype=np.int64)
    np.add.at(table, (answers.pair[answers.first], answers.category[answers.first]), answers.count[answers.first])
    several = table.sum(axis=1) >= 2
    table, n = table[several], int(several.sum())
    if not n:
        return {"pairs": 0, "raw": _nothing(), "alpha": _nothing()}
    if answers.cluster is not None:
        of = np.zeros(len(several), dtype=np.int64)
        of[answers.pair] = answers.cluster
        return _between_clusters(table, of[several], rng, resamples)
    patterns, counts = np.unique(table, axis=0, return_counts=True)  # kinds of pairs are few
    raw, alpha = float(_raw(patterns, counts)), _alpha_value(table)

    def interval(statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[float] | None:
        size = max(1, DRAWN // len(counts))
        drawn = [rng.multinomial(n, counts / n, size=min(size, resamples - done)) for done in range(0, resamples, size)]
        return _percentiles(n, np.concatenate([statistic(patterns, part.astype(np.float64)) for part in drawn]))

    return {
        "pairs": n,
        # pairs that are too few or all alike cannot be resampled; Wilson's interval takes each as one case
        "raw": {"value": raw, "ci": interval(_raw) or wilson_interval(round(raw * n), n), "n": n},
        "alpha": {"value": alpha, "ci": interval(_alpha), "n": n} if math.isfinite(alpha) else _nothing(n),
    }


def _between_clusters(table: np.ndarray, of: np.ndarray, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    """`_between` of (n, 3) pairs in clusters `of` (n,): whole clusters are resampled."""
    n, (names, place) = len(table), np.unique(of, return_inverse=True)
    sums = np.zeros((len(names), 6))
    np.add.at(sums, place, _sums(table))
    raw, alpha = float(_raw_of(sums.sum(axis=0))), _alpha_value(table)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples) @ sums

    def interval(statistic: Callable[[np.ndarray], np.ndarray]) -> list[float] | None:
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without disagreement has no alpha
            return _percentiles(len(names), statistic(drawn))

    known = {"value": raw, "ci": interval(_raw_of) or wilson_interval(raw * len(names), len(names)), "n": n}
    beyond = {"value": alpha, "ci": interval(_alpha_of), "n": n} if math.isfinite(alpha) else _nothing(n)
    return {"pairs": n, "clusters": len(names), "raw": known, "alpha": beyond}


def _sums(table: np.ndarray) -> np.ndarray:
    """(n, 6) of (n, 3) answers per category: equal and possible pairs of answers, alpha's observed disagreement, the answers."""
    total = table.sum(axis=1)
    equal = (table * (table - 1)).sum(axis=1)
    return np.column_stack([equal, total * (total - 1), total - equal / (total - 1), table])


def _raw_of(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _alpha_of(sums: np.ndarray) -> np.ndarray:
    of_category = sums[..., 3:]
    n = of_category.sum(axis=-1)
    return 1 - sums[..., 2] * (n - 1) / (n**2 - (of_category**2).sum(axis=-1))


def _percentiles(n: int, drawn: np.ndarray) -> list[float] | None:
    """The interval of resampled statistics of n pairs; None where they are too few, or their spread tells nothing."""
    known = drawn[np.isfinite(drawn)]
    if n < MIN_RESAMPLED or len(known) < MIN_KNOWN * len(drawn) or np.ptp(known) < 1e-12:
        return None
    return [float(x) for x in np.quantile(known, [0.025, 0.975])]


def _raw(patterns: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of two answers to the same pair that are equal, all such pairs of answers pooled.

    Args:
        patterns: (P, 3) answers per category of each kind of pair.
        counts: (..., P) how many pairs are of that kind.
    """
    total = patterns.sum(axis=1)
    equal = (patterns * (patterns - 1)).sum(axis=1)
    return (counts @ equal) / (counts @ (total * (total - 1)))


def _alpha(patterns: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha of nominal answers, 1 - D_o / D_e, arguments as in `_raw`; NaN where all answers are equal.

    The library's number (a test holds them together), for many resamples at once.
    """
    total = patterns.sum(axis=1)
    observed = counts @ (total - (patterns * (patterns - 1)).sum(axis=1) / (total - 1))
    of_category = counts @ patterns
    n = of_category.sum(axis=-1)
    expected = (n**2 - (of_category**2).sum(axis=-1)) / (n - 1)
    return 1 - np.divide(observed, expected, out=np.full(np.shape(observed), np.nan), where=expected > 0)


def _alpha_value(table: np.ndarray) -> float:
    import krippendorff

    used = table[:, table.any(axis=0)]
    return float(krippendorff.alpha(value_counts=used, level_of_measurement="nominal")) if used.shape[1] > 1 else math.nan


# ---- in words


def _percent(stat: dict[str, Any]) -> str:
    low, high = stat["ci"]
    return f"{stat['value']:.0%} (95 %: {low:.0%} to {high:.0%})"


def _rater_sentences(raters: list[dict[str, Any]]) -> list[str]:
    texts = []
    for rater in raters:
        name, left, repeats = rater["rater"], rater["left"], rater["repeats"]
        if left["ci"] is not None and not left["ci"][0] <= 0.5 <= left["ci"][1]:
            side = "left" if left["value"] > 0.5 else "right"
            texts.append(f"{name} leans to the {side}: the image on the left won {_percent(left)} of {left['n']} times.")
        if repeats["value"] is not None:
            texts.append(f"{name} answered {_percent(repeats)} of {repeats['n']} hidden repetitions as the first time.")
    return texts


def _between_sentences(between: dict[str, Any]) -> list[str]:
    pairs, alpha = between["pairs"], between["alpha"]
    if not pairs:
        return ["No pair was answered by two people, so their agreement is unknown."]
    on = f"{pairs} pair" + "s" * (pairs > 1) + (f" of {between['clusters']} ranked prompts" if "clusters" in between else "")
    texts = [f"Two people's answers to the same pair are equal in {_percent(between['raw'])} of cases, on {on}."]
    if alpha["value"] is None:
        return [*texts, "All of these answers are the same, so agreement beyond chance (alpha) does not exist."]
    interval = f" ({alpha['ci'][0]:.2f} to {alpha['ci'][1]:.2f})" if alpha["ci"] else ""
    texts.append(f"Beyond chance: Krippendorff's alpha {alpha['value']:.2f}{interval}; 0 is chance, 1 is full agreement.")
    if alpha["ci"] is None:
        what = "ranked prompts" if "clusters" in between else "pairs"
        texts.append(f"No interval is given for fewer than {MIN_RESAMPLED} {what}, or where answers differ too little from pair to pair.")
    return texts


def _count_sentences(report: dict[str, Any]) -> list[str]:
    texts = []
    if report["n_soft"]:
        texts.append(f"{report['n_soft']} answers are neither 0, 0.5 nor 1; here each counts for the side that it leans to.")
    if report["n_again"]:
        texts.append(f"{report['n_again']} answers were given again by the same person to the same pair; between people, the first counts.")
    return texts
