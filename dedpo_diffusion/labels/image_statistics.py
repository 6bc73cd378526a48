"""What can be measured of an image at a glance, and the words for it: what judges may lean to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256  # pixels: side of the square copy that statistics are taken from, so that their cost and meaning do not grow with the image
TILE = 8  # pixels: side of a tile of that copy
FLAT = 0.03  # standard deviation of luma below which a tile is flat: 8 of 255 levels
FAINTEST = 1e-6  # added to the variance of the Laplacian: a flat image is -6
# the image with the higher value, and the one with the lower
WORDS = {
    "brightness": ("the brighter image", "the darker image"),
    "contrast": ("the image with more contrast", "the image with less contrast"),
    "saturation": ("the more saturated image", "the less saturated image"),
    "sharpness": ("the sharper image", "the blurrier image"),
    "detail": ("the busier image (more detail)", "the plainer image (less detail)"),
    "warmth": ("the warmer image", "the colder image"),
    "pixels": ("the image of more pixels", "the image of fewer pixels"),
    "aspect": ("the wider image", "the narrower image"),
}


def image_statistics(image: Image) -> dict[str, float]:
    """What can be said of an image at a glance.

    Args:
        image: any size and mode.

    Returns:
        `brightness` mean luma, 0 black to 1 white; `contrast` standard deviation of luma, 0 to 0.5; `saturation` mean HSV
        saturation, 0 grey to 1; `sharpness` log10 of the variance of the Laplacian of luma, -6 for a flat image; `detail`
        share of 8 x 8 tiles that are not flat, 0 plain to 1 busy; `warmth` mean red minus mean blue, -1 to 1; all on a
        copy of 256 x 256 pixels. `pixels` millions of them, and `aspect` width over height, of the image itself.
    """
    from PIL.Image import Resampling

    enlarged = image.width < SIDE or image.height < SIDE
    copy = image.convert("RGB").resize((SIDE, SIDE), Resampling.BILINEAR if enlarged else Resampling.BOX)
    rgb = np.asarray(copy, dtype=np.float32) / 255
    red, green, blue = (np.ascontiguousarray(rgb[..., k]) for k in range(3))
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean()),
        "sharpness": math.log10(float(laplacian.var()) + FAINTEST),
        "detail": float((_tile_means(luma**2) - _tile_means(luma) ** 2 > FLAT**2).mean()),
        "warmth": float(red.mean() - blue.mean()),
        "pixels": image.width * image.height / 1e6,
        "aspect": image.width / image.height,
    }


def _tile_means(plane: np.ndarray) -> np.ndarray:
    """(256, 256) -> (32, 32)."""
    rows = plane.reshape(SIDE // TILE, TILE, SIDE).mean(axis=1)
    return rows.reshape(len(rows), SIDE // TILE, TILE).mean(axis=2)
