"""What the stages take on many pairs: how fast are they, and does their memory grow with the dataset?

    python eval/benchmarks/stage_throughput.py --stage validate --out validate_throughput.json
    python eval/benchmarks/stage_throughput.py --stage label --out label_throughput.json

Makes datasets in a temporary folder and runs the real commands on them, one thread a process. Images are small (64 x 64 JPEG, every file
different): headers with one and two processes, and decode; the embedded CLIP judge on the processor, alone and as two processes that
share the pairs.

Memory is the largest sum over a command and its children, looked at twenty times a second, file pages included (those that processes
share are counted in each), which the system takes back when it needs them.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dedpo_diffusion.core.console import say, stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record

PAIRS = {"validate": [20_000, 200_000], "label": [10_000, 100_000]}
SHARD = 256  # pairs of a shard of `dedpo label`
Runs = list[dict[str, float]]


@dataclass(frozen=True)
class StageThroughputSettings:
    """Settings of the measurement.

    Args:
        stage: what is measured.
        out: file for the result (JSON).
        pairs: sizes of the datasets; none takes those of the committed figures.
        repeats: runs of each way, in turns.
        folder: where the datasets are made; None takes the system's temporary folder.
    """

    stage: Literal["validate", "label"]
    out: Path
    pairs: list[int] | None = None
    repeats: int = 3
    folder: Path | None = None


# ---- datasets


def make_pictures(folder: Path, count: int) -> Path:
    """A dataset, a prompt for every four pairs; 2,000 pictures are drawn, and each file of them gets a comment of its own."""
    from PIL import Image

    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.pairs.dataset import PairWriter

    rng, pool = np.random.default_rng(0), []
    for _ in range(2000):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        pool.append(buffer.getvalue())

    def picture(number: int) -> bytes:
        data, note = pool[int(rng.integers(len(pool)))], f"{number:012d}".encode()
        return data[:2] + b"\xff\xfe\x00\x0e" + note + data[2:]  # a comment segment behind the start of the image

    with PairWriter(folder, shard_pairs=1000) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            prompt = f"a prompt of several words, number {k % (count // 4)}"
            writer.add(Pair(f"pair-{k:09d}", prompt, picture(2 * k), picture(2 * k + 1), {}))
    return folder


# ---- processes


def start(*command: object) -> subprocess.Popen[str]:
    """A Python process of one thread, whose output is kept."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, env=environment)


def output(process: subprocess.Popen[str]) -> str:
    """What a process said.

    Raises:
        RuntimeError: it failed.
    """
    text = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}: {text}")
    return text


def memory(process: int) -> float:
    """MiB of a process and its children."""
    total, waiting = 0.0, [process]
    while waiting:
        one = waiting.pop()
        try:
            text = Path(f"/proc/{one}/status").read_text()
            children = [path.read_text().split() for path in Path(f"/proc/{one}/task").glob("*/children")]
        except OSError:  # it has just ended
            continue
        waiting += [int(child) for found in children for child in found]
        total += sum(int(kib) / 1024 for kib in re.findall(r"^Rss\w+:\s+(\d+) kB", text, re.M))
    return total


def looks(*processes: subprocess.Popen[str]) -> Iterator[list[float]]:
    """Memory of each process, twenty times a second until all have ended."""
    while any(process.poll() is None for process in processes):
        yield [memory(process.pid) for process in processes]
        time.sleep(0.05)


def run_stage(name: str, *options: object) -> dict[str, float]:
    """Seconds and largest memory of one command."""
    began = time.monotonic()
    process = start("-m", f"dedpo_diffusion.pipelines.{name}", *options)
    peak = max(found for [found] in looks(process))
    spent = time.monotonic() - began
    output(process)
    return {"seconds": spent, "peak_mib": peak}


def in_turns(repeats: int, ways: dict[str, Callable[[], dict[str, float]]]) -> dict[str, Runs]:
    """Runs of every way, one of each after the other, so that a slow minute of the machine hits all alike."""
    found: dict[str, Runs] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
            say(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name][-1].items()))
    return found


def peak_of(runs: Runs) -> float:
    """The largest memory of some runs, MiB."""
    return max(one["peak_mib"] for one in runs)


# ---- the stages


