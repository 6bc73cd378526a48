"""Optimizers, the moving average, and a polite end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.stopping import StopSignal
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.training.optimizers import Average, build_optimizer
from dedpo_diffusion.weights.checkpoints import optimizer_tensors, restore_optimizer
from dedpo_diffusion.weights.run_folder import checkpoints
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

NUMBERS = {"learning_rate": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.01}


def test_an_optimizer_goes_on_from_its_tensors_as_if_it_had_not_stopped():
    torch.manual_seed(0)
    targets = [torch.randn(4, 3), torch.randn(5)]

    def fresh():
        parameters = [torch.zeros_like(target).requires_grad_() for target in targets]
        return parameters, build_optimizer("adamw", parameters, **NUMBERS)

    def step(parameters, optimizer):
        sum((p - target).square().sum() for p, target in zip(parameters, targets, strict=True)).backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = fresh()
    for _ in range(6):
        step(whole, optimizer)
    first, before = fresh()
    for _ in range(3):
        step(first, before)
    second, after = fresh()
    restore_optimizer(after, optimizer_tensors(before))
    for ours, theirs in zip(second, first, strict=True):
        ours.data.copy_(theirs)
    for _ in range(3):
        step(second, after)
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))
    assert all((one - target).norm() < target.norm() for one, target in zip(whole, targets, strict=True))


def test_adamw_takes_the_steps_of_the_plain_loop():
    options = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(8, 33), (1,), (64, 8), (3, 3, 4, 5)] * 5]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    plain = [torch.nn.Parameter(value.double()) for value in start]
    optimizer = build_optimizer("adamw", ours, **options)
    reference = torch.optim.AdamW(plain, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, foreach=False, fused=False)
    for _ in range(6):
        for a, b in zip(ours, plain, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.double()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)


def test_integers_of_an_optimizer_stay_integers():
    parameter = torch.zeros(2, requires_grad=True)
    one, other = (torch.optim.SGD([parameter]) for _ in range(2))
    one.state[parameter] = {"count": 7, "absmax": torch.ones(2)}
    restore_optimizer(other, optimizer_tensors(one))
    assert other.state[parameter]["count"] == 7
    assert type(other.state[parameter]["count"]) is int
    one.state[parameter] = {"count": 7.5}
    with pytest.raises(TypeError, match="float"):
        optimizer_tensors(one)


def test_eight_bits_need_a_gpu():
    with pytest.raises(UserError, match="CUDA"):
        build_optimizer("adamw_8bit", [torch.zeros(2)], **NUMBERS)


def test_the_average_is_the_exponential_one():
    values = torch.randn(9, 3)
    average = Average({"x": values[0]}, 0.8)
    for value in values[1:]:
        average.update({"x": value}, 1000)
    weights = torch.tensor([0.8**8] + [0.2 * 0.8 ** (8 - k) for k in range(1, 9)])
    torch.testing.assert_close(average.values["x"], weights @ values)
    late = Average({"x": torch.ones(1)}, 0.9999)
    for step in range(1, 201):
        late.update({"x": torch.zeros(1)}, step)
    assert late.values["x"] < 1e-6  # a start that is far away is forgotten long before 1 / (1 - decay) steps
    with pytest.raises(ValueError, match="other parameters"):
        average.restore({"y": values[0]})
    with pytest.raises(ValueError, match="decay"):
        Average({}, 1.0)


@pytest.mark.slow
def test_a_run_keeps_resumes_and_exports_its_average(tiny_model, tiny_pairs, tmp_path, monkeypatch):
    changes = {"optim__average": 0.7, "weights": "full", "optim__steps": 6}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", **changes)) == 0
    stop_after(monkeypatch, 3)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)) == 130
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)) == 0
    whole, part = (load_file(checkpoints(tmp_path / name)[-1][1] / "average.safetensors") for name in ("whole", "part"))
    assert deviation(whole, part) == (0, 0)
    assert deviation(whole, final(tmp_path / "whole"))[0] > 1e-5
    for flag, wanted in (("true", whole), ("false", final(tmp_path / "whole"))):
        file = tmp_path / flag
        assert export.main([str(tmp_path / "whole"), "--format", "merged", "--out", str(file), "--average", flag]) == 0
        written = load_file(file / "unet" / "diffusion_pytorch_model.safetensors")
        assert set(written) == set(wanted)
        assert all(torch.equal(written[name], value) for name, value in wanted.items())


def test_signals_in_a_row_are_one_and_a_later_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before
    script = (
        "import os, signal, time; from dedpo_diffusion.core import stopping; stopping.PATIENCE = 0.05\n"
        "with stopping.StopSignal():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["alive"], -signal.SIGTERM)


def test_moments_that_are_nested_are_kept():
    parameter = torch.zeros(2, requires_grad=True)
    one, other = (torch.optim.SGD([parameter]) for _ in range(2))
    one.state[parameter] = {"count": 3, "__bnb_optimizer_quant_state__": {"state1": torch.ones(2), "absmax1": torch.ones(1)}}
    restore_optimizer(other, optimizer_tensors(one))
    assert set(other.state[parameter]) == {"count", "state1", "absmax1"}


def test_options_of_an_adapter_are_refused_where_every_weight_is_trained(tiny_model, tiny_pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", weights="full", lora__rank=4)) == 2
    assert "leave the options of lora out" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_saves_leaves_and_the_same_command_ends_with_the_same_bits(tiny_model, tiny_pairs, tmp_path):
    changes = {"optim__steps": 24, "checkpoint_every": 1000}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", **changes)) == 0
    script = Path(train.__file__)
    command = [sys.executable, str(script), *arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "part" / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) >= 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.terminate()
    assert process.wait(60) == 143
    told = process.stderr.read()
    process.stderr.close()
    (step, _), *rest = checkpoints(tmp_path / "part")
    assert not rest
    assert 5 <= step < 24
    assert f"saved after step {step}" in told
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
