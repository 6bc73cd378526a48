"""Labels that depend on each other: clusters, effective numbers, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.debias import agreement, effective_number, judge_bias, merge_labels
from dedpo_diffusion.debias.tuning import assign_folds
from dedpo_diffusion.labels.agreement import share, vote_summary
from dedpo_diffusion.labels.clusters import components


def test_what_hangs_together_through_pairs_and_rankings_is_one_cluster():
    pairs, rankings = ["a", "b", "b", "c", "d", "d"], ["1", "1", "2", "2", None, None]
    assert components(pairs, rankings).tolist() == [0, 0, 0, 0, 1, 1]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_cases_that_are_clusters_of_their_own_count_fully_in_any_order(hits, random):
    hits, clusters = np.array(hits), np.arange(len(hits))
    assert effective_number(hits, clusters) == len(hits)
    again = [*range(len(hits))]
    random.shuffle(again)
    halves = np.arange(len(hits)) // 2
    assert effective_number(hits[again], halves[again]) == pytest.approx(effective_number(hits, halves))


def test_copies_add_nothing():
    """Each case six times over is no more than the cases, but for C / (C - 1)."""
    hits = np.arange(20) < 13
    assert effective_number(np.repeat(hits, 6), np.repeat(np.arange(20), 6)) == pytest.approx(19)
    assert effective_number(np.repeat(np.ones(20, bool), 6), np.repeat(np.arange(20), 6)) == 20
    assert share(np.repeat(hits, 6), np.repeat(np.arange(20), 6))["ci"] == pytest.approx(share(hits)["ci"], abs=0.01)


def test_without_clusters_agreement_is_what_it_was():
    rng = np.random.default_rng(0)
    human, judge = rng.integers(0, 2, 50).astype(float), rng.random(50)
    assert agreement(human, judge, clusters=np.arange(50)) == agreement(human, judge)
    assert judge_bias(human, judge, clusters=np.arange(50)) == judge_bias(human, judge)


@pytest.mark.parametrize("same", [0.0, 0.5, 1.0])
def test_intervals_of_agreement_cover_whatever_the_dependence(same):
    """40 clusters of 6; with probability `same` a cluster's cases are all alike. Wilson's plain interval covers 60 % at same = 1."""
    rng, covered, plain = np.random.default_rng(1), 0, 0
    clusters = np.repeat(np.arange(40), 6)
    for _ in range(400):
        alike = np.repeat(rng.random(40) < same, 6)
        hits = np.where(alike, np.repeat(rng.random(40) < 0.7, 6), rng.random(240) < 0.7)
        human = np.ones(240)
        low, high = agreement(human, np.where(hits, 0.9, 0.1), clusters=clusters)["ci"]
        covered += low <= 0.7 <= high
        low, high = agreement(human, np.where(hits, 0.9, 0.1))["ci"]
        plain += low <= 0.7 <= high
    assert covered >= 0.92 * 400 and (same < 1 or plain < 0.75 * 400)


def ranked(rankings: int, noise: float, rng: np.random.Generator, raters=("ann", "bob")) -> Votes:
    """Rankings of three images by each rater; the truth of a prompt is turned around as a whole with probability `noise`."""
    rows = []
    for prompt in range(rankings):
        for rater in raters:
            turned = rng.random() < noise
            rows += [(f"{prompt}-{k}", float(turned), rater, f"{rater}{prompt}") for k in range(3)]
    ids, label, who, of = (list(column) for column in zip(*rows, strict=True))
    return Votes(ids, np.array(label), np.ones(len(ids), dtype=np.int64), who, {"ranking": of})


def without(votes: Votes) -> Votes:
    return Votes(votes.pair_id, votes.label_0, votes.votes, votes.rater, {})


def test_values_are_the_same_and_intervals_wider():
    votes = ranked(40, 0.2, np.random.default_rng(0))
    one, other = (vote_summary(each, resamples=400)["between"] for each in (votes, without(votes)))
    assert one["clusters"] == 40 and one["pairs"] == other["pairs"] == 120
    for name in ("raw", "alpha"):
        assert one[name]["value"] == pytest.approx(other[name]["value"])
        widths = [np.ptp(each[name]["ci"]) for each in (one, other)]
        assert 1.4 < widths[0] / widths[1] < 2.1  # sqrt(3)
    assert any("of 40 ranked prompts" in text for text in vote_summary(votes, resamples=50)["sentences"])


def test_agreement_between_raters_covers():
    """Two people turn each prompt around with probability 0.2, so they agree on 0.8^2 + 0.2^2 = 68 % of prompts."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        low, high = vote_summary(ranked(40, 0.2, rng), resamples=200)["between"]["raw"]["ci"]
        covered += low <= 0.68 <= high
    assert covered >= 0.89 * 150


def ranked_labels(prompts: int, rng: np.random.Generator, *, labelled: int = 20):
    """Human and judge labels of six comparisons a prompt, the human's of the first prompts alone; the judge errs on whole prompts."""
    truth = rng.integers(0, 2, 6 * prompts).astype(float)
    judge = np.where(np.repeat(rng.random(prompts) < 0.7, 6), truth, 1 - truth) * 0.8 + 0.1
    clusters = np.repeat(np.arange(prompts), 6)
    return np.where(clusters < labelled, truth, np.nan), judge, clusters


@pytest.mark.parametrize("rule", ["plug_in", "half"])
def test_a_merge_has_the_same_targets_and_wider_intervals(rule):
    human, judge, clusters = ranked_labels(60, np.random.default_rng(0))
    plain, counted = (merge_labels(human, judge, method="tuned", rule=rule, clusters=of) for of in (None, clusters))
    np.testing.assert_array_equal(plain.target, counted.target)
    np.testing.assert_array_equal(plain.weight, counted.weight)
    for told in (lambda report: report["agreement"]["ci"], lambda report: report["effective_human_labels"]["ci"]):
        assert 1.6 < np.ptp(told(counted.report)) / np.ptp(told(plain.report)) < 3  # sqrt(6) but for the judge's sides
    assert 1.6 < counted.report["power_se"] / plain.report["power_se"] < 3
    assert counted.report["clusters"] == 20 and plain.report["clusters"] is None
    assert any("the 120 come from 20 independent ones" in text for text in counted.report["sentences"])


def test_labels_of_their_own_are_merged_as_without_clusters():
    human, judge, _ = ranked_labels(30, np.random.default_rng(1))
    plain = merge_labels(human, judge, method="tuned").report
    for clusters in (np.arange(len(human)), np.full(len(human), -1)):
        assert merge_labels(human, judge, method="tuned", clusters=clusters).report == plain
    with pytest.raises(ValueError, match="one number for each pair"):
        merge_labels(human, judge, method="tuned", clusters=[1, 2])


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_cluster_is_in_one_fold(count, folds, seed):
    """And folds differ by at most one cluster."""
    clusters = np.repeat(np.arange(count), 3)
    fold = assign_folds(np.zeros(3 * count, dtype=bool), folds, np.random.default_rng(seed), clusters)
    assert all(len(set(fold[clusters == k])) == 1 for k in range(count))
    sizes = np.bincount(fold[::3], minlength=folds)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.slow
def test_the_interval_of_the_bias_covers():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(300):
        lean = np.repeat(rng.normal(0.05, 0.3, 40), 6)  # of each ranking, the same for its comparisons
        low, high = judge_bias(np.full(240, 0.5), 0.5 + lean, clusters=np.repeat(np.arange(40), 6))["ci"]
        covered += low <= 0.05 <= high
    assert covered >= 0.91 * 300
