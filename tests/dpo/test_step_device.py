"""A step on a GPU never waits for it: tried on tensors that have a device and a shape but no values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.noising import ForwardProcess, TimestepDraw
from dedpo_diffusion.dpo.objectives import OBJECTIVES
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.models.backbone import Backbone

DEVICE = torch.device("cuda")
LOOKS = {"dr_dpo"}  # at its weights in every step


class Crossings(TorchDispatchMode):
    """Operations whose tensors lie on several devices; numbers, which need no copy, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor) and value.ndim]
        if len({value.device.type for value in tensors}) > 1:
            self.found.append(str(function))
        return result


class Arithmetic:
    """A model whose prediction is one number times its input: all of a step but the UNet."""

    def __init__(self) -> None:
        self.process = ForwardProcess(torch.linspace(0.99, 0.01, 1000), "v_prediction")
        self.device = torch.device("cpu")
        self.slope = nn.Parameter(torch.ones(()))

    def predict(self, noisy, timesteps, conditioning, *, reference=False):
        return noisy if reference else self.slope * noisy


def to_gpu(model: Backbone) -> None:
    """Put the UNet's tensors on a GPU that is not there; within FakeTensorMode."""
    for module in model.unet.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                    held[name] = nn.Parameter(there, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else there


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=DEVICE)


def step(model: Backbone | Arithmetic, **options: object) -> list[str]:
    """One step without its backward pass, within FakeTensorMode; returns what crossed between devices."""
    model.device, model.process = DEVICE, model.process.to(DEVICE)
    given = Conditioning(empty(3, 16, 72), empty(3, 32), empty(3, 2, 6))
    batch = PairBatch(empty(3, 2, 4, 8, 8), given, empty(3), empty(3))
    timesteps = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    numbers = {"timesteps": timesteps, "noise": empty(3, 4, 8, 8), "beta": 2000.0, "margin_cap": 10.0}
    with pytest.MonkeyPatch.context() as patched, Crossings() as seen:
        # backward passes need a real device; this one goes from the losses to the errors alone
        patched.setattr(torch.autograd, "grad", lambda of, to, **_: (torch.empty_like(to),))
        factor = TimestepDraw(0, 1000, weighting="min_snr").weights(model.process, timesteps)
        result = preference_step(model, batch, timestep_weight=factor, **numbers, **options)
    assert result.loss.shape == (3,) and result.loss.device.type == "cuda"
    return seen.found


@pytest.mark.slow
def test_no_step_of_a_unet_waits_or_copies(folders):
    model = Backbone(str(folders["sdxl"]), device=torch.device("cpu"))
    model.add_lora(rank=2, alpha=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(model)
        assert step(model) == []


@pytest.mark.parametrize("mode", ["none", "output", "relative", "probability", "adadpo"])
def test_no_balance_waits_or_copies(mode):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step(Arithmetic(), balance=mode) == []


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_objectives_wait_only_where_they_look_at_numbers(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        if kind in LOOKS:
            with pytest.raises(DataDependentOutputException):
                step(Arithmetic(), kind=kind, balance="none")
        else:
            assert step(Arithmetic(), kind=kind, balance="none") == []


def test_a_schedule_left_on_the_host_would_be_seen():
    with FakeTensorMode(allow_non_fake_inputs=True):
        timesteps = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        with Crossings() as seen:
            Arithmetic().process.scales(timesteps, empty(3, 2))
    assert seen.found
