"""The estimator: identities first, then unbiasedness and coverage by simulation, then worked numbers, then messages."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dedpo_diffusion.debias import bootstrap_sums, fit_power, judge_moments, merge_labels, variance_ratio, wilson_interval

CLOSE = 1e-12  # float64 sums of at most a few hundred terms of order one


def pair_loss(m, label):
    return np.logaddexp(0, m) - label * m


def pool_loss(m, merged):
    return np.mean(merged.weight * np.logaddexp(0, m) - merged.weight * merged.target * m)


@st.composite
def label_sets(draw, soft=True):
    """(human with NaN, synthetic), at least one human label."""
    n = draw(st.integers(1, 40))
    values = st.floats(0, 1) if soft else st.sampled_from([0.0, 0.5, 1.0])
    z = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    g = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    unlabelled = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    unlabelled[draw(st.integers(0, n - 1))] = False
    return np.where(unlabelled, np.nan, z), g


def sample(rng, n=400, share=0.25, accuracy=0.8, bias=0.0):
    """Hard human answers, a hard judge that errs at random (towards image 0 with `bias`), labels at random."""
    z = (rng.random(n) < 0.5).astype(float)
    g = np.where(rng.random(n) < accuracy, z, 1 - z)
    g = np.where(rng.random(n) < bias, 1.0, g)
    labelled = np.isin(np.arange(n), rng.permutation(n)[: round(share * n)])
    return np.where(labelled, z, np.nan), g, z


# ---- identities


@settings(max_examples=150, deadline=None)
@given(label_sets(), st.integers(0, 9))
def test_power_1_is_the_two_sum_formula(labels, seed):
    z, g = labels
    m = np.random.default_rng(seed).normal(0, 3, len(z))
    has = ~np.isnan(z)
    expected = np.mean(pair_loss(m, g)) + np.mean(pair_loss(m, z)[has] - pair_loss(m, g)[has])
    assert pool_loss(m, merge_labels(z, g, method="dedpo")) == pytest.approx(expected, abs=CLOSE * len(z), rel=CLOSE)


@settings(max_examples=100, deadline=None)
@given(label_sets(), st.floats(0, 1))
def test_every_power_interpolates_between_human_only_and_dedpo(labels, power):
    z, g = labels
    m = np.linspace(-3, 3, len(z))
    ends = [pool_loss(m, merge_labels(z, g, method="dedpo", power=p)) for p in (0.0, 1.0)]
    between = pool_loss(m, merge_labels(z, g, method="tuned", power=power))
    assert between == pytest.approx((1 - power) * ends[0] + power * ends[1], abs=CLOSE * len(z))


@settings(max_examples=100, deadline=None)
@given(label_sets())
def test_power_0_is_the_mean_over_human_labels(labels):
    z, g = labels
    m = np.linspace(-2, 3, len(z))
    has = ~np.isnan(z)
    merged = merge_labels(z, g, method="dedpo", power=0.0)
    assert pool_loss(m, merged) == pytest.approx(np.mean(pair_loss(m, z)[has]), abs=CLOSE * len(z))
    alone = merge_labels(z, None, method="human_only")
    np.testing.assert_array_equal(merged.weight, alone.weight)
    np.testing.assert_array_equal(merged.target[has], alone.target[has])
    np.testing.assert_array_equal(alone.target[has], z[has])
    assert (alone.weight[~has] == 0).all()


@settings(max_examples=100, deadline=None)
@given(label_sets(), st.sampled_from(["human_only", "naive", "dedpo", "tuned"]))
def test_swapping_the_images_mirrors_the_targets(labels, method):
    z, g = labels
    here, there = merge_labels(z, g, method=method), merge_labels(1 - z, 1 - g, method=method)
    scale = max(1.0, float(np.abs(here.target).max()))
    np.testing.assert_allclose(there.target, 1 - here.target, atol=1e-9 * scale)  # 1 - label rounds; A may be as large as N
    np.testing.assert_allclose(there.weight, here.weight, atol=1e-9)
    assert there.power == pytest.approx(here.power, abs=1e-9, nan_ok=True)


@settings(max_examples=150, deadline=None)
@given(label_sets(soft=False), st.floats(1, 5))
def test_the_tuned_overshoot_is_bounded_and_unlabelled_targets_are_the_judges(labels, bound):
    z, g = labels
    merged = merge_labels(z, g, max_overshoot=bound)
    has = ~np.isnan(z)
    assert merged.report["overshoot"] <= bound + 1e-9
    assert (np.abs(merged.target - g)[has] <= bound * np.abs(z - g)[has] + 1e-9).all()
    np.testing.assert_array_equal(merged.target[~has], np.where(merged.weight > 0, g, 0.5)[~has])
    assert 0 <= merged.power <= 1


def test_the_cap_binds_where_the_estimate_is_above_it():
    z, g = np.full(100, np.nan), np.tile([0.0, 1.0], 50)
    z[:20] = g[:20]  # a perfect judge: the labels ask for power 1
    merged = merge_labels(z, g, max_overshoot=2.0)
    assert merged.report["power_raw"] == 1.0
    assert merged.power == merged.report["power_cap"] == pytest.approx(0.5 / 0.8)
    assert merged.report["overshoot"] == pytest.approx(2.0)
    assert any("capped" in sentence for sentence in merged.report["sentences"])
    assert merge_labels(z, g, method="dedpo").report["overshoot"] == pytest.approx(5.0)  # as published: not capped


def test_naive_takes_the_human_label_where_there_is_one():
    merged = merge_labels([1.0, math.nan, 0.5], [0.2, 0.7, 0.9], method="naive")
    assert merged.target.tolist() == [1.0, 0.7, 0.5] and merged.weight.tolist() == [1.0, 1.0, 1.0]
    assert math.isnan(merged.power) and merged.report["power"] is None
    assert merged.report["effective_human_labels"]["value"] is None


def test_naive_works_without_any_human_label():
    merged = merge_labels([math.nan, math.nan], [0.2, 0.7], method="naive")
    assert merged.target.tolist() == [0.2, 0.7]
    json.dumps(merged.report, allow_nan=False)


@pytest.mark.parametrize("method", ["human_only", "naive", "dedpo", "tuned"])
def test_with_every_pair_labelled_every_method_is_training_on_the_human_labels(method):
    rng = np.random.default_rng(0)
    z, g = rng.random(50), rng.random(50)
    merged = merge_labels(z, g, method=method)
    np.testing.assert_allclose(merged.target, z, atol=CLOSE)
    np.testing.assert_allclose(merged.weight, 1, atol=CLOSE)
    assert merged.report["share_outside"] == 0


# ---- propensities


def test_a_constant_propensity_array_is_labelling_at_random():
    rng = np.random.default_rng(1)
    z, g, _ = sample(rng, n=60)
    known = merge_labels(z, g, propensity=np.full(60, 0.7))  # normalised: only ratios of propensities matter
    plain = merge_labels(z, g)
    np.testing.assert_allclose(known.weight, plain.weight, atol=CLOSE)
    np.testing.assert_allclose(known.target, plain.target, atol=CLOSE)
    assert known.power == pytest.approx(plain.power)


def test_a_scalar_propensity_is_not_normalised():
    merged = merge_labels([1.0, math.nan], [1.0, 0.0], method="human_only", propensity=0.25)
    assert merged.weight.tolist() == [4.0, 0.0]


def test_an_array_of_propensities_is_normalised_to_mean_1():
    merged = merge_labels([1.0, 0.0, math.nan], None, method="human_only", propensity=[0.5, 1.0, 0.5])
    assert merged.weight.tolist() == [2.0, 1.0, 0.0]  # h = (2, 1, 0), whose mean is 1 already
    merged = merge_labels([1.0, 0.0, math.nan], None, method="human_only", propensity=[0.25, 0.5, 0.5])
    assert merged.weight.tolist() == [2.0, 1.0, 0.0]


# ---- statistics


@pytest.mark.parametrize(("accuracy", "bias"), [(0.85, 0.0), (0.3, 0.0), (0.8, 0.6)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_every_fixed_power_is_unbiased_for_every_judge(accuracy, bias, power):
    """Over labellings at random of a fixed pool, the mean loss is the loss with all human labels, to 4.5 standard errors."""
    rng = np.random.default_rng(2)
    _, g, z = sample(rng, n=60, accuracy=accuracy, bias=bias)
    m = rng.normal(0, 2, 60)
    losses = []
    for _ in range(1500):
        human = np.where(np.isin(np.arange(60), rng.permutation(60)[:15]), z, np.nan)
        h = np.where(np.isnan(human), 0, 4.0)
        merged = fast_merge(human, g, h, power)
        losses.append(pool_loss(m, merged))
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert abs(np.mean(losses) - np.mean(pair_loss(m, z))) < 4.5 * error


def fast_merge(human, g, h, power):
    """The estimator without its report; the next test holds it to merge_labels."""
    from types import SimpleNamespace

    from dedpo_diffusion.debias import pair_targets, pair_weights

    weight = pair_weights(h, power)
    return SimpleNamespace(weight=weight, target=pair_targets(human, g, h, weight))


def test_the_estimator_without_report_is_the_public_one():
    rng = np.random.default_rng(3)
    human, g, _ = sample(rng, n=60)
    fast, public = fast_merge(human, g, np.where(np.isnan(human), 0, 4.0), 0.5), merge_labels(human, g, method="dedpo", power=0.5)
    np.testing.assert_array_equal(fast.target, public.target)
    np.testing.assert_array_equal(fast.weight, public.weight)


def test_naive_merging_is_biased_so_the_test_above_can_fail():
    rng = np.random.default_rng(2)
    _, g, z = sample(rng, n=60, accuracy=0.3)
    m = rng.normal(0, 2, 60)
    losses = []
    for _ in range(300):
        human = np.where(np.isin(np.arange(60), rng.permutation(60)[:15]), z, np.nan)
        losses.append(np.mean(pair_loss(m, np.where(np.isnan(human), g, human))))
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert abs(np.mean(losses) - np.mean(pair_loss(m, z))) > 10 * error


@pytest.mark.slow
def test_the_power_and_its_standard_error_describe_repeated_samples():
    """Hard labels of accuracy a ask for 2a - 1; the standard error is the spread over samples, to 15 % (300 samples: 4 %)."""
    rng = np.random.default_rng(4)
    reports = []
    for _ in range(300):
        human, g, _ = sample(rng, n=80, share=1.0, accuracy=0.8)
        reports.append(merge_labels(human, g).report)
    powers, errors = (np.array([report[key] for report in reports]) for key in ("power_raw", "power_se"))
    assert np.mean(powers) == pytest.approx(0.6, abs=4 * np.std(powers) / math.sqrt(300))
    assert np.mean(errors) == pytest.approx(np.std(powers), rel=0.15)


def test_effective_labels_tell_the_gradients_true_variance():
    """The gradient at margin 0, mean(weight (0.5 - target) x), over labellings and pools: variance n_l / n_eff of human-only's."""
    rng = np.random.default_rng(5)
    power, n, n_l, a = 0.5, 200, 50, 0.8
    gradients = {0.0: [], power: []}
    for _ in range(3000):
        human, g, _ = sample(rng, n=n, share=n_l / n, accuracy=a)
        h = np.where(np.isnan(human), 0, n / n_l)
        for p, found in gradients.items():
            merged = fast_merge(human, g, h, p)
            found.append(np.mean(merged.weight * (0.5 - merged.target)))
    ratio = np.var(gradients[power]) / np.var(gradients[0.0])
    human, g, _ = sample(rng, n=40000, share=n_l / n, accuracy=a)
    worth = merge_labels(human, g, method="dedpo", power=power).report["effective_human_labels"]
    assert worth["n_human"] / worth["value"] == pytest.approx(ratio, rel=0.1)  # 3000 draws: 3.6 % on the ratio at most
    assert worth["ci"][0] < worth["value"] < worth["ci"][1]


