"""What a second process gains `dedpo label`, how long the judge waits for images, and does memory grow with the dataset?

    python eval/benchmarks/label_throughput.py --out label_throughput.json

Makes datasets of small images (64 x 64 JPEG, every file different) in a temporary folder and runs the real command with
the embedded CLIP judge on the CPU, one thread a process: alone, and as two processes at once that share the pairs. Pairs
a second are counted from the first kept shard on, so that starting Python and loading the judge do not count. Memory as in
`validate_throughput.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import say, stage
from dedpo_diffusion.evaluation.benchmarks.validate_throughput import make, resident


@dataclass(frozen=True)
class LabelThroughputSettings:
    """Settings of the measurement.

    Args:
        out: file for the result (JSON).
        pairs: size of the dataset of the comparison.
        many: size of the large dataset, whose memory is compared with the other's.
        folder: where the datasets are made; None takes the system's temporary folder.
        repeats: runs of the comparison, in turns.
    """

    out: Path
    pairs: int = 10_000
    many: int = 100_000
    folder: Path | None = None
    repeats: int = 3


def one_run(folder: Path, processes: int) -> dict[str, float]:
    """Pairs a second, the judges' mean share of waiting, and the largest memory of one process."""
    shutil.rmtree(folder / "labels", ignore_errors=True)
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.label", str(folder), "--with", f"pickscore={judge}", "--device", "cpu"]
    options = ["--workers", "1", "--summary", "false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    parts, label = folder / "labels" / ".pickscore.parts", folder / "labels" / "pickscore.parquet"
    began, first, peak = time.monotonic(), 0, 0
    while not label.is_file() and any(process.queue() is None for process in started):
        if not first and (first := len(list(parts.glob("shard-*.parquet")))):
            began = time.monotonic()
        peak = max(peak, *(resident(process.pid) for process in started))
        time.sleep(0.05)
    spent = time.monotonic() - began
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{' '.join(command)} failed: {said}")
    waited = [int(found[1]) / 100 for text in said if (found := re.search(r"waited for images (\d+)% of the time", text))]
    pairs = sum(int(found) for found in re.findall(r"wrote \S+: (\d+) labels", "".join(said)))
    return {"pairs_per_second": (pairs - 256 * first) / spent, "waiting_share": float(np.mean(waited)), "peak_mib": peak / 2**20}


def run(settings: LabelThroughputSettings) -> None:
    """Measure pairs a second, waiting and memory of `dedpo label`."""
    from dedpo_diffusion.core.files import write_json

    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        small = make(Path(place) / "small", settings.pairs)
        for _ in range(settings.repeats):  # in turns, so that a slow minute of the machine hits both alike
            for processes, found in runs.items():
                found.append(one_run(small, processes))
                shown = ", ".join(f"{key} {value:.3g}" for key, value in found[-1].items())
                say(f"{settings.pairs} pairs, {processes} processes: {shown}")
        large = one_run(make(Path(place) / "large", settings.many), 1)
    say(f"{settings.many} pairs, 1 process: " + ", ".join(f"{key} {value:.3g}" for key, value in large.items()))
    ratios = [two["pairs_per_second"] / one["pairs_per_second"] for one, two in zip(runs[1], runs[2], strict=True)]
    grown = (large["peak_mib"] - max(one["peak_mib"] for one in runs[1])) * 2**20 / (settings.many - settings.pairs)
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    say(f"two processes over one: {np.median(ratios):.2f} ({shown}); bytes a further pair: {grown:.0f}")
    record: dict[str, Any] = {"cores": os.cpu_count(), "pairs": settings.pairs, "many": settings.many}
    record |= {"two_processes_over_one": float(np.median(ratios)), "ratios": ratios, "bytes_a_further_pair": grown}
    write_json(settings.out, record | {"one_process": runs[1], "two_processes": runs[2], "large": large})


if __name__ == "__main__":
    raise SystemExit(stage(LabelThroughputSettings, run, None, prog="label_throughput"))
