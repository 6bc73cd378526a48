"""What a device can hold: the precision that is taken on it, and how much goes through a model at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dedpo_diffusion.core.console import UserError, say

if TYPE_CHECKING:
    import torch

    from dedpo_diffusion.core.engine import Engine

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

SHARE = 0.85  # of the free memory that a predicted peak may fill; the rest is for kernels' workspaces and fragmentation
ALLOCATIONS = (  # in the words of libraries, and of torch on the CPU
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory: you tried to allocate",
)  # fmt: skip
LARGE = 50_000_000  # parameters from which a model takes its time on a CPU; the embedded one has 4 million


# ---- precision


def dtype_for(kind: str, *, bfloat16: bool) -> str:
    """The precision that `auto` stands for.

    Args:
        kind: of the device, as "cuda" or "cpu".
        bfloat16: whether it computes in bfloat16 by itself.
    """
    if kind != "cuda":
        return "float32"
    return "bfloat16" if bfloat16 else "float16"


def resolved(settings: S, *, most: int) -> S:
    """A stage's settings with a precision and a number in place of `auto`: bfloat16 on a GPU, float16 on one without it, else float32.

    Args:
        settings: a dataclass with `device`, `dtype` and `batch`.
        most: the batch that `auto` stands for; where the GPU's memory is small, fewer go through at once (`BatchLimit`).

    Raises:
        UserError: the device cannot be used here.
    """
    told: Any = settings
    changes: dict[str, Any] = {"batch": most} if told.batch == "auto" else {}
    if told.dtype == "auto":
        from dedpo_diffusion.models.pretrained import usable

        device = usable(told.device)
        changes["dtype"] = dtype_for(device.type, bfloat16=device.type == "cuda" and _has_bfloat16(device))
    return replace(told, **changes) if changes else settings


def resolved_by(engine: Engine, settings: S, *, most: int) -> S:
    """As `resolved`, on the device of a worker of this engine."""
    told: Any = settings
    if not engine.many:
        return resolved(settings, most=most)
    if not engine.gpus:
        found: Any = resolved(replace(told, device="cpu"), most=most)
        return replace(found, device=told.device)
    return engine.crew(partial(resolved, settings, most=most)).ask(_itself)


def _itself(found: T) -> T:
    return found


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


# ---- how many at once


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in ALLOCATIONS)


def largest_batch(one: int, two: int, *, room: float, most: int) -> int:
    """The largest of most, most / 2, ..., 1 that `room` bytes hold, where every item adds as much as the second did.

    Args:
        one, two: bytes at the peak of 1 item and of 2.
        room: bytes that there are.
        most: the largest that is wanted.

    Returns:
        At least 1, even if there is no room for it.
    """
    batch, further = most, max(two - one, 0)
    while batch > 1 and one + (batch - 1) * further > room:
        batch //= 2
    return batch


class Meter(Protocol):
    """Measures a device's memory."""

    def room(self) -> int:
        """Bytes that are free."""
        ...

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes that a call takes at its peak, beyond what is held before it."""
        ...


class CudaMeter:
    """Of a CUDA device, by torch's own allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def room(self) -> int:
        """See `Meter`; what the allocator keeps and does not use counts as free."""
        import torch

        torch.cuda.empty_cache()
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def peak(self, call: Callable[[], Any]) -> int:
        """See `Meter`."""
        import torch

        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def meter_of(device: torch.device) -> Meter | None:
    """What measures a device's memory; None for one whose memory is the machine's own."""
    return CudaMeter(device) if device.type == "cuda" else None


class BatchLimit:
    """How many items go through a model at once: as many as are asked for, and fewer on a device that cannot hold them.

    Which items go together changes how sums are rounded, and nothing else. Halving keeps parts aligned: items then go together as if the
    smaller number had been asked for from the start.

    Args:
        most: items at once, where memory allows.
        name: what they go through, for messages.
        what: what they are, in the plural.
        remedy: what helps where one alone is too much.

    Attributes:
        now: items at once by now.
    """

    def __init__(self, most: int, *, name: str, what: str, remedy: str) -> None:
        self.now, self.name, self.what, self.remedy = most, name, what, remedy

    def fit(self, probe: Callable[[int], Any], meter: Meter | None) -> None:
        """Measure what 1 and 2 items take, and take fewer than asked for where the device has no room for all.

        Args:
            probe: puts so many items through the model.
            meter: of the device; None measures nothing.
        """
        if meter is None or self.now == 1:
            return
        most = self.now
        one, two = (_out_of_memory_as_none(partial(meter.peak, partial(probe, count))) for count in (1, 2))
        if one is None or two is None:
            self.now = 1
        else:
            self.now = largest_batch(one, two, room=SHARE * meter.room(), most=most)
        if self.now < most:
            say(f"{self.name}: the GPU's memory has room for {self.now} of {most} {self.what} at once")

    def over(self, items: Sequence[T], work: Callable[[Sequence[T]], R]) -> Iterator[R]:
        """What `work` makes of each part of the items, in order; a part that is too much for the memory is done again in halves.

        Args:
            items: N of them.
            work: gets `now` consecutive items, or the last few, and can be begun anew.

        Raises:
            UserError: the memory is too small for a single item.
        """
        start = 0
        while start < len(items):
            part = items[start : start + self.now]
            found = _out_of_memory_as_none(partial(_alone, work, part))
            if found is not None:
                yield found[0]
                start += len(part)
            else:
                self._halve(len(part))

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError(f"{self.name}: the GPU's memory is too small, even for one of the {self.what} at a time; {self.remedy}")
        self.now = tried // 2
        say(f"{self.name}: the GPU's memory is too small for {tried} {self.what} at once; going on with {self.now}")


def _alone(work: Callable[[T], R], part: T) -> tuple[R]:
    """What `work` gives, in a tuple, so that None is something too."""
    return (work(part),)


def _out_of_memory_as_none(call: Callable[[], T]) -> T | None:
    """What a call gives, or None where the device's memory was too small for it; what it held is free by then."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # not before: the error holds on to what the call held
    return None


def free_memory() -> None:
    """Give unused memory back to the devices."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- on a CPU


def slow_on_cpu(owner: Any) -> bool:
    """Whether this is a large model on a CPU, or a judge or scorer that has one."""
    from torch import nn

    model = getattr(getattr(owner, "scorer", owner), "model", owner)
    if not isinstance(model, nn.Module):
        return False
    parameters = list(model.parameters())
    return sum(one.numel() for one in parameters) >= LARGE and parameters[0].device.type == "cpu"


def tell_cpu(what: str) -> None:
    """Say that a large model, or work with one, runs on the CPU; and, where torch finds no GPU, what could be wrong."""
    import torch

    if torch.cuda.is_available():
        say(f"{what} runs on the CPU")
    else:
        say(f"no GPU is here: {what} runs on the CPU. If this machine has a GPU, install a build of torch that finds it")
