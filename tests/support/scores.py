"""What the tests of comparisons share: sample folders with given scores."""

from __future__ import annotations

import numpy as np

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.settings import CompareSettings
from support.samples import PROMPTS

CLUSTERS = np.repeat(PROMPTS, 2)


BASE = np.linspace(0.2, 0.8, 12)


def put_scores(folder, **by_scorer):
    """Write scores.parquet: (12,) scores by scorer name, in the order of the index."""
    index = score.read_index(folder)
    rows = [
        {**row, "scorer": name, "version": f"{name}-1", "score": float(value)}
        for name, values in by_scorer.items() for row, value in zip(index, values, strict=True)
    ]  # fmt: skip
    score.write_scores(folder, index, rows)
    return folder


def settings(folders, **changes):
    return CompareSettings(folders=list(folders), **{"resamples": 500, "held_out": ["truth"], **changes})
