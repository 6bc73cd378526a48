"""The parameters of an adapter that is being trained <-> a LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dedpo_diffusion.models.text_encoders import NAMES
from dedpo_diffusion.weights.lora import Lora, LoraLayer

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
