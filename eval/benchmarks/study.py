"""What a few human labels are worth: ways of merging, objectives and judges, compared against the truth on Shapes.

    python eval/benchmarks/study.py --config configs/study/main.yaml --work WORK

One cell is one training run of `dedpo train` with fresh pairs, fresh human answers and a fresh adapter, all from the cell's seed,
judged by the oracle. The same seed gives every arm the same pairs, answers, first weights and noises, so differences between
arms are paired. Start the command several times to share the cells among processes; what is done is kept, and a stopped study goes on,
from the cells in WORK or those in the report's results.parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.study_world import (
    JUDGES,
    LABEL_DRAWS,
    Pool,
    Sample,
    Verdict,
    draw_sample,
    human_labels,
    make_pool,
)
from dedpo_diffusion.evaluation.benchmarks.study_world import judge_labels as other_labels

if TYPE_CHECKING:
    import torch

    from dedpo_diffusion.debias import Merged


@dataclass(frozen=True)
class Arm:
    """One way to train: how labels are merged, and what `dedpo train` is told."""

    method: str
    kind: str = "sigmoid"
    all_human: bool = False
    rule: Literal["plug_in", "half"] = "plug_in"
    adaptive: bool = False
    options: dict[str, float] = field(default_factory=dict)


ARMS = {
    "base": Arm("none"),
    "sft": Arm("human_only", kind="sft"),
    "human": Arm("human_only"),
    "human_100": Arm("human_only", all_human=True),
    "naive": Arm("naive"),
    "dedpo": Arm("dedpo"),
    "tuned": Arm("tuned"),
    "tuned_half": Arm("tuned", rule="half"),
    "tuned_follow": Arm("tuned", adaptive=True),
    "naive_cdpo": Arm("naive", kind="cdpo", options={"flips": 0.1}),
    "naive_ipo": Arm("naive", kind="ipo"),
    "tuned_ipo": Arm("tuned", kind="ipo"),
    "naive_dr_dpo": Arm("naive", kind="dr_dpo"),
}
NO_JUDGE = ("base", "sft", "human", "human_100")  # what a judge says is nothing to them


@dataclass(frozen=True)
class Block:
    """Cells: every combination of these.

    Args:
        arms: ways to train.
        judges: who labels the rest; arms without a judge ignore it.
        shares: share of the pairs that people label; human_100 and base ignore it.
        seeds: first and last seed.
        balances: objective.balance.
        samplings: data.sampling.
        learning_rates: None takes each arm's own.
        pairs, temperature, steps, timesteps: of the regime, where they are not to be the study's.
    """

    arms: list[str]
    judges: list[str] = field(default_factory=lambda: ["clip"])
    shares: list[float] = field(default_factory=lambda: [0.25])
    seeds: tuple[int, int] = (0, 9)
    balances: list[str] = field(default_factory=lambda: ["none"])
    samplings: list[str] = field(default_factory=lambda: ["uniform"])
    learning_rates: list[float] | None = None
    pairs: list[int] | None = None
    temperature: list[float] | None = None
    steps: list[int] | None = None
    timesteps: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class StudySettings:
    """Settings of the study.

    Args:
        work: folder for the pool, the cache and the cells.
        blocks: which cells, in the order in which they are done.
        learning_rates: of each arm; "other" of those not named.
        pool: pairs proposed once for all seeds.
        held_out: the last of them, which no seed trains on.
        images: prompts of the grammar, one image of each, that a policy is judged by.
        pairs: pairs of a seed.
        temperature: reward difference at which a person is 73 % sure.
        steps: training steps.
        batch: pairs of a step.
        beta: of the objective.
        timesteps: the range [first, last) that they are drawn from.
        draws: pre-drawn noises of each pair (data.reference_draws).
        minutes: no cell is begun after so many; None goes on until all are done.
        report: folder for parquet, table and figure, written at the end of every run; None writes none.
        least_seeds: arms with fewer are in the parquet, not in table and figure.
    """

    work: Path
    blocks: list[Block]
    learning_rates: dict[str, float] = field(default_factory=lambda: {"other": 1e-3})
    pool: int = 1800
    held_out: int = 200
    images: int = 144
    pairs: int = 400
    temperature: float = 0.05
    steps: int = 100
    batch: int = 16
    beta: float = 500.0
    timesteps: tuple[int, int] = (0, 1000)
    draws: int = 16
    minutes: float | None = None
    report: Path | None = None
    least_seeds: int = 10


@dataclass(frozen=True)
class Cell:
    """One training run."""

    arm: str
    judge: str
    share: float
    balance: str
    sampling: str
    learning_rate: float
    pairs: int
    temperature: float
    steps: int
    batch: int
    beta: float
    timesteps: tuple[int, int]
    draws: int
    pool: int
    held_out: int
    images: int
    seed: int

    @property
    def name(self) -> str:
        """16 hexadecimal digits over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def cells(settings: StudySettings) -> list[Cell]:
    """Every cell once, seed by seed within a block, so that a study stopped early has whole arms of fewer seeds.

    Raises:
        UserError: an arm or a judge that is not known, or no learning rate for the others.
    """
    strange = set(settings.learning_rates) - {"other", *ARMS}
    if strange or "other" not in settings.learning_rates:
        raise UserError(f'learning_rates {settings.learning_rates}: give one for "other", and else for arms only: {", ".join(ARMS)}')
    return list(dict.fromkeys(itertools.chain.from_iterable(_block_cells(settings, block) for block in settings.blocks)))


