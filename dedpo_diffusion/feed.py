"""From a pair dataset and its targets to the batches of a step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cache import PairCache, cache_folder, fill, read_index
from .console import Progress, UserError, say
from .decoding import decode_image
from .files import atomic_file
from .following import LEAST_POWER, Parts, followed, retarget, visited_pairs
from .images import pair_views
from .labels import read_targets
from .models import Backbone
from .noising import Draws, TimestepDraw, draw, step_generator
from .pairs import PairReader
from .records import Conditioning, Pair, PairBatch, Targets
from .runs import first_difference
from .settings import DataSettings
from .visits import StratifiedVisits, Visits, visit_probability

VIEWS = 1  # stream of `step_generator` for flips and crops
CHOICE = 1001  # for which of a pair's pre-drawn noises a visit gets
GRID = 1002  # for the pre-drawn noises


@dataclass(frozen=True)
class Encoded:
    """Encoded pairs: posterior `mean` and `std` (B, 2, C, h, w), and what the UNet is conditioned on."""

    mean: Tensor
    std: Tensor
    conditioning: Conditioning


class Source(Protocol):
    """Where encoded pairs come from."""

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """Encode the pairs at these dataset rows, each in the view that its visit's number picks.

        `drop_caption` (B,) bool replaces prompts by the absent one.
        """
        ...


class CachedSource:
    """Encoded pairs from a filled cache."""

    def __init__(self, cache: PairCache) -> None:
        self.cache = cache

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """See `Source`."""
        views = [step_generator(0, visit, VIEWS).initial_seed() % self.cache.views for visit in visits]
        mean, std, sizes = zip(*(self.cache.posterior(row, view) for row, view in zip(rows, views, strict=True)), strict=True)
        text = [self.cache.embedding(row, empty=bool(drop)) for row, drop in zip(rows, drop_caption, strict=True)]
        conditioning = replace(Conditioning.stack(text), sizes=torch.stack(sizes))
        return Encoded(torch.stack(mean), torch.stack(std), conditioning)


class LiveSource:
    """Pairs decoded and encoded in every step, mirrored and cropped anew at every visit."""

    def __init__(self, reader: PairReader, model: Backbone, data: DataSettings, *, size: int, seed: int) -> None:
        self.reader, self.model, self.data, self.size, self.seed = reader, model, data, size, seed

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """See `Source`."""
        pairs = [self.reader.pair(row) for row in rows]
        pixels, sizes = zip(*(self._view(pair, row, visit) for pair, row, visit in zip(pairs, rows, visits, strict=True)), strict=True)
        mean, std = self.model.encode_images(torch.stack(pixels).flatten(0, 1))
        prompts = [None if drop else pair.prompt for pair, drop in zip(pairs, drop_caption, strict=True)]
        conditioning = replace(self.model.encode_prompts(prompts), sizes=torch.stack(sizes))
        return Encoded(mean.unflatten(0, (-1, 2)), std.unflatten(0, (-1, 2)), conditioning)

    def _view(self, pair: Pair, row: int, visit: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.seed, visit, VIEWS)
        return view_pair(pair, self.reader.location(row), self.size, self.data, generator)


def view_pair(
    pair: Pair, where: str, size: int, data: DataSettings, generator: torch.Generator, *, mirrored: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Decode one pair, found at `where`, mirrored and cropped as the settings say: pixels (2, 3, size, size) and sizes (2, 6).

    `mirrored` decides what is otherwise drawn.

    Raises:
        UserError: an image cannot be decoded.
    """
    across, down, mirror = torch.rand(3, generator=generator).tolist()
    place = (across, down) if data.crop == "random" else (0.5, 0.5)
    return pair_views(decode_pair(pair, where), size, place=place, flip=data.flip and (mirror < 0.5 if mirrored is None else mirrored))


def decode_pair(pair: Pair, where: str) -> tuple[Image.Image, Image.Image]:
    """Both RGB images of a pair, found at `where`. Raises UserError for one that cannot be decoded."""
    return decode_image(pair.image_0, f"{where}, image_0"), decode_image(pair.image_1, f"{where}, image_1")


