"""Which pair is visited when: once an epoch, or in proportion; always estimating the same loss."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.training.pair_sampler import PairSampler, visit_probability


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
