"""What a user gets for an hour: wall-clock and forward passes until the true reward on Shapes passes fixed marks.

    python eval/benchmarks/time_to_reward.py --work WORK --out eval/results/time_to_reward.json

`published` trains as the published scripts do (`published_step.py`): timesteps uniform, nothing cached. The other arms are `dedpo train`
with one more device each; `groups` visits rankings in place of pairs, as many images a step. All train on the same pairs with everybody's
answers and one learning rate. At every checkpoint the LoRA is judged at its best strength, chosen on one half of the prompts and judged
on the other, both ways; the clock stands still meanwhile.
Time is what a user waits for: it includes loading, and what fills a cache. A mark is a share of the gain that the published recipe ends
with, of the same seed; between checkpoints the gain is read off a straight line.

Arms of a seed run one after the other in this process, each seed beginning with another one, so other load falls on all. Every (arm,
seed) is kept in WORK when it is done, and a stopped run goes on. Start it once: two at a time would slow each other.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import call, write_record
from dedpo_diffusion.evaluation.benchmarks.study import CONFIG
from dedpo_diffusion.evaluation.benchmarks.study_report import at_best, interval
from dedpo_diffusion.evaluation.benchmarks.throughput import hardware
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval

OFF = {"objective.balance": "none", "objective.timestep_strata": "false", "data.sampling": "uniform"}
OFF |= {"objective.timestep_weighting": "none", "objective.timestep_pairs": "8"}  # the pairs are read where timesteps are measured
CACHE = {"data.cache": "CACHE"}
STORED = CACHE | {"data.reference_draws": "4"}  # of a pair that 150 steps visit six times
STRATA = {"objective.timestep_strata": "true"}
EQUAL = {"objective.timestep_weighting": "equal_noise"}
DEVICES: dict[str, dict[str, str]] = {  # options of `dedpo train`, one more device each
    "live": OFF | {"data.cache": "null"},
    "cached": OFF | CACHE,
    "strata": OFF | CACHE | STRATA,
    "stored": OFF | STORED | STRATA,
    "measured": OFF | CACHE | STRATA | {"objective.timestep_sampling": "measured"},
    "equal_noise": OFF | CACHE | STRATA | EQUAL,
    "relative": OFF | CACHE | STRATA | EQUAL | {"objective.balance": "relative"},
    "own": OFF | STORED | STRATA | {"data.noise": "own"},
    "groups": OFF | CACHE | STRATA | EQUAL | {"data.groups": "IMAGES", "optim.batch": "GROUPS"},  # as many images a step
}
ARMS = ("published", *DEVICES)
PIXELS = 64


@dataclass(frozen=True)
class RewardSettings:
    """Settings of the benchmark.

    Args:
        work: folder for pool, cache and what is done.
        out: file for the result (JSON).
        arms: that are compared; published, which makes the marks, and others.
        seeds: the first and the last, of pairs, first weights and draws.
        steps: optimizer steps of every arm.
        every: steps between checkpoints.
        batch: pairs of a step.
        learning_rate: of every arm.
        beta: of every arm.
        strengths: at which a checkpoint is judged.
        prompts, image_seeds: that it is judged by.
        pool, pairs: pairs proposed once for all seeds, and pairs of a seed.
        images: of each prompt; all pairs among them are proposed. The arm `groups` asks for more than two.
        marks: shares of the published recipe's final gain.
        threads: of torch.
    """

    work: Path
    out: Path
    arms: list[str] = field(default_factory=lambda: [arm for arm in ARMS if arm != "groups"])
    seeds: tuple[int, int] = (300, 305)
    steps: int = 150
    every: int = 15
    batch: int = 32
    learning_rate: float = 1e-3
    beta: float = 500.0
    strengths: tuple[float, ...] = (0.7, 1.0, 1.5, 2.0, 3.0)
    prompts: int = 96
    image_seeds: int = 1
    pool: int = 1600
    pairs: int = 800
    images: int = 2
    marks: tuple[float, ...] = (0.5, 0.75, 1.0)
    threads: int = 2


class Clock:
    """Seconds and images that went through a UNet forward, while it runs."""

    def __init__(self) -> None:
        self.images, self._spent, self._since = 0, 0.0, None  # type: ignore[var-annotated]

    @property
    def seconds(self) -> float:
        """So far."""
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        from diffusers import UNet2DConditionModel

        forward = UNet2DConditionModel.forward

        def counted(unet: Any, sample: Any, *args: Any, **options: Any) -> Any:
            self.images += len(sample)
            return forward(unet, sample, *args, **options)

        with mock.patch.object(UNet2DConditionModel, "forward", counted):
            self._since = time.perf_counter()
            try:
                yield
            finally:
                self._spent, self._since = self.seconds, None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still inside; images are counted on, so sample through nothing that is counted."""
        self._spent, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()


