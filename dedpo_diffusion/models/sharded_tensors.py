"""Tensors of which every process holds a part (DTensor, as FSDP2 makes them), and the whole ones that files hold.

All of it passes plain tensors through, so that one process and many take the same code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The whole tensors, contiguous on the CPU.

    Several processes gather them together, one tensor at a time: all must call it with the same names in the same order.

    Args:
        tensors: by name.
        keep: False joins in the gathering and returns an empty dict; for processes that write nothing.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, value in tensors.items():
        value = value.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            value = value.cpu().contiguous()
            cut = value.untyped_storage().nbytes() > value.nbytes  # from a larger tensor, which no file can share
            found[name] = value.clone() if cut else value
    return found


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that lies as `like` does, on its device; nothing is communicated."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor):
        return value.to(like.device)
    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=value.dtype).copy_(value)  # in its memory format, too
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Let a module's parameters be the parts again, in the place of the whole ones that a forward pass may have left there."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
