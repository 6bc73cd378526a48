"""A layer's tensors as a file has them, made sure of: every reader of LoRA files takes its layers through here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights.lora import LoraLayer

_AGAIN = "the file is damaged, get it again or export it again with the program that wrote it"


def collect(held: dict[str, dict[str, Tensor]], path: Path, name: str, role: str, value: Tensor) -> None:
    """Put a tensor into its layer.

    Raises:
        UserError: the layer has this part already, under another name.
    """
    found = held.setdefault(name, {})
    if role in found:
        raise UserError(f"{path}: {name} is in it under two names ({role} twice), so which one counts cannot be told; {_AGAIN}")
    found[role] = value


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
