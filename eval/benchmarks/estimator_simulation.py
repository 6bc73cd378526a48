"""Which way of merging labels trains best, by judge? A simulation in which the truth is known.

    python eval/benchmarks/estimator_simulation.py --out estimator_simulation.json

A pair is a vector of independent normal features x, and people prefer image 0 with probability sigmoid(x . theta). Every seed
draws theta's direction, its pairs, the people's answers to all of them, and six judges; a few pairs show their answer. The
policy is logistic regression with a small penalty, trained on each arm's targets and weights; its error is the mean
Kullback-Leibler divergence of its probabilities from the true ones, on fresh pairs, divided by that of training on the
few human labels alone. Below 1 is better than the human labels alone.

Dimension, strength and penalty are free; a coarse search chose them so that the estimators differ clearly with every judge. The
true margins are wide (standard deviation 2.4), where a power fitted at margin 0 is too high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from dedpo_diffusion.core.console import UserError, stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record

ARMS = ("human_100", "naive", "power_1", "tuned", "half", "minus_se", "cross_fitted")
FRESH = 4000  # pairs that the error is measured on


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of the simulation.

    Args:
        out: file for the result (JSON).
        seeds: how many.
        pairs: pairs of a seed.
        human: how many of them show the human answer.
        features: dimension of x.
        strength: length of theta, the standard deviation of the true margin.
        penalty: of the squared length of the fitted parameters, half of it added to the sum of the losses.
        max_overshoot: of the tuned powers.
    """

    out: Path
    seeds: int = 300
    pairs: int = 1000
    human: int = 250
    features: int = 18
    strength: float = 2.4
    penalty: float = 5.0
    max_overshoot: float = 2.0


