"""Judges' raw answers made probabilities by what people said, and several judges stacked into one.

A judge's raw answer to a pair is a difference, d = score_0 - score_1. Swapped images turn d into -d and a label y into 1 - y,
so every map from differences to P(image 0 is preferred) is odd here, P(-d) = 1 - P(d): there is no intercept.

    temperature   P = sigmoid(d / T)                      one slope, 1 / T
    stack         P = sigmoid(sum_j slope_j d_j)          one slope for each judge, none negative

A map learns from people's labels, and merging is unbiased only for a judge that did not learn from the labels it is merged
with. So `calibrate` cross-fits: a labelled pair gets a map that never saw its label. Of scores that were trained on people's
labels this is not quite true: other pairs' scores of the judge "self" may have learned from that label, and fit the map.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

from dedpo_diffusion.core.sample_size import effective_size
from dedpo_diffusion.debias import bootstrap_sums, effective_number, wilson_interval
from dedpo_diffusion.labels.clusters import MIN_CLUSTERS

METHODS = ("temperature", "stack")
PRIOR_SD = 5.0  # of a slope, for differences of RMS 1: weak, but separable answers keep a finite slope
HELD = 1e-6  # probabilities are held this far from 0 and 1 in a log loss, where a wrong sure answer would cost infinity
MIN_BIN = 10  # pairs in one bin of the calibration error


@dataclass(frozen=True)
class Linear:
    """P = sigmoid(sum_j slope_j d_j); one judge's slope is 1 / T, and all slopes 0 are undecided.

    `slopes` (J), of the differences as they come; `spreads` (J), the RMS of the differences that they were fitted to.
    """

    slopes: tuple[float, ...]
    spreads: tuple[float, ...]

    def log_odds(self, differences: np.ndarray) -> np.ndarray:
        """(N,) log-odds of differences (N, J), or (N,) for one judge."""
        return np.asarray(differences, dtype=np.float64).reshape(-1, len(self.slopes)) @ np.array(self.slopes)

    def __call__(self, differences: np.ndarray) -> np.ndarray:
        """P(image 0 is preferred), (N,), of the same differences."""
        return expit(self.log_odds(differences))

    def signs(self) -> list[int]:
        """Per judge 1, -1 for the other way round, or 0 for undecided."""
        return [int(np.sign(slope)) for slope in self.slopes]

    def describe(self) -> dict[str, Any]:
        """Slopes, and the weights slope * RMS, which compare between judges."""
        return {"kind": "linear", "slopes": list(self.slopes), "weights": np.multiply(self.slopes, self.spreads).tolist()}


def fit_linear(differences: np.ndarray, human: np.ndarray, *, weights: np.ndarray | None = None) -> Linear:
    """The slopes >= 0 of least mean cross-entropy, under a weak normal prior on each slope in units of the RMS of its differences.

    Args:
        differences: (n, J), or (n,) for one judge.
        human: (n,) labels in [0, 1].
        weights: (n,) of the pairs, positive; only their ratios count.

    Returns:
        Linear. Differences times c give slopes / c; a judge that says nothing, or the contrary, gets slope 0.
    """
    d, w = np.asarray(differences, dtype=np.float64).reshape(len(human), -1), _mean_one(weights, len(human))
    spreads = np.sqrt(np.mean(w[:, None] * d**2, axis=0))
    scaled = d / np.where(spreads > 0, spreads, 1.0)
    prior = 1 / (PRIOR_SD**2 * len(human))

    def loss(slopes: np.ndarray) -> tuple[float, np.ndarray]:
        logits = scaled @ slopes
        value = np.mean(w * (np.logaddexp(0, logits) - human * logits)) + prior / 2 * slopes @ slopes
        return float(value), scaled.T @ (w * (expit(logits) - human)) / len(human) + prior * slopes

    options = {"ftol": 0.0, "gtol": 1e-12, "maxiter": 1000}
    found = minimize(loss, np.zeros(d.shape[1]), jac=True, method="L-BFGS-B", bounds=[(0, None)] * d.shape[1], options=options)
    slopes = np.divide(found.x, spreads, out=np.zeros(d.shape[1]), where=spreads > 0)
    return Linear(tuple(slopes.tolist()), tuple(spreads.tolist()))


def _mean_one(weights: np.ndarray | None, n: int) -> np.ndarray:
    """(n,) weights of mean 1, so that the prior counts the same for any unit."""
    return np.ones(n) if weights is None else weights / np.mean(weights)


def score_agreement(
    differences: np.ndarray, human: np.ndarray, weights: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Any]:  # fmt: skip
    """Weighted share of pairs on which the higher score is of the image that people chose, over the pairs that both decide.

    `value`; `ci`, Wilson's for Kish's effective number of pairs, or for that of independent pairs that tell as much where there are
    20 or more of `groups` (n,), such as prompts; `n` pairs. Equal weights give `debias.agreement`.
    """
    decided = (differences != 0) & (human != 0.5)
    if not decided.any():
        return {"value": None, "ci": None, "n": 0}
    w, hit = weights[decided], ((differences > 0) == (human > 0.5))[decided]
    value, effective = float(w @ hit / w.sum()), effective_size(w)
    of = None if groups is None else groups[decided]
    if of is not None and MIN_CLUSTERS <= len(np.unique(of)) < len(of):
        effective = effective_number(hit, of, w)
    return {"value": value, "ci": wilson_interval(value * effective, effective), "n": len(w)}


def judge_sign(differences: np.ndarray, human: np.ndarray, *, weights: np.ndarray | None = None, invert: bool = False) -> int:
    """How one judge enters a map: 1 as it is, 0 undecided, -1 the other way round.

    It counts as it is if it agrees with people on at least half of the decided pairs, weighted, and its slope is positive.
    With `invert` it is turned round if it agrees on less than half and its slope is negative. Else it is undecided.
    Arguments are those of `fit_linear`, for one judge.
    """
    w = np.ones(len(human)) if weights is None else weights
    share = score_agreement(differences, human, w)["value"]
    slope = float(np.sum(w * differences * (human - 0.5)))  # the loss is convex, so its slope has the sign of the descent at 0
    if share is None or (share < 0.5) != (slope < 0) or slope == 0:
        return 0
    return 1 if slope > 0 else -1 if invert else 0


def fit_map(differences: np.ndarray, human: np.ndarray, *, weights: np.ndarray | None = None, invert: bool = False) -> Linear:
    """Fit a map to n labelled pairs: differences (n, J), labels (n,); judges enter by `judge_sign`."""
    signs = np.array([judge_sign(column, human, weights=weights, invert=invert) for column in differences.T])
    linear = fit_linear(signs * differences, human, weights=weights)
    slopes = [float(sign * slope) + 0.0 for sign, slope in zip(signs, linear.slopes, strict=True)]  # 0.0 makes -0.0 plain 0
    return Linear(tuple(slopes), linear.spreads)


# ---- folds


def assign_folds(groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """A fold for every row, of sizes as equal as the groups allow.

    Args:
        groups: (N,) what must stay together (prompts). With fewer than `folds` different ones, every row is a group of its own.
        folds: their number, 2 or more.
        seed: of the random order in which groups are dealt out, the largest first, each to the smallest fold so far.

    Returns:
        (N,) int64 in [0, folds); the same for the same groups in any order of the rows, if they are kept together.

    Raises:
        ValueError: fewer rows than folds, or fewer than 2 folds.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}: give 2 or more")
    if len(groups) < folds:
        raise ValueError(f"{len(groups)} rows cannot fill {folds} folds: use fewer folds")
    names = sorted(set(groups))
    place = {name: k for k, name in enumerate(names)}
    group = np.array([place[name] for name in groups]) if len(names) >= folds else np.arange(len(groups))
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold = np.empty(len(sizes), dtype=np.int64)
    loads = [(0, k) for k in range(folds)]
    for k in order:
        load, least = heapq.heappop(loads)
        fold[k] = least
        heapq.heappush(loads, (load + int(sizes[k]), least))
    return fold[group]


