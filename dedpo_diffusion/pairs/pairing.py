"""Which of the K images of a prompt become pairs, by their rewards.

| pairing | pairs of a prompt |
|---|---|
| disjoint | K / 2, each image in one |
| all | all K (K - 1) / 2 |
| best_worst | the image of the highest reward and that of the lowest |
| threshold | those in which the better image is preferred with more than a probability (RS-DPO, Khaki et al., arXiv 2402.10038) |
| rso | disjoint ones of images that statistical rejection sampling accepted (RSO, Liu et al., arXiv 2309.06657) |

A pair keeps the order of its images, so that its place says nothing of the reward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

REWARDED = ("best_worst", "threshold", "rso")  # pairings that ask for rewards


def acceptance(rewards: np.ndarray, temperature: float) -> np.ndarray:
    """exp((r - max r) / temperature), (n,): how probably each image is accepted as a draw of pi exp(r / temperature), given draws of pi.

    Reference: Liu et al., arXiv 2309.06657, section 3.3.
    """
    return np.exp((rewards - rewards.max()) / temperature)


def accepted(rewards: np.ndarray, *, temperature: float, wanted: int, rng: np.random.Generator) -> list[int]:
    """Which of n images statistical rejection sampling accepts, in that order: round by round those that remain are gone through, each
    accepted with its probability among them, until there are `wanted`.

    Raises:
        ValueError: there are fewer images.
    """
    if wanted > len(rewards):
        raise ValueError(f"{wanted} images are to be accepted of {len(rewards)}")
    left, found = np.arange(len(rewards)), list[int]()
    while len(found) < wanted:
        hit = rng.random(len(left)) < acceptance(rewards[left], temperature)
        found += left[hit].tolist()
        left = left[~hit]
    return found[:wanted]


def best_worst(rewards: np.ndarray) -> list[tuple[int, int]]:
    """The image of the highest reward and that of the lowest, the first of equals; nothing where all are alike."""
    ends = sorted((int(np.argmax(rewards)), int(np.argmin(rewards))))
    return [] if ends[0] == ends[1] else [(ends[0], ends[1])]


def above_threshold(rewards: np.ndarray, *, temperature: float, threshold: float) -> list[tuple[int, int]]:
    """All pairs in which sigmoid(|difference of rewards| / temperature), the probability of the better image, is above `threshold`."""
    pairs = itertools.combinations(range(len(rewards)), 2)
    return [(a, b) for a, b in pairs if expit(abs(rewards[a] - rewards[b]) / temperature) > threshold]


def paired(
    count: int, pairing: str, rewards: np.ndarray | None = None, *, temperature: float = 1.0, threshold: float = 0.5, wanted: int = 2,
    rng: np.random.Generator | None = None,
) -> list[tuple[int, int]]:  # fmt: skip
    """The pairs among the `count` images of a prompt, as places (a, b) with a < b.

    Args:
        count: K.
        pairing: as in this module's table.
        rewards: (K,), for those of REWARDED.
        temperature: of threshold and rso, in units of reward.
        threshold: of threshold.
        wanted: of rso, how many images are accepted; an even number.
        rng: of rso.
    """
    if pairing == "all":
        return list(itertools.combinations(range(count), 2))
    if pairing == "disjoint":
        return [(k, k + 1) for k in range(0, count - 1, 2)]
    assert rewards is not None
    if pairing == "best_worst":
        return best_worst(rewards)
    if pairing == "threshold":
        return above_threshold(rewards, temperature=temperature, threshold=threshold)
    assert rng is not None
    kept = accepted(rewards, temperature=temperature, wanted=wanted, rng=rng)
    return [(min(a, b), max(a, b)) for a, b in zip(kept[0::2], kept[1::2], strict=True)]


def told(pairing: str, groups: Sequence[Sequence[tuple[int, int]]], images: int) -> str:
    """In words, what was kept of the images of all prompts, by the pairs of each prompt."""
    pairs, none = sum(map(len, groups)), sum(not group for group in groups)
    used = sum(len({place for pair in group for place in pair}) for group in groups)
    words = f"{pairs} pairs, paired {pairing}; {used} of {images} images are in one"
    why = {"best_worst": "all their images have one reward", "threshold": "no two of their images differ by enough"}
    return words + (f"; {none} of {len(groups)} prompts have none: {why.get(pairing, '')}" if none else "")
