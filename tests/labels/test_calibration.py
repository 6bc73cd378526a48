"""Calibration: symmetries first, then that no label judges itself, then unbiasedness by simulation, then worked numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from dedpo_diffusion.debias import agreement, merge_labels
from dedpo_diffusion.labels.calibration import (
    PRIOR_SD,
    assign_folds,
    calibrate,
    calibration_error,
    fit_linear,
    fit_map,
    judge_sign,
    score_agreement,
)

METHODS = ("temperature", "stack")
SOLVED = 1e-6  # relative; the gradient of the mean loss is at most 1e-12 or as small as rounding lets it be


def answers(seed=0, n=120, slopes=(0.5, 0.3), spread=3.0, soft=False):
    """Differences (n, J) and human labels drawn from sigmoid(differences @ slopes)."""
    rng = np.random.default_rng(seed)
    d = rng.normal(0, spread, (n, len(slopes)))
    p = expit(d @ np.array(slopes))
    return d, (rng.choice([0.0, 0.25, 0.5, 1.0], n) if soft else (rng.random(n) < p).astype(float))


def columns(method, d):
    return d if method == "stack" else d[:, :1]


def partly(z, labelled, seed=0):
    """The labels of a random part of the pairs, NaN elsewhere."""
    human = np.full(len(z), np.nan)
    rows = np.random.default_rng(seed).permutation(len(z))[:labelled]
    human[rows] = z[rows]
    return human


# ---- symmetries


@st.composite
def labelled_pairs(draw):
    """(n, 2) differences with equal and zero ones among them, labels with ties, positive weights."""
    n = draw(st.integers(4, 30))
    values = st.one_of(st.integers(-3, 3).map(float), st.floats(-5, 5).filter(lambda x: x == 0 or abs(x) > 1e-3))
    d = np.array(draw(st.lists(st.tuples(values, values), min_size=n, max_size=n)))
    z = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 0.7, 1.0]), min_size=n, max_size=n)))
    return d, z, np.array(draw(st.lists(st.floats(0.2, 5), min_size=n, max_size=n)))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(labelled_pairs())
def test_swapped_images_give_the_opposite_probability(method, pairs):
    d, z, w = pairs
    fitted = fit_map(columns(method, d), z, weights=w)
    at = columns(method, np.linspace([-9, 7], [9, -7], 41))
    np.testing.assert_array_equal(fitted.log_odds(-at), -fitted.log_odds(at))
    np.testing.assert_allclose(fitted(-at), 1 - fitted(at), atol=1e-15)
    swapped = fit_map(-columns(method, d), 1 - z, weights=w)
    np.testing.assert_allclose(swapped(at), fitted(at), rtol=SOLVED, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(labelled_pairs())
def test_probabilities_rise_with_the_difference_and_never_mean_certainty(method, pairs):
    """Beyond a logit of 37 a sigmoid rounds to 1, so its log-odds are looked at."""
    d, z, w = pairs
    fitted = fit_map(columns(method, d), z, weights=w)
    at = columns(method, np.linspace([-6, -6], [6, 6], 101))
    p = fitted(at)
    assert (np.diff(p) >= 0).all() and p[50] == 0.5
    assert (p >= 0).all() and (p <= 1).all() and np.isfinite(fitted.log_odds(at)).all()


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_other_units_of_the_scores_change_no_probability(factor):
    d, z = answers()
    one, other = fit_linear(d, z), fit_linear(factor * d, z)
    np.testing.assert_allclose(np.array(other.slopes) * factor, one.slopes, rtol=SOLVED)


def test_the_unit_of_the_weights_does_not_matter_and_a_weight_of_2_is_the_pair_twice():
    d, z = answers()
    w = np.ones(len(z))
    w[:30] = 2
    twice = np.concatenate([np.arange(len(z)), np.arange(30)])
    at = np.linspace(-5, 5, 31)
    np.testing.assert_allclose(fit_linear(d[:, 0], z, weights=w)(at), fit_linear(d[:, 0], z, weights=100 * w)(at), rtol=SOLVED)
    # the prior counts against the number of pairs, which is 150 in the second fit: hence its weight is scaled
    a, b = fit_linear(d[:, 0], z, weights=w), fit_linear(d[twice, 0], z[twice])
    np.testing.assert_allclose(a.slopes, b.slopes, rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_pairs_and_judges_does_not_matter(method):
    d, z = answers(n=150)
    human, groups = partly(z, 70), [f"prompt {i % 40}" for i in range(150)]
    found = calibrate(columns(method, d), human, method=method, groups=groups)
    order = np.random.default_rng(1).permutation(150)
    again = calibrate(columns(method, d)[order][:, ::-1], human[order], method=method, groups=[groups[i] for i in order])
    np.testing.assert_allclose(again.probability, found.probability[order], rtol=SOLVED)
    np.testing.assert_array_equal(again.fold, found.fold[order])


# ---- no label judges itself


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grouped", [True, False])
def test_the_labels_of_a_fold_never_touch_the_fold(method, grouped):
    d, z = answers(n=150)
    human = partly(z, 60)
    groups = [f"prompt {i % 50}" for i in range(150)] if grouped else None
    before = calibrate(columns(method, d), human, method=method, groups=groups)
    for k in range(5):
        inside = before.fold == k
        after = calibrate(columns(method, d), np.where(inside, 1 - human, human), method=method, groups=groups)
        np.testing.assert_array_equal(after.probability[inside], before.probability[inside])
        assert not np.allclose(after.probability[~inside], before.probability[~inside], atol=1e-6)


def test_who_gets_which_map():
    """Pairs of a labelled prompt get its fold's map, labelled or not; those of other prompts the mean of all maps."""
    d, z = answers(n=100)
    human, groups = partly(z, 40), [f"prompt {i // 2}" for i in range(100)]
    found = calibrate(d[:, 0], human, groups=groups)
    each = np.stack([expit(fitted["slopes"][0] * d[:, 0]) for fitted in found.report["fold_maps"]])
    known = {groups[i]: found.fold[i] for i in np.flatnonzero(~np.isnan(human))}
    assert 0 < (found.fold == -1).sum() < 60
    for i in range(100):
        assert found.fold[i] == known.get(groups[i], -1)
        expected = each[found.fold[i], i] if groups[i] in known else each[:, i].mean()
        assert found.probability[i] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(calibrate(d[:, 0], human).fold >= 0, ~np.isnan(human))


