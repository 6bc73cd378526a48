"""What the stages take on many pairs: how fast are they, and does their memory grow with the dataset?

    python eval/benchmarks/stage_throughput.py --stage validate --out validate_throughput.json
    python eval/benchmarks/stage_throughput.py --stage label --out label_throughput.json
    python eval/benchmarks/stage_throughput.py --stage merge --out merge_throughput.json
    python eval/benchmarks/stage_throughput.py --stage loader --out loader_memory.json

Makes datasets in a temporary folder and runs the real commands on them, one thread a process. `validate` and `label` get small images
(64 x 64 JPEG, every file different): headers with one and two processes, and decode; the embedded CLIP judge on the processor, alone and
as two processes that share the pairs. `merge` never reads an image: one judge, three judges, and the plan. `loader` is
training's input: reader, fingerprint, a filled cache of stand-in latents, targets, then batches in the order of importance sampling.

Memory is the largest sum over a command and its children, looked at twenty times a second: `own` is anonymous memory, `mapped` file
pages (those that processes share are counted in each), which the system takes back when it needs them.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
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

PAIRS = {"validate": [20_000, 200_000], "label": [10_000, 100_000], "merge": [1_000_000], "loader": [2_000, 200_000]}
SHARD = 256  # pairs of a shard of `dedpo label`
LATENT, TEXT = (4, 8, 8), (4, 8)  # shapes of a stand-in latent and embedding
BATCH = 16
JUDGES = ["--judges", "judge-0,judge-1,judge-2"]
Runs = list[dict[str, float]]


@dataclass(frozen=True)
class StageThroughputSettings:
    """Settings of the measurement.

    Args:
        stage: what is measured.
        out: file for the result (JSON).
        pairs: sizes of the datasets; none takes those of the committed figures.
        repeats: runs of each way, in turns; `loader` has one.
        batches: that `loader` reads.
        folder: where the datasets are made; None takes the system's temporary folder.
    """

    stage: Literal["validate", "label", "merge", "loader"]
    out: Path
    pairs: list[int] | None = None
    repeats: int = 3
    batches: int = 2_000
    folder: Path | None = None


# ---- datasets


def write_pairs(folder: Path, count: int, picture: Callable[[int], bytes], *, source: Any = None, shard_pairs: int = 1000) -> Path:
    """A dataset of `count` pairs, a prompt for every four; `picture` makes the file of an image, `source` a pair's other columns."""
    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.pairs.dataset import PairWriter

    with PairWriter(folder, shard_pairs=shard_pairs) as writer:
        for k in track(range(count), f"making {count} pairs", count):
            prompt, images = f"a prompt of several words, number {k % (count // 4)}", (picture(2 * k), picture(2 * k + 1))
            writer.add(Pair(f"pair-{k:09d}", prompt, *images, source(k) if source else {}))
    return folder


