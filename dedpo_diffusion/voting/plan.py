"""Which pair comes when, on which side, and with what probability: pure functions of the seed, without a state.

Every draw is a hash of the seed and of names (of the pair, of the rater), never of row numbers: the order of the dataset's
rows, the number of raters and a restart change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def uniform(*parts: object) -> float:
    """A number in (0, 1) that looks random and depends on `parts` alone; only the last of them may contain a NUL."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52  # 53 bits: exact, so never rounded to 0 or 1


def disagreement(labels: np.ndarray) -> np.ndarray:
    """How much judges disagree on each pair: the range of their labels; a single judge's doubt 1 - |2 g - 1|.

    Args:
        labels: (J, N) judges' probabilities that image 0 is preferred, J >= 1.

    Returns:
        (N,) in [0, 1].
    """
    return np.ptp(labels, axis=0) if len(labels) > 1 else 1 - np.abs(2 * labels[0] - 1)


def pull(disagreement: np.ndarray, floor: float) -> np.ndarray:
    """w = floor + (1 - floor) d, (N,): how strongly a pair is drawn to the front of the order."""
    return floor + (1 - floor) * disagreement


def turns(prompts: Sequence[str], image_seeds: Sequence[int], seed: int) -> np.ndarray:
    """Keys of an order in which every prompt comes once, in random order, before any comes again.

    Args:
        prompts, image_seeds: N each; no prompt comes twice with the same seed.
        seed: seed of the draws.

    Returns:
        (N,): how many pairs of the same prompt come before, plus a number in (0, 1) that looks random.
    """
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    keys = np.zeros(len(prompts))
    for prompt, rows in members.items():
        draws = [uniform("turn", seed, image_seeds[i], prompt) for i in rows]
        for turn, k in enumerate(np.argsort(draws)):
            keys[rows[k]] = turn + uniform("place", seed, turn, prompt)
    return keys


class Plan:
    """The common order of all pairs, and every draw that the voting makes.

    Pairs are asked in ascending key u / w with u uniform in (0, 1), and w = 1 without weights: priority sampling, also
    known as sequential Poisson sampling.

    Args:
        ids: the N pair_ids.
        seed: seed of every draw.
        weights: (N,) in (0, 1], the pull of each pair; None asks in random order.
        keys: (N,) keys to use instead, without weights.
        repeats: probability that a rater's next item is a hidden repetition.
        overlap: share of pairs that every rater is asked about.

    Reference: Ohlsson 1998 (sequential Poisson sampling); Duffield, Lund and Thorup 2007 (priority sampling).
    """

    def __init__(
        self, ids: Sequence[str], *, seed: int, weights: np.ndarray | None = None, keys: np.ndarray | None = None,
        repeats: float = 0.0, overlap: float = 0.0,
    ):  # fmt: skip
        self.ids, self.seed, self.repeats = list(ids), seed, repeats
        self.weights = weights
        draws = np.array([uniform("order", seed, pair_id) for pair_id in self.ids]) if keys is None else keys
        self.keys = draws if weights is None else draws / weights
        self.order = sorted(range(len(self.ids)), key=lambda i: (self.keys[i], self.ids[i]))  # the pair at each place
        self.place = [0] * len(self.ids)
        for place, pair in enumerate(self.order):
            self.place[pair] = place
        self.shared = [uniform("overlap", seed, pair_id) < overlap for pair_id in self.ids]  # asked of every rater

    def swapped(self, rater: str, pair: int, *, again: bool = False) -> bool:
        """Whether image 1 stands on the left; a hidden repetition shows the opposite of the first time."""
        return (uniform("side", self.seed, rater, self.ids[pair]) < 0.5) != again

    def repeat_is_due(self, rater: str, given: int) -> bool:
        """Whether the item after `given` answers of this rater is a hidden repetition."""
        return uniform("repeat", self.seed, rater, given) < self.repeats

    def choose(self, rater: str, given: int, count: int) -> int:
        """Which of `count` candidates is repeated after `given` answers."""
        return int(uniform("which", self.seed, rater, given) * count)

    def propensity(self, pairs: Sequence[int], end: int) -> np.ndarray | None:
        """Probability with which each asked pair came up: min(1, w tau).

        tau is the key of the first pair not yet asked, infinite if there is none. Seen from one asked pair, tau depends on
        the other pairs' draws alone, so sum(z / p) over the asked pairs is an unbiased estimate of the sum over all.

        Pairs are answered nearly, but not exactly, in order: one may be on a rater's screen still, or was skipped. If tau
        were the key of such a hole, pairs asked beyond it would have a key above tau, which has probability 0 by this
        formula. So tau is the key of the first pair beyond the *last* place that anyone answered or skipped, and the holes
        before it count as asked but unlabelled. This is exact up to those few pairs, and their loss is what any survey
        suffers from people who do not answer: the estimate stays right for the pairs that people do answer.

        Args:
            pairs: n pairs among the first `end` of the order.
            end: places of the order up to the last one answered or skipped.

        Returns:
            (n,) in (0, 1]; None in random order, where every pair was as likely as any other.
        """
        if self.weights is None:
            return None
        tau = np.inf if end >= len(self.order) else self.keys[self.order[end]]
        return np.minimum(1, self.weights[list(pairs)] * tau)
