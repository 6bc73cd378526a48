"""Optimizers by name, and the moving average of what they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.sharded_tensors import own_part


def build_optimizer(
    name: str, parameters: Iterable[Tensor], *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer over float32 parameters.

    Args:
        name: "adamw"; "adamw_8bit", whose moments take a quarter of the memory (bitsandbytes, CUDA only).
        parameters: what is trained.
        learning_rate: until the loop sets another.
        betas: decays of AdamW's moments.
        weight_decay: decoupled.

    Raises:
        UserError: what the optimizer needs is not there.
    """
    if name == "adamw":  # one kernel for each tensor: an adapter has hundreds of small ones
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    parameters = list(parameters)
    if not parameters or not all(parameter.is_cuda for parameter in parameters):
        raise UserError(f"optim.optimizer={name} needs a CUDA device; take adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optim.optimizer={name} needs `pip install bitsandbytes` ({error}); or take adamw") from error
    return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


class Average:
    """Exponential moving average of parameters, in their own precision.

    Args:
        parameters: by name; the average starts where they are.
        decay: share of the average that an update keeps; at step n at most (1 + n) / (10 + n), so that the start is soon forgotten.

    Attributes:
        values: the average, by name.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: give a number in [0, 1), where 0 keeps nothing but the last step")
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Take in the parameters after a step, counted from 1."""
        kept = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [parameters[name].detach() for name in self.values], 1 - kept)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint kept.

        Raises:
            ValueError: names differ.
        """
        if set(values) != set(self.values):
            raise ValueError(f"the average is of other parameters (first difference: {sorted(set(values) ^ set(self.values))[0]!r})")
        self.values = {name: own_part(values[name], value) for name, value in self.values.items()}
