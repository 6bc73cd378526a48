"""What the tests of sampling share: the arguments of the command, and what it drew."""

from __future__ import annotations

import numpy as np
from PIL import Image

PROMPTS = ["a small red circle on a white background", "a large blue cross on a gray background", "a large cross"]


def arguments(base, prompts, out, **changes) -> list[str]:
    settings = {"model": base, "prompts": prompts, "out": out, "steps": 2, "batch": 2, "device": "cpu"} | changes
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def pixels(folder) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}
