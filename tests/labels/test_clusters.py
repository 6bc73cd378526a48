"""Labels that depend on each other: clusters, effective numbers, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.debias import agreement
from dedpo_diffusion.labels.agreement import share, vote_summary
from dedpo_diffusion.labels.clusters import clustered_agreement, components, dependent_warnings, effective_number


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
    assert clustered_agreement(human, judge, None) == clustered_agreement(human, judge, np.arange(50)) == agreement(human, judge)


@pytest.mark.parametrize("same", [0.0, 0.5, 1.0])
def test_intervals_of_agreement_cover_whatever_the_dependence(same):
    """40 clusters of 6; with probability `same` a cluster's cases are all alike. Wilson's plain interval covers 60 % at same = 1."""
    rng, covered, plain = np.random.default_rng(1), 0, 0
    clusters = np.repeat(np.arange(40), 6)
    for _ in range(400):
        alike = np.repeat(rng.random(40) < same, 6)
        hits = np.where(alike, np.repeat(rng.random(40) < 0.7, 6), rng.random(240) < 0.7)
        human = np.ones(240)
        low, high = clustered_agreement(human, np.where(hits, 0.9, 0.1), clusters)["ci"]
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


@given(st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_a_warning_only_where_labels_depend(count):
    human, judge = np.tile([1.0, 0.0, 1.0], count), np.tile([0.9, 0.2, 0.1], count)
    assert dependent_warnings(human, judge, None) == dependent_warnings(human, judge, np.arange(3 * count)) == []
    [found] = dependent_warnings(human, None, np.repeat(np.arange(count), 3))
    assert found["clusters"] == count and "too narrow" in found["text"]
