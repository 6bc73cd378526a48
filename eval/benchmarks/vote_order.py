"""Which pairs should people answer first: any, or those that the judge doubts? Measured at the same number of answers.

    python eval/benchmarks/vote_order.py --pairs PAIRS --judge pickscore --out vote_order.json

PAIRS are pairs of Shapes, where the probability of every human answer is known. Many times over, answers are drawn for all
pairs, some of them are asked in the order of `dedpo vote`, and labels are merged as `dedpo merge` does, with the stored
propensities. What counts is the noise of the gradient at margin 0: the mean over pairs of the squared deviation of
a pair's coefficient, h rho_z + lam (1 - h) rho_g, from its expectation over answers, 0.5 - P.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record


@dataclass(frozen=True)
class OrderSettings:
    """Settings of the comparison.

    Args:
        pairs: a pair dataset of Shapes.
        out: file for the result (JSON).
        judge: name of the judge's label file.
        answers: how many pairs people answer.
        floors: the least pull of a pair that the judge is sure of, one order each; 1 is the random order.
        draws: repetitions.
        seed: seed of every draw.
    """

    pairs: Path
    out: Path
    judge: str
    answers: int = 200
    floors: list[float] = field(default_factory=lambda: [1.0, 0.7, 0.5, 0.2])
    draws: int = 1000
    seed: int = 0


def one_draw(z: np.ndarray, g: np.ndarray, weight: np.ndarray, rng: np.random.Generator, answers: int, method: str) -> np.ndarray:
    """(N,) coefficients after `answers` answers in the order of these weights; all-equal weights are the random order."""
    from dedpo_diffusion.debias import merge_labels

    key = rng.random(len(z)) / weight
    order = np.argsort(key)
    asked = order[:answers]
    human = np.full(len(z), np.nan)
    human[asked] = z[asked]
    even = bool(np.all(weight == weight[0]))
    propensity = None if even else np.minimum(1.0, weight * key[order[answers]])
    merged = merge_labels(human, g, method=method, propensity=propensity)
    return merged.weight * (0.5 - merged.target)


def measure(settings: OrderSettings, p: np.ndarray, g: np.ndarray) -> list[dict[str, Any]]:
    """Noise and bias of every order and method, and the noise relative to human labels alone in random order."""
    from dedpo_diffusion.voting.plan import disagreement, pull

    rng = np.random.default_rng(settings.seed)
    doubt = disagreement(g[None])
    arms = [(floor, method) for floor in settings.floors for method in ("human_only", "tuned")]
    noise: dict[Any, list[float]] = {arm: [] for arm in arms}
    mean = {arm: np.zeros(len(p)) for arm in arms}
    for _ in track(range(settings.draws), "drawing", settings.draws):
        z = (rng.random(len(p)) < p).astype(np.float64)
        for floor, method in arms:
            coefficients = one_draw(z, g, pull(doubt, floor), rng, settings.answers, method)
            noise[floor, method].append(float(np.mean((coefficients - (0.5 - p)) ** 2)))
            mean[floor, method] += coefficients / settings.draws
    base = np.array(noise[1.0, "human_only"])
    lines = []
    for arm in arms:
        found = np.array(noise[arm])
        ratios = [found[pick].mean() / base[pick].mean() for pick in rng.integers(len(base), size=(1000, len(base)))]
        low, high = np.quantile(ratios, [0.025, 0.975])
        bias = float(np.corrcoef(mean[arm], 0.5 - p)[0, 1])
        lines.append({"floor": arm[0], "method": arm[1], "noise_ratio": float(found.mean() / base.mean()), "ci": [float(low), float(high)],
                      "correlation_of_the_mean_with_the_truth": bias})  # fmt: skip
    return lines


def run(settings: OrderSettings) -> None:
    """Compare orders of asking at the same number of answers."""
    from dedpo_diffusion.labels.files import align, read_labels
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.shapes.oracle import preference
    from dedpo_diffusion.shapes.people import true_rewards

    reader = PairReader(settings.pairs)
    ids = reader.ids()
    if not 0 < settings.answers < len(ids):
        raise UserError(f"answers is {settings.answers}, and must lie between 1 and {len(ids) - 1}")
    if 1.0 not in settings.floors:
        raise UserError("floors must hold 1.0, the random order, which the others are compared with")
    g = align(read_labels(settings.pairs, settings.judge), ids, folder=settings.pairs, name=settings.judge, complete=True)
    p = preference(*true_rewards(reader, np.arange(len(reader))).T)
    sure = float(np.mean(np.where(g > 0.5, p, 1 - p)))
    lines = measure(settings, p, g)
    for line in lines:
        say(f"floor {line['floor']}, {line['method']}: noise {line['noise_ratio']:.3f} ({line['ci'][0]:.3f} to {line['ci'][1]:.3f})")
    doubt = float(np.mean(1 - np.abs(2 * g - 1)))
    write_record(settings, {"pairs": len(ids), "judge_agrees": sure, "mean_doubt": doubt, "orders": lines})


if __name__ == "__main__":
    raise SystemExit(stage(OrderSettings, run, None, prog="vote_order"))
