"""How the processes of a training run share the work: data parallel, or with weights or moments in parts, as the launcher asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

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

    fsdp, deepspeed = _asked("FSDP"), _asked("DEEPSPEED")
    if deepspeed:
        _check_deepspeed(settings)
    if fsdp:
        _check_fsdp(settings)
        disable_fsdp_ram_efficient_loading()  # with it, transformers leaves the text encoders of all but one process empty
    # unreduced gradients of several passes would lie whole on every device
    accumulation = GradientAccumulationPlugin(num_steps=settings.optim.accumulation, sync_each_batch=fsdp)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # others wait while the main process encodes
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else settings.mixed_precision, gradient_accumulation_plugin=accumulation,
        cpu=settings.device == "cpu", kwargs_handlers=[patient],
    )  # fmt: skip
    if fsdp:
        _prepare_fsdp(accelerator)
    if deepspeed:
        _prepare_deepspeed(accelerator, settings)
    return accelerator


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
    if settings.compile or settings.channels_last:
        raise UserError(f"{'compile' if settings.compile else 'channels_last'}=true does not go with FSDP2; leave it out")
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


def _check_deepspeed(settings: TrainSettings) -> None:
    from accelerate.utils import is_deepspeed_available

    if not is_deepspeed_available():
        raise UserError("the launcher asks for DeepSpeed, which is not installed; `pip install deepspeed`, or use FSDP2")
    if settings.mixed_precision == "fp16":
        raise UserError("mixed_precision=fp16 does not go with DeepSpeed here; take bf16")
    if settings.optim.optimizer != "adamw":
        raise UserError(f"optim.optimizer={settings.optim.optimizer} does not go with DeepSpeed; take adamw, whose moments are shared out")


def _prepare_deepspeed(accelerator: Accelerator, settings: TrainSettings) -> None:
    plugin, optim = accelerator.state.deepspeed_plugin, settings.optim
    held = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise UserError(f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported; give 1 or 2, or use FSDP2")
    for part in ("optimizer", "param"):
        if str(held["zero_optimization"].get(f"offload_{part}", {}).get("device", "none")) != "none":
            raise UserError("DeepSpeed's offloading is not supported; leave it at none")
    for name in ("optimizer", "scheduler"):
        if name in held:
            raise UserError(f"the DeepSpeed configuration names a {name}; leave it to the run's own settings")
    for name in ("fp16", "bf16"):
        if str(held.get(name, {}).get("enabled", False)).lower() == "true":
            raise UserError(f"the DeepSpeed configuration enables {name}, which would round the weights; give the run's mixed_precision")
    held["train_micro_batch_size_per_gpu"], held["gradient_accumulation_steps"] = optim.batch, optim.accumulation
    held["gradient_clipping"] = optim.clip


class SharedMoments:
    """AdamW's moments that DeepSpeed's ZeRO shares out, whole and by parameter, as a checkpoint has them from any other run.

    Args:
        parameters: what is trained, in the optimizer's order.
        optimizer: the one over this process's flat part of them.
        keep: whether this process keeps what all of them gather.
    """

    NAMES = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool) -> None:
        self.parameters, self.optimizer, self.keep = parameters, optimizer, keep
        self.param_groups = [{"params": list(parameters)}]

    def _held(self) -> dict[str, Any]:
        [group] = self.optimizer.param_groups
        [flat] = group["params"]
        return self.optimizer.state[flat]

    def state_dict(self) -> dict[str, Any]:
        """The state by number of the parameter, none before the first step; all processes call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[int, dict[str, torch.Tensor]] = {}
        if not self._held():
            return {"state": found, "param_groups": []}
        for number, parameter in enumerate(self.parameters):
            for name in self.NAMES:
                value = safe_get_full_optimizer_state(parameter, name)
                if self.keep:
                    found.setdefault(number, {"step": self._held()["step"].clone()})[name] = value.cpu()
        return {"state": found, "param_groups": []}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take this process's part of a state, and of the parameters as they are now."""
        import torch
        from deepspeed.utils import safe_set_full_fp32_param

        [group], held = self.optimizer.param_groups, self._held()
        [flat] = group["params"]
        held |= {name: torch.zeros_like(flat) for name in self.NAMES}
        for number, parameter in enumerate(self.parameters):
            safe_set_full_fp32_param(parameter, parameter.detach())
            held["step"] = stored["state"][number]["step"].to(flat.device if group["fused"] else "cpu")  # where AdamW looks for it
            where = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed
            if where is None:  # another process's
                continue
            whole, own = where.lp_fragment_address, where.hp_fragment_address
            for name in self.NAMES:
                value = stored["state"][number][name].flatten().narrow(0, whole.start, whole.numel)
                held[name].narrow(0, own.start, own.numel).copy_(value)


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


def stored_optimizer(accelerator: Accelerator, model: Backbone, optimizer: AcceleratedOptimizer) -> torch.optim.Optimizer | SharedMoments:
    """The optimizer as checkpoints read and write it."""
    if not _asked("DEEPSPEED"):
        return optimizer.optimizer
    inner = optimizer.optimizer.optimizer  # within accelerate's and within DeepSpeed's
    return SharedMoments(list(model.trainable().values()), inner, keep=accelerator.is_main_process)
