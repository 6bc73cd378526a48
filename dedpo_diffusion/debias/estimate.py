"""Human and judge labels to targets and weights: the estimator without its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dedpo_diffusion.debias.checks import check_options, check_powers, check_present, checked_judges, checked_labels, checked_names
from dedpo_diffusion.debias.clusters import checked_clusters, cluster_sums
from dedpo_diffusion.debias.coefficients import WITHOUT_POWER, inverse_propensity, mix_judges, pair_targets, pair_weights
from dedpo_diffusion.debias.compute import Run, best_scale, check_run, run_terms
from dedpo_diffusion.debias.imputation import Correction, check_correction, hard_targets, impute
from dedpo_diffusion.debias.tuning import Powers, assign_folds, choose_powers


@dataclass(frozen=True)
class Estimate:
    """Targets and weights of N pairs and what they were made from: labels of K judges, powers.

    `z` (N,), `g` (N, K) and `mixed` (N,) labels, NaN where there is none; `h` (N,) inverse propensities; `total` (N,) powers
    of all judges together, NaN for methods without one; `target`, `weight` (N,). `names` are the judges'; `stated` tells whether
    propensities were given. Of method adapted: `correction`, and `predicted` (N,), what targets and weights were
    made of. `clusters` (N,): of labels that depend on each other, None where they do not. `run` is the run that a power was
    made for; `endless` (N,), the powers of endless training, times `scale` are its.
    """

    method: str
    rule: str
    folds: int
    z: np.ndarray
    g: np.ndarray
    mixed: np.ndarray
    h: np.ndarray
    total: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    powers: Powers
    names: list[str]
    max_overshoot: float
    stated: bool
    correction: Correction | None = None
    run: Run | None = None
    scale: float = 1.0
    endless: np.ndarray | None = None
    predicted: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def uneven(self) -> bool:
        """Whether some labelled pairs were likelier to be labelled than others."""
        h = self.h[~np.isnan(self.z)]
        return self.stated and len(h) > 0 and bool(h.max() > h.min() * (1 + 1e-9))


def estimate(
    human: Any,
    synthetic: Any,
    *,
    method: str = "tuned",
    power: float | Sequence[float] | None = None,
    propensity: Any = None,
    max_overshoot: float = 2.0,
    seed: int = 0,
    rule: str = "plug_in",
    judges: Sequence[str] | None = None,
    folds: int = 5,
    correction: float | None = None,
    features: Any = None,
    rater_agreement: float | None = None,
    visits: float | None = None,
    noise_ratio: float | None = None,
    clusters: Any = None,
) -> Estimate:
    """`merge_labels` without its report, and so without a bootstrap: for simulations. Arguments and errors are the same."""
    check_options(method, power, propensity, max_overshoot, rule, folds)
    z = checked_labels(human, "human", "leave NaN where nobody answered")
    g = np.full((len(z), 1), np.nan) if synthetic is None else checked_judges(synthetic)
    names = checked_names(judges, g.shape[1])
    check_present(z, g, method, synthetic is None, names)
    given = check_powers(power, g.shape[1])
    known = check_correction(method, correction, features, rater_agreement, len(z))
    run, scale = check_run(method, power, rule, visits, noise_ratio), 1.0
    n_folds = folds if rule == "cross_fitted" else 1
    tied = checked_clusters(clusters, z)
    fold = _folds(z, n_folds, propensity, seed, tied)
    h = inverse_propensity(z) if method == "naive" else inverse_propensity(z, propensity, fold if rule == "cross_fitted" else None)
    powers = _powers(z, g, h, fold, method, given, rule, n_folds, max_overshoot, tied)
    mixed, total = mix_judges(g, powers.table, powers.cell), powers.totals()
    endless, moved, predicted = total, None, None
    if run is not None and method == "tuned" and given is None:
        scale = best_scale(run_terms(z, mixed, h, total), run)
        powers, total = replace(powers, table=scale * powers.table), scale * total
    if method in WITHOUT_POWER:
        total = np.full(len(z), np.nan)
    if method == "adapted":
        options = {"correction": correction, "features": known, "rater_agreement": rater_agreement}
        predicted, moved = impute(z, mixed, h, **options, max_overshoot=max_overshoot)  # type: ignore[arg-type]
        target, weight = hard_targets(predicted)
    elif method == "naive":
        target, weight = np.where(np.isnan(z), mixed, z), np.ones(len(z))
    else:
        weight = pair_weights(h, total)
        target = pair_targets(z, mixed, h, weight)
    about = (powers, names, max_overshoot, propensity is not None)
    return Estimate(method, rule, n_folds, z, g, mixed, h, total, target, weight, *about, moved, run, scale, endless, predicted, tied)


def _folds(z: np.ndarray, folds: int, propensity: Any, seed: int, clusters: np.ndarray | None) -> np.ndarray:
    """(N,) fold of each pair, 0 without cross-fitting."""
    if folds == 1:
        return np.zeros(len(z), dtype=np.int64)
    dealt = np.zeros(len(z), dtype=bool)
    if propensity is None:  # each fold's labelled share is taken for itself: deal the labels out evenly
        dealt = ~np.isnan(z)
        if len(cluster_sums(z[dealt], None if clusters is None else clusters[dealt])) < folds:
            raise ValueError(
                f"rule 'cross_fitted' with {folds} folds needs {folds} human labels, and there are {dealt.sum()}: "
                "label more pairs, or use rule plug_in"
            )
    return assign_folds(dealt, folds, np.random.default_rng((seed, 1)), clusters)


def _powers(
    z: np.ndarray, g: np.ndarray, h: np.ndarray, fold: np.ndarray, method: str, given: np.ndarray | None, rule: str, folds: int,
    max_overshoot: float, clusters: np.ndarray | None,
) -> Powers:  # fmt: skip
    """Powers given, of the method, or tuned."""
    judges = g.shape[1]
    if given is None and method == "tuned":
        return choose_powers(z, g, h, rule=rule, fold=fold, folds=folds, max_overshoot=max_overshoot, clusters=clusters)
    fixed = given if given is not None else np.full(judges, 1 / judges if method == "dedpo" else 0.0)
    return Powers(fixed[None, :], np.zeros(len(z), dtype=np.int64))
