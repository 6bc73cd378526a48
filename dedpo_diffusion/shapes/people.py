"""The simulated people of Shapes, who answer as the oracle does, with noise; and the prompts that they know."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dedpo_diffusion.core.console import UserError, say, track
from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.labels.files import write_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.shapes.oracle import answers, reward
from dedpo_diffusion.shapes.world import VOCABULARY


def drawn_prompts(count: int, seed: int) -> list[str]:
    """So many prompts of Shapes, drawn at random, some more than once."""
    rng = np.random.default_rng((seed, 0))
    return [VOCABULARY[k].prompt for k in rng.integers(len(VOCABULARY), size=count)]


def spread_prompts(count: int) -> list[str]:
    """So many different prompts of Shapes, evenly spread over all.

    Raises:
        UserError: fewer than 2, or more than there are.
    """
    if not 2 <= count <= len(VOCABULARY):
        raise UserError(f"{count} prompts of Shapes for the evaluation; give a number from 2 to {len(VOCABULARY)}")
    return [VOCABULARY[k * len(VOCABULARY) // count].prompt for k in range(count)]


def true_rewards(reader: PairReader, rows: np.ndarray) -> np.ndarray:
    """(n, 2) rewards of the oracle for both images of these pairs of Shapes."""
    found = []
    for row in track(rows.tolist(), "asking the oracle", len(rows)):
        pair, where = reader.pair(row), reader.location(row)
        found.append(reward([pair.prompt] * 2, [decode_image(pair.image_0, where), decode_image(pair.image_1, where)]))
    return np.array(found)


def answer_share(pairs: Path, share: float, seed: int, name: str = "human") -> int:
    """Let the simulated people label a random share of the pairs: Bradley-Terry answers on the oracle's reward. Returns how many.

    Raises:
        UserError: a share that leaves nobody anything to answer.
    """
    reader = PairReader(pairs)
    count = round(share * len(reader))
    if not 1 <= count <= len(reader):
        raise UserError(
            f"human_share is {share:g}, which is {count} of {len(reader)} pairs; give a share that is at least one pair, up to 1"
        )
    rng = np.random.default_rng((seed, 1))
    asked = np.sort(rng.choice(len(reader), count, replace=False))
    reward_0, reward_1 = true_rewards(reader, asked).T
    ids = reader.ids()
    write_labels(pairs, name, Labels([ids[row] for row in asked], answers(rng, reward_0, reward_1)))
    say(f"{len(asked)} of {len(reader)} pairs labelled by the simulated people")
    return count
