"""Clustered bootstrap intervals: what they promise, and known values."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.evaluation.intervals import mean_interval, paired_difference, seed_interval, win_rate

FEW = {"resamples": 400, "seed": 0}


def scores(seed: int, prompts: int = 30, each: int = 3, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose prompts differ, and the prompt of each row."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(prompts), each)
    return rng.normal(0, 1, prompts)[clusters] + 0.3 * rng.normal(0, 1, prompts * each) + shift, clusters


def test_identical_models_are_exactly_equal():
    a, clusters = scores(0)
    a = a * np.pi  # values without a short binary form
    for interval, value in ((paired_difference(a, a.copy(), clusters, **FEW), 0.0), (win_rate(a, a.copy(), clusters, **FEW), 0.5)):
        assert (interval.mean, interval.low, interval.high) == (value, value, value)


def test_swapping_the_models_mirrors_every_number():
    """The resamples are the same, so the ends mirror; 1e-12 allows for another order of rounding."""
    (a, clusters), (b, _) = scores(1, shift=0.2), scores(2)
    there, back = paired_difference(a, b, clusters, **FEW), paired_difference(b, a, clusters, **FEW)
    np.testing.assert_allclose([there.mean, there.low, there.high], [-back.mean, -back.high, -back.low], atol=1e-12)
    there, back = win_rate(a, b, clusters, **FEW), win_rate(b, a, clusters, **FEW)
    np.testing.assert_allclose([there.mean, there.low, there.high], [1 - back.mean, 1 - back.high, 1 - back.low], atol=1e-12)
    assert there.mean != 0.5


def test_the_order_of_the_rows_changes_no_bit():
    (a, clusters), (b, _) = scores(3), scores(4)
    order = np.random.default_rng(0).permutation(len(a))
    assert paired_difference(a, b, clusters, **FEW) == paired_difference(a[order], b[order], clusters[order], **FEW)
    assert win_rate(a, b, clusters, **FEW) == win_rate(a[order], b[order], clusters[order], **FEW)


def test_clusters_may_be_texts_and_of_unequal_size_and_the_mean_is_over_rows():
    """(1 + 2 + 3 + 10) / 4 = 4; the mean of the cluster means would be (2 + 10) / 2 = 6. Resamples: 2, 4 or 10."""
    found = mean_interval(np.array([1.0, 2.0, 3.0, 10.0]), np.array(["a", "a", "a", "b"]), **FEW)
    assert (found.mean, found.low, found.high) == (4.0, 2.0, 10.0)


def test_win_rate_counts_ties_as_half():
    """Wins: 1, 0.5, 0, 1, of 4: 2.5 / 4."""
    found = win_rate(np.array([2.0, 1.0, 0.0, 5.0]), np.array([1.0, 1.0, 1.0, 1.0]), np.arange(4), **FEW)
    assert found.mean == 0.625


def test_chunked_resampling_equals_drawing_all_at_once(monkeypatch):
    a, clusters = scores(5)
    whole = mean_interval(a, clusters, **FEW)
    monkeypatch.setattr("dedpo_diffusion.evaluation.intervals.CHUNK", 7 * 30)
    part = mean_interval(a, clusters, **FEW)
    np.testing.assert_allclose([part.low, part.high], [whole.low, whole.high], rtol=1e-12)  # sums in another order


def test_the_interval_is_that_of_a_bootstrap_over_clusters_written_as_a_loop():
    """Against drawing whole clusters by index, other random numbers: the ends agree to Monte Carlo error.

    The standard deviation of a mean here is about 0.18; a 2.5 % quantile of 4,000 resamples has a standard error of
    sqrt(0.025 * 0.975 / 4000) / density = 0.0025 / (0.058 / 0.18) = 0.008. Two ends, both estimated: 4 sqrt(2) 0.008 = 0.045.
    """
    a, clusters = scores(6)
    rng, rows = np.random.default_rng(1), a.reshape(30, 3)
    means = [rows[rng.integers(30, size=30)].mean() for _ in range(4000)]
    found = mean_interval(a, clusters, resamples=4000, seed=0)
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.045)


def coverage(cluster_rows: bool, replications: int = 300) -> float:
    """How often the interval holds the true mean 0; with `cluster_rows` False each row counts as a prompt of its own."""
    hits = 0
    for seed in range(replications):
        a, clusters = scores(1000 + seed, prompts=60)
        found = mean_interval(a, clusters if cluster_rows else np.arange(len(a)), resamples=300, seed=seed)
        hits += not found.excludes(0.0)
    return hits / replications


def test_coverage_is_nominal():
    """Nominal 95 %. The percentile bootstrap of 60 clusters covers about 94 %; 300 replications have a standard error of
    1.4 points, and three of them are allowed."""
    assert 0.94 - 3 * 0.014 <= coverage(True) <= 0.94 + 3 * 0.014


def test_ignoring_the_clusters_covers_far_too_little():
    """Rows of one prompt share most of their variance: the naive interval is too narrow by sqrt(3), 75 % coverage."""
    assert coverage(False) < 0.85


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], [0, 0], "two clusters"),
        ([1.0, np.nan], [1.0, 2.0], [0, 1], "not finite"),
        ([1.0, 2.0], [1.0], [0, 1], "not paired"),
        ([1.0, 2.0], [1.0, 2.0], [0, 1, 2], "must be"),
    ],
)
def test_refusals(a, b, clusters, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(np.array(a), np.array(b), np.array(clusters))


def test_the_interval_over_seeds_is_students():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.30265."""
    found = seed_interval([3.0, 1.0, 2.0])
    assert found.mean == pytest.approx(2.0)
    np.testing.assert_allclose([2 - found.low, found.high - 2], 4.302652729911 / np.sqrt(3), rtol=1e-10)
    with pytest.raises(ValueError, match="at least two values, and there are 1"):
        seed_interval([1.0])
