"""The true preference of Shapes: reads attributes off the pixels of an image, prompt in hand.

It never sees how an image was made, so it judges renders and generated images alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from dedpo_diffusion.shapes.world import BACKGROUNDS, COLOURS, PIXELS, SHAPES, SIZES, parse_prompt, shape_mask

TEMPERATURE = 0.05  # reward difference at which the simulated human is 73 % sure
TERMS = ("shape", "colour", "size", "background", "clean")
CONTRAST = 0.16  # a pixel this far (RGB distance, 1 = one full channel) from the background is foreground
LEAST_AREA = 60  # pixels; a smaller largest blob is no object
CLUTTERED = 40.0  # pixels of clutter that an eye calls clutter; a cluttered render has 70 or more
CLUTTER_FULL = 180.0  # pixels of clutter at which cleanliness reaches 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the oracle reads off one image, without knowing the prompt.

    `shape`, `colour`, `size` are "" where no object was found. `overlaps` holds the intersection over union of the
    object with each ideal shape of the same area and centre; `clutter` is in pixels.
    """

    shape: str
    colour: str
    size: str
    background: str
    overlaps: dict[str, float]
    object_rgb: np.ndarray
    background_rgb: np.ndarray
    radius: float
    clutter: float

    @property
    def is_cluttered(self) -> bool:
        return self.clutter > CLUTTERED


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(rgb - np.array(palette[name]) / 255)))


def read(image: Image.Image) -> Reading:
    """Read shape, colour, size, background and clutter off an image.

    Args:
        image: any size and mode; it is converted to RGB and resized to 64 x 64.
    """
    if image.size != (PIXELS, PIXELS):
        image = image.resize((PIXELS, PIXELS), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    edges = (pixels[:3], pixels[-3:], pixels[3:-3, :3], pixels[3:-3, -3:])
    background_rgb = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    foreground = np.linalg.norm(pixels - background_rgb, axis=-1) > CONTRAST
    blobs, _ = ndimage.label(foreground)
    areas = np.bincount(blobs.ravel())
    areas[0] = 0
    main = int(areas.argmax())
    area = int(areas[main])
    background = _nearest(background_rgb, BACKGROUNDS)
    if area < LEAST_AREA:
        none = dict.fromkeys(SHAPES, 0.0)
        return Reading("", "", "", background, none, background_rgb, background_rgb, 0.0, float(area))
    mask = ndimage.binary_fill_holes(blobs == main)
    area = int(mask.sum())
    rows, columns = np.nonzero(mask)
    centre = (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)
    radius = float(np.sqrt(area)) / 2
    inner = ndimage.binary_erosion(mask, iterations=2)
    object_rgb = np.median(pixels[inner if inner.any() else mask], axis=0)
    overlaps = {}
    for shape in SHAPES:
        ideal = shape_mask(shape, centre, radius)
        overlaps[shape] = float((mask & ideal).sum() / (mask | ideal).sum())
    return Reading(
        shape=max(overlaps, key=lambda name: overlaps[name]),
        colour=_nearest(object_rgb, COLOURS),
        size=min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name]))),
        background=background,
        overlaps=overlaps,
        object_rgb=object_rgb,
        background_rgb=background_rgb,
        radius=radius,
        clutter=float((foreground & ~mask).sum()),
    )


def terms(prompt: str, reading: Reading) -> dict[str, float]:
    """The five terms of the reward, each in [0, 1], 1 being a flawless render of the prompt."""
    wanted = parse_prompt(prompt)
    if not reading.shape:
        shape = colour = size = 0.0
    else:
        # an ideal shape on the pixel grid overlaps itself by about 0.95; another shape by 0.55 to 0.85
        shape = (reading.overlaps[wanted.shape] - 0.6) / 0.3
        if reading.shape != wanted.shape:
            shape = min(shape, 0.3)
        colour = 1 - max(0.0, float(np.linalg.norm(reading.object_rgb - np.array(COLOURS[wanted.colour]) / 255)) - 0.05) / 0.5
        size = 1 - max(0.0, abs(float(np.log(reading.radius / SIZES[wanted.size]))) - 0.12) / 0.4
    background_gap = float(np.linalg.norm(reading.background_rgb - np.array(BACKGROUNDS[wanted.background]) / 255))
    background = 1 - max(0.0, background_gap - 0.05) / 0.5
    clean = 1 - reading.clutter / CLUTTER_FULL
    values = (shape, colour, size, background, clean)
    return {name: float(np.clip(value, 0.0, 1.0)) for name, value in zip(TERMS, values, strict=True)}


def matches(prompt: str, reading: Reading) -> dict[str, bool]:
    """Which of the prompt's attributes the image shows, by nearest word of the grammar."""
    wanted = dataclasses.asdict(parse_prompt(prompt))
    return {name: getattr(reading, name) == word for name, word in wanted.items()}


def correct(prompt: str, reading: Reading) -> dict[str, bool]:
    """Which of TERMS are right: the prompt's attributes, as `matches` has them, and a picture without clutter."""
    found = {**matches(prompt, reading), "clean": not reading.is_cluttered}
    return {name: found[name] for name in TERMS}


def reward(prompts: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
    """The true reward of each image for its prompt: the mean of the five terms.

    Args:
        prompts: N prompts of the grammar.
        images: N images.

    Returns:
        (N,) float64 in [0, 1].
    """
    values = [np.mean(list(terms(p, read(i)).values())) for p, i in zip(prompts, images, strict=True)]
    return np.array(values, dtype=np.float64)


# ---- the simulated human: noisy Bradley-Terry answers on the oracle's reward


def preference(reward_0: np.ndarray, reward_1: np.ndarray, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """P(image 0 preferred) (N,) of rewards (N,): sigmoid of their difference over the temperature."""
    return 1 / (1 + np.exp(-(np.asarray(reward_0) - np.asarray(reward_1)) / temperature))


def answers(rng: np.random.Generator, reward_0: np.ndarray, reward_1: np.ndarray, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """One hard answer per pair: `label_0` (N,) of 1.0 or 0.0, drawn from `preference`."""
    likely = preference(reward_0, reward_1, temperature=temperature)
    return (rng.random(likely.shape) < likely).astype(np.float64)