def pair_folds(groups: Sequence[str] | None, labelled: np.ndarray, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) fold of every pair, -1 for pairs that share no group with a labelled one; and the group (n,) of each labelled pair."""
    rows = np.flatnonzero(labelled)
    names = [str(row) for row in rows] if groups is None else [groups[row] for row in rows.tolist()]
    if len(set(names)) < folds:  # as assign_folds does
        groups, names = None, [str(row) for row in rows]
    fold = np.full(len(labelled), -1, dtype=np.int64)
    fold[rows] = assign_folds(names, folds, seed)
    if groups is not None:
        known = dict(zip(names, fold[rows].tolist(), strict=True))
        fold = np.array([known.get(name, -1) for name in groups], dtype=np.int64)
    return fold, np.unique(np.array(names, dtype=object), return_inverse=True)[1]


# ---- cross-fitting


@dataclass(frozen=True)
class Calibrated:
    """Calibrated labels of N pairs, NaN where a judge gave no answer.

    `probability` = sigmoid(`log_odds`), (N,) each; `fold` (N,) is the fold whose map a pair got, -1 for the mean of all maps;
    `report` is ready for JSON.
    """

    probability: np.ndarray
    log_odds: np.ndarray
    fold: np.ndarray
    report: dict[str, Any]


def calibrate(
    differences: np.ndarray,
    human: np.ndarray,
    *,
    method: str = "temperature",
    folds: int = 5,
    groups: Sequence[str] | None = None,
    invert: bool = False,
    seed: int = 0,
    weights: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    own: np.ndarray | None = None,
) -> Calibrated:
    """Calibrate one judge, or stack several, by cross-fitting on the human labels.

    The labelled pairs are split into folds, and each fold's map is fitted to the labels outside of it. A labelled pair gets
    its own fold's map; any other pair the mean of all maps' probabilities (cross-prediction; Zrnic and Candes, arXiv
    2309.16598). If no score depends on the human labels, this keeps the merged objective unbiased: of any one map, the labelled
    pairs of its fold and the unlabelled pairs are equally fresh, so the judge's error that the labelled ones measure is the
    error that the unlabelled ones have. With groups, an unlabelled pair that shares its group with a labelled one gets that
    fold's map alone, for the same reason: the other maps saw labels of its group.

    Args:
        differences: (N, J) raw score_0 - score_1 of J judges, NaN where there is no answer; J = 1 unless stacking.
        human: (N,) label_0 in [0, 1], NaN where nobody answered.
        method, folds: temperature or stack; and into how many parts the labelled pairs are split.
        groups: (N,) prompts, kept together; with fewer labelled ones than folds, or None, every pair is a group of its own.
        invert: turn judges round that agree with people on less than half and whose slope is negative, not leave them undecided.
        seed: of folds and bootstrap.
        weights: (N,) inverse probability of being labelled, read at labelled pairs; None for labels at random.
        names: (J,) of the judges, for the report.
        own: (N, J) the judges' own probabilities, to compare with; None takes sigmoid(differences).

    Returns:
        Calibrated. Its report holds counts (`n`, `n_human`, `n_missing` pairs without every judge's answer, `n_human_missing`
        of these with a human label), `weighted` (whether its figures are), `judges` (`agreement`, `below_half`, `backwards`: to
        be turned round by `invert`, `used`, `folds_used`, `slope`, `temperature`, own `log_loss` and `calibration_error`), the
        calibrated `log_loss` and `calibration_error`, held out, `differences` (calibrated log loss less that of what it is
        compared with, negative is better), `map` (of all labelled pairs, for pairs to come), `fold_maps` and `sentences`.
        Intervals are 95 % bootstraps over groups, None for fewer than 20, and Wilson's for agreement.

    Raises:
        ValueError: something that cannot be used, or too few labels; the message names the remedy.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[:, None] if d.ndim == 1 else d
    z = np.asarray(human, dtype=np.float64)
    labelled = _check(d, z, method, folds, weights, groups)
    fold, group = pair_folds(groups, labelled, folds, seed)
    w = np.ones(len(z)) if weights is None else np.asarray(weights, dtype=np.float64)

    def cross(columns: np.ndarray) -> tuple[np.ndarray, list[Linear]]:
        """(N,) cross-fitted log-odds, and the maps that never saw folds 0, 1, ... and, last, the one that saw all labels."""
        seen = [labelled & (fold != k) for k in range(folds)] + [labelled]
        maps = [fit_map(columns[rows], z[rows], weights=w[rows], invert=invert) for rows in seen]
        return _cross_log_odds(columns, fold, maps[:-1]), maps

    log_odds, maps = cross(d)
    came = (expit(d) if own is None else np.asarray(own, dtype=np.float64).reshape(d.shape))[labelled].T
    rivals = came if method != "stack" else [expit(cross(column[:, None])[0][labelled]) for column in d.T]
    names = [f"judge {j}" for j in range(d.shape[1])] if names is None else list(names)
    missing, n = np.isnan(d).any(axis=1), int(labelled.sum())
    counts = {"n": len(z), "n_human": n, "n_missing": int(missing.sum()), "n_human_missing": int((~np.isnan(z)).sum()) - n}
    report = {"method": method, "folds": folds, "seed": seed, "invert": invert, "weighted": weights is not None, **counts}
    report |= _report(HeldOut(z[labelled], w[labelled], group, seed), d[labelled].T, expit(log_odds[labelled]), came, rivals, names, maps)
    report |= {"map": maps[-1].describe(), "fold_maps": [fitted.describe() for fitted in maps[:-1]]}
    report["sentences"] = _sentences(report)
    return Calibrated(expit(log_odds), log_odds, fold, report)


