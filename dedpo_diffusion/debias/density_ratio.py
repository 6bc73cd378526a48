"""Human labels of other pairs than those trained on: the density ratio w(x) = p_target(x) / p_labelled(x), and what is made of it.

What people said of one population tells of another one by weights. A logistic classifier that tells target pairs from labelled ones
by features x of a pair knows the ratio of their densities: its odds, times labelled pairs over target pairs. Any map from x to
people's answers may differ between judge and people; it must be the same in both populations (covariate shift), and target pairs
must look like some labelled ones (overlap).

A labelled pair then stands for itself and for its share of the N target pairs,

    h_i = 1 + N w_i / sum w,

which is an inverse propensity in the pool of both: `merge_labels(propensity=1 / h)` is DDPO, the judge's loss on the target pairs and
the weighted difference of people and judge on the labelled ones. Where the labelled pairs themselves are not trained on,
`carry_over` puts that difference onto the target pairs, along directions that are known of both.

Reference: DIPO and DDPO, arXiv 2602.08259; the ratio by a classifier: Qin, Biometrika 85 (1998).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.core.sample_size import effective_size
from dedpo_diffusion.debias.propensity import area_under_curve, mean_area, refuse_infinite
from dedpo_diffusion.debias.worth import NORMAL_975

LEAST = 20  # labelled pairs
BOUND = 20.0  # times the mean: no labelled pair counts for more
APART = 0.999  # area under the curve from which the populations do not overlap
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # sklearn's C, the inverse of the L2 strength, of features of spread 1
MOST_FITTED = 20_000  # pairs of either kind, drawn at random, that a fit sees


@dataclass(frozen=True)
class DensityRatio:
    """`ratio` (n,) of the labelled pairs, of mean 1, in their order, and how far it can be relied on.

    `auc` {value, se, ci}: 0.5 where the populations look alike. `n_clipped` ratios were above `bound` times their mean; `effective` labels
    taken from the target population at random would tell a mean as well; `beyond` is the share of the target pairs that look less
    like labelled ones than any of these does. `imbalance` is the largest difference between the populations' means of a feature, in
    standard deviations of the target, before and after weighting; `furthest` the number of the feature that differs most after it.
    """

    ratio: np.ndarray
    auc: dict[str, Any]
    bound: float
    n_clipped: int
    effective: float
    beyond: float
    imbalance: tuple[float, float]
    furthest: int

    def inverse_propensity(self, target: int) -> np.ndarray:
        """(n,) h: how many pairs of a pool with `target` others each labelled pair stands for."""
        return 1 + target * self.ratio / self.ratio.sum()


def estimate_density_ratio(
    labelled: Any, features: Any, *, groups: Any = None, folds: int = 5, seed: int = 0, bound: float = BOUND
) -> DensityRatio:
    """The density ratio by cross-fitted logistic regression, its L2 strength by cross-validation.

    Args:
        labelled: (M,) bool; the others are target pairs.
        features: (M, P) numbers that do not change when the images of a pair are swapped; a constant one has no effect.
        groups: (M,) integers, pairs that fall into one fold together, as those of a prompt; None takes pairs one by one.
        folds: a labelled pair's ratio is from a fit without its fold.
        seed: of folds and draws.
        bound: ratios above so many times their mean are set to that, which is a bias where it happens, and is counted.

    Raises:
        ValueError: arrays that do not fit, a feature that is not finite or none that varies, fewer than 20 labelled or target pairs,
            populations that do not overlap.
    """
    answered, x = _checked(labelled, features, bound)
    odds, fold = _cross_fit(answered, x, groups, folds, seed)
    auc = _area(odds, answered, fold)
    if auc["value"] > APART:
        raise ValueError(
            f"the populations do not overlap: what is known of the pairs tells the {answered.sum()} labelled from the {(~answered).sum()} "
            f"target pairs without error (AUC {auc['value']:.4f}), so the labels say nothing of the target pairs; label some of these"
        )
    scaled = np.exp(odds[answered] - odds[answered].max())
    raw = scaled / scaled.mean()
    ratio = np.minimum(raw, bound)
    ratio = ratio / ratio.mean()
    before, after = (_imbalance(x, answered, w) for w in (np.ones(len(ratio)), ratio))
    beyond = float((odds[~answered] > odds[answered].max()).mean())
    furthest = int(np.argmax(after))
    clipped, imbalance = int((raw > bound).sum()), (float(before.max()), float(after.max()))
    return DensityRatio(ratio, auc, bound, clipped, effective_size(ratio), beyond, imbalance, furthest)


def _checked(labelled: Any, features: Any, bound: float) -> tuple[np.ndarray, np.ndarray]:
    answered, x = np.asarray(labelled, dtype=bool), np.asarray(features, dtype=np.float64)
    if answered.ndim != 1 or x.ndim != 2 or len(x) != len(answered):
        raise ValueError(f"labelled has shape {answered.shape} and features {x.shape}: they must be (M,) and (M, P)")
    if not bound >= 1:
        raise ValueError(f"bound is {bound}: it must be at least 1, the mean of the ratios")
    for kind, count in (("labelled", int(answered.sum())), ("target", int((~answered).sum()))):
        if count < LEAST:
            raise ValueError(f"there are {count} {kind} pairs, and a density ratio takes at least {LEAST} of either population")
    refuse_infinite(x)
    if x.shape[1] == 0 or not (np.ptp(x, axis=0) > 0).any():
        raise ValueError("nothing that differs between pairs is known of both populations, so there is no density ratio")
    return answered, x


def _splits(answered: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Places to fit on and places left out, by fold, with both kinds of pairs alike in each; groups stay together if there are enough."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    empty = np.zeros((len(answered), 1))
    if groups is not None and min(len(np.unique(groups[answered])), len(np.unique(groups[~answered]))) >= 2 * folds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a large group makes folds uneven, which is of no matter here
            found = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(empty, answered, groups))
        if all(0 < answered[part].sum() < len(part) for split in found for part in split):
            return found
    return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(empty, answered))


def _cross_fit(answered: np.ndarray, x: np.ndarray, groups: Any, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(M,) log density ratio up to a constant from fits without a pair's fold, and (M,) the folds."""
    group = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    odds, fold = np.empty(len(x)), np.empty(len(x), dtype=np.int64)
    for k, (seen, rows) in enumerate(_splits(answered, group, folds, seed)):
        some = _thinned(seen, answered, np.random.default_rng((seed, 8, k)))
        odds[rows] = _fitted_odds(answered[some], x[some], None if group is None else group[some], x[rows], folds, seed)
        fold[rows] = k
    return odds, fold


