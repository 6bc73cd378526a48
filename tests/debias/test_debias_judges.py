"""Several judges and the rules for the power: identities, unbiasedness over labellings, report, messages."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.debias import best_powers, estimate, fit_powers, judge_bias, merge_labels

NAN = math.nan


def pool_loss(m, made):
    return np.mean(made.weight * np.logaddexp(0, m) - made.weight * made.target * m)


def judge_of(rng, z, accuracy):
    return np.where(rng.random(len(z)) < accuracy, z, 1 - z)


def labelling(rng, n, count):
    """(n,) bool: `count` labels at random."""
    return np.isin(np.arange(n), rng.permutation(n)[:count])


def pool(seed, n=80, accuracies=(0.8, 0.3)):
    """(z, g (N, K), margins) of a fixed pool; the first judge knows every second pair."""
    rng = np.random.default_rng(seed)
    z = (rng.random(n) < 0.5).astype(float)
    g = np.stack([judge_of(rng, z, a) for a in accuracies], axis=1)
    g[:, 0] = np.where(np.arange(n) % 2 == 0, z, g[:, 0])
    return z, 0.1 + 0.8 * g, rng.normal(0, 2, n)


def mean_loss_test(losses, expected, errors=4.5):
    """Whether the mean over labellings is the expected loss, to `errors` computed standard errors."""
    return abs(np.mean(losses) - expected) < errors * np.std(losses, ddof=1) / math.sqrt(len(losses))


@st.composite
def judged(draw):
    """(human with NaN, g (N, K)), at least one human label."""
    n, k = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    g = rng.random((n, k)) if draw(st.booleans()) else rng.integers(0, 3, (n, k)) / 2
    z = np.where(rng.random(n) < draw(st.floats(0, 1)), rng.integers(0, 3, n) / 2, np.nan)
    z[0] = 1.0
    return z, g


# ---- identities


@settings(max_examples=80, deadline=None)
@given(judged(), st.integers(0, 99))
def test_the_targets_are_those_of_one_power_a_judge(labels, seed):
    """weight = h + sum lam (1 - h) and weight target = h z + sum_k lam_k (1 - h) g_k, and the fields of Merged say the same."""
    z, g = labels
    powers = np.random.default_rng(seed).dirichlet(np.ones(g.shape[1] + 1))[:-1]
    merged = merge_labels(z, g, power=powers)
    h = np.where(np.isnan(z), 0.0, 1 / np.mean(~np.isnan(z)))
    human = h * np.where(np.isnan(z), 0.0, z)
    np.testing.assert_allclose(merged.weight, h + powers.sum() * (1 - h), atol=1e-12)
    np.testing.assert_allclose(merged.weight * merged.target, human + (1 - h) * (g @ powers), atol=1e-9)
    np.testing.assert_allclose(merged.weight * merged.target, human + merged.powers * (1 - merged.inverse) * merged.judge, atol=1e-9)
    np.testing.assert_array_equal(merged.human, z)


@settings(max_examples=40, deadline=None)
@given(judged(), st.sampled_from(["human_only", "naive", "dedpo", "tuned"]))
def test_one_judge_in_a_column_is_one_judge(labels, method):
    z, g = labels
    row, column = merge_labels(z, g[:, 0], method=method), merge_labels(z, g[:, :1], method=method)
    np.testing.assert_array_equal(row.target, column.target)
    assert row.report == column.report
    assert row.report["judges"][0]["agreement"] == row.report["agreement"]


@settings(max_examples=40, deadline=None)
@given(judged(), st.sampled_from(["naive", "dedpo"]))
def test_published_methods_take_the_mean_of_several_judges(labels, method):
    z, g = labels
    several, mean = merge_labels(z, g, method=method), merge_labels(z, g.mean(axis=1), method=method)
    np.testing.assert_allclose(several.target, mean.target, atol=1e-9)
    np.testing.assert_allclose(several.weight, mean.weight, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(judged(), st.floats(1, 5), st.sampled_from(["plug_in", "minus_se"]))
def test_tuned_powers_are_none_negative_and_keep_the_bound(labels, bound, rule):
    z, g = labels
    merged = merge_labels(z, g, max_overshoot=bound, rule=rule)
    assert merged.report["overshoot"] <= bound + 1e-9
    assert all(entry["power"] >= 0 for entry in merged.report["judges"]) and merged.power <= 1 + 1e-9
    assert sum(entry["power"] for entry in merged.report["judges"]) == pytest.approx(merged.power, abs=1e-9)
    json.dumps(merged.report, allow_nan=False)
    if rule == "minus_se":
        assert merged.power <= merge_labels(z, g, max_overshoot=bound).power + 1e-12


@pytest.mark.parametrize("rule", ["plug_in", "half", "minus_se"])
def test_mirrored_labels_give_mirrored_targets(rule):
    z, g, _ = pool(0, n=200)
    human = np.where(labelling(np.random.default_rng(0), 200, 60), z, NAN)
    here = merge_labels(human, g, rule=rule)
    there = merge_labels(1 - human, 1 - g[:, ::-1], rule=rule)
    np.testing.assert_allclose(there.target, 1 - here.target, atol=1e-9)
    np.testing.assert_allclose(there.weight, here.weight, atol=1e-9)


# ---- the powers


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1.5), st.booleans())
def test_the_powers_meet_the_conditions_of_the_least_variance(k, seed, bound, twins):
    """V lam - c + mu >= 0 with mu >= 0, equal where lam > 0, and mu = 0 unless the bound is met: necessary and sufficient."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rng.integers(1, 9), k))
    if twins:
        a[:, -1] = a[:, 0]
    cross, square = a.T @ rng.normal(size=len(a)), a.T @ a
    lam = best_powers(cross, square, bound)
    assert (lam >= 0).all() and lam.sum() <= bound + 1e-9
    slope = square @ lam - cross
    mu = max(0.0, -slope.min()) if lam.sum() > bound - 1e-9 else 0.0
    scale = np.abs(cross).max() + np.abs(square).max()
    assert (slope + mu >= -1e-6 * scale).all()
    assert (np.abs((slope + mu)[lam > 1e-6]) <= 1e-5 * scale).all()