def _cross_log_odds(d: np.ndarray, fold: np.ndarray, maps: list[Linear]) -> np.ndarray:
    """(N,) log-odds of the map of each pair's fold, or of the mean of all maps' probabilities where the fold is -1."""
    each = np.stack([fitted.log_odds(d) for fitted in maps])
    mean = logsumexp(log_expit(each), axis=0) - logsumexp(log_expit(-each), axis=0)  # exact in both tails, and odd
    found = np.where(fold < 0, mean, np.take_along_axis(each, np.maximum(fold, 0)[None], axis=0)[0])
    return np.where(np.isnan(d).any(axis=1), np.nan, found)


def _check(d: np.ndarray, z: np.ndarray, method: str, folds: int, weights: np.ndarray | None, groups: Sequence[str] | None) -> np.ndarray:
    """(N,) whether a pair has a human label and every judge's answer."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if d.ndim != 2 or z.shape != (len(d),) or any(len(x) != len(d) for x in (weights, groups) if x is not None):
        raise ValueError(f"differences have shape {d.shape} and labels {z.shape}: give (N, J) and (N,), and weights and groups (N,)")
    if (d.shape[1] > 1) != (method == "stack"):
        raise ValueError(f"method {method} takes {'two or more judges' if method == 'stack' else 'one judge'}, not {d.shape[1]}")
    if np.isinf(d).any():
        raise ValueError(f"the difference of pair {np.flatnonzero(np.isinf(d).any(axis=1))[0]} is infinite: leave the pair out")
    if ((z < 0) | (z > 1)).any():
        raise ValueError(f"the label of pair {np.flatnonzero((z < 0) | (z > 1))[0]} lies outside [0, 1]: mend it")
    labelled = ~(np.isnan(d).any(axis=1) | np.isnan(z))
    if labelled.sum() < 2 * folds:
        text = f"{labelled.sum()} pairs have a human label and every judge's answer, and {folds} folds need {2 * folds}"
        raise ValueError(f"{text}: have more pairs answered, or use fewer folds")
    if weights is not None and not (np.asarray(weights)[labelled] > 0).all():
        raise ValueError("a labelled pair has a weight that is not positive: give inverse probabilities of being labelled")
    return labelled


# ---- how good the labels are


def log_losses(probability: np.ndarray, human: np.ndarray) -> np.ndarray:
    """(n,) log loss in nats of each probability, held within 1e-6 of 0 and 1, on labels (n,) in [0, 1]."""
    p = np.clip(probability, HELD, 1 - HELD)
    return -(human * np.log(p) + (1 - human) * np.log1p(-p))


def stated_confidence(probability: np.ndarray, human: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure a judge is, max(P, 1 - P), (n,), and the label of the image that it names; 0.5 where it names none."""
    agreed = np.where(probability == 0.5, 0.5, np.where(probability > 0.5, human, 1 - human))
    return np.maximum(probability, 1 - probability), agreed


