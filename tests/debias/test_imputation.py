"""Method adapted: its two ends, worked numbers, what the correction answers to, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.debias import answer_weight, hard_targets, james_stein, merge_labels, odd_directions


def sample(rng, n=400, labelled=60, lean=0.0):
    """Preferences eta, answers z of `labelled` pairs, and a map p that errs along a feature by `lean` in log-odds."""
    x, y = rng.normal(size=n), rng.normal(size=n)
    eta = 1 / (1 + np.exp(-(x + lean * y)))
    z = (rng.random(n) < eta).astype(float)
    human = np.where(np.isin(np.arange(n), rng.permutation(n)[:labelled]), z, np.nan)
    return human, 1 / (1 + np.exp(-x)), y[:, None], eta


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 999))
def test_the_two_ends_are_dedpo_and_naive_merging(n, labelled, seed):
    rng = np.random.default_rng(seed)
    p, z = rng.random(n), np.where(np.arange(n) < labelled, (rng.random(n) < 0.5).astype(float), np.nan)
    share = (~np.isnan(z)).mean()
    published, corrected = merge_labels(z, p, method="dedpo"), merge_labels(z, p, method="adapted", correction=1.0)
    np.testing.assert_array_equal(corrected.predicted, published.target)
    for c in (0.0, share):
        imputed = merge_labels(z, p, method="adapted", correction=c)
        np.testing.assert_allclose(imputed.predicted, merge_labels(z, p, method="naive").target, rtol=0, atol=1e-15)


def test_four_pairs_by_hand():
    """p = .8, .6, .3, .5 and answers z = 1, 0 of the first two: f = 1/2, h = 2.

    c = 3/4 stretches by s = c h = 3/2:    .8 + 1.5 (.2) = 1.1      .6 + 1.5 (-.6) = -.3      .3      .5
    The judge's direction p - 1/2 is .3, .1, -.2, 0: mean square (.09 + .01 + .04) / 4 = .035, so phi = (.3, .1) / sqrt(.035).
    Pulls (z - p) phi = (.06, -.06) / sqrt(.035), mean 0: |B|^2 = 0, and the labels ask for c = 0: 1, 0, .3, .5.
    With z = 1, 1: pulls (.06, .04) / sqrt(.035), B = .05 / sqrt(.035), |B|^2 = .0025 / .035;
    V = (.01^2 + .01^2) / (2 * 1) / .035 = .0001 / .035, c = 1 - .0001 / .0025 = .96, s = 1.92 under the bound of 2:
    .8 + 1.92 (.2) = 1.184      .6 + 1.92 (.4) = 1.368
    """
    p, none = [0.8, 0.6, 0.3, 0.5], [np.nan, np.nan]
    by_hand = merge_labels([1, 0, *none], p, method="adapted", correction=0.75)
    np.testing.assert_allclose(by_hand.predicted, [1.1, -0.3, 0.3, 0.5], atol=1e-12)
    still = merge_labels([1, 0, *none], p, method="adapted")
    np.testing.assert_allclose(still.predicted, [1, 0, 0.3, 0.5], atol=1e-12)
    moved = merge_labels([1, 1, *none], p, method="adapted")
    report = moved.report["correction"]
    assert report["wanted"] == pytest.approx(0.96) and report["c"] == pytest.approx(0.96) and not report["capped"]
    assert (report["bias"], report["noise"]) == (pytest.approx(0.0025 / 0.035), pytest.approx(0.0001 / 0.035))
    np.testing.assert_allclose(moved.predicted, [1.184, 1.368, 0.3, 0.5], atol=1e-12)
    pulls = np.array([0.684, 0.868, -0.2, 0])
    np.testing.assert_allclose(moved.target, [1, 1, 0, 0.5])
    np.testing.assert_allclose(moved.weight, 4 * np.abs(pulls) / 1.752)
    assert moved.report["mean_abs_offset"] == pytest.approx(0.5) and moved.report["labelled_weight"] == pytest.approx(1.552 / 1.752)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=12))
def test_confidence_moves_into_the_weight_and_every_pull_stays(values):
    t = np.array(values)
    target, weight = hard_targets(t)
    if (t == 0.5).all():
        assert (target == 0.5).all() and (weight == 1).all()
        return
    assert weight.mean() == pytest.approx(1) and (weight >= 0).all()
    pull = weight * (target - 0.5)
    unit = pull[np.argmax(np.abs(t - 0.5))] / (t - 0.5)[np.argmax(np.abs(t - 0.5))]
    assert unit > 0
    np.testing.assert_allclose(pull, unit * (t - 0.5), atol=1e-12)
    assert np.isin(target[t != 0.5], (0, 1)).all() and (target[t == 0.5] == 0.5).all()
    flipped = hard_targets(1 - t)
    np.testing.assert_allclose(flipped[0], 1 - target, atol=1e-15)
    np.testing.assert_allclose(flipped[1], weight)


def test_a_map_that_knows_nothing_leaves_the_answers_alone_and_a_sure_one_all_pairs():
    z = np.array([1.0, 0.0, np.nan, np.nan, np.nan])
    blind, alone = merge_labels(z, np.full(5, 0.5), method="adapted"), merge_labels(z, None, method="human_only")
    np.testing.assert_allclose(blind.weight, alone.weight)
    np.testing.assert_array_equal(blind.target[:2], alone.target[:2])
    sure = merge_labels(z, [1.0, 0.0, 1.0, 1.0, 0.0], method="adapted")
    np.testing.assert_array_equal(sure.target, [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(sure.weight, np.ones(5))


def test_swapped_images_flip_targets_and_leave_the_correction():
    rng = np.random.default_rng(0)
    human, p, y, _ = sample(rng, lean=1.0)
    turn = rng.random(len(p)) < 0.5
    one = merge_labels(human, p, method="adapted", features=y, max_overshoot=10.0)
    other = merge_labels(
        np.where(turn, 1 - human, human),
        np.where(turn, 1 - p, p),
        method="adapted",
        features=np.where(turn[:, None], -y, y),
        max_overshoot=10.0,
    )
    assert one.report["correction"]["c"] == pytest.approx(other.report["correction"]["c"], rel=1e-9) and one.report["correction"]["c"] > 0
    np.testing.assert_allclose(other.target, np.where(turn, 1 - one.target, one.target), atol=1e-9)


@pytest.mark.slow
def test_a_systematic_error_is_corrected_and_none_is_not():
    """Over draws: without an error the factor is mostly small; with one along a known feature it is near 1; unseen features find less."""
    found = {}
    for name, lean, seen in (("none", 0.0, True), ("along", 1.5, True), ("unseen", 1.5, False)):
        drawn = []
        for seed in range(40):
            human, p, y, _ = sample(np.random.default_rng(seed), labelled=120, lean=lean)
            drawn.append(merge_labels(human, p, method="adapted", features=y if seen else None).report["correction"]["wanted"])
        found[name] = np.mean(drawn)
    assert found["none"] < 0.45 and found["along"] > 0.85 and found["unseen"] < found["along"] - 0.2


def test_the_factor_is_the_best_shrinkage():
    """|B|^2 - V estimates the squared true mean without bias, for any direction."""
    rng, values = np.random.default_rng(1), []
    for _ in range(3000):
        residual, phi = 0.2 + rng.normal(size=20), np.ones((20, 1))
        _, bias, noise = james_stein(residual, np.ones(20), phi)
        values.append(bias - noise)
    assert np.mean(values) == pytest.approx(0.04, abs=4 * np.std(values) / np.sqrt(3000))


def test_no_target_is_stretched_beyond_the_bound_unless_asked():
    human, p, y, _ = sample(np.random.default_rng(3), lean=2.0)
    held = merge_labels(human, p, method="adapted", features=y)
    rows = ~np.isnan(human)
    assert held.report["correction"]["capped"]
    np.testing.assert_allclose((held.predicted - p)[rows], 2 * (human - p)[rows], atol=1e-9)
    assert np.isnan(held.power)
    asked = merge_labels(human, p, method="adapted", features=y, correction=0.8)
    np.testing.assert_allclose((asked.predicted - p)[rows], 0.8 / rows.mean() * (human - p)[rows], atol=1e-9)
    assert any("held back" in text for text in held.report["sentences"])


@pytest.mark.slow
def test_c_1_is_unbiased_for_a_judge_that_errs():
    """Over labellings, the mean target of a pair is its eta whatever p, as DeDPO's; imputation keeps the map's error."""
    n, rng = 40, np.random.default_rng(5)
    eta, p = rng.random(n), rng.random(n)
    mean = {0.0: np.zeros(n), 1.0: np.zeros(n)}
    for _ in range(4000):
        z = (rng.random(n) < eta).astype(float)
        human = np.where(np.isin(np.arange(n), rng.permutation(n)[:10]), z, np.nan)
        for c in mean:
            mean[c] += merge_labels_quick(human, p, c) / 4000
    assert np.abs(mean[1.0] - eta).max() < 0.15 and np.abs(mean[1.0] - eta).mean() < 0.03
    np.testing.assert_allclose(mean[0.0], p + 0.25 * (eta - p), atol=0.03)


def merge_labels_quick(human, p, c):
    from dedpo_diffusion.debias import estimate

    return estimate(human, p, method="adapted", correction=c).predicted


def test_an_answer_counts_as_far_as_its_noise_allows():
    """tau^2 / (tau^2 + sigma^2): people who always agree keep their answers; ones whose noise is all there is leave the map."""
    rng = np.random.default_rng(0)
    tau, n = 0.2, 200_000
    p = rng.uniform(0.3, 0.7, n)
    eta = np.clip(p + rng.choice([-tau, tau], n), 0, 1)
    z = (rng.random(n) < eta).astype(float)
    agree = float(np.mean(eta**2 + (1 - eta) ** 2))
    keep = answer_weight(z, p, agree)
    best = np.polyfit(z - p, eta - p, 1)[0]  # the least squares prediction of eta itself
    assert keep == pytest.approx(tau**2 / (tau**2 + np.mean(eta * (1 - eta))), abs=0.01) and keep == pytest.approx(best, abs=0.01)
    assert answer_weight(z, p, 1.0) == 1 and answer_weight(z, p, None) == 1 and answer_weight(z, p, 0.5) == 0
    human = np.where(np.arange(n) < n // 4, z, np.nan)
    made = merge_labels(human, p, method="adapted", rater_agreement=agree, correction=0.0)
    rows = ~np.isnan(human)
    ratio = (made.predicted - p)[rows] / (human - p)[rows]
    assert np.ptp(ratio) < 1e-9 and ratio[0] == pytest.approx(keep, abs=0.02)


def test_unequal_propensities_keep_labels_in_place_and_correct_by_them():
    human, p, _, _ = sample(np.random.default_rng(8), labelled=100)
    propensity = np.random.default_rng(9).uniform(0.1, 0.9, len(p))
    rows = ~np.isnan(human)
    kept = merge_labels(human, p, method="adapted", correction=0.0, propensity=propensity)
    np.testing.assert_array_equal(kept.predicted[rows], human[rows])
    full = merge_labels(human, p, method="adapted", correction=1.0, propensity=propensity)
    published = merge_labels(human, p, method="dedpo", propensity=propensity)
    far = published.inverse[rows] >= 1
    np.testing.assert_allclose(full.predicted[rows][far], (p + published.inverse * (human - p))[rows][far], atol=1e-9)


def test_directions_have_unit_size_and_none_is_empty():
    p, y = np.array([0.9, 0.2, 0.5]), np.array([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    found = odd_directions(p, y)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(np.mean(found**2, axis=0), 1)
    assert odd_directions(np.full(3, 0.5), None).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tuned", "correction": 0.5}, "belongs to method 'adapted'"),
        ({"method": "naive", "features": np.zeros((4, 1))}, "belongs to method 'adapted'"),
        ({"correction": 1.5}, "must lie in"),
        ({"rater_agreement": 0.4}, "from 0.5"),
        ({"features": np.zeros((3, 2))}, "must be"),
        ({"features": [[0.0], [np.nan], [0.0], [0.0]]}, r"features\[1, 0\] is nan"),
        ({"power": 0.5}, "takes no power"),
        ({"rule": "half"}, "chooses a tuned power"),
        ({"visits": 100, "noise_ratio": 8}, "has none to choose"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        merge_labels([1.0, 0.0, np.nan, np.nan], [0.8, 0.6, 0.3, 0.5], **{"method": "adapted", **options})


def test_a_judge_must_answer_every_pair_and_single_answers_be_single():
    with pytest.raises(ValueError, match="needs a judge label for every pair"):
        merge_labels([1.0, np.nan], [0.8, np.nan], method="adapted")
    with pytest.raises(ValueError, match="shares of several"):
        merge_labels([0.7, np.nan], [0.8, 0.2], method="adapted", rater_agreement=0.8)