def validate(settings: StageThroughputSettings, sizes: list[int], place: Path) -> dict[str, Any]:
    """Pairs a second and memory of `dedpo validate` by size, what a second process gains, and what a further pair adds."""

    def once(folder: Path, depth: str, workers: int) -> dict[str, float]:
        shutil.rmtree(folder / ".validate", ignore_errors=True)  # it remembers what it has looked at
        return run_stage("validate", folder, "--depth", depth, "--workers", workers)

    lines: dict[int, dict[str, Any]] = {}
    for count in sizes:
        folder = make_pictures(place / str(count), count)
        asked = [("headers", 1), ("headers", 2), ("decode", 2)]
        runs = in_turns(
            settings.repeats, {f"{depth}, {workers} processes": partial(once, folder, depth, workers) for depth, workers in asked}
        )
        lines[count] = {}
        for way, found in runs.items():
            rates = [count / one["seconds"] for one in found]
            lines[count][way] = {"pairs_per_second": float(np.median(rates)), "all": rates, "peak_mib": peak_of(found)}
    one, two = "headers, 1 processes", "headers, 2 processes"
    gain = {count: ways[two]["pairs_per_second"] / ways[one]["pairs_per_second"] for count, ways in lines.items()}
    least, most = min(sizes), max(sizes)
    growth = {way: (lines[most][way]["peak_mib"] - lines[least][way]["peak_mib"]) * 2**20 / max(1, most - least) for way in lines[least]}
    return {"headers_two_processes_over_one": gain, "bytes_a_further_pair": growth, "runs": lines}


def label_once(folder: Path, processes: int) -> dict[str, float]:
    """Pairs a second from the first kept shard on, so that the judge's loading does not count, and the judges' share of waiting."""
    shutil.rmtree(folder / "labels", ignore_errors=True)
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    options = ["--with", f"pickscore={judge}", "--device", "cpu", "--workers", "1", "--summary", "false"]
    started = [start("-m", "dedpo_diffusion.pipelines.label", folder, *options) for _ in range(processes)]
    parts, label = folder / "labels" / ".pickscore.parts", folder / "labels" / "pickscore.parquet"
    began, first, peak = time.monotonic(), 0, 0.0
    for found in looks(*started):
        if label.is_file():
            break
        if not first and (first := len(list(parts.glob("shard-*.parquet")))):
            began = time.monotonic()
        peak = max(peak, *found)
    spent, said = time.monotonic() - began, [output(process) for process in started]
    waited = [int(found[1]) / 100 for text in said if (found := re.search(r"waited for images (\d+)% of the time", text))]
    pairs = sum(int(found) for found in re.findall(r"wrote \S+: (\d+) labels", "".join(said)))
    return {"pairs_per_second": (pairs - SHARD * first) / spent, "waiting_share": float(np.mean(waited)), "peak_mib": peak}


def label(settings: StageThroughputSettings, sizes: list[int], place: Path) -> dict[str, Any]:
    """What a second process gains `dedpo label` on the smallest dataset, and its memory on the largest."""
    small = make_pictures(place / "small", min(sizes))
    runs = in_turns(settings.repeats, {f"{name}_process": partial(label_once, small, n) for name, n in (("one", 1), ("two", 2))})
    large = label_once(make_pictures(place / "large", max(sizes)), 1)
    ratios = [two["pairs_per_second"] / one["pairs_per_second"] for one, two in zip(runs["one_process"], runs["two_process"], strict=True)]
    grown = (large["peak_mib"] - peak_of(runs["one_process"])) * 2**20 / max(1, max(sizes) - min(sizes))
    return {"two_processes_over_one": float(np.median(ratios)), "ratios": ratios, "bytes_a_further_pair": grown, "large": large, **runs}


def run(settings: StageThroughputSettings) -> None:
    """Measure a stage's speed and memory on many pairs."""
    measure = {"validate": validate, "label": label}[settings.stage]
    sizes = settings.pairs or PAIRS[settings.stage]
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        result = measure(settings, sizes, Path(place))
    for key in ("headers_two_processes_over_one", "two_processes_over_one", "bytes_a_further_pair"):
        if key in result:
            say(f"{key.replace('_', ' ')}: {result[key]}")
    write_record(settings, {"cores": os.cpu_count(), "sizes": sizes, **result})


if __name__ == "__main__":
    raise SystemExit(stage(StageThroughputSettings, run, None, prog="stage_throughput"))
