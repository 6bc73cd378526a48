"""A judge that people taught: an odd, regularised logistic model of the human answer on what is known of a pair's two images.

    P(image 0 is preferred) = sigmoid(sum_f w_f x_f / unit_f)        x_f = value of image 0 - value of image 1

Swapped images turn every x into -x, so there is no intercept, and scaled features are not centred. Features come in groups: raw
scores of the judges first, then image statistics, generators, components of embeddings. The unit is the feature's spread, and
sqrt(F) spreads in a group of F features other than the judges' own: so the L2 penalty expects of such a group, taken together, what
it expects of one judge, and not F times as much. A group with at most one feature for every four labels stays unless it raises the
cross-validated log loss by one standard error; a larger one is admitted only where it lowers it by one. (Asking that of every group
threw small ones away: 40 answers rarely prove by a standard error what they teach, see docs/results.md.) The L2 strength is
cross-validated too, and all of it by prompts. The whole procedure is cross-fitted: a labelled pair's label comes from groups,
strength and weights that its prompt had no part in. If the result is worse than the best single judge under `temperature` by a
standard error, on the same folds, that judge's temperature labels are the result.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from dedpo_diffusion.debias import effective_number, wilson_interval
from dedpo_diffusion.labels.calibration import (
    MIN_BIN,
    HeldOut,
    assign_folds,
    calibrate,
    equal_bins,
    judge_sign,
    log_losses,
    pair_folds,
    score_agreement,
    stated_confidence,
)

LEAST = 20  # human labels
STRENGTHS = tuple(10 ** (k / 2) for k in range(6, -1, -1))  # L2, 1000 to 1, strongest first: of equal ones the strongest
INNER, MANY, FEW = 20, 200, 10  # folds in which strength and groups are chosen: 20, and 10 from 200 labels on
MOST_CHOSEN, MOST_FITTED = 4000, 20_000  # labelled pairs, drawn at random, by which these are chosen, and weights are fitted
RESAMPLES = 200  # refits for the intervals of weights
ENOUGH = 4  # labels for each feature of a group, from which it stays unless it is shown to hurt
BLOCK = 65_536  # pairs predicted at once


@dataclass(frozen=True)
class Group:
    """Features of N pairs that are admitted together: `columns` names them, `values` (N, F) are differences, image 0 - image 1."""

    name: str
    columns: list[str]
    values: np.ndarray

    def spreads(self) -> np.ndarray:
        """(F,) root mean square over all pairs, labelled or not; 0 for a feature in which the images never differ."""
        total = np.zeros(len(self.columns))
        for start in range(0, len(self.values), BLOCK):
            total += np.sum(np.square(self.values[start : start + BLOCK], dtype=np.float64), axis=0)
        return np.sqrt(total / max(len(self.values), 1))

    def varied(self) -> Group:
        """Without features in which the images never differ."""
        kept = self.spreads() > 0
        return Group(self.name, [name for name, keep in zip(self.columns, kept, strict=True) if keep], self.values[:, kept])


@dataclass(frozen=True)
class Taught:
    """The sample that a map learns from: features (n, F) of each group by its number, labels, weights and prompts (n,)."""

    parts: list[np.ndarray]
    human: np.ndarray
    weights: np.ndarray
    prompt: np.ndarray

    def rows(self, rows: np.ndarray) -> Taught:
        """Some of the pairs."""
        return Taught([part[rows] for part in self.parts], self.human[rows], self.weights[rows], self.prompt[rows])

    def some(self, most: int, seed: int) -> Taught:
        """At most so many pairs, drawn at random."""
        if len(self.human) <= most:
            return self
        return self.rows(np.sort(np.random.default_rng((seed, 5)).choice(len(self.human), most, replace=False)))

    def features(self, used: Sequence[int]) -> np.ndarray:
        """(n, F) of the groups in use."""
        return np.concatenate([self.parts[k] for k in used], axis=1)


@dataclass(frozen=True)
class AdaptedMap:
    """Groups in use by number, the L2 strength, weights (F,) of their scaled features, and how the groups were chosen."""

    used: list[int]
    strength: float
    weights: np.ndarray
    chosen: list[dict[str, Any]]

    def log_odds(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) of the features (n, F) of all groups: a sum that swapped images turn into exactly its negative."""
        return np.concatenate([parts[k] for k in self.used], axis=1) @ self.weights