def rate_of(settings: StudySettings, arm: str) -> float:
    """The learning rate of an arm."""
    return settings.learning_rates.get(arm, settings.learning_rates["other"])


def _block_cells(settings: StudySettings, block: Block) -> Iterator[Cell]:
    for what, given, known in (("arm", block.arms, ARMS), ("judge", block.judges, JUDGES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UserError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    axes = itertools.product(
        range(block.seeds[0], block.seeds[1] + 1), block.pairs or [settings.pairs], block.temperature or [settings.temperature],
        block.steps or [settings.steps], block.timesteps or [settings.timesteps], block.shares, block.judges, block.balances,
        block.samplings, block.arms,
    )  # fmt: skip
    for seed, pairs, temperature, steps, span, share, judge, balance, sampling, arm in axes:
        for rate in block.learning_rates or [rate_of(settings, arm)]:
            common = {"pairs": pairs, "temperature": temperature, "batch": settings.batch, "beta": settings.beta}
            common |= {"timesteps": tuple(span), "draws": settings.draws}
            common |= {"pool": settings.pool, "held_out": settings.held_out, "images": settings.images}
            if arm == "base":
                yield Cell(arm, "none", 0.0, "none", "uniform", 0.0, steps=0, seed=0, **common)  # type: ignore[arg-type]
                continue
            if arm in NO_JUDGE:
                judge = "none"
            part = 1.0 if ARMS[arm].all_human else share
            yield Cell(arm, judge, part, balance, sampling, rate, steps=steps, seed=seed, **common)  # type: ignore[arg-type]


def result_file(settings: StudySettings, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return settings.work / "cells" / f"{cell.name}.json"


class Study:
    """Does cells, one after the other, in one process.

    Args:
        settings: of the study.
    """

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.pool: Pool = make_pool(settings.work, settings.pool)
        self.verdict = Verdict(self.pool, held_out=settings.held_out, images=settings.images, rank=8, alpha=8.0)

    def do(self, cell: Cell) -> None:
        """Train and judge one cell, and keep its result."""
        from dedpo_diffusion.core.files import write_json

        began = time.monotonic()
        line: dict[str, Any] = asdict(cell)
        if cell.arm == "base":
            self.verdict.load(None)
            line |= self.verdict.images()
        else:
            sample = self.sample(cell)
            judge = None if cell.judge == "none" else self.judge(cell, sample)
            merged = self.merge(cell, sample, judge)
            line |= _label_numbers(merged, sample, judge) | self.outcome(cell, sample, merged)
        write_json(result_file(self.settings, cell), line | {"seconds": time.monotonic() - began})

    def outcome(self, cell: Cell, sample: Sample, merged: Merged) -> dict[str, Any]:
        """The verdict on the cell's policy; runs that are the same to the bit, such as tuned at power 0 and human, are trained once."""
        from dedpo_diffusion.core.files import write_json

        same = asdict(cell) | {"arm": asdict(ARMS[cell.arm]) | {"method": "", "all_human": False, "rule": ""}, "judge": "", "share": 0.0}
        if ARMS[cell.arm].adaptive:
            same["power"] = merged.power
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
        asked = np.isnan(human_labels(sample, cell.share))  # stratified visits look at it
        for values in (merged.target, merged.weight, *([asked] if cell.sampling == "stratified" else [])):
            digest.update(values.tobytes())
        if ARMS[cell.arm].adaptive and merged.judge is not None:
            digest.update(merged.judge.tobytes())
        file = self.settings.work / "trained" / f"{digest.hexdigest()[:16]}.json"
        if not file.is_file():
            parameters, numbers = self.train(cell, cell.name, sample, merged)
            self.verdict.load(parameters)
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"accuracy": self.verdict.accuracy()} | numbers | self.verdict.images())
        return json.loads(file.read_text(encoding="utf-8"))

    def sample(self, cell: Cell) -> Sample:
        """The cell's pairs and answers."""
        return draw_sample(self.pool, seed=cell.seed, pairs=cell.pairs, held_out=self.settings.held_out, temperature=cell.temperature)

    def judge(self, cell: Cell, sample: Sample) -> np.ndarray:
        """(n,) labels of the cell's judge."""
        if cell.judge != "self":
            return other_labels(self.pool, sample, cell.judge, cell.seed)
        return self.self_labels(cell, sample)

    def self_labels(self, cell: Cell, sample: Sample) -> np.ndarray:
        """(n,) labels by two policies, each trained on the human labels of half of the prompts and judging the pairs of the other half."""
        from dedpo_diffusion.core.files import write_json
        from dedpo_diffusion.core.locks import hold_lock

        key = replace(cell, arm="human", judge="none", balance="none", sampling="uniform", learning_rate=rate_of(self.settings, "human"))
        folder = self.settings.work / "self"
        folder.mkdir(exist_ok=True)
        with hold_lock(folder / f"{key.name}.lock", wait=True):  # another process may need the same labels
            file = folder / f"{key.name}.json"
            if not file.is_file():
                write_json(file, self.fold_labels(key, sample).tolist())
            return np.array(json.loads(file.read_text(encoding="utf-8")))

    def fold_labels(self, key: Cell, sample: Sample) -> np.ndarray:
        """(n,) labels of both fold policies, trained as the cell `key` says."""
        from dedpo_diffusion.debias import merge_labels
        from dedpo_diffusion.labels.calibration import assign_folds

        human = human_labels(sample, key.share)
        fold = assign_folds([self.pool.prompts[row] for row in sample.rows], 2, key.seed)
        labels = np.zeros(len(human))
        for k in range(2):
            merged = merge_labels(np.where(fold == k, np.nan, human), None, method="human_only")
            parameters, _ = self.train(key, f"self-{key.name}-{k}", sample, merged)
            self.verdict.load(parameters)
            margins = self.verdict.margins(sample.rows[fold == k], beta=key.beta, draws=LABEL_DRAWS)
            labels[fold == k] = 1 / (1 + np.exp(-margins.astype(np.float64)))
        return labels

    def merge(self, cell: Cell, sample: Sample, judge: np.ndarray | None) -> Merged:
        """Targets of the cell's pairs."""
        from dedpo_diffusion.debias import merge_labels

        arm = ARMS[cell.arm]
        return merge_labels(human_labels(sample, cell.share), judge, method=arm.method, rule=arm.rule)

    def train(self, cell: Cell, name: str, sample: Sample, merged: Merged) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`dedpo train` on these targets: the adapter it ends with, and its last line of metrics; its folder is removed again."""
        from safetensors.torch import load_file

        from dedpo_diffusion.pipelines import train
        from dedpo_diffusion.settings import DataSettings, LoraSettings, ObjectiveSettings, OptimSettings, TrainSettings
        from dedpo_diffusion.weights.run_folder import checkpoints

        arm, work = ARMS[cell.arm], self.settings.work
        out = work / "runs" / name
        self.write_targets(name, sample, merged)
        settings = TrainSettings(
            model="shapes", out=out,
            data=DataSettings(self.pool.folder, targets=name, cache=work / "cache", sampling=cell.sampling, reference_draws=cell.draws),  # type: ignore[arg-type]
            lora=LoraSettings(rank=8, alpha=8.0),
            objective=ObjectiveSettings(
                beta=cell.beta, kind=arm.kind, options=arm.options, balance=cell.balance,  # type: ignore[arg-type]
                power="adaptive" if arm.adaptive else "fixed", timesteps=cell.timesteps,
            ),
            optim=OptimSettings(learning_rate=cell.learning_rate, steps=cell.steps, batch=cell.batch, warmup=10),
            seed=cell.seed, checkpoint_every=cell.steps, log_every=cell.steps, device="cpu",
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.run(settings)
        parameters = load_file(checkpoints(out)[-1][1] / "parameters.safetensors")
        last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        shutil.rmtree(out)
        for suffix in ("parquet", "json"):
            (self.pool.folder / "targets" / f"{name}.{suffix}").unlink()
        return parameters, {f"last_{key}": last[key] for key in ("margin", "margin_abs_mean", "winner_drift", "loser_drift")} | {
            "last_power": last.get("power")
        }

    def write_targets(self, name: str, sample: Sample, merged: Merged) -> None:
        """Targets of the whole pool: weight 0 but for the sample's pairs, whose weights make up for the others' number."""
        from dedpo_diffusion.core.records import Targets
        from dedpo_diffusion.labels.files import write_targets

        size = len(self.pool.ids)

        def whole(values: np.ndarray, empty: float) -> np.ndarray:
            found = np.full(size, empty)
            found[sample.rows] = values
            return found

        made_of = {"human": np.nan, "judge": np.nan, "inverse": 0.0, "powers": 0.0}
        found = {key: getattr(merged, key) for key in made_of}
        extra = {key: whole(values, made_of[key]) for key, values in found.items() if values is not None}
        if "powers" in extra:
            extra["power"] = extra.pop("powers")
        weight = merged.weight * size / len(sample.rows)
        targets = Targets(self.pool.ids, whole(merged.target, 0.5), whole(weight, 0.0), **extra)
        write_targets(self.pool.folder, name, targets, {})


def _label_numbers(merged: Merged, sample: Sample, judge: np.ndarray | None) -> dict[str, Any]:
    """What the merge said, and how often the judge repeats people's answers to all pairs."""
    worth = merged.report["effective_human_labels"]["value"]
    agreement = None if judge is None else float(np.mean(np.where(judge == 0.5, 0.5, (judge > 0.5) == (sample.answer > 0.5))))
    power = merged.report["power"]
    return {"power": power, "effective_human_labels": worth, "judge_agreement": agreement, "share_outside": merged.report["share_outside"]}


def restore(settings: StudySettings, file: Path) -> None:
    """Put the cells of an earlier report back into the work folder, where they are missing."""
    import pyarrow.parquet as pq

    from dedpo_diffusion.core.files import write_json

    names = {field.name for field in fields(Cell)}
    for line in pq.read_table(file).to_pylist():
        if not names <= set(line):
            raise UserError(
                f"{file}: lacks {sorted(names - set(line))[0]!r}, so it is of another version of the study; give another --report"
            )
        cell = Cell(**{name: tuple(line[name]) if name == "timesteps" else line[name] for name in names})
        path = result_file(settings, cell)
        if not path.is_file():
            write_json(path, {name: value for name, value in line.items() if value is not None})


def run(settings: StudySettings) -> None:
    """Do all cells of the study that are not done yet, and report."""
    from dedpo_diffusion.core.locks import hold_lock

    wanted, began = cells(settings), time.monotonic()
    locks = settings.work / "locks"
    for folder in (locks, settings.work / "cells"):
        folder.mkdir(parents=True, exist_ok=True)
    if settings.report is not None and (settings.report / "results.parquet").is_file():
        restore(settings, settings.report / "results.parquet")
    files = {cell: result_file(settings, cell) for cell in wanted}
    left = [cell for cell in wanted if not files[cell].is_file()]
    say(f"{len(wanted)} cells, {len(left)} of them to do")
    study = None
    if left:
        with hold_lock(locks / "pool.lock", wait=True):
            study = Study(settings)
    with Progress("cells", len(wanted), start=len(wanted) - len(left)) as progress:
        for cell in left:
            if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
                break
            with hold_lock(locks / f"{cell.name}.lock") as mine:
                if study is not None and mine and not files[cell].is_file():
                    study.do(cell)
            progress.advance(note=f"{cell.arm} {cell.judge} seed {cell.seed}")
    done = [file for file in files.values() if file.is_file()]
    if len(done) < len(wanted):
        say(f"{len(wanted) - len(done)} cells are not done yet: start the same command again, or wait for the other processes")
    if settings.report is not None and done:
        from dedpo_diffusion.evaluation.benchmarks.study_report import write_report

        write_report(settings, done)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(StudySettings, run, argv, prog="study")


if __name__ == "__main__":
    raise SystemExit(main())
