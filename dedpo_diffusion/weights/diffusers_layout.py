"""LoRA weights as one safetensors file in the layout of diffusers, with alpha and settings in the metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..console import UserError
from ..files import atomic_file
from ..text import NAMES


def diffusers_lora(
    parameters: Mapping[str, Tensor], *, rank: int, alpha: float, targets: list[str], rslora: bool = False, dora: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename adapter parameters to the keys that `load_lora_weights` reads.

    Args:
        parameters: "<layer>.lora_A.default.weight" (r, in) and "<layer>.lora_B.default.weight" (out, r), of the UNet or, as
            "text_encoder.<layer>..." and "text_encoder_2.<layer>...", of the text encoders.
        rank: r.
        alpha: lora_alpha; without it a reader assumes alpha = rank and the adapter loads at another strength.
        targets: names of the adapted layers.
        rslora, dora: variants of the adapter.

    Returns:
        The tensors, "unet.<layer>.lora_A.weight" and so on, float32, and the configuration of each part's adapter.

    Raises:
        ValueError: a parameter that is no part of the default adapter.
    """
    renamed = {}
    for name, value in parameters.items():
        if ".default." not in name:
            raise ValueError(f"{name} is not a parameter of the default adapter")
        part, _, layer = name.partition(".")
        # whatever a version of transformers calls its layers, files have the name that all of them read
        key = f"{part}.text_model.{layer}" if part in NAMES else f"unet.{name}"
        renamed[key.replace(".default.", ".")] = value.detach().float().cpu().contiguous()
    config = {"r": rank, "lora_alpha": alpha, "use_dora": dora, "use_rslora": rslora}
    metadata = {f"unet.{key}": value for key, value in (config | {"target_modules": sorted(targets)}).items()}
    for part in NAMES:
        layers = sorted({layer for layer in (key.rpartition(".lora_")[0] for key in renamed if key.startswith(f"{part}.")) if layer})
        if layers:
            own = config | {"target_modules": [layer.removeprefix(f"{part}.text_model.") for layer in layers]}
            metadata |= {f"{part}.{key}": value for key, value in own.items()}
    return renamed, metadata


def save_lora(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the file atomically; `config` where diffusers looks for it, `settings` as JSON under "dedpo_settings"."""
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(dict(config), sort_keys=True),
        "dedpo_settings": json.dumps(dict(settings), sort_keys=True),
    }
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def read_lora(path: Path, *, scale: float) -> dict[str, Tensor]:
    """The adapter parameters, named as `diffusers_lora` takes them, of a file in the layout of diffusers.

    Args:
        path: the file.
        scale: what the adapter's output will be multiplied by, alpha / r; the file's own is worked into lora_B.

    Raises:
        UserError: the file cannot be read, or holds other things than adapters of UNet and text encoders, each of one alpha and rank.
    """
    try:
        tensors = load_file(path)
        config = read_metadata(path).get("lora_adapter_metadata", {})
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a LoRA file ({error}); `dedpo export` writes such files") from error
    parts = {"unet", *NAMES}
    odd = [name for name in tensors if name.partition(".")[0] not in parts or ".lora_" not in name]
    if odd or not tensors:
        what = f"{odd[0]!r} is no part of an adapter in the layout of diffusers" if odd else "it is empty"
        raise UserError(f"{path}: {what}; give a file as `dedpo export RUN --format diffusers` writes it")
    if any(config.get(f"{part}.{kind}_pattern") for part in parts for kind in ("rank", "alpha")):
        raise UserError(f"{path}: its layers have ranks or alphas of their own, which cannot be trained on; give a LoRA of one rank")
    factors = {}
    for part in parts:
        ranks = (len(value) for name, value in tensors.items() if name.startswith(f"{part}.") and ".lora_A." in name)
        rank = next(ranks, 1)
        alpha = float(config.get(f"{part}.lora_alpha", rank))  # without metadata readers take alpha = rank
        factors[part] = alpha / (math.sqrt(rank) if config.get(f"{part}.use_rslora") else rank) / scale
    found = {}
    for name, value in tensors.items():
        part, _, inside = name.partition(".")
        layer, _, rest = inside.partition(".lora_")
        kind, _, tail = rest.partition(".")
        where = layer if part == "unet" else f"{part}.{layer.removeprefix('text_model.')}"
        found[".".join([f"{where}.lora_{kind}.default", *([tail] if tail else [])])] = value.float() * (factors[part] if kind == "B" else 1)
    return found


def read_metadata(path: Path) -> dict[str, Any]:
    """The adapter's configuration and the settings stored in a file that `save_lora` wrote."""
    with safe_open(path, "pt") as file:
        stored = file.metadata() or {}
    return {key: json.loads(stored[key]) for key in ("lora_adapter_metadata", "dedpo_settings") if key in stored}
