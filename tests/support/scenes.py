"""Pairs with planted errors of a judge."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from dedpo_diffusion.shapes import world


def scenes(count: int, seed: int) -> tuple[list[str], list[tuple[Image.Image, Image.Image]]]:
    """Prompts, and two renders of each that may miss some of its attributes."""
    rng, prompts, images = np.random.default_rng(seed), [], []
    words = {"size": world.SIZES, "colour": world.COLOURS, "shape": world.SHAPES, "background": world.BACKGROUNDS}
    for _ in range(count):
        wanted = world.VOCABULARY[rng.integers(len(world.VOCABULARY))]
        drawn = []
        for _ in range(2):
            missed = {name: list(known)[rng.integers(len(known))] for name, known in words.items() if rng.random() < 0.15}
            drawn.append(world.render(world.sample_scene(rng, dataclasses.replace(wanted, **missed))))
        prompts.append(wanted.prompt)
        images.append((drawn[0], drawn[1]))
    return prompts, images
