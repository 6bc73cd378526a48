"""How often the intervals of `dedpo compare` hold the truth: a seeded simulation of images clustered by prompt.

    python eval/benchmarks/interval_coverage.py --out eval/results/interval_coverage.json

Every case is drawn 1,000 times: prompts with three images each, or one to eight, whose rows share half of their variance with their prompt.
Beside the interval in use stands the percentile bootstrap on the same resamples. The columns of one call are the replications.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record

REPLICATIONS = 1000
KINDS = ("normal", "heavy tails", "skewed", "wins 0.5", "wins 0.75", "wins 0.95", "ties")


@dataclass(frozen=True)
class CoverageSettings:
    """Settings of the simulation.

    Args:
        out: file for the result (JSON).
        prompts: numbers of prompts.
        resamples: of each bootstrap.
    """

    out: Path
    prompts: list[int] = field(default_factory=lambda: [3, 10, 25, 50, 144, 500])
    resamples: int = 2000


def rows_of(rng: np.random.Generator, prompts: int, equal: bool) -> np.ndarray:
    """(N,) the prompt of each row: three images a prompt, or one to eight."""
    return np.repeat(np.arange(prompts), 3 if equal else rng.choice([1, 2, 3, 8], prompts))


def draw(rng: np.random.Generator, kind: str, clusters: np.ndarray) -> tuple[np.ndarray, float]:
    """(N, 1000) values whose rows share half of their variance with their prompt, and their true mean; `kind` is one of KINDS."""
    prompts, shape = int(clusters.max()) + 1, (len(clusters), REPLICATIONS)
    if kind == "normal":
        return rng.normal(size=(prompts, REPLICATIONS))[clusters] + rng.normal(size=shape), 0.0
    if kind == "heavy tails":  # Student's t of three degrees of freedom has no fourth moment
        return rng.standard_t(3, (prompts, REPLICATIONS))[clusters] + rng.standard_t(3, shape), 0.0
    if kind == "skewed":  # log-normal
        return np.exp(rng.normal(size=(prompts, REPLICATIONS)))[clusters] + rng.normal(size=shape), float(np.exp(0.5))
    if kind == "ties":  # 70 % ties, and the images of a prompt all alike
        return rng.choice([0.0, 0.5, 1.0], (prompts, REPLICATIONS), p=[0.15, 0.7, 0.15])[clusters], 0.5
    rate = float(kind.removeprefix("wins "))
    each = rng.beta(4 * rate, 4 * (1 - rate), (prompts, REPLICATIONS))[clusters]
    return (rng.random(shape) < each).astype(float), rate


def case(kind: str, prompts: int, equal: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Values (N, 1000), clusters (N,) and the true mean of one case; its seed follows from the case."""
    rng = np.random.default_rng((prompts, equal, len(kind)))
    clusters = rows_of(rng, prompts, equal)
    values, truth = draw(rng, kind, clusters)
    return values, clusters, truth


def coverage(kind: str, prompts: int, equal: bool, resamples: int = 2000) -> float:
    """The share of replications whose interval holds the truth."""
    from dedpo_diffusion.evaluation.comparison.intervals import estimates

    values, clusters, truth = case(kind, prompts, equal)
    found = estimates(values, clusters, resamples=resamples)
    interval = found.rate if kind.startswith(("wins", "ties")) else found.interval
    return float(np.mean([not interval(k).excludes(truth) for k in range(REPLICATIONS)]))


def percentile_coverage(kind: str, prompts: int, equal: bool, resamples: int = 2000) -> float:
    """The same for the plain percentile bootstrap over prompts."""
    values, clusters, truth = case(kind, prompts, equal)
    count = np.bincount(clusters).astype(np.float64)
    sums = np.stack([np.bincount(clusters, column) for column in values.T], axis=1)
    drawn = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
    low, high = np.quantile((drawn @ sums) / (drawn @ count)[:, None], [0.025, 0.975], axis=0)
    return float(np.mean((low <= truth) & (truth <= high)))


def run(settings: CoverageSettings) -> None:
    """Simulate how often intervals hold the truth."""
    from rich.console import Console
    from rich.table import Table

    from dedpo_diffusion.debias import wilson_interval

    cases = [(kind, prompts, equal) for kind in KINDS for prompts in settings.prompts for equal in (True, False)]
    found: list[dict[str, Any]] = []
    table = Table("values", "prompts", "images a prompt", "in use (95 %)", "percentiles", title=f"{REPLICATIONS} replications a case")
    for kind, prompts, equal in track(cases, "simulating", len(cases)):
        share = coverage(kind, prompts, equal, settings.resamples)
        ends = wilson_interval(round(share * REPLICATIONS), REPLICATIONS)
        plain = percentile_coverage(kind, prompts, equal, settings.resamples)
        found.append({"values": kind, "prompts": prompts, "equal": equal, "coverage": {"value": share, "ci": ends}, "percentile": plain})
        words = f"{share:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"
        table.add_row(kind, str(prompts), "3" if equal else "1 to 8", words, f"{plain:.1%}")
    Console(width=120).print(table)
    write_record(settings, {"cases": found})


if __name__ == "__main__":
    raise SystemExit(stage(CoverageSettings, run, None, prog="interval_coverage"))