# ---- fitting


def fit_weights(x: np.ndarray, human: np.ndarray, weights: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """Weights (S, F) of least penalised log loss for each L2 strength, from features (n, F), labels and weights (n,).

    A soft label counts as both outcomes, with its shares. Every pair is first turned so that its first feature that differs is
    positive: then the fit cannot depend, not even in its last bit, on which image was called image 0.
    """
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] == 0:
        return np.zeros((len(strengths), 0))
    first = x[np.arange(len(x)), np.argmax(x != 0, axis=1)]
    turn = np.where(first < 0, -1.0, 1.0)
    turned, share = x * turn[:, None], np.where(turn > 0, human, 1 - human)
    w = weights / weights.mean()
    both, outcome = np.concatenate([turned, turned]), np.repeat([1, 0], len(x))
    model = LogisticRegression(fit_intercept=False, solver="newton-cholesky", tol=1e-6, max_iter=200, warm_start=True)
    found = []
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):  # thousands of small fits
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a step count for nothing here
        for strength in strengths:
            model.C = 1 / strength
            model.fit(both, outcome, sample_weight=np.concatenate([w * share, w * (1 - share)]))
            found.append(model.coef_[0].copy())
    return np.stack(found)


def cross_losses(sample: Taught, used: Sequence[int], fold: np.ndarray) -> tuple[np.ndarray, float]:
    """(n,) cross-validated log losses at the L2 strength whose mean is least, and that strength."""
    x, losses = sample.features(used), np.empty((len(STRENGTHS), len(sample.human)))
    for k in np.unique(fold):
        seen, rows = fold != k, fold == k
        found = fit_weights(x[seen], sample.human[seen], sample.weights[seen], STRENGTHS)
        losses[:, rows] = [log_losses(expit(x[rows] @ weights), sample.human[rows]) for weights in found]
    best = int(np.argmin(losses @ sample.weights))
    return losses[best], STRENGTHS[best]


def mean_and_error(values: np.ndarray, weights: np.ndarray, prompt: np.ndarray) -> tuple[float, float]:
    """Weighted mean of (n,) values, and its standard error with prompts as independent draws."""
    w = weights / weights.sum()
    mean = float(w @ values)
    sums = np.bincount(np.unique(prompt, return_inverse=True)[1], w * (values - mean))
    return mean, math.sqrt(float(sums @ sums) * len(sums) / max(len(sums) - 1, 1))


def choose(sample: Taught, names: Sequence[str], seed: int) -> tuple[list[int], float, list[dict[str, Any]]]:
    """Groups and L2 strength, by cross-validation over prompts: the first group always; of the others, small ones that do not raise the
    log loss by a standard error, and large ones that lower it by one."""
    folds = min(INNER if len(sample.human) < MANY else FEW, len(sample.human))
    fold = assign_folds([str(k) for k in sample.prompt], folds, seed)
    used = [0]
    losses, strength = cross_losses(sample, used, fold)
    first = {"group": names[0], "admitted": True, "log_loss": float(np.average(losses, weights=sample.weights))}
    chosen = [first | {"difference": None, "se": None, "why": "the judges come first"}]
    for k in range(1, len(sample.parts)):
        with_it, its_strength = cross_losses(sample, [*used, k], fold)
        gain, error = mean_and_error(with_it - losses, sample.weights, sample.prompt)
        small = ENOUGH * sample.parts[k].shape[1] <= len(sample.human)
        admitted = gain < (error if small else -error)
        why = f"they change the cross-validated log loss by {gain:+.4f}, standard error {error:.4f}"
        mean = float(np.average(with_it, weights=sample.weights))
        chosen.append({"group": names[k], "admitted": admitted, "log_loss": mean, "difference": gain, "se": error, "why": why})
        if admitted:
            used, losses, strength = [*used, k], with_it, its_strength
    return used, strength, chosen


def heeded(sample: Taught, invert: bool) -> tuple[Taught, np.ndarray]:
    """The sample without what `judge_sign` would not count of the judges, and which of them count (J,) bool.

    A judge that people contradict counts for nothing, as in the other methods, unless it may count the other way round.
    """
    judges = sample.parts[0]
    counts = np.array([judge_sign(column, sample.human, weights=sample.weights, invert=invert) != 0 for column in judges.T])
    return Taught([judges * counts, *sample.parts[1:]], sample.human, sample.weights, sample.prompt), counts


