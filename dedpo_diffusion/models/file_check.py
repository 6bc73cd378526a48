"""Whether a single file holds every tensor of its architecture, in its shape, and what it holds beside.

Readers leave what is missing random or fail somewhere else, and pass over what they have no place for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.models.single_file import UNET, VAE, opened, to_single_file

MARKS = {"v_pred", "ztsnr"}
KNOWN = re.compile(  # made anew from the configuration, or of no use in any of these models
    r"^(alphas_cumprod|alphas_cumprod_prev|betas|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|denoiser\.sigmas"
    r"|global_step|epoch)$|\.position_ids$|(^|\.)logit_scale$|(^|\.)text_projection(\.weight)?$|\.attn_mask$|\.resblocks\.23\."
)
OWN = re.compile(rf"^{re.escape(UNET)}|^{re.escape(VAE)}(encoder|decoder|quant_conv|post_quant_conv)\.")


def expected_shapes(place: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the single file of an architecture; no weight is made.

    Args:
        place: diffusers folder or hub id of the architecture.

    Raises:
        Exception: whatever diffusers and transformers raise at a configuration that they cannot read; UserError if it has no file.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet_config = UNet2DConditionModel.load_config(place, subfolder="unet")
    vae_config = AutoencoderKL.load_config(place, subfolder="vae")
    two = unet_config.get("addition_embed_type") == "text_time"
    first = CLIPTextConfig.from_pretrained(place, subfolder="text_encoder")
    second = CLIPTextConfig.from_pretrained(place, subfolder="text_encoder_2") if two else None
    with torch.device("meta"):
        parts: list[Any] = [UNet2DConditionModel.from_config(unet_config), AutoencoderKL.from_config(vae_config), CLIPTextModel(first)]
        parts += [CLIPTextModelWithProjection(second)] if second is not None else []
    return {name: tuple(value.shape) for name, value in to_single_file(*parts).items()}


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]], config: str) -> None:
    """See to it that a file holds what its architecture needs, and say what else is in it.

    Args:
        path: the file.
        expected: of `expected_shapes`.
        config: where the architecture comes from, for messages.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the architecture.
    """
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    missing = [name for name in expected if name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: it lacks the tensor {missing[0]}{more}, which the architecture of {config} has; {_remedy(missing, expected)}"
        )
    for name, shape in expected.items():
        if _bare(shapes[name]) != _bare(shape):
            raise UserError(
                f"{path}: the tensor {name} has shape {shapes[name]}, and {shape} in the architecture of {config}; "
                "give --model_config, a diffusers folder of its own architecture"
            )
    unknown = [name for name in shapes if name not in expected and name not in MARKS and not KNOWN.search(name)]
    strange = [name for name in unknown if OWN.match(name)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(
            f"{path}: the tensor {strange[0]}{more} has no place in the architecture of {config}; "
            "give --model_config, a diffusers folder of its own architecture"
        )
    if unknown:
        say(f"Warning: {path}: {len(unknown)} tensors that belong to none of the model's parts are not used (first: {unknown[0]})")


def _remedy(missing: list[str], expected: Mapping[str, tuple[int, ...]]) -> str:
    few = len(missing) <= len(expected) // 20  # a file cut short or badly merged, rather than another model
    return "download or merge it again" if few else "give --model_config, a diffusers folder of its own architecture"


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing ones: a matrix may be kept as a 1 x 1 convolution."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
