"""What `dedpo export` would make of an adapter file, by its names and shapes alone: an advice to export is given only where it helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights.adapters import Adapter, find_adapter
from dedpo_diffusion.weights.algebra import one_alpha
from dedpo_diffusion.weights.base_model import find_base, told_base
from dedpo_diffusion.weights.header import Header
from dedpo_diffusion.weights.kohya import Family, family_of, to_kohya
from dedpo_diffusion.weights.reading import from_tensors


@dataclass(frozen=True)
class Exported:
    """A file in the kohya layout, of which only names and shapes are known; and whether --model must tell its base."""

    adapter: Adapter
    unknown_base: bool


def exported(adapter: Adapter) -> Exported | str:
    """What an export to the kohya layout would write; or why it would be refused, in words."""
    header = adapter.header
    tensors = {
        name: torch.ones(shape) if name.endswith(".alpha") else torch.empty(shape, device="meta") for name, shape in header.shapes.items()
    }
    try:
        lora = from_tensors(header.path, tensors, header.metadata)
        told, shown = told_base(header.metadata), family_of(lora)
        stored = (header.stored_json("dedpo_settings") or {}).get("model")
        family: Family = (told.family if told else shown) or _seen(adapter)
        written = to_kohya(one_alpha(lora), family)
    except UserError as error:
        return str(error).removeprefix(f"{header.path}: ")
    shapes = {name: tuple(value.shape) for name, value in written.items()}
    made = find_adapter(Header(header.path, shapes, dict.fromkeys(shapes, "float32"), {"modelspec.architecture": ARCHITECTURES[family]}))
    assert made is not None  # it is a LoRA
    return Exported(made, told is None and shown is None and stored is None)


ARCHITECTURES: dict[str, str] = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}


def _seen(adapter: Adapter) -> Family:
    """The family by all that shows, SD1.x where nothing does."""
    found = find_base({name: adapter.shape(layer) for name, layer in adapter.layers.items()}, adapter.header.metadata).family
    others: dict[str, Family] = {"sd2": "sd2", "sdxl": "sdxl"}
    return others.get(found or "", "sd1")
