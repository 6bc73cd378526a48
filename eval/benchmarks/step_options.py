"""What an option of the step is worth: the same trainings with each, at the best strength, paired by seed.

    python eval/benchmarks/step_options.py --work WORK --out eval/results/step_options.json

Everybody's answers to the pairs of a seed, as the study's arm human_100, so that labels are no question. `plain` draws timesteps uniformly
and weighs them alike, as the published scripts do; the others differ from it as OPTIONS says. Every training is kept in WORK when it is
done; start the command once for each core, and the same one again to go on. The result is written when all are done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.record import make_folders, write_record
from dedpo_diffusion.evaluation.benchmarks.study import Block, Cell, StudySettings, cells, open_study
from dedpo_diffusion.evaluation.benchmarks.study_report import at_best, interval, minus
from dedpo_diffusion.evaluation.benchmarks.throughput import hardware

EQUAL = ["--objective.timestep_weighting=equal_noise", "--objective.timestep_pairs=8"]
OPTIONS: dict[str, list[str]] = {
    "plain": ["--objective.timestep_strata=false"],
    "strata": [],
    "output": ["--objective.balance=output"],
    "relative": ["--objective.balance=relative"],
    "adadpo": ["--objective.balance=adadpo"],
    "min_snr": ["--objective.timestep_weighting=min_snr"],
    "noisier-half": ["--objective.timesteps=[500,1000]"],
    "equal_noise": EQUAL,
    "equal_noise-output": [*EQUAL, "--objective.balance=output"],
    "equal_noise-relative": [*EQUAL, "--objective.balance=relative"],
    "equal_noise-adadpo": [*EQUAL, "--objective.balance=adadpo"],
}


@dataclass(frozen=True)
class OptionSettings:
    """Settings of the benchmark.

    Args:
        work: folder for the pool, the cache and what is done.
        out: file for the result (JSON).
        options: which of OPTIONS, plain among them.
        seeds: the first and the last.
        strengths: at which each training is judged.
        pool, pairs, steps, prompts: as in the study.
    """

    work: Path
    out: Path
    options: list[str] = field(default_factory=lambda: list(OPTIONS))
    seeds: tuple[int, int] = (40, 45)
    strengths: tuple[float, ...] = (0.35, 0.6, 1.0, 1.7, 3.0)
    pool: int = 1600
    pairs: int = 800
    steps: int = 150
    prompts: int = 144


def study_of(settings: OptionSettings, name: str) -> StudySettings:
    """The study whose cells are the trainings with one option."""
    blocks = [Block(arms=["human_100"], seeds=settings.seeds)]
    at = settings
    return StudySettings(at.work, blocks, at.pool, at.pairs, at.steps, train=OPTIONS[name], strengths=at.strengths, prompts=at.prompts,
                         image_seeds=1)  # fmt: skip


def wanted(settings: OptionSettings) -> list[tuple[str, Cell, Path]]:
    """Every cell with its option and file, seed by seed; the base's, which no option touches, once."""
    if unknown := [name for name in settings.options if name not in OPTIONS]:
        raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
    if "plain" not in settings.options:
        raise UserError("options lack plain, which the others are compared with")
    found = {name: cells(study_of(settings, name)) for name in settings.options}
    base = found["plain"][0]
    listed = [("plain", base), *((name, found[name][place]) for place in range(1, len(found["plain"])) for name in settings.options)]
    return [(name, cell, settings.work / "cells" / f"{cell.name}.json") for name, cell in listed]


def run(settings: OptionSettings) -> None:
    """Train and judge what is missing, and write the table when nothing is."""
    jobs, study = wanted(settings), None
    make_folders(settings.work)
    with Progress("trainings", len(jobs)) as progress:
        for name, cell, file in jobs:
            if not file.is_file():
                study = study or open_study(study_of(settings, name))
                study.settings = study_of(settings, name)
                study.keep(cell, file)
            progress.advance(note=f"{name}, {cell.arm} seed {cell.seed}")
    missing = sum(not file.is_file() for _, _, file in jobs)
    if missing:
        say(f"{missing} trainings are not done yet: start the same command again, or wait for the other processes")
        return
    write_record(settings, {"hardware": hardware("cpu"), **summarise(jobs)})


def summarise(jobs: list[tuple[str, Cell, Path]]) -> dict[str, Any]:
    """Gains over the base, and what each option's is over plain's and equal_noise's, with intervals over seeds."""
    read = {(name, cell.arm, cell.seed): json.loads(file.read_text(encoding="utf-8")) for name, cell, file in jobs}
    base = at_best(read["plain", "base", 0])
    gains: dict[str, dict[int, float]] = {}
    for (name, arm, seed), lines in read.items():
        if arm != "base":
            gains.setdefault(name, {})[seed] = at_best(lines) - base
    found = {}
    for name, mine in gains.items():
        found[name] = {"train": OPTIONS[name], "gain": interval(list(mine.values())), "minus_plain": minus(mine, gains["plain"])}
        if "equal_noise" in gains:
            found[name]["minus_equal_noise"] = minus(mine, gains["equal_noise"])
        gain = found[name]["gain"]
        say(f"{name}: gain {gain['mean']:+.3f} {gain['ci']}, minus plain {found[name]['minus_plain']}")  # type: ignore[index]
    return {"base_reward": base, "seeds": sorted(gains["plain"]), "options": found}


if __name__ == "__main__":
    raise SystemExit(stage(OptionSettings, run, None, prog="step_options", flags={"options": "options"}))
