"""Random Stable Diffusions of the published sizes, and a small one that a processor trains in seconds: what a step costs does not
depend on the values of the weights.

Numbers of `sdxl`, `sd21` and `sd15` are those of the configuration files of stabilityai/stable-diffusion-xl-base-1.0,
stabilityai/stable-diffusion-2-1 and stable-diffusion-v1-5/stable-diffusion-v1-5. `small_sdxl` has SDXL's topology at 256 px: three UNet
levels, attention in the lower two, half of SDXL's transformer layers, two text encoders, a VAE of four levels that shrinks by 8. So narrow
a VAE runs less efficiently on a processor than the UNet does; its widths are chosen so that encoding an image takes 0.72 of the time of a
UNet forward pass, which is the share that SDXL's arithmetic at 1024 px gives it (9.76 and 13.52 TFLOP a pair).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from dedpo_diffusion.models.backbone import Backbone

CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}  # fmt: skip
BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
VIT_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512,
    "hidden_act": "gelu",
}  # fmt: skip
XL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "unet": XL_UNET | {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 1280, "norm_num_groups": 32,
        },
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text": [CLIP_L, BIG_G],
    },
    "sd15": {
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "layers_per_block": 2, "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
            "cross_attention_dim": 768, "norm_num_groups": 32,
        },
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "text": [CLIP_L],
    },
    "sd21": {
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "layers_per_block": 2, "sample_size": 96, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024, "use_linear_projection": True, "norm_num_groups": 32,
        },
        "vae": VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        "text": [VIT_H],
    },
    "small_sdxl": {
        "unet": XL_UNET | {
            "sample_size": 32, "block_out_channels": (64, 128, 256), "transformer_layers_per_block": [1, 1, 5],
            "attention_head_dim": [1, 2, 4], "cross_attention_dim": 256,
            "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 160, "norm_num_groups": 32,
        },
        "vae": VAE | {"sample_size": 256, "scaling_factor": 0.13025, "block_out_channels": (14, 28, 56, 56), "norm_num_groups": 14},
        "text": [
            CLIP_L | {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2},
            BIG_G | {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4, "projection_dim": 160},
        ],
    },
}  # fmt: skip
WORDS, LENGTH = 49408, 77  # of CLIP's vocabulary and context


def random_pipeline(kind: str, *, device: str = "cpu") -> Any:
    """A diffusers pipeline of this kind with random float32 weights, made on the device; its tokenizer is that of the embedded model."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dedpo_diffusion.models.loading import resolve_model

    sizes = SIZES[kind]
    tokenizers = [
        CLIPTokenizer.from_pretrained(resolve_model("shapes"), subfolder="tokenizer", model_max_length=LENGTH) for _ in sizes["text"]
    ]
    ends = {f"{name}_token_id": getattr(tokenizers[0], f"{name}_token_id") for name in ("bos", "eos", "pad")}
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    with torch.device(device):
        configs = [CLIPTextConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **part | ends) for part in sizes["text"]]
        unet, vae, first = UNet2DConditionModel(**sizes["unet"]), AutoencoderKL(**sizes["vae"]), CLIPTextModel(configs[0])
        second = CLIPTextModelWithProjection(configs[1]) if len(configs) == 2 else None
    shared = {"unet": unet, "vae": vae, "text_encoder": first, "tokenizer": tokenizers[0], "scheduler": DDPMScheduler(**schedule)}
    if second is None:
        return StableDiffusionPipeline(**shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionXLPipeline(
        **shared, text_encoder_2=second, tokenizer_2=tokenizers[1], force_zeros_for_empty_prompt=True, add_watermarker=False
    )


@contextmanager
def _loads(pipe: Any) -> Iterator[None]:
    """While open, a `Backbone` takes this pipeline in place of one from a file, and its weights are not hashed."""
    from dedpo_diffusion.models import backbone as models

    with mock.patch.object(models, "load_pipeline", return_value=pipe), mock.patch.object(models, "fingerprint", return_value="random"):
        yield


def random_backbone(kind: str, *, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The project's own `Backbone` around a random pipeline; nothing is written or read."""
    from dedpo_diffusion.models.backbone import Backbone

    with _loads(random_pipeline(kind, device=str(device))):
        return Backbone(kind, device=device, dtype=dtype)
