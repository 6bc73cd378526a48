"""How fast does `dedpo validate` read, and does its memory grow with the dataset?

    python eval/benchmarks/validate_throughput.py --out validate_throughput.json

Makes datasets of small images (64 x 64 JPEG, every file different) in a temporary folder and runs the real command on
each: headers with one and two processes side by side, and decode. Memory is the largest sum of resident sizes of the
command and its processes, sampled ten times a second; pages that processes share are counted in each.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import say, stage, track


@dataclass(frozen=True)
class ThroughputSettings:
    """Settings of the measurement.

    Args:
        out: file for the result (JSON).
        pairs: sizes of the datasets.
        decode: largest dataset that is also decoded.
        folder: where the datasets are made; None takes the system's temporary folder.
        repeats: runs of each; the median is told beside all.
    """

    out: Path
    pairs: list[int] = field(default_factory=lambda: [20_000, 200_000])
    decode: int = 200_000
    folder: Path | None = None
    repeats: int = 3


def make(folder: Path, count: int) -> Path:
    """A dataset of `count` pairs; 2,000 pictures are drawn, and each file of them gets a comment of its own."""
    from PIL import Image

    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.pairs.dataset import PairWriter

    rng = np.random.default_rng(0)
    pool = []
    for _ in range(2000):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        pool.append(buffer.getvalue())

    def picture(number: int) -> bytes:
        data, note = pool[int(rng.integers(len(pool)))], f"{number:012d}".encode()
        return data[:2] + b"\xff\xfe\x00\x0e" + note + data[2:]  # a comment segment behind the start of the image

    with PairWriter(folder) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            writer.add(Pair(f"pair-{k}", f"a prompt of several words, number {k % (count // 4)}", picture(2 * k), picture(2 * k + 1)))
    return folder


def resident(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            waiting += [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def one_run(folder: Path, depth: str, workers: int) -> dict[str, float]:
    """Seconds and largest memory of one run on a dataset that was not looked at before."""
    import shutil

    shutil.rmtree(folder / ".validate", ignore_errors=True)
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.validate", str(folder), "--depth", depth, "--workers", str(workers)]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.queue() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.monotonic() - began, "peak_mib": peak / 2**20}


def compared(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What two processes gain over one at each size, and the memory that each pair beyond the smallest dataset takes."""
    by_way = {(line["depth"], line["workers"], line["pairs"]): line for line in lines}
    sizes = sorted({line["pairs"] for line in lines})
    gain = {str(n): by_way["headers", 2, n]["pairs_per_second"] / by_way["headers", 1, n]["pairs_per_second"] for n in sizes}
    growth = {}
    for depth, workers, n in by_way:
        least = by_way.get((depth, workers, sizes[0]))
        if least is not None and n == sizes[-1] > sizes[0]:
            grown = by_way[depth, workers, n]["peak_mib"] - least["peak_mib"]
            growth[f"{depth}, {workers} processes"] = grown * 2**20 / (n - sizes[0])
    return {"headers_two_processes_over_one": gain, "bytes_a_further_pair": growth}


def run(settings: ThroughputSettings) -> None:
    """Measure pairs a second and memory of `dedpo validate`."""
    from dedpo_diffusion.core.files import write_json

    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        for count in settings.pairs:
            folder = make(Path(place) / str(count), count)
            size = sum(path.stat().st_size for path in (folder / "pairs").iterdir())
            ways = [("headers", 1), ("headers", 2)] + ([("decode", 2)] if count <= settings.decode else [])
            runs: dict[Any, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(settings.repeats):  # interleaved, so that a slow minute of the machine hits all alike
                for way in ways:
                    runs[way].append(one_run(folder, *way))
            for (depth, workers), found in runs.items():
                rates = [count / run["seconds"] for run in found]
                line = {"pairs": count, "dataset_mib": size / 2**20, "depth": depth, "workers": workers}
                line |= {"pairs_per_second": float(np.median(rates)), "all": rates, "peak_mib": max(run["peak_mib"] for run in found)}
                lines.append(line)
                say(f"{count} pairs, {depth}, {workers} processes: {line['pairs_per_second']:.0f} pairs/s, {line['peak_mib']:.0f} MiB")
    summary = compared(lines)
    for key, values in summary.items():
        say(f"{key}: " + ", ".join(f"{name}: {value:.2f}" for name, value in values.items()))
    write_json(settings.out, {"cores": os.cpu_count(), **summary, "runs": lines})


if __name__ == "__main__":
    raise SystemExit(stage(ThroughputSettings, run, None, prog="validate_throughput"))
