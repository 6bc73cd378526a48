"""The names of UNets' layers that ComfyUI and A1111 look for, from their sources, not from ours."""

from __future__ import annotations

import re

DEPTHS = {
    "sd15": {"down": {0: 1, 1: 1, 2: 1}, "mid": 1, "up": {1: 1, 2: 1, 3: 1}},
    "sdxl": {"down": {1: 2, 2: 3}, "mid": 3, "up": {0: 3, 1: 2}},
}
LEVELS = {"sd15": 4, "sdxl": 3}
RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
BLOCK = [f"attn{k}.{name}" for k in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]


def original_names(kind: str) -> dict[str, str]:
    """ComfyUI's unet_to_diffusers: path in diffusers -> path in the original code, of every layer with a matrix."""
    depths, found = DEPTHS[kind], {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    found |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"} if kind == "sdxl" else {}
    found |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}

    def add(resnet, attention, to_resnet, to_attention, depth):
        found.update({f"{resnet}.{ours}": f"{to_resnet}.{theirs}" for ours, theirs in RESNET.items()})
        inside = [f"transformer_blocks.{d}.{name}" for d in range(depth) for name in BLOCK] + (["proj_in", "proj_out"] if depth else [])
        found.update({f"{attention}.{name}": f"{to_attention}.{name}" for name in inside})

    for b in range(LEVELS[kind]):
        for j in range(2):
            place, depth = f"input_blocks.{1 + 3 * b + j}", depths["down"].get(b, 0)
            add(f"down_blocks.{b}.resnets.{j}", f"down_blocks.{b}.attentions.{j}", f"{place}.0", f"{place}.1", depth)
        for j in range(3):
            place, depth = f"output_blocks.{3 * b + j}", depths["up"].get(b, 0)
            add(f"up_blocks.{b}.resnets.{j}", f"up_blocks.{b}.attentions.{j}", f"{place}.0", f"{place}.1", depth)
        if b + 1 < LEVELS[kind]:
            found[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * b}.0.op"
            found[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{3 * b + 2}.{2 if depths['up'].get(b) else 1}.conv"
    add("mid_block.resnets.0", "mid_block.attentions.0", "middle_block.0", "middle_block.1", depths["mid"])
    add("mid_block.resnets.1", "", "middle_block.2", "", 0)
    return found


def a1111(key: str) -> str:
    """A1111's convert_diffusers_name_to_compvis, and what it tries for SDXL where that finds nothing."""
    rules = [
        (r"lora_unet_conv_in", lambda m: "input_blocks_0_0"), (r"lora_unet_conv_out", lambda m: "out_2"),
        (r"lora_unet_time_embedding_linear_(\d+)", lambda m: f"time_embed_{int(m[1]) * 2 - 2}"),
        (
            r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"input_blocks_{1 + int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[2], m[4])}",
        ),
        (
            r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"middle_block_{1 if m[1] == 'attentions' else int(m[2]) * 2}_{_suffix(m[1], m[3])}",
        ),
        (
            r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"output_blocks_{int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[2], m[4])}",
        ),
        (r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + int(m[1]) * 3}_0_op"),
        (r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", lambda m: f"output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) else 1}_conv"),
        (r"lora_unet_(.+)", lambda m: m[1]),
    ]  # fmt: skip
    return next(build(match) for pattern, build in rules if (match := re.fullmatch(pattern, key)))


def _suffix(kind: str, rest: str) -> str:
    return RESNET[rest].replace(".", "_") if kind == "resnets" else rest