@pytest.mark.slow
def test_the_interval_of_effective_labels_covers():
    """95 % nominal; 120 samples of 100 labels: within 4 binomial errors of 95 %, and neither empty nor endless."""
    rng = np.random.default_rng(6)
    share, a, power = 0.25, 0.8, 0.5
    ratio = 1 - (1 - share) * (2 * power * (2 * a - 1) - power**2)
    hits = 0
    for seed in range(120):
        human, g, _ = sample(rng, n=400, share=share, accuracy=a)
        low, high = merge_labels(human, g, method="dedpo", power=power, seed=seed).report["effective_human_labels"]["ci"]
        hits += low <= 100 / ratio <= high
    assert 0.87 <= hits / 120 <= 1.0
    assert high - low < 60


def test_grouped_resamples_have_the_spread_of_ungrouped_ones():
    rng = np.random.default_rng(7)
    terms = rng.normal(0, 1, (20000, 3))
    sums = bootstrap_sums(terms, rng)
    assert sums.shape == (2000, 3)
    np.testing.assert_allclose(sums.mean(axis=0), terms.sum(axis=0), atol=4 * math.sqrt(20000 / 2000))
    np.testing.assert_allclose(sums.std(axis=0), math.sqrt(20000), rtol=0.12)  # 2 % of resampling, 1.6 % of grouping, 4 times


