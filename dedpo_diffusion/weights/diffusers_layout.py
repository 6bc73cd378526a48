"""LoRA weights as one safetensors file in the layout of diffusers, with the configuration of the adapter in the metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.text_encoders import NAMES
from dedpo_diffusion.weights.algebra import folded
from dedpo_diffusion.weights.header import json_dictionary
from dedpo_diffusion.weights.lora import Lora, LoraLayer, collect, full_name, read_layer, rows
from dedpo_diffusion.weights.names import ORIGINAL, unet_path

PARTS = ("unet", *NAMES)
CONFIG = "lora_adapter_metadata"  # where diffusers looks for the configuration of the adapters
_ENDS = {  # the last part of a name, which programs and versions of diffusers wrote differently, and what it is
    "lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "alpha": "alpha", "lora_down.weight": "down", "lora_up.weight": "up",
    "dora_scale": "magnitude",
}  # fmt: skip
_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ENDS))})")
COMFY_TEXT = {  # what ComfyUI calls the text encoders
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}  # fmt: skip
UNET_BARE = re.compile(  # how the path of a UNet's layer begins that has no "unet." before it
    rf"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.|{ORIGINAL.pattern}"
)
DOTTED = re.compile(  # how a name begins that is read here
    rf"({'|'.join(PARTS)})\.|{'|'.join(map(re.escape, COMFY_TEXT))}|(diffusion_model\.)?({UNET_BARE.pattern})"
)


def to_diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the names that `load_lora_weights` reads, and the configuration of each part's adapter.

    All layers have one rank, and what they are scaled by is worked into their lora_B: diffusers before 0.34 and others read no
    configuration and take alpha = r. The patterns are written though they are empty: diffusers 0.34 to 0.39 refuse a file without them.

    Returns:
        "unet.<layer>.lora_A.weight" (r, in) and so on, contiguous, and {"unet.r": r, "unet.lora_alpha": r, ...}.

    Raises:
        UserError: a part of which some layers alone are DoRAs, which diffusers has no configuration for.
    """
    lora = folded(lora)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in PARTS:
        layers = {name.removeprefix(f"{part}."): layer for name, layer in lora.layers.items() if name.startswith(f"{part}.")}
        if not layers:
            continue
        config |= {f"{part}.{key}": value for key, value in _adapter_config(part, layers).items()}
        for name, layer in layers.items():
            tensors[f"{part}.{name}.lora_A.weight"] = layer.down.contiguous()
            tensors[f"{part}.{name}.lora_B.weight"] = layer.up.contiguous()
            if layer.magnitude is not None:
                shape = (1, -1, *[1] * (layer.down.ndim - 2)) if layer.down.ndim > 2 else (-1,)  # as peft has it
                tensors[f"{part}.{name}.lora_magnitude_vector.weight"] = layer.magnitude.contiguous().view(shape)
    return tensors, config


def _adapter_config(part: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Of layers of one rank and alpha = rank."""
    dora = {layer.magnitude is not None for layer in layers.values()}
    if len(dora) > 1:
        raise UserError(f"{part}: some of its layers are DoRAs and others are not, which diffusers cannot load; merge it into the model")
    rank = next(iter(layers.values())).rank
    names = sorted(name.removeprefix("text_model.") for name in layers)  # versions of transformers differ in it; peft compares the ends
    return {
        "r": rank, "lora_alpha": rank, "use_dora": dora.pop(), "use_rslora": False, "target_modules": names,
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


def from_diffusers(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Lora:
    """The LoRA in tensors whose names are paths with dots: of diffusers, of this version or an earlier one, of ComfyUI, of OneTrainer.

    Args:
        path: the file, for messages.
        tensors: as in the file.
        metadata: of the file; without a configuration there, alpha is r, as for any other reader.

    Raises:
        UserError: a tensor that is no part of an adapter of UNet or text encoders.
    """
    config = json_dictionary(path, metadata, CONFIG)
    bare = not any(key.startswith(tuple(f"{part}." for part in PARTS)) for key in config)  # of a UNet that was saved by itself
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, end = _place(path, key)
        collect(held, path, name, _ENDS[end], rows(path, name, value) if end == "dora_scale" else value)
    layers = {}
    for name, found in held.items():
        part, _, inside = name.partition(".")
        own = {key.removeprefix(f"{part}."): value for key, value in config.items() if bare or key.startswith(f"{part}.")}
        used = {role: value for role, value in found.items() if role != "alpha"} if config else found  # a configuration overrules it
        try:
            alpha = config_alpha(own, inside)
        except ValueError as error:
            raise UserError(f"{path}: its {CONFIG} says of {name}: {error}; export it again with the program that wrote it") from error
        layers[name] = read_layer(path, name, used, alpha, rslora=bool(own.get("use_rslora")))
    return Lora(layers, dict(metadata))


def _place(path: Path, key: str) -> tuple[str, str]:
    """The name in diffusers of the layer that a tensor belongs to, and the end of its name."""
    match = _NAME.fullmatch(_modern(with_part(key)))
    name = None if match is None else _named(match[1])
    if match is None or name is None:
        if key.endswith((".diff", ".diff_b")):
            raise UserError(
                f"{path}: it holds changes of biases or norms ({key!r}), which are not read; save it again without them (in ComfyUI with "
                "bias_diff off), or merge it with the program it was made for, and give that model"
            )
        raise UserError(f"{path}: {key!r} is no part of an adapter of a UNet or its text encoders; give a LoRA of an SD1.x, SD2.x or SDXL")
    return name, match[2]


def with_part(key: str) -> str:
    """A name as a pipeline's, from one of ComfyUI or one of a UNet by itself."""
    for start, part in COMFY_TEXT.items():
        if key.startswith(start):
            return f"{part}.{key.removeprefix(start)}"
    return f"unet.{key.removeprefix('diffusion_model.')}" if re.match(rf"diffusion_model\.|{UNET_BARE.pattern}", key) else key


def _named(place: str) -> str | None:
    """A layer's name in diffusers; None if it is of no UNet or text encoder."""
    part, _, inside = place.partition(".")
    if part not in PARTS or not inside:
        return None
    if part == "unet" and ORIGINAL.match(inside):
        found = unet_path(inside.replace(".", "_"))
        return None if found is None else f"unet.{found}"
    return full_name(part, inside)


def _modern(key: str) -> str:
    """A name as today's versions write it, from one of attention processors."""
    part, _, rest = key.partition(".")
    out = "to_out.0" if part == "unet" else "out_proj"

    def layer(match: re.Match[str]) -> str:
        which = match[1]
        name = out if which == "out" else f"to_{which}" if part == "unet" else f"{which}_proj"
        return f".{name}.lora.{match[2]}"

    return f"{part}." + re.sub(r"\.to_(q|k|v|out)_lora\.(down|up)", layer, rest.replace(".processor.", "."))


def config_alpha(config: Mapping[str, Any], name: str) -> float | None:
    """What an adapter's configuration says of a layer's alpha, None where it says nothing.

    As peft reads it (`peft.utils.other.get_pattern_key`): that of the first pattern that the end of the layer's name matches, else the
    common one. ValueError tells what is wrong with it.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"alpha_pattern is {patterns!r}, no dictionary")
    try:
        named = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
    except re.error as error:
        raise ValueError(f"a key of alpha_pattern is no regular expression ({error})") from error
    if named is None and "lora_alpha" not in config:
        return None
    found = config["lora_alpha"] if named is None else patterns[named]
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1e38:
        raise ValueError(f"alpha is {found!r}, not one finite number")
    return float(found)
