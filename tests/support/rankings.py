"""Pair datasets whose pairs share images: all pairs of rankings."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np

from dedpo_diffusion.core.records import Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pairs.dataset import PairWriter
from support.pictures import picture


def write_rankings(folder: Path, sizes: list[int], *, left_out: int = 0, shape: tuple[int, int] = (64, 64)) -> Path:
    """All pairs of images of prompts that have so many each, now and then turned, in an order that mixes prompts; targets "soft".

    `left_out` of the pairs carry no weight.
    """
    pairs = [(prompt, *ends) for prompt, size in enumerate(sizes) for ends in combinations(range(size), 2)]
    pairs = [pairs[k] for k in np.random.default_rng(1).permutation(len(pairs))]
    with PairWriter(folder, shard_pairs=5) as writer:
        for k, (prompt, a, b) in enumerate(pairs):
            a, b = (b, a) if k % 3 == 0 else (a, b)
            writer.add(Pair(f"p{k}", f"prompt {prompt}", picture(100 * prompt + a, shape), picture(100 * prompt + b, shape)))
    count = len(pairs)
    target = np.array([0.0, 1.0, 0.3, 1.6, -0.7, 0.8])[np.arange(count) % 6]
    weight = np.where(np.arange(count) < left_out, 0.0, 0.5 + np.arange(count) % 4 / 2)
    write_targets(folder, "soft", Targets([f"p{k}" for k in range(count)], target, weight), {"power": 0.4})
    return folder
