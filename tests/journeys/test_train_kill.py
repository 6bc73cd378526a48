"""SIGKILL at random moments of start-up, encoding, training and saving: what is left goes on as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import write_pairs
from support.training import arguments, metrics, train_into

IMPORTED = [  # by the server that the runs are forked from, so that a start does not cost their seconds
    *("support.training", "torch.utils.tensorboard", "pandas", "docstring_parser"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]


@pytest.fixture(scope="module")
def server():
    """Processes that have imported everything already, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


class Runs:
    """One command, in folders of its own."""

    def __init__(self, server, base: Path, pairs: Path, place: Path, **changes: object) -> None:
        self.server, self.run, self.cache, self.log = server, place / "run", place / "cache", place / "log"
        place.mkdir()
        self.argv = arguments(
            base, pairs, self.run, data__cache=self.cache, data__crop="random", data__flip="true", data__views=3,
            optim__average=0.9, gradient_checkpointing="true", optim__steps=6, optim__batch=2, checkpoint_every=2,
            lora__rank=2, lora__dropout=0.1, **changes,
        )  # fmt: skip

    def start(self) -> BaseProcess:
        process = self.server.Process(target=train_into, args=(self.argv, self.log))
        process.start()
        return process

    def finish(self) -> float:
        """Run it to its end; how many seconds that took."""
        began = time.monotonic()
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()
        return time.monotonic() - began

    def state(self) -> dict[str, bytes]:
        """Every file that must be the same, but for times in metrics."""
        found = {}
        for root in (self.run / "checkpoints", self.cache):
            files = [
                file for file in sorted(root.rglob("*")) if file.is_file() and file.parent.name != "in_use"
            ]  # whose locks tell processes
            found |= {str(file.relative_to(root)): file.read_bytes() for file in files}
        lines = [{key: value for key, value in line.items() if "second" not in key} for line in metrics(self.run)]
        return found | {"metrics": repr(lines).encode()}

    def clear(self) -> None:
        for folder in (self.run, self.cache):
            shutil.rmtree(folder, ignore_errors=True)


def kill_and_compare(server, base: Path, pairs: Path, tmp_path: Path, moments: int, **changes: object) -> None:
    """Kill one run again and again; one that comes to its end is compared, and begun anew."""
    whole, killed = (Runs(server, base, pairs, tmp_path / name, **changes) for name in ("whole", "killed"))
    seconds = whole.finish()
    wanted, rng, kills = whole.state(), random.Random(0), 0
    assert [step for step, _ in checkpoints(whole.run)] == [4, 6]
    reached = set()  # what there was when it was killed: encoded files, metrics, checkpoints
    while kills < moments or (len(reached) < 2 and kills < 5 * moments):  # a machine that slows down is always killed early
        process = killed.start()
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            reached.add(
                (len([*killed.cache.rglob("*.safetensors")]), (killed.run / "metrics.jsonl").exists(), len(checkpoints(killed.run)))
            )
            if len(reached) == 1 and kills % moments == 0:
                killed.clear()  # every kill came late: begin anew, to be killed earlier too
        else:
            assert process.exitcode == 0, killed.log.read_text()
            assert killed.state() == wanted
            killed.clear()
    killed.finish()
    assert killed.state() == wanted
    assert "Traceback" not in killed.log.read_text()
    assert len(reached) > 1, f"all kills came at the same stage: {reached}"


@pytest.mark.slow
def test_killed_at_random_moments(server, tiny_model, tmp_path):
    kill_and_compare(server, tiny_model, write_pairs(tmp_path / "data", 12, size=(24, 16), shard_pairs=4), tmp_path, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_killed_at_twenty_random_moments(server, folders, tmp_path, kind):
    pairs = write_pairs(tmp_path / "data", 12, size=(80, 64), shard_pairs=4)
    kill_and_compare(server, folders[kind], pairs, tmp_path, 20, data__reference_draws=2)
