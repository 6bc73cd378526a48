"""A backbone of one layer and a batch for it."""

from __future__ import annotations

import torch

from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.models.backbone import Backbone

TARGETS = torch.tensor([-3.0, 0.0, 0.3, 1.0, 4.0])


def backbone(folder, *, trained: bool = False) -> Backbone:
    model = Backbone(str(folder), device=torch.device("cpu"))
    torch.manual_seed(1)
    model.add_lora(rank=4, alpha=4)
    if trained:
        for parameter in model.trainable().values():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(pairs: int = 5) -> tuple[PairBatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(pairs, 16, 16, generator=generator)
    latents = torch.randn(pairs, 2, 4, 8, 8, generator=generator)
    noise = torch.randn(pairs, 4, 8, 8, generator=generator)
    t = torch.randint(1000, (pairs,), generator=generator)
    return PairBatch(latents, Conditioning(text), TARGETS[:pairs], torch.ones(pairs)), t, noise
