"""LoRA weights in the layout of kohya-ss/sd-scripts, which A1111, ComfyUI and the programs around them load.

A layer is "<prefix>_<its path with _ for .>", and has .lora_down.weight, .lora_up.weight, .alpha and, of a DoRA, .dora_scale. For the
UNet that path is the one of diffusers (SD1.x and SD2.x of sd-scripts, and all that is written here) or, for SDXL, the one of the
original code (SDXL of sd-scripts): all these programs and diffusers know both for SDXL, but not both in one file. Sources:
kohya-ss/sd-scripts networks/lora.py; ComfyUI comfy/lora.py and comfy/utils.py (unet_to_diffusers); A1111
extensions-builtin/Lora/networks.py (convert_diffusers_name_to_compvis); diffusers loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.single_file import UNET_ENDS, UNET_RESNET
from dedpo_diffusion.weights.lora import Lora, LoraLayer, collect, read_layer

Family = Literal["sd1", "sd2", "sdxl"]
PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_PARTS = {prefix: part for prefixes in PREFIXES.values() for part, prefix in prefixes.items()}
# SDXL's embedding of sizes under the name of the original code: under that of diffusers, neither A1111 nor diffusers finds it
_ORIGINAL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
_ENDS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
_OTHERS = (  # what other ends show a file to be
    (r"\.hada_", "a LoHa of LyCORIS"), (r"\.lokr_", "a LoKr of LyCORIS"), (r"\.oft_", "an OFT"), (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.lora_mid", "a LoCon in Tucker's form"), (r"^[^.]+\.(weight|on_input)$", "an (IA)3"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a LyCORIS with whole differences of weights"),
)  # fmt: skip
_UNET_WORDS = (  # the words of a layer's path in diffusers' UNet; some hold a _ themselves
    "down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers", "transformer_blocks", "conv_in",
    "conv_out", "conv_shortcut", "conv1", "conv2", "conv", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2",
    "proj_in", "proj_out", "proj", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net",
)  # fmt: skip
_TEXT_WORDS = (
    "text_model", "text_projection", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
)  # fmt: skip
_RESNET = {new.replace(".", "_"): old for old, new in UNET_RESNET.items()}
_TOP = {new.replace(".", "_"): old for old, new in UNET_ENDS.items()}


def to_kohya(lora: Lora, family: Family) -> dict[str, Tensor]:
    """The tensors under the names of this layout; rslora is worked into alpha, as readers scale by alpha / r alone.

    Args:
        lora: of one alpha (`one_alpha`), since diffusers (0.42) takes alphas that differ for one when it reads this layout.
        family: of the base model; it names the text encoders.

    Returns:
        Contiguous tensors; alpha is float32 (), dora_scale (out, 1) or (out, 1, 1, 1).

    Raises:
        UserError: parts that this family has not.
    """
    tensors = {}
    for name, layer in lora.layers.items():
        part, _, path = name.partition(".")
        if part not in PREFIXES[family]:
            raise UserError(f"{name}: an {family} has no {part}; give the --model that the LoRA belongs to")
        key = PREFIXES[family][part] + _ORIGINAL.get(path, path.replace(".", "_"))
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
        collect(held, path, _name(path, flat), _ENDS[end], value)
    return Lora(dict(_layers(path, held)), dict(metadata))


def _layers(path: Path, held: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, LoraLayer]]:
    for name, found in held.items():
        magnitude = found.get("magnitude")
        if magnitude is not None and magnitude.ndim and magnitude.numel() != len(magnitude):
            raise UserError(
                f"{path}: {name} is a DoRA with magnitudes of the weight's columns (LyCORIS' wd_on_output=False), which is not read; "
                "merge it with the program it was made for, and give that model"
            )
        yield name, read_layer(path, name, found)  # sd-scripts' first files have no alpha


def _name(path: Path, flat: str) -> str:
    """The layer's name in diffusers."""
    prefix = next((prefix for prefix in _PARTS if flat.startswith(prefix)), None)
    if prefix is not None:
        rest = flat.removeprefix(prefix)
        found = _unet_name(rest) if prefix == "lora_unet_" else _dotted(rest, _TEXT_WORDS)
        if found is not None:
            return f"{_PARTS[prefix]}.{found}"
    raise UserError(f"{path}: {flat!r} is no layer of an SD1.x, SD2.x or SDXL; give a LoRA of one of these")


def _dotted(flat: str, words: tuple[str, ...]) -> str | None:
    """The path whose words were joined with _; None if it has other words."""
    word = rf"(?:{'|'.join(words)}|\d+)(?=_|$)"
    return ".".join(re.findall(word, flat)) if re.fullmatch(rf"{word}(?:_{word})*", flat) else None


def _unet_name(flat: str) -> str | None:
    """The path in diffusers of a layer whose path is that of diffusers or of the original code, with two resnets a level."""
    if flat in _TOP:
        return _TOP[flat]
    match = re.fullmatch(r"(?:(input|output)_blocks_(\d+)|(middle_block))_(\d+)_(.+)", flat)
    if match is None:
        return _dotted(flat, _UNET_WORDS)
    way, place, kind, rest = match[1], int(match[2] or 0), int(match[4]), match[5]
    if match[3]:
        unit = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}.get(kind)
        return _inside(f"mid_block.{unit}", kind != 1, rest) if unit else None
    if way == "input":
        if place == 0:
            return None
        block, number = f"down_blocks.{(place - 1) // 3}", (place - 1) % 3
        if (kind, rest) == (0, "op"):
            return f"{block}.downsamplers.0.conv"
    else:
        block, number = f"up_blocks.{place // 3}", place % 3
        if rest == "conv":
            return f"{block}.upsamplers.0.conv"
    return _inside(f"{block}.{'attentions' if kind else 'resnets'}.{number}", kind == 0, rest)


def _inside(unit: str, resnet: bool, rest: str) -> str | None:
    inside = _RESNET.get(rest) if resnet else _dotted(rest, _UNET_WORDS)
    return None if inside is None else f"{unit}.{inside}"


def family_of(lora: Lora) -> Family | None:
    """The family that a LoRA's own layers show it to be of, None if they fit several."""
    if any(name.startswith("text_encoder_2.") or re.search(r"transformer_blocks\.[1-9]", name) for name in lora.layers):
        return "sdxl"
    widths = {layer.down.shape[1] for name, layer in lora.layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    families: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    return families.get(widths.pop()) if len(widths) == 1 else None
