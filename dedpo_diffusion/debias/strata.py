"""Strata and folds of the pairs, and the powers of each: own ones, shrunk towards those of all pairs together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias.powers import ALIKE, Fit, best_powers, fit_powers, power_cap

SMALL_STRATA = "(small strata)"
LEAST_LABELS = 10  # a stratum with fewer human labels is joined with others
LENT_LABELS = 10  # labels' worth of the common variance that a stratum's own is mixed with: a few labels may show no scatter at all


@dataclass(frozen=True)
class Strata:
    """Which stratum a pair is in: `names` of the S strata, `code` (N,) int64 into them, and the names that were `merged`."""

    names: list[str]
    code: np.ndarray
    merged: list[str]


@dataclass(frozen=True)
class Powers:
    """Powers (C, K) of a cell, and `cell` (N,) int64 of every pair: a stratum, or a stratum's fold.

    What they were fitted from, where they were: `pooled` all labels, `fits` those of each stratum, `shrinkage` (S, K) the
    weight of the stratum's own power against the pooled one. Their sum is `free` (C,), less the standard error `back` (C,) where
    the rule takes one off, and at most `cap` (C,).
    """

    table: np.ndarray
    cell: np.ndarray
    pooled: Fit | None = None
    fits: list[Fit] | None = None
    shrinkage: np.ndarray | None = None
    cap: np.ndarray | None = None
    free: np.ndarray | None = None
    back: np.ndarray | None = None

    def totals(self) -> np.ndarray:
        """(N,) sum of the judges' powers, per pair."""
        return self.table.sum(axis=1)[self.cell]


def group_strata(strata: Any, labelled: np.ndarray) -> Strata:
    """Strata by name, in alphabetical order; those with fewer than 10 human labels are joined into "(small strata)".

    If these together have fewer than 10, the strata with the fewest labels join them until they do.

    Args:
        strata: (N,) names, text or whole numbers; None puts every pair into one stratum without a name.
        labelled: (N,) bool.

    Raises:
        ValueError: another length, or a missing name.
    """
    if strata is None:
        return Strata([""], np.zeros(len(labelled), dtype=np.int64), [])
    values: Sequence[Any] = strata.tolist() if isinstance(strata, np.ndarray) else strata
    if len(values) != len(labelled):
        raise ValueError(f"strata has {len(values)} names, but there are {len(labelled)} pairs: give one for each")
    seen: dict[Any, int] = {}
    code = np.fromiter((seen.setdefault(value, len(seen)) for value in values), dtype=np.int64, count=len(values))
    for value in seen:
        if value is None or value != value:
            raise ValueError(f"strata[{code.tolist().index(seen[value])}] is {value}: name the stratum of every pair")
    names = [str(value) for value in seen]
    if len(set(names)) < len(names):
        raise ValueError("strata mixes numbers and text of the same name: use one of them")
    small = _too_small(np.bincount(code[labelled], minlength=len(names)))
    kept = sorted(name for name, joined in zip(names, small, strict=True) if not joined)
    merged = sorted(name for name, joined in zip(names, small, strict=True) if joined)
    final = [*kept, SMALL_STRATA] if merged else kept
    place = {name: k for k, name in enumerate(kept)}
    return Strata(final, np.array([place.get(name, len(kept)) for name in names], dtype=np.int64)[code], merged)


def _too_small(counts: np.ndarray) -> np.ndarray:
    """(S,) bool: strata to be joined, by their numbers of human labels."""
    order = np.argsort(counts, kind="stable")
    together = np.cumsum(counts[order])
    n = int((counts < LEAST_LABELS).sum())
    while 0 < n < len(counts) and together[n - 1] < LEAST_LABELS:
        n += 1
    small = np.zeros(len(counts), dtype=bool)
    small[order[:n]] = len(counts) > 1
    return small


