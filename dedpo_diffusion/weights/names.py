"""What a layer of a LoRA is called: in diffusers, in the original code, and with _ for every dot, from which the path is found again.

The original code is that of CompVis/latent-diffusion and Stability-AI/generative-models, as in `models.single_file`.
"""

from __future__ import annotations

import re

from dedpo_diffusion.models.single_file import UNET_ENDS, UNET_RESNET

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
ORIGINAL = re.compile(r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)[._](?=\d)")  # how a name of that code begins
_UNIT = re.compile(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")


def text_path(flat: str) -> str | None:
    """The path of a text encoder's layer, from one with _ for every dot; None if it is none."""
    return _dotted(flat, _TEXT_WORDS)


def _dotted(flat: str, words: tuple[str, ...]) -> str | None:
    """The path whose words were joined with _; None if it has other words."""
    word = rf"(?:{'|'.join(words)}|\d+)(?=_|$)"
    return ".".join(re.findall(word, flat)) if re.fullmatch(rf"{word}(?:_{word})*", flat) else None


def unet_path(flat: str) -> str | None:
    """The path in diffusers of a UNet's layer, from the one of diffusers or of the original code with _ for every dot.

    Of the original code with two resnets a level, as SD1.x, SD2.x and SDXL have them; None if it is no such layer.
    """
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


def sdxl_original(path: str) -> str | None:
    """The path in the original code of a layer of SDXL's UNet, from the one in diffusers; None if SDXL has no such layer."""
    if path in UNET_ENDS:
        return UNET_ENDS[path]
    match = _UNIT.fullmatch(path)
    if match is None:
        return None
    way, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind.endswith("samplers"):
        found = {"downsamplers": f"input_blocks.{3 * level + 3}.0.op", "upsamplers": f"output_blocks.{3 * level + 2}.2.conv"}[kind]
        return found if way and way in kind and (number, rest) == (0, "conv") else None
    inside = UNET_RESNET.get(rest) if kind == "resnets" else rest
    if inside is None or number >= {"down": 2, "up": 3, None: 2 if kind == "resnets" else 1}[way]:
        return None
    if way is None:
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{inside}"
    start = f"input_blocks.{3 * level + number + 1}" if way == "down" else f"output_blocks.{3 * level + number}"
    return f"{start}.{int(kind == 'attentions')}.{inside}"
