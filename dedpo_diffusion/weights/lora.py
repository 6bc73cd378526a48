"""A LoRA in memory: a low-rank change of each layer, whatever layout its file had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer's weight W (out, in) or (out, in, kh, kw).

    Attributes:
        down: A, (r, in) or (r, in, kh, kw).
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the product is scaled by alpha / r.
        rslora: it is scaled by alpha / sqrt(r) instead (arXiv 2312.03732).
        magnitude: (out,) norms of the rows of the changed weight (DoRA, arXiv 2402.09353), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """scale * B A, float32, of the shape of W; what DoRA's magnitudes do comes on top."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).view(len(self.up), *self.down.shape[1:])

    def merged(self, weight: Tensor) -> Tensor:
        """W with the change worked in, float32 (out, in) or (out, in, kh, kw)."""
        changed = weight.float() + self.delta().to(weight.device)
        if self.magnitude is None:
            return changed
        norms = changed.flatten(1).norm(dim=1)
        return changed * (self.magnitude.float().to(weight.device).flatten() / norms).view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True)
class Lora:
    """Layers by their name in diffusers.

    "unet.<module>", "text_encoder.text_model.<module>", "text_encoder_2.text_model.<module>"; `metadata` is what else the file said.
    """

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def ranks(self) -> list[int]:
        """The different ranks, rising."""
        return sorted({layer.rank for layer in self.layers.values()})


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation (Frobenius) of a matrix (out, in) by B A: down A (r, in) and up B (out, r), of equal norms, float32.

    By the eigenvectors of the smaller of M M' and M' M in double, several times as fast as an SVD. What is lost are singular values below
    1e-8 of the largest, which float32 does not hold.
    """
    wide = matrix.double()
    if len(wide) > wide.shape[1]:
        up, down = factors(matrix.T, rank)
        return down.T.contiguous(), up.T.contiguous()
    left = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]
    right = left.T @ wide  # rows of norm s
    root = right.norm(dim=1).sqrt()
    return torch.where(root[:, None] > 0, right / root[:, None], 0.0).float(), (left * root).float()
