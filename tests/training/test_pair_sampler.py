"""Which pair is visited when: once an epoch, in proportion, or in fixed shares; always estimating the same loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dedpo_diffusion import merge_labels
from dedpo_diffusion.training.pair_sampler import PairSampler, StratifiedPairSampler, labelled_share, visit_probability


def test_every_pair_is_visited_once_an_epoch():
    visits = PairSampler(3, np.full(10, 0.1))
    assert sorted(visits.rows(0, 10)) == list(range(10))
    assert visits.rows(0, 10) != visits.rows(10, 20)
    assert visits.rows(4, 17) == [*visits.rows(4, 12), *visits.rows(12, 17)]


def test_importance_sampling_visits_in_proportion_and_estimates_the_same_loss():
    """Labelled pairs of weight 2 and targets stretched to -0.5 or 1.5 are visited six times as often as plain ones."""
    target = np.array([1.5, -0.5, 0.2, 0.9, 0.5, 0.0])
    weight = np.array([2.0, 2.0, 0.67, 0.67, 0.67, 0.67])
    p = visit_probability(target, weight, "importance")
    assert p[0] / p[2] == pytest.approx(2 * 1 / (0.67 * 0.5))
    visits = PairSampler(0, p)
    counts = np.bincount(visits.rows(0, 6 * 4000), minlength=6)
    for epoch in range(50):
        seen = np.bincount(visits.rows(6 * epoch, 6 * epoch + 6), minlength=6)
        assert (np.abs(seen - 6 * p) < 1).all()
    assert np.abs(counts / (6 * 4000) - p).max() < 4 * np.sqrt(0.25 / 4000) / 6
    value = np.array([0.3, -1.0, 2.0, 0.1, 0.7, -0.2])  # any loss of each pair
    estimate = (counts * weight / (6 * p) * value).sum() / counts.sum()
    assert estimate == pytest.approx((weight * value).mean(), abs=0.02)


def test_plain_labels_are_visited_uniformly_either_way():
    plain = visit_probability(np.array([0.0, 1.0, 0.3, 0.5]), np.full(4, 0.8), "importance")
    np.testing.assert_allclose(plain, visit_probability(np.zeros(4), np.ones(4), "uniform"))


def labels(n: int, share: float, accuracy: float, seed: int = 0):
    """Human labels of the first pairs, and a judge that repeats exactly the share `accuracy` of them, and of the others."""
    rng = np.random.default_rng(seed)
    z, first = (rng.random(n) < 0.5).astype(float), round(share * n)
    wrong = np.zeros(n, dtype=bool)
    wrong[: round((1 - accuracy) * first)] = True
    wrong[first : first + round((1 - accuracy) * (n - first))] = True
    return np.where(np.arange(n) < first, z, np.nan), np.where(wrong, 1 - z, z)


@pytest.mark.parametrize(("power", "accuracy", "share"), [(0.6, 0.8, 0.25), (0.3, 0.9, 0.1), (1.0, 0.7, 0.5)])
def test_the_labelled_share_is_neymans_for_hard_labels(power, accuracy, share):
    """phi = A' / (A' + lam (1 - f)), A'^2 = 1 - 2 lam (1 - f)(2 a - 1) + lam^2 (1 - f)^2; 0.64 at lam 0.6, a 0.8, f 0.25."""
    z, g = labels(2000, share, accuracy)
    merged = merge_labels(z, g, method="dedpo", power=power)
    rest = power * (1 - share)
    size = math.sqrt(1 - 2 * rest * (2 * accuracy - 1) + rest**2)
    expected = size / (size + rest)
    assert labelled_share(merged.target, merged.weight, ~np.isnan(z)) == pytest.approx(expected, abs=1e-9)
    if power == 0.6:
        assert expected == pytest.approx(0.64, abs=0.005)


def test_stratified_visits_keep_their_share_in_every_stretch_and_visit_all_alike_within_a_kind():
    z, g = labels(40, 0.25, 0.8)
    merged = merge_labels(z, g, method="dedpo", power=0.6)
    labelled = ~np.isnan(z)
    visits = StratifiedPairSampler(5, merged.target, merged.weight, labelled)
    drawn = np.array(visits.rows(0, 4000))
    for start in range(0, 400, 7):
        part = labelled[drawn[start : start + 16]]
        assert abs(part.sum() - 16 * visits.share) <= 1
    counts = np.bincount(drawn, minlength=40)
    assert np.ptp(counts[labelled]) <= 1 and np.ptp(counts[~labelled]) <= 1
    assert visits.probability.sum() == pytest.approx(1)
    np.testing.assert_allclose(counts / 4000, visits.probability, atol=1 / 2000)


def test_stratified_visits_estimate_the_same_loss():
    z, g = labels(60, 0.3, 0.75)
    merged = merge_labels(z, g, method="tuned")
    visits = StratifiedPairSampler(1, merged.target, merged.weight, ~np.isnan(z))
    value = np.random.default_rng(0).normal(size=60)
    drawn = np.array(visits.rows(0, 60000))
    estimate = (merged.weight * value / (60 * visits.probability))[drawn].mean()
    assert estimate == pytest.approx((merged.weight * value).mean(), abs=1e-3)


def test_stratified_visits_are_a_function_of_seed_and_number():
    z, g = labels(30, 0.4, 0.8)
    merged = merge_labels(z, g, method="tuned")
    one, other = (StratifiedPairSampler(seed, merged.target, merged.weight, ~np.isnan(z)) for seed in (2, 3))
    assert one.rows(7, 19) == one.rows(0, 30)[7:19]
    assert one.rows(0, 30) != other.rows(0, 30)


def test_one_kind_alone_gets_every_visit():
    target, weight = np.array([1.0, 0.0, 1.0]), np.ones(3)
    for kind in (True, False):
        visits = StratifiedPairSampler(0, target, weight, np.full(3, kind))
        assert sorted(visits.rows(0, 3)) == [0, 1, 2]
        np.testing.assert_allclose(visits.probability, 1 / 3)
