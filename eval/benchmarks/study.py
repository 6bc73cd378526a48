"""Which way of merging loses least, whatever the judge: arms compared at their best strength against the truth on Shapes.

    python eval/benchmarks/study.py --config configs/study/main.yaml --work WORK --report eval/results/regret --minutes 300

One cell is one LoRA trained by `dedpo train` with pairs, human answers and first weights all from the cell's seed, judged by the oracle
at several strengths. The same seed gives every arm the same pairs, answers, weights and noises, so differences between arms are paired.
Methods that make the same targets of a seed share one training.
All seeds draw from one pool, and two share about half of their pairs if it is twice a seed's. Start the command several times to share
the cells among processes; a stopped study goes on, from the cells in WORK or those in the report's results.parquet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.debias import Merged
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import call, make_folders


@dataclass(frozen=True)
class Block:
    """Cells, every combination of these: `people` label `shares` of the pairs, `judges` the rest; `seeds` are the first and the last."""

    arms: list[str] = field(default_factory=lambda: list(world.ARMS[1:]))
    judges: list[str] = field(default_factory=lambda: ["clip"])
    shares: list[float] = field(default_factory=lambda: [0.05])
    people: list[str] = field(default_factory=lambda: ["quickstart"])
    seeds: tuple[int, int] = (0, 9)


@dataclass(frozen=True)
class StudySettings:
    """Settings of the study.

    Args:
        work: folder for the pool, the cache and the cells.
        blocks: which cells, in the order in which they are done; the report's figure is of the first one's first judge and share.
        pool, pairs: pairs proposed once for all seeds, and pairs of a seed.
        steps, draws: of training, and pre-drawn noises of each pair (data.reference_draws).
        train: further options of `dedpo train`, such as --objective.balance=none; the rest is the quickstart's, but that all
            timesteps weigh alike where these do not say otherwise.
        looks: further steps after which a training is judged, multiples of the first of them; the last step always is.
        strengths: of the LoRA, at which each training is judged.
        prompts, image_seeds: prompts that a policy is judged by, and images of each.
        minutes: no cell is begun after so many; None goes on until all are done.
        report: folder for parquet, tables and figure, written at the end of every run; None writes none.
    """

    work: Path
    blocks: list[Block]
    pool: int = 1600
    pairs: int = 800
    steps: int = 150
    draws: int = 16
    train: list[str] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    strengths: tuple[float, ...] = (0.7, 1.0, 1.5, 2.0, 3.0)
    prompts: int = 144
    image_seeds: int = 2
    minutes: float | None = None
    report: Path | None = None


CONFIG = files("dedpo_diffusion.configs") / "shapes_lora.yaml"
ALIKE = ["--objective.timestep_weighting", "none"]  # not as in the recipe, unless a study says otherwise
SHARED = [entry.name for entry in fields(StudySettings) if entry.name not in ("work", "blocks", "minutes", "report")]


@dataclass(frozen=True)
class Cell:
    """One training; `of` are the settings that all cells of a study share, by name, as JSON."""

    arm: str
    judge: str
    share: float
    people: str
    seed: int
    of: str

    @property
    def name(self) -> str:
        """16 hexadecimal digits over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


KEYS = [entry.name for entry in fields(Cell)]
KNOWN = (world.ARMS[1:], world.JUDGES, world.PEOPLE)


