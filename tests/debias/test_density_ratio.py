"""Density ratios of labelled and target pairs, and DDPO's correction with them: identities, invariances, a known ratio, a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from dedpo_diffusion.debias import carry_over, estimate_density_ratio, merge_labels, shifted_mean
from dedpo_diffusion.debias.density_ratio import DensityRatio


def two_populations(n: int, target: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labelled (M,) and features (M, 3), of which the first has mean 0 among the labelled and `shift` among the target pairs."""
    rng = np.random.default_rng(seed)
    labelled = np.arange(n + target) < n
    x = rng.normal(size=(n + target, 3))
    x[~labelled, 0] += shift
    return labelled, x


# ---- the ratio


def test_the_ratio_of_two_normal_populations_is_found():
    """log w = shift x - shift^2 / 2 up to a constant."""
    labelled, x = two_populations(400, 1500, 0.7)
    found = estimate_density_ratio(labelled, x)
    slope, _ = np.polyfit(x[labelled, 0], np.log(found.ratio), 1)
    assert slope == pytest.approx(0.7, abs=0.15)
    assert np.corrcoef(x[labelled, 0], np.log(found.ratio))[0, 1] > 0.95
    assert found.ratio.mean() == pytest.approx(1) and found.n_clipped == 0
    assert abs(found.auc["value"] - 0.69) < 0.04  # P(N(0.7, 1) > N(0, 1))
    assert 400 / np.exp(0.49) == pytest.approx(found.effective, rel=0.35)  # E w = 1, E w^2 = e^0.49
    assert found.imbalance[0] > 0.6 and found.imbalance[1] < 0.2


def test_populations_that_are_alike_have_weights_that_are():
    labelled, x = two_populations(200, 800, 0.0)
    found = estimate_density_ratio(labelled, x)
    assert found.effective > 0.95 * 200 and abs(found.auc["value"] - 0.5) < 0.06
    assert found.beyond < 0.02


def test_scales_units_and_features_that_never_differ_are_of_no_matter():
    labelled, x = two_populations(60, 200, 1.0)
    plain = estimate_density_ratio(labelled, x)
    other = estimate_density_ratio(labelled, np.column_stack([x * [100.0, 0.01, 1.0] + [5, -3, 0], np.full(260, 7.0)]))
    np.testing.assert_allclose(other.ratio, plain.ratio, rtol=1e-4)


def test_ratios_are_clipped_and_counted():
    labelled, x = two_populations(300, 1500, 1.5, seed=3)
    free = estimate_density_ratio(labelled, x, bound=1e6)
    tight = estimate_density_ratio(labelled, x, bound=2.0)
    assert tight.n_clipped == int((free.ratio > 2.0).sum()) > 5 > free.n_clipped and tight.bound == 2.0
    assert tight.ratio.mean() == pytest.approx(1) and tight.effective > free.effective
    over = free.ratio > 2.0
    assert np.ptp(tight.ratio[over]) < 1e-12 and tight.ratio[over].min() >= tight.ratio[~over].max()