def draw_judges(rng: np.random.Generator, x: np.ndarray, p: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
    """Hard labels (n,) of six judges, for pairs x (n, d) with P(image 0 is preferred) p and answers z."""

    def agreeing(with_: np.ndarray, share: float) -> np.ndarray:
        return np.where(rng.random(len(z)) < share, with_, 1 - with_)

    majority = (p > 0.5).astype(float)
    answers = float(np.maximum(p, 1 - p).mean())  # how often the majority's answer is given
    taste = x @ rng.normal(size=x.shape[1])
    strong = np.abs(taste) > np.quantile(np.abs(taste), 0.6)  # there it follows its taste, which is right half of the time
    return {
        "biased, 80 % agreement": np.where(strong, (taste > 0).astype(float), z),
        "80 %, errors at random against the human answer": agreeing(z, 0.8),
        "80 %, errors at random against the majority answer": agreeing(majority, min(1.0, (0.8 - (1 - answers)) / (2 * answers - 1))),
        "coin flip": agreeing(z, 0.5),
        "perfect": z,
        "adversarial (30 %)": agreeing(z, 0.3),
    }


def fit(x: np.ndarray, target: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """theta (d,) with the least sum of weight softplus(m) - weight target m, plus the penalty, by Newton's method.

    Raises:
        RuntimeError: no convergence.
    """

    def loss(theta: np.ndarray) -> float:
        m = x @ theta
        return float(np.sum(weight * (np.logaddexp(0, m) - target * m)) + penalty / 2 * theta @ theta)

    theta = np.zeros(x.shape[1])
    for _ in range(200):
        p = expit(x @ theta)
        gradient = x.T @ (weight * (p - target)) + penalty * theta
        if np.abs(gradient).max() < 1e-6:
            return theta
        hessian = (x.T * (weight * p * (1 - p))) @ x + penalty * np.eye(len(theta))
        step, length, here = np.linalg.solve(hessian, gradient), 1.0, loss(theta)
        while loss(theta - length * step) > here and length > 1e-6:
            length /= 2
        theta = theta - length * step
    raise RuntimeError(f"Newton's method did not converge: gradient {np.abs(gradient).max():.2g}")


def arms_of(settings: SimulationSettings, human: np.ndarray, judge: np.ndarray, seed: int) -> dict[str, Any]:
    """Targets, weights and powers of every arm that uses the judge."""
    from dedpo_diffusion.debias import estimate

    common = {"max_overshoot": settings.max_overshoot, "seed": seed}
    tuned = estimate(human, judge, **common)
    return {
        "naive": estimate(human, judge, method="naive"),
        "power_1": estimate(human, judge, method="dedpo"),
        "tuned": tuned,
        "half": estimate(human, judge, power=float(tuned.total[0]) / 2),
        "minus_se": estimate(human, judge, rule="minus_se", **common),
        "cross_fitted": estimate(human, judge, rule="cross_fitted", **common),
    }


def one_seed(settings: SimulationSettings, seed: int) -> dict[str, Any]:
    """Error of every judge's every arm, and of the human labels alone."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=settings.features)
    theta *= settings.strength / np.linalg.norm(theta)
    x, fresh = rng.normal(size=(settings.pairs, settings.features)), rng.normal(size=(FRESH, settings.features))
    p = expit(x @ theta)
    z = (rng.random(settings.pairs) < p).astype(float)
    human = np.where(np.arange(settings.pairs) < settings.human, z, np.nan)  # the pairs are in no order
    true = fresh @ theta

    def error(target: np.ndarray, weight: np.ndarray) -> float:
        m = fresh @ fit(x, target, weight, settings.penalty)
        return float(np.mean(np.logaddexp(0, m) - np.logaddexp(0, true) - expit(true) * (m - true)))

    labelled, every = ~np.isnan(human), np.ones(settings.pairs)
    base = error(np.where(labelled, z, 0.5), labelled * settings.pairs / settings.human)
    full, judges = error(z, every), {}
    for name, judge in draw_judges(rng, x, p, z).items():
        made = arms_of(settings, human, judge, seed)
        errors = {arm: error(one.target, one.weight) for arm, one in made.items()}
        judges[name] = {
            "error": {"human_100": full} | errors,
            "agreement": float((judge == z).mean()),
            "power": float(made["tuned"].total[0]),
        }
    return {"seed": seed, "human_few": base, "judges": judges}


def relative(errors: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Mean error over mean base, with the delta method's 95 % interval over seeds, and the share of seeds that lose."""
    from scipy.stats import t

    e, b = np.array(errors), np.array(base)
    ratio = float(e.mean() / b.mean())
    half = float(t.ppf(0.975, len(e) - 1) * np.std(e - ratio * b, ddof=1) / math.sqrt(len(e)) / b.mean())
    return {"value": ratio, "ci": [ratio - half, ratio + half], "seeds_worse": float((e > b).mean()), "n": len(e)}


def table_of(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors relative to human labels alone, by judge and arm."""
    base = [seed["human_few"] for seed in seeds]
    table = {}
    for judge in seeds[0]["judges"]:
        own = [seed["judges"][judge] for seed in seeds]
        means = {key: float(np.mean([one[key] for one in own])) for key in ("agreement", "power")}
        table[judge] = means | {"relative_error": {arm: relative([one["error"][arm] for one in own], base) for arm in ARMS}}
    return table


def run(settings: SimulationSettings) -> None:
    """Simulate training on merged labels of six judges."""
    from rich.console import Console
    from rich.table import Table

    if settings.seeds < 2:
        raise UserError(f"seeds is {settings.seeds}; an interval needs at least 2")
    if not 20 <= settings.human < settings.pairs:
        raise UserError(f"human is {settings.human} of {settings.pairs} pairs; give at least 20, and fewer than there are pairs")
    seeds = [one_seed(settings, seed) for seed in track(range(settings.seeds), "seeds", settings.seeds)]
    table = table_of(seeds)
    shown = Table("judge", *ARMS, title=f"error relative to {settings.human} human labels alone, {settings.seeds} seeds")
    for judge, row in table.items():
        shown.add_row(judge, *(f"{(one := row['relative_error'][arm])['value']:.2f} ±{one['ci'][1] - one['value']:.2f}" for arm in ARMS))
    Console(width=180).print(shown)
    write_record(settings, {"judges": table})


if __name__ == "__main__":
    raise SystemExit(stage(SimulationSettings, run, None, prog="estimator_simulation"))
