"""How long does `dedpo merge` take on a million pairs, and how much memory?

    python eval/benchmarks/merge_throughput.py --out merge_throughput.json

Writes a dataset of tiny, equal images (their content is never read) with prompts, a source column of 20 models, human labels for a
quarter of the pairs and three judges' labels for all, and runs the real command in a child process: with one judge, with three
judges over 20 strata, and the plan. Memory is the child's largest resident size, which the kernel counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import say, stage, track

WAYS = {
    "one judge": ["--judge", "judge-0"],
    "three judges, 20 strata": ["--judges", "judge-0,judge-1,judge-2", "--strata", "source_model"],
    "the plan, three judges, 20 strata": ["--judges", "judge-0,judge-1,judge-2", "--strata", "source_model", "--plan"],
}


@dataclass(frozen=True)
class MergeThroughputSettings:
    """Settings of the measurement.

    Args:
        out: file for the result (JSON).
        pairs: size of the dataset.
        folder: where the dataset is made; None takes the system's temporary folder.
        repeats: runs of each way, in turns.
    """

    out: Path
    pairs: int = 1_000_000
    folder: Path | None = None
    repeats: int = 3


def make(folder: Path, count: int) -> Path:
    """A dataset of `count` pairs with human labels for a quarter and judges that agree on 60, 75 and 85 %, by model more or less."""
    from dedpo_diffusion.core.records import Labels, Pair
    from dedpo_diffusion.labels.files import write_labels
    from dedpo_diffusion.pairs.dataset import PairWriter

    rng = np.random.default_rng(0)
    model, score = rng.integers(20, size=count), rng.normal(size=count)
    with PairWriter(folder) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            source = {"model": f"model-{model[k]:02d}", "score": float(score[k])}
            writer.add(Pair(f"pair-{k}", f"a prompt of several words, number {k % (count // 4)}", b"0", b"1", source))
    ids, truth = [f"pair-{k}" for k in range(count)], (rng.random(count) < 0.5).astype(float)
    asked = np.flatnonzero(rng.random(count) < 0.25)
    write_labels(folder, "human", Labels([ids[k] for k in asked], truth[asked]))
    for number, share in enumerate((0.6, 0.75, 0.85)):
        right = rng.random(count) < share + 0.1 * (model / 19 - 0.5)
        label = 0.5 + np.where(right, 0.45, -0.45) * (2 * truth - 1) * rng.random(count)
        write_labels(folder, f"judge-{number}", Labels(ids, label, {"judge_version": ["1"] * count}))
    return folder


def one_run(folder: Path, options: list[str]) -> dict[str, float]:
    """Seconds, those of the processor alone (another program's work does not count), and largest memory of one command."""
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.merge", str(folder), *options]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    spent = time.monotonic() - began
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return {"seconds": spent, "processor_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}  # it counts KiB


def run(settings: MergeThroughputSettings) -> None:
    """Measure seconds and memory of `dedpo merge`."""
    from dedpo_diffusion.core.files import write_json

    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        folder = make(Path(place) / "pairs", settings.pairs)
        for _ in range(settings.repeats):  # in turns, so that a slow minute of the machine hits all alike
            for way, options in WAYS.items():
                runs[way].append(one_run(folder, [*options, str(settings.pairs // 2)] if options[-1] == "--plan" else options))
                say(f"{way}: " + ", ".join(f"{key} {value:.1f}" for key, value in runs[way][-1].items()))
    record: dict[str, Any] = {"cores": os.cpu_count(), "pairs": settings.pairs, "runs": runs}
    for key in ("seconds", "processor_seconds"):
        record[f"median_{key}"] = {way: float(np.median([one[key] for one in found])) for way, found in runs.items()}
    record["peak_mib"] = {way: max(one["peak_mib"] for one in found) for way, found in runs.items()}
    write_json(settings.out, record)


if __name__ == "__main__":
    raise SystemExit(stage(MergeThroughputSettings, run, None, prog="merge_throughput"))
