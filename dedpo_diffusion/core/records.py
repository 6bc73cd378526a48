"""The small frozen records that travel between rooms, every field with its shape."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """A record of tensors and of records of tensors; what else its fields hold stays as it is."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` made to every tensor there is."""
        import torch

        changed: dict[str, Any] = {}
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            elif isinstance(value, Tensors):
                changed[name] = value.map(change)
        return replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return self.map(lambda values: values.to(device))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several, one after the other; all fields are tensors."""
        import torch

        names = [entry.name for entry in fields(parts[0])]
        return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Pair:
    """One row of a pair dataset. Images are encoded files (PNG, JPEG, WebP) as bytes."""

    pair_id: str
    prompt: str
    image_0: bytes
    image_1: bytes
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labels:
    """One label file: P(image 0 is preferred) per pair, in the order of the file.

    `label_0` is (N,) float64 in [0, 1]; `extra` holds the file's other columns, each of length N.
    """

    pair_id: list[str]
    label_0: np.ndarray
    extra: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Votes:
    """The single answers behind a label file; a pair may have many.

    `label_0` is (N,) float64 in [0, 1]; `votes` (N,) int64, how many people gave this very answer; `rater` the person, None
    where the source names nobody; `extra` holds the other columns, each of length N: `swapped` (image 1 was shown on the
    left), `repeat` (a hidden repetition, which measures the rater and makes no label), `seconds`, `time`.
    """

    pair_id: list[str]
    label_0: np.ndarray
    votes: np.ndarray
    rater: list[str | None]
    extra: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """Merged labels in the order of the file: `target` (N,) and `weight` (N,), float64.

    The others say what they were merged from, each (N,) float64 or absent: `human` label (NaN: none), `judge` label, mixed of
    several judges (NaN: none), `inverse` propensity h (0 where no human answered), `power` of the pair's judges together.
    weight = h + power (1 - h), and weight * target = h human + power (1 - h) judge.
    """

    pair_id: list[str]
    target: np.ndarray
    weight: np.ndarray
    human: np.ndarray | None = None
    judge: np.ndarray | None = None
    inverse: np.ndarray | None = None
    power: np.ndarray | None = None


@dataclass(frozen=True)
class Conditioning(Tensors):
    """What the UNet is conditioned on, one entry a pair: both images share their prompt.

    `text` is (B, L, D). SDXL also takes `pooled` (B, P), its second encoder's embedding of the whole prompt, and `sizes` (B, 2, 6),
    which differ between the images: height and width of the original, top and left of the crop, height and width of the crop, in pixels.
    `tokens` (B, encoders, L) are there where the text encoders are adapted; `text` and `pooled` are then those without the adapter.
    """

    text: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    tokens: Tensor | None = None

    def at(self, rows: Any) -> Conditioning:
        """Some of the entries."""
        return self.map(lambda values: values[rows])

    @classmethod
    def stack(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """B entries, each without the axis B, as one."""
        return cls.cat([part.map(lambda values: values[None]) for part in parts])

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The entries of several, one after the other."""
        import torch

        names = [name for name in ("text", "pooled", "sizes", "tokens") if getattr(parts[0], name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class PairBatch:
    """B pairs, ready for the step.

    `latents` (B, 2, C, h, w) scaled VAE latents; `target` and `weight` (B,) float32; `reference_errors` (B, 2)
    where they are known beforehand; `labelled` (B,) bool, whether people labelled the pair, where the targets say so.

    With `members` (B, P, 2) int64 they are B groups of K images, `latents` (B, K, C, h, w), and P pairs of these images in each, image 0
    and image 1 of the K: `target`, `weight` and `labelled` are (B P,), `reference_errors` (B, K); `there` (B P,) bool is False for pairs of
    weight 0 that only fill up.
    """

    latents: Tensor
    conditioning: Conditioning
    target: Tensor
    weight: Tensor
    reference_errors: Tensor | None = None
    labelled: Tensor | None = None
    members: Tensor | None = None
    there: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one preference step leaves behind; only `loss` carries a graph. Of B groups all but `square` are of their B P pairs.

    `loss`, `margin`, `cosine`, `pull`, `square` (B,); `policy_errors`, `reference_errors`, `coefficients` (B, 2), float32.
    `margin` and `reference_errors` are NaN where no reference was needed. `coefficients` are the gradient factors of the
    balance; `cosine` is that of the angle between the policy's residuals on the two images, prediction minus target. `pull` is what the
    pair puts into the gradient: the sum over its images of |d loss / d policy error|, balance and weights included. `square` is the
    squared norm of the gradient of its loss with respect to the model's predictions.
    """

    loss: Tensor
    margin: Tensor
    cosine: Tensor
    policy_errors: Tensor
    reference_errors: Tensor
    coefficients: Tensor
    pull: Tensor
    square: Tensor
