"""The estimator against others': whole gradients, ppi_py, and the coverage of what is reported."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dedpo_diffusion.debias import estimate, fit_power, merge_labels

NAN = math.nan


def judge_of(rng, z, accuracy):
    return np.where(rng.random(len(z)) < accuracy, z, 1 - z)


def linear_pairs(rng, n, strength=0.0, d=5):
    x = rng.normal(size=(n, d))
    return x, (rng.random(n) < 1 / (1 + np.exp(-strength * x[:, 0]))).astype(float)


# ---- whole gradients


def exact_power(gradients: np.ndarray, margins: np.ndarray, z: np.ndarray, g: np.ndarray, *, hessian: np.ndarray | None = None) -> float:
    """lam* = tr(H^-1 Cov(grad loss_z, grad loss_g) H^-1) / tr(H^-1 Cov(grad loss_g) H^-1), not clipped.

    It minimises the total variance of the parameters that minimise the loss, for labels taken at random.

    Args:
        gradients: (n, d) gradient of each labelled pair's margin by the parameters.
        margins: (n,).
        z, g: (n,) human and judge labels.
        hessian: (d, d) of the mean loss; None takes the mean of sigmoid'(m) x x', exact for a margin linear in the parameters
            and in any case the same for every label.

    Raises:
        ValueError: the judge's gradients do not vary, so that no power is better than another.
    """
    p = 1 / (1 + np.exp(-margins))
    if hessian is None:
        hessian = gradients.T @ (gradients * (p * (1 - p))[:, None]) / len(gradients)
    moves = np.linalg.solve(hessian, gradients.T).T  # per pair H^-1 x
    human, judge = ((p - label)[:, None] * moves for label in (z, g))
    human, judge = human - human.mean(axis=0), judge - judge.mean(axis=0)
    below = float(np.sum(judge * judge))
    if below == 0:
        raise ValueError("the judge's gradients are all alike: no power is better than another")
    return float(np.sum(human * judge)) / below


def test_the_power_from_whole_gradients_at_margin_0_is_that_from_labels():
    """Accuracy 0.8: both are 0.6. Their difference over 100 samples: within 4 standard errors of 0."""
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        x, z = linear_pairs(rng, 400)
        g = judge_of(rng, z, 0.8)
        found.append([exact_power(x, np.zeros(400), z, g), fit_power(z, g, np.full(400, 4.0))[0]])
    exact, labels = np.array(found).T
    assert np.mean(exact) == pytest.approx(0.6, abs=4 * np.std(exact) / 10)
    assert abs(np.mean(exact - labels)) < 4 * np.std(exact - labels, ddof=1) / 10


def test_with_strong_margins_the_power_from_labels_is_too_large():
    """What MATH calls halving: a judge that repeats the majority's answer knows nothing beyond the margin."""
    rng = np.random.default_rng(1)
    x, z = linear_pairs(rng, 20000, strength=3.0)
    g = judge_of(rng, (x[:, 0] > 0).astype(float), 0.9)
    exact, labels = exact_power(x, 3 * x[:, 0], z, g), fit_power(z, g, np.full(len(z), 4.0))[0]
    assert exact < 0.5 * labels


def test_the_exact_power_minimises_the_variance_of_the_fitted_parameters():
    """One Newton step from the truth, over labellings and pools: the total variance at lam* is below that at lam* -+ 0.3."""
    rng, d, n, n_l = np.random.default_rng(2), 4, 400, 100
    theta = np.array([1.5, 0, 0, 0])
    big, z = linear_pairs(rng, 20000, 1.5, d)
    lam = exact_power(big, big @ theta, z, judge_of(rng, z, 0.8))
    p = 1 / (1 + np.exp(-(big @ theta)))
    hessian = big.T @ (big * (p * (1 - p))[:, None]) / len(big)
    moves = {power: [] for power in (lam - 0.3, lam, lam + 0.3)}
    for _ in range(2000):
        x, z = linear_pairs(rng, n, 1.5, d)
        g, p = judge_of(rng, z, 0.8), 1 / (1 + np.exp(-1.5 * x[:, 0]))
        human = np.where(np.arange(n) < n_l, z, NAN)
        for power, found in moves.items():
            made = estimate(human, g, power=power)
            found.append(np.linalg.solve(hessian, x.T @ (made.weight * (made.target - p)) / n))
    totals = {power: np.var(found, axis=0).sum() for power, found in moves.items()}
    assert totals[lam] < totals[lam - 0.3] and totals[lam] < totals[lam + 0.3]


def test_the_exact_power_refuses_a_judge_that_says_nothing():
    x = np.ones((4, 1))
    with pytest.raises(ValueError, match="no power is better"):
        exact_power(x, np.zeros(4), np.array([0, 1, 0, 1.0]), np.full(4, 0.5))


# ---- ppi_py, on the mean of the human labels


def mean_pool(rng, n=4000, n_l=1000, accuracy=0.8):
    z = (rng.random(n) < 0.5).astype(float)
    return z[:n_l], judge_of(rng, z, accuracy), np.where(np.arange(n) < n_l, z, NAN)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 0.3, 0.7, 1.0])