def _thinned(rows: np.ndarray, answered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most 20,000 rows of either kind, drawn at random."""
    kinds = (rows[answered[rows]], rows[~answered[rows]])
    return np.sort(np.concatenate([part if len(part) <= MOST_FITTED else rng.choice(part, MOST_FITTED, replace=False) for part in kinds]))


def _fitted_odds(answered: np.ndarray, x: np.ndarray, group: np.ndarray | None, new: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Log-odds of being a target pair, with as many of either kind, at the L2 strength whose cross-validated log loss is least."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    spread = x.std(axis=0)
    kept = spread > 0
    mean, unit = x[:, kept].mean(axis=0), spread[kept]
    scaled, target = (x[:, kept] - mean) / unit, ~answered
    losses = np.zeros(len(STRENGTHS))
    for seen, rows in _splits(answered, group, folds, seed + 1):
        model = LogisticRegression(solver="newton-cholesky", warm_start=True)
        for place, strength in enumerate(STRENGTHS):
            model.C = strength
            with config_context(assume_finite=True, skip_parameter_validation=True):  # many small fits
                odds = model.fit(scaled[seen], target[seen]).decision_function(scaled[rows])
            losses[place] += float(np.sum(np.logaddexp(0, np.where(target[rows], -odds, odds))))
    model = LogisticRegression(solver="newton-cholesky", C=STRENGTHS[int(np.argmin(losses))]).fit(scaled, target)
    return model.decision_function((new[:, kept] - mean) / unit) - math.log(target.sum() / answered.sum())


def _area(odds: np.ndarray, answered: np.ndarray, fold: np.ndarray) -> dict[str, Any]:
    """How well the populations are told apart: mean of the folds' areas under the curve."""
    return mean_area([area_under_curve(odds[~answered & (fold == k)], odds[answered & (fold == k)]) for k in np.unique(fold)])


def _imbalance(x: np.ndarray, answered: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(P,) how far the weighted means of the labelled pairs are from the target's, in standard deviations of the target."""
    target = x[~answered]
    spread = target.std(axis=0)
    gap = np.abs(w @ x[answered] / w.sum() - target.mean(axis=0))
    return np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)


def shifted_mean(judged: np.ndarray, difference: np.ndarray, ratio: np.ndarray) -> dict[str, Any]:
    """DDPO's estimate of a mean over the target population, {value, se, ci}: the judge's, and the weighted difference of people and judge.

    Args:
        judged: (N,) what the judge makes of the target pairs.
        difference: (n,) what people make of the labelled pairs less what the judge does.
        ratio: (n,) density ratios, up to a factor. The interval takes them as given.
    """
    share = ratio / ratio.sum()
    off = float(share @ difference)
    value, n = float(np.mean(judged)) + off, len(difference)
    left = share * (difference - off)
    se = math.sqrt(float(np.var(judged, ddof=1)) / len(judged) + float(left @ left) * n / (n - 1))
    return {"value": value, "se": se, "ci": [value - NORMAL_975 * se, value + NORMAL_975 * se]}


def carry_over(pull: np.ndarray, directions: np.ndarray, target_directions: np.ndarray) -> np.ndarray:
    """(N,) shifts s of the targets of N target pairs with sum s phi over these equal to sum pull phi over the labelled ones.

    Of all such shifts it is the smallest, a linear function of the directions. Training on the target pairs alone then has, along these
    directions and at margin 0, the gradient that the labelled pairs would add.

    Args:
        pull: (n,) what each labelled pair adds to its own target, times the number of target pairs that it stands for.
        directions, target_directions: (n, K) and (N, K) values phi of the same directions; each changes its sign when images are swapped.
    """
    square = target_directions.T @ target_directions
    return target_directions @ np.linalg.lstsq(square, directions.T @ pull, rcond=1e-10)[0]
