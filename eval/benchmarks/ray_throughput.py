"""Labelling by a Ray cluster: pairs a second of two nodes against one, and what it holds in memory for many pairs.

    python eval/benchmarks/ray_throughput.py --out eval/results/ray.json

The judge of the timed runs waits as one does whose model is on a device of its own: a server that takes 50 ms for each image, for
however many workers at once. So the ratio says what the engine costs, even where other work has the cores. Both nodes are on this machine,
with one core each, on its loopback network; in turn, one node and two label the same pairs. A rate is that of the later three quarters of
the shards, so that starting does not count.

Then many pairs of tiny renders are labelled once on two nodes, by Shapes' oracle; most of their images come again under the same prompt,
and are scored once. The memory of the command and of its workers is the highest that was seen (proportional set size).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import say, stage

ADDRESS = "127.0.0.2"  # loopback
WAIT = 0.05  # seconds of the judge for an image
SHARD = 16  # pairs of the timed runs that are kept as a whole


@dataclass(frozen=True)
class RaySpeed:
    """Measure labelling by a Ray cluster.

    Args:
        out: the result (JSON).
        work: a folder for pairs.
        pairs: of each run that is timed.
        rounds: runs with one node, and with two, in turn.
        many: pairs of the run whose memory is measured.
    """

    out: Path
    work: Path = Path("build/ray_throughput")
    pairs: int = 768
    rounds: int = 3
    many: int = 100_000


# ---- pairs


def write_pairs(folder: Path, count: int, *, images: int, prompts: int) -> Path:
    """Pairs of renders of a few images and prompts, so that pictures come again where there are many."""
    import numpy as np

    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.pairs.dataset import PairWriter
    from dedpo_diffusion.shapes import world

    if (folder / "pairs").is_dir():
        return folder
    rng, drawn = np.random.default_rng(0), []
    for _ in range(images):
        buffer = io.BytesIO()
        world.render(world.sample_scene(rng, clutter=0.5)).save(buffer, "PNG")
        drawn.append(buffer.getvalue())
    words = [attributes.prompt for attributes in world.VOCABULARY[:prompts]]
    with PairWriter(folder, shard_pairs=5000) as writer:
        for k in range(count):
            one, other = rng.choice(images, 2, replace=False)
            writer.add(Pair(f"p{k:06d}", words[k % len(words)], drawn[one], drawn[other]))
    return folder


# ---- a judge that waits


class Waiting(BaseHTTPRequestHandler):
    """Takes WAIT seconds for each image; answers as `judges/scorers/http.py` wants it."""

    def do_GET(self) -> None:
        """Say what scores here."""
        self._answer({"name": "waiting", "version": "waiting-1", "temperature": 1.0})

    def do_POST(self) -> None:
        """Score by the prompts' lengths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(WAIT * len(asked["prompts"]))
        self._answer({"version": "waiting-1", "scores": [float(len(prompt)) for prompt in asked["prompts"]]})

    def _answer(self, said: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """The address of one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Waiting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http=http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


# ---- a cluster


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """The address of a cluster of so many nodes of one core."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": 100 << 20, "node_ip_address": ADDRESS}
    made = Cluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**one)
        made.wait_for_nodes()
        yield made.address
    finally:
        made.shutdown()


def label(pairs: Path, judge: str, shard: int, address: str) -> subprocess.Popen[str]:
    """The command, from the start, under way."""
    shutil.rmtree(pairs / "labels", ignore_errors=True)
    options = ["--with", judge, "--batch", "8", "--summary", "false", "--shard", str(shard)]
    command = [sys.executable, "-m", "dedpo_diffusion.pipelines.label", str(pairs), *options, "--engine", "ray", "--ray.address", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def timed(pairs: Path, nodes: int) -> float:
    """Pairs a second from the first finished shards on; both nodes have one by then."""
    with judge() as waiting, cluster(nodes) as address:
        process, parts, times = label(pairs, waiting, SHARD, address), pairs / "labels" / ".waiting.parts", []
        while process.poll() is None:
            with contextlib.suppress(OSError):
                found = [path.stat().st_mtime for path in parts.glob("shard-*.parquet")]
                times = found if len(found) > len(times) else times  # in the end they are joined and removed
            time.sleep(0.02)
        assert process.returncode == 0
    times = sorted(times)[len(times) // 4 :]  # the later three quarters, in which all workers were at work
    return SHARD * (len(times) - 1) / (times[-1] - times[0])


# ---- memory


def resident(process: int) -> tuple[str, int]:
    """A process's name and its proportional set size, in bytes."""
    folder = Path("/proc") / str(process)
    name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    lines = (folder / "smaps_rollup").read_text().splitlines()
    return name, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def peaks(pairs: Path) -> dict[str, float]:
    """The most that the command and the largest of its workers held, in MiB, and how long it took."""
    most = {"command": 0, "worker": 0}
    with cluster(2) as address:
        began, process, ended = time.monotonic(), label(pairs, "oracle_reward", 256, address), threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                for entry in Path("/proc").iterdir():
                    if entry.name.isdigit():
                        with contextlib.suppress(OSError, StopIteration):
                            kind = "command" if int(entry.name) == process.pid else "worker"
                            if kind == "command" or (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                                most[kind] = max(most[kind], resident(int(entry.name))[1])

        thread = threading.Thread(target=watch)
        thread.start()
        process.communicate()
        ended.set()
        thread.join()
        assert process.returncode == 0
    return {**{f"{name}_mib": round(value / 2**20, 1) for name, value in most.items()}, "seconds": round(time.monotonic() - began, 1)}


def run(settings: RaySpeed) -> dict[str, Any]:
    """Measure labelling by a Ray cluster."""
    from importlib.metadata import version

    from dedpo_diffusion.core.files import write_json

    pairs = write_pairs(settings.work / f"timed-{settings.pairs}", settings.pairs, images=400, prompts=200)
    load = os.getloadavg()[1]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(settings.rounds):
        for nodes in (1, 2) if number % 2 == 0 else (2, 1):
            rates[nodes].append(timed(pairs, nodes))
            say(f"{nodes} nodes: {rates[nodes][-1]:.1f} pairs a second")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    result: dict[str, Any] = {
        "command": "python eval/benchmarks/ray_throughput.py "
        + " ".join(f"--{name} {getattr(settings, name)}" for name in ("out", "pairs", "rounds", "many")),
        "hardware": f"{os.cpu_count()} CPU cores, with a load of {load:.0f} in the 5 minutes before; nodes of one core each",
        "versions": {name: version(name) for name in ("dedpo_diffusion", "ray", "torch", "numpy")},
        "two_nodes_over_one": {"of_each_round": ratios, "median": statistics.median(ratios)},
        "said": "a second node would double the rate if the engine cost nothing; nodes and other work share the cores",
        "pairs_per_second": {f"{nodes}_nodes": found for nodes, found in rates.items()},
    }
    write_json(settings.out, result)
    many = write_pairs(settings.work / f"many-{settings.many}", settings.many, images=20, prompts=20)
    result["memory"] = {"pairs": settings.many, **peaks(many)}
    write_json(settings.out, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this benchmark."""
    return stage(RaySpeed, run, argv, prog="ray_throughput")


if __name__ == "__main__":
    raise SystemExit(main())
