"""Scorers: one file each, from prompts and images to one number an image.

    scorer = load_scorer("pickscore=FOLDER", device=None, batch=64)
    scorer.score(prompts, images)  # (N,) float64

A score never travels without the scorer's version: numbers of different versions do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..console import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Scorer(Protocol):
    """What every scorer offers.

    `name` is the registry's; `version` changes whenever the same image could get another number.
    """

    name: str
    version: str

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The score of each image for its prompt, higher is better.

        Args:
            prompts: N prompts.
            images: N images of any size and mode.

        Returns:
            (N,) float64.

        Raises:
            UserError: a prompt or image that this scorer cannot judge.
        """
        ...


def _pickscore(location: str | None, device: str | None, batch: int) -> Scorer:
    from .pickscore import PickScore

    return PickScore(location, device=device, batch=batch)


def _oracle_reward(location: str | None, device: str | None, batch: int) -> Scorer:
    from .oracle import OracleReward

    if location is not None:
        raise UserError(f"scorer oracle_reward is a program and has no location: leave out '={location}'")
    return OracleReward()


SCORERS: dict[str, Callable[[str | None, str | None, int], Scorer]] = {"pickscore": _pickscore, "oracle_reward": _oracle_reward}


def load_scorer(spec: str, *, device: str | None, batch: int) -> Scorer:
    """Load a scorer.

    Args:
        spec: "name", or "name=location" with a folder or hub id of its weights.
        device: torch device; None takes a GPU if there is one.
        batch: images scored at once.

    Raises:
        UserError: unknown name, a location without fitting weights, or a batch below 1.
    """
    name, _, location = spec.partition("=")
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}; known: {', '.join(SCORERS)} (as name or name=location)")
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    return SCORERS[name](location or None, device, batch)
