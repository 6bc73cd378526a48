"""Random Stable Diffusions of every supported architecture, in the real file format and topology, small enough to build in a second.

What settings are tried on (`dedpo train --smoke sdxl`), and what the tests run on.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dedpo_diffusion.core.records import Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.models.loading import load_pipeline, resolve_model
from dedpo_diffusion.models.single_file import to_single_file
from dedpo_diffusion.pairs.dataset import PairWriter

KINDS = ("sd15", "sd21", "sdxl")
SIDE = 64  # pixels; 8 x 8 latents, which the UNets of SD1.5 and SD2.1 shrink to one


def _text_config(tokenizer: Any, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 32}
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes | ends | changes)


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 8, 8),
        layers_per_block=2, latent_channels=4, norm_num_groups=2, sample_size=SIDE, scaling_factor=scaling_factor,
    )  # fmt: skip


def _unet(kind: str) -> Any:
    from diffusers import UNet2DConditionModel

    shared: dict[str, Any] = {"sample_size": SIDE // 8, "layers_per_block": 2, "norm_num_groups": 4}
    if kind == "sdxl":
        return UNet2DConditionModel(
            block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 2, 3],
            attention_head_dim=[2, 4, 4], cross_attention_dim=72, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, **shared,
        )  # fmt: skip
    heads = {"attention_head_dim": 2} if kind == "sd15" else {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True}
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16), down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=32, **heads, **shared,
    )  # fmt: skip


def build(folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A diffusers folder of this kind at `folder`, with random weights; `save` goes to `save_pretrained`."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of writing tiny weights: noise
    torch.manual_seed(seed)
    tokenizer, second_tokenizer = (CLIPTokenizer.from_pretrained(resolve_model("shapes"), subfolder="tokenizer") for _ in range(2))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    unet = _unet(kind)
    pipe: Any
    if kind == "sdxl":
        second = _text_config(tokenizer, hidden_act="gelu", hidden_size=40)  # diffusers tells a file's two encoders by their width
        pipe = StableDiffusionXLPipeline(
            vae=_vae(0.13025), unet=unet, tokenizer=tokenizer, text_encoder=CLIPTextModel(_text_config(tokenizer)),
            tokenizer_2=second_tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(second), scheduler=EulerDiscreteScheduler(**schedule),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        )  # fmt: skip
    else:
        prediction = "v_prediction" if kind == "sd21" else "epsilon"
        act = "quick_gelu" if kind == "sd15" else "gelu"
        pipe = StableDiffusionPipeline(
            vae=_vae(0.18215), unet=unet, tokenizer=tokenizer, text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act=act)),
            scheduler=DDIMScheduler(**schedule, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.to(dtype).save_pretrained(folder, **save)
    return folder


def single_file(folder: Path, path: Path) -> Path:
    """A diffusers folder as one file in the original layout."""
    from safetensors.torch import save_file

    pipe = load_pipeline(str(folder))
    encoders = [part for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if part is not None]
    save_file(to_single_file(pipe.unet, pipe.vae, *encoders), path)
    return path


def write_pairs(folder: Path, targets: str, count: int = 6, *, seed: int = 0) -> Path:
    """A pair dataset of random pictures with merged targets of this name, as `dedpo merge` writes them."""
    rng = np.random.default_rng(seed)

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    ids = [f"p{k}" for k in range(count)]
    with PairWriter(folder) as writer:
        for name in ids:
            writer.add(Pair(name, "a large red circle", picture(), picture()))
    human = np.where(np.arange(count) % 2 == 0, np.arange(count) % 4 / 2, np.nan)
    judge, inverse, power = rng.random(count), np.where(np.isnan(human), 0.0, 2.0), 0.5
    weight = inverse + power * (1 - inverse)
    target = (inverse * np.nan_to_num(human) + power * (1 - inverse) * judge) / weight
    merged = Targets(ids, target, weight, human, judge, inverse, np.full(count, power))
    write_targets(folder, targets, merged, {"power": power})
    return folder
