"""Probabilities that a pair was labelled, estimated from what is known of the pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias.worth import NORMAL_975


@dataclass(frozen=True)
class Propensity:
    """`p` (N,) in [clip, 1], for `merge_labels(propensity=...)`, and how well the features tell who was labelled.

    `auc` is {value, se, ci}: 0.5 means not at all, that is labels taken at random as far as these features know; None where
    every pair is labelled. Its interval takes the fits as given: for labels taken at random its lower end lies above 0.5 in 6 %
    of cases. `n_clipped` pairs had a probability below the clip.
    """

    p: np.ndarray
    auc: dict[str, Any]
    n_clipped: int


def estimate_propensity(labelled: Any, features: Any, *, folds: int = 5, seed: int = 0, clip: float = 0.05) -> Propensity:
    """Probability of being labelled by cross-fitted logistic regression on standardised features.

    Args:
        labelled: (N,) bool.
        features: (N, P) numbers, known of labelled and unlabelled pairs alike; a constant column has no effect.
        folds: a pair's probability comes from a fit without its fold.
        seed: of the folds.
        clip: probabilities below it are raised to it, in (0, 1]: a pair counts 1 / clip times at most. That is a bias where
            it happens, and is counted.

    Raises:
        ValueError: arrays that do not fit, a feature that is not finite, fewer labelled or unlabelled pairs than folds.

    The labels are debiased with these as far as the logistic model holds and every pair could have been labelled.
    """
    answered, x = _checked(labelled, features, folds, clip)
    none = {"value": None, "se": None, "ci": None}
    if answered.all():
        return Propensity(np.ones(len(answered)), none, 0)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    p, parts = np.empty(len(answered)), []
    for fit_rows, rows in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, answered):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[fit_rows], answered[fit_rows])
        p[rows] = model.predict_proba(x[rows])[:, 1]
        parts.append(area_under_curve(p[rows][answered[rows]], p[rows][~answered[rows]]))
    return Propensity(np.clip(p, clip, 1.0), mean_area(parts), int((p < clip).sum()))


def mean_area(parts: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """{value, se, ci} of the mean of the folds' areas, from each one's area and variance as `area_under_curve` gives them."""
    value, se = float(np.mean([area for area, _ in parts])), math.sqrt(float(np.sum([v for _, v in parts])) / len(parts) ** 2)
    return {"value": value, "se": se, "ci": [max(0.0, value - NORMAL_975 * se), min(1.0, value + NORMAL_975 * se)]}


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Chance that a score of the first kind is above one of the second (ties half), and its variance by DeLong's method.

    Args:
        positive: (a,) scores.
        negative: (b,) scores.

    Returns:
        Area and variance; the variance is 0 where either kind has a single score.

    Reference: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988).
    """
    from scipy.stats import rankdata

    a, b = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:a] - rankdata(positive)) / b  # share of the negatives below each positive
    below = 1 - (ranks[a:] - rankdata(negative)) / a
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (above, below) if len(part) > 1)
    return float(above.mean()), variance


def _checked(labelled: Any, features: Any, folds: int, clip: float) -> tuple[np.ndarray, np.ndarray]:
    answered, x = np.asarray(labelled, dtype=bool), np.asarray(features, dtype=np.float64)
    if answered.ndim != 1 or x.ndim != 2 or len(x) != len(answered) or x.shape[1] == 0:
        raise ValueError(f"labelled has shape {answered.shape} and features {x.shape}: they must be (N,) and (N, P) with P >= 1")
    if not 0 < clip <= 1:
        raise ValueError(f"clip is {clip}: it must lie in (0, 1]")
    if folds < 2:
        raise ValueError(f"folds is {folds}: give 2 or more")
    refuse_infinite(x)
    counts = {"labelled": int(answered.sum()), "unlabelled": int((~answered).sum())}
    kind = min(counts, key=lambda name: counts[name])
    least = counts[kind]
    if least < folds and counts["unlabelled"] > 0:
        raise ValueError(
            f"there are {least} {kind} pairs, too few for {folds} folds; take labels as taken at random instead (--propensities none)"
        )
    return answered, x


def refuse_infinite(features: np.ndarray) -> None:
    """A ValueError that names the first of the features (N, P) that is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"features[{row}, {column}] is {features[row, column]}: fill it in, or leave column {column} out")
