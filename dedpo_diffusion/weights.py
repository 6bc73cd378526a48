"""LoRA weights as one safetensors file in the layout of diffusers, with alpha and settings in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_file


def diffusers_lora(
    parameters: Mapping[str, Tensor], *, rank: int, alpha: float, targets: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename a UNet's adapter parameters to the keys that `load_lora_weights` reads.

    Args:
        parameters: "<layer>.lora_A.default.weight" (r, in) and "<layer>.lora_B.default.weight" (out, r).
        rank: r.
        alpha: lora_alpha; without it a reader assumes alpha = rank and the adapter loads at another strength.
        targets: names of the adapted layers.

    Returns:
        The tensors, "unet.<layer>.lora_A.weight" and so on, float32, and the adapter's configuration.

    Raises:
        ValueError: a parameter that is no part of the default adapter.
    """
    renamed = {}
    for name, value in parameters.items():
        if ".default." not in name:
            raise ValueError(f"{name} is not a parameter of the default adapter")
        renamed["unet." + name.replace(".default.", ".")] = value.detach().float().cpu().contiguous()
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets), "use_dora": False, "use_rslora": False}
    return renamed, {f"unet.{key}": value for key, value in config.items()}


def save_lora(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the file atomically; `config` where diffusers looks for it, `settings` as JSON under "dedpo_settings"."""
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(dict(config), sort_keys=True),
        "dedpo_settings": json.dumps(dict(settings), sort_keys=True),
    }
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """The adapter's configuration and the settings stored in a file that `save_lora` wrote."""
    with safe_open(path, "pt") as file:
        stored = file.metadata() or {}
    return {key: json.loads(stored[key]) for key in ("lora_adapter_metadata", "dedpo_settings") if key in stored}