def test_the_report_is_reproducible_and_follows_its_seed():
    human, g, _ = sample(np.random.default_rng(8))
    g = 0.2 + 0.5 * g + 0.1 * np.sin(np.arange(len(g)))  # soft, so that no two resamples' intervals are alike
    assert merge_labels(human, g).report == merge_labels(human, g).report
    key = "effective_human_labels"
    assert merge_labels(human, g).report[key]["ci"] != merge_labels(human, g, seed=1).report[key]["ci"]
    assert merge_labels(human, g).report[key]["value"] == merge_labels(human, g, seed=1).report[key]["value"]


def test_with_unequal_propensities_the_variance_is_that_of_a_simulation_and_the_fitted_power_minimises_it():
    """The gradient at margin 0 over many draws of who is labelled, for one fixed pool of 4000 pairs."""
    rng = np.random.default_rng(11)
    z = (rng.random(4000) < 0.5).astype(float)
    easy = rng.random(4000) < 0.5
    g = np.where(rng.random(4000) < np.where(easy, 0.95, 0.6), z, 1 - z)
    p = np.where(easy, 0.1, 0.4)  # doubtful pairs are labelled more often
    rho_z, rho_g = 0.5 - z, 0.5 - g
    powers = np.array([0.0, 0.3, 0.6, 0.9])
    labelled = rng.random((3000, 4000)) < p
    h = labelled / p
    gradients = np.stack([(h @ (rho_z - lam * rho_g) + lam * rho_g.sum()) / 4000 for lam in powers])
    simulated = gradients.var(axis=1) / gradients[0].var()
    # the variance given the pool: without the part that is there even with every label known
    c, v, s = (np.sum((1 / p - 1) * x) for x in (rho_z * rho_g, rho_g**2, rho_z**2))
    np.testing.assert_allclose(simulated, 1 - (2 * powers * c - powers**2 * v) / s, atol=0.1)
    fitted = [fit_power(z[row], g[row], 1 / p[row])[0] for row in labelled[:200]]
    assert np.mean(fitted) == pytest.approx(c / v, abs=0.02)
    plain = np.sum(rho_z * rho_g) / np.sum(rho_g**2)  # as if labelled at random
    assert abs(plain - c / v) > 0.05
    moments = np.mean([judge_moments(z[row], g[row], 1 / p[row]).sum(axis=0) for row in labelled[:200]], axis=0)
    np.testing.assert_allclose(moments, [c, v, np.sum(rho_z**2 / p)], rtol=0.03)
    assert variance_ratio(moments, 0.5) == pytest.approx(1 - (c - 0.25 * v) / np.sum(rho_z**2 / p), abs=0.02)


