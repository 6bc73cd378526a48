"""Labels of another population of pairs: is merging them biased, and what do density ratios make of it? A simulation with a known truth.

    python eval/benchmarks/population_simulation.py --out population_simulation.json

A pair is a vector of differences d and a level u that both images share (how dark a scene is, say). People prefer image 0 with
probability sigmoid(theta . d + kappa u d_1), a judge believes sigmoid(theta . d) and overlooks what u does. Pairs that people labelled
have levels around 0, those that are trained on levels around `shift`: so what people add to the judge is another thing there.

What is estimated is the mean of d_1 (label - 1/2) over the target pairs, which training starts along, and how often the judge agrees with
people on all pairs of the merge. Policies are logistic regressions on d, trained on each arm's targets and weights; their error is the
mean Kullback-Leibler divergence from the true probabilities on fresh target pairs, beyond that of the best policy of this form.
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
from dedpo_diffusion.evaluation.benchmarks.estimator_simulation import fit
from dedpo_diffusion.evaluation.benchmarks.record import write_record

FRESH = 20_000  # target pairs that errors and truths are measured on
FEATURES = 4


@dataclass(frozen=True)
class PopulationSettings:
    """Settings of the simulation.

    Args:
        out: file for the result (JSON).
        seeds: how many.
        labelled: pairs that people labelled, in a seed.
        target: pairs that are trained on.
        shift: mean level of the target pairs; the labelled ones have 0, both the standard deviation 1.
        strength: length of theta.
        kappa: what a level of 1 adds to the first of theta.
        penalty: of the squared length of a policy's parameters, half of it added to the sum of the losses.
    """

    out: Path
    seeds: int = 500
    labelled: int = 400
    target: int = 2000
    shift: float = 1.0
    strength: float = 1.5
    kappa: float = 0.8
    penalty: float = 1.0


@dataclass(frozen=True)
class World:
    """One truth: theta (F,) and kappa."""

    theta: np.ndarray
    kappa: float

    def draw(self, rng: np.random.Generator, n: int, level: float) -> dict[str, np.ndarray]:
        """Pairs: differences d (n, F), levels u, P(image 0 is preferred) p, answers z and the judge's labels g, (n,) each."""
        d, u = rng.normal(size=(n, FEATURES)), level + rng.normal(size=n)
        p = expit(d @ self.theta + self.kappa * u * d[:, 0])
        return {"d": d, "u": u, "p": p, "z": (rng.random(n) < p).astype(float), "g": expit(d @ self.theta)}


def direct(labelled: dict[str, np.ndarray], target: dict[str, np.ndarray], weights: np.ndarray, seed: int) -> np.ndarray:
    """(N,) what a map taught with these weights says of the target pairs, its L2 strength by cross-validation."""
    from dedpo_diffusion.labels.adaptation import Taught, cross_losses, fit_weights

    sample = Taught([labelled["d"]], labelled["z"], weights, np.arange(len(weights)))
    fold = np.random.default_rng((seed, 2)).permutation(len(weights)) % 10
    _, strength = cross_losses(sample, [0], fold)
    return expit(target["d"] @ fit_weights(labelled["d"], labelled["z"], weights, [strength])[0])


