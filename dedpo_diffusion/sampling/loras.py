"""LoRA files in a pipeline: what diffusers would pass over in silence is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.loading import UNLOADABLE
from dedpo_diffusion.weights import Lora, read_lora_file, to_diffusers


def add_loras(pipe: Any, model: str, files: Sequence[Path], strength: Sequence[float] = ()) -> None:
    """Load LoRA files of the layouts that `read_lora_file` reads; their changes add up.

    Args:
        pipe: of the model.
        model: its name, for messages.
        files: safetensors.
        strength: how strongly each counts; none are 1 each.

    Raises:
        UserError: a file that cannot be read, or a part of it that has no place in the model.
    """
    for place, file in enumerate(files):
        _add_lora(pipe, model, file, f"lora_{place}")
    if files:
        set_strengths(pipe, list(strength) or [1.0] * len(files))


def set_strengths(pipe: Any, strength: Sequence[float]) -> None:
    """Let the LoRAs that `add_loras` loaded count with these strengths, one each."""
    pipe.set_adapters([f"lora_{place}" for place in range(len(strength))], list(strength))


def _add_lora(pipe: Any, model: str, file: Path, name: str) -> None:
    """Load an adapter file; diffusers passes over what it has no place for, which is refused here."""
    read = read_lora_file(file)
    # diffusers takes alphas that differ by layer for one in the layout of kohya, so that they are worked into the factors
    scaled = {key: replace(layer, up=layer.up * layer.scale, alpha=float(layer.rank), rslora=False) for key, layer in read.layers.items()}
    layers = len(scaled)
    try:
        tensors, _ = to_diffusers(Lora(scaled))  # a reader without configuration takes alpha for the rank, as it is now
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    try:
        pipe.load_lora_weights(tensors, adapter_name=name)
    except UNLOADABLE as error:
        raise UserError(f"{file}: this adapter does not fit {model} ({(str(error).splitlines() or ['?'])[0]})") from error
    parts = (getattr(pipe, part, None) for part in ("unet", "text_encoder", "text_encoder_2"))
    found = sum(f".lora_A.{name}." in key for part in parts if part is not None for key, _ in part.named_parameters())
    if found < layers:
        raise UserError(f"{file}: {layers - found} of its {layers} layers have no place in {model}; it is a LoRA of another kind of model")