@dataclass(frozen=True)
class Point:
    """A checkpoint: what was spent until then, and the LoRA."""

    step: int
    seconds: float
    images: int
    parameters: dict[str, Any]


def train_published(settings: RewardSettings, pool: world.Pool, sample: world.Sample, seed: int) -> list[Point]:
    """The published recipe's checkpoints."""
    import torch
    from torch.utils.data import Subset

    from dedpo_diffusion.evaluation.benchmarks.published_step import Examples, PublishedStep
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader

    clock, points = Clock(), []
    torch.manual_seed(seed)
    with clock.running():
        model, reader = Backbone("shapes", device=torch.device("cpu")), PairReader(pool.folder)
        preferred = np.zeros(len(reader), dtype=int)
        preferred[sample.rows] = sample.answer < 0.5
        examples = Subset(Examples(reader, preferred, model.text.tokenizers, PIXELS, flip=False), sample.rows.tolist())
        step = PublishedStep(
            model, examples, rank=int(world.LORA["rank"]), batch=settings.batch, beta=settings.beta,  # type: ignore[arg-type]
            learning_rate=settings.learning_rate, checkpointing=False,
        )  # fmt: skip
        for done in range(1, settings.steps + 1):
            for group in step.optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, done / 20)  # the warm-up of configs/shapes_lora.yaml
            step.step()
            if done % settings.every == 0:
                with clock.stopped():
                    kept = {name: value.detach().clone() for name, value in step.unet.named_parameters() if value.requires_grad}
                    points.append(Point(done, clock.seconds, clock.images, kept))
    return points


