"""The world of Shapes: its prompt grammar and its renderer.

A scene is one coloured shape on a plain background, optionally with clutter: a few small dots that no prompt mentions.
Everything is drawn by Pillow at four times the final size and averaged down, so edges are smooth.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from PIL import Image, ImageDraw

PIXELS = 64
SUPERSAMPLE = 4

SIZES = {"small": 9.0, "large": 16.0}  # "radius" in pixels: half the side of the square of equal area
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 45),
    "purple": (150, 60, 185),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": (245, 245, 245), "gray": (140, 140, 140), "black": (18, 18, 18)}


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a prompt asks for; each field is a word of the grammar."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawable scene. `centre` in pixels, `radius` in pixels, `dots` as (x, y, radius, grey level)."""

    attributes: Attributes
    centre: tuple[float, float]
    radius: float
    colour: tuple[int, int, int]
    background: tuple[int, int, int]
    dots: tuple[tuple[float, float, float, int], ...] = ()


VOCABULARY: tuple[Attributes, ...] = tuple(Attributes(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS))


def parse_prompt(prompt: str) -> Attributes:
    """Read the attributes back from a prompt of the grammar.

    Raises:
        ValueError: the prompt is not of the grammar "a SIZE COLOUR SHAPE on a BACKGROUND background".
    """
    words = prompt.strip().lower().split()
    if len(words) == 8 and words[0] == "a" and words[4:6] == ["on", "a"] and words[7] == "background":
        attributes = Attributes(words[1], words[2], words[3], words[6])
        if attributes in VOCABULARY:
            return attributes
    raise ValueError(f"not a Shapes prompt: {prompt!r} (expected 'a small red circle on a white background' and the like)")


def outline(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Polygon of a shape whose area is that of a square with half side `radius`, in pixels.

    Returns:
        The corners as (x, y); a circle comes as a 48-corner polygon.
    """
    x, y = centre
    if shape == "square":
        unit = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape == "circle":
        k = 2 / np.sqrt(np.pi)
        unit = [(k * np.cos(a), k * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 48, endpoint=False)]
    elif shape == "triangle":
        # equilateral: area sqrt(3)/4 side^2 = 4, centroid at the origin
        side = 4 / 3**0.25
        unit = [(0.0, -side / np.sqrt(3)), (side / 2, side / (2 * np.sqrt(3))), (-side / 2, side / (2 * np.sqrt(3)))]
    elif shape == "cross":
        # arms of half width a third of the arm's length: area 4 * (2 * w * arm) - 4 w^2 = 4
        arm = np.sqrt(4 / (8 / 3 - 4 / 9))
        w = arm / 3
        unit = [(-w, -arm), (w, -arm), (w, -w), (arm, -w), (arm, w), (w, w)]
        unit += [(w, arm), (-w, arm), (-w, w), (-arm, w), (-arm, -w), (-w, -w)]
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return [(x + radius * u, y + radius * v) for u, v in unit]


def _shifted(rgb: tuple[int, int, int], by: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(rgb) + by, 0, 255).astype(int).tolist()
    return red, green, blue


def sample_scene(rng: np.random.Generator, attributes: Attributes | None = None, *, clutter: float = 0.5) -> Scene:
    """Draw a random scene; `clutter` is the probability that it carries dots."""
    if attributes is None:
        attributes = VOCABULARY[rng.integers(len(VOCABULARY))]
    radius = SIZES[attributes.size] * rng.uniform(0.9, 1.1)
    corners = np.array(outline(attributes.shape, (0.0, 0.0), radius))
    low, high = 1 - corners.min(axis=0), PIXELS - 1 - corners.max(axis=0)  # keeps every corner inside the frame
    centre = rng.uniform(low, high)
    reach = float(np.linalg.norm(corners, axis=1).max())
    colour = _shifted(COLOURS[attributes.colour], rng.normal(0, 6, 3))
    background = _shifted(BACKGROUNDS[attributes.background], rng.normal(0, 3, 1))
    dots: list[tuple[float, float, float, int]] = []
    if rng.random() < clutter:
        level = {"white": 90, "gray": 230, "black": 190}[attributes.background]
        wanted = rng.integers(4, 8)
        for _ in range(100):
            x, y = rng.uniform(3, PIXELS - 3, 2)
            if len(dots) < wanted and np.hypot(x - centre[0], y - centre[1]) > reach + 4:
                dots.append((x, y, rng.uniform(2.2, 3.0), level))
    return Scene(attributes, (float(centre[0]), float(centre[1])), float(radius), colour, background, tuple(dots))


def render(scene: Scene) -> Image.Image:
    """Draw a scene as a 64 x 64 RGB image."""
    k = SUPERSAMPLE
    image = Image.new("RGB", (PIXELS * k, PIXELS * k), scene.background)
    draw = ImageDraw.Draw(image)
    for x, y, r, level in scene.dots:
        draw.ellipse([(x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k], fill=(level, level, level))
    corners = [(x * k, y * k) for x, y in outline(scene.attributes.shape, scene.centre, scene.radius)]
    draw.polygon(corners, fill=scene.colour)
    return image.reduce(k)


def shape_mask(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Boolean mask (64, 64) of a shape, at the final resolution."""
    image = Image.new("L", (PIXELS * 2, PIXELS * 2), 0)
    ImageDraw.Draw(image).polygon([(2 * x, 2 * y) for x, y in outline(shape, centre, radius)], fill=255)
    return np.asarray(image.reduce(2)) > 127
