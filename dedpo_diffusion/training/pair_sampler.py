"""Which pair is visited when: a function of seed, visit number and pairs of a step, so that nothing has to be stored to resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class PairSampler:
    """The order in which pairs are visited, epoch after epoch, n visits an epoch.

    In each epoch pair i is visited floor(n p_i) or ceil(n p_i) times, n p_i on average (systematic sampling in a random
    order); with equal probabilities every pair is visited exactly once.

    Args:
        seed: the run's seed.
        probability: p (n,), positive, summing to 1.
    """

    def __init__(self, seed: int, probability: np.ndarray) -> None:
        self.seed, self.probability = seed, probability
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def rows(self, start: int, stop: int) -> list[int]:
        """The places, 0 to n - 1, of visits start to stop - 1."""
        return [self._place(visit) for visit in range(start, stop)]

    def _place(self, visit: int) -> int:
        epoch, number = divmod(visit, len(self.probability))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        return int(self._order[number])

    def _draw(self, epoch: int) -> np.ndarray:
        count, rng = len(self.probability), np.random.default_rng((self.seed, epoch))
        order = rng.permutation(count)
        ends = np.cumsum(self.probability[order]) * count
        ends[-1] = count  # whatever the rounding
        points = np.arange(count) + rng.uniform(0.01, 0.99)  # off the ends, where rounding decides
        return rng.permutation(order[np.searchsorted(ends, points)])


def visit_probability(target: np.ndarray, weight: np.ndarray, sampling: str) -> np.ndarray:
    """How often each pair is visited, (n,), summing to 1.

    "uniform": all alike. "importance": in proportion to weight * max(|target - 0.5|, 0.5), the size of the pair's gradient
    at margin 0 (at least that of a plain label). Debiased labels stretch the few human-labelled pairs, whose gradients are
    large and rare under uniform sampling; visited more often, each with less weight, they add less noise to a step.
    Plain labels of equal weight are sampled uniformly either way.
    """
    size = np.ones(len(target)) if sampling == "uniform" else gradient_size(target, weight)
    return size / size.sum()


def gradient_size(target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How large each pair's gradient is at margin 0, at least that of a plain label: (n,)."""
    return weight * np.maximum(np.abs(target - 0.5), 0.5)


def alike(keys: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Every row that occurs among (n, k) integers, with the places that have it."""
    found, which = np.unique(keys, axis=0, return_inverse=True)
    return [(tuple(key), np.flatnonzero(which.reshape(-1) == k)) for k, key in enumerate(found.tolist())]


BUCKET = 7  # of the draws of buckets


class Order(Protocol):
    """An order of visits."""

    probability: np.ndarray

    def rows(self, start: int, stop: int) -> list[int]:
        """The places of visits start to stop - 1."""
        ...


class BucketedPairSampler:
    """All visits of one step are of pairs of one bucket, whose images have one shape.

    Which bucket a step takes is drawn for each step anew, with the probability of all its pairs together.

    Args:
        seed: the run's seed.
        buckets: for each bucket, the places of its pairs.
        orders: for each bucket, the order of visits within it.
        share: for each bucket, the share of steps that take it, summing to 1.
        together: visits in a step.

    Attributes:
        probability: of being visited, for every place, summing to 1.
    """

    def __init__(self, seed: int, buckets: Sequence[np.ndarray], orders: Sequence[Order], share: np.ndarray, together: int) -> None:
        self.buckets, self.orders, self.together = buckets, orders, together
        self.probability = np.empty(sum(len(bucket) for bucket in buckets))
        for bucket, order, part in zip(buckets, orders, share, strict=True):
            self.probability[bucket] = part * order.probability
        self.seed, self._ends = seed, np.cumsum(share)
        self._taken: list[int] = []  # the bucket of every step so far
        self._before: list[int] = []  # how many steps before took the same
        self._count = [0] * len(buckets)

    def bucket(self, step: int) -> int:
        """The bucket that a step takes."""
        for new in range(len(self._taken), step + 1):
            point = np.random.default_rng((self.seed, new, BUCKET)).uniform(0, self._ends[-1])
            taken = int(np.searchsorted(self._ends, point, side="right"))
            self._taken.append(taken)
            self._before.append(self._count[taken])
            self._count[taken] += 1
        return self._taken[step]

    def rows(self, start: int, stop: int) -> list[int]:
        """The places of visits start to stop - 1, which lie in one step."""
        step, first = divmod(start, self.together)
        taken = self.bucket(step)
        number = self._before[step] * self.together + first
        return [int(self.buckets[taken][place]) for place in self.orders[taken].rows(number, number + stop - start)]