def assign_cells(strata: Strata, folds: int, dealt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cell = stratum * folds + fold, (N,), with folds at random, equal in size within each stratum and each value of `dealt` (N,)."""
    shuffled = rng.permutation(len(dealt))
    order = shuffled[np.lexsort((dealt[shuffled], strata.code[shuffled]))]
    fold = np.empty(len(dealt), dtype=np.int64)
    fold[order] = np.arange(len(dealt)) % folds
    return strata.code * folds + fold


def variance_between(values: np.ndarray, variances: np.ndarray) -> float:
    """tau^2 of DerSimonian and Laird: the variance of true values behind estimates (S,) with known variances (S,).

    Reference: DerSimonian and Laird, Controlled Clinical Trials 7 (1986).
    """
    known = np.isfinite(variances) & (variances > 0)
    if known.sum() < 2:
        return 0.0
    w = 1 / variances[known]
    centre = np.sum(w * values[known]) / w.sum()
    spread = np.sum(w * (values[known] - centre) ** 2) - (known.sum() - 1)
    return float(max(0.0, spread / (w.sum() - np.sum(w**2) / w.sum())))


def own_weights(values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Weight (S,) of each estimate (S,) against the common one, tau^2 / (tau^2 + variance); 0 where a variance is unknown or 0."""
    between = variance_between(values, variances)
    known = np.isfinite(variances) & (variances > 0)
    return np.divide(between, between + variances, out=np.zeros(len(values)), where=known)


def own_powers(fit: Fit, pooled: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Powers (K,) of a stratum by itself and their variances (K,), NaN where a judge says nothing there.

    What its labels cannot tell, as the shares of judges that never differ there, is as in the pooled fit. The scatter of human
    labels around the judges' is mixed with the pooled one as if the stratum had 10 labels more: a dozen that all agree would
    otherwise claim to be certain. How it depends on what the judges say is taken from all strata: where two judges seldom
    differ, a stratum has a handful of pairs to tell it from.
    """
    powers, variance = np.zeros(len(fit.free)), np.full(len(fit.free), np.nan)
    heard = np.flatnonzero(np.diag(fit.square) > 0)
    if len(heard):
        inverse = np.linalg.pinv(fit.square[np.ix_(heard, heard)], rcond=ALIKE, hermitian=True)
        powers[heard] = pooled.free[heard] + inverse @ (fit.cross - fit.square @ pooled.free)[heard]
        scatter = (fit.n * fit.left / pooled.left + LENT_LABELS) / (fit.n + LENT_LABELS) if pooled.left > ALIKE else 0.0
        common, whiten = (_power_of(matrix, power) for matrix, power in ((fit.scores, 0.5), (pooled.scores, -0.5)))
        meat = common @ whiten @ pooled.meat @ whiten @ common
        found = scatter * np.diag(inverse @ meat[np.ix_(heard, heard)] @ inverse)
        variance[heard] = np.where(found > ALIKE, found, 0.0)  # no scatter at all, up to rounding
    return powers, variance


def _power_of(matrix: np.ndarray, power: float) -> np.ndarray:
    """A power of a symmetric matrix (K, K) without negative eigenvalues, 0 where it vanishes."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > ALIKE * values[-1]
    return (vectors[:, kept] * values[kept] ** power) @ vectors[:, kept].T


def shrinkage(fits: list[Fit], pooled: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Each stratum's own powers (S, K), and the weight (S, K) of each against the pooled one."""
    powers, variances = (np.stack(values) for values in zip(*(own_powers(fit, pooled) for fit in fits), strict=True))
    columns = [own_weights(powers[:, k], variances[:, k]) for k in range(powers.shape[1])]
    return powers, np.stack(columns, axis=1)


def fit_strata(z: np.ndarray, g: np.ndarray, h: np.ndarray, code: np.ndarray, n_strata: int) -> tuple[Fit, list[Fit]]:
    """The fit of all labels, and that of each stratum, from n labelled pairs: z, h, code (n,) and g (n, K)."""
    pooled = fit_powers(z, g, h)
    if n_strata == 1:
        return pooled, [pooled]
    order = np.argsort(code, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(code, minlength=n_strata))[:-1])
    return pooled, [fit_powers(z[r], g[r], h[r]) for r in rows]


@dataclass(frozen=True)
class Chosen:
    """Powers of S strata: `table` (S, K), and the weight `own` (S, K) of the stratum's own power in them, 1 where there is one stratum.

    `free` (S,) are their sums without cap and standard error, `back` (S,) the standard errors that the rule takes off.
    """

    table: np.ndarray
    own: np.ndarray
    free: np.ndarray
    back: np.ndarray


def best_table(pooled: Fit, fits: list[Fit], caps: np.ndarray, *, rule: str) -> Chosen:
    """The powers to use.

    Args:
        pooled, fits: of all labels and of each of S strata.
        caps: (S,) bound of the sum.
        rule: `half` halves the powers before they are capped, `minus_se` takes one standard error off their sum.
    """
    if len(fits) == 1:
        own, errors = np.ones((1, len(pooled.raw))), np.array([pooled.total_se])
        wanted: list[Callable[[float], np.ndarray]] = [lambda bound: best_powers(pooled.cross, pooled.square, bound)]
    else:
        powers, own = shrinkage(fits, pooled)
        errors = np.array([_total_se(fit, pooled, float(w.mean())) for fit, w in zip(fits, own, strict=True)])
        shrunk = pooled.raw + own * (powers - pooled.raw)
        wanted = [functools.partial(_nearest, lam, pooled.square) for lam in shrunk]
    if rule == "half":
        wanted = [functools.partial(_nearest, find(1.0) / 2, pooled.square) for find in wanted]
    table = np.stack([find(cap) for find, cap in zip(wanted, caps, strict=True)])
    free = np.array([find(1.0).sum() for find in wanted])
    if rule != "minus_se":
        return Chosen(table, own, free, np.zeros(len(fits)))
    back = np.nan_to_num(errors, nan=np.inf)
    total = table.sum(axis=1)
    keep = np.divide(free - back, total, out=np.zeros_like(total), where=total > 0).clip(0.0, 1.0)
    return Chosen(table * keep[:, None], own, free, back)


def _nearest(wanted: np.ndarray, square: np.ndarray, bound: float) -> np.ndarray:
    """The feasible powers that cost least variance against `wanted` (K,)."""
    if (wanted >= 0).all() and wanted.sum() <= bound:
        return wanted
    return best_powers(square @ wanted, square, bound)


def _total_se(fit: Fit, pooled: Fit, weight: float) -> float:
    """Standard error of the sum of a stratum's shrunk powers: of its own part, and of the pooled one's."""
    own = 0.0 if weight == 0 else weight * _moderated(fit.n, fit.total_se**2, pooled.n, pooled.total_se**2)
    return math.sqrt(own + (1 - weight) ** 2 * pooled.total_se**2)


def _moderated(n: int, own: Any, pooled_n: int, pooled: Any) -> Any:
    """Variance of the estimate of a stratum of n labels, its variance per label mixed with the pooled one's."""
    return (n * n * own + LENT_LABELS * pooled_n * pooled) / (n + LENT_LABELS) / n


def choose_powers(
    z: np.ndarray, g: np.ndarray, h: np.ndarray, strata: Strata, *, rule: str, cell: np.ndarray, folds: int, max_overshoot: float
) -> Powers:
    """Tuned powers of every cell.

    Args:
        z, h: (N,); g: (N, K), of all pairs.
        strata: S of them.
        rule: of `best_table`.
        cell: (N,) stratum of a pair, or stratum * folds + fold.
        folds: their number; with more than 1 the powers of a fold are fitted to the labels of the others.
        max_overshoot: bound of the stretch h / weight.
    """
    n_strata, judges = len(strata.names), g.shape[1]
    largest = np.zeros(n_strata * folds)
    np.maximum.at(largest, cell, h)
    caps = np.array([power_cap(largest[[c]], max_overshoot) for c in range(len(largest))])
    labelled = np.flatnonzero(~np.isnan(z))

    def fit(rows: np.ndarray) -> tuple[Fit, list[Fit]]:
        return fit_strata(z[rows], g[rows], h[rows], strata.code[rows], n_strata)

    pooled, fits = fit(labelled)
    if folds == 1:
        made = best_table(pooled, fits, caps, rule=rule)
        return Powers(made.table, cell, pooled, fits, made.own, caps, made.free, made.back)
    fold = cell[labelled] % folds
    found = [best_table(*fit(labelled[fold != k]), caps.reshape(n_strata, folds)[:, k], rule=rule) for k in range(folds)]
    table = np.stack([made.table for made in found], axis=1).reshape(-1, judges)
    free, back = (np.stack([getattr(made, name) for made in found], axis=1).ravel() for name in ("free", "back"))
    own = np.ones((1, judges)) if n_strata == 1 else shrinkage(fits, pooled)[1]
    return Powers(table, cell, pooled, fits, own, caps, free, back)
