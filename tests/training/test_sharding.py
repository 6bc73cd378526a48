"""Several processes: the steps of one, data without duplicates, FSDP2, checkpoints in the common format, losses of a worker."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.models.sharded_tensors import own_part, reshard, whole
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import write_pairs
from support.processes import FSDP, launch, together, write_job
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture

SMALL = {"optim__steps": 3, "checkpoint_every": 3, "optim__learning_rate": 3e-4, "optim__warmup": 1, "lora__rank": 2}
FULL = {name: value for name, value in SMALL.items() if name != "lora__rank"} | {"weights": "full", "optim__learning_rate": 1e-5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", 8, size=(64, 64), shard_pairs=5)


def stored(run, name: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1][1] / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("names", [("cached", "fsdp"), ("lora", "full")])
def test_two_processes_take_the_steps_of_one_and_visit_no_pair_twice(folders, tiny_model, pairs, tmp_path, names, monkeypatch):
    """One by four pairs against two by two, in sums of another order: losses, parameters, moments; FSDP2 among them. Timesteps alike."""
    cached = {"data__cache": tmp_path / "cache", "data__reference_draws": 3, "data__flip": "true", "data__views": 2}
    known = {
        "lora": (folders["sd15"], SMALL, {}),
        "cached": (folders["sdxl"], SMALL | cached, {}),
        "full": (folders["sd15"], FULL, {}),
        "fsdp": (tiny_model, FULL | {"optim__average": 0.9}, FSDP),
    }
    runs, alone = {name: known[name] for name in names}, []
    load = PairLoader.load

    def noting(self, first_visit, draws):
        loaded = load(self, first_visit, draws)
        alone[-1] += zip(range(first_visit, first_visit + 4), loaded.places, loaded.draws.timesteps.tolist(), strict=True)
        return loaded

    monkeypatch.setattr(PairLoader, "load", noting)
    for name, (model, changes, _) in runs.items():
        alone.append([])
        assert train.main(arguments(model, pairs, tmp_path / f"{name}-1", **changes)) == 0
    jobs = [
        {"arguments": arguments(model, pairs, tmp_path / f"{name}-2", **changes | {"optim__batch": 2}), "env": env}
        for name, (model, changes, env) in runs.items()
    ]
    done = together(2, tmp_path, jobs, visits=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("(2 x 2 x 1)") == len(runs)
    for name in runs:
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        for key, close in {"loss": 1e-5, "margin_abs_max": 1e-4, "gradient_norm": 1e-3}.items():
            numbers = [[line[key] for line in metrics(run)] for run in (one, two)]
            np.testing.assert_allclose(*numbers, rtol=1e-4, atol=close, err_msg=name)
        assert metrics(one)[-1]["margin_abs_max"] > 1e-3, name
        largest, mean = deviation(final(one), final(two))
        rate = runs[name][1]["optim__learning_rate"]
        assert largest < 2.5 * rate and mean < 1e-3 * rate, (name, largest, mean)  # AdamW turns rounding of a vanishing gradient into steps
        for file in checkpoints(one)[-1][1].glob("*.safetensors"):
            held, other = load_file(file), stored(two, file.stem)
            assert {key: (value.shape, value.dtype) for key, value in held.items()} == {
                key: (value.shape, value.dtype) for key, value in other.items()
            }
    ranks = [json.loads((tmp_path / f"visits-{rank}.json").read_text()) for rank in (0, 1)]
    for visited, expected, name in zip(zip(*ranks, strict=True), alone, names, strict=True):
        seen = sorted(tuple(one) for rank in visited for one in rank)  # 3 steps of 4 pairs: one pass over the 8 pairs, and a half
        assert seen == expected
        for step in () if name == "cached" else range(3):  # one timestep from each quarter; of three stored draws not quite
            assert sorted(t // 250 for _, _, t in seen[4 * step : 4 * step + 4]) == [0, 1, 2, 3]
        visits = [(visit, place) for visit, place, _ in seen]
        assert [visit for visit, _ in visits] == list(range(12))
        assert sorted(place for _, place in visits[:8]) == list(range(8))
        assert len({place for _, place in visits[8:]}) == 4


# ---- parts and wholes


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone; its parts are the wholes, but tensors are DTensors."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_plain_tensors_pass_through(tmp_path):
    values = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.arange(10.0)[2:4]}
    found = whole(values)
    assert all(torch.equal(found[name], values[name]) and found[name].is_contiguous() for name in values)
    assert found["b"].untyped_storage().nbytes() == 8  # a file holds no cut of a larger tensor
    assert whole(values, keep=False) == {}
    for like in (torch.zeros(3, 2), torch.zeros(2, 3).T):
        part = own_part(values["a"], like)
        assert torch.equal(part, values["a"]) and part.stride() == like.stride()
    reshard(torch.nn.Linear(1, 1))


def test_parts_make_the_whole(world):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layer = torch.nn.Linear(3, 5)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    fully_shard(layer)
    live = dict(layer.named_parameters())
    assert all(isinstance(value, DTensor) for value in live.values())
    assert all(torch.equal(value, before[name]) for name, value in whole(live).items())
    own = own_part(before["weight"] + 1, live["weight"])
    assert isinstance(own, DTensor) and own.placements == live["weight"].placements
    assert own_part(own, live["weight"]).full_tensor().equal(before["weight"] + 1)
    with torch.no_grad():
        layer(torch.ones(1, 3))
    assert not isinstance(layer.weight, DTensor)  # a forward pass leaves the whole there
    reshard(layer)
    assert isinstance(layer.weight, DTensor)


# ---- what does not go together


@pytest.mark.parametrize(
    ("env", "changes", "words"),
    [
        (FSDP, {}, "FSDP2 is for weights=full"),
        (FSDP | {"FSDP_VERSION": "1"}, FULL, "--fsdp_version 2"),
        (FSDP, FULL | {"mixed_precision": "fp16"}, "take bf16"),
        (FSDP, FULL | {"optim__optimizer": "adamw_8bit"}, "take adamw"),
        (FSDP, FULL | {"compile": "true"}, "compile=true"),
        (FSDP, FULL | {"validation__every": 2, "validation__pairs": "held-out"}, "validation.every"),
        (FSDP, FULL, "needs several processes"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "take FSDP2"),
    ],
)
def test_ways_of_sharing_that_do_not_go_with_the_settings(tiny_model, pairs, tmp_path, monkeypatch, capsys, env, changes, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", **changes)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_if_its_steps_stay_the_same(tiny_model, pairs, tmp_path, capsys):
    out, whole_run = tmp_path / "run", tmp_path / "whole"
    changes = {"optim__steps": 6, "checkpoint_every": 3, "optim__learning_rate": 3e-4}
    assert train.main(arguments(tiny_model, pairs, whole_run, **changes)) == 0
    assert train.main(arguments(tiny_model, pairs, out, **changes)) == 0
    shutil.rmtree(checkpoints(out)[-1][1])
    assert train.main(arguments(tiny_model, pairs, out, **changes, optim__batch=2)) == 2
    assert "pairs_of_a_step is '4' there, '2' now" in " ".join(capsys.readouterr().err.split())
    assert train.main(arguments(tiny_model, pairs, out, **changes, optim__batch=2, optim__accumulation=2)) == 0
    largest, mean = deviation(final(whole_run), final(out))
    assert 0 < largest < 1e-3 and mean < 1e-6


# ---- FSDP2


def resumes_to_the_bit(tmp_path: Path, job: dict) -> None:
    """Run a job of four steps on two processes, take its last checkpoint away and run it again: all tensors of it are equal."""
    done = together(2, tmp_path, [job])
    assert done.returncode == 0, done.stderr[-3000:]
    last = checkpoints(tmp_path / "run")[-1][1]
    last.rename(tmp_path / "first")
    done = together(2, tmp_path, [job])
    assert done.returncode == 0 and "after step 2" in done.stdout, done.stderr[-3000:]
    for name in sorted(file.name for file in last.glob("*.safetensors")):
        one, other = load_file(tmp_path / "first" / name), load_file(last / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16", "gradient_checkpointing": "true"}, {}])
def test_a_sharded_run_resumes_to_the_bit_and_exports(folders, pairs, tmp_path, changes):
    changes = FULL | {"optim__steps": 4, "checkpoint_every": 2, "optim__average": 0.9} | changes
    changes |= {"optim__batch": 1, "optim__accumulation": 2}
    job = {"arguments": arguments(folders["sdxl"], pairs, tmp_path / "run", **changes), "env": FSDP}
    resumes_to_the_bit(tmp_path, job)
    assert train.main(arguments(folders["sdxl"], pairs, tmp_path / "alone", **changes | {"optim__batch": 2})) == 0
    both = list(zip(metrics(tmp_path / "run"), metrics(tmp_path / "alone"), strict=True))
    rounded = "mixed_precision" in changes  # to bfloat16: beta 200 makes whole margins of it, which steps amplify
    for line, alone in both[:1] if rounded else both:
        assert line["loss"] == pytest.approx(alone["loss"], abs=5e-2 if rounded else 1e-4)
    assert export.main([str(tmp_path / "run"), "--format", "merged", "--average", "false", "--out", str(tmp_path / "model")]) == 0
    trained = final(tmp_path / "run")
    for name, value in load_pipeline(str(tmp_path / "model")).unet.state_dict().items():
        assert torch.equal(value, trained[name])


# ---- trouble


def workers(launcher: int) -> list[int]:
    with open(f"/proc/{launcher}/task/{launcher}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_a_checkpoint_that_cannot_be_written_ends_all_processes(folders, pairs, tmp_path, env):
    """A limit on the size of files, which nothing but the parameters reaches: the main process fails while the other waits for it."""
    job = write_job(tmp_path, [{"arguments": arguments(folders["sd15"], pairs, tmp_path / "run", **FULL), "env": env}])
    begun = time.monotonic()
    done = subprocess.run(
        launch(2, job), capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - begun < 150
    assert "File too large" in done.stderr
    assert not checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_a_lost_worker_ends_the_run_which_then_resumes(tiny_model, pairs, tmp_path):
    changes = SMALL | {"optim__steps": 60, "checkpoint_every": 2, "optim__batch": 2}
    command = launch(2, write_job(tmp_path, [{"arguments": arguments(tiny_model, pairs, tmp_path / "run", **changes)}]))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    assert process.wait(60) != 0
    step, folder = checkpoints(tmp_path / "run")[-1]
    assert 2 <= step < 60 and load_file(folder / "parameters.safetensors")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and f"after step {step}" in done.stdout, done.stderr[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 61))
    assert train.main(arguments(tiny_model, pairs, tmp_path / "alone", **changes | {"optim__batch": 4})) == 0
    assert deviation(final(tmp_path / "run"), final(tmp_path / "alone"))[1] < 1e-4
