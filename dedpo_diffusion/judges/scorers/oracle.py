"""The oracle of the embedded world as scorers: its true preference, and whether an image shows what its prompt asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL.Image import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.shapes.oracle import TEMPERATURE, TERMS, correct, read, reward

VERSION = "shapes-oracle-1"  # of what is read off an image, and of the reward


class OracleReward:
    """Mean of the five terms of the Shapes oracle, in [0, 1]; a program, so device, batch and precision do not matter."""

    name = "oracle_reward"
    version = VERSION
    temperature = TEMPERATURE  # the simulated human's

    def __init__(self, location: str | None = None, **_: Any) -> None:
        _no_location(self.name, location)

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The true reward of each image.

        Args:
            prompts: N prompts of the Shapes grammar.
            images: N images.

        Returns:
            (N,) float64 in [0, 1].

        Raises:
            UserError: a prompt outside the grammar.
        """
        with _shapes_only(self.name):
            return reward(prompts, images)


class OracleAccuracy:
    """1 where the oracle finds right what the prompt asks for, else 0: attribute accuracy as GenEval (Ghosh et al. 2023, arXiv
    2310.11513) reports it, where an image counts only if everything in it is right. Also a program.

    Args:
        location: must be None.
        attribute: the one that is looked at, of `oracle.TERMS`; None asks for all of them.
    """

    temperature = 1.0  # nothing says how surely a right image is preferred to a wrong one: arbitrary until calibrated

    def __init__(self, location: str | None = None, *, attribute: str | None = None, **_: Any) -> None:
        self.attributes = TERMS if attribute is None else (attribute,)
        what = attribute or "accuracy"
        self.name, self.version = f"oracle_{what}", f"{VERSION}-{what}"
        _no_location(self.name, location)

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """Whether each image is right, (N,) float64 of 0 and 1. Args, Raises: as `OracleReward.score`."""
        with _shapes_only(self.name):
            found = [correct(prompt, read(image)) for prompt, image in zip(prompts, images, strict=True)]
        return np.array([all(right[name] for name in self.attributes) for right in found], dtype=np.float64)


def _no_location(name: str, location: str | None) -> None:
    if location is not None:
        raise UserError(f"scorer {name} is a program and has no location: leave out '={location}'")


@contextmanager
def _shapes_only(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"scorer {name} judges Shapes images only: {error}; use another scorer for other prompts") from error
