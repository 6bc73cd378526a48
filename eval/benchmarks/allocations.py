"""Bytes of tensors that are alive, counted at every operation: on a real device, or on fake tensors that hold no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor], *, block: int = 1) -> int:
    """Bytes of the storages behind tensors, each counted once and rounded up to whole blocks."""
    storages = {id(storage): storage for storage in [tensor.untyped_storage() for tensor in tensors]}
    return sum(-(-storage.nbytes() // block) * block for storage in storages.values())


class AllocationCounter(TorchDispatchMode):
    """Counts the storages that operations make while it is open, until they are freed.

    What lives only inside of a kernel (a convolution's workspace) is not seen. Storages made before do not count.

    Args:
        block: sizes are rounded up to whole blocks; 512 is that of torch's allocator on CUDA devices.

    Attributes:
        live, peak: bytes now, and the most at any time.
        made: bytes of all storages ever made.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block, self.live, self.peak, self.made = block, 0, 0, 0
        self._known: dict[int, Any] = {}  # by identity, as long as they live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; storages of its results that were not there before it are new."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, new=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, new=True)
        return result

    def _see(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.block) * self.block if new else 0
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.made += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
