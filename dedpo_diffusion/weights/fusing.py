"""Changes worked into the weights of a model, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.text_encoders import NAMES
from dedpo_diffusion.weights.lora import Lora


@torch.no_grad()
def merge(pipe: Any, lora: Lora, *, strength: float = 1.0) -> None:
    """Work a LoRA into the weights of a loaded pipeline, in place: W + strength * (its changed W - W), which becomes float32.

    Args:
        pipe: a pipeline of diffusers, without adapters.
        lora: of that model.
        strength: of a DoRA, whose magnitudes are of the whole change, it leads along the straight way there.

    Raises:
        UserError: the model lacks one of its layers, or has it in another shape; it is then partly changed.
    """
    for name, weight in _weights(pipe, lora):
        layer = lora.layers[name]
        if (len(layer.up), *layer.down.shape[1:]) != tuple(weight.shape):
            shape = (len(layer.up), *layer.down.shape[1:])
            raise UserError(f"{name}: the LoRA changes a weight of shape {shape}, the model's is {tuple(weight.shape)}; {OTHER}")
        changed = layer.merged(weight.data)
        weight.data = changed if strength == 1 else torch.lerp(weight.data.float(), changed, strength)


OTHER = "it belongs to another model"


def _weights(pipe: Any, lora: Lora) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's weight of each of a LoRA's layers."""
    for name in lora.layers:
        part, _, path = name.partition(".")
        module = getattr(pipe, part, None)
        try:
            if module is not None and part in NAMES and not hasattr(module, "text_model"):  # by the version of transformers
                path = path.removeprefix("text_model.")
            yield name, module.get_submodule(path).weight  # type: ignore[union-attr]
        except AttributeError as error:
            raise UserError(f"{name}: the model has no such layer for the LoRA; {OTHER}") from error


@torch.no_grad()
def replace_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strength: float = 1.0) -> None:
    """Put others in place of all weights of a module: W + strength * (theirs - W).

    Raises:
        UserError: they are those of another module.
    """
    own = module.state_dict()
    odd = sorted(set(own) ^ set(weights))
    if odd:
        raise UserError(f"{odd[0]}: the model and the run do not have the same weights; give the --model that was trained")
    for name, value in own.items():
        new = weights[name]
        if new.shape != value.shape:
            raise UserError(f"{name}: the model has another shape of it than the run; give the --model that was trained")
        value.copy_(new if strength == 1 else torch.lerp(value.float(), new.float(), strength))


@torch.no_grad()
def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Round all floating weights to a precision, one after the other: there is no second copy of the model.

    Raises:
        UserError: a weight is beyond its range.
    """
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            value.data = value.data.to(dtype)
            if not torch.isfinite(value.data).all():
                raise UserError(f"{name}: not finite as {str(dtype).removeprefix('torch.')}; give --dtype bfloat16 or float32")