def one_seed(settings: PopulationSettings, seed: int) -> dict[str, Any]:
    """Estimates with their intervals, policy errors, and what was true."""
    from dedpo_diffusion.debias import agreement, carry_over, estimate, estimate_density_ratio, shifted_mean

    rng = np.random.default_rng(seed)
    theta = rng.normal(size=FEATURES)
    theta *= settings.strength / np.linalg.norm(theta)
    world = World(theta, settings.kappa)
    a, b = world.draw(rng, settings.labelled, 0.0), world.draw(rng, settings.target, settings.shift)
    fresh, old = world.draw(rng, FRESH, settings.shift), world.draw(rng, FRESH, 0.0)
    even = [np.column_stack([one["u"], np.abs(one["d"]), np.abs(one["g"] - 0.5), rng.normal(size=(len(one["u"]), 2))]) for one in (a, b)]
    labelled = np.arange(len(a["u"]) + len(b["u"])) < len(a["u"])
    found = estimate_density_ratio(labelled, np.concatenate(even), seed=seed)
    ratios = {"plain": np.ones(len(a["u"])), "ratio": found.ratio, "true_ratio": np.exp(settings.shift * a["u"])}
    truth = float(np.mean(fresh["d"][:, 0] * (fresh["p"] - 0.5)))
    means = {name: shifted_mean(b["d"][:, 0] * (b["g"] - 0.5), a["d"][:, 0] * (a["z"] - a["g"]), ratio) for name, ratio in ratios.items()}
    agrees = {name: float(np.mean(np.where(one["g"] > 0.5, one["p"], 1 - one["p"]))) for name, one in (("old", old), ("fresh", fresh))}
    share = settings.labelled / (settings.labelled + settings.target)
    told = {name: agreement(a["z"], a["g"], 1 + settings.target * ratio / ratio.sum()) for name, ratio in ratios.items()}
    predictions = {name: direct(a, b, ratios[name], seed) for name in ("plain", "ratio")}

    # what a policy makes of the targets
    d, g = np.concatenate([a["d"], b["d"]]), np.concatenate([a["g"], b["g"]])
    human = np.concatenate([a["z"], np.full(settings.target, np.nan)])
    best = fit(fresh["d"], fresh["p"], np.ones(FRESH), 1e-6)

    def error(x: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
        def loss(parameters: np.ndarray) -> float:
            m = fresh["d"] @ parameters
            return float(np.mean(np.logaddexp(0, m) - fresh["p"] * m))

        return loss(fit(x, target, weight, settings.penalty)) - loss(best)

    errors = {"judge": error(b["d"], b["g"], np.ones(settings.target))}
    for name in ("plain", "ratio"):
        h = 1 + settings.target * ratios[name] / ratios[name].sum()
        made = estimate(human, g, propensity=np.where(labelled, np.concatenate([1 / h, np.ones(settings.target)]), 1.0))
        errors[f"tuned_{name}"] = error(d, made.target, made.weight)
        errors[f"direct_{name}"] = error(b["d"], predictions[name], np.ones(settings.target))
        power = float(made.total[0])
        pull = (h - 1) * ((a["z"] - 0.5) - power * (a["g"] - 0.5))
        phi = [np.column_stack([one["g"] - 0.5, one["d"]]) for one in (a, b)]
        errors[f"carried_{name}"] = error(b["d"], 0.5 + power * (b["g"] - 0.5) + carry_over(pull, *phi), np.ones(settings.target))
    return {
        "truth": truth, "means": means, "agreement_truth": share * agrees["old"] + (1 - share) * agrees["fresh"], "agreement": told,
        "judge": float(np.mean(b["d"][:, 0] * (b["g"] - 0.5))), "errors": errors, "effective": found.effective, "clipped": found.n_clipped,
        "direct": {name: float(np.mean(b["d"][:, 0] * (p - 0.5))) for name, p in predictions.items()},
    }  # fmt: skip


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its normal 95 % interval."""
    x = np.asarray(values, dtype=np.float64)
    half = 1.96 * float(x.std(ddof=1)) / math.sqrt(len(x))
    return {"value": float(x.mean()), "ci": [float(x.mean()) - half, float(x.mean()) + half], "n": len(x)}


def coverage(entries: Sequence[dict[str, Any]], truths: Sequence[float]) -> dict[str, Any]:
    """Share of the intervals that hold the truth, with Wilson's interval."""
    from dedpo_diffusion.debias import wilson_interval

    hits = sum(entry["ci"][0] <= truth <= entry["ci"][1] for entry, truth in zip(entries, truths, strict=True))
    return {"value": hits / len(truths), "ci": wilson_interval(hits, len(truths)), "n": len(truths)}


def table_of(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bias and coverage of every estimate, and policy errors."""
    truths, agreed = [seed["truth"] for seed in seeds], [seed["agreement_truth"] for seed in seeds]
    found: dict[str, Any] = {"mean": {}, "agreement": {}, "error": {}}
    for name in seeds[0]["means"]:
        entries = [seed["means"][name] for seed in seeds]
        bias = mean_of([entry["value"] - truth for entry, truth in zip(entries, truths, strict=True)])
        found["mean"][name] = {"bias": bias, "se": mean_of([entry["se"] for entry in entries]), "coverage": coverage(entries, truths)}
        told = [seed["agreement"][name] for seed in seeds]
        bias = mean_of([entry["value"] - truth for entry, truth in zip(told, agreed, strict=True)])
        found["agreement"][name] = {"bias": bias, "coverage": coverage(told, agreed)}
    found["mean"]["judge"] = {"bias": mean_of([seed["judge"] - seed["truth"] for seed in seeds])}
    for name in seeds[0]["direct"]:
        found["mean"][f"direct_{name}"] = {"bias": mean_of([seed["direct"][name] - seed["truth"] for seed in seeds])}
    found["error"] = {name: mean_of([seed["errors"][name] for seed in seeds]) for name in seeds[0]["errors"]}
    return found | {"truth": mean_of(truths), "effective": mean_of([seed["effective"] for seed in seeds])}


def run(settings: PopulationSettings) -> None:
    """Simulate merging labels of another population."""
    from rich.console import Console
    from rich.table import Table

    if settings.seeds < 2:
        raise UserError(f"seeds is {settings.seeds}; an interval needs at least 2")
    table = table_of([one_seed(settings, seed) for seed in track(range(settings.seeds), "seeds", settings.seeds)])
    shown = Table("estimate", "bias", "coverage", title=f"mean of d_1 (label - 1/2) on target pairs, {settings.seeds} seeds")
    for name, row in table["mean"].items():
        bias, held = row["bias"], row.get("coverage")
        shown.add_row(name, f"{bias['value']:+.4f} ±{bias['ci'][1] - bias['value']:.4f}", "" if held is None else f"{held['value']:.1%}")
    Console(width=120).print(shown)
    write_record(settings, table)


if __name__ == "__main__":
    raise SystemExit(stage(PopulationSettings, run, None, prog="population_simulation"))