def test_worked_powers_of_two_judges():
    """Labels 1 1 1 0, judges 1 1 0 0 and 1 0 1 0: V = [[4, 0], [0, 4]] / 4, c = (3 - 1, 3 - 1) / 4, so free = (1/2, 1/2).

    Their sum is 1; a bound of 0.6 leaves (0.3, 0.3). Residuals z - 0.5 (g1 + g2) in units of 1/2: 0, 1, 1, 0.
    """
    z, g = np.array([1, 1, 1, 0.0]), np.array([[1, 1], [1, 0], [0, 1], [0, 0.0]])
    fit = fit_powers(z, g, np.full(4, 2.0))
    np.testing.assert_allclose(fit.free, [0.5, 0.5])
    np.testing.assert_allclose(fit.raw, [0.5, 0.5])
    np.testing.assert_allclose(best_powers(fit.cross, fit.square, 0.6), [0.3, 0.3])
    scores = (z - 0.5) - 0.5 * (g - 0.5).sum(axis=1)
    expected = 4 / 3 * np.linalg.inv(fit.square / 2) @ ((g - 0.5).T * scores**2 @ (g - 0.5)) @ np.linalg.inv(fit.square / 2)
    np.testing.assert_allclose(fit.se, np.sqrt(np.diag(expected)))
    assert fit.total_se == pytest.approx(math.sqrt(expected.sum()))


