"""A judge from any scorer: Bradley and Terry's (1952) model on its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.judge import Answers, Judge, Question
from dedpo_diffusion.judges.scorers import Embedder, Scorer


class BradleyTerry(Judge):
    """P(image 0 is preferred) = sigmoid((s_0 - s_1) / temperature).

    Args:
        scorer: gives the scores s.
        temperature: in units of the score; None takes the scorer's own.

    Raises:
        UserError: the temperature is no positive number.
    """

    def __init__(self, scorer: Scorer, *, temperature: float | None = None) -> None:
        super().__init__(scorer.name, scorer.version, scorer.temperature if temperature is None else temperature)
        self.scorer = scorer

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The score of each image for its prompt, (N,) float64.

        Raises:
            UserError: a score is NaN or infinite.
        """
        return self._checked(self.scorer.score(prompts, images), prompts)

    @property
    def embeds(self) -> bool:
        """Whether its scorer gives the embeddings of images too."""
        return isinstance(self.scorer, Embedder)

    def score_and_embed(self, prompts: Sequence[str], images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray]:
        """As `score`, and the images' embeddings (N, D) float32 of norm 1, in one pass; for a scorer that `embeds`."""
        assert isinstance(self.scorer, Embedder)
        scores, seen = self.scorer.score_and_embed(prompts, images)
        return self._checked(scores, prompts), seen

    def _checked(self, scores: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            value, prompt = scores[bad[0]], prompts[bad[0]]
            raise UserError(f"scorer {self.name} gave {value} for an image of prompt {prompt!r}; use another scorer")
        return scores

    def answer(self, questions: Sequence[Question]) -> Answers:
        """The scores of both images of N pairs. Raises as `score`."""
        prompts = [question.prompt for question in questions]
        scores = self.score([*prompts, *prompts], [*(q.image_0 for q in questions), *(q.image_1 for q in questions)])
        return Answers(scores.reshape(2, -1).T, [""] * len(questions))