def equal_bins(values: np.ndarray, wanted: int) -> list[np.ndarray]:
    """Rows of (n,) values in bins of nearly equal size, lowest values first; equal values share a bin."""
    values = np.round(values, 12)  # 1 - (1 - p) is not always p, and swapped images must change no bin
    place = np.searchsorted(np.quantile(values, np.linspace(0, 1, max(1, wanted) + 1)[1:-1]), values, side="left")
    return [np.flatnonzero(place == k) for k in np.unique(place)]


def calibration_error(probability: np.ndarray, human: np.ndarray, *, weights: np.ndarray | None = None, bins: int = 10) -> dict[str, Any]:
    """Mean gap between how sure a judge is and how often people agree, over bins of equally many pairs.

    Sides are folded together: a pair counts at max(P, 1 - P), with the label of the image that the judge names.

    Args:
        probability, human: (n,) in [0, 1], n >= 1.
        weights: (n,) of the pairs.
        bins: at most; fewer where a bin would hold fewer than 10 pairs.

    Returns:
        `value`; `by_chance`, about what a perfectly calibrated judge would show on so few hard answers; `n`.
    """
    n = len(human)
    w, (sure, agreed) = _mean_one(weights, n), stated_confidence(probability, human)
    gap, noise = w * (agreed - sure), w**2 * sure * (1 - sure) * (probability != 0.5)  # the undecided make no gap
    parts = equal_bins(sure, min(bins, n // MIN_BIN))
    chance = sum(math.sqrt(2 / math.pi * float(noise[rows].sum())) for rows in parts) / n
    return {"value": sum(abs(float(gap[rows].sum())) for rows in parts) / n, "by_chance": chance, "n": n}


def percentile_intervals(drawn: np.ndarray) -> list[list[float] | None]:
    """95 % intervals of K statistics from R resamples (R, K); None for one that a tenth of the resamples do not have."""
    known = [column[np.isfinite(column)] for column in drawn.T]
    return [np.quantile(column, [0.025, 0.975]).tolist() if len(column) > 0.9 * len(drawn) else None for column in known]


@dataclass(frozen=True)
class HeldOut:
    """The n labelled pairs: label, weight and group (n,) each."""

    human: np.ndarray
    weights: np.ndarray
    group: np.ndarray
    seed: int

    def means(self, columns: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Weighted mean over pairs of each column (n,), with percentile bootstraps over groups on the same resamples."""
        sums = np.stack([np.bincount(self.group, self.weights * column) for column in (*columns, np.ones(len(self.group)))], axis=1)
        values = sums[:, :-1].sum(axis=0) / sums[:, -1].sum()
        ends: list[Any] = [None] * len(columns)
        if len(sums) >= MIN_CLUSTERS:
            drawn = bootstrap_sums(sums, np.random.default_rng(self.seed))
            ends = percentile_intervals(drawn[:, :-1] / drawn[:, -1:])
        return [{"value": float(value), "ci": ci, "n": len(self.group)} for value, ci in zip(values, ends, strict=True)]


def _report(
    held: HeldOut, d: np.ndarray, after: np.ndarray, came: Any, rivals: Any, names: list[str], maps: list[Linear]
) -> dict[str, Any]:
    """The judges as they came, the calibrated labels, and how these compare with their rivals; the last map is the overall one."""
    size = len(names)
    own, calibrated = [log_losses(p, held.human) for p in came], log_losses(after, held.human)
    errors = [calibration_error(p, held.human, weights=held.weights) for p in (*came, after)]
    stats = held.means([*own, *(calibrated - log_losses(p, held.human) for p in rivals), calibrated])
    judges = [_judge(held, d[j], name, j, maps) for j, name in enumerate(names)]
    how = "calibrated alone" if size > 1 else "as it came"
    return {
        "judges": [judge | {"log_loss": stats[j], "calibration_error": errors[j]} for j, judge in enumerate(judges)],
        "log_loss": stats[-1],
        "calibration_error": errors[-1],
        "differences": [{"with": f"{name} {how}", **stats[size + j]} for j, name in enumerate(names)],
    }


def _judge(held: HeldOut, d: np.ndarray, name: str, j: int, maps: list[Linear]) -> dict[str, Any]:
    """How judge j, with differences (n,), agrees with people and enters the maps."""
    words, overall = {1: "as it is", 0: "undecided", -1: "inverted"}, maps[-1]
    agrees = score_agreement(d, held.human, held.weights, held.group)
    slope = overall.slopes[j]
    below_half = agrees["value"] is not None and agrees["value"] < 0.5
    backwards = judge_sign(d, held.human, weights=held.weights, invert=True) < 0
    used, *of_folds = [words[fitted.signs()[j]] for fitted in (overall, *maps[:-1])]
    return {
        "name": name, "agreement": agrees, "below_half": below_half, "backwards": backwards, "used": used, "folds_used": of_folds,
        "slope": slope, "temperature": 1 / slope if slope else None,
    }  # fmt: skip


# ---- in words


def _judge_sentence(judge: dict[str, Any], *, stacked: bool, invert: bool) -> str:
    name, used = judge["name"], judge["used"]
    agrees = "cannot be compared with people: no pair is decided by both"
    if judge["agreement"]["value"] is not None:
        low, high = judge["agreement"]["ci"]
        share = f"{judge['agreement']['value']:.1%} of {judge['agreement']['n']} pairs (95 %: {low:.1%} to {high:.1%})"
        agrees = f"agrees with people on {share}" + (", less often than a coin would" if judge["below_half"] else "")
    if used == "inverted":
        return f"{name} {agrees}; as you asked, it counts the other way round."
    if used == "as it is":
        others = [word for word in judge["folds_used"] if word != used]
        but = f"; in the maps of {len(others)} of {len(judge['folds_used'])} folds it counts as {others[0]}" if others else ""
        return f"{name} {agrees}{but}."
    adds = "adds nothing to the other judges" if stacked else "does not predict their answers by how far its scores lie apart"
    if judge["backwards"] and not invert:
        return f"Warning: {name} {agrees}, so it counts as undecided; if its scores are known to run the other way, use invert."
    if judge["backwards"]:
        return f"Warning: {name} {agrees}; turned round as you asked, it {adds}, so it counts as undecided."
    if judge["below_half"]:
        return f"Warning: {name} {agrees}, yet where its scores lie far apart it does not run the other way, so it counts as undecided."
    return f"Warning: {name} {agrees}, but {adds}, so it counts as undecided."


def _difference_sentence(entry: dict[str, Any], report: dict[str, Any]) -> str:
    text = f"Held out, the log loss is {report['log_loss']['value']:.4f}, {entry['value']:+.4f} against {entry['with']}"
    if entry["ci"] is None:
        return f"{text}; no interval is given for fewer than {MIN_CLUSTERS} prompts or pairs."
    low, high = entry["ci"]
    verdict = "better" if high < 0 else "worse" if low > 0 else "not told apart by these labels"
    return f"{text} (95 %: {low:+.4f} to {high:+.4f}): {verdict}."


def _sentences(report: dict[str, Any]) -> list[str]:
    texts = [_judge_sentence(judge, stacked=report["method"] == "stack", invert=report["invert"]) for judge in report["judges"]]
    texts += [_difference_sentence(entry, report) for entry in report["differences"]]
    error = report["calibration_error"]
    chance = f"a perfectly calibrated judge would show about {error['by_chance']:.3f} on {error['n']} answers"
    texts.append(f"Held out, the calibration error is {error['value']:.3f}; {chance}.")
    if report["weighted"]:
        texts.append("All figures are weighted by the stored propensities, as are the fits.")
    if report["n_missing"]:
        lost = report["n_human_missing"]
        texts.append(f"{report['n_missing']} pairs lack the answer of a judge and get no label; {lost} of them have a human label.")
    return texts