def test_folds_keep_groups_together_and_are_of_like_size():
    rng = np.random.default_rng(0)
    groups = [f"prompt {k}" for k in rng.integers(0, 40, 300)]
    fold = assign_folds(groups, 5, seed=3)
    assert all(len(set(fold[[g == name for g in groups]])) == 1 for name in set(groups))
    sizes = np.bincount(fold, minlength=5)
    assert np.ptp(sizes) <= max(groups.count(name) for name in groups)
    np.testing.assert_array_equal(assign_folds(groups, 5, seed=3), fold)
    assert (assign_folds(groups, 5, seed=4) != fold).any()
    order = rng.permutation(300)
    np.testing.assert_array_equal(assign_folds([groups[i] for i in order], 5, seed=3), fold[order])
    alone = assign_folds([str(i) for i in range(103)], 5, seed=0)
    assert sorted(np.bincount(alone)) == [20, 20, 21, 21, 21]
    few = assign_folds(["a", "b"] * 6, 4, seed=0)  # two prompts for four folds
    assert list(np.bincount(few)) == [3, 3, 3, 3]


# ---- by simulation


@pytest.mark.slow
def test_merging_cross_fitted_labels_is_unbiased_and_labels_that_saw_themselves_are_not():
    """The mean of weight * target, weighted by a function of the pair, against that with a judge that learned nothing.

    Merging with such a judge is unbiased, and over the same draws; so the difference must be 0 within 4 standard errors.
    People see something (x) that the judges do not, so that no map is right.
    """
    errors: dict[str, list[float]] = {"cross-fitted": [], "in sample": []}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        d, x = rng.normal(0, 3, (48, 2)), rng.normal(0, 1, 48)
        z = (rng.random(48) < expit(d @ [0.3, 0.2] + 1.5 * x)).astype(float)
        human = partly(z, 12, seed)
        found = calibrate(d, human, method="stack", folds=3, groups=[str(i // 2) for i in range(48)], seed=seed)
        known = merge_labels(human, expit(d @ [0.25, 0.2]), method="dedpo")
        in_sample = expit(d @ np.array(found.report["map"]["slopes"]))
        for how, labels in (("cross-fitted", found.probability), ("in sample", in_sample)):
            merged = merge_labels(human, labels, method="dedpo")
            moved = merged.weight * merged.target - known.weight * known.target
            errors[how].append(np.mean((np.tanh(d[:, 0]) + 2 * x) * moved))
    t = {how: np.mean(e) / np.std(e, ddof=1) * math.sqrt(len(e)) for how, e in errors.items()}
    assert abs(t["cross-fitted"]) < 4
    assert abs(t["in sample"]) > 5


def test_a_calibrated_judge_keeps_its_temperature_within_monte_carlo_error():
    """Standardised by Fisher's information, the slopes of 60 draws are standard normal, up to the prior and 1 / n."""
    scores = []
    for seed in range(60):
        d, z = answers(seed, n=2000, slopes=(1.0,), spread=2.0)
        information = np.sum(d[:, 0] ** 2 * expit(d[:, 0]) * expit(-d[:, 0]))
        scores.append((fit_linear(d, z).slopes[0] - 1) * math.sqrt(information))
    assert abs(np.mean(scores)) < 4 / math.sqrt(60)
    assert 0.6 < np.std(scores) < 1.4


def test_a_stack_beats_the_better_judge_in_held_out_log_loss():
    """Ten seeds: two judges that see different halves of what people see; Student's paired interval over seeds."""
    gains = []
    for seed in range(10):
        d, z = answers(seed, n=400, slopes=(0.5, 0.4))
        human = partly(z, 120, seed)
        fresh = np.isnan(human)

        def loss(method, used, human=human, fresh=fresh, z=z):
            p = calibrate(used, human, method=method).probability[fresh]
            return -np.mean(np.log(np.where(z[fresh] == 1, p, 1 - p)))

        gains.append(loss("stack", d) - min(loss("temperature", d[:, [j]]) for j in range(2)))
    assert np.mean(gains) + stats.t.ppf(0.975, 9) * np.std(gains, ddof=1) / math.sqrt(10) < 0


# ---- known values


def test_the_temperature_is_the_best_of_a_grid():
    d, z = answers(n=80, soft=True, slopes=(0.6,))
    z = np.where(d[:, 0] > 0, np.maximum(z, 0.5), np.minimum(z, 0.5))  # so that its slope is positive
    unit = math.sqrt(np.mean(d**2))

    def loss(slope):
        return np.mean(np.logaddexp(0, slope * d[:, 0]) - z * slope * d[:, 0]) + (slope * unit / PRIOR_SD) ** 2 / 2 / len(z)

    grid = np.exp(np.linspace(math.log(0.01), math.log(10), 20001))
    best = grid[np.argmin([loss(slope) for slope in grid])]
    assert fit_linear(d, z).slopes[0] == pytest.approx(best, rel=5e-4)  # the grid's step is 3.5e-4


def test_the_stack_is_the_ridge_regression_of_a_library_where_no_weight_would_be_negative():
    from sklearn.linear_model import LogisticRegression

    d, z = answers(n=200)
    found = fit_linear(d, z)
    known = LogisticRegression(C=PRIOR_SD**2, fit_intercept=False, tol=1e-12, max_iter=1000).fit(d / found.spreads, z)
    np.testing.assert_allclose(np.array(found.slopes) * found.spreads, known.coef_[0], rtol=1e-5)


def test_separable_answers_keep_a_finite_slope():
    d = np.array([1.0, 2.0, -1.0, -3.0])
    p = fit_linear(d, (d > 0).astype(float))(d)
    assert (np.abs(p - 0.5) < 0.5).all() and (np.abs(p - 0.5) > 0.3).all()


def test_calibration_error_by_hand():
    """Twenty sure pairs (0.9), of which people confirm 15, and twenty half-sure ones (0.6), of which they confirm 12: 0.15 / 2."""
    p = np.repeat([0.9, 0.1, 0.6], [10, 10, 20])
    z = np.concatenate([np.arange(10) < 8, np.arange(10) >= 7, np.arange(20) < 12]).astype(float)
    found = calibration_error(p, z, bins=2)
    assert found["value"] == pytest.approx(0.075)
    assert found["by_chance"] == pytest.approx(math.sqrt(2 / math.pi) * (math.sqrt(20 * 0.09) + math.sqrt(20 * 0.24)) / 40)


def test_chance_alone_shows_about_the_calibration_error_that_is_told():
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        p = rng.random(300)
        found.append(calibration_error(p, (rng.random(300) < p).astype(float)))
    assert np.mean([f["value"] for f in found]) == pytest.approx(np.mean([f["by_chance"] for f in found]), rel=0.1)


# ---- judges that cannot be trusted


@pytest.mark.parametrize("method", METHODS)
def test_a_judge_below_half_is_undecided_and_turned_round_only_on_request(method):
    d, z = answers(n=150)
    human = partly(z, 80)
    contrary = columns(method, d) * ([1, -1] if method == "stack" else [-1])
    left = calibrate(contrary, human, method=method)
    last = left.report["judges"][-1]
    assert last["below_half"] and last["agreement"]["value"] < 0.5
    assert last["used"] == "undecided" and set(last["folds_used"]) == {"undecided"}
    assert any("less often than a coin" in sentence and "undecided" in sentence for sentence in left.report["sentences"])
    if method == "stack":
        slopes = left.report["map"]["slopes"]
        assert slopes[0] > 0 and slopes[1] == 0
    else:
        np.testing.assert_array_equal(left.probability, np.full(150, 0.5))
    turned = calibrate(contrary, human, method=method, invert=True)
    assert turned.report["judges"][-1]["used"] == "inverted"
    assert any("as you asked, it counts the other way round" in sentence for sentence in turned.report["sentences"])
    np.testing.assert_allclose(turned.probability, calibrate(columns(method, d), human, method=method).probability, rtol=SOLVED)


def four_pairs(differences, labels):
    """Pairs of four kinds, 30 of each; the folds hold all kinds."""
    return np.tile(differences, 30).astype(float), np.tile(labels, 30).astype(float)


def test_weights_decide_whether_a_judge_is_below_half():
    """Of five pairs a judge is right on two, which stand for many more: 10 / 13 = 77 % of the weight, 40 % of the pairs."""
    d, z = four_pairs([1, -1, 1, 1, -1], [1, 0, 0, 0, 1])
    w = np.tile([5.0, 5.0, 1.0, 1.0, 1.0], 30)
    assert (judge_sign(d, z), judge_sign(d, z, weights=w), judge_sign(d, z, weights=w, invert=True)) == (0, 1, 1)
    found = calibrate(d, z, weights=w)
    judge = found.report["judges"][0]
    assert judge["used"] == "as it is" and judge["agreement"]["value"] == pytest.approx(10 / 13) and judge["agreement"]["n"] == 150
    assert found.report["weighted"] and any("weighted by the stored propensities" in text for text in found.report["sentences"])
    assert not calibrate(d, z).report["weighted"]


def test_a_judge_is_turned_round_only_if_it_is_below_half_and_its_slope_is_negative():
    mostly_right, mostly_wrong = four_pairs([1, 1, 1, 5, 5], [1, 1, 1, 0, 0]), four_pairs([1, 1, 1, 5, 5], [0, 0, 0, 1, 1])
    for (d, z), words in ((mostly_right, "does not predict their answers"), (mostly_wrong, "it does not run the other way")):
        assert judge_sign(d, z) == judge_sign(d, z, invert=True) == 0
        for invert in (False, True):
            sentence = calibrate(d, z, invert=invert).report["sentences"][0]
            assert words in sentence and "use invert" not in sentence and "as you asked" not in sentence
    d, z = four_pairs([1, 1, 1, 5, 5], [0, 0, 1, 0, 0])
    assert judge_sign(d, z) == 0 and judge_sign(d, z, invert=True) == -1


def test_a_judge_turned_round_that_adds_nothing_is_said_to_and_has_slope_0():
    d, z = answers(n=2000, slopes=(0.5,))
    d = np.stack([d[:, 0], -0.05 * np.sign(d[:, 0]) * np.abs(np.random.default_rng(1).normal(0, 1, 2000))], axis=1)
    report = calibrate(d, z, method="stack", invert=True).report
    slope = report["map"]["slopes"][1]
    assert slope == 0 and not np.signbit(slope) and report["judges"][1]["backwards"]
    assert any("turned round as you asked, it adds nothing to the other judges" in text for text in report["sentences"])


def test_agreement_with_equal_weights_is_that_of_the_merge():
    d, z = answers(n=90, soft=True)
    d[:9] = 0
    found, known = score_agreement(d[:, 0], z, np.full(90, 3.0)), agreement(z, 0.5 + 0.5 * np.sign(d[:, 0]))
    assert found == known | {"value": pytest.approx(known["value"]), "ci": pytest.approx(known["ci"])}


def test_judges_that_say_nothing_are_undecided():
    _, z = answers()
    assert judge_sign(np.zeros(120), z) == 0 and judge_sign(np.ones(120), np.full(120, 0.5)) == 0
    found = calibrate(np.zeros((120, 1)), z)
    np.testing.assert_array_equal(found.probability, np.full(120, 0.5))
    assert "no pair is decided by both" in found.report["sentences"][0]


def test_a_judge_that_repeats_another_with_noise_adds_nothing_and_no_weight_is_negative():
    d, z = answers(n=4000, slopes=(0.5,))
    noisy = d[:, 0] + np.random.default_rng(5).normal(0, 3, 4000)
    for flip in (1, -1):  # alone, the noisy judge agrees with people; given the first, its slope is 0, whatever its sign by chance
        slopes = fit_linear(np.stack([d[:, 0], noisy], axis=1), z if flip == 1 else np.where(noisy * d[:, 0] < 0, d[:, 0] > 0, z)).slopes
        assert min(slopes) >= 0 and slopes[1] < 0.05 * slopes[0]


# ---- the report and what is refused


@pytest.mark.parametrize("method", METHODS)
def test_the_report_counts_and_is_ready_for_json(method):
    d, z = answers(n=150)
    d[3:9, 0] = np.nan
    human = partly(z, 80)
    human[:5], human[20] = [0.5, 1, 1, 1, 0], 0.5
    found = calibrate(columns(method, d), human, method=method, groups=[f"prompt {i % 50}" for i in range(150)])
    np.testing.assert_array_equal(np.isnan(found.probability), np.isnan(d[:, 0]))
    report = json.loads(json.dumps(found.report, allow_nan=False))
    assert (report["n"], report["n_missing"]) == (150, 6)
    assert report["n_human"] == (~np.isnan(human[~np.isnan(d[:, 0])])).sum()
    assert report["n_human_missing"] == (~np.isnan(human[3:9])).sum()
    assert len(report["differences"]) == len(report["judges"]) and len(report["fold_maps"]) == 5
    low, high = report["differences"][0]["ci"]
    assert low < report["differences"][0]["value"] < high
    assert report["sentences"][-1].startswith("6 pairs lack the answer of a judge")


def test_the_log_losses_are_held_out():
    d, z = answers(n=150)
    human = partly(z, 80)
    labelled = ~np.isnan(human)
    found = calibrate(d[:, 0], human, own=np.full((150, 1), 0.6))
    p = found.probability[labelled]
    loss = -np.mean(np.log(np.where(z[labelled] == 1, p, 1 - p)))
    before = -np.mean(np.log(np.where(z[labelled] == 1, 0.6, 0.4)))
    assert found.report["log_loss"]["value"] == pytest.approx(loss)
    assert found.report["judges"][0]["log_loss"]["value"] == pytest.approx(before)
    assert found.report["differences"][0]["value"] == pytest.approx(loss - before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"human": partly(answers()[1], 9)}, "9 pairs have a human label .* 5 folds need 10: have more pairs answered, or use fewer folds"),
        ({"folds": 1}, "give 2 or more"),
        ({"method": "platt"}, "use one of temperature, stack"),
        ({"method": "stack"}, "takes two or more judges, not 1"),
        ({"differences": answers()[0]}, "takes one judge, not 2"),
        ({"differences": np.full((120, 1), np.inf)}, "pair 0 is infinite"),
        ({"human": np.full(120, 1.5)}, "outside"),
        ({"weights": np.zeros(120)}, "not positive"),
        ({"groups": ["a"]}, "give"),
    ],
)
def test_what_cannot_be_used_is_refused(change, message):
    d, z = answers()
    with pytest.raises(ValueError, match=message):
        calibrate(**({"differences": d[:, :1], "human": z} | change))
