"""From a pair dataset and its targets to the batches of a step.

Which pair is visited when is a function of (seed, visit number) alone; nothing has to be stored to resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .cache import PairCache, cache_folder, fill
from .console import Progress, UserError, say
from .decoding import decode_image
from .images import pair_pixels
from .labels import read_targets
from .models import Backbone
from .noising import Draws, step_generator
from .pairs import PairReader
from .records import Conditioning, Pair, PairBatch
from .settings import DataSettings

VIEWS = 1  # stream of `step_generator` for flips and crops


class Visits:
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
    size = np.ones(len(target)) if sampling == "uniform" else weight * np.maximum(np.abs(target - 0.5), 0.5)
    return size / size.sum()


@dataclass(frozen=True)
class Encoded:
    """Encoded pairs: posterior `mean` and `std` (B, 2, C, h, w), `text` (B, L, D)."""

    mean: Tensor
    std: Tensor
    text: Tensor


class Source(Protocol):
    """Where encoded pairs come from."""

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """Encode the pairs at these dataset rows; `drop_caption` (B,) bool replaces prompts by the empty one."""
        ...


class CachedSource:
    """Encoded pairs from a filled cache."""

    def __init__(self, cache: PairCache) -> None:
        self.cache = cache

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """See `Source`."""
        mean, std = zip(*(self.cache.posterior(row) for row in rows), strict=True)
        text = [self.cache.embedding(row, empty=bool(drop)) for row, drop in zip(rows, drop_caption, strict=True)]
        return Encoded(torch.stack(mean), torch.stack(std), torch.stack(text))


class LiveSource:
    """Pairs decoded and encoded in every step, mirrored and cropped anew at every visit."""

    def __init__(self, reader: PairReader, model: Backbone, data: DataSettings, *, size: int, seed: int) -> None:
        self.reader, self.model, self.data, self.size, self.seed = reader, model, data, size, seed

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """See `Source`."""
        pairs = [self.reader.pair(row) for row in rows]
        pixels = torch.stack([self._view(pair, row, visit) for pair, row, visit in zip(pairs, rows, visits, strict=True)])
        mean, std = self.model.encode_images(pixels.flatten(0, 1))
        prompts = ["" if drop else pair.prompt for pair, drop in zip(pairs, drop_caption, strict=True)]
        return Encoded(mean.unflatten(0, (-1, 2)), std.unflatten(0, (-1, 2)), self.model.encode_prompts(prompts))

    def _view(self, pair: Pair, row: int, visit: int) -> Tensor:
        across, down, mirror = torch.rand(3, generator=step_generator(self.seed, visit, VIEWS)).tolist()
        place = (across, down) if self.data.crop == "random" else (0.5, 0.5)
        return decode_pair(pair, self.reader.location(row), self.size, place=place, flip=self.data.flip and mirror < 0.5)


def decode_pair(pair: Pair, where: str, size: int, *, place: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Tensor:
    """Decode one pair, found at `where`, to (2, 3, size, size). Raises UserError for an image that cannot be decoded."""
    images = decode_image(pair.image_0, f"{where}, image_0"), decode_image(pair.image_1, f"{where}, image_1")
    return pair_pixels(images, size, place=place, flip=flip)


def open_cache(reader: PairReader, model: Backbone, *, root: Path, fingerprint: str, size: int) -> PairCache:
    """The filled cache of this dataset under this model's encoders, filled now if need be, with progress."""
    folder = cache_folder(root, encoders=model.encoders_fingerprint, pairs=fingerprint, size=size)
    if not (folder / "index.json").is_file():
        counts = reader.counts
        starts = [sum(counts[:k]) for k in range(len(counts))]
        with Progress("encoding pairs", len(reader)) as progress:
            fill(
                folder,
                prompts=reader.prompts(),
                shards=counts,
                read_shard=lambda k: (
                    decode_pair(pair, reader.location(starts[k] + row), size) for row, pair in enumerate(reader.shard_pairs(k))
                ),
                encode_images=model.encode_images,
                encode_prompts=model.encode_prompts,
                advance=progress.advance,
            )
    return PairCache(folder)


class Feed:
    """Batches of weighted pairs.

    Pairs of weight 0 are never visited. The others are visited with probability p and weighted by 1 / (N p), N being
    all pairs of the pool, so that the mean over visits estimates the mean over the pool without bias.

    Args:
        reader: the pair dataset.
        source: where encoded pairs come from.
        targets: name of the targets in the dataset's folder.
        seed: the run's seed.
        sampling: see `visit_probability`.

    Raises:
        UserError: targets that are not this dataset's, or no pair that carries weight.
    """

    def __init__(self, reader: PairReader, source: Source, *, targets: str, seed: int, sampling: str) -> None:
        merged = read_targets(reader.folder, targets)
        if merged.pair_id != reader.ids():
            raise UserError(f"{reader.folder}/targets/{targets}.parquet: its pairs are not the dataset's; run `dedpo merge` again")
        self.rows = np.flatnonzero(merged.weight)
        if not len(self.rows):
            raise UserError(f"{reader.folder}/targets/{targets}.parquet: no pair carries any weight, so there is nothing to learn")
        target, weight = merged.target[self.rows], merged.weight[self.rows]
        probability = visit_probability(target, weight, sampling)
        self.target = torch.tensor(target, dtype=torch.float32)
        self.weight = torch.tensor(weight / (len(merged.weight) * probability), dtype=torch.float32)
        self.source, self.visits = source, Visits(seed, probability)
        idle = len(merged.weight) - len(self.rows)
        if idle:
            say(f"{idle} of {len(merged.weight)} pairs carry no weight in {targets!r} and are not visited")

    def batch(self, first_visit: int, draws: Draws, model: Backbone) -> PairBatch:
        """The batch of consecutive visits that begins at `first_visit`, as many as `draws` holds, on the model's device."""
        visits = range(first_visit, first_visit + len(draws.timesteps))
        places = self.visits.rows(visits.start, visits.stop)
        encoded = self.source.fetch([int(self.rows[place]) for place in places], visits, draws.drop_caption)
        device = model.device
        latents = model.latents(encoded.mean.to(device), encoded.std.to(device), draws.posterior.to(device))
        target, weight = self.target[places].to(device), self.weight[places].to(device)
        return PairBatch(latents, Conditioning(encoded.text.to(device)), target, weight)
