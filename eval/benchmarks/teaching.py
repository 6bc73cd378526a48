"""What do a few answers teach a judge? Agreement and log loss on the pairs that nobody answered, on Shapes.

    python eval/benchmarks/teaching.py --work WORK --out teaching.json

Every seed draws pairs of the study's pool and fresh answers; the judge is calibrated by `temperature` and by `adapt`, with the image
statistics. Seeds are other ones than the study's, so that a choice made by this says nothing about those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage, track
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval
from dedpo_diffusion.labels.adaptation import adapt
from dedpo_diffusion.labels.calibration import calibrate, log_losses


@dataclass(frozen=True)
class TeachingSettings:
    """Settings of the comparison.

    Args:
        work: folder of the study, whose pool is used; made if it is not there.
        out: file for the result (JSON).
        judges: of the study.
        shares: of the pairs that people answer.
        people: of the study.
        pool, pairs: pairs proposed once for all seeds, and pairs of a seed.
        seeds: the first and the last.
    """

    work: Path
    out: Path
    judges: list[str] = field(default_factory=lambda: ["clip", "coin"])
    shares: list[float] = field(default_factory=lambda: [0.05])
    people: str = "quickstart"
    pool: int = 1600
    pairs: int = 800
    seeds: tuple[int, int] = (200, 223)


def measure(pool: world.Pool, settings: TeachingSettings, judge: str, share: float, seed: int) -> dict[str, tuple[float, float]]:
    """Agreement and log loss of both calibrations on the unanswered pairs of one seed."""
    sample = world.draw_sample(pool, seed=seed, pairs=settings.pairs, people=settings.people)
    human, difference = sample.human(share), world.judge_answers_of(pool, sample, judge, seed)[1]
    scores, images, prompts = world.known(pool, sample, judge, difference)
    made = {
        "temperature": calibrate(difference, human, groups=prompts, seed=seed).probability,
        "adapt": adapt(scores, [images], human, prompts=prompts, seed=seed).probability,
    }
    others = np.isnan(human)
    z = sample.answer[others]
    return {name: (float(np.mean((p[others] > 0.5) == (z > 0.5))), float(np.mean(log_losses(p[others], z)))) for name, p in made.items()}


def run(settings: TeachingSettings) -> None:
    """All seeds of every judge and share."""
    first, last = settings.seeds
    if last <= first:
        raise UserError(f"seeds {first} to {last}: give the first and the last, two seeds or more")
    pool, cells = world.make_pool(settings.work, settings.pool), []
    for judge in settings.judges:
        for share in settings.shares:
            seeds = track(range(first, last + 1), f"{judge}, {share:.0%}", last + 1 - first)
            found = [measure(pool, settings, judge, share, seed) for seed in seeds]
            cell: dict[str, object] = {"judge": judge, "share": share}
            for name in ("temperature", "adapt"):
                agreement, loss = (np.array([entry[name][place] for entry in found]) for place in (0, 1))
                worst = np.sort(agreement)[: max(1, len(agreement) // 5)].mean()
                cell[name] = {"agreement": seed_interval(agreement).as_dict(), "worst_fifth": float(worst), "log_loss": float(loss.mean())}
                say(f"{judge}, {share:.0%}, {name}: right on {agreement.mean():.3f} (worst fifth {worst:.3f}), log loss {loss.mean():.3f}")
            cells.append(cell)
    write_record(settings, {"cells": cells})


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(TeachingSettings, run, argv, prog="teaching")


if __name__ == "__main__":
    raise SystemExit(main())
