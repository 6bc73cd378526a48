"""What the scorers that run here share: images and prompts become vectors once each, and two vectors become a number."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dedpo_diffusion.core.console import say
from dedpo_diffusion.models.memory import BatchLimit, meter_of
from dedpo_diffusion.models.pretrained import in_one_line, usable


class EmbeddingScorer(ABC):
    """A scorer with an image tower and, as a rule, a text tower.

    The towers compute in `dtype`; norms, products, scales and heads are float32 always.

    Args:
        location: where the weights are, see the scorer; None takes the published ones.
        device: torch device; None takes a GPU if there is one.
        batch: images, and prompts, that go through a tower at once; fewer on a GPU without room for them.
        dtype: precision of the towers, "float32", "bfloat16" or "float16".

    Raises:
        UserError: no such device, no weights there, or files of another kind.
    """

    name: str
    temperature: float
    arithmetic: str  # how a score is made of the vectors, for the version
    model: Any

    def __init__(self, location: str | None = None, *, device: str | None = None, batch: int = 64, dtype: str = "float32") -> None:
        self.device = usable(device)
        self.dtype = getattr(torch, dtype)
        remedy = "give another --device" if dtype != "float32" else "take --dtype bfloat16"
        self.limit = BatchLimit(batch, name=self.name, what="images", remedy=remedy)
        self.fitted = False
        weights = self.load(location)
        with in_one_line(f"{self.name} does not fit on device {self.device}", "give another --device, or a smaller --dtype"):
            self.model.eval().to(self.device, self.dtype)
        self.version = "-".join([self.name, weights, self.arithmetic, *([] if dtype == "float32" else [dtype])])
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # resizing is slow and holds no lock
        self.cut_said = False

    @abstractmethod
    def load(self, location: str | None) -> str:
        """Set `model` (float32, on the CPU) and what else scoring needs; return the weights' digest.

        Raises:
            UserError: nothing fitting there.
        """

    @abstractmethod
    def pixels(self, image: Image) -> Tensor:
        """What the image tower sees of an RGB image: (3, H, W) float32."""

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D) of pixels (B, 3, H, W) on the device, in the towers' precision."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) of B prompts; scorers that read no prompts have none."""
        raise NotImplementedError

    @abstractmethod
    def combine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) float32 scores of image features (N, D) float32 and their prompts."""

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The score of each image for its prompt.

        An image (the same object) and a prompt that occur several times are embedded once.

        Args:
            prompts: N prompts; what a prompt has beyond the model's context is not read, which is said once.
            images: N images of any size and mode; they are turned into RGB first.

        Returns:
            (N,) float64, computed in float32.

        Raises:
            UserError: the GPU's memory is too small.
        """
        return self.score_and_embed(prompts, images)[0]

    def score_and_embed(self, prompts: Sequence[str], images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray]:
        """The scores (N,) as `score` gives them, and the images' embeddings (N, D) float32 of norm 1, from one pass through the tower.

        Args, Raises: as `score`.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts, but {len(images)} images")
        if len(images) == 0:
            return np.empty(0), np.empty((0, 0), np.float32)
        keys = [id(image) for image in images]
        with torch.inference_mode():
            self._fit(images)
            seen = self._once(images, keys, self._image_batch)
            return self.combine(seen, prompts).double().cpu().numpy(), normalised(seen).cpu().numpy()

    def cosine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) float32 cosines between image features (N, D) and the prompts' features."""
        return (normalised(seen) * normalised(self._once(prompts, prompts, self.text_features))).sum(-1)

    def say_cut(self, prompts: Sequence[str], context: int) -> None:
        """Tell, once a scorer, that these prompts are longer than the `context` tokens it reads."""
        if prompts and not self.cut_said:
            self.cut_said = True
            say(f"{self.name} reads {context} tokens and not the end of longer prompts (the first: {prompts[0]!r})")

    def _fit(self, images: Sequence[Image]) -> None:
        """See once, by its first images, how many the device has room for."""
        if not self.fitted and len(images) > 1:
            self.limit.fit(lambda count: self._image_batch(images[:count]), meter_of(self.device))
            self.fitted = True

    def _image_batch(self, images: Sequence[Image]) -> Tensor:
        pixels = torch.stack(list(self.threads.map(lambda image: self.pixels(image.convert("RGB")), images)))
        return self.image_features(pixels.to(self.device, self.dtype))

    def _once(self, items: Sequence[Any], keys: Sequence[Hashable], features: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        """(N, D) float32 features of N items; those of the same key go through the tower once."""
        different = dict(zip(keys, items, strict=True))
        row = {key: number for number, key in enumerate(different)}
        values = list(different.values())
        parts = self.limit.over(values, lambda some: features(some).float())
        return torch.cat(list(parts))[[row[key] for key in keys]]


def normalised(features: Tensor) -> Tensor:
    """Vectors (..., D) of norm 1."""
    return torch.nn.functional.normalize(features, dim=-1)