def learn(sample: Taught, names: Sequence[str], seed: int) -> AdaptedMap:
    """Choose groups and strength, and fit the weights."""
    used, strength, chosen = choose(sample.some(MOST_CHOSEN, seed), names, seed)
    fitted = sample.some(MOST_FITTED, seed)
    weights = fit_weights(fitted.features(used), fitted.human, fitted.weights, [strength])[0]
    return AdaptedMap(used, strength, weights, chosen)


# ---- the whole of it


@dataclass(frozen=True)
class Adapted:
    """Adapted labels of N pairs: `probability` = sigmoid(`log_odds`), (N,) each; `fold` (N,) whose labels a pair's map never
    saw, -1 for all labels; `report` is ready for JSON. Where `adapted` is False, they are a judge's temperature labels."""

    probability: np.ndarray
    log_odds: np.ndarray
    fold: np.ndarray
    adapted: bool
    report: dict[str, Any]


def adapt(
    scores: Group,
    others: Sequence[Group],
    human: np.ndarray,
    *,
    folds: int = 5,
    prompts: Sequence[str] | None = None,
    weights: np.ndarray | None = None,
    invert: bool = False,
    seed: int = 0,
) -> Adapted:
    """Teach judges what people said.

    Args:
        scores: raw score differences (N, J) of J judges, complete.
        others: further groups of features, in the order in which they may be admitted; complete.
        human: (N,) label_0 in [0, 1], NaN where nobody answered.
        folds: the labelled pairs are split into so many.
        prompts: (N,), kept together in folds and resamples; None makes every pair one of its own.
        weights: (N,) inverse probability of being labelled, read at labelled pairs; None for labels at random.
        invert: let a judge that people contradict count the other way round; else it counts for nothing.
        seed: of folds, draws and bootstrap.

    Raises:
        ValueError: fewer than 20 labels, answers that are all alike, judges that never tell images apart, a missing value.
    """
    z = np.asarray(human, dtype=np.float64)
    labelled = ~np.isnan(z)
    check_human(z)
    _check_complete((scores, *others), len(z))
    left_out = [name for name, spread in zip(scores.columns, scores.spreads(), strict=True) if spread == 0]
    groups = [group for group in (scores.varied(), *(other.varied() for other in others)) if group.columns or group.name == scores.name]
    if not groups[0].columns:
        raise ValueError(f"no judge prefers any image to another ({', '.join(scores.columns)} give both the same score): use another judge")
    fold, prompt = pair_folds(prompts, labelled, folds, seed)
    w = np.ones(len(z)) if weights is None else np.asarray(weights, dtype=np.float64)
    names, spreads = [group.name for group in groups], [group.spreads() for group in groups]
    scales = units(spreads)
    rows = np.flatnonzero(labelled)
    parts = [group.values[rows].astype(np.float64) / scale for group, scale in zip(groups, scales, strict=True)]
    sample = Taught(parts, z[rows], w[rows], prompt)
    maps = [learn(heeded(sample.rows(fold[rows] != k), invert)[0], names, seed) for k in range(folds)]
    cross = np.empty(len(rows))
    for k, made in enumerate(maps):
        mine = np.flatnonzero(fold[rows] == k)
        cross[mine] = made.log_odds(sample.rows(mine).parts)
    whole, counts = heeded(sample, invert)
    overall = learn(whole, names, seed)
    rivals = [
        calibrate(column, z, folds=folds, groups=prompts, invert=invert, seed=seed, weights=weights)
        for column in np.asarray(groups[0].values, dtype=np.float64).T
    ]
    losses = [log_losses(rival.probability[rows], z[rows]) for rival in rivals]
    best = int(np.argmin([loss @ sample.weights for loss in losses]))
    gain, error = mean_and_error(log_losses(expit(cross), z[rows]) - losses[best], sample.weights, prompt)
    adapted = gain < error
    held = HeldOut(z[rows], sample.weights, prompt, seed)
    report = {"method": "adapt", "folds": folds, "seed": seed, "invert": invert, "weighted": weights is not None, "n": len(z)}
    report |= {"n_human": len(rows), "n_missing": 0, "n_human_missing": 0, "left_out": left_out, "adapted": adapted}
    report |= {"contrary": [name for name, counted in zip(groups[0].columns, counts, strict=True) if not counted]}
    report |= {"judges": groups[0].columns, "temperature_of": groups[0].columns[best], "gain_se": error}
    report |= compare(held, rivals[best].log_odds[rows], cross)
    report |= {"groups": overall.chosen, "l2": overall.strength, "fold_groups": [[names[k] for k in made.used] for made in maps]}
    report |= {"fold_l2": [made.strength for made in maps], "features": describe(groups, spreads, whole, overall, seed)}
    if not adapted:
        return Adapted(rivals[best].probability, rivals[best].log_odds, rivals[best].fold, False, report)
    log_odds = predict(groups, scales, overall)
    log_odds[rows] = cross
    return Adapted(expit(log_odds), log_odds, np.where(labelled, fold, -1), True, report)


