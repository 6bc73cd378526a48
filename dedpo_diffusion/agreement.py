"""How far people agree with each other, with themselves and with judges; every number with an interval.

Answers fall into three categories: image 0, tie, image 1 (a soft answer counts for the side it leans to). A statistic is
{"value", "ci", "n"}: the number or None where it does not exist, its 95 % interval or None, and how many cases it rests on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from .debias import agreement, judge_bias, wilson_interval
from .records import Votes

CATEGORIES = 3  # image 1, tie, image 0
MIN_COMMON = 10  # pairs that two people must share for a kappa of theirs to enter Light's mean


def vote_summary(votes: Votes, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What single answers say of the people who gave them.

    Args:
        votes: N answers. Hidden repetitions (`repeat`) measure their rater; everything else leaves them out.
        resamples: bootstrap resamples of the pairs, for the intervals of the agreement between raters.
        seed: of the bootstrap.

    Returns:
        JSON-ready: counts `n_votes` (repetitions left out), `n_pairs`, `n_ties`, `n_anonymous`, `n_soft`; `raters`, each
        with `votes`, `ties`, `left` (share of decided answers for the image on the left), `repeats` (share of
        hidden repetitions answered as the first time), `seconds` (median); `between`: `pairs` that two or more people answered,
        `raw` (share of two people's answers to the same pair that are equal), `kappa` (`kind` Cohen for two raters, Light for
        more: the mean over pairs of raters) and `alpha` (Krippendorff's, nominal); and `sentences`.
    """
    category = np.where(votes.label_0 > 0.5, 2, np.where(votes.label_0 < 0.5, 0, 1))
    again = np.array(votes.extra.get("repeat") or [False] * len(category), dtype=bool)
    first = ~again
    raters = [_rater(votes, category, again, name) for name in sorted({rater for rater in votes.rater if rater is not None})]
    between = _between(votes, category, first, np.random.default_rng(seed), resamples)
    report = {
        "n_votes": int(votes.votes[first].sum()),
        "n_pairs": len({pair_id for pair_id, counts in zip(votes.pair_id, first, strict=True) if counts}),
        "n_ties": int(votes.votes[first & (category == 1)].sum()),
        "n_anonymous": int(votes.votes[[rater is None for rater in votes.rater] & first].sum()),
        "n_soft": int(np.sum(first & ~np.isin(votes.label_0, (0.0, 0.5, 1.0)))),
        "raters": raters,
        "between": between,
    }
    return report | {"sentences": [*_rater_sentences(raters), *_between_sentences(between), *_count_sentences(report)]}


def judge_agreement(human: np.ndarray, judge: np.ndarray) -> dict[str, Any]:
    """How often a judge names the same image as people.

    Args:
        human, judge: (N,) label_0, NaN where there is none.

    Returns:
        A statistic over the pairs where both name an image, `ties` (pairs left out since either says 0.5) and `bias`, the
        judge's lean to image 0 relative to people (mean of judge - human).
    """
    both = ~(np.isnan(human) | np.isnan(judge))
    found = agreement(human[both], judge[both])
    return found | {"ties": int(both.sum()) - found["n"], "bias": judge_bias(human[both], judge[both])}


# ---- one rater


def _share(hits: np.ndarray) -> dict[str, Any]:
    n = len(hits)
    return {"value": float(hits.mean()), "ci": wilson_interval(int(hits.sum()), n), "n": n} if n else _nothing()


def _nothing(n: int = 0) -> dict[str, Any]:
    return {"value": None, "ci": None, "n": n}


def _rater(votes: Votes, category: np.ndarray, again: np.ndarray, name: str) -> dict[str, Any]:
    mine = np.array([rater == name for rater in votes.rater])
    times = [seconds for seconds, own in zip(votes.extra.get("seconds") or [], mine, strict=False) if own and seconds is not None]
    return {
        "rater": name,
        "votes": int((mine & ~again).sum()),
        "ties": int((mine & ~again & (category == 1)).sum()),
        "left": _left(votes, category, mine),
        "repeats": _repeats(votes, category, mine, again),
        "seconds": float(np.median(times)) if times else None,
    }


def _left(votes: Votes, category: np.ndarray, mine: np.ndarray) -> dict[str, Any]:
    """Share of decided answers, repetitions included, for the image on the left: 0.5 without a habit, sides being random."""
    swapped = votes.extra.get("swapped")
    if swapped is None:
        return _nothing()
    rows = [row for row in np.flatnonzero(mine & (category != 1)) if swapped[row] is not None]
    return _share(np.array([(category[row] == 2) != swapped[row] for row in rows], dtype=bool))


def _repeats(votes: Votes, category: np.ndarray, mine: np.ndarray, again: np.ndarray) -> dict[str, Any]:
    """Share of hidden repetitions answered as the first time, in terms of images; sides were swapped in between."""
    earlier = {votes.pair_id[row]: category[row] for row in np.flatnonzero(mine & ~again)}
    rows = [row for row in np.flatnonzero(mine & again) if votes.pair_id[row] in earlier]
    return _share(np.array([category[row] == earlier[votes.pair_id[row]] for row in rows], dtype=bool))


# ---- between raters


