"""LoRA weights in the layout of kohya-ss/sd-scripts, which A1111, ComfyUI and the programs around them load.

A layer is "<prefix>_<its path with _ for .>", and has .lora_down.weight, .lora_up.weight, .alpha and, of a DoRA, .dora_scale. For the
UNet that path is the one of diffusers, but for SDXL the one of the original code, as sd-scripts has it: under diffusers' names its own
merging and resuming find nothing of SDXL, and A1111 no convolution of one upsampler. Files of either are read, since both are around, but
no program takes both in one file. Sources:
kohya-ss/sd-scripts networks/lora.py; ComfyUI comfy/lora.py and comfy/utils.py (unet_to_diffusers); A1111
extensions-builtin/Lora/networks.py (convert_diffusers_name_to_compvis); diffusers loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights.lora import Lora, collect, read_layer, rows
from dedpo_diffusion.weights.names import sdxl_original, text_path, unet_path

Family = Literal["sd1", "sd2", "sdxl"]
PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_PARTS = {prefix: part for prefixes in PREFIXES.values() for part, prefix in prefixes.items()}
_ENDS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
_OTHERS = (  # what other ends show a file to be
    (r"\.hada_", "a LoHa of LyCORIS"), (r"\.lokr_", "a LoKr of LyCORIS"), (r"\.oft_", "an OFT"), (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.lora_mid", "a LoCon in Tucker's form"), (r"^[^.]+\.(weight|on_input)$", "an (IA)3"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a LyCORIS with whole differences of weights"),
)  # fmt: skip


def to_kohya(lora: Lora, family: Family) -> dict[str, Tensor]:
    """The tensors under the names of this layout; rslora is worked into alpha, as readers scale by alpha / r alone.

    Args:
        lora: of one rank and alpha (`one_alpha`), since readers of this layout take several for one, or refuse them.
        family: of the base model; it names the text encoders.

    Returns:
        Contiguous tensors; alpha is float32 (), dora_scale (out, 1) or (out, 1, 1, 1).

    Raises:
        UserError: parts or layers that this family has not.
    """
    tensors = {}
    for name, layer in lora.layers.items():
        part, _, path = name.partition(".")
        if part not in PREFIXES[family]:
            raise UserError(f"{name}: an {family} has no {part}; give the --model that the LoRA belongs to")
        known = sdxl_original(path) if (family, part) == ("sdxl", "unet") else path
        if known is None:
            raise UserError(f"{name}: no layer of SDXL's UNet, so the kohya layout has no name for it; give --format diffusers")
        key = PREFIXES[family][part] + known.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float32)
        if layer.magnitude is not None:
            tensors[f"{key}.dora_scale"] = layer.magnitude.contiguous().view(-1, *[1] * (layer.down.ndim - 1))
    return tensors


def from_kohya(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Lora:
    """The LoRA in tensors of this layout, whether the UNet's layers are named as in diffusers or as in the original code.

    Args:
        path: the file, for messages.
        tensors: as in the file.
        metadata: of the file.

    Raises:
        UserError: a tensor that no plain LoRA or DoRA of an SD1.x, SD2.x or SDXL has.
    """
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        flat, _, end = key.partition(".")
        if end not in _ENDS:
            what = next((what for pattern, what in _OTHERS if re.search(pattern, key)), f"no plain LoRA ({key!r})")
            raise UserError(f"{path}: it is {what}, which is not read; merge it with the program it was made for, and give that model")
        name, role = _name(path, flat), _ENDS[end]
        collect(held, path, name, role, rows(path, name, value) if role == "magnitude" else value)
    return Lora({name: read_layer(path, name, found) for name, found in held.items()}, dict(metadata))  # sd-scripts' first have no alpha


def _name(path: Path, flat: str) -> str:
    """The layer's name in diffusers."""
    prefix = next((prefix for prefix in _PARTS if flat.startswith(prefix)), None)
    if prefix is not None:
        rest = flat.removeprefix(prefix)
        found = unet_path(rest) if prefix == "lora_unet_" else text_path(rest)
        if found is not None:
            return f"{_PARTS[prefix]}.{found}"
    raise UserError(f"{path}: {flat!r} is no layer of an SD1.x, SD2.x or SDXL; give a LoRA of one of these")


def family_of(lora: Lora) -> Family | None:
    """The family that a LoRA's own layers show it to be of, None if they fit several."""
    if any(name.startswith("text_encoder_2.") or re.search(r"transformer_blocks\.[1-9]", name) for name in lora.layers):
        return "sdxl"
    widths = {layer.down.shape[1] for name, layer in lora.layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    families: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    return families.get(widths.pop()) if len(widths) == 1 else None
