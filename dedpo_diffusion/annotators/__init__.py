"""Judges: one file a family, from a prompt and two images to P(image 0 is preferred)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Annotator(Protocol):
    """What every judge offers; `version` changes whenever the same pair could get another label."""

    name: str
    version: str

    def prefer(self, prompts: Sequence[str], images_0: Sequence[Image], images_1: Sequence[Image]) -> np.ndarray:
        """P(image 0 is preferred) of N pairs, (N,) float64 in [0, 1]."""
        ...