def encoded(pixels: np.ndarray, kind: str, side: int, **options: Any) -> bytes:
    """An image file of side x side pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def make_pictures(folder: Path, count: int) -> Path:
    """2,000 pictures are drawn, and each file of them gets a comment of its own."""
    rng = np.random.default_rng(0)
    pool = [encoded(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "JPEG", 64, quality=92) for _ in range(2000)]

    def picture(number: int) -> bytes:
        data, note = pool[int(rng.integers(len(pool)))], f"{number:012d}".encode()
        return data[:2] + b"\xff\xfe\x00\x0e" + note + data[2:]  # a comment segment behind the start of the image

    return write_pairs(folder, count, picture)


def make_labels(folder: Path, count: int) -> Path:
    """Human labels for a quarter, and judges that agree on 60, 75 and 85 % of the pairs, by the model of 20 more or less."""
    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.labels.files import write_labels
    from dedpo_diffusion.pairs.dataset import PairReader

    rng = np.random.default_rng(0)
    model, score = rng.integers(20, size=count), rng.normal(size=count)
    write_pairs(folder, count, lambda _: b"0", source=lambda k: {"model": f"model-{model[k]:02d}", "score": float(score[k])})
    ids, truth = PairReader(folder).ids(), (rng.random(count) < 0.5).astype(float)
    asked = np.flatnonzero(rng.random(count) < 0.25)
    write_labels(folder, "human", Labels([ids[k] for k in asked], truth[asked]))
    for number, share in enumerate((0.6, 0.75, 0.85)):
        right = rng.random(count) < share + 0.1 * (model / 19 - 0.5)
        label = 0.5 + np.where(right, 0.45, -0.45) * (2 * truth - 1) * rng.random(count)
        write_labels(folder, f"judge-{number}", Labels(ids, label, {"judge_version": ["1"] * count}))
    return folder


def make_cache(folder: Path, count: int, *, shard_pairs: int = 1000) -> Path:
    """Tiny pairs (8 x 8 PNG) with targets "all" and a filled cache beside them, in the formats of `dedpo merge` and `dedpo train`."""
    import torch

    from dedpo_diffusion.core.records import Conditioning, Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.training.cache import fill

    rng = np.random.default_rng(0)
    write_pairs(folder, count, lambda _: encoded(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "PNG", 8), shard_pairs=shard_pairs)
    reader = PairReader(folder)
    write_targets(folder, "all", Targets(reader.ids(), rng.random(count), np.ones(count)), {})
    pixels, sizes = torch.zeros(2, 3, 8, 8), torch.full((2, 6), 8.0)

    def views(shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(reader.counts[shard]):
            yield pixels, sizes

    fill(
        folder / "cache", identity={}, prompts=reader.prompts(), shards=reader.counts, read_shard=views,
        encode_images=lambda images: (torch.randn(len(images), *LATENT), torch.ones(len(images), *LATENT)),
        encode_prompts=lambda prompts: Conditioning(torch.randn(len(prompts), *TEXT)),
    )  # fmt: skip
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


def memory(process: int | str = "self") -> dict[str, float]:
    """MiB of anonymous memory and of mapped pages of a process and its children."""
    total, waiting = {"own": 0.0, "mapped": 0.0}, [process]
    while waiting:
        one = waiting.pop()
        try:
            text = Path(f"/proc/{one}/status").read_text()
            children = [path.read_text().split() for path in Path(f"/proc/{one}/task").glob("*/children")]
        except OSError:  # it has just ended
            continue
        waiting += [child for found in children for child in found]
        for key, kib in re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.M):
            total["own" if key == "RssAnon" else "mapped"] += int(kib) / 1024
    return total


def looks(*processes: subprocess.Popen[str]) -> Iterator[list[dict[str, float]]]:
    """Memory of each process, twenty times a second until all have ended."""
    while any(process.poll() is None for process in processes):
        yield [memory(process.pid) for process in processes]
        time.sleep(0.05)


def run_stage(name: str, *options: object) -> dict[str, float]:
    """Seconds, those of the processor alone (other programs' work does not count), and largest memory of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = start("-m", f"dedpo_diffusion.pipelines.{name}", *options)
    peak = max(sum(found.values()) for [found] in looks(process))
    spent = time.monotonic() - began
    output(process)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": spent, "processor_seconds": busy, "peak_mib": peak}


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
        peak = max(peak, *(sum(one.values()) for one in found))
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


def merge(settings: StageThroughputSettings, sizes: list[int], place: Path) -> dict[str, Any]:
    """Seconds and memory of `dedpo merge` on the largest dataset."""
    folder = make_labels(place / "pairs", max(sizes))
    ways = {
        "one judge": ["--judge", "judge-0"],
        "three judges": JUDGES,
        "the plan, three judges": [*JUDGES, "--plan", max(sizes) // 2],
    }
    runs = in_turns(settings.repeats, {way: partial(run_stage, "merge", folder, *options) for way, options in ways.items()})
    result: dict[str, Any] = {"peak_mib": {way: peak_of(found) for way, found in runs.items()}, "runs": runs}
    for key in ("seconds", "processor_seconds"):
        result[f"median_{key}"] = {way: float(np.median([one[key] for one in found])) for way, found in runs.items()}
    return result


def read(folder: Path, batches: int) -> None:
    """Read batches as `dedpo train` does; one JSON line with this process's memory after every part of it."""
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

    torch.set_num_threads(1)
    after = {"imports": memory()}
    reader = PairReader(folder)
    reader.fingerprint()
    after["reader"] = memory()
    source = CachedSource(PairCache(folder / "cache"), 4)
    after["cache"] = memory()
    loader = PairLoader(reader, source, targets="all", seed=0, sampling="importance", together=BATCH)
    after["loader"] = memory()
    for step in range(batches):
        draws = draw(0, step, BATCH, LATENT, timesteps=TimestepDraw(0, 1000), caption_dropout=0.1)
        loader.batch(loader.load(step * BATCH, draws), Plain())  # type: ignore[arg-type]
    after["batches"] = memory()
    print(json.dumps({"mib_after": after, "open_files": len(os.listdir("/proc/self/fd"))}))


def loader(settings: StageThroughputSettings, sizes: list[int], place: Path) -> dict[str, Any]:
    """Memory of training's input, and what a further pair adds to it."""
    runs: dict[int, dict[str, Any]] = {}
    for count in sizes:
        folder = make_cache(place / str(count), count)
        module = "dedpo_diffusion.evaluation.benchmarks.stage_throughput"
        process = start("-c", f"from {module} import Path, read; read(Path({str(folder)!r}), {settings.batches})")
        peak = max(found["own"] for [found] in looks(process))
        runs[count] = json.loads(output(process).splitlines()[-1]) | {"peak_own": peak}
        told = ", ".join(f"{name} {values['own']:.1f}" for name, values in runs[count]["mib_after"].items())
        say(f"{count} pairs, MiB of its own after {told}, peak {peak:.1f}; {runs[count]['open_files']} open files")
    least, most = runs[min(sizes)], runs[max(sizes)]
    grown = {"peak": most["peak_own"] - least["peak_own"]}
    grown["while batches are read"] = most["mib_after"]["batches"]["own"] - least["mib_after"]["batches"]["own"]
    return {"bytes_a_further_pair": {name: mib * 2**20 / max(1, max(sizes) - min(sizes)) for name, mib in grown.items()}, "runs": runs}


def run(settings: StageThroughputSettings) -> None:
    """Measure a stage's speed and memory on many pairs."""
    measure = {"validate": validate, "label": label, "merge": merge, "loader": loader}[settings.stage]
    sizes = settings.pairs or PAIRS[settings.stage]
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        result = measure(settings, sizes, Path(place))
    for key in ("headers_two_processes_over_one", "two_processes_over_one", "median_seconds", "bytes_a_further_pair"):
        if key in result:
            say(f"{key.replace('_', ' ')}: {result[key]}")
    write_record(settings, {"cores": os.cpu_count(), "sizes": sizes, **result})


if __name__ == "__main__":
    raise SystemExit(stage(StageThroughputSettings, run, None, prog="stage_throughput"))
