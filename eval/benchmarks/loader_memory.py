"""Does the memory of training's input grow with the number of pairs?

    python eval/benchmarks/loader_memory.py --out loader_memory.json

Makes datasets of tiny pairs (8 x 8 px PNG, a prompt for every four pairs) with a filled cache of stand-in latents (4 x 8 x 8) and
embeddings, and reads each in a process of its own as `dedpo train` does: reader, fingerprint, cache, targets, then batches in the order
of importance sampling. Told are the process's anonymous memory before anything is read, at its peak (looked at a hundred times a
second) and at the end, and the file pages that are mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import say, stage, track

SHAPE, TEXT = (4, 8, 8), (4, 8)  # of a latent, and of an embedding


@dataclass(frozen=True)
class LoaderMemorySettings:
    """Settings of the measurement.

    Args:
        out: file for the result (JSON).
        pairs: sizes of the datasets.
        batches: how many are read.
        batch: pairs in each.
        folder: where the datasets are made; None takes the system's temporary folder.
        read: read this dataset and tell this process's memory at every station, in place of the measurement.
    """

    out: Path | None = None
    pairs: list[int] = field(default_factory=lambda: [2_000, 200_000])
    batches: int = 2_000
    batch: int = 16
    folder: Path | None = None
    read: Path | None = None


def make(folder: Path, count: int, *, shard_pairs: int = 1000) -> Path:
    """A dataset of `count` pairs with targets "all" and a filled cache beside it, in the formats of `dedpo merge` and `dedpo train`."""
    import numpy as np
    import torch
    from PIL import Image

    from dedpo_diffusion.core.records import Conditioning, Pair, Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
    from dedpo_diffusion.training.cache import fill

    rng = np.random.default_rng(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    with PairWriter(folder, shard_pairs=shard_pairs) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            writer.add(Pair(f"pair-{k:09d}", f"a prompt of several words, number {k % (count // 4)}", picture(), picture()))
    target = rng.random(count)
    write_targets(folder, "all", Targets([f"pair-{k:09d}" for k in range(count)], target, np.ones(count)), {})
    reader = PairReader(folder)
    pixels, sizes = torch.zeros(2, 3, 8, 8), torch.full((2, 6), 8.0)

    def views(shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(reader.counts[shard]):
            yield pixels, sizes

    fill(
        folder / "cache", identity={}, prompts=reader.prompts(), shards=reader.counts, read_shard=views,
        encode_images=lambda images: (torch.randn(len(images), *SHAPE), torch.ones(len(images), *SHAPE)),
        encode_prompts=lambda prompts: Conditioning(torch.randn(len(prompts), *TEXT)),
    )  # fmt: skip
    return folder


def memory(process: int | str = "self") -> dict[str, float]:
    """MiB of anonymous memory and of mapped file pages of a process."""
    text = Path(f"/proc/{process}/status").read_text()
    return {
        name: int(re.findall(rf"^{key}:\s+(\d+) kB", text, re.M)[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


def read(settings: LoaderMemorySettings) -> None:
    """Read batches as `dedpo train` does; one JSON line with the memory at every station."""
    import torch

    from dedpo_diffusion.dpo.noising import TimestepDraw, draw
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.cache import PairCache
    from dedpo_diffusion.training.data import CachedSource, PairLoader

    class Plain:
        """What `PairLoader.batch` asks of a model."""

        device = torch.device("cpu")

        def latents(self, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return mean + std * noise

    assert settings.read is not None
    torch.set_num_threads(1)
    stations = {"imported": memory()}
    reader = PairReader(settings.read)
    reader.fingerprint()
    stations["reader"] = memory()
    cache = PairCache(settings.read / "cache")
    stations["cache"] = memory()
    loader, timesteps = (
        PairLoader(reader, CachedSource(cache, 4), targets="all", seed=0, sampling="importance", together=settings.batch),
        TimestepDraw(0, 1000),
    )
    stations["loader"] = memory()
    for step in range(settings.batches):
        draws = draw(0, step, settings.batch, SHAPE, timesteps=timesteps, caption_dropout=0.1)
        loader.batch(loader.load(step * settings.batch, draws), Plain())  # type: ignore[arg-type]
    stations["batches"] = memory()
    say(json.dumps({"stations": stations, "open_files": len(os.listdir("/proc/self/fd"))}))


def measure(folder: Path, settings: LoaderMemorySettings) -> dict[str, Any]:
    """What a process that reads this dataset tells, and its largest memory."""
    command = [sys.executable, __file__, "--read", str(folder), "--batches", str(settings.batches), "--batch", str(settings.batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.queue() is None:
        try:
            peak = max(peak, memory(process.pid)["own"])
        except (OSError, IndexError):  # it has just ended
            continue
        time.sleep(0.01)
    told = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(told.splitlines()[-1]) | {"peak_own": peak}


def run(settings: LoaderMemorySettings) -> None:
    """Measure the memory of training's input by the number of pairs."""
    from dedpo_diffusion.core.console import UserError
    from dedpo_diffusion.core.files import write_json

    if settings.read is not None:
        return read(settings)
    if settings.out is None:
        raise UserError("--out is missing; give a file for the result")
    runs = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        for count in settings.pairs:
            found = measure(make(Path(place) / str(count), count), settings)
            runs[count] = found
            told = ", ".join(f"{name} {values['own']:.1f}" for name, values in found["stations"].items())
            say(f"{count} pairs, MiB of its own: {told}, peak {found['peak_own']:.1f}; {found['open_files']} open files")
    least, most = (runs[count] for count in (min(runs), max(runs)))
    further = max(runs) - min(runs)
    grown = {
        "peak": most["peak_own"] - least["peak_own"],
        "while batches are read": most["stations"]["batches"]["own"] - least["stations"]["batches"]["own"],
    }
    per_pair = {name: mib * 2**20 / further for name, mib in grown.items()}
    say("bytes a further pair: " + ", ".join(f"{name} {value:.0f}" for name, value in per_pair.items()))
    versions = {name: version(name) for name in ("torch", "safetensors", "pyarrow", "numpy")} | {"python": platform.python_version()}
    command = f"python eval/benchmarks/loader_memory.py --batches {settings.batches} --batch {settings.batch} --out {settings.out.name}"
    record = {"command": command, "versions": versions, "cores": os.cpu_count(), "bytes_a_further_pair": per_pair}
    write_json(settings.out, record | {"mib": {str(count): found for count, found in runs.items()}})


if __name__ == "__main__":
    raise SystemExit(stage(LoaderMemorySettings, run, None, prog="loader_memory"))
