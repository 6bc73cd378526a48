"""What the tests of LoRA files share: run folders with random adapters, and what models compute with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import own_memory
from dedpo_diffusion.settings import DataSettings, LoraSettings, TrainSettings
from dedpo_diffusion.weights import from_parameters, to_diffusers
from dedpo_diffusion.weights.checkpoints import save_checkpoint
from dedpo_diffusion.weights.diffusers_layout import CONFIG
from dedpo_diffusion.weights.header import save_tensors
from dedpo_diffusion.weights.run_folder import checkpoint_folder, open_run

PROMPT = "a small red circle"
CONV = ["to_q", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "ff.net.0.proj", "ff.net.2", "conv", "conv_in", "conv_out"]


def adapted(base: Path, *, rank: int = 8, alpha: float = 4.0, seed: int = 0, **options) -> Backbone:
    """A model with a random adapter."""
    model = Backbone(str(base), device=torch.device("cpu"))
    model.add_lora(rank=rank, alpha=alpha, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.trainable().items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise
    return model


def as_run(model: Backbone, base: Path, folder: Path, *, data: Path, rank: int = 8, alpha: float = 4.0, identity=None, **options) -> Path:
    """A run folder whose one checkpoint, of step 7, is this model's adapter."""
    options["text_encoders"] = options.pop("text", False)
    settings = TrainSettings(
        model=str(base), out=folder, data=DataSettings(data, "soft"), lora=LoraSettings(rank=rank, alpha=alpha, **options)
    )
    return write_run(settings, model.trainable(), identity)


def write_run(settings: TrainSettings, parameters, identity=None) -> Path:
    """A run folder with one checkpoint, of step 7, of these parameters."""
    open_run(settings.out, settings, identity or {"base_model": "b", "pairs": "p", "targets": "t"})
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    save_checkpoint(checkpoint_folder(settings.out, 7), parameters, optimizer, {"step": 7})
    return settings.out


def whole_run(base: Path, folder: Path, *, data: Path) -> Path:
    """A run folder of a UNet that was trained as a whole: every weight moved by about a tenth of it, along few directions."""
    model = Backbone(str(base), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in model.unet.state_dict().items():
        flat = value.flatten(1) if value.ndim > 1 else value[:, None]
        change = torch.randn(len(flat), 2, generator=generator) @ torch.randn(2, flat.shape[1], generator=generator)
        weights[name] = value + 0.05 * change.view(value.shape) * (1 if value.ndim > 1 else 0.01)
    return write_run(TrainSettings(model=str(base), out=folder, data=DataSettings(data, "soft"), weights="full"), weights)


def pipeline(base: Path, lora: Path | None = None):
    """Plain diffusers, the weights where torch would lay them, so that bits can be compared."""
    from diffusers import DiffusionPipeline

    pipe = own_memory(DiffusionPipeline.from_pretrained(base))
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipe


@torch.no_grad()
def prediction(unet, seed: int = 0) -> torch.Tensor:
    """What a UNet predicts for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": sizes} if unet.config.addition_embed_type else None
    return unet(x, torch.tensor([10, 700]), text, added_cond_kwargs=added).sample


@torch.no_grad()
def embeddings(pipe) -> torch.Tensor:
    """What the text encoders of a pipeline make of the prompt, SDXL's embedding of the whole prompt behind it."""
    found = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return torch.cat([found[0].flatten(), *([found[2].flatten()] if len(found) > 2 else [])])


@torch.no_grad()
def live_embeddings(model: Backbone) -> torch.Tensor:
    """The same of a model in training."""
    found = model.text(model.text.tokens([PROMPT]))
    return torch.cat([found.text.flatten(), *([] if found.pooled is None else [found.pooled.flatten()])])


@torch.no_grad()
def image(pipe) -> torch.Tensor:
    """An image (64, 64, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np").images[0])


def diffusers_lora(
    parameters: Mapping[str, Tensor], *, rank: int, alpha: float, targets: list[str], rslora: bool = False, dora: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`to_diffusers` of an adapter's parameters, with the targets' short names in the configuration of the UNet's."""
    tensors, config = to_diffusers(from_parameters(parameters, alpha=alpha, rslora=rslora))
    return tensors, config | {"unet.r": rank, "unet.use_dora": dora, "unet.target_modules": sorted(targets)}


def save_lora(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the file atomically; `config` where diffusers looks for it, `settings` as JSON under "dedpo_settings"."""
    told = {CONFIG: json.dumps(dict(config), sort_keys=True), "dedpo_settings": json.dumps(dict(settings), sort_keys=True)}
    save_tensors(path, tensors, told)


def random_lora(base: Path, path: Path, *, text: bool = False, seed: int = 1, rank: int = 4) -> Path:
    """A LoRA of a base with random values, strong enough to be seen; of the UNet, and with `text` of the text encoders too."""
    model = Backbone(str(base), device=torch.device("cpu"))
    model.add_lora(rank=rank, alpha=rank, text=text)
    tensors, config = to_diffusers(from_parameters(model.trainable(), alpha=float(rank)))
    generator = torch.Generator().manual_seed(seed)
    save_lora(path, {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}, config, {})
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """The adapter's configuration, and what `dedpo export` stored in a file: settings, sources, how it was made."""
    with safe_open(path, "pt") as file:
        stored = file.metadata() or {}
    return {key: json.loads(value) for key, value in stored.items() if key == CONFIG or key.startswith("dedpo_")}
