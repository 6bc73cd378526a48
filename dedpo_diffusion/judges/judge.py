"""What every judge of pairs offers: questions in, answers out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from dedpo_diffusion.core.console import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from dedpo_diffusion.judges.journal import Journal


@dataclass(frozen=True)
class Question:
    """One pair as a judge sees it; the images are RGB, of any size."""

    pair_id: str
    prompt: str
    image_0: Image
    image_1: Image


@dataclass(frozen=True)
class Answers:
    """Raw answers to N questions.

    `scores` is (N, 2) float64, both NaN where there is no answer; `missing` (N) says why there is none, "" where there is
    one; `extra` holds further columns of the label file (`labels.LABEL_EXTRAS`), each of length N.
    """

    scores: np.ndarray
    missing: list[str]
    extra: dict[str, list[Any]] = field(default_factory=dict)


def probability(scores: np.ndarray, temperature: float) -> np.ndarray:
    """P(image 0 is preferred), (N,) in [0, 1], of raw scores (N, 2); exact in both tails, NaN where there is no answer."""
    with np.errstate(over="ignore"):  # an infinite logit is a sure answer
        return expit((scores[:, 0] - scores[:, 1]) / temperature)


class Judge(ABC):
    """What every judge offers.

    Attributes:
        name: of its label file.
        version: changes whenever the same pair could get another label; covers the temperature.
        temperature: in units of the scores, positive.
        parallel: pairs that it likes to be asked about at once; None takes the stage's batch.
        keeps_answers: whether `answer_with` keeps each answer as it comes, since answers cost money.

    Raises:
        UserError: the temperature is no positive number.
    """

    parallel: int | None = None
    keeps_answers = False

    def __init__(self, name: str, version: str, temperature: float) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise UserError(f"temperature is {temperature}; it must be a positive number")
        self.name, self.temperature = name, temperature
        self.version = f"{version} temperature {temperature!r}"

    @abstractmethod
    def answer(self, questions: Sequence[Question]) -> Answers:
        """Raw answers to N questions; a pair that cannot be judged is missing, never invented.

        Raises:
            UserError: no further pair can be judged either; these N are lost, earlier ones are not.
        """

    def answer_with(self, questions: Sequence[Question], journal: Journal | None) -> Answers:
        """As `answer`; a judge that keeps its answers takes those in the journal, and puts new ones there at once."""
        return self.answer(questions)

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """The price of these tokens; nothing for a judge that runs here."""
        return 0.0

    def prefer(self, prompts: Sequence[str], images_0: Sequence[Image], images_1: Sequence[Image]) -> np.ndarray:
        """P(image 0 is preferred) of N pairs, N each.

        Returns:
            (N,) float64 in [0, 1], NaN where there is no answer.
        """
        asked = [Question("", *parts) for parts in zip(prompts, images_0, images_1, strict=True)]
        return probability(self.answer(asked).scores, self.temperature)