def check_human(z: np.ndarray) -> None:
    """Refuse human labels (N,), NaN where there is none, that nothing can be learned from.

    Raises:
        ValueError: fewer than 20, all alike, or one outside [0, 1].
    """
    known = z[~np.isnan(z)]
    if ((known < 0) | (known > 1)).any():
        raise ValueError(f"the label of pair {np.flatnonzero((z < 0) | (z > 1))[0]} lies outside [0, 1]: mend it")
    if len(known) < LEAST:
        raise ValueError(f"there are {len(known)} human labels, and adapting a judge takes at least {LEAST}: label more pairs")
    if (known == known[0]).all():
        raise ValueError(f"all {len(known)} human labels are {known[0]:g}, and nothing can be learned from answers that are all alike")


def _check_complete(groups: Sequence[Group], n: int) -> None:
    for group in groups:
        if group.values.shape != (n, len(group.columns)):
            raise ValueError(f"{group.name} have shape {group.values.shape}: give (N, F) for {n} pairs and {len(group.columns)} columns")
        for column, name in zip(group.values.T, group.columns, strict=True):
            if not np.isfinite(column).all():
                count = int((~np.isfinite(column)).sum())
                raise ValueError(f"{name} is missing for {count} of {n} pairs: complete it, or leave it out")