# ---- worked numbers


def test_a_worked_example():
    """z = 1, 0, 1, 1 and four unlabelled; g = 1, 0, 0, 1 on the labelled: f = 1/2, three of four agree.

    rho_z rho_g = +-1/4, rho_g^2 = rho_z^2 = 1/4: lam = (3 - 1) / 4 = 0.5; the cap is (1 - 1/2) / (1 - 1/2) = 1.
    A = 1 / (1 - 0.5 * 0.5) = 4/3, weight = 1.5 labelled and 0.5 not. Third pair: target 0 + 4/3 (1 - 0) = 4/3.
    Residuals (rho_z rho_g - lam rho_g^2) = 1/8, 1/8, -3/8, 1/8: se = sqrt(4/3 * 12/64) / 1 = 0.5.
    Ratio 1 - 0.5 (2 * 0.5 * 0.5 - 0.25) = 0.875: worth 4 / 0.875; at power 1: 1 - 0.5 (1 - 1) = 1: worth 4.
    """
    human = [1, 0, 1, 1, math.nan, math.nan, math.nan, math.nan]
    merged = merge_labels(human, [1, 0, 0, 1, 1, 0, 0.3, 0.5])
    report = merged.report
    assert merged.power == pytest.approx(0.5)
    np.testing.assert_allclose(merged.weight, [1.5] * 4 + [0.5] * 4, atol=CLOSE)
    np.testing.assert_allclose(merged.target, [1, 0, 4 / 3, 1, 1, 0, 0.3, 0.5], atol=CLOSE)
    assert report["power_se"] == pytest.approx(0.5) and report["power_cap"] == 1.0 and report["power_raw"] == pytest.approx(0.5)
    assert report["overshoot"] == pytest.approx(4 / 3)
    assert report["share_outside"] == pytest.approx(1 / 8) and report["max_abs_offset"] == pytest.approx(5 / 6)
    assert report["effective_human_labels"]["value"] == pytest.approx(4 / 0.875)
    assert report["effective_human_labels_power_1"]["value"] == pytest.approx(4.0)
    assert (report["agreement"]["value"], report["agreement"]["n"]) == (0.75, 4)
    assert report["judge_bias"]["value"] == pytest.approx(-0.25) and report["judge_bias"]["se"] == pytest.approx(0.25)
    assert (report["n"], report["n_human"], report["n_ties"], report["labelled_share"]) == (8, 4, 0, 0.5)