def test_the_mean_target_is_ppi_pys_mean(power):
    """mean(weight target) estimates the mean label. ppi_py's judge mean leaves the labelled pairs out: its power is lam (1 - f)."""
    ppi = pytest.importorskip("ppi_py")
    y, g, human = mean_pool(np.random.default_rng(3))
    made = estimate(human, g, power=power)
    other = ppi.ppi_mean_pointestimate(y, g[:1000], g[1000:], lam=power * 0.75)
    assert np.mean(made.weight * made.target) == pytest.approx(float(np.squeeze(other)), abs=1e-12)


@pytest.mark.slow
def test_the_tuned_power_and_mean_are_ppi_pys():
    """It centres its moments and pools the judge's variance: both change the power by order 1 / sqrt(n), far below its error."""
    ppi = pytest.importorskip("ppi_py")
    rng, found = np.random.default_rng(4), []
    for _ in range(50):
        y, g, human = mean_pool(rng)
        made = estimate(human, g, max_overshoot=100.0)
        interval = ppi.ppi_mean_ci(y, g[:1000], g[1000:], alpha=0.05)
        point = float(np.squeeze(ppi.ppi_mean_pointestimate(y, g[:1000], g[1000:])))
        width = float(np.squeeze(interval[1]) - np.squeeze(interval[0]))
        found.append([np.mean(made.weight * made.target) - point, width])
    difference, width = np.array(found).T
    assert np.abs(difference).max() < 0.02 * width.mean()
    worth = merge_labels(human, g, max_overshoot=100.0).report["effective_human_labels"]["value"]
    alone = 2 * 1.96 * math.sqrt(0.25 / 1000)
    assert 1000 * (alone / width[-1]) ** 2 == pytest.approx(worth, rel=0.05)  # the interval's narrowing is the worth


# ---- the simulation


def test_in_the_simulation_a_perfect_judge_is_as_good_as_people(tmp_path, capsys):
    from dedpo_diffusion.evaluation.benchmarks.estimator_simulation import ARMS, SimulationSettings, run

    run(SimulationSettings(tmp_path / "s.json", seeds=3, pairs=200, human=50, features=3))
    judges = json.loads((tmp_path / "s.json").read_text())["judges"]
    perfect = judges["perfect"]["relative_error"]
    assert perfect["naive"]["value"] == pytest.approx(perfect["human_100"]["value"], rel=1e-6)
    assert perfect["power_1"]["value"] == pytest.approx(perfect["human_100"]["value"], rel=1e-6)
    assert all(list(judge["relative_error"]) == list(ARMS) for judge in judges.values()) and len(judges) == 6
    assert "3 seeds" in capsys.readouterr().out


# ---- coverage over 1000 replications


def worth_at(c, v, powers, share):
    """Labels that one label is worth, from E rho_z rho_k / E rho_z^2 and E rho_j rho_k / E rho_z^2 of hard labels."""
    return 1 / (1 - (1 - share) * (2 * c @ powers - powers @ v @ powers))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "dedpo"}, {"power": 0.5}, {}, {"rule": "minus_se"}, {"rule": "cross_fitted"}])
def test_the_interval_of_effective_labels_covers_for_one_judge(options):
    """Worth of the powers that were used, fitted or not; 100 labels of 400 pairs; 4 binomial errors of 0.7 % around 95 %."""
    rng, hits = np.random.default_rng(5), 0
    for seed in range(1000):
        z = (rng.random(400) < 0.5).astype(float)
        merged = merge_labels(np.where(np.arange(400) < 100, z, NAN), judge_of(rng, z, 0.8), seed=seed, **options)
        worth = 100 * worth_at(np.array([0.6]), np.ones((1, 1)), np.array([merged.power]), 0.25)
        low, high = merged.report["effective_human_labels"]["ci"]
        hits += low <= worth <= high
    assert 0.922 <= hits / 1000 <= 0.978


@pytest.mark.slow
def test_the_interval_of_effective_labels_covers_for_two_judges():
    """200 labels of 800 pairs, accuracies .8 and .75 with independent errors.

    Told by powers fitted to other pairs: on their own labels tuned powers look better than they are.
    """
    rng, hits = np.random.default_rng(6), 0
    c, v = np.array([0.6, 0.5]), np.array([[1, 0.3], [0.3, 1]])
    for seed in range(1000):
        z = (rng.random(800) < 0.5).astype(float)
        g = np.stack([judge_of(rng, z, 0.8), judge_of(rng, z, 0.75)], axis=1)
        merged = merge_labels(np.where(np.arange(800) < 200, z, NAN), g, seed=seed)
        powers = np.array([entry["power"] for entry in merged.report["judges"]])
        low, high = merged.report["effective_human_labels"]["ci"]
        hits += low <= 200 * worth_at(c, v, powers, 0.25) <= high
    assert 0.922 <= hits / 1000 <= 0.978
