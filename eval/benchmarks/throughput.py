"""What a training step costs, beside the published Diffusion-DPO step, in one run: pairs a second, memory, where the time goes.

    python eval/benchmarks/throughput.py --out throughput.json
    python eval/benchmarks/throughput.py --model sdxl --device cuda --dtype bf16 --gradient_checkpointing true --steps 4 --out sdxl.json

Arms: `published`, what the published scripts do (`published_step.py` says which, and which facts); `live`, this project without a cache;
`cached`, with latents and text from a cache on disk; `stored`, with the reference's errors known too. The project's arms run
`pipelines.train.learn`, the step of `dedpo train`, on a `Backbone`, a `PairLoader` and an optimizer as that command makes them. Weights
are random (`random_models.py`), pictures too, as large as the model's. Arms take turns, round after round, beginning with another
one each time, so that other load falls on all alike; ratios are of times in the same round, and their interval is the percentile
bootstrap of the median over rounds. The published step reads four numbers in every step, as its scripts do; nothing else waits for the
device within an arm's turn, and nothing is logged. Phases are timed in rounds of their own, as they wait for the device; so is memory.

Arithmetic is what torch's counter finds in matrix products, convolutions and attention, recomputation included; its share is of the
best rate of a large matrix product in the same run.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.evaluation.benchmarks.throughput_arms import DTYPES, Bench, PhaseTimer, ThroughputSettings, set_up

SHEET = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16, by its maker


def count_flop(bench: Bench) -> dict[str, float]:
    """Floating-point operations of one step of every arm."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for name, arm in track(bench.arms.items(), "counting arithmetic", len(bench.arms)):
        with FlopCounterMode(display=False) as counter:
            arm.step(None)
        found[name] = float(counter.get_total_flops())
    return found


def peak_memory(bench: Bench, device: str) -> dict[str, dict[str, Any]]:
    """Bytes that a run of each arm alone holds at its peak: what it keeps, and what a step adds."""
    import torch

    from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter, storage_bytes

    found = {}
    for name, arm in track(bench.arms.items(), "measuring memory", len(bench.arms)):
        arm.step(None)  # the optimizer's memory is there after a step
        kept = storage_bytes(arm.own())
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            arm.step(None)
            added = torch.cuda.max_memory_allocated() - before
        else:
            with AllocationCounter() as counter:
                arm.step(None)
            added = counter.peak
        found[name] = {"kept_bytes": kept, "step_bytes": added, "peak_bytes": kept + added}
    return found


def time_first(bench: Bench) -> dict[str, float]:
    """Seconds of each arm's first step. All of this project's arms share one model, so the first of them compiles it."""
    found = {}
    for name, arm in bench.arms.items():
        began = time.perf_counter()
        arm.step(None)
        bench.wait()
        found[name] = time.perf_counter() - began
    return found


def time_rounds(bench: Bench, settings: ThroughputSettings) -> dict[str, list[float]]:
    """Seconds of a step of each arm in each round."""
    names, seconds = list(bench.arms), {name: [] for name in bench.arms}  # type: ignore[var-annotated]
    total = settings.rounds + settings.warmup
    for turn in track(range(total), "timing", total):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            bench.wait()
            began = time.perf_counter()
            for _ in range(settings.steps):
                bench.arms[name].step(None)
            bench.wait()
            if turn >= settings.warmup:
                seconds[name].append((time.perf_counter() - began) / settings.steps)
    return seconds


