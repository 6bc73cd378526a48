"""LoRA files of every layout that is written here, and of others, told apart by what is in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.single_file import opened
from dedpo_diffusion.weights.base_model import DECLARED, REFINER
from dedpo_diffusion.weights.diffusers_layout import DOTTED, from_diffusers
from dedpo_diffusion.weights.kohya import from_kohya
from dedpo_diffusion.weights.lora import Lora

_FOREIGN = (  # what the names of tensors show a file to be, and what to give instead
    (r"\.default(_\d+)?\.(weight)$|\.lora_[AB]\.default", "a checkpoint of training", "give the run folder"),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "the checkpoint of a whole model",
        "give it as --model, or extract a LoRA from it elsewhere",
    ),
    (r"^(emb_params|string_to_param)|^clip_[lg]$|^bundle_emb\.", "a textual inversion, or holds one", "give a LoRA alone"),
    (r"^(transformer|diffusion_model|lora_transformer)[._]", "a LoRA of a transformer (SD3, Flux)", "give one of an SD1.x, SD2.x or SDXL"),
    (r"^base_model\.", "an adapter as peft saves it by itself", "write it with diffusers' save_lora_weights"),
    (r"^(control_model|controlnet|lora_controlnet)", "a ControlNet", "give a LoRA"),
    (r"^(down_blocks|mid_block|up_blocks|conv_in|encoder|text_model)\.", "a part of a diffusers folder", "give a LoRA"),
)


def layout(names: list[str]) -> str | None:
    """Which layout a LoRA file has by the names of its tensors: "diffusers" or "kohya", None if it is no LoRA file."""
    if any(re.match(r"lora_(unet|te\d?)_", name) for name in names):
        return "kohya"
    wanted = rf"({DOTTED.pattern})(?!.*\.default).*lora"
    return "diffusers" if any(re.match(wanted, name) for name in names) else None


def from_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Lora:
    """The LoRA in a file's tensors.

    Args:
        path: the file, for messages.
        tensors: as in the file; all but alphas may be on torch's device "meta".
        metadata: of the file.

    Raises:
        UserError: it holds something else.
    """
    names = list(tensors)
    found = layout(names)
    if found is None:
        told = (f"it seems to be {what}; {remedy}" for pattern, what, remedy in _FOREIGN if any(re.search(pattern, name) for name in names))
        unknown = "its tensors' names are those of no LoRA; give a LoRA as `dedpo export` writes it"
        raise UserError(f"{path}: {next(told, unknown) if names else 'there is nothing in it; give another file'}")
    if any(REFINER.match(metadata.get(key, "").lower()) for key in DECLARED):
        raise UserError(f"{path}: it is a LoRA of SDXL's refiner, as its metadata say; give one of an SD1.x, SD2.x or SDXL")
    bundled = next((name for name in names if name.startswith("bundle_emb.")), None)
    if bundled is not None:
        raise UserError(f"{path}: there is a textual inversion in it beside the LoRA ({bundled}), which is not read; save the LoRA alone")
    return (from_kohya if found == "kohya" else from_diffusers)(path, tensors, metadata)


def read_lora_file(path: Path) -> Lora:
    """The LoRA of a file, its tensors in float32, its metadata as they are.

    Args:
        path: a .safetensors file in the layout of diffusers, kohya-ss/sd-scripts, ComfyUI or OneTrainer.

    Raises:
        UserError: it cannot be read, it holds something else, or numbers that are not finite.
    """
    with opened(path, wanted="a LoRA as a .safetensors file, as `dedpo export` writes it") as file:
        names, metadata = list(file.keys()), dict(file.metadata() or {})
        whole = layout(names) is not None  # of others the names are enough, and they can be large
        tensors = {name: file.get_tensor(name) if whole else torch.empty(0) for name in names}
    for name, value in tensors.items():
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} is not finite, so the training of this LoRA had failed; give another")
    return from_tensors(path, tensors, metadata)
