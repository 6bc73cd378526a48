"""Clustered bootstrap intervals: what they promise, and known values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dedpo_diffusion.evaluation.comparison.intervals import (
    estimates,
    mean_interval,
    paired_difference,
    rate_interval,
    seed_interval,
    win_rate,
)

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
    assert paired_difference(a, a.copy(), clusters, **FEW).p == 1.0


def test_differences_that_cancel_in_every_cluster_are_no_difference():
    """0.1 forth and back: what is left of the sums is rounding, and no evidence; nor is it certain that there is no difference."""
    a, clusters = scores(0, each=2)
    found = paired_difference(a + 0.1 * np.tile([1, -1], 30), a, clusters, **FEW)
    assert (found.mean, found.p) == (0.0, 1.0) and found.high == -found.low == pytest.approx(0.1 * 2.04523 / np.sqrt(30), rel=1e-4)


@pytest.mark.parametrize("prompts", [2, 3, 50])
def test_a_draw_in_every_prompt_is_no_certainty(prompts):
    """One win and one loss of two images: as prompts answers, half of them each; certain are ties alone."""
    clusters = np.repeat(np.arange(prompts), 2)
    found = rate_interval(np.tile([1.0, 0.0], prompts), clusters, **FEW)
    assert (found.mean, found.p) == (0.5, 1.0) and found.low < 0.5 < found.high and found.low == pytest.approx(1 - found.high)
    tied = rate_interval(np.full(2 * prompts, 0.5), clusters, **FEW)
    assert (tied.mean, tied.low, tied.high, tied.p) == (0.5, 0.5, 0.5, 1.0)


@pytest.mark.parametrize("prompts", [2, 5, 6, 7, 49])
@pytest.mark.parametrize("gain", [1.0, -0.1])
def test_the_same_gain_everywhere_is_as_sure_as_its_win_rate(prompts, gain):
    """Also where the differences are equal but for rounding: (a + 0.1) - a."""
    a, clusters = scores(0, prompts, 2)
    sure, wins = paired_difference(a + gain, a, clusters, **FEW), win_rate(a + gain, a, clusters, **FEW)
    assert sure.p == pytest.approx(wins.p) and sure.p > 0 and (sure.p < 0.05) == sure.excludes(0.0) == wins.excludes(0.5)
    assert (sure.low + sure.high) / 2 == pytest.approx(gain)


@pytest.mark.parametrize("share", [1 / 3, 2 / 3, 0.1])
def test_a_rate_that_is_the_same_everywhere_is_no_certainty_for_all_its_rounding(share):
    for prompts in (3, 7, 10, 49):
        found = rate_interval(np.full(prompts, share), np.arange(prompts), **FEW)
        assert found.high - found.low > 0.1


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
    """(1 + 2 + 3 + 10) / 4 = 4; the mean of the cluster means would be (2 + 10) / 2 = 6. Resamples: 2, 4 or 10, so the
    squared error is (4 / 4 + 36 / 4 - (-2 / 4 + 6 / 4)^2) * 2 = 18, and t (0.975; 1) = 12.706."""
    found = mean_interval(np.array([1.0, 2.0, 3.0, 10.0]), np.array(["a", "a", "a", "b"]), resamples=20000)
    assert found.mean == 4.0
    np.testing.assert_allclose([found.mean - found.low, found.high - found.mean], 12.706 * np.sqrt(18), rtol=0.02)


def test_with_one_row_a_cluster_interval_and_p_are_students():
    """The bootstrap's variance of a mean is that of the sample with divisor n; the factor n / (n - 1) makes it Student's."""
    x = np.random.default_rng(8).normal(0.4, 1, 12)
    found, student = mean_interval(x, np.arange(12), resamples=40000), ttest_1samp(x, 0)
    ends = student.confidence_interval(0.95)
    np.testing.assert_allclose([found.low - found.mean, found.high - found.mean], np.array(ends) - x.mean(), rtol=0.02)
    assert found.p == pytest.approx(student.pvalue, rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.35, 0.39, 0.42, 0.6, -0.4])
def test_p_is_below_the_level_where_the_interval_excludes_0_and_nowhere_else(shift):
    a, clusters = scores(7, prompts=15)
    for level in (0.9, 0.95, 0.99):
        found = mean_interval(a - a.mean() + shift, clusters, level=level, **FEW)
        assert (found.p < 1 - level) == found.excludes(0.0)
        rate = rate_interval((a > np.quantile(a, 0.5 - shift / 2)).astype(float), clusters, level=level, **FEW)
        assert (rate.p < 1 - level) == rate.excludes(0.5)


def test_all_columns_share_the_resamples():
    (a, clusters), (b, _) = scores(9), scores(10)
    both = estimates(np.stack([a, b, a - b], axis=1), clusters, **FEW)
    for column, values in enumerate((a, b, a - b)):
        alone = mean_interval(values, clusters, **FEW)
        np.testing.assert_allclose([both.interval(column).low, both.interval(column).high], [alone.low, alone.high], rtol=1e-9)


def test_a_rates_interval_is_wilsons_where_rows_are_independent():
    """30 of 40, z = t (0.975; 39): (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with n = 39: the error is
    the sample's, of divisor n - 1."""
    found, z, p, n = rate_interval(np.repeat([1.0, 0.0], [30, 10]), np.arange(40), resamples=40000), 2.022691, 0.75, 39
    half = z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    expected = (np.array([p + z * z / 2 / n - half, p + z * z / 2 / n + half])) / (1 + z * z / n)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.004)