def test_pairs_of_a_prompt_stay_in_one_fold_and_no_ratio_knows_its_own_fold():
    """A feature that is noise for each prompt, the same for all of its pairs, tells nothing once prompts are kept together."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(60), 10)
    labelled = prompt < 20
    x = rng.normal(size=(60, 20))[prompt]
    apart, kept = (estimate_density_ratio(labelled, x, groups=groups) for groups in (None, prompt))
    assert apart.auc["value"] > 0.7 > 0.6 > kept.auc["value"]


def test_every_labelled_pair_stands_for_itself_and_its_share_of_the_target():
    made = DensityRatio(np.array([0.5, 1.0, 1.5]), {}, 20.0, 0, 2.6, 0.0, (0.0, 0.0), 0)
    np.testing.assert_allclose(made.inverse_propensity(30), [6.0, 11.0, 16.0])


@pytest.mark.parametrize(
    ("labelled", "features", "words"),
    [
        (np.arange(60) < 19, np.random.default_rng(0).normal(size=(60, 2)), "there are 19 labelled pairs"),
        (np.arange(60) < 41, np.random.default_rng(0).normal(size=(60, 2)), "there are 19 target pairs"),
        (np.arange(60) < 30, np.zeros((60, 2)), "nothing that differs between pairs"),
        (np.arange(60) < 30, np.zeros((60, 0)), "nothing that differs between pairs"),
        (np.arange(60) < 30, np.zeros((50, 2)), "must be"),
        (np.arange(60) < 30, np.where(np.arange(120).reshape(60, 2) == 7, np.nan, 0), r"features\[3, 1\] is nan"),
        (np.arange(60) < 30, (np.arange(60) < 30)[:, None] * 10 + np.random.default_rng(0).normal(size=(60, 1)), "do not overlap"),
    ],
)
def test_what_cannot_be_compared_is_refused(labelled, features, words):
    with pytest.raises(ValueError, match=words):
        estimate_density_ratio(labelled, features)


def test_a_bound_below_the_mean_is_refused():
    with pytest.raises(ValueError, match=r"bound is 0\.5"):
        estimate_density_ratio(*two_populations(30, 30, 0.0), bound=0.5)


# ---- what is made of it


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.integers(2, 30), st.integers(0, 1000))
def test_with_equal_ratios_the_mean_is_the_plain_one_and_with_a_perfect_judge_it_is_his(n, target, seed):
    rng = np.random.default_rng(seed)
    judged, difference, ratio = rng.random(target), rng.normal(size=n), rng.random(n) + 0.1
    plain = shifted_mean(judged, difference, np.full(n, 3.0))
    assert plain["value"] == pytest.approx(judged.mean() + difference.mean())
    assert plain["se"] ** 2 == pytest.approx(judged.var(ddof=1) / target + difference.var(ddof=1) / n)
    perfect = shifted_mean(judged, np.zeros(n), ratio)
    assert perfect["value"] == pytest.approx(judged.mean()) and perfect["ci"][0] <= perfect["value"] <= perfect["ci"][1]
    scaled = shifted_mean(judged, difference, 7 * ratio)
    assert scaled["value"] == pytest.approx(shifted_mean(judged, difference, ratio)["value"])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(6, 30), st.integers(0, 1000))
def test_carried_pulls_have_the_sums_of_the_labelled_ones_along_every_direction(k, n, target, seed):
    rng = np.random.default_rng(seed)
    pull, here, there = rng.normal(size=n), rng.normal(size=(n, k)), rng.normal(size=(target, k))
    moved = carry_over(pull, here, there)
    np.testing.assert_allclose(there.T @ moved, here.T @ pull, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(carry_over(pull, -here, -there), moved, rtol=1e-6, atol=1e-8)  # another sign of the directions
    np.testing.assert_allclose(carry_over(-pull, -here, there), moved, rtol=1e-6, atol=1e-8)  # labelled images swapped
    again = np.column_stack([there, there[:, 0]]), np.column_stack([here, here[:, 0]])
    np.testing.assert_allclose(carry_over(pull, again[1], again[0]), moved, rtol=1e-5, atol=1e-8)  # a direction twice


def one_world(seed: int, n: int = 250, target: int = 800) -> tuple[dict[str, float], dict[str, bool]]:
    """Bias of each estimate of the mean of d (label - 1/2) on target pairs, and whether its interval held the truth.

    People heed d (1 + level), the judge d alone; levels are around 0 for labelled pairs and around 1 for target pairs.
    """
    rng = np.random.default_rng(seed)
    labelled = np.arange(n + target) < n
    d, level = rng.normal(size=n + target), rng.normal(size=n + target) + ~labelled
    likely = expit(d * (1 + level))
    z, g = (rng.random(n + target) < likely).astype(float), expit(d)
    big, high = np.random.default_rng(99).normal(size=(2, 200_000))
    truth = float(np.mean(big * (expit(big * (2 + high)) - 0.5)))
    found = estimate_density_ratio(labelled, np.column_stack([level, np.abs(d)]), seed=seed, folds=3)
    judged, difference = (d * (g - 0.5))[~labelled], (d * (z - g))[labelled]
    made = {"plain": shifted_mean(judged, difference, np.ones(n)), "ratio": shifted_mean(judged, difference, found.ratio)}
    human = np.where(labelled, z, np.nan)
    merged = merge_labels(
        human, g, method="dedpo", propensity=np.where(labelled, 1 / (1 + target * np.r_[found.ratio, np.zeros(target)] / n), 1)
    )
    pulled = (merged.weight * (merged.target - 0.5) * d).sum()
    own = (d * (z - 0.5))[labelled].sum()  # a labelled pair stands for itself, too
    assert (pulled - own) / target == pytest.approx(made["ratio"]["value"], rel=1e-9)  # the merge is this very estimate
    return (
        {name: entry["value"] - truth for name, entry in made.items()},
        {name: entry["ci"][0] <= truth <= entry["ci"][1] for name, entry in made.items()},
    )


def test_weighted_merging_is_unbiased_where_plain_merging_is_not():
    """10 worlds; eval/benchmarks/population_simulation.py has 500."""
    biases, held = zip(*(one_world(seed) for seed in range(10)), strict=True)
    mean = {name: np.mean([one[name] for one in biases]) for name in ("plain", "ratio")}
    error = np.std([one["ratio"] for one in biases], ddof=1) / np.sqrt(10)
    assert mean["plain"] < -0.05 and abs(mean["ratio"]) < 3 * error + 0.01
    assert sum(one["plain"] for one in held) <= 3 and sum(one["ratio"] for one in held) >= 7
