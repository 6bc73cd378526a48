"""Tuned powers: of all pairs, or, cross-fitted, of each fold from the labels of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dedpo_diffusion.debias.clusters import cluster_sums
from dedpo_diffusion.debias.powers import Fit, best_powers, fit_powers, power_cap


@dataclass(frozen=True)
class Powers:
    """Powers (C, K) of a cell, and `cell` (N,) int64 of every pair: its fold, or 0.

    Where they were tuned, `pooled` is the fit to all labels. Their sum is `free` (C,), less the standard error `back` (C,) where
    the rule takes one off, and at most `cap` (C,).
    """

    table: np.ndarray
    cell: np.ndarray
    pooled: Fit | None = None
    cap: np.ndarray | None = None
    free: np.ndarray | None = None
    back: np.ndarray | None = None

    def totals(self) -> np.ndarray:
        """(N,) sum of the judges' powers, per pair."""
        return self.table.sum(axis=1)[self.cell]


def assign_folds(dealt: np.ndarray, folds: int, rng: np.random.Generator, clusters: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64 folds at random, equal in size within each value of `dealt` (N,); the pairs of one of `clusters` (N,) stay together."""
    if clusters is not None:
        return assign_folds(cluster_sums(dealt, clusters) > 0, folds, rng)[np.unique(clusters, return_inverse=True)[1]]
    shuffled = rng.permutation(len(dealt))
    fold = np.empty(len(dealt), dtype=np.int64)
    fold[shuffled[np.argsort(dealt[shuffled], kind="stable")]] = np.arange(len(dealt)) % folds
    return fold


def powers_of(fit: Fit, cap: float, *, rule: str) -> tuple[np.ndarray, float, float]:
    """The powers (K,) to use, their sum without cap and standard error, and the standard error that the rule takes off.

    Args:
        fit: to labels.
        cap: bound of the sum.
        rule: `half` halves the powers before they are capped, `minus_se` takes one standard error off their sum.
    """
    free = best_powers(fit.cross, fit.square, 1.0)
    if rule == "half":
        return _nearest(free / 2, fit.square, cap), float(free.sum()) / 2, 0.0
    used = best_powers(fit.cross, fit.square, cap)
    if rule != "minus_se":
        return used, float(free.sum()), 0.0
    back = np.inf if np.isnan(fit.total_se) else fit.total_se
    total = float(used.sum())
    keep = np.clip((free.sum() - back) / total, 0.0, 1.0) if total > 0 else 0.0
    return used * keep, float(free.sum()), float(back)


def _nearest(wanted: np.ndarray, square: np.ndarray, bound: float) -> np.ndarray:
    """The feasible powers that cost least variance against `wanted` (K,), none of them negative."""
    return wanted if wanted.sum() <= bound else best_powers(square @ wanted, square, bound)


def choose_powers(
    z: np.ndarray, g: np.ndarray, h: np.ndarray, *, rule: str, fold: np.ndarray, folds: int, max_overshoot: float,
    clusters: np.ndarray | None = None,
) -> Powers:  # fmt: skip
    """Tuned powers.

    Args:
        z, h: (N,); g: (N, K), of all pairs.
        rule: of `powers_of`.
        fold: (N,) of each pair.
        folds: their number; with more than 1 the powers of a fold are fitted to the labels of the others.
        max_overshoot: bound of the stretch h / weight.
        clusters: (N,) of labels that depend on each other; None where they do not.
    """
    largest = np.zeros(folds)
    np.maximum.at(largest, fold, h)
    caps = np.array([power_cap(largest[[k]], max_overshoot) for k in range(folds)])
    labelled = ~np.isnan(z)

    def fit(rows: np.ndarray) -> Fit:
        return fit_powers(z[rows], g[rows], h[rows], None if clusters is None else clusters[rows])

    pooled = fit(labelled)
    fits = [pooled] if folds == 1 else [fit(labelled & (fold != k)) for k in range(folds)]
    table, free, back = zip(*(powers_of(fit, cap, rule=rule) for fit, cap in zip(fits, caps, strict=True)), strict=True)
    return Powers(np.stack(table), fold, pooled, caps, np.array(free), np.array(back))
