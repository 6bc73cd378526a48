"""merge_labels: human and judge labels to a target and a weight per pair, and the report on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.debias.coefficients import WITHOUT_POWER
from dedpo_diffusion.debias.estimate import estimate
from dedpo_diffusion.debias.report import make_basis, make_report
from dedpo_diffusion.debias.worth import Basis


@dataclass(frozen=True)
class Merged:
    """What training needs to know about the labels of N pairs.

    `target` and `weight` are (N,) float64; targets of labelled pairs may leave [0, 1] and must not be clipped: that would
    restore the judge's bias. `power` is the power used, of all judges together, on average over the pairs; NaN for naive
    merging and method adapted, which have none. `report` is ready for JSON.

    What they were merged from, (N,) float64: `human` (NaN: no label), `judge` (mixed by the powers of several judges, their
    plain mean where these are 0; NaN: missing), `inverse` propensity h, `powers` (lam, of all judges together).
    weight = h + lam (1 - h) and weight * target = h human + lam (1 - h) judge; naive merging has neither h nor lam, and method
    adapted no lam either: its weight * (target - 1/2) is in proportion to `predicted` - 1/2. `basis` is what the worth is told
    by, for `labels.plan`.
    """

    target: np.ndarray
    weight: np.ndarray
    power: float
    report: dict[str, Any]
    human: np.ndarray | None = None
    judge: np.ndarray | None = None
    inverse: np.ndarray | None = None
    powers: np.ndarray | None = None
    basis: Basis | None = None
    predicted: np.ndarray | None = None


def merge_labels(
    human: Any,
    synthetic: Any,
    *,
    method: str = DEFAULT_METHOD,
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
) -> Merged:
    """Merge human and judge labels into a target and a weight per pair.

    Args:
        human: (N,) human probabilities that image 0 is preferred, in [0, 1]; NaN where nobody answered.
        synthetic: (N,) the judge's, in [0, 1], or (N, K) those of K <= 8 judges; None or NaN only for `human_only` (and for
            labelled pairs in `naive`).
        method: `tuned` fits the power to the labelled pairs, `dedpo` takes 1 as published (not capped; of the mean of several
            judges), `human_only` is power 0, `naive` takes the human label, or else the judges' mean, which is biased;
            `adapted` is for a judge that people taught (`dedpo calibrate --method adapt`), see `imputation`.
        power: a power in [0, 1] to use instead of the method's, for several judges one each with a sum of at most 1 (`dedpo`
            and `tuned` only); not capped.
        propensity: probability in (0, 1] that a pair was labelled, a number or (N,); None is the labelled
            share. With an array the inverse propensities are normalised to mean 1 (Hajek).
        max_overshoot: bound A >= 1 of the tuned power: a labelled target is g + A (z - g) at most.
        seed: seed of the bootstrap of `effective_human_labels` and of the folds.
        rule: how a tuned power is chosen: `plug_in` the estimate, `half` half of it (three quarters of the gain at margin 0, safer
            once margins have grown), `minus_se` one standard error less, `cross_fitted` fitted to the labels of other folds.
        judges: names of the judges, for the report.
        folds: of `cross_fitted`, drawn at random, the labelled pairs dealt out evenly.
        correction: of `adapted`: c in the prediction p + max(1, c h) (z - p) for a labelled pair, from the labelled share or less
            (the human label in place) to 1 (DeDPO). None takes the James-Stein factor of the residuals z - p, and holds c h at
            `max_overshoot`.
        features: (N, F) of `adapted`: differences of a pair's images, in whose directions the judge's error may be systematic.
        rater_agreement: of `adapted`: how often two people agree on a pair; an answer then moves its prediction as far
            as its noise allows.
        visits, noise_ratio: of `tuned` and `dedpo`: optimizer steps times pairs of a step, and the mean squared gradient of a
            visit over that of a pair. `tuned` takes the power that is best in a run of this length (`compute`).
        clusters: (N,) numbers of human labels that depend on each other, as of one ranking; below 0 is a label of its own, None means that
            all are. Intervals, standard errors and folds count clusters.

    Returns:
        Merged. The report holds counts (`n`, `n_human`, `n_ties`), `labelled_share`, `agreement`, `power`, `power_raw`,
        `power_se`, `power_cap` (the least of the folds'), `capped_share` (of the pairs whose power it holds down),
        `overshoot`, `share_outside`, `max_abs_offset` (the largest |target - 0.5|), `judge_bias` (mean of g - z),
        `effective_human_labels`, the same at power 1, `rule`, `folds` (of cross-fitting), `judges` (the figures of each, by name),
        `clusters` (of labels that depend on each other), `sentences`, `mean_abs_offset` (how sharp the targets are: the mean
        of |target - 0.5| by weight),
        `labelled_weight` (labelled pairs' share of the weight), `correction` (of `adapted`: c, the factor wanted,
        |B|^2, V, ...) and `run` (of `visits`); None stands where a number does not exist. Of
        several judges, agreement and bias are those of the mixed label and powers those of all together. Agreement and bias are
        those of all pairs, of labelled ones weighted by propensities. A worth is counted in human labels taken at random from all
        pairs, or, where propensities are unequal, in labels taken with the same (`worth_reference`); that of tuned powers of several
        judges is told by powers fitted to other pairs.

    Raises:
        ValueError: a label or option that cannot be used; the message names index and remedy.

    With a fixed power or `cross_fitted` the loss is unbiased for labels taken at random, whatever the judges; the other
    rules use each label twice, in loss and power, and are unbiased up to terms of order 1 / (number of human labels).

    Reference: DeDPO, arXiv 2602.06195; PPI++, arXiv 2311.01453, for the power.
    """
    options: dict[str, Any] = {"method": method, "power": power, "propensity": propensity, "max_overshoot": max_overshoot, "seed": seed}
    options |= {"correction": correction, "features": features, "rater_agreement": rater_agreement, "visits": visits}
    options |= {"noise_ratio": noise_ratio, "clusters": clusters}
    made = estimate(human, synthetic, **options, rule=rule, judges=judges, folds=folds)
    report = make_report(made, basis := make_basis(made, seed), seed)
    common: dict[str, Any] = {"human": made.z, "judge": made.mixed, "basis": basis, "predicted": made.predicted}
    if method in WITHOUT_POWER:
        return Merged(made.target, made.weight, math.nan, report, **common)
    return Merged(made.target, made.weight, report["power"], report, inverse=made.h, powers=made.total, **common)