def units(spreads: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the differences of each group are divided by, (F,) each, from their spreads; the judges' own group is the first."""
    return [spread * (math.sqrt(len(spread)) if place else 1.0) for place, spread in enumerate(spreads)]


def predict(groups: Sequence[Group], scales: Sequence[np.ndarray], made: AdaptedMap) -> np.ndarray:
    """(N,) log-odds of all pairs, block by block."""
    scaled, found, start = [], np.zeros(len(groups[0].values)), 0
    for k in made.used:
        width = len(groups[k].columns)
        scaled.append((k, made.weights[start : start + width]))
        start += width
    for start in range(0, len(found), BLOCK):
        block = slice(start, start + BLOCK)
        for k, weights in scaled:
            found[block] += (groups[k].values[block].astype(np.float64) / scales[k]) @ weights
    return found


# ---- what it is worth, and what people taught


def compare(held: HeldOut, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Log loss and agreement with people of temperature (`before`) and adapted labels (`after`), (n,) log-odds held out, and the
    differences after - before, paired on the same pairs and resampled prompts."""
    losses = [log_losses(expit(odds), held.human) for odds in (before, after)]
    hits = [np.where((odds == 0) | (held.human == 0.5), 0.5, (odds > 0) == (held.human > 0.5)) for odds in (before, after)]
    stats = held.means([*losses, losses[1] - losses[0], hits[1] - hits[0]])
    agree = [score_agreement(odds, held.human, held.weights, held.group) for odds in (before, after)]
    return {
        "reliability": {key: reliability(odds, held) for key, odds in (("temperature", before), ("adapt", after))},
        "log_loss": {"temperature": stats[0], "adapt": stats[1], "difference": stats[2]},
        "agreement": {"temperature": agree[0], "adapt": agree[1], "difference": stats[3]},
    }


def reliability(log_odds: np.ndarray, held: HeldOut, *, bins: int = 6) -> list[dict[str, Any]]:
    """How often people agree (`observed`, Wilson's `ci` with groups as the draws) at each level of `confidence`, in bins of equal size."""
    sure, agreed = stated_confidence(expit(log_odds), held.human)
    points = []
    for rows in equal_bins(sure, min(bins, len(sure) // MIN_BIN)):
        share = float(np.average(agreed[rows], weights=held.weights[rows]))
        independent = effective_number(agreed[rows], held.group[rows], held.weights[rows])
        ci = wilson_interval(share * independent, independent)
        points.append({"confidence": float(sure[rows].mean()), "observed": share, "ci": ci, "n": len(rows)})
    return points


def describe(
    groups: Sequence[Group], spreads: Sequence[np.ndarray], sample: Taught, made: AdaptedMap, seed: int, *, most: int = 100_000
) -> list[dict[str, Any]]:
    """Every feature in use: `weight` (log-odds for a difference of one spread), what the judges make of it and what people do.

    A judge may heed a statistic through its score, so its own part is its weight times the slope of its standardised score on the
    standardised statistics, over the pairs. `judge` is that sum, `people` the sum with the statistic's own weight, `ratio` people /
    judge, each with a bootstrap over prompts of the weights; slopes, from all pairs, are taken as known.
    """
    fitted = sample.some(MOST_FITTED, seed)
    scales = units(spreads)
    factors = np.concatenate([spreads[k] / scales[k] for k in made.used])
    weights, drawn = made.weights * factors, _resampled(fitted, made, seed)
    drawn = None if drawn is None else drawn * factors
    width = len(groups[0].columns)
    entries, start = [], 0
    slopes = _slopes(groups, spreads, most, seed) if any(groups[k].name == "statistics" for k in made.used) else None
    for k in made.used:
        for place, name in enumerate(groups[k].columns):
            entry: dict[str, Any] = {
                "name": name,
                "group": groups[k].name,
                "weight": float(weights[start + place]),
                "spread": float(spreads[k][place]),
            }
            entry["ci"] = _interval(None if drawn is None else drawn[:, start + place])
            if groups[k].name == "statistics" and slopes is not None:
                judge = float(weights[:width] @ slopes[:, place])
                people = judge + entry["weight"]
                parts = None if drawn is None else drawn[:, :width] @ slopes[:, place]
                whole = None if parts is None else parts + drawn[:, start + place]  # type: ignore[index]
                entry |= {"judge": judge, "judge_ci": _interval(parts), "people": people, "people_ci": _interval(whole)}
                ratios = (
                    None if parts is None or whole is None else np.divide(whole, parts, out=np.full_like(parts, np.nan), where=parts != 0)
                )
                entry |= {"ratio": people / judge if judge else None, "ratio_ci": _interval(ratios)}
            entries.append(entry)
        start += len(groups[k].columns)
    return entries


def _slopes(groups: Sequence[Group], spreads: Sequence[np.ndarray], most: int, seed: int) -> np.ndarray:
    """(J, F): least squares of each judge's standardised score on the standardised statistics together, without an intercept."""
    k = next(k for k, group in enumerate(groups) if group.name == "statistics")
    n = len(groups[0].values)
    rows = np.arange(n) if n <= most else np.sort(np.random.default_rng((seed, 6)).choice(n, most, replace=False))
    scores, x = (groups[i].values[rows].astype(np.float64) / spreads[i] for i in (0, k))
    return np.linalg.lstsq(x, scores, rcond=None)[0].T


def _resampled(sample: Taught, made: AdaptedMap, seed: int) -> np.ndarray | None:
    """(R, F) weights refitted to resampled prompts; None for fewer than 20 of them."""
    _, code = np.unique(sample.prompt, return_inverse=True)
    count = int(code.max()) + 1
    if count < LEAST:
        return None
    x, rng, found = sample.features(made.used), np.random.default_rng((seed, 7)), []
    for _ in range(RESAMPLES):
        times = rng.multinomial(count, np.full(count, 1 / count))[code]
        kept = np.flatnonzero(times)
        strength = made.strength * len(kept) / len(times)  # the fit counts the rows it is given; drawn twice, they weigh as before
        found.append(fit_weights(x[kept], sample.human[kept], (sample.weights * times)[kept], [strength])[0])
    return np.stack(found)


def _interval(values: np.ndarray | None) -> list[float] | None:
    if values is None or not np.isfinite(values).all():
        return None
    return np.quantile(values, [0.025, 0.975]).tolist()
