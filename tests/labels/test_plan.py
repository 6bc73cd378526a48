"""What more labels or a better judge would buy, and how many labels a wanted worth takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.debias import estimate, merge_labels
from dedpo_diffusion.debias.report import make_basis
from dedpo_diffusion.labels.plan import Pool, describe, judge_curve, plan, worth, worth_curve


def answers(n=1000, n_human=250, accuracy=0.8, seed=0):
    """People's labels of some pairs, and a judge's that names their image with this probability (a number or one a pair)."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.5).astype(float)
    judge = np.where(rng.random(n) < accuracy, truth, 1 - truth)
    human = np.full(n, np.nan)
    asked = rng.permutation(n)[:n_human]
    human[asked] = truth[asked]
    return human, judge


def known(human, judge, **options):
    """What `describe` makes of a merge."""
    return describe(make_basis(estimate(human, judge, **options), 0))


# ---- the worth


@pytest.mark.parametrize("options", [{}, {"power": 0.5}, {"power": 1.0}, {"max_overshoot": 1.2}])
@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.9])
def test_the_worth_of_the_present_labels_is_that_of_the_merge_with_its_interval(options, accuracy):
    human, judge = answers(accuracy=accuracy)
    curve = worth_curve(known(human, judge, **options))
    expected = merge_labels(human, judge, **options).report["effective_human_labels"]
    assert curve["n"][0] == 250
    np.testing.assert_allclose(curve["value"][0], expected["value"], rtol=1e-9)
    np.testing.assert_allclose([curve["low"][0], curve["high"][0]], expected["ci"], rtol=1e-9)


@pytest.mark.parametrize("judges", [1, 2])
@pytest.mark.parametrize("rule", ["plug_in", "half", "minus_se", "cross_fitted"])
def test_report_curve_and_plan_agree_whatever_the_rule_and_judges(rule, judges):
    """The powers of several judges are held out, and the plan takes the report's."""
    human, judge = answers(1000, 225, 0.8)
    if judges == 2:
        judge = np.stack([judge, answers(seed=5)[1]], axis=1)
    merged = merge_labels(human, judge, rule=rule, seed=4)
    report, pool = merged.report, describe(merged.basis, 4)
    curve, told = worth_curve(pool), plan(pool, 500)
    here = report["effective_human_labels"]
    np.testing.assert_allclose([curve["value"][0], curve["low"][0], curve["high"][0]], [here["value"], *here["ci"]], rtol=1e-9)
    np.testing.assert_allclose([told["worth_now"]["value"], *told["worth_now"]["ci"]], [here["value"], *here["ci"]], rtol=1e-9)
    assert curve["value"][-1] == pytest.approx(1000)


@pytest.mark.slow
def test_judges_that_know_nothing_are_worth_nothing_to_the_plan_either():
    """6 coins, 40 labels: fitted to the same labels they look worth 43; report and plan tell about 40."""
    worths = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        human = np.where(np.arange(400) < 40, (rng.random(400) < 0.5).astype(float), np.nan)
        pool = known(human, (rng.random((400, 6)) < 0.5).astype(float), max_overshoot=100.0)
        worths.append(float(worth(pool, pool.labels)))
    assert np.mean(worths) < 41


def test_labels_of_unequal_propensities_have_no_curve():
    human, judge = answers()
    p = np.where(np.arange(1000) % 2 == 0, 0.4, 0.1)
    merged = merge_labels(human, judge, propensity=p)
    assert describe(merged.basis) is None and merged.report["worth_reference"] == "same_propensities"
    assert any("labels taken with the same unequal probabilities" in text for text in merged.report["sentences"])
    assert describe(merge_labels(human, judge, propensity=np.full(1000, 0.2)).basis) is not None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.2, 0.5, 0.7, 1.0]), st.sampled_from([None, 0.0, 0.7, 1.0]))
def test_with_a_label_for_every_pair_the_worth_is_the_number_of_pairs(seed, accuracy, power):
    human, judge = answers(200, 60, accuracy, seed)
    curve = worth_curve(known(human, judge, power=power))
    assert curve["n"][-1] == 200
    np.testing.assert_allclose([curve[key][-1] for key in ("value", "low", "high")], 200)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.2, 0.5, 0.7, 0.95]))
