"""How different the images of one prompt are, and how far they moved from the base's: by embeddings of a scorer's image tower.

A model that pleases a scorer may draw the same picture for every seed (mode collapse), or leave what the base could do.
Distances are cosine distances of unit vectors, 1 - a . b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.evaluation.comparison.intervals import estimates

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import Arm


def diversity(embeddings: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(P,) mean pairwise cosine distance between the images of each prompt; NaN for a prompt of one image.

    With k unit vectors of sum s the mean of a . b over pairs is (|s|^2 - k) / (k (k - 1)).

    Args:
        embeddings: (N, D) of norm 1.
        prompts: (N,) which prompt each image is of.
    """
    import numpy as np

    names, index = np.unique(prompts, return_inverse=True)
    e = _unit(embeddings)
    sums, k = np.zeros((len(names), e.shape[1])), np.bincount(index).astype(np.float64)
    np.add.at(sums, index, e)
    alike = np.divide((sums**2).sum(axis=1) - k, k * (k - 1), out=np.full(len(k), np.nan), where=k > 1)
    return 1 - alike


def drift(embeddings: np.ndarray, base: np.ndarray) -> np.ndarray:
    """(N,) cosine distance of each image from the base's, both (N, D); exactly 0 for equal vectors, |a - b|^2 / 2."""
    return 0.5 * ((_unit(embeddings) - _unit(base)) ** 2).sum(axis=1)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    import numpy as np

    e = np.asarray(embeddings, dtype=np.float64)
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def spread(arms: Sequence[Arm], **options: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Diversity and drift of every arm by every embedder that all arms hold.

    Diversity is the mean over prompts of several images (equal weights), drift the mean over images; intervals go by prompts,
    all on the same resamples.

    Args:
        arms: the base first, rows in one order.
        options: resamples and seed of the intervals.

    Returns:
        `arms.ARM.spread` of results.json by arm; and what is left out, in words.
    """
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.embeddings import read_embeddings

    held = [read_embeddings(arm.folder, arm.rows) for arm in arms]
    found: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms}
    notes = []
    for name in dict.fromkeys(name for by_name in held for name in by_name):
        lacking = [arm.name for arm, by_name in zip(arms, held, strict=True) if name not in by_name]
        versions = sorted({by_name[name].version for by_name in held if name in by_name})
        if lacking or len(versions) > 1:
            why = (
                f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} none of the present images"
                if lacking
                else f"they are of {' and of '.join(versions)}"
            )
            notes.append(f"Embeddings of {name} are left out, since {why}; run `dedpo score` on all folders with the same {name}.")
            continue
        embedded, prompts = [by_name[name].values for by_name in held], arms[0].prompts
        drifts = estimates(np.stack([drift(e, embedded[0]) for e in embedded], axis=1), prompts, **options)
        diversities = np.stack([diversity(e, prompts) for e in embedded], axis=1)
        several = np.flatnonzero(~np.isnan(diversities[:, 0]))
        columns = np.concatenate([diversities, diversities - diversities[:, :1]], axis=1)[several]
        spreads = estimates(columns, several, **options) if len(several) > 1 else None
        for k, arm in enumerate(arms):
            found[arm.name][name] = {
                "version": versions[0],
                "diversity": spreads.interval(k).as_dict() if spreads else None,
                "diversity_minus_base": spreads.interval(len(arms) + k).as_dict() if spreads else None,
                "drift": drifts.interval(k).as_dict(),
            }
    return found, notes
