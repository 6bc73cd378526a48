"""Estimated propensities: they recover the true ones, they debias, and what cannot be estimated is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dedpo_diffusion.debias import estimate, estimate_propensity
from dedpo_diffusion.debias.propensity import area_under_curve


def uneven(rng, n=600):
    """(features (N, 2), true propensity, labelled): pairs with a large first feature are labelled more often."""
    x = rng.normal(size=(n, 2)) * [3.0, 1.0] + [10.0, 0.0]
    p = 1 / (1 + np.exp(1 - 0.4 * (x[:, 0] - 10)))
    return x, p, rng.random(n) < p


def test_the_true_propensities_are_found():
    """4000 pairs: the standard error of a logistic coefficient is about 0.04 per standard deviation."""
    x, p, labelled = uneven(np.random.default_rng(0), 4000)
    found = estimate_propensity(labelled, x)
    assert np.abs(found.p - np.clip(p, 0.05, 1)).mean() < 0.02
    assert found.p.min() >= 0.05 and found.n_clipped == pytest.approx((p < 0.05).sum(), abs=40)
    assert found.auc["ci"][0] < roc_auc_score(labelled, p) < found.auc["ci"][1]
    assert estimate_propensity(labelled, x, clip=0.3).p.min() == 0.3


def test_a_pairs_own_answer_and_the_units_of_features_have_no_part_in_its_propensity():
    x, _, labelled = uneven(np.random.default_rng(1), 60)
    noise = np.random.default_rng(2).normal(size=(60, 40))  # enough features to remember every answer
    assert estimate_propensity(labelled, noise).auc["value"] < 0.75
    found = estimate_propensity(labelled, x, seed=3)
    np.testing.assert_allclose(found.p, estimate_propensity(labelled, x * [5, -2] + 7, seed=3).p, atol=1e-4)


def test_labels_at_random_are_seldom_called_anything_else():
    """The interval takes the fits as given, so that its lower end is above 0.5 in 6 % of cases, not 2.5: 60 samples allow 17 %."""
    rng, found = np.random.default_rng(4), []
    for _ in range(60):
        x = rng.normal(size=(200, 2))
        found.append(estimate_propensity(rng.random(200) < 0.3, x).auc)
    assert np.mean([one["ci"][0] > 0.5 for one in found]) <= 0.17
    values = [one["value"] for one in found]
    assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values) / math.sqrt(60))


def test_the_area_is_scikit_learns_and_its_variance_that_of_repeated_samples():
    rng, found = np.random.default_rng(5), []
    for _ in range(400):
        positive, negative = rng.normal(0.7, 1, 40).round(1), rng.normal(0, 1, 60).round(1)
        found.append(area_under_curve(positive, negative))
    truth = roc_auc_score(np.repeat([1, 0], [40, 60]), np.concatenate([positive, negative]))
    assert found[-1][0] == pytest.approx(truth, abs=1e-12)
    areas, variances = np.array(found).T
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.3)  # 7 % of noise on the variance, four times


def test_estimated_propensities_debias_labels_that_were_not_taken_at_random():
    """The mean loss over 50 labellings of 600 pairs: off by many standard errors without them, by few with them.

    Hajek's normalisation and the estimate leave a bias of order 1 / labels: 30 % of what is there without them is allowed.
    """
    rng = np.random.default_rng(6)
    x, p, _ = uneven(rng)
    z = (rng.random(600) < 1 / (1 + np.exp(-(x[:, 0] - 10) / 2))).astype(float)
    g, m = np.where(rng.random(600) < 0.75, z, 1 - z), 1.0 + (x[:, 0] - 10) / 2
    truth, plain, mended = np.mean(np.logaddexp(0, m) - z * m), [], []
    for _ in range(50):
        labelled = rng.random(600) < p
        human = np.where(labelled, z, np.nan)
        for losses, propensity in ((plain, None), (mended, estimate_propensity(labelled, x).p)):
            made = estimate(human, g, power=0.5, propensity=propensity)
            losses.append(np.mean(made.weight * (np.logaddexp(0, m) - made.target * m)))
    off = abs(np.mean(plain) - truth)
    assert off > 6 * np.std(plain) / math.sqrt(50)
    assert abs(np.mean(mended) - truth) < 4 * np.std(mended) / math.sqrt(50) + 0.3 * off


def test_weights_of_propensities_have_mean_one():
    human = np.array([1.0, 0.0, np.nan, 1.0, np.nan, np.nan] * 10)
    made = estimate(human, np.full(60, 0.5), power=0.5, propensity=np.where(np.arange(60) % 2 == 0, 0.25, 0.5))
    assert made.h.mean() == pytest.approx(1)
    assert made.h[0] == 2 * made.h[1]


def test_where_every_pair_is_labelled_there_is_nothing_to_estimate():
    found = estimate_propensity(np.ones(4, dtype=bool), np.arange(4.0)[:, None])
    assert found.p.tolist() == [1] * 4 and found.auc["value"] is None


@pytest.mark.parametrize(
    ("labelled", "features", "options", "words"),
    [
        ([True] * 10, np.zeros(10), {}, r"features \(10,\)"),
        ([True] * 10, np.zeros((9, 1)), {}, r"must be \(N,\) and \(N, P\)"),
        ([True, False] * 5, np.array([[1.0]] * 9 + [[math.nan]]), {}, r"features\[9, 0\] is nan"),
        ([True] + [False] * 9, np.zeros((10, 1)), {}, r"1 labelled pairs, too few for 5 folds"),
        ([False] * 10, np.zeros((10, 1)), {}, r"0 labelled pairs"),
        ([True] * 9 + [False], np.zeros((10, 1)), {}, r"1 unlabelled pairs"),
        ([True, False] * 5, np.zeros((10, 1)), {"clip": 0}, r"clip is 0"),
        ([True, False] * 5, np.zeros((10, 1)), {"folds": 1}, r"folds is 1"),
    ],
)
def test_errors_name_the_place_and_the_remedy(labelled, features, options, words):
    with pytest.raises(ValueError, match=words):
        estimate_propensity(labelled, features, **options)
