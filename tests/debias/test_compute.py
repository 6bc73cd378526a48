"""The power of a run of finite length: against numeric minimisation, a simulation of visits, and at its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from dedpo_diffusion.debias import Run, hard_power, merge_labels, run_terms


def hard(rng, n=800, labelled=200, accuracy=0.66):
    """Hard answers, a hard judge that is right on exactly this share of the labelled pairs."""
    z = (rng.random(n) < 0.5).astype(float)
    right = np.zeros(n, dtype=bool)
    right[rng.permutation(labelled)[: round(accuracy * labelled)]] = True
    right[labelled:] = rng.random(n - labelled) < accuracy
    return np.where(np.arange(n) < labelled, z, np.nan), np.where(right, z, 1 - z)


def variance(power, a, f, labels, run):
    """J / P of the formula, for hard labels: R / n_l + (kappa - 1) / (S B) (mean |a|)^2, in units of 1/4."""
    ratio = 1 - (1 - f) * (2 * power * (2 * a - 1) - power**2)
    return ratio / labels + run.noise * (1 + 2 * power * (1 - f) * (1 - a)) ** 2


@settings(max_examples=200, deadline=None)
@given(st.floats(0.3, 1), st.floats(0.02, 0.9), st.integers(10, 2000), st.floats(500, 1e6), st.floats(1, 40))
def test_the_closed_form_is_the_least_of_the_formula(a, f, labels, visits, ratio):
    run = Run(visits, ratio)
    found = minimize_scalar(variance, bounds=(0, 1), args=(a, f, labels, run), method="bounded", options={"xatol": 1e-10}).x
    assert hard_power(a, f, labels, run) == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("accuracy", [0.55, 0.66, 0.8, 0.95])
def test_tuned_takes_the_closed_form_for_hard_labels(accuracy):
    human, judge = hard(np.random.default_rng(1), accuracy=accuracy)
    made = merge_labels(human, judge, visits=8000, noise_ratio=8, max_overshoot=100.0)
    assert made.power == pytest.approx(hard_power(accuracy, 0.25, 200, Run(8000, 8)), abs=1e-5)
    assert made.report["run"]["endless_power"] == pytest.approx(2 * accuracy - 1)


def test_the_quickstart_asks_for_about_a_fifth():
    assert hard_power(0.66, 0.25, 200, Run(8000, 8)) == pytest.approx(0.19, abs=0.01)


def test_endless_and_noiseless_runs_take_the_tuned_power_and_short_ones_none():
    human, judge = hard(np.random.default_rng(2))
    soft = 0.5 + 0.35 * (2 * judge - 1)
    for g in (judge, soft):
        tuned = merge_labels(human, g).power
        assert merge_labels(human, g, visits=10**12, noise_ratio=8).power == pytest.approx(tuned, abs=1e-6)
        assert merge_labels(human, g, visits=100, noise_ratio=1).power == pytest.approx(tuned, abs=1e-6)
        powers = [merge_labels(human, g, visits=visits, noise_ratio=8).power for visits in (200, 2000, 20_000, 200_000)]
        assert powers == sorted(powers) and powers[0] == 0
    here = merge_labels(human, judge, visits=8000, noise_ratio=8)
    assert here.report["run"]["effective_human_labels"]["value"] > 200  # no worse than people alone
    assert any("In a run of 8000 visits at noise ratio 8" in text for text in here.report["sentences"])


def test_mean_offset_and_variance_are_those_of_the_targets():
    """J's second term from the targets themselves: a_i = weight (target - 1/2)."""
    rng = np.random.default_rng(3)
    z, g = np.where(rng.random(300) < 0.3, rng.random(300), np.nan), rng.random(300)
    for power in (0.0, 0.3, 1.0):
        made = merge_labels(z, g, method="dedpo", power=power)
        terms = run_terms(z, g, made.inverse, np.full(300, power))
        size = np.mean(np.abs(made.weight * (made.target - 0.5)))
        noisy, calm = (terms.variance(1.0, Run(1000, ratio)) for ratio in (5, 1))
        assert noisy - calm == pytest.approx(4 / 1000 * size**2)


def test_worth_in_a_run_is_the_number_of_labels_of_the_same_variance():
    """Labels alone, n of them: J = s / n + (kappa - 1) / (S B) m^2."""
    human, judge = hard(np.random.default_rng(4), accuracy=0.8)
    run = Run(4000, 8)
    made = merge_labels(human, judge, visits=4000, noise_ratio=8)
    worth = made.report["run"]["effective_human_labels"]
    alone = 0.25 / worth["value"] + run.noise * 0.25
    assert alone == pytest.approx(variance(made.power, 0.8, 0.25, 200, run) / 4, rel=1e-9)
    assert worth["ci"][0] < worth["value"] < worth["ci"][1]
    published = merge_labels(human, judge, method="dedpo", visits=4000, noise_ratio=8)
    assert published.power == 1 and published.report["run"]["effective_human_labels"]["value"] < worth["value"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"visits": 100}, "go together"),
        ({"noise_ratio": 8}, "go together"),
        ({"visits": 0, "noise_ratio": 8}, "at least 1"),
        ({"visits": 100, "noise_ratio": 0.5}, "1 or more"),
        ({"visits": 100, "noise_ratio": float("nan")}, "1 or more"),
        ({"visits": 100, "noise_ratio": 8, "rule": "half"}, "so does rule 'half'"),
        ({"visits": 100, "noise_ratio": 8, "method": "human_only"}, "has none to choose"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        merge_labels([1.0, 0.0, np.nan, np.nan], [0.8, 0.6, 0.3, 0.5], **options)