def cells(settings: StudySettings) -> list[Cell]:
    """Every cell once, the base's first, seed by seed within a block, so that a study stopped early has whole arms of fewer seeds."""
    at = settings.strengths
    if not at or len(set(at)) < len(at) or min(at) <= 0 or settings.prompts < 2 or settings.pairs > settings.pool:
        raise UserError("give different strengths above 0, 2 prompts or more, and no more pairs than the pool has")
    looks = settings.looks
    if looks != sorted(looks) or any(not 0 < step < settings.steps or step % looks[0] for step in looks):
        raise UserError(f"looks {looks}: give rising steps below {settings.steps}, all multiples of the first")
    of = json.dumps({name: value for name in SHARED if (value := getattr(settings, name)) != []})
    found: dict[Cell, None] = {Cell("base", "none", 0.0, "none", 0, of): None}
    for block in settings.blocks:
        for what, given, known in zip(("arm", "judge", "people"), (block.arms, block.judges, block.people), KNOWN, strict=True):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise UserError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
        if not all(0 < share <= 1 for share in block.shares):
            raise UserError(f"shares {block.shares}: give numbers above 0 and up to 1")
        seeds = range(block.seeds[0], block.seeds[1] + 1)
        for seed, people, share, judge, arm in itertools.product(seeds, block.people, block.shares, block.judges, block.arms):
            _, of_judge, of_share, whose = world.placed(arm, judge, share, people)
            found[Cell(arm, of_judge, of_share, whose, seed, of)] = None
    return list(found)


def run_name(cell: Cell, rows: np.ndarray, merged: Merged) -> str:
    """64 hexadecimal digits over all that a training follows from: where a judge counts for nothing, methods have one training."""
    given = [rows, merged.target, merged.weight]
    if merged.report["method"] == "adapted" and (np.isnan(merged.human) & (merged.weight > 0)).any():  # training shares out the visits
        given += [merged.human, merged.judge]
    told = json.dumps([cell.of, cell.seed, len(given)]).encode()
    return hashlib.sha256(told + b"".join(np.ascontiguousarray(values, dtype=np.float64).tobytes() for values in given)).hexdigest()


