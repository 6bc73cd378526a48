"""A training step as the published Diffusion-DPO scripts take it: what `throughput.py` compares this project's step with.

Read for it: diffusers, examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py and train_diffusion_dpo.py (commit 58eb52c0).
Written anew from these facts:

* Images are decoded, scaled, mirrored and cropped in the main process (`dataloader_num_workers` is 0), prompts tokenized there.
* In every step the VAE encodes all 2 B images, eight at a time, in float32 for SDXL and in the compute precision for SD1.5; then the text
  encoders run, in the compute precision.
* Winners and losers are ONE batch of 2 B through the UNet, not two passes. The policy's pass comes first; the reference is a second pass
  through the same UNet with its adapter disabled, without a graph.
* Squared errors in float32, mean over each image; loss -log sigmoid(-beta / 2 (difference of the policy - difference of the reference)) for
  SDXL. For SD1.5 the script leaves the factor 1 / 2 out; here beta is halved to match.
* torch.optim.AdamW, not fused; gradients clipped at norm 1. Four numbers are read back in every step, so the processor waits for the
  device.
* Gradient checkpointing is an option that its README uses. So are 8-bit moments, whose cost an adapter does not notice.

Left out: logging to a tracker, the learning rate's schedule, accelerate's wrapping. They are cheap, and leaving them out
favours the published step.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader

Phase = Callable[[str], AbstractContextManager[None]]
ENCODED = 8  # images that the VAE takes at once


class Examples(Dataset[dict[str, Any]]):
    """Pairs as the scripts' loaders prepare them: pixels (6, size, size) in [-1, 1], the preferred image first, and prompt tokens."""

    def __init__(self, reader: PairReader, preferred: np.ndarray, tokenizers: list[Any], size: int, *, flip: bool) -> None:
        """`preferred` (N,) is 0 or 1, the preferred image of each pair."""
        from torchvision import transforms

        self.reader, self.preferred, self.tokenizers, self.size, self.flip = reader, preferred, tokenizers, size, flip
        self.resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR)
        self.crop, self.mirror = transforms.CenterCrop(size), transforms.RandomHorizontalFlip(0.5)
        self.tensor, self.normalize = transforms.ToTensor(), transforms.Normalize([0.5], [0.5])

    def __len__(self) -> int:
        return len(self.preferred)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One pair."""
        pair = self.reader.pair(row)
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in (pair.image_0, pair.image_1)]
        images[1] = images[1].resize(images[0].size)
        width, height = images[0].size
        if self.preferred[row] == 1:
            images.reverse()
        both = self.resize(torch.cat([self.tensor(image) for image in images]))
        if self.flip:
            both = self.mirror(both)
        top, left = (max(0, round((side - self.size) / 2)) for side in both.shape[1:])
        tokens = [
            tokenizer(
                pair.prompt, truncation=True, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids[0]
            for tokenizer in self.tokenizers
        ]
        told = torch.tensor([height, width, top, left, self.size, self.size])
        return {"pixels": self.normalize(self.crop(both)), "sizes": told, "tokens": tokens}


class PublishedStep:
    """The published step on a UNet of its own, with the backbone's VAE and text encoders in the precision that the script gives them.

    Args:
        model: where the weights come from, placed on the device, before it has an adapter or is trained.
        examples: the pairs.
        rank: of the adapter; its alpha is the same.
        batch: B.
        beta: of the loss with the factor 1 / 2.
        learning_rate: of AdamW.
        checkpointing: of the policy's activations.
    """

    def __init__(
        self, model: Backbone, examples: Examples, *, rank: int, batch: int, beta: float, learning_rate: float,
        checkpointing: bool,
    ) -> None:  # fmt: skip
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        self.device, self.dtype, self.beta, self.xl, self.scale = model.device, model.dtype, beta, model.told_sizes, model.scale
        self.scheduler = DDPMScheduler(prediction_type=model.process.prediction)
        self.scheduler.alphas_cumprod = model.process.alphas_cumprod
        self.vae = _in(model.vae, torch.float32 if self.xl else self.dtype).to(self.device)
        self.text_encoders = [_in(encoder, self.dtype).to(self.device) for encoder in model.text.encoders]
        self.unet = copy.deepcopy(model.unet).to(self.device, self.dtype)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        for parameter in self.trainable():  # as under fp16, which the README's commands use
            parameter.data = parameter.data.float()
        self.unet.train()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        options: dict[str, Any] = {"lr": learning_rate, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
        self.optimizer = torch.optim.AdamW(self.trainable(), **options)
        self.batches = _endless(DataLoader(examples, batch, shuffle=True, drop_last=True))

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 6, H, W) -> scaled latents (2 B, C, h, w), the winners first."""
        images = torch.cat(pixels.to(self.device, self.vae.dtype).chunk(2, dim=1))
        found = [self.vae.encode(part).latent_dist.sample() for part in images.split(ENCODED)]
        return (torch.cat(found) * self.scale).to(self.dtype)

    @torch.no_grad()
    def conditioning(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Text embeddings for 2 B images, and for SDXL what else its UNet is told."""
        tokens = [ids.to(self.device) for ids in batch["tokens"]]
        if not self.xl:
            return self.text_encoders[0](tokens[0])[0].repeat(2, 1, 1), None
        found = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.text_encoders, tokens, strict=True)]
        text = torch.cat([one.hidden_states[-2] for one in found], dim=-1).repeat(2, 1, 1)
        sizes = batch["sizes"].to(self.device, self.dtype).repeat(2, 1)
        return text, {"text_embeds": found[-1][0].repeat(2, 1), "time_ids": sizes}

    def losses(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor, added: dict[str, Tensor] | None,
        phase: Phase = nullcontext,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The loss of B pairs from latents and noise (2 B, C, h, w) and timesteps (2 B,), and what the scripts log of it."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with phase("policy"), mixed:
            prediction = self.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        errors = _errors(prediction, target)
        with phase("reference"), torch.no_grad():
            self.unet.disable_adapters()
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                predicted = self.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
            self.unet.enable_adapters()
        reference_errors = _errors(predicted, target)
        (winner, loser), (base_winner, base_loser) = errors.chunk(2), reference_errors.chunk(2)
        inside = -0.5 * self.beta * ((winner - loser) - (base_winner - base_loser))
        right = (inside > 0).float().mean() + 0.5 * (inside == 0).float().mean()
        loss = -F.logsigmoid(inside).mean()
        return loss, [loss, 0.5 * (winner.mean() + loser.mean()), reference_errors.mean(), right]

    def step(self, phase: Phase = nullcontext) -> float:
        """One optimizer step on the next B pairs; returns the loss."""
        with phase("loading"):
            batch = next(self.batches)
        with phase("latents"):
            latents = self.latents(batch["pixels"])
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents) // 2,), device=self.device).repeat(2)
        with phase("text"):
            text, added = self.conditioning(batch)
        loss, logged = self.losses(latents, noise, timesteps, text, added, phase)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trainable(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        read = [value.detach().item() for value in logged]
        return read[0]


def _errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, (2 B,)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])


def _in(module: nn.Module, dtype: torch.dtype) -> Any:
    """The module in this precision: itself, or a copy."""
    return module if next(module.parameters()).dtype == dtype else copy.deepcopy(module).to(dtype=dtype)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
