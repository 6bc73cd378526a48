"""What the tests of the training command share: its arguments, what a run leaves, and how far two runs are apart."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dedpo_diffusion.pipelines import train
from dedpo_diffusion.weights.run_folder import checkpoints


def arguments(base: Path, pairs: Path, out: Path, **changes: object) -> list[str]:
    """A run of 12 steps of 4 pairs in which the adapter moves."""
    settings = {
        "model": base, "data.pairs": pairs, "data.targets": "soft", "out": out, "device": "cpu", "optim.steps": 12, "optim.batch": 4,
        "optim.learning_rate": 0.003, "optim.warmup": 2, "objective.beta": 200, "checkpoint_every": 3, "log_every": 1,
        "data.sampling": "uniform", "data.caption_dropout": 0.3,
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def train_into(argv: list[str], log: Path) -> None:
    """`dedpo train` with its output in a file; here, since a process that is forked from a server imports it by name."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(train.main(argv))


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1][1] / "parameters.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def deviation(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest and mean absolute deviation over all parameters."""
    gaps = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    return gaps.max().item(), gaps.mean().item()


def stop_after(monkeypatch, step: int) -> None:
    """Interrupt the run once the checkpoint of a step is written."""
    real = train.save

    def save_and_stop(session, now):
        real(session, now)
        if now == step:
            monkeypatch.setattr(train, "save", real)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", save_and_stop)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps precision and accumulation for the life of a process; a command line has a process of its own."""
    _forget()
    yield
    _forget()  # what a module's own fixture trains comes before the next test


def _forget() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