def test_standard_errors_of_two_judges_describe_repeated_samples():
    """400 samples of 150 labels: 4 % of noise on a spread, allowed four times; the mean power is that of the population.

    Accuracies a and b with independent errors: c = (2a - 1, 2b - 1) = (.6, .5), off-diagonal .3: lam = (.45, .32) / .91.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        z = (rng.random(150) < 0.5).astype(float)
        fit = fit_powers(z, np.stack([judge_of(rng, z, 0.8), judge_of(rng, z, 0.75)], axis=1), np.full(150, 2.0))
        found.append([*fit.free, fit.free.sum(), *fit.se, fit.total_se])
    means, spread = np.mean(found, axis=0), np.std(found, axis=0)
    assert means[:2] == pytest.approx(np.array([0.45, 0.32]) / 0.91, abs=0.02)
    np.testing.assert_allclose(means[3:], spread[:3], rtol=0.16)


def test_a_judge_that_repeats_another_adds_nothing_and_a_coin_gets_little():
    rng = np.random.default_rng(1)
    z = (rng.random(2000) < 0.5).astype(float)
    good = judge_of(rng, z, 0.8)
    human = np.where(np.arange(2000) < 500, z, NAN)
    alone = merge_labels(human, good)
    twins = merge_labels(human, np.stack([good, good], axis=1))
    np.testing.assert_allclose(twins.target, alone.target, atol=1e-9)
    worth = alone.report["effective_human_labels"]["value"]
    assert twins.report["effective_human_labels"]["value"] == pytest.approx(worth, rel=0.01)  # told by held-out powers
    beside = merge_labels(human, np.stack([good, judge_of(rng, z, 0.5)], axis=1), judges=["good", "coin"])
    assert [entry["name"] for entry in beside.report["judges"]] == ["good", "coin"]
    assert beside.report["judges"][1]["power"] < 0.1


def test_two_judges_are_worth_what_the_gradient_says():
    """Variance of the gradient at margin 0 over labellings, with powers (.3, .3): n_l over the worth that is reported."""
    rng, n, n_l = np.random.default_rng(2), 200, 50
    gradients = []
    for _ in range(3000):
        z = (rng.random(n) < 0.5).astype(float)
        g = np.stack([judge_of(rng, z, 0.8), judge_of(rng, z, 0.75)], axis=1)
        human = np.where(np.arange(n) < n_l, z, NAN)
        made = estimate(human, g, power=(0.3, 0.3))
        gradients.append([np.mean(made.weight * (0.5 - made.target)), np.mean(0.5 - z[:n_l])])
    ratio = np.var(gradients, axis=0)
    z = (rng.random(40000) < 0.5).astype(float)
    g = np.stack([judge_of(rng, z, 0.8), judge_of(rng, z, 0.75)], axis=1)
    worth = merge_labels(np.where(np.arange(40000) < 10000, z, NAN), g, power=(0.3, 0.3)).report["effective_human_labels"]
    assert worth["n_human"] / worth["value"] == pytest.approx(ratio[0] / ratio[1], rel=0.1)  # 3.6 % at most by 3000 draws


@settings(max_examples=60, deadline=None)
@given(judged())
def test_rule_half_is_half_of_the_powers_that_the_labels_ask_for(labels):
    z, g = labels
    tuned = estimate(z, g, max_overshoot=1e9)  # no cap
    half, fixed = estimate(z, g, rule="half", max_overshoot=1e9), estimate(z, g, power=tuned.powers.table[0] / 2)
    np.testing.assert_allclose(half.weight, fixed.weight, atol=1e-12)
    np.testing.assert_allclose(half.weight * half.target, fixed.weight * fixed.target, atol=1e-9)


def test_the_cap_of_rule_half_comes_after_halving():
    """A perfect judge asks for 1 and half of it is 0.5; f = 1/5 and A = 2 allow 0.625, A = 1.25 only 0.25."""
    z, g = np.full(100, NAN), np.tile([0.0, 1.0], 50)
    z[:20] = g[:20]
    for bound, power in ((2.0, 0.5), (1.25, 0.25)):
        merged = merge_labels(z, g, rule="half", max_overshoot=bound)
        assert merged.power == pytest.approx(power) and merged.report["capped_share"] == float(bound == 1.25)


# ---- unbiasedness over labellings of a fixed pool


@pytest.mark.parametrize("powers", [(0.6, 0.0), (0.3, 0.3), (0.5, 0.5)])
def test_fixed_powers_of_two_judges_are_unbiased(powers):
    z, g, m = pool(3)
    rng = np.random.default_rng(4)
    losses = []
    for _ in range(1500):
        human = np.where(labelling(rng, 80, 34), z, NAN)
        losses.append(pool_loss(m, estimate(human, g, power=powers)))
    assert mean_loss_test(losses, np.mean(np.logaddexp(0, m) - z * m))


def test_unequal_rates_are_a_bias_so_the_test_above_can_fail():
    z, g, m = pool(3)
    rng, odd = np.random.default_rng(4), np.arange(80) % 2
    m, losses = m + 2 * odd, []
    for _ in range(1500):
        human = np.where(rng.random(80) < np.where(odd == 1, 0.6, 0.25), z, NAN)
        losses.append(pool_loss(m, estimate(human, g, power=(0.3, 0.3))))
    assert not mean_loss_test(losses, np.mean(np.logaddexp(0, m) - z * m), errors=8)


def cross_fitted_losses(draws, count):
    """(losses over labellings, the loss with all human labels) of a pool of 60 pairs."""
    z, g, m = pool(5, n=60)
    rng, losses = np.random.default_rng(6), []
    for draw in range(draws):
        human = np.where(labelling(rng, 60, count), z, NAN)
        losses.append(pool_loss(m, estimate(human, g, rule="cross_fitted", seed=draw, folds=4)))
    return losses, np.mean(np.logaddexp(0, m) - z * m)


@pytest.mark.parametrize("draws", [200, pytest.param(8000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [16, 23])
def test_cross_fitted_powers_are_unbiased(count, draws):
    """Exactly, however few the labels: no label has a part in its own pair's power."""
    assert mean_loss_test(*cross_fitted_losses(draws, count))


