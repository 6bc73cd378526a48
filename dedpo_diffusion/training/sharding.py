"""How the processes of a training run share the work: data parallel, or with weights in parts, as the launcher asked."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from dedpo_diffusion.models.backbone import Backbone


def build_accelerator(settings: TrainSettings) -> Accelerator:
    """Join the other processes.

    Raises:
        UserError: the launcher asks for a way of sharing that these settings do not go with.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin, disable_fsdp_ram_efficient_loading

    fsdp = _asked("FSDP")
    if _asked("DEEPSPEED"):
        raise UserError("the launcher asks for DeepSpeed, which is not supported; take FSDP2 (configs/accelerate/fsdp2.yaml)")
    if fsdp:
        _check_fsdp(settings)
        disable_fsdp_ram_efficient_loading()  # with it, transformers leaves the text encoders of all but one process empty
    _forget_earlier_run()
    # unreduced gradients of several passes would lie whole on every device
    accumulation = GradientAccumulationPlugin(num_steps=settings.optim.accumulation, sync_each_batch=fsdp)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # others wait while the main process encodes
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_plugin=accumulation,
        cpu=settings.device == "cpu", kwargs_handlers=[patient],
    )  # fmt: skip
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision=fp16 needs a GPU, and this trains on the CPU; give --mixed_precision bf16, or no")
    if fsdp:
        _prepare_fsdp(accelerator)
    return accelerator


def _forget_earlier_run() -> None:
    """Drop the precision and device of an earlier run in this process, which accelerate would keep; several processes train but once."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _asked(way: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"


def _check_fsdp(settings: TrainSettings) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP's first version, which is not supported; give `accelerate launch --fsdp_version 2`")
    if settings.weights == "lora":
        raise UserError("FSDP2 is for weights=full; an adapter is small, so launch without --use_fsdp, for plain data parallel training")
    if settings.mixed_precision == "fp16":
        raise UserError("mixed_precision=fp16 does not go with FSDP2; take bf16")
    if settings.validation.every is not None:
        raise UserError("validation.every does not go with FSDP2; leave it out, and judge what `dedpo export` writes")
    if settings.compile:
        raise UserError("compile=true does not go with FSDP2; leave it out")
    if settings.optim.optimizer != "adamw":
        raise UserError(f"optim.optimizer={settings.optim.optimizer} does not go with FSDP2; take adamw, whose moments are shared out")


def _prepare_fsdp(accelerator: Accelerator) -> None:
    import torch
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import OffloadPolicy

    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate knows FSDP on accelerators alone, torch everywhere
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP2 needs several processes; give `accelerate launch --num_processes N`")
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        raise UserError("leave FSDP's activation checkpointing off, which renames weights; give the run's gradient_checkpointing")
    if type(plugin.cpu_offload) is not OffloadPolicy:
        raise UserError("FSDP2's offloading is not supported; give `accelerate launch --fsdp_offload_params false`")
    # Weights are gathered in float32 and rounded by autocast, as without FSDP: a policy here would also round norms and the images' sizes.
    plugin.mixed_precision_policy = None
    torch.set_autocast_cache_enabled(False)  # it would keep a rounded copy of every gathered weight


def hand_over(accelerator: Accelerator, model: Backbone, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
    """Give accelerate what is trained, and its reference where that is shared out too; returns the optimizer as the loop uses it."""
    if not accelerator.is_fsdp2:
        model.policy, prepared = accelerator.prepare(model.network, optimizer)
        return prepared
    from accelerate.utils import fsdp2_prepare_model

    _, prepared = accelerator.prepare(model.unet, optimizer)  # in place, where `network` holds it
    if model.frozen is not None:
        fsdp2_prepare_model(accelerator, model.frozen)
    return prepared
