"""A judge from any scorer: Bradley and Terry's (1952) model on its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image
from scipy.special import expit

from ..console import UserError
from ..scorers import Scorer


class BradleyTerry:
    """P(image 0 is preferred) = sigmoid((s_0 - s_1) / temperature).

    Args:
        scorer: gives the scores s.
        temperature: in units of the score; 1 takes the score for a logit.

    Raises:
        UserError: the temperature is no positive number.
    """

    def __init__(self, scorer: Scorer, *, temperature: float = 1.0) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise UserError(f"temperature is {temperature}; it must be a positive number")
        self.scorer, self.temperature = scorer, temperature
        self.name = scorer.name
        self.version = f"{scorer.version} temperature {temperature!r}"

    def scores(self, prompts: Sequence[str], images_0: Sequence[Image], images_1: Sequence[Image]) -> np.ndarray:
        """The raw scores of N pairs, (N, 2) float64.

        Raises:
            UserError: a score is NaN or infinite.
        """
        both = self.scorer.score([*prompts, *prompts], [*images_0, *images_1]).reshape(2, -1).T
        bad = np.argwhere(~np.isfinite(both))
        if bad.size:
            row, side = bad[0]
            raise UserError(f"scorer {self.name} gave {both[row, side]} for image {side} of prompt {prompts[row]!r}; use another scorer")
        return both

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """P(image 0 is preferred), (N,) in [0, 1], of raw scores (N, 2); exact in both tails."""
        with np.errstate(over="ignore"):  # an infinite logit is a sure answer
            return expit((scores[:, 0] - scores[:, 1]) / self.temperature)

    def prefer(self, prompts: Sequence[str], images_0: Sequence[Image], images_1: Sequence[Image]) -> np.ndarray:
        """P(image 0 is preferred) of N pairs.

        Args:
            prompts, images_0, images_1: N each.

        Returns:
            (N,) float64 in [0, 1].
        """
        return self.probability(self.scores(prompts, images_0, images_1))
