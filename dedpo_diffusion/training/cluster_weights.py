"""data.cluster_weights: what a prompt of many pairs counts against one of few.

A pair of a prompt with m pairs is weighted by

    none 1      sqrt m^(-1/2)      equal 1 / m          times one number for all, which keeps the sum of the weights

so a prompt's pairs together count in proportion to m, to its root, or as much as those of any other. m counts all pairs of the dataset,
whoever labelled them: the factor does not depend on labels, so what was unbiased for every pair is unbiased for the weighted mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import TrainSettings

POWERS = {"none": 0.0, "sqrt": 0.5, "equal": 1.0}


def check_cluster_weights(settings: TrainSettings) -> None:
    """Refuse settings that weights by prompt do not go with.

    Raises:
        UserError: a power that is estimated for equal weights.
    """
    power = settings.objective.power
    if settings.data.cluster_weights != "none" and power != "fixed":
        raise UserError(
            f"data.cluster_weights={settings.data.cluster_weights} does not go with objective.power={power}, which is derived for pairs "
            "that all count alike; take objective.power fixed, or data.cluster_weights none"
        )


def cluster_factors(prompts: Sequence[str], kind: str, weight: np.ndarray) -> np.ndarray:
    """(N,) what the weight of each pair is multiplied by.

    Args:
        prompts: (N,) of all pairs.
        kind: none, sqrt or equal.
        weight: (N,) of the targets, whose sum stays.
    """
    if kind == "none":
        return np.ones(len(prompts))
    _, which, counts = np.unique(np.asarray(prompts, dtype=object), return_inverse=True, return_counts=True)
    factor = counts[which] ** -POWERS[kind]
    total = math.fsum(weight * factor)  # exact, so that the order of the pairs cannot matter
    return factor * (math.fsum(weight) / total if total > 0 else 1.0)


def say_cluster_weights(prompts: Sequence[str], kind: str, weight: np.ndarray, factor: np.ndarray) -> None:
    """Say how many prompts there are, how many pairs they have, and what the largest one's pairs count before and after.

    Of several processes the first says it.

    Args:
        prompts, weight: (N,) as in `cluster_factors`.
        kind: as there.
        factor: (N,) that it returned.
    """
    if int(os.environ.get("RANK", "0")):
        return
    _, which, counts = np.unique(np.asarray(prompts, dtype=object), return_inverse=True, return_counts=True)
    largest = which == int(np.argmax(counts))
    before, after = (float(w[largest].sum() / w.sum()) for w in (weight, weight * factor))
    pairs = f"{counts.min()} to {counts.max()} pairs" if counts.min() < counts.max() else f"{counts.max()} pairs each, so nothing changes"
    words = f"data.cluster_weights {kind}: {len(counts)} prompts of {pairs}"
    if counts.min() < counts.max():
        words += f"; the pairs of the largest have {after:.1%} of the weight in place of {before:.1%}"
    say(words)
