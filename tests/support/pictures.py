"""A random Stable Diffusion of the real file format, small enough to build in a second; random pictures, and pairs of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dedpo_diffusion.core.records import Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pairs.dataset import PairWriter


def build_tiny_model(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """A StableDiffusionPipeline with random weights, 16 x 16 pixels, saved as diffusers saves it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dedpo_diffusion.shapes.pretrain import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer-work")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, **ends,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


def picture(seed: int, size: tuple[int, int] = (16, 16), format: str = "PNG") -> bytes:
    """A random picture as file bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int = 24, *, size: tuple[int, int] = (16, 16), shard_pairs: int = 10) -> Path:
    """A pair dataset of random pictures with targets "soft": some 0, some 1, a tie, some outside [0, 1]."""
    with PairWriter(folder, shard_pairs=shard_pairs) as writer:
        for k in range(count):
            writer.add(Pair(f"p{k}", ("a small red circle", "a large cross")[k % 2], picture(2 * k, size), picture(2 * k + 1, size)))
    target = np.array([0.0, 1.0, 0.5, 1.6, -0.7, 0.8])[np.arange(count) % 6]
    write_targets(folder, "soft", Targets([f"p{k}" for k in range(count)], target, np.ones(count)), {"power": 0.4})
    return folder