@pytest.mark.parametrize("rule", ["plug_in", "half", "minus_se"])
def test_powers_fitted_to_the_same_labels_have_a_bias_far_below_their_noise(rule):
    """Of order 1 / labels, while the noise falls with its root: below a fifth of it at 40 labels (300 draws see a seventeenth)."""
    z, g, m = pool(7, n=160)
    rng = np.random.default_rng(8)
    losses = [pool_loss(m, estimate(np.where(labelling(rng, 160, 40), z, NAN), g, rule=rule)) for _ in range(300)]
    assert abs(np.mean(losses) - np.mean(np.logaddexp(0, m) - z * m)) < 0.2 * np.std(losses)


def test_cross_fitting_uses_no_label_of_the_pairs_own_fold():
    z, g, _ = pool(9, n=100, accuracies=(0.6, 0.3))
    human = np.where(labelling(np.random.default_rng(0), 100, 40), z, NAN)
    made = estimate(human, g[:, 0], rule="cross_fitted", max_overshoot=100.0)
    row = int(np.flatnonzero(~np.isnan(human))[3])
    fold = made.powers.cell == made.powers.cell[row]
    changed = human.copy()
    changed[row] = 1 - changed[row]
    again = estimate(changed, g[:, 0], rule="cross_fitted", max_overshoot=100.0)
    np.testing.assert_array_equal(again.total[fold], made.total[fold])
    assert (again.total[~fold] != made.total[~fold]).all()
    sizes = np.bincount(made.powers.cell[~np.isnan(human)])
    assert sizes.tolist() == [8] * 5 and np.bincount(made.powers.cell).tolist() == [20] * 5
    np.testing.assert_allclose([made.h[made.powers.cell == k].mean() for k in range(5)], 1)


def test_the_interval_of_the_judges_bias_covers():
    """95 % nominal, 1000 samples: within 4 binomial errors (0.7 % each) and the 1 % that a normal interval of 40 labels lacks."""
    rng, hits = np.random.default_rng(13), 0
    code = np.arange(400) % 2
    for _ in range(1000):
        z = (rng.random(400) < 0.5).astype(float)
        g = np.where(rng.random(400) < np.where(code == 0, 0.5, 0.1), 1.0, z)  # leans to image 0 by 0.25 and 0.05
        labelled = rng.permutation(400) < 80
        low, high = judge_bias(z[labelled], g[labelled])["ci"]
        hits += low <= 0.15 <= high
    assert 0.912 <= hits / 1000 <= 0.978


