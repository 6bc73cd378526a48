"""The base model of a run, and its adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dedpo_diffusion.models.backbone import Backbone


def load_model(settings: TrainSettings, accelerator: Accelerator) -> Backbone:
    """The base model, frozen, in the run's precision."""
    import torch

    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.models.memory import slow_on_cpu, tell_cpu

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
    model = Backbone(
        settings.model, device=accelerator.device, dtype=dtype, config=settings.model_config, prediction=settings.model_prediction
    )
    if slow_on_cpu(model.unet):
        tell_cpu(settings.model)
    return model


def add_lora(settings: TrainSettings, model: Backbone) -> None:
    """Give the model its adapter: fresh, or one to go on from.

    Raises:
        UserError: a setting that does not fit the model, or the adapter to go on from.
    """
    import torch

    from dedpo_diffusion.models.backbone import ATTENTION
    from dedpo_diffusion.weights import read_lora_file, to_parameters

    lora = settings.lora
    if lora.rank < 1 or not lora.alpha > 0:
        raise UserError(f"lora.rank is {lora.rank}, lora.alpha {lora.alpha:g}; both must be positive")
    start = None
    if lora.start is not None:
        scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        start = to_parameters(read_lora_file(lora.start), scale=scale)
    torch.manual_seed(settings.seed)  # of the adapter's first weights
    model.add_lora(
        rank=lora.rank, alpha=lora.alpha, targets=lora.targets or list(ATTENTION), dropout=lora.dropout, rslora=lora.rslora,
        dora=lora.dora, text=lora.text_encoders, start=start,
    )  # fmt: skip