class Study:
    """Does cells, one after the other, in one process."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.pool = world.make_pool(settings.work, settings.pool)
        self.verdict = world.Verdict(settings.prompts, settings.image_seeds)

    def keep(self, cell: Cell, file: Path) -> None:
        """Do a cell that is not there and that no other process is at, and write it to its file."""
        with hold_lock(self.settings.work / "locks" / f"{cell.name}.lock") as mine:
            if mine and not file.is_file():
                write_json(file, self.do(cell))

    def do(self, cell: Cell) -> list[dict[str, Any]]:
        """Train and judge one cell: a line for each step that is looked at and each strength."""
        line: dict[str, Any] = asdict(cell)
        if cell.arm == "base":
            return [line | entry for entry in self.judged(None, [0.0])]
        began, at = time.monotonic(), self.settings
        sample = world.draw_sample(self.pool, seed=cell.seed, pairs=at.pairs, people=cell.people)
        merged = world.merged_targets(self.pool, sample, cell.arm, cell.judge, cell.share, cell.seed)
        line |= {"power": merged.report["power"], "target_agreement": float(np.mean((merged.target > 0.5) == (sample.answer > 0.5)))}
        line["seconds_merge"] = (merging := time.monotonic()) - began
        name = run_name(cell, sample.rows, merged)
        with hold_lock(at.work / "locks" / f"{name}.lock", wait=True):
            if (file := at.work / "judged" / f"{name}.json").is_file():
                return [line | entry for entry in json.loads(file.read_text(encoding="utf-8"))]
            parameters = self.train(cell, sample.rows, merged)
            line["seconds_train"] = (trained := time.monotonic()) - merging
            found = [{"step": step} | entry for step in parameters for entry in self.judged(parameters[step], at.strengths)]
            line["seconds_judge"] = time.monotonic() - trained
            write_json(file, found)
        return [line | entry for entry in found]

    def judged(self, parameters: dict[str, Any] | None, strengths: Sequence[float]) -> list[dict[str, Any]]:
        """The verdict on a LoRA at each strength; None is the base."""
        found = self.verdict.at_strengths(parameters, strengths)
        return [entry | {"reward": float(np.mean(entry["rewards"]))} for entry in found]

    def train(self, cell: Cell, rows: np.ndarray, merged: Merged) -> dict[int, dict[str, Any]]:
        """`dedpo train` on these targets of the pool's `rows`, as the quickstart trains: the LoRA after each step that is looked at.

        The run's folder is removed again.
        """
        from safetensors.torch import load_file

        from dedpo_diffusion.pipelines import train
        from dedpo_diffusion.weights.run_folder import checkpoints

        at, folder = self.settings, self.pool.folder
        world.write_rows(self.pool, cell.name, rows, merged)
        out = at.work / "runs" / cell.name
        argv = ["--config", CONFIG, "--data.pairs", folder, "--data.targets", cell.name, "--data.cache", at.work / "cache", "--out", out]
        argv += ["--data.reference_draws", at.draws, "--optim.steps", at.steps, "--seed", cell.seed]
        argv += ["--checkpoint_every", min(looks := [*at.looks, at.steps]), "--keep_checkpoints", at.steps, "--log_every", at.steps]
        call(train.main, *argv, *ALIKE, *at.train)
        parameters = {step: load_file(at / "parameters.safetensors") for step, at in checkpoints(out) if step in looks}
        shutil.rmtree(out)
        for suffix in ("parquet", "json"):
            (folder / "targets" / f"{cell.name}.{suffix}").unlink()
        return parameters


def open_study(settings: StudySettings) -> Study:
    """The study, with its pool, which one process makes while the others wait."""
    with hold_lock(settings.work / "locks" / "pool.lock", wait=True):
        return Study(settings)


def restore(settings: StudySettings, wanted: dict[Cell, Path]) -> None:
    """Put the cells of an earlier report back into the work folder, where they are missing; a UserError for cells of another study."""
    import pyarrow.parquet as pq

    assert settings.report is not None
    file = settings.report / "results.parquet"
    found: dict[Cell, list[dict[str, Any]]] = {}
    for line in pq.read_table(file).to_pylist() if file.is_file() else []:
        cell = Cell(**{name: line[name] for name in KEYS}) if set(KEYS) <= set(line) else None
        if cell not in wanted:
            raise UserError(f"{file} holds cells that this study does not ask for, and would lose them; give another --report")
        found.setdefault(cell, []).append({name: value for name, value in line.items() if value is not None})
    for cell, lines in found.items():
        if not wanted[cell].is_file():
            write_json(wanted[cell], lines)


def run(settings: StudySettings) -> None:
    """Do all cells of the study that are not done yet, and report."""
    wanted, began = {cell: settings.work / "cells" / f"{cell.name}.json" for cell in cells(settings)}, time.monotonic()
    make_folders(settings.work)
    if settings.report is not None:
        restore(settings, wanted)
    left, study = [cell for cell, file in wanted.items() if not file.is_file()], None
    say(f"{len(wanted)} cells, {len(left)} of them to do")
    with Progress("cells", len(wanted), start=len(wanted) - len(left)) as progress:
        for cell in left:
            if settings.minutes is not None and time.monotonic() - began >= 60 * settings.minutes:
                break
            study = study or open_study(settings)
            study.keep(cell, wanted[cell])
            progress.advance(note=f"{cell.arm} {cell.judge} {cell.share:g} {cell.people} seed {cell.seed}")
    done = [file for file in wanted.values() if file.is_file()]
    if len(done) < len(wanted):
        say(f"{len(wanted) - len(done)} cells are not done yet: start the same command again, or wait for the other processes")
    if settings.report is not None and next(iter(wanted.values())).is_file():  # the base's
        from dedpo_diffusion.evaluation.benchmarks.study_report import write_report

        lines, first = [line for file in done for line in json.loads(file.read_text(encoding="utf-8"))], settings.blocks[0]
        write_report(settings.report, lines, (first.judges[0], first.shares[0], first.people[0]))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(StudySettings, run, argv, prog="study")


if __name__ == "__main__":
    raise SystemExit(main())