class ReferenceGrid:
    """A fixed set of draws for every pair, with the reference's errors at them, kept beside the cache and shared by all runs on it.

    Args:
        folder: of the cache; the grid gets a folder of its own there, by what it depends on.
        source: encoded pairs.
        model: the model, whose reference is its base.
        pairs: pairs of the dataset.
        rows: those that will be visited; only their shards are computed, with progress, and only once.
        draws: K, draws of each pair.
        timesteps: how they are drawn.
        shape: (C, h, w) of a latent.
        caption_dropout: share of draws with the empty prompt.
        batch: draws predicted at once.
    """

    SHARD = 64

    def __init__(
        self, folder: Path, source: Source, model: Backbone, rows: np.ndarray, *, pairs: int, draws: int,
        timesteps: TimestepDraw, shape: tuple[int, int, int], caption_dropout: float, batch: int = 8,
    ) -> None:  # fmt: skip
        if draws < 1:
            raise UserError(f"data.reference_draws is {draws}; it must be at least 1")
        drawn = {name: getattr(timesteps, name) for name in ("first", "last", "sampling", "location", "spread")}
        precision = [str(model.dtype), str(next(model.unet.parameters()).dtype)]
        key = json.dumps([model.reference_fingerprint(), precision, drawn, draws, list(shape), caption_dropout], sort_keys=True)
        self.draws, self.timesteps, self.shape, self.caption_dropout, self.batch = draws, timesteps, shape, caption_dropout, batch
        self.folder = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.folder.mkdir(exist_ok=True)
        shards = np.unique(rows // self.SHARD)
        missing = [shard for shard in shards if not self._file(shard).is_file()]
        if missing:
            with Progress("reference errors", len(missing) * self.SHARD) as progress:
                for shard in missing:
                    first = int(shard) * self.SHARD
                    errors = torch.stack([self._errors(row, source, model) for row in range(first, min(first + self.SHARD, pairs))])
                    with atomic_file(self._file(shard)) as temporary:
                        save_file({"errors": errors}, temporary)
                    progress.advance(self.SHARD)
        self.errors = torch.full((pairs, draws, 2), torch.nan)
        for shard in shards:
            self.errors[int(shard) * self.SHARD : (int(shard) + 1) * self.SHARD] = load_file(self._file(shard))["errors"]

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{int(shard):05d}.safetensors"

    def _draw(self, row: int, number: int) -> Draws:
        return draw(row, number, 1, self.shape, timesteps=self.timesteps, caption_dropout=self.caption_dropout, stream=GRID)

    def _errors(self, row: int, source: Source, model: Backbone) -> Tensor:
        """The reference's errors at the draws of one pair, (K, 2), a batch of draws at a time."""
        found = []
        for first in range(0, self.draws, self.batch):
            numbers = range(first, min(first + self.batch, self.draws))
            part = Draws.join([self._draw(row, number) for number in numbers])
            encoded = source.fetch([row] * len(numbers), numbers, part.drop_caption)
            part, given = part.to(model.device), encoded.conditioning.to(model.device)
            latents = model.latents(encoded.mean.to(model.device), encoded.std.to(model.device), part.posterior)
            found.append(model.errors(latents, part.noise[:, None], part.timesteps, given, reference=True).cpu())
        return torch.cat(found)

    def at(self, rows: Sequence[int], numbers: Sequence[int]) -> tuple[Draws, Tensor]:
        """The draws with these numbers of these pairs, and the reference's errors (B, 2) at them."""
        draws = Draws.join([self._draw(row, number) for row, number in zip(rows, numbers, strict=True)])
        return draws, self.errors[list(rows), list(numbers)]


def cache_identity(model: Backbone, data: DataSettings, *, pairs: str, size: int) -> dict[str, Any]:
    """What a cache depends on; `pairs` is the dataset's fingerprint.

    Raises:
        UserError: views that cannot be cached.
    """
    if data.views < 1:
        raise UserError(f"data.views is {data.views}; it must be at least 1")
    varied = data.flip or data.crop != "centre"
    if varied and data.views == 1:
        raise UserError("data.flip and data.crop=random need data.views of 2 or more with a cache, or no data.cache, which draws them anew")
    if data.views > 2 and data.crop == "centre" and data.flip:
        raise UserError(
            f"data.views is {data.views}, but data.flip alone makes two versions of a pair; give 2, or data.crop=random with it"
        )
    if not varied and data.views > 1:
        raise UserError("data.views keeps several mirrored or cropped versions of each pair; give data.flip or data.crop=random with it")
    return {
        "encoders": model.encoders_fingerprint, "pairs": pairs, "size": size, "views": data.views, "flip": data.flip, "crop": data.crop,
    }  # fmt: skip


def open_cache(reader: PairReader, model: Backbone, data: DataSettings, *, root: Path, fingerprint: str, size: int) -> PairCache:
    """The filled cache of this dataset under this model's encoders and these views, filled now if need be, with progress."""
    identity = cache_identity(model, data, pairs=fingerprint, size=size)
    folder = cache_folder(root, identity)
    if read_index(folder) is None:
        for other in sorted(root.glob("*/index.json")):
            held = (read_index(other.parent) or {}).get("identity", {})
            if held.get("pairs") == fingerprint:
                say(f"{other.parent} does not fit ({first_difference(held, identity)})")
        starts = [sum(reader.counts[:k]) for k in range(len(reader.counts))]

        def views(shard: int) -> Iterator[tuple[Tensor, Tensor]]:
            for row, pair in enumerate(reader.shard_pairs(shard), starts[shard]):
                for view in range(data.views):
                    generator, where = step_generator(row, view, VIEWS), reader.location(row)
                    yield view_pair(pair, where, size, data, generator, mirrored=view % 2 == 1)  # half of them, whatever their number

        with Progress("encoding pairs", len(reader) * data.views) as progress:
            fill(
                folder, identity=identity, prompts=reader.prompts(), shards=reader.counts, read_shard=views,
                encode_images=model.encode_images, encode_prompts=model.encode_prompts, advance=progress.advance, locate=reader.location,
            )  # fmt: skip
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
        sampling: "uniform" or "importance", see `visit_probability`; "stratified", see `StratifiedVisits`.
        follow: the power will change: pairs that weigh nothing at the present one are visited too, see `visited_pairs`.

    Attributes:
        rows: the dataset's rows that are visited.
        grid: pre-drawn timesteps and noises with the reference's errors, if there are any.
        parts, power: what the rows' targets are made of, and the power they were merged with, for one that follows; else None and NaN.

    Raises:
        UserError: targets that are not this dataset's or lack a column, or no pair that carries weight.
    """

    def __init__(self, reader: PairReader, source: Source, *, targets: str, seed: int, sampling: str, follow: bool = False) -> None:
        merged, path = read_targets(reader.folder, targets), reader.folder / "targets" / f"{targets}.parquet"
        if not reader.has_ids(merged.pair_id):
            reader.ids()  # which tells of one that comes twice
            raise UserError(f"{path}: its pairs are not the dataset's; run `dedpo merge` again")
        self.rows = np.flatnonzero(visited_pairs(merged, path, follow=follow))
        if not len(self.rows):
            raise UserError(f"{path}: no pair carries any weight, so there is nothing to learn")
        self.parts: Parts | None
        self.parts, self.power = followed(merged, path, self.rows) if follow else (None, math.nan)
        target, weight, pool = merged.target[self.rows], merged.weight[self.rows], len(merged.weight)
        planned = (target, weight) if self.parts is None else _planned(self.parts, max(self.power, LEAST_POWER))
        self.source, self.seed = source, seed
        self.grid: ReferenceGrid | None = None
        self.visits: Visits | StratifiedVisits
        if sampling == "stratified":
            self.visits = StratifiedVisits(seed, *planned, _labelled(merged, path)[self.rows])
        else:
            self.visits = Visits(seed, visit_probability(*planned, sampling))
        visit = 1 / (pool * self.visits.probability)
        self.target = torch.tensor(target, dtype=torch.float32)
        self.weight = torch.tensor(weight * visit, dtype=torch.float32)
        self.doubt = None if merged.doubt is None else torch.tensor(merged.doubt[self.rows], dtype=torch.float32)
        if self.parts is not None:
            self.parts = replace(self.parts, visit=self.parts.visit * torch.tensor(visit))
        idle = pool - len(self.rows)
        if idle:
            say(f"{idle} of {pool} pairs carry no weight in {targets!r} and are not visited")

    def pin(self, first_visit: int, draws: Draws) -> tuple[Draws, Tensor | None]:
        """The draws of consecutive visits and the reference's errors (B, 2) at them; with a grid, those that were drawn beforehand."""
        if self.grid is None:
            return draws, None
        visits = range(first_visit, first_visit + len(draws.timesteps))
        rows = [int(self.rows[place]) for place in self.places(first_visit, len(visits))]
        return self.grid.at(rows, self._numbers(visits))

    def _numbers(self, visits: Sequence[int]) -> Sequence[int]:
        """What picks each visit's view: its own number, or that of its pre-drawn noise, whose reference errors are of that view."""
        if self.grid is None:
            return visits
        return [int(step_generator(self.seed, visit, CHOICE).initial_seed()) % self.grid.draws for visit in visits]

    def batch(self, first_visit: int, draws: Draws, model: Backbone, reference_errors: Tensor | None = None) -> PairBatch:
        """The batch of consecutive visits that begins at `first_visit`, as many as `draws` holds, on the model's device."""
        visits = range(first_visit, first_visit + len(draws.timesteps))
        places = self.places(first_visit, len(visits))
        encoded = self.source.fetch([int(self.rows[place]) for place in places], self._numbers(visits), draws.drop_caption)
        device = model.device
        latents = model.latents(encoded.mean.to(device), encoded.std.to(device), draws.posterior.to(device))
        target, weight = self.target[places].to(device), self.weight[places].to(device)
        doubt = None if self.doubt is None else self.doubt[places].to(device)
        known = None if reference_errors is None else reference_errors.to(device)
        return PairBatch(latents, encoded.conditioning.to(device), target, weight, doubt, known)

    def places(self, first_visit: int, count: int) -> list[int]:
        """Which of the visited pairs, as places in `rows`, consecutive visits are of."""
        return self.visits.rows(first_visit, first_visit + count)


def _labelled(merged: Targets, path: Path) -> np.ndarray:
    if merged.human is None:
        raise UserError(f"{path} does not say which pairs people labelled, which data.sampling=stratified needs; run `dedpo merge` again")
    return ~np.isnan(merged.human)


def _planned(parts: Parts, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights at a power that visits are planned for."""
    target, weight = retarget(parts.human, parts.judge, parts.inverse, power)
    return target.numpy(), weight.numpy()