def test_winning_always_is_no_certainty_and_prompts_count():
    """40 images of 10 prompts, all won: as 10 answers of 10. Lower end 10 / (10 + t^2), t = 2.2622; higher with more prompts."""
    few, more = (rate_interval(np.ones(4 * prompts), np.repeat(np.arange(prompts), 4), **FEW) for prompts in (10, 40))
    assert (few.mean, few.high) == (1.0, pytest.approx(1.0, abs=1e-15)) and few.low == pytest.approx(10 / (10 + 2.2622**2), abs=1e-4)
    assert few.low < more.low < 1.0


def test_win_rate_counts_ties_as_half():
    """Wins: 1, 0.5, 0, 1, of 4: 2.5 / 4."""
    found = win_rate(np.array([2.0, 1.0, 0.0, 5.0]), np.array([1.0, 1.0, 1.0, 1.0]), np.arange(4), **FEW)
    assert found.mean == 0.625


def test_chunked_resampling_equals_drawing_all_at_once(monkeypatch):
    a, clusters = scores(5)
    whole = mean_interval(a, clusters, **FEW)
    monkeypatch.setattr("dedpo_diffusion.evaluation.comparison.intervals.CHUNK", 7 * 30)
    part = mean_interval(a, clusters, **FEW)
    np.testing.assert_allclose([part.low, part.high], [whole.low, whole.high], rtol=1e-12)  # sums in another order


def test_the_error_is_that_of_a_bootstrap_over_clusters_written_as_a_loop():
    """Against drawing whole clusters by index, other random numbers; two standard deviations of 4,000 draws: 3 * sqrt(2) / sqrt(8000)."""
    a, clusters = scores(6)
    rng, rows = np.random.default_rng(1), a.reshape(30, 3)
    means = [rows[rng.integers(30, size=30)].mean() for _ in range(4000)]
    found = estimates(a[:, None], clusters, resamples=4000, seed=0)
    np.testing.assert_allclose(found.error[0], np.std(means) * np.sqrt(30 / 29), rtol=3 * np.sqrt(2) / np.sqrt(8000))


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], [0, 0], "two clusters"),
        ([1.0, np.nan], [1.0, 2.0], [0, 1], "not finite"),
        ([1.0, 2.0], [1.0], [0, 1], "not paired"),
        ([1.0, 2.0], [1.0, 2.0], [0, 1, 2], "N rows both"),
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