def time_phases(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each phase of a step, by arm."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in bench.arms}
    for _ in track(range(rounds), "timing phases", rounds):
        for name, arm in bench.arms.items():
            phases = PhaseTimer(bench.wait)
            arm.step(phases)
            found[name].append(phases.seconds)
    return {name: {part: statistics.median(line[part] for line in lines) for part in lines[0]} for name, lines in found.items()}


def matrix_peak(settings: ThroughputSettings, wait: Callable[[], None]) -> float:
    """The best rate of a large matrix product in the compute precision, in operations a second."""
    import torch

    side = 8192 if settings.device == "cuda" else 2048
    one, other = (torch.randn(side, side, device=settings.device, dtype=DTYPES[settings.dtype]) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait()
        began = time.perf_counter()
        torch.mm(one, other)
        wait()
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """The median over rounds of the first's time by the second's, and the 95 % percentile bootstrap interval of that median."""
    from scipy.stats import bootstrap

    ratios = np.array(over) / np.array(under)
    found = bootstrap((ratios,), np.median, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return {"ratio": float(np.median(ratios)), "ci": [float(found.low), float(found.high)]}


def hardware(device: str) -> dict[str, Any]:
    """What this runs on, and the versions that matter."""
    from importlib.metadata import version

    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        known = Path("/proc/cpuinfo")
        lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"device": name, "cores": os.cpu_count(), "python": platform.python_version()} | {part: version(part) for part in names}


def check(settings: ThroughputSettings) -> None:
    """Raises UserError for settings that do not go together."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, and torch sees none; give --device cpu")
    if settings.rounds < 2 or settings.dataset < settings.pairs:
        raise UserError("give at least 2 rounds, and a dataset of at least the pairs of a step")


def summarise(
    settings: ThroughputSettings, seconds: dict[str, list[float]], flop: dict[str, float], memory: dict[str, Any], phases: dict[str, Any],
    peak: float,
) -> dict[str, Any]:  # fmt: skip
    """What is kept of a run, beside settings and hardware."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    sheet = next((value for part, value in SHEET.items() if part in hardware(settings.device)["device"]), None)
    arms = {}
    for name, spent in median.items():
        rate, whole = flop[name] / spent, sum(phases[name].values())
        arms[name] = {
            "seconds_a_step": spent, "pairs_a_second": settings.pairs / spent,
            "over_published": ratio(seconds["published"], seconds[name]) if "published" in seconds else None,
            "tflop_a_pair": flop[name] / settings.pairs / 1e12, "share_of_matrix_peak": rate / peak,
            "share_of_data_sheet": None if sheet is None or settings.dtype != "bf16" else rate / sheet, **memory[name],
            "phase_seconds": phases[name], "phase_shares": {part: value / whole for part, value in phases[name].items()},
        }  # fmt: skip
    return {"matrix_peak_tflops": peak / 1e12, "arms": arms, "seconds": seconds}


def _interval(found: dict[str, Any]) -> str:
    low, high = found["ci"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def show(found: dict[str, Any]) -> None:
    """The table, for people."""
    from rich.console import Console
    from rich.table import Table

    names = list(found["arms"])
    shown = Table("", *names)
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "pairs a second": lambda arm: f"{arm['pairs_a_second']:.3f}",
        "published time / its time": lambda arm: _interval(arm["over_published"]) if arm["over_published"] else "",
        "peak memory, MiB": lambda arm: f"{arm['peak_bytes'] / 2**20:.0f}",
        "TFLOP a pair": lambda arm: f"{arm['tflop_a_pair']:.3f}",
        "of the matrix peak": lambda arm: f"{arm['share_of_matrix_peak']:.0%}",
    }  # fmt: skip
    for part in dict.fromkeys(part for name in names for part in found["arms"][name]["phase_shares"]):
        rows[part] = lambda arm, part=part: f"{arm['phase_shares'].get(part, 0):.1%}"
    for title, cell in rows.items():
        shown.add_row(title, *(cell(found["arms"][name]) for name in names))
    Console(width=120).print(shown)


def measure(settings: ThroughputSettings) -> dict[str, Any]:
    """A training step of every arm beside the others: what is kept of it, hardware and sizes included."""
    import torch

    from dedpo_diffusion.evaluation.benchmarks.random_models import SIZES, random_backbone

    check(settings)
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        with Progress("making the model", 1) as progress:
            model = random_backbone(settings.model, device=torch.device(settings.device), dtype=DTYPES[settings.dtype])
            progress.advance()
        bench = set_up(settings, model, Path(place))
        flop = count_flop(bench)  # before anything is compiled, which the counter cannot look into
        if settings.compile:
            model.compile_blocks()
        first = time_first(bench)
        memory = peak_memory(bench, settings.device)
        peak = matrix_peak(settings, bench.wait)
        seconds = time_rounds(bench, settings)
        phases = time_phases(bench, max(2, settings.rounds // 4))
    found = summarise(settings, seconds, flop, memory, phases, max(peak, matrix_peak(settings, bench.wait)))
    return {"hardware": hardware(settings.device), "sizes": SIZES[settings.model], "first_step_seconds": first, **found}


def run(settings: ThroughputSettings) -> None:
    """Time a training step beside the published one."""
    found = measure(settings)
    show(found)
    write_record(settings, found)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ThroughputSettings, run, argv, prog="throughput.py")


if __name__ == "__main__":
    sys.exit(main())
