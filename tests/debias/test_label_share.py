"""The labelled pairs' share of a run: the largest of its formula, its limits, worked numbers, and what stays of the targets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.debias import best_share, judge_worth, merge_labels, share_labels
from dedpo_diffusion.debias.label_share import NOISE, PEOPLE, TRUST

pairs, worths, lengths = st.floats(1, 1e5), st.floats(0, 1), st.floats(1, 1e7)


def signal(share, labelled, judged, worth, visits):
    """J as the module states it."""
    others = 1 - share
    return (share + others * worth) ** 2 / (1 + visits / NOISE * (share**2 / labelled + others**2 / judged))


@given(pairs, pairs, worths, lengths)
def test_no_other_share_has_a_larger_j(labelled, judged, worth, visits):
    best = best_share(labelled, judged, worth, visits)
    assert 0 <= best <= 1
    every = signal(np.linspace(0, 1, 1001), labelled, judged, worth, visits)
    assert every.max() <= signal(best, labelled, judged, worth, visits) * (1 + 1e-9)


@given(pairs, pairs, st.floats(0, 0.999), lengths, lengths)
def test_a_longer_run_gives_people_no_more(labelled, judged, worth, one, other):
    short, long = sorted((one, other))
    assert best_share(labelled, judged, worth, long) <= best_share(labelled, judged, worth, short) + 1e-9


@given(pairs, pairs, st.floats(0.01, 1))
def test_the_shortest_run_takes_people_alone_and_an_endless_one_all_by_their_worth(labelled, judged, worth):
    if worth < 0.99:
        assert best_share(labelled, judged, worth, 1e-9) == 1
    assert best_share(labelled, judged, worth, 1e13) == pytest.approx(labelled / (labelled + judged * worth), rel=1e-4)
    assert best_share(labelled, judged, 1.0, 100.0) == pytest.approx(labelled / (labelled + judged), rel=1e-6)


def test_a_share_by_hand():
    """10 labelled pairs, 90 others worth 0.8, rho = 20: tau = (10 + 72) / 120 = 0.68333; 10 x 0.31667 against 90 x 0.11667."""
    assert best_share(10, 90, 0.8, 20 * NOISE) == pytest.approx(3.16667 / (3.16667 + 10.5), rel=1e-5)


def test_what_a_label_is_worth():
    assert judge_worth(0.0) == 0 and judge_worth(1.0) == 1
    assert judge_worth(0.3) == pytest.approx(0.3 / PEOPLE)
    assert judge_worth(PEOPLE) == TRUST  # no more, since it may err at random
    assert judge_worth(0.95) == 0.95  # but so sure it may be believed


def merged(seed=0, n=200, labelled=20, sure=2.0):
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-sure * rng.normal(size=n)))
    human = np.where(np.arange(n) < labelled, (rng.random(n) < p).astype(float), np.nan)
    return merge_labels(human, p, method="adapted", correction=0.0)


def columns(found):
    return found.weight, found.human, found.judge


@given(st.integers(0, 999), st.floats(0.01, 1), st.floats(0.5, 4))
def test_the_share_is_as_asked_and_all_else_of_the_weights_stays(seed, share, sure):
    found = merged(seed, sure=sure)
    weight, shares = share_labels(*columns(found), visits=100, share=share)
    people = ~np.isnan(found.human)
    assert weight[people].sum() / weight.sum() == pytest.approx(share) and shares.share == share
    assert weight.sum() == pytest.approx(found.weight.sum())
    for group in (people, ~people):  # pairs of a group keep their ratios
        np.testing.assert_allclose(weight[group] * found.weight[group].sum(), found.weight[group] * weight[group].sum(), atol=1e-9)


@given(st.integers(0, 999))
def test_the_share_of_the_merge_gives_the_weights_of_the_merge(seed):
    found = merged(seed)
    people = ~np.isnan(found.human)
    asked = float(found.weight[people].sum() / found.weight.sum())
    weight, shares = share_labels(*columns(found), visits=100, share=asked)
    np.testing.assert_allclose(weight, found.weight, atol=1e-12)
    assert shares.merged == pytest.approx(asked)


def test_a_short_run_has_people_alone_and_a_long_one_the_merge():
    found = merged(sure=1.0)
    short, long = (share_labels(*columns(found), visits=visits) for visits in (10, 1e12))
    assert short[1].share == 1 and not short[0][np.isnan(found.human)].any()
    assert long[1].share == long[1].merged
    np.testing.assert_allclose(long[0], found.weight)


def test_a_useless_judge_gets_no_visits_where_a_taught_one_does():
    rng = np.random.default_rng(0)
    human = np.where(np.arange(800) < 40, rng.integers(0, 2, 800).astype(float), np.nan)
    shares = {}
    for name, spread in (("useless", 0.1), ("taught", 1.5)):
        found = merge_labels(human, 1 / (1 + np.exp(-spread * rng.normal(size=800))), method="adapted", correction=0.0)
        shares[name] = share_labels(*columns(found), visits=4800)[1].share
    assert shares["useless"] == 1 and shares["taught"] < 0.7


def test_without_labels_or_without_others_there_is_nothing_to_share():
    found = merged()
    weight, human, judge = columns(found)
    assert share_labels(weight, np.full(200, np.nan), judge, visits=100) is None
    assert share_labels(weight, np.ones(200), judge, visits=100) is None


def test_pairs_that_a_merge_left_out_stay_out():
    found = merged()
    weight = found.weight.copy()
    weight[::3] = 0
    made, _ = share_labels(weight, found.human, found.judge, visits=3000)
    assert not made[::3].any() and made[1] > 0
