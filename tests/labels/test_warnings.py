"""Warnings about labels: how often they are raised without a reason, and whether they are where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.debias import inverse_propensity, merge_labels
from dedpo_diffusion.labels.warnings import (
    LEVEL,
    few_labels_warnings,
    holm,
    overshoot_warnings,
    seen_human_labels,
    unbalanced,
    unlike,
    unlike_warnings,
)


def allowed(level, runs):
    """Most false alarms of `runs` that a level allows, by 4 binomial errors."""
    return level * runs + 4 * np.sqrt(level * (1 - level) * runs)


# ---- enough labels?


@pytest.mark.parametrize("n", [1, 13, 19, 20, 99])
def test_few_labels_are_warned_of_with_the_width_of_their_interval(n):
    from scipy.stats import norm

    [warning] = few_labels_warnings(n, judged=True)
    points = 100 * norm.ppf(0.975) * np.sqrt(0.25 / n)  # of a share of one half, the widest
    assert f"can be off by {points:.0f} percentage points" in warning["text"]
    assert ("far too few" in warning["text"]) is (n < 20) and "power" in warning["text"]
    assert "power" not in few_labels_warnings(n, judged=False)[0]["text"]


def test_a_hundred_labels_are_not_warned_of():
    assert few_labels_warnings(100, judged=True) == []


# ---- labels taken at random?


def test_holm_by_hand():
    """Sorted .01 * 3, .03 * 2, .04 * 1 -> .03, .06, .06 (never below an earlier one)."""
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert holm([]).shape == (0,) and holm([0.9, 0.8]).max() == 1.0


def test_labels_at_random_are_seldom_doubted():
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, 3, 400)
        columns = {"a": rng.normal(size=400) + kind, "b": rng.integers(0, 3, 400) + 1.0 * kind, "c": np.array(list("xyz"))[kind]}
        alarms += bool(unlike_warnings(unlike(rng.random(400) < 0.3, columns), remedy="look"))
    assert alarms <= allowed(LEVEL, 300)


@pytest.mark.parametrize("column", ["numbers", "few numbers", "texts"])
def test_a_column_that_decides_who_is_asked_is_named(column):
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        columns = {"numbers": rng.normal(size=1000), "few numbers": rng.integers(0, 4, 1000).astype(float)}
        columns["texts"] = np.array(["red", "green", "blue"], dtype=object)[rng.integers(0, 3, 1000)]
        rank = columns[column] == "red" if column == "texts" else columns[column] > np.median(columns[column])
        doubts = unlike_warnings(unlike(rng.random(1000) < np.where(rank, 0.4, 0.2), columns), remedy="look")
        found += [doubt["column"] for doubt in doubts] == [column]
    assert found >= 18


def test_the_doubt_says_how_they_differ_and_what_to_do():
    rng = np.random.default_rng(0)
    colour = np.array(["blue", "red"], dtype=object)[rng.integers(0, 2, 1000)]
    labelled = rng.random(1000) < np.where(colour == "red", 0.5, 0.1)
    [doubt] = unlike_warnings(unlike(labelled, {"source_colour": colour}), remedy="try this")
    share, others = (np.mean(colour[rows] == doubt["value"]) for rows in (labelled, ~labelled))
    assert f"in source_colour ({doubt['value']!r} is {share:.1%} of them and {others:.1%} of the others; p < 0.0001)" in doubt["text"]
    assert doubt["text"].endswith("; try this.") and doubt["kind"] == "not_at_random"


def test_columns_that_tell_nothing_are_left_out():
    labelled = np.arange(200) % 2 == 0
    columns = {"one": np.ones(200), "names": np.array([f"n{k}" for k in range(200)], dtype=object), "none": np.full(200, np.nan)}
    assert unlike(labelled, columns) == []
    assert unlike(np.ones(200, dtype=bool), {"a": np.arange(200.0)}) == []


def test_unknown_numbers_do_not_stand_for_a_difference():
    rng = np.random.default_rng(0)
    numbers, labelled = rng.normal(size=2000), rng.random(2000) < 0.3
    numbers[labelled & (rng.random(2000) < 0.5)] = np.nan
    assert unlike(labelled, {"a": numbers})[0]["p"] > LEVEL


@pytest.mark.parametrize("right", [True, False])
def test_propensities_that_are_right_are_seldom_doubted_and_wrong_ones_are(right):
    """Labels by 0.1 or 0.5; the propensities know it, or take the labels as taken at random. 300 and 20 data sets."""
    alarms, seeds = 0, 300 if right else 20
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x, red = rng.normal(size=800), rng.random(800) < 0.5
        p = np.where(x > 0, 0.5, 0.1) * np.where(red, 1.0, 0.6)
        labelled = rng.random(800) < p
        h = inverse_propensity(np.where(labelled, 1.0, np.nan), p if right else None)
        columns = {"x": x, "few": np.round(x), "colour": np.where(red, "red", "blue").astype(object)}
        alarms += bool(unlike_warnings(unbalanced(labelled, h, columns), remedy="look"))
    assert alarms <= allowed(LEVEL, seeds) if right else alarms == seeds


def test_an_infinite_number_is_unknown():
    numbers = np.where(np.arange(400) % 3 == 0, np.inf, np.sin(np.arange(400)))
    for found in (
        unlike(np.arange(400) % 2 == 0, {"a": numbers}),
        unbalanced(np.arange(400) % 2 == 0, np.tile([2.0, 0.0], 200), {"a": numbers}),
    ):
        assert np.isfinite([found[0]["labelled"], found[0]["others"], found[0]["p"]]).all()


# ---- a judge that has seen the answers


def judged(seed, *, memory=0.0, temperature=1.0, n=1000, n_human=250):
    """People's labels, and a judge of calibrated confidence; `memory` is the share of human labels that it knows by heart."""
    rng = np.random.default_rng(seed)
    promise = 1 / (1 + np.exp(-rng.normal(0, 1.2, n)))
    truth = (rng.random(n) < promise).astype(float)
    logit = np.log(promise / (1 - promise)) / temperature
    human = np.full(n, np.nan)
    human[:n_human] = truth[:n_human]
    known = (np.arange(n) < n_human) & (rng.random(n) < memory)
    return human, np.where(known, 0.03 + 0.94 * truth, 1 / (1 + np.exp(-logit)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_judge_that_has_seen_nothing_is_seldom_accused(temperature):
    """Calibrated, too sure and too modest."""
    alarms = sum(seen_human_labels(*judged(seed, temperature=temperature)) is not None for seed in range(300))
    assert alarms <= allowed(LEVEL, 300)


def test_a_judge_that_knows_the_answers_by_heart_is_found():
    found = [seen_human_labels(*judged(seed, memory=0.5), name="clip") for seed in range(50)]
    assert all(doubt is not None and doubt["judge"] == "clip" and "clip agrees with people" in doubt["text"] for doubt in found)
    assert sum(seen_human_labels(*judged(seed, memory=0.25)) is not None for seed in range(50)) >= 25


def test_a_judge_without_shades_or_pairs_to_compare_is_not_judged():
    human, judge = judged(0, memory=1.0)
    assert seen_human_labels(human, (judge > 0.5).astype(float)) is None
    assert seen_human_labels(human[:250], judge[:250]) is None
    assert seen_human_labels(np.full(1000, np.nan), judge) is None


# ---- targets


def test_targets_that_are_stretched_too_far_are_told_with_their_range():
    human, judge = judged(0)
    wild, tuned = merge_labels(human, judge, power=1.0), merge_labels(human, judge)
    [doubt] = overshoot_warnings(wild.target, wild.weight, wild.report["overshoot"])
    assert doubt["overshoot"] == pytest.approx(4.0) and doubt["share_outside"] == wild.report["share_outside"]
    assert (doubt["lowest"], doubt["highest"]) == (wild.target.min(), wild.target.max()) and "up to 4.00" in doubt["text"]
    assert overshoot_warnings(tuned.target, tuned.weight, tuned.report["overshoot"]) == []
    assert overshoot_warnings(wild.target, wild.weight, None) == []