def test_ties_count_as_ties_and_not_in_the_agreement():
    report = merge_labels([0.5, 1, 0, math.nan], [1, 1, 0.5, 0.5], method="dedpo").report
    assert report["n_ties"] == 1 and report["agreement"] == {"value": 1.0, "ci": wilson_interval(1, 1), "n": 1}


def test_wilson_interval_is_the_textbooks():
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    for successes, n in ((0, 7), (3, 7), (250, 500)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_sentences_say_what_the_labels_are_worth():
    human, g, _ = sample(np.random.default_rng(9), n=800)
    report = merge_labels(human, g).report
    worth, published = report["effective_human_labels"], report["effective_human_labels_power_1"]["value"]
    low, high = worth["ci"]
    expected = f"These 200 human and 600 judge labels are worth about {worth['value']:.0f} human labels (95 %: {low:.0f} to {high:.0f})."
    assert report["sentences"][0] == f"{expected} At power 1, as published, they would be worth {published:.0f}."


def test_with_every_pair_labelled_the_targets_are_the_human_labels_and_the_sentences_say_so():
    human, g, truth = sample(np.random.default_rng(9), n=60)
    merged = merge_labels(np.where(np.isnan(human), (g > 0.5).astype(float), human), g)
    np.testing.assert_allclose(merged.target, np.where(np.isnan(human), g > 0.5, human), atol=1e-12)
    text = " ".join(merged.report["sentences"])
    assert text.startswith("Every pair has a human label, so the judge adds nothing here.") and "Power" not in text
    partly = " ".join(merge_labels(human, g).report["sentences"])
    assert "Every pair" not in partly and "Power (how much the judge counts: 0 is not at all, 1 as published): " in partly


def test_a_judge_worse_than_a_coin_is_not_used_and_the_user_is_told():
    human, g, _ = sample(np.random.default_rng(10), accuracy=0.3)
    merged = merge_labels(human, g)
    assert merged.power == 0 and merged.report["effective_human_labels"]["value"] == 100
    assert any("inverting" in sentence and "not used" in sentence for sentence in merged.report["sentences"])
    published = merge_labels(human, g, method="dedpo").report
    assert published["effective_human_labels"]["value"] < 100
    assert any("less than the 100 human labels alone" in sentence for sentence in published["sentences"])


def test_degenerate_labels_give_none_and_not_nan():
    everyone_tied = merge_labels([0.5, 0.5, math.nan], [1, 0, 1], method="dedpo").report
    assert everyone_tied["effective_human_labels"]["value"] is None and "tie" in everyone_tied["sentences"][0]
    undecided_judge = merge_labels([1, 0, math.nan], [0.5, 0.5, 0.5])
    assert undecided_judge.power == 0 and undecided_judge.report["power_se"] is None
    one_label = merge_labels([1, math.nan], [1, 1]).report
    assert one_label["power_se"] is None and one_label["judge_bias"]["se"] is None


@settings(max_examples=80, deadline=None)
@given(label_sets(soft=False), st.sampled_from(["human_only", "naive", "dedpo", "tuned"]))
def test_every_report_is_json_and_worth_at_least_nothing(labels, method):
    z, g = labels
    report = merge_labels(z, g, method=method).report
    json.dumps(report, allow_nan=False)
    assert all(isinstance(sentence, str) and sentence for sentence in report["sentences"]) and report["sentences"]
    for key in ("effective_human_labels", "effective_human_labels_power_1"):
        value = report[key]["value"]
        assert value is None or 0 < value <= len(z) * (1 + 1e-9)  # the variance ratio is never below the labelled share


# ---- messages

NAN = math.nan


@pytest.mark.parametrize(
    ("human", "synthetic", "options", "words"),
    [
        ([1.0, 1.7], [0, 1], {}, r"human\[1\] is 1\.7.*\[0, 1\]"),
        ([1.0, NAN], [0, -0.1], {}, r"synthetic\[1\] is -0\.1.*not scores"),
        ([1.0, NAN], [0, math.inf], {}, r"synthetic\[1\] is inf"),
        ([1.0, NAN], [NAN, 1], {}, r"synthetic\[0\] is NaN.*human_only"),
        ([1.0, NAN], [1, NAN], {"method": "naive"}, r"synthetic\[1\] is NaN"),
        ([1.0, NAN], None, {}, r"needs judge labels.*human_only"),
        ([NAN, NAN], [0, 1], {}, r"none of the 2 pairs has a human label.*naive"),
        ([NAN, NAN], None, {"method": "human_only"}, r"none of the 2 pairs"),
        ([1.0], [0, 1], {}, r"human has 1 labels, synthetic 2"),
        ([], [], {}, r"human has shape \(0,\)"),
        ([[1.0]], [1], {}, r"human has shape \(1, 1\)"),
        ([1.0], [1], {"method": "best"}, r"unknown method 'best'.*tuned"),
        ([1.0], [1], {"method": "naive", "power": 0.5}, r"'naive' takes no power"),
        ([1.0], [1], {"method": "human_only", "power": 0.5}, r"'human_only' takes no power"),
        ([1.0], [1], {"power": 1.5}, r"power is 1\.5.*\[0, 1\]"),
        ([1.0], [1], {"max_overshoot": 0.5}, r"max_overshoot is 0\.5.*at least 1"),
        ([1.0], [1], {"method": "naive", "propensity": 0.5}, r"'naive' takes no propensity"),
        ([1.0, 0.0], [1, 1], {"propensity": [0.5, 0.0]}, r"propensity\[1\] is 0\.0.*\(0, 1\]"),
        ([1.0, 0.0], [1, 1], {"propensity": NAN}, r"propensity is nan"),
        ([1.0, 0.0], [1, 1], {"propensity": [0.5]}, r"propensity has shape \(1,\).*2 pairs"),
    ],
)
def test_errors_name_the_place_and_the_remedy(human, synthetic, options, words):
    with pytest.raises(ValueError, match=words):
        merge_labels(human, synthetic, **options)


def test_human_only_and_naive_forgive_a_missing_judge_where_they_have_no_use_for_it():
    merged = merge_labels([1.0, 0.0, NAN], [NAN, 1.0, NAN], method="human_only")
    assert merged.target.tolist() == [1.0, 0.0, 0.5] and merged.report["agreement"]["n"] == 1
    assert merge_labels([1.0, NAN], [NAN, 0.3], method="naive").target.tolist() == [1.0, 0.3]


def test_targets_of_no_weight_are_the_same_whatever_judge_lies_there():
    """So that human-only targets, and the runs that were trained on them, do not depend on label files that they never used."""
    human, judge = np.array([1.0, np.nan, 0.0, np.nan]), np.array([0.2, 0.9, 0.4, 0.1])
    alone, beside = merge_labels(human, None, method="human_only"), merge_labels(human, judge, method="human_only")
    np.testing.assert_array_equal(alone.target, beside.target)
    np.testing.assert_array_equal(alone.target, [1.0, 0.5, 0.0, 0.5])