def _between(votes: Votes, category: np.ndarray, first: np.ndarray, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    table, by_rater = _tables(votes, category, first)
    table = table[table.sum(axis=1) >= 2]
    if not len(table):
        return {"pairs": 0, "raw": _nothing(), "kappa": None, "alpha": _nothing()}
    patterns, counts = np.unique(table, axis=0, return_counts=True)
    raw, alpha, n = float(_raw(patterns, counts)), _alpha_value(table), len(table)
    return {
        "pairs": n,
        "raw": {"value": raw, "ci": _interval(patterns, counts, _raw, rng, resamples), "n": n},
        "kappa": _kappa(by_rater, rng, resamples),
        "alpha": {"value": alpha, "ci": _interval(patterns, counts, _alpha, rng, resamples), "n": n}
        if math.isfinite(alpha)
        else _nothing(n),
    }


def _tables(votes: Votes, category: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Answers per pair and category, (pairs, 3); and each rater's category by pair."""
    place = {pair_id: k for k, pair_id in enumerate(dict.fromkeys(votes.pair_id))}
    table = np.zeros((len(place), CATEGORIES), dtype=np.int64)
    by_rater: dict[str, dict[str, int]] = defaultdict(dict)
    for row in np.flatnonzero(first):
        table[place[votes.pair_id[row]], category[row]] += votes.votes[row]
        rater = votes.rater[row]
        if rater is not None:
            by_rater[rater][votes.pair_id[row]] = int(category[row])
    return table, by_rater


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


def _interval(patterns: np.ndarray, counts: np.ndarray, statistic: Any, rng: np.random.Generator, resamples: int) -> list[float] | None:
    """Percentile interval over bootstrap resamples of the pairs; kinds of pairs are few, so counts of kinds are drawn."""
    n = int(counts.sum())
    drawn = statistic(patterns, rng.multinomial(n, counts / n, size=resamples).astype(np.float64))
    drawn = drawn[np.isfinite(drawn)]
    return [float(x) for x in np.quantile(drawn, [0.025, 0.975])] if n > 1 and len(drawn) else None


def _kappa(by_rater: dict[str, dict[str, int]], rng: np.random.Generator, resamples: int) -> dict[str, Any] | None:
    """Cohen's kappa of two raters, or Light's: the mean over pairs of raters with enough common pairs; None without any."""
    from sklearn.metrics import cohen_kappa_score

    least = 1 if len(by_rater) == 2 else MIN_COMMON
    place = {pair_id: k for k, pair_id in enumerate(dict.fromkeys(pair_id for answers in by_rater.values() for pair_id in answers))}
    values, tables, n = [], [], 0
    for one, two in combinations(sorted(by_rater), 2):
        common = sorted(by_rater[one].keys() & by_rater[two].keys())
        if len(common) < least:
            continue
        n += len(common)
        first, second = (np.array([by_rater[name][pair_id] for pair_id in common]) for name in (one, two))
        if len({*first, *second}) > 1:  # else chance alone would agree as often, and there is no kappa
            values.append(float(cohen_kappa_score(first, second)))
            tables.append((np.array([place[pair_id] for pair_id in common]), np.eye(CATEGORIES**2)[first * CATEGORIES + second]))
    if not n:
        return None
    kind = {"kind": "Cohen" if len(by_rater) == 2 else "Light"}
    if not values:
        return kind | _nothing(n)
    means = np.concatenate([_light(tables, drawn) for drawn in _pair_weights(len(place), rng, resamples)])
    means = means[np.isfinite(means)]
    return kind | {"value": float(np.mean(values)), "ci": [float(x) for x in np.quantile(means, [0.025, 0.975])], "n": n}


def _pair_weights(n: int, rng: np.random.Generator, resamples: int, *, chunk: int = 100) -> Iterator[np.ndarray]:
    """How often each of n pairs is drawn, (chunk, n) at a time: the same draw for all raters, who saw the same pairs."""
    for start in range(0, resamples, chunk):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - start)).astype(np.float64)


def _light(tables: list[tuple[np.ndarray, np.ndarray]], drawn: np.ndarray) -> np.ndarray:
    """Mean kappa of every resample, (resamples,); pairs of raters without one are left out of that resample's mean."""
    kappas = []
    for places, cells in tables:
        counts = drawn[:, places] @ cells
        total = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
        kappas.append(_cohen(shares.reshape(-1, CATEGORIES, CATEGORIES)))
    together = np.stack(kappas)
    known = np.isfinite(together)
    sums, count = np.where(known, together, 0.0).sum(axis=0), known.sum(axis=0)
    return np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)


def _cohen(shares: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables of shares (..., 3, 3); NaN where chance alone would agree always."""
    observed = np.where(shares.any(axis=(-2, -1)), np.trace(shares, axis1=-2, axis2=-1), np.nan)
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    return np.divide(observed - chance, 1 - chance, out=np.full(observed.shape, np.nan), where=1 - chance > 1e-12)


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
    if not between["pairs"]:
        return ["No pair was answered by two people, so their agreement is unknown."]
    texts = [f"Two people's answers to the same pair are equal in {_percent(between['raw'])} of cases, on {between['pairs']} pairs."]
    alpha, kappa = between["alpha"], between["kappa"]
    if alpha["value"] is None:
        return [*texts, "All of these answers are the same, so agreement beyond chance (alpha, kappa) does not exist."]
    parts = [("Krippendorff's alpha", alpha)]
    if kappa is not None and kappa["value"] is not None:
        parts.append((f"{kappa['kind']}'s kappa", kappa))
    shown = [
        f"{name} {stat['value']:.2f}" + (f" ({stat['ci'][0]:.2f} to {stat['ci'][1]:.2f})" if stat["ci"] else "") for name, stat in parts
    ]
    return [*texts, f"Beyond chance: {', '.join(shown)}; 0 is chance, 1 is full agreement."]


def _count_sentences(report: dict[str, Any]) -> list[str]:
    if not report["n_soft"]:
        return []
    return [f"{report['n_soft']} answers are neither 0, 0.5 nor 1; here each counts for the side that it leans to."]
