"""A Ray cluster of two nodes on this machine, and the stages that run on it."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines import label, propose, sample, validate
from dedpo_diffusion.shapes import world
from support.samples import write_samples

ADDRESS = "127.0.0.2"  # loopback too; Ray takes 127.0.0.1 for the machine's other address
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}  # a node is lost after
QUICK |= {"health_check_failure_threshold": 4}


class TwoNodes:
    """Two nodes of one core each; `lose` ends the second as a power cut does."""

    def __init__(self) -> None:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # Ray has its workers stand back behind all else
        from ray.cluster_utils import Cluster

        self.one = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": ADDRESS}
        self.cluster = Cluster(initialize_head=True, head_node_args={**self.one, "include_dashboard": False, "_system_config": QUICK})
        self.second = None
        self.complete()

    @property
    def options(self) -> list[str]:
        """Of a stage that is to run here."""
        return ["--engine", "ray", "--ray.address", self.cluster.address]

    def complete(self) -> None:
        """Add the second node, where it was lost."""
        if self.second is None:
            self.second = self.cluster.add_node(**self.one)
            self.cluster.wait_for_nodes()

    def lose(self) -> None:
        """End the second node without a farewell."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def close(self) -> None:
        """End every process."""
        self.cluster.shutdown()


def write_renders(folder: Path, count: int = 240) -> Path:
    """Pairs of renders, some of which come in several pairs."""
    rng = np.random.default_rng(1)
    prompts, images = [attributes.prompt for attributes in world.VOCABULARY[::9]], []
    for _ in range(40):
        buffer = io.BytesIO()
        world.render(world.sample_scene(rng, clutter=0.5)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    with PairWriter(folder, shard_pairs=50) as writer:
        for k in range(count):
            one, other = rng.choice(len(images), 2, replace=False)
            writer.add(Pair(f"p{k}", prompts[rng.integers(len(prompts))], images[one], images[other]))
    return folder


@dataclass
class Stage:
    """A stage with what it needs: how it is called, what it leaves, how far it is, and how to have it begin anew."""

    main: Callable[[list[str]], int]
    arguments: list[str]
    folder: Path
    done: Callable[[], int]
    clear: Callable[[], None]

    def run(self, *more: str) -> int:
        """The exit code."""
        return self.main([*self.arguments, *more])

    def files(self) -> dict[str, bytes]:
        """All that lies in its folder."""
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


def count_files(folder: Path, names: str) -> Callable[[], int]:
    """Counts files."""
    return lambda: len(list(folder.glob(names)))


def stages(root: Path, tiny_model: Path, prompts: Path) -> dict[str, Stage]:
    """The five stages with an engine, each with a couple of dozen tasks."""
    pairs, checked, samples = write_renders(root / "pairs"), write_renders(root / "checked"), write_samples(root / "samples", each=20)
    model = ["--model", str(tiny_model), "--prompts", str(prompts), "--steps", "4", "--batch", "2", "--device", "cpu"]
    drawn, proposed = root / "drawn", root / "proposed"

    def scored() -> int:
        path = samples / "scores.parquet"
        return pq.read_metadata(path).num_rows // 5 if path.exists() else 0

    def unlooked() -> None:
        shutil.rmtree(checked / ".validate", ignore_errors=True)
        for page in checked.glob("validate.*"):
            page.unlink()

    return {
        "label": Stage(
            label.main,
            [str(pairs), "--with", "oracle_reward", "--batch", "4", "--shard", "8", "--summary", "false"],
            pairs / "labels",
            count_files(pairs / "labels" / ".oracle_reward.parts", "shard-*.parquet"),
            lambda: shutil.rmtree(pairs / "labels", ignore_errors=True),
        ),
        "sample": Stage(
            sample.main, [*model, "--out", str(drawn), "--seeds", "20"], drawn, lambda: count_files(drawn, "*.png")() // 2,
            lambda: shutil.rmtree(drawn, ignore_errors=True),
        ),
        "score": Stage(
            score.main, [str(samples), "--with", "oracle_reward", "--batch", "5", "--device", "cpu"], samples, scored,
            lambda: (samples / "scores.parquet").unlink(missing_ok=True),
        ),
        "propose": Stage(
            propose.main, [*model, "--out", str(proposed), "--images_per_prompt", "20"], proposed,
            lambda: count_files(proposed / "proposals", "*.png")() // 2, lambda: shutil.rmtree(proposed, ignore_errors=True),
        ),
        "validate": Stage(
            validate.main, [str(checked), "--workers", "1"], checked, count_files(checked / ".validate", "*.parquet"),
            unlooked,
        ),
    }  # fmt: skip


def run_and_lose(stage: Stage, nodes: TwoNodes, after: int, pause: float = 0.0) -> tuple[int, int]:
    """Run a stage, and lose a node once so many tasks are done; returns the exit code, and how many were done then."""
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while stage.done() < after and not ended.is_set():
            time.sleep(0.005)
        time.sleep(pause)
        if not ended.is_set():
            seen.append(stage.done())
            nodes.lose()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        code = stage.run(*nodes.options)
    finally:
        ended.set()
        thread.join()
    return code, seen[0] if seen else -1
