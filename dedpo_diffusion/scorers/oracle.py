"""The true preference of the embedded world as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from ..console import UserError
from ..shapes.human import TEMPERATURE
from ..shapes.oracle import reward


class OracleReward:
    """Mean of the five terms of the Shapes oracle, in [0, 1]; a program, so device, batch and precision do not matter."""

    name = "oracle_reward"
    version = "shapes-oracle-1"
    temperature = TEMPERATURE  # the simulated human's

    def __init__(self, location: str | None = None, **_: Any) -> None:
        if location is not None:
            raise UserError(f"scorer oracle_reward is a program and has no location: leave out '={location}'")

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
        try:
            return reward(prompts, images)
        except ValueError as error:
            raise UserError(f"scorer oracle_reward judges Shapes images only: {error}; use another scorer for other prompts") from error
