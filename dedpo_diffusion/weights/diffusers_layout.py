"""LoRA weights as one safetensors file in the layout of diffusers, with alpha and settings in the metadata."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.text_encoders import NAMES
from dedpo_diffusion.weights.header import json_dictionary
from dedpo_diffusion.weights.lora import Lora, LoraLayer, collect, full_name, read_layer

PARTS = ("unet", *NAMES)
CONFIG = "lora_adapter_metadata"  # where diffusers looks for the configuration of the adapters
# the last part of a name, which versions of diffusers wrote differently, and what it is
_ENDS = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "alpha": "alpha",
}  # fmt: skip
_NAME = re.compile(rf"({'|'.join(PARTS)})\.(.+)\.({'|'.join(map(re.escape, _ENDS))})")


def to_diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the names that `load_lora_weights` reads, and the configuration of each part's adapter.

    Returns:
        "unet.<layer>.lora_A.weight" (r, in) and so on, contiguous, and {"unet.r": ..., "unet.lora_alpha": ...}: without lora_alpha a
        reader takes alpha = r, and the LoRA loads at another strength.

    Raises:
        UserError: a part of which some layers alone are DoRAs, which diffusers has no configuration for.
    """
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
    dora = {layer.magnitude is not None for layer in layers.values()}
    if len(dora) > 1:
        raise UserError(f"{part}: some of its layers are DoRAs and others are not, which diffusers cannot load; merge it into the model")
    rslora = all(layer.rslora for layer in layers.values())
    # what each layer's alpha is if all are scaled by the same rule
    alphas = {name: layer.alpha if layer.rslora == rslora else layer.scale * layer.rank for name, layer in layers.items()}
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank, alpha = (Counter(sorted(values.values())).most_common(1)[0][0] for values in (ranks, alphas))
    names = {name: name.removeprefix("text_model.") for name in layers}  # versions of transformers differ in it; peft compares the ends
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_dora": dora.pop(), "use_rslora": rslora}
    config["target_modules"] = sorted(names.values())
    for kind, values, common in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        others = {names[name]: value for name, value in sorted(values.items()) if value != common}
        if others:
            config[kind] = others
    return config


def from_diffusers(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Lora:
    """The LoRA in tensors under the names of diffusers, of this version or an earlier one.

    Args:
        path: the file, for messages.
        tensors: as in the file.
        metadata: of the file; without a configuration there, alpha is r, as for any other reader.

    Raises:
        UserError: a tensor that is no part of an adapter of UNet or text encoders.
    """
    config = json_dictionary(path, metadata, CONFIG)
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _NAME.fullmatch(_modern(key))
        if match is None:
            raise UserError(f"{path}: {key!r} is no part of an adapter in the layout of diffusers; give a LoRA of a UNet and text encoders")
        collect(held, path, full_name(match[1], match[2]), _ENDS[match[3]], value)
    layers = {}
    for name, found in held.items():
        part, _, inside = name.partition(".")
        own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
        used = {role: value for role, value in found.items() if role != "alpha"} if config else found  # a configuration overrules it
        try:
            alpha = config_alpha(own, inside)
        except ValueError as error:
            raise UserError(f"{path}: its {CONFIG} says of {name}: {error}; export it again with the program that wrote it") from error
        layers[name] = read_layer(path, name, used, alpha, rslora=bool(own.get("use_rslora")))
    return Lora(layers, dict(metadata))


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