# ---- what Merged carries


def test_what_the_simple_methods_are_merged_from():
    none = merge_labels([1.0, NAN], None, method="human_only")
    assert np.isnan(none.judge).all() and none.powers.tolist() == [0, 0]
    naive = merge_labels([1.0, NAN], [0.3, 0.3], method="naive")
    assert naive.inverse is None and naive.powers is None and naive.judge.tolist() == [0.3, 0.3]


def test_the_mixed_label_of_unused_judges_is_their_mean():
    merged = merge_labels([1.0, NAN], [[0.2, 0.4], [0.6, 1.0]], power=[0, 0])
    np.testing.assert_allclose(merged.judge, [0.3, 0.8])
    np.testing.assert_allclose(merge_labels([1.0, NAN], [[0.2, 0.4], [0.6, 1.0]], power=[0.1, 0.3]).judge, [0.35, 0.9])


@pytest.mark.parametrize("rule", ["plug_in", "half", "minus_se", "cross_fitted"])
def test_every_kind_of_report_is_json_and_every_judge_has_his_sentence(rule):
    z, g, _ = pool(14, n=300)
    human = np.where(labelling(np.random.default_rng(2), 300, 90), z, NAN)
    report = merge_labels(human, g, rule=rule, judges=["clip", "vlm"]).report
    json.dumps(report, allow_nan=False)
    text = " ".join(report["sentences"])
    assert report["rule"] == rule and "Judge clip agrees" in text and "Judge vlm agrees" in text
    assert "judge vlm agrees with people less often than a coin" in text and report["judges"][1]["power"] == 0
    assert ("standard error was taken off" in text) == (rule == "minus_se") and ("(5 folds)" in text) == (rule == "cross_fitted")
    assert ("(rule half)" in text) == (rule == "half")


# ---- messages


@pytest.mark.parametrize(
    ("human", "synthetic", "options", "words"),
    [
        ([1.0], [[1, 1]], {"power": 0.5}, r"power has 1 numbers, but there are 2 judges"),
        ([1.0], [[1, 1]], {"power": [0.6, 0.6]}, r"powers sum to 1\.2"),
        ([1.0], [[1, 1]], {"power": [0.6, -0.1]}, r"power is -0\.1"),
        ([1.0], [[1] * 9], {}, r"9 judges: 8 at most"),
        ([1.0, 1.0], [[1, 1], [1, 1.5]], {}, r"synthetic\[1, 1\] is 1\.5"),
        ([1.0, NAN], [[1, 1], [1, NAN]], {"judges": ["a", "b"]}, r"synthetic\[1, 1\] \(b\) is NaN"),
        ([1.0], [[[1]]], {}, r"synthetic has shape \(1, 1, 1\)"),
        ([1.0], [[1, 1]], {"judges": ["a", "a"]}, r"judges has 1 different names, but there are 2"),
        ([1.0], [1], {"rule": "best"}, r"unknown rule 'best'"),
        ([1.0], [1], {"rule": "minus_se", "method": "dedpo"}, r"'minus_se' chooses a tuned power"),
        ([1.0], [1], {"rule": "cross_fitted", "power": 0.5}, r"'cross_fitted' chooses a tuned power"),
        (
            [1.0, 0.0],
            [1, 1],
            {"rule": "cross_fitted"},
            r"5 folds needs 5 human labels, and there are 2: label more pairs, or use rule plug_in",
        ),
        ([1.0, 0.0], [1, 1], {"rule": "cross_fitted", "folds": 1}, r"folds is 1: cross-fitting needs at least 2"),
    ],
)
def test_errors_name_the_place_and_the_remedy(human, synthetic, options, words):
    with pytest.raises(ValueError, match=words):
        merge_labels(human, synthetic, **options)
