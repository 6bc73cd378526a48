"""From decoded pictures to the pixel tensors that a VAE takes; both images of a pair are treated alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WIDEST = 2.0  # long side over short side of a bucket
SQUARE = 1.05  # the same of an image of which a square crop cuts a sliver at most; buckets are no finer


def bucket_shapes(size: int, multiple: int) -> list[tuple[int, int]]:
    """Shapes (height, width) of about size x size pixels and no more, their sides multiples of `multiple`, from tall to wide.

    For every width the largest height; sides differ by a factor of WIDEST at most. size x size is one of them, if it is such a multiple.
    """
    widths = range(multiple, int(size * WIDEST) + 1, multiple)
    shapes = [(size * size // width // multiple * multiple, width) for width in widths]
    return [(height, width) for height, width in shapes if height and max(height, width) <= WIDEST * min(height, width)]


def not_square(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Which images a square would crop by more than a sliver, of their sides in pixels; 0 for an image that cannot be read."""
    return np.maximum(width, height) > SQUARE * np.minimum(width, height)


def crop_warning(cropped: int, images: int) -> str:
    """What a square does to images that are not square, and what keeps them whole."""
    few = f"{cropped} of {images} images are not square: they will be cropped to the centre"
    return f"{few}; --data.buckets true keeps their shape"


def nearest_shape(images: tuple[Image.Image, Image.Image], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape (height, width) whose ratio of sides is nearest, in logarithms, to that of a pair: the mean over its images."""
    ratio = sum(math.log(image.height / image.width) for image in images) / 2
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - ratio))


def pair_views(
    images: tuple[Image.Image, Image.Image], shape: int | tuple[int, int], *, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Resize until the images just cover a shape, crop it, mirror if asked.

    Args:
        images: the two RGB images, of any two sizes.
        shape: height and width in pixels; one number for a square.
        place: where the crop lies, (horizontal, vertical), 0 to 1 of the room there is; the same for both images.
        flip: mirror both.

    Returns:
        Pixels (2, 3, height, width) float32 in [-1, 1], and what SDXL is told of them (2, 6) float32: height and width of the original,
        top and left of the crop in the resized (and mirrored) image, height and width of the crop.
    """
    wanted = (shape, shape) if isinstance(shape, int) else shape
    pixels, sizes = zip(*(_view(image, wanted, place, flip) for image in images), strict=True)
    return torch.stack(pixels), torch.tensor(sizes, dtype=torch.float32)


def _view(image: Image.Image, shape: tuple[int, int], place: tuple[float, float], flip: bool) -> tuple[Tensor, tuple[int, ...]]:
    (high, wide), original = shape, image.size
    scale = max(wide / image.width, high / image.height)
    width, height = (max(least, round(side * scale)) for least, side in zip((wide, high), original, strict=True))
    if (width, height) != original:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round(place[0] * (width - wide)), round(place[1] * (height - high))
    image = image.crop((left, top, left + wide, top + high))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = width - wide - left
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1
    return pixels, (original[1], original[0], top, left, high, wide)
