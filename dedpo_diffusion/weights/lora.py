"""A LoRA in memory: a low-rank change of each layer, whatever layout its file had.

Every reader of LoRA files takes its layers through `read_layer`, which makes sure of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.text_encoders import NAMES


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


# ---- from the tensors of a file


_AGAIN = "the file is damaged, get it again or export it again with the program that wrote it"


def collect(held: dict[str, dict[str, Tensor]], path: Path, name: str, role: str, value: Tensor) -> None:
    """Put a tensor into its layer.

    Raises:
        UserError: the layer has this part already, under another name.
    """
    found = held.setdefault(name, {})
    if role in found:
        raise UserError(f"{path}: {name} is in it under two names ({role} twice), so which one counts is unclear; {_AGAIN}")
    found[role] = value


def rows(path: Path, name: str, magnitude: Tensor) -> Tensor:
    """A stored dora_scale, (out, 1) or (out, 1, 1, 1), which is of the weight's rows.

    Raises:
        UserError: it is of the columns.
    """
    if magnitude.ndim and magnitude.numel() != len(magnitude):
        raise UserError(
            f"{path}: {name} is a DoRA with magnitudes of the weight's columns (LyCORIS' wd_on_output=False, OneTrainer without its output "
            "axis), which is not read; merge it with the program it was made for, and give that model"
        )
    return magnitude


def read_layer(path: Path, name: str, found: Mapping[str, Tensor], alpha: Any = None, *, rslora: bool = False) -> LoraLayer:
    """The layer in float32.

    Args:
        path, name: of the file and the layer, for messages.
        found: "down", "up" and, where they are, "alpha" and "magnitude".
        alpha: what a configuration says of it; None takes the tensor, or the rank where there is none.
        rslora: as of `LoraLayer`.

    Raises:
        UserError: matrices that do not make a LoRA together, or an alpha that is not one finite number.
    """
    if not {"down", "up"} <= set(found):
        raise UserError(f"{path}: {name} has one of its two matrices alone; the file is not whole, get it again")
    down, up = found["down"].float(), found["up"].float()
    sizes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    if any(part.ndim not in (2, 4) or 0 in part.shape for part in (down, up)) or up.shape[2:].numel() != 1:
        raise UserError(f"{path}: the matrices of {name} are of dimensions that no LoRA has ({sizes}); {_AGAIN}")
    rank = len(down)
    if up.shape[1] != rank:
        raise UserError(f"{path}: the two matrices of {name} are of different ranks ({sizes}); {_AGAIN}")
    magnitude = found["magnitude"].float().flatten() if "magnitude" in found else None
    if magnitude is not None and len(magnitude) != len(up):
        raise UserError(f"{path}: {name} has {len(magnitude)} magnitudes for {len(up)} rows; {_AGAIN}")
    number = _number(path, name, found.get("alpha", rank) if alpha is None else alpha)
    return LoraLayer(down, up.view(len(up), rank, *[1] * (down.ndim - 2)), number, rslora, magnitude)


def _number(path: Path, name: str, alpha: Any) -> float:
    if isinstance(alpha, Tensor):
        alpha = alpha.item() if alpha.numel() == 1 else tuple(alpha.shape)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{path}: alpha of {name} is {alpha!r}, and must be one finite number; {_AGAIN}")
    return float(alpha)


# ---- from and to the parameters of the adapter that is being trained


KINDS = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight", "magnitude": ".lora_magnitude_vector.default.weight"}


def from_parameters(parameters: Mapping[str, Tensor], *, alpha: float, rslora: bool = False) -> Lora:
    """The LoRA that an adapter's parameters are.

    Args:
        parameters: "<layer>.lora_A.default.weight" (r, in), "<layer>.lora_B.default.weight" (out, r) and, of a DoRA,
            "<layer>.lora_magnitude_vector.default.weight" (out,) or (1, out, 1, 1), of the UNet or, as "text_encoder.<layer>..." and
            "text_encoder_2.<layer>...", of the text encoders.
        alpha, rslora: the product is scaled by alpha / r, or by alpha / sqrt(r).

    Returns:
        Layers in float32 on the CPU.

    Raises:
        ValueError: a parameter that is no part of the default adapter.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        kind = next((kind for kind, end in KINDS.items() if name.endswith(end)), None)
        if kind is None:
            raise ValueError(f"{name} is not a parameter of the default adapter")
        part, _, inside = name.removesuffix(KINDS[kind]).partition(".")
        where = full_name(part, inside) if part in NAMES else f"unet.{name.removesuffix(KINDS[kind])}"
        held = value.detach().float().cpu().contiguous()
        layers.setdefault(where, {})[kind] = held.flatten() if kind == "magnitude" else held
    return Lora({name: LoraLayer(alpha=float(alpha), rslora=rslora, **held) for name, held in layers.items()})


def to_parameters(lora: Lora, *, scale: float) -> dict[str, Tensor]:
    """The parameters, named as `from_parameters` takes them, of an adapter whose product is scaled by `scale`.

    What each layer of the LoRA is scaled by is worked into its lora_B.
    """
    found = {}
    for name, layer in lora.layers.items():
        part, _, inside = name.partition(".")
        where = inside if part == "unet" else f"{part}.{inside.removeprefix('text_model.')}"
        found[where + KINDS["down"]] = layer.down.float()
        found[where + KINDS["up"]] = layer.up.float() * (layer.scale / scale)
        if layer.magnitude is not None:
            shape = (1, -1, *[1] * (layer.down.ndim - 2)) if layer.down.ndim > 2 else (-1,)
            found[where + KINDS["magnitude"]] = layer.magnitude.float().view(shape)
    return found


def full_name(part: str, layer: str) -> str:
    """A layer's name with its part; whatever a version of transformers calls the layers of a text encoder, files say text_model."""
    if part == "unet" or layer.startswith(("text_model.", "text_projection")):
        return f"{part}.{layer}"
    return f"{part}.text_model.{layer}"