def test_more_labels_are_never_worth_less_and_a_judge_never_costs_any(seed, accuracy):
    human, judge = answers(300, 60, accuracy, seed)
    curve = worth_curve(known(human, judge))
    assert (np.diff(curve["value"]) > -1e-9).all() and (np.array(curve["value"]) >= np.array(curve["n"]) - 1e-9).all()


@pytest.mark.slow
def test_the_curve_foretells_what_further_labels_are_worth():
    """Over 30 data sets: 200 labels say what 400 are worth, against what they turn out to be worth; within 4 standard errors."""
    gaps = []
    for seed in range(30):
        human, judge = answers(1000, 400, 0.85, seed)
        few = np.where(np.cumsum(~np.isnan(human)) <= 200, human, np.nan)
        curve = worth_curve(known(few, judge))
        later = worth_curve(known(human, judge))["value"][0]
        gaps.append(np.interp(400, curve["n"], curve["value"]) - later)
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(30) and np.std(gaps) > 0


def test_labels_that_say_nothing_have_no_curve():
    human, judge = answers(50, 1)
    assert known(human, judge) is None and worth_curve(None) is None
    assert known(np.where(np.isnan(answers(50, 9)[0]), np.nan, 0.5), judge) is None


# ---- a better judge


def test_a_judges_worth_by_hand():
    """f = 1/4. a = 3/4: lam = 1/2, ratio 1 - 3/4 (2 * 1/2 * 1/2 - 1/4) = 13/16. a = 1: lam = 1, capped at (1 - 1/2) / (3/4) = 2/3,
    ratio 1 - 3/4 (4/3 - 4/9) = 1/3.
    """
    curve = judge_curve(250, 1000)
    np.testing.assert_allclose(np.interp([0.5, 1.0], curve["agreement"], curve["value"]), [250, 750])
    assert curve["agreement"][0] == 0.5 and curve["agreement"][-1] == 1.0
    exact = [value for agreement, value in zip(curve["agreement"], curve["value"], strict=True) if abs(agreement - 0.76) < 1e-9]
    np.testing.assert_allclose(exact, [250 / (1 - 0.75 * 0.52**2)])


def test_at_power_1_a_judge_pays_from_three_quarters_on():
    curve = judge_curve(250, 1000, power=1.0)
    value, agreement = np.array(curve["value"]), np.array(curve["agreement"])
    assert ((value > 250 + 1e-9) == (agreement > 0.75 + 1e-9)).all()


# ---- the plan


def test_the_plan_reaches_the_wanted_worth_and_not_with_a_label_less():
    human, judge = answers()
    found = known(human, judge)
    told = plan(found, 500)
    pool, more = found, told["more"]
    assert worth(pool, pool.labels + more) >= 500 > worth(pool, pool.labels + more - 1)
    assert told["without_judge"] == 250 > more and told["ci"][0] <= more <= told["ci"][1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.floats(1, 330), st.sampled_from([0.3, 0.6, 0.95]))
def test_a_plan_asks_for_no_more_labels_than_there_are_pairs(seed, wanted, accuracy):
    told = plan(known(*answers(300, 60, accuracy, seed)), wanted)
    assert told["reachable"] == (wanted <= 300) == (told["more"] is not None)
    if told["reachable"]:
        assert 0 <= told["more"] <= told["without_judge"] <= 240


def test_a_worth_beyond_the_pairs_and_one_that_is_there_already_are_told():
    found = known(*answers())
    beyond, there = plan(found, 1001), plan(found, 260)
    assert beyond["more"] is beyond["ci"] is None and "No number of labels makes them worth 1001" in beyond["sentences"][1]
    assert there["more"] == 0 and "no further label is needed" in there["sentences"][1]


@pytest.mark.slow
def test_the_interval_of_the_plan_covers_what_the_true_judge_asks_for():
    """300 data sets; 95 % within 4 binomial errors (0.05), and the bootstrap's own error at 200 labels."""
    f, c = 0.2, 0.25 * (2 * 0.8 - 1)
    pool = Pool(1000, 200, np.array([[c, 0.25, 0.25]]), free=0.6, back=0.0)
    counts = np.arange(200, 1001)
    wanted = next(int(k) - 200 for k in counts if worth(pool, k) >= 450)
    hits = 0
    for seed in range(300):
        low, high = plan(known(*answers(1000, int(1000 * f), 0.8, seed)), 450)["ci"]
        hits += low <= wanted <= high
    assert 0.9 <= hits / 300 <= 0.99
