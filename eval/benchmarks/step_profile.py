"""What a training step on the CPU spends its time on: how much of it is not arithmetic, and what that is.

    python eval/benchmarks/step_profile.py --pairs quickstart/data --work step_profile --out step_profile.json

On Shapes, one thread, the steps of `dedpo train` with a cache, with the reference's errors stored and without, under torch.profiler.
Arithmetic is matrix products, convolutions and attention, with their backward passes. Everything else that torch does is told by operation;
`python` is what passes between operations: of diffusers, peft, accelerate, and this project. Profiling itself takes time, most of it there,
so `seconds` is of steps without a profiler, and shares are of those with one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import say, stage
from dedpo_diffusion.evaluation.benchmarks.own_noise import OwnNoiseSettings, take_pairs
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, OptimSettings, TrainSettings

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"}
PARTS = ("convolution", "scaled_dot_product", "flash_attention")  # of the names of convolutions and attention, forward and backward
ARMS = {"cached": None, "stored": 2}
TOLD = 12  # operations that are told by name


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of the profile.

    Args:
        pairs: pairs that the Shapes model proposed, as those of `dedpo quickstart`.
        work: folder of the first of them, their cache and the runs; it is not removed.
        out: file for the result (JSON).
        count: how many of them are trained on.
        batch: pairs of a step.
        steps: steps that are profiled, and as many that are timed.
    """

    pairs: Path
    work: Path
    out: Path
    count: int = 48
    batch: int = 8
    steps: int = 5


def is_arithmetic(name: str) -> bool:
    """Whether an operation of torch, by its name in a profile, is arithmetic that no code around it could spare."""
    plain = name.removeprefix("aten::").strip("_")
    return plain in PRODUCTS or any(part in plain for part in PARTS)


def stepper(settings: ProfileSettings, folder: Path, draws: int | None) -> Callable[[], None]:
    """A function that does one step of a run of `dedpo train`."""
    from dedpo_diffusion.pipelines.train import learn, micro_batches
    from dedpo_diffusion.training.setup import set_up

    name = f"run-{draws}-{time.time_ns()}"
    session = set_up(
        TrainSettings(
            "shapes", settings.work / name, DataSettings(folder, "truth", cache=settings.work / "cache", reference_draws=draws),
            objective=ObjectiveSettings(beta=500.0), optim=OptimSettings(batch=settings.batch, steps=1000), device="cpu", tracker=["none"],
        )
    )  # fmt: skip
    loads = micro_batches(session, 0)

    def step() -> None:
        learn(session, next(loads))
        session.accelerator.clip_grad_norm_(session.model.trainable().values(), 1.0)
        session.optimizer.step()
        session.optimizer.zero_grad()

    return step


def profiled(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Seconds of a step, and shares of its parts under a profiler."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - began) / steps
    with profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wall = time.perf_counter() - began
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    calls = {event.key: event.count / steps for event in found.key_averages()}
    products = sum(value for name, value in spent.items() if is_arithmetic(name))
    inside = sum(spent.values())
    others = sorted(((value, name) for name, value in spent.items() if not is_arithmetic(name)), reverse=True)[:TOLD]
    return {
        "seconds": seconds, "profiled_seconds": wall / steps, "arithmetic": products / wall, "operations": (inside - products) / wall,
        "python": 1 - inside / wall, "largest": {name: {"share": value / wall, "calls": calls[name]} for value, name in others},
    }  # fmt: skip


def run(settings: ProfileSettings) -> None:
    """Profile steps of training on the CPU."""
    import torch

    torch.set_num_threads(1)
    folder = take_pairs(OwnNoiseSettings(settings.pairs, settings.work, settings.out, count=settings.count))
    results: dict[str, Any] = {"torch": torch.__version__}
    for name, draws in ARMS.items():
        results[name] = told = profiled(stepper(settings, folder, draws), settings.steps)
        say(f"{name}: {told['seconds']:.3f} s a step; arithmetic {told['arithmetic']:.0%}, other operations {told['operations']:.0%}, "
            f"python {told['python']:.0%}")  # fmt: skip
        for operation, part in told["largest"].items():
            say(f"  {part['share']:6.1%}  {part['calls']:7.0f} calls  {operation}")
    write_record(settings, results)


if __name__ == "__main__":
    raise SystemExit(stage(ProfileSettings, run, None, prog="step_profile"))
