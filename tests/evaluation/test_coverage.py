"""Do intervals hold the truth as often as they say, and false alarms come as seldom? Seeded simulation, 1,000 replications a case.

The columns of one call are the replications: the statistics are those of `dedpo compare`, resamples shared as there.
"""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.evaluation.benchmarks.interval_coverage import REPLICATIONS, coverage, draw, percentile_coverage, rows_of
from dedpo_diffusion.evaluation.comparison.intervals import estimates
from dedpo_diffusion.labels.warnings import holm

SLACK = 3 * np.sqrt(0.05 * 0.95 / REPLICATIONS)  # three Monte Carlo errors of a coverage of 95 %: 2.1 points


@pytest.mark.parametrize(
    ("kind", "prompts", "equal"),
    [("normal", 25, False), ("heavy tails", 25, True), ("normal", 144, True), ("wins 0.75", 50, False), ("wins 0.95", 144, True)],
)
def test_coverage_is_nominal(kind, prompts, equal):
    assert abs(coverage(kind, prompts, equal) - 0.95) <= SLACK


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("prompts", [25, 50, 144, 500])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "wins 0.5", "wins 0.75", "wins 0.95", "ties"])
def test_coverage_is_nominal_everywhere(kind, prompts, equal):
    """Never too little. Few answers nearly all alike, or tied, have no interval of exactly 95 %: there it may be more."""
    found = coverage(kind, prompts, equal)
    assert found >= 0.95 - SLACK and (found <= 0.95 + SLACK or (prompts == 25 and kind in ("wins 0.95", "ties")))


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "least"), [(25, 0.87), (50, 0.89), (144, 0.92), (500, 0.93)])
def test_very_skewed_gains_are_covered_less(prompts, least):
    """A limit to know: log-normal prompts have a skewness of 6, and half of the gain comes from few of them."""
    assert least <= coverage("skewed", prompts, True) < 0.96


def test_three_prompts_have_an_honest_interval():
    """Percentiles of the bootstrap cover 76 % here: no resample lies beyond the three prompts."""
    assert abs(coverage("normal", 3, True) - 0.95) <= SLACK and percentile_coverage("normal", 3, True) < 0.8


def test_ignoring_the_clusters_covers_far_too_little():
    """Rows of one prompt share half of their variance: the naive interval is too narrow by sqrt(2), 83 % coverage."""
    rng = np.random.default_rng(1)
    clusters = rows_of(rng, 60, True)
    values, truth = draw(rng, "normal", clusters)
    found = estimates(values[:, :300], np.arange(len(clusters)), resamples=300)
    assert np.mean([not found.interval(k).excludes(truth) for k in range(300)]) < 0.89


@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_holm_keeps_false_alarms_among_all_scorers_at_five_percent(alike):
    """Four scorers and no effect: some p below 0.05 in 19 % of replications (independent scorers), after correction in 5 %."""
    rng, scorers, prompts = np.random.default_rng(2), 4, 50
    clusters = rows_of(rng, prompts, True)
    shared, *own = (draw(rng, "normal", clusters)[0] for _ in range(1 + scorers))
    parts = [np.sqrt(alike) * shared + np.sqrt(1 - alike) * mine for mine in own]
    found = estimates(np.concatenate(parts, axis=1), clusters, resamples=2000)
    p = np.array([found.interval(k).p for k in range(scorers * REPLICATIONS)]).reshape(scorers, REPLICATIONS)
    wrong = np.mean([(holm(column) < 0.05).any() for column in p.T])
    assert wrong <= 0.05 + SLACK and (p < 0.05).any(axis=0).mean() > 0.09
    assert abs((p < 0.05).mean() - 0.05) <= SLACK