def train_ours(settings: RewardSettings, pool: world.Pool, sample: world.Sample, arm: str, seed: int) -> list[Point]:
    """The checkpoints of `dedpo train` with an arm's options."""
    from safetensors.torch import load_file

    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.weights.run_folder import checkpoints

    name, clock, spent = f"time-{arm}-{seed}", Clock(), {}  # type: ignore[var-annotated]
    out, cache = settings.work / "runs" / name, settings.work / "caches" / name
    world.write_rows(pool, name, sample.rows, sample.answer)
    shared = {
        "data.pairs": pool.folder, "data.targets": name, "out": out, "seed": seed, "optim.steps": settings.steps,
        "optim.batch": settings.batch, "optim.learning_rate": settings.learning_rate, "objective.beta": settings.beta,
        "checkpoint_every": settings.every, "keep_checkpoints": settings.steps // settings.every + 1,
    }  # fmt: skip
    given = {"CACHE": cache, "IMAGES": settings.images, "GROUPS": 2 * settings.batch // settings.images}
    options = shared | {key: given.get(value, value) for key, value in DEVICES[arm].items()}
    argv = ["--config", CONFIG, *(part for key, value in options.items() for part in (f"--{key}", value))]
    save = train.save

    def told(session: Any, step: int) -> None:
        with clock.stopped():
            spent[step] = (clock.seconds, clock.images)
            save(session, step)

    with mock.patch.object(train, "save", told), clock.running():
        call(train.main, *argv)
    points = [Point(step, *spent[step], load_file(folder / "parameters.safetensors")) for step, folder in checkpoints(out)]
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    return points


def judged(verdict: world.Verdict, points: Sequence[Point], strengths: Sequence[float], base: float) -> list[dict[str, Any]]:
    """Of every checkpoint step, seconds, images, and the gain over the base's reward at the best strength."""
    found = []
    for point in points:
        gain = at_best(verdict.at_strengths(point.parameters, strengths)) - base
        found.append({"step": point.step, "seconds": point.seconds, "images": point.images, "gain": gain})
    return found


def reached(curve: Sequence[dict[str, Any]], gain: float, axis: str) -> float | None:
    """Where a curve first passes a gain, by straight lines between checkpoints from (0, 0) on; None where it never does."""
    at, height = 0.0, 0.0
    for point in curve:
        if point["gain"] >= gain:
            share = (gain - height) / (point["gain"] - height)
            return at + share * (float(point[axis]) - at)
        at, height = float(point[axis]), point["gain"]
    return None


def ratios(curves: dict[str, dict[int, list[dict[str, Any]]]], arm: str, mark: float, axis: str) -> dict[str, Any]:
    """How many times as much the published recipe spends until the mark: the geometric mean over seeds with Student's interval of the logs.

    Seeds in which either never passes the mark have no ratio, and are counted.
    """
    logs, missed = [], {"published": 0, arm: 0}
    for seed in sorted(curves["published"].keys() & curves[arm].keys()):
        theirs = curves["published"][seed]
        gain = mark * theirs[-1]["gain"]
        spent = {name: reached(curves[name][seed], gain, axis) if gain > 0 else None for name in ("published", arm)}
        for name, value in spent.items():
            missed[name] += value is None
        if spent["published"] is not None and spent[arm] is not None:
            logs.append(float(np.log(spent["published"] / spent[arm])))
    found: dict[str, Any] = {"seeds": len(logs), "missed": missed[arm], "ratio": float(np.exp(np.mean(logs))) if logs else None, "ci": None}
    if len(logs) > 1:
        found["ci"] = np.exp(seed_interval(logs).as_dict()["ci"]).tolist()
    return found


def summarise(curves: dict[str, dict[int, list[dict[str, Any]]]], marks: Sequence[float]) -> dict[str, Any]:
    """By arm: final gain, seconds and images of a run, and by mark how many times less it spends than the published recipe."""
    found = {}
    for arm, seeds in curves.items():
        last = [curve[-1] for curve in seeds.values()]
        entry: dict[str, Any] = {"seeds": len(last)}
        for key in ("gain", "seconds", "images"):
            entry[key] = interval([float(point[key]) for point in last])
        for axis in ("seconds", "images") if arm != "published" else ():
            entry[f"published_{axis}_over_its"] = {f"{mark:g}": ratios(curves, arm, mark, axis) for mark in marks}
        found[arm] = entry
    return found


def check(settings: RewardSettings) -> None:
    """Raises UserError for settings that do not go together."""
    unknown = [arm for arm in settings.arms if arm not in ARMS]
    if unknown or "published" not in settings.arms:
        raise UserError(f"arms {settings.arms}: give published, which makes the marks, and others of {', '.join(DEVICES)}")
    pairs = world.all_pairs(settings.images)
    if settings.images < 2 or settings.pool % pairs or settings.pairs % pairs:
        raise UserError(
            f"images {settings.images}: give 2 or more, and a pool and pairs that are multiples of the {pairs} pairs of a prompt"
        )
    if "groups" in settings.arms and (settings.images == 2 or 2 * settings.batch % settings.images):
        raise UserError("groups: give more than two images, a divisor of twice the batch, so that each step has as many images")
    if settings.steps % settings.every or settings.seeds[1] < settings.seeds[0]:
        raise UserError("give steps that are a multiple of every, and the first and the last seed")


def run(settings: RewardSettings) -> None:
    """Train and judge every arm of every seed that is not done yet, and write the table."""
    import torch

    check(settings)
    torch.set_num_threads(settings.threads)
    (settings.work / "done").mkdir(parents=True, exist_ok=True)
    pool = world.make_pool(settings.work, settings.pool, settings.images)
    verdict = world.Verdict(settings.prompts, settings.image_seeds)
    verdict.load(None)
    base = float(np.mean(verdict.rewards()))
    seeds = list(range(settings.seeds[0], settings.seeds[1] + 1))
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in settings.arms}
    with Progress("trainings", len(seeds) * len(settings.arms)) as progress:
        for turn, seed in enumerate(seeds):
            sample = world.draw_sample(pool, seed=seed, pairs=settings.pairs, people="quickstart", images=settings.images)
            for place in range(len(settings.arms)):
                arm = settings.arms[(turn + place) % len(settings.arms)]
                file = settings.work / "done" / f"{arm}-{seed}.json"
                if not file.is_file():
                    whole = arm == "published"
                    points = train_published(settings, pool, sample, seed) if whole else train_ours(settings, pool, sample, arm, seed)
                    write_json(file, judged(verdict, points, settings.strengths, base))
                curves[arm][seed] = json.loads(file.read_text(encoding="utf-8"))
                progress.advance(note=f"{arm}, seed {seed}")
    found = summarise(curves, settings.marks)
    for arm, entry in found.items():
        of = entry.get("published_seconds_over_its", {}).get(f"{settings.marks[-1]:g}")
        less = f", {of['ratio']:.2f} times as fast to the published recipe's final gain" if of and of["ratio"] else ""
        say(f"{arm}: gain {entry['gain']['mean']:+.3f} in {entry['seconds']['mean']:.0f} s{less}")
    write_record(settings, {"hardware": hardware("cpu"), "arms": found, "curves": curves})


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(RewardSettings, run, argv, prog="time_to_reward")


if __name__ == "__main__":
    raise SystemExit(main())
