"""What an image is worth to a policy: scorers, with weights, and the lower bound of what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import TrainSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from dedpo_diffusion.judges.scorers import Scorer

HUMAN = "human"  # label file of the answers that a judge is known by


@dataclass(frozen=True)
class Known:
    """What a judge's reward is known by: the mean (D,) of the embeddings of known images, and M^-1 (D, D)."""

    mean: np.ndarray
    inverse: np.ndarray

    def uncertainty(self, embeddings: np.ndarray) -> np.ndarray:
        """sqrt(e^T M^-1 e) of N images, (N,), from embeddings (N, D); e is the difference from the mean."""
        return uncertainty(embeddings - self.mean, self.inverse)


def uncertainty(embeddings: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """sqrt(e^T M^-1 e), (N,) float64, of embeddings e (N, D) and M^-1 (D, D).

    Up to a factor it is the half width of the confidence interval of a reward that is linear in its embedding.

    Reference: Zhang et al., arXiv 2403.05171, section 3.
    """
    e = np.asarray(embeddings, dtype=np.float64)
    return np.sqrt(np.maximum(np.einsum("nd,de,ne->n", e, inverse, e), 0.0))


class Reward:
    """The weighted sum of scorers, each less its uncertainty where that is asked for.

    Args:
        settings: of the run; those of `loop` say what is added up.
        device: of the scorers.

    Attributes:
        names: of the scorers.
        identity: of what an image is scored by, in one line.

    Raises:
        UserError: a scorer that cannot be loaded or is named twice, weights that are not as many, or no embeddings to know one by.
    """

    def __init__(self, settings: TrainSettings, *, device: str) -> None:
        from dedpo_diffusion.judges.scorers import load_scorer

        loop = settings.loop
        self.beta, self.weights = loop.uncertainty, list(loop.weights) or [1.0] * len(loop.reward)
        self.scorers = [load_scorer(spec, device=device, batch=loop.batch) for spec in loop.reward]
        self.names = [scorer.name for scorer in self.scorers]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"loop.reward {loop.reward}: one of them is named twice; name each once")
        self.known = [known_by(scorer, settings.data.pairs, loop.ridge) for scorer in self.scorers] if self.beta else []
        self.identity = " + ".join(scorer.version for scorer in self.scorers)

    def score(self, prompts: Sequence[str], images: Sequence[Image], seeds: Sequence[int]) -> np.ndarray:
        """(N, 1 + R + R) of N images: their reward, the score of each of R scorers, and the uncertainty of each, 0 where none is asked for.

        Raises:
            UserError: a scorer fails, or gives a score that is not finite.
        """
        scores, doubts = [], []
        for place, scorer in enumerate(self.scorers):
            found: Any
            if self.beta:
                found, seen = scorer.score_and_embed(prompts, images)  # type: ignore[attr-defined]
                doubts.append(self.known[place].uncertainty(seen))
            else:
                found = scorer.score(prompts, images)
                doubts.append(np.zeros(len(images)))
            scores.append(_finite(np.asarray(found, dtype=np.float64), scorer, prompts, seeds))
        total = sum(w * (s - self.beta * u) for w, s, u in zip(self.weights, scores, doubts, strict=True))
        return np.stack([np.asarray(total), *scores, *doubts], axis=1)


def _finite(scores: np.ndarray, scorer: Scorer, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        place = int(bad[0])
        raise UserError(
            f"loop.reward: scorer {scorer.name} gave {scores[place]} for the image of seed {seeds[place]} of {prompts[place]!r} "
            f"({bad.size} of {len(scores)} images); nothing can be learned from it: use another scorer"
        )
    return scores


def known_by(scorer: Scorer, pairs: Path, ridge: float) -> Known:
    """What is known of a judge's reward: the embeddings of the images that people compared, or of all pairs where they compared none.

    M = ridge I + sum of (e - mean)(e - mean)^T.

    Raises:
        UserError: the scorer does not embed images, or left no embeddings of these pairs.
    """
    from dedpo_diffusion.judges.scorers import Embedder
    from dedpo_diffusion.labels.embedding_files import embedding_folder, has_embeddings, scatter
    from dedpo_diffusion.labels.files import label_names, read_labels, row_of
    from dedpo_diffusion.pairs.dataset import PairReader

    if not isinstance(scorer, Embedder):
        raise UserError(
            f"loop.uncertainty needs a judge that embeds images, and {scorer.name} does not; take pickscore, clip, hps or aesthetic, or "
            "set loop.uncertainty to 0"
        )
    name = getattr(scorer, "embeds_as", None) or scorer.name
    if not (pairs / "pairs").is_dir():
        raise UserError(
            f"loop.uncertainty knows a judge by the pairs that it labelled, and {pairs} is no pair dataset; give data.pairs one"
        )
    reader = PairReader(pairs)
    there = name in label_names(pairs)
    version = str(read_labels(pairs, name, extras=("judge_version",)).extra["judge_version"][0]) if there else ""
    own = (
        version.startswith(f"{scorer.version} ") if name == scorer.name else there
    )  # an adapted judge looks at its own judges' versions itself
    if not own or not has_embeddings(pairs, name, {"judge version": version, "dataset": reader.fingerprint()}):
        raise UserError(
            f"{embedding_folder(pairs, name)}: no embeddings of these pairs by {name} as it is now; run `dedpo label {pairs} --with {name} "
            "--keep_embeddings true`, or set loop.uncertainty to 0"
        )
    rows, which = np.arange(len(reader)), ""
    if HUMAN in label_names(pairs):
        found = row_of(reader.ids(), read_labels(pairs, HUMAN, extras=()).pair_id)
        rows, which = np.flatnonzero(found >= 0), " that people labelled"
    mean, spread = scatter(pairs, name, rows)
    say(f"the reward of {scorer.name} is known by the images of {len(rows)} pairs{which}")
    return Known(mean, np.linalg.inv(spread + ridge * np.eye(len(mean))))


def unusable(loop: Any) -> str | None:
    """In words, what of these settings no image can be rewarded by; None where all can be used."""
    if not loop.reward:
        return "loop.reward is empty; name what scores an image, such as pickscore, or adapted=PAIRS/labels/adapt.json"
    if loop.weights and len(loop.weights) != len(loop.reward):
        return f"loop.weights has {len(loop.weights)} numbers for {len(loop.reward)} rewards; give one each, or none for 1 each"
    if not np.isfinite(loop.weights).all() or not any(loop.weights or [1.0]):
        return f"loop.weights is {loop.weights}; give finite numbers, not all of them 0"
    return None
