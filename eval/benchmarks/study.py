"""Which way of merging loses least, whatever the judge: arms compared at their best strength against the truth on Shapes.

    python eval/benchmarks/study.py --config configs/study/main.yaml --work WORK --report eval/results/regret --minutes 300

One cell is one LoRA trained by `dedpo train` with pairs, human answers and first weights all from the cell's seed, judged by the oracle
at several strengths. The same seed gives every arm the same pairs, answers, weights and noises, so differences between arms are paired.
All seeds draw from one pool, and two share about half of their pairs if it is twice a seed's. Start the command several times to share
the cells among processes; what is done is kept, and a stopped study goes on, from the cells in WORK or those in the report's
results.parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.study_world import (
    ARMS,
    JUDGES,
    LORA,
    PEOPLE,
    Sample,
    Verdict,
    draw_sample,
    make_pool,
    merged_targets,
    placed,
)

if TYPE_CHECKING:
    import torch

    from dedpo_diffusion.debias import Merged


@dataclass(frozen=True)
class Block:
    """Cells: every combination of these.

    Args:
        arms: ways to make targets, or base.
        judges: who labels the rest.
        shares: share of the pairs that people label.
        people: quickstart or noisy.
        seeds: first and last seed.
    """

    arms: list[str] = field(default_factory=lambda: list(ARMS))
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
        pool: pairs proposed once for all seeds.
        pairs: pairs of a seed.
        steps, batch, learning_rate, beta: of training; the rest is the quickstart's.
        draws: pre-drawn noises of each pair (data.reference_draws), shared by all runs.
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
    batch: int = 32
    learning_rate: float = 1e-3
    beta: float = 500.0
    draws: int = 16
    strengths: tuple[float, ...] = (0.7, 1.0, 1.5, 2.0, 3.0)
    prompts: int = 144
    image_seeds: int = 2
    minutes: float | None = None
    report: Path | None = None


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
        return digest(asdict(self))


KEYS = [entry.name for entry in fields(Cell)]


def digest(what: Any, *values: np.ndarray) -> str:
    """16 hexadecimal digits."""
    found = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for part in values:
        found.update(part.tobytes())
    return found.hexdigest()[:16]


def cells(settings: StudySettings) -> list[Cell]:
    """Every cell once, seed by seed within a block, so that a study stopped early has whole arms of fewer seeds.

    Raises:
        UserError: an arm, a judge or people that are not known, a share outside (0, 1], or a strength twice or not positive.
    """
    at = settings.strengths
    if not at or len(set(at)) < len(at) or min(at) <= 0:
        raise UserError(f"strengths {list(at)}: give different ones above 0")
    if settings.prompts < 2 or settings.pairs > settings.pool:
        raise UserError(f"{settings.prompts} prompts, {settings.pairs} pairs: give 2 prompts or more, and no more pairs than the pool has")
    of, found = json.dumps({name: getattr(settings, name) for name in SHARED}), {}
    for block in settings.blocks:
        for what, given, known in (("arm", block.arms, ARMS), ("judge", block.judges, JUDGES), ("people", block.people, PEOPLE)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise UserError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
        if not all(0 < share <= 1 for share in block.shares):
            raise UserError(f"shares {block.shares}: give numbers above 0 and up to 1")
        seeds = range(block.seeds[0], block.seeds[1] + 1)
        for seed, people, share, judge, arm in itertools.product(seeds, block.people, block.shares, block.judges, block.arms):
            where = placed(arm, judge, share, people)
            found[Cell(*where, seed=0 if arm == "base" else seed, of=of)] = None
    return list(found)


class Study:
    """Does cells, one after the other, in one process."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.pool = make_pool(settings.work, settings.pool)
        self.verdict = Verdict(settings.prompts, settings.image_seeds)

    def do(self, cell: Cell) -> list[dict[str, Any]]:
        """Train and judge one cell: a line for each strength."""
        line: dict[str, Any] = asdict(cell)
        if cell.arm == "base":
            self.verdict.load(None)
            return [line | _judged(0.0, self.verdict.rewards())]
        began = time.monotonic()
        sample = draw_sample(self.pool, seed=cell.seed, pairs=self.settings.pairs, people=cell.people)
        merged = merged_targets(self.pool, sample, cell.arm, cell.judge, cell.share, cell.seed)
        line |= {"power": merged.report["power"], "target_agreement": float(np.mean((merged.target > 0.5) == (sample.answer > 0.5)))}
        line["seconds_merge"] = time.monotonic() - began
        return [line | outcome for outcome in self.outcomes(cell, sample, merged)]

    def outcomes(self, cell: Cell, sample: Sample, merged: Merged) -> list[dict[str, Any]]:
        """The verdict at each strength; runs that are the same to the bit, such as tuned at power 0 and human_only, are trained once."""
        from dedpo_diffusion.core.files import write_json
        from dedpo_diffusion.core.locks import hold_lock

        folder = self.settings.work / "trained"
        same = folder / f"{digest([cell.seed, cell.of], sample.rows, merged.target, merged.weight)}.json"
        with hold_lock(same.with_suffix(".lock"), wait=True):
            if not same.is_file():
                began, found = time.monotonic(), []
                parameters = self.train(cell, sample, merged)
                trained = time.monotonic() - began
                for strength in self.settings.strengths:
                    self.verdict.load(parameters, strength)
                    found.append(_judged(strength, self.verdict.rewards()) | {"seconds_train": trained})
                judged = time.monotonic() - began - trained
                write_json(same, [entry | {"seconds_judge": judged} for entry in found])
        return json.loads(same.read_text(encoding="utf-8"))

    def train(self, cell: Cell, sample: Sample, merged: Merged) -> dict[str, torch.Tensor]:
        """`dedpo train` on these targets, as the quickstart trains: the LoRA that it ends with; its folder is removed again."""
        from safetensors.torch import load_file

        from dedpo_diffusion.pipelines import train
        from dedpo_diffusion.settings import DataSettings, LoraSettings, ObjectiveSettings, OptimSettings, TrainSettings
        from dedpo_diffusion.weights.run_folder import checkpoints

        at = self.settings
        out = at.work / "runs" / cell.name
        self.write_targets(cell.name, sample, merged)
        settings = TrainSettings(
            model="shapes", out=out,
            data=DataSettings(self.pool.folder, targets=cell.name, cache=at.work / "cache", reference_draws=at.draws),
            lora=LoraSettings(**LORA),  # type: ignore[arg-type]
            objective=ObjectiveSettings(beta=at.beta, balance="output"),
            optim=OptimSettings(learning_rate=at.learning_rate, steps=at.steps, batch=at.batch, warmup=20),
            seed=cell.seed, checkpoint_every=at.steps, log_every=at.steps, device="cpu",
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.run(settings)
        parameters = load_file(checkpoints(out)[-1][1] / "parameters.safetensors")
        shutil.rmtree(out)
        for suffix in ("parquet", "json"):
            (self.pool.folder / "targets" / f"{cell.name}.{suffix}").unlink()
        return parameters

    def write_targets(self, name: str, sample: Sample, merged: Merged) -> None:
        """Targets of the whole pool: weight 0 but for the sample's pairs, whose weights make up for the others' number."""
        from dedpo_diffusion.core.records import Targets
        from dedpo_diffusion.labels.files import write_targets

        target, weight = np.full(len(self.pool.ids), 0.5), np.zeros(len(self.pool.ids))
        target[sample.rows], weight[sample.rows] = merged.target, merged.weight * len(self.pool.ids) / len(sample.rows)
        write_targets(self.pool.folder, name, Targets(self.pool.ids, target, weight), {})


def _judged(strength: float, rewards: Sequence[float]) -> dict[str, Any]:
    return {"strength": strength, "reward": float(np.mean(rewards)), "rewards": list(rewards)}


def restore(settings: StudySettings, wanted: dict[Cell, Path]) -> None:
    """Put the cells of an earlier report back into the work folder, where they are missing.

    Raises:
        UserError: the report holds cells that this study does not ask for, and would lose them.
    """
    import pyarrow.parquet as pq

    from dedpo_diffusion.core.files import write_json

    assert settings.report is not None
    file, found = settings.report / "results.parquet", {}
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
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.core.locks import hold_lock

    wanted, began = {cell: settings.work / "cells" / f"{cell.name}.json" for cell in cells(settings)}, time.monotonic()
    for name in ("locks", "cells", "trained"):
        (settings.work / name).mkdir(parents=True, exist_ok=True)
    if settings.report is not None:
        restore(settings, wanted)
    left, study = [cell for cell, file in wanted.items() if not file.is_file()], None
    say(f"{len(wanted)} cells, {len(left)} of them to do")
    with Progress("cells", len(wanted), start=len(wanted) - len(left)) as progress:
        for cell in left:
            if settings.minutes is not None and time.monotonic() - began >= 60 * settings.minutes:
                break
            if study is None:
                with hold_lock(settings.work / "locks" / "pool.lock", wait=True):
                    study = Study(settings)
            with hold_lock(settings.work / "locks" / f"{cell.name}.lock") as mine:
                if mine and not wanted[cell].is_file():
                    write_json(wanted[cell], study.do(cell))
            progress.advance(note=f"{cell.arm} {cell.judge} {cell.share:g} {cell.people} seed {cell.seed}")
    done = [file for file in wanted.values() if file.is_file()]
    if len(done) < len(wanted):
        say(f"{len(wanted) - len(done)} cells are not done yet: start the same command again, or wait for the other processes")
    if settings.report is not None and done:
        from dedpo_diffusion.evaluation.benchmarks.study_report import write_report

        write_report(settings.report, [line for file in done for line in json.loads(file.read_text(encoding="utf-8"))], settings.blocks[0])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(StudySettings, run, argv, prog="study")


if __name__ == "__main__":
    raise SystemExit(main())
