"""From a pair dataset and its targets to the batches of a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dedpo_diffusion.core import caches
from dedpo_diffusion.core.console import NoSpace, Progress, UserError, say
from dedpo_diffusion.core.records import Conditioning, Pair, PairBatch, Targets, Tensors
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.dpo.adaptive_power import LEAST_POWER, Parts, loss_parts, retarget, visited_pairs
from dedpo_diffusion.dpo.noising import Draws, step_generator
from dedpo_diffusion.labels.files import read_targets, targets_path
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.text_encoders import TextEncoders
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image, read_header
from dedpo_diffusion.pairs.pixels import nearest_shape, pair_views
from dedpo_diffusion.settings import DataSettings, TrainSettings
from dedpo_diffusion.training.cache import PairCache, begin_cache, cache_folder, check_version, expected_bytes, fill, read_index
from dedpo_diffusion.training.cluster_weights import cluster_factors, say_cluster_weights
from dedpo_diffusion.training.groups import Groups, group_pairs, group_sizes
from dedpo_diffusion.training.pair_sampler import BucketedPairSampler, Order, PairSampler, alike, gradient_size, visit_probability
from dedpo_diffusion.training.reference_grid import ReferenceGrid
from dedpo_diffusion.weights.run_folder import first_difference

if TYPE_CHECKING:
    from accelerate import Accelerator

VIEWS = 1  # stream of `step_generator` for flips and crops


@dataclass(frozen=True)
class Encoded(Tensors):
    """Encoded pairs: posterior `mean` and `std` (B, 2, C, h, w), and what the UNet is conditioned on; of groups of K images (B, K, ...)."""

    mean: Tensor
    std: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class Pictures(Tensors):
    """Pairs that are not encoded yet: `pixels` (B, 2, 3, H, W), `sizes` (B, 2, 6), `tokens` (B, encoders, L)."""

    pixels: Tensor
    sizes: Tensor
    tokens: Tensor


class Source(ABC):
    """Where encoded pairs come from, in two parts: `load` may run in another thread while the model computes."""

    @abstractmethod
    def load(
        self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor, images: np.ndarray | None = None
    ) -> Encoded | Pictures:
        """The pairs at these dataset rows, in host memory, each in the view that its visit's number picks.

        `drop_caption` (B,) bool replaces prompts by the absent one. `images` (B, K, 2), rows and sides, are taken in place of the two of
        each pair, whose prompt they have.
        """

    @abstractmethod
    def shapes(self, rows: np.ndarray) -> np.ndarray:
        """(C, h, w) of the latents of the pairs at dataset rows: (n, 3)."""

    @abstractmethod
    def originals(self, rows: np.ndarray) -> np.ndarray:
        """Height and width in pixels of the images of the pairs at dataset rows, as the dataset has them: (n, 2, 2)."""

    @abstractmethod
    def encode(self, loaded: Any) -> Encoded:
        """What the model's encoders make of what was loaded."""

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor, images: np.ndarray | None = None) -> Encoded:
        """Both parts, one after the other."""
        return self.encode(self.load(rows, visits, drop_caption, images))


class CachedSource(Source):
    """Encoded pairs from a filled cache.

    Args:
        cache: the cache.
        channels: C of a latent.
        words: text encoders that are adapted, and the prompt of every pair, of which they then need the tokens; None for neither.
        views: how many of the cache's are taken; None takes all.
    """

    def __init__(
        self, cache: PairCache, channels: int, *, words: tuple[TextEncoders, Sequence[str]] | None = None, views: int | None = None
    ) -> None:
        self.cache, self.channels, self.words, self.views = cache, channels, words, views or cache.views

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        found = self.cache.shapes[torch.from_numpy(rows)].numpy()
        return np.column_stack([np.full(len(rows), self.channels), found])

    def originals(self, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return self.cache.originals()[torch.from_numpy(rows)].numpy()

    def load(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor, images: np.ndarray | None = None) -> Encoded:
        """See `Source`."""
        views = [step_generator(0, visit, VIEWS).initial_seed() % self.views for visit in visits]
        if images is None:
            mean, std, sizes = zip(*(self.cache.posterior(row, view) for row, view in zip(rows, views, strict=True)), strict=True)
        else:
            mean, std, sizes = zip(*(self._group(some, view) for some, view in zip(images.tolist(), views, strict=True)), strict=True)
        text = [self.cache.embedding(row, empty=bool(drop)) for row, drop in zip(rows, drop_caption, strict=True)]
        conditioning = replace(Conditioning.stack(text), sizes=torch.stack(sizes))
        if self.words is not None:
            encoders, prompts = self.words
            said = [None if drop else prompts[row] for row, drop in zip(rows, drop_caption, strict=True)]
            conditioning = replace(conditioning, tokens=encoders.tokens(said))
        return Encoded(torch.stack(mean), torch.stack(std), conditioning)

    def _group(self, images: Sequence[tuple[int, int]], view: int) -> tuple[Tensor, ...]:
        """Mean, standard deviation and sizes of images at rows and sides, in one view."""
        there = {row: self.cache.posterior(row, view) for row, _ in images}
        return tuple(torch.stack(parts) for parts in zip(*([part[side] for part in there[row]] for row, side in images), strict=True))

    def encode(self, loaded: Encoded) -> Encoded:
        """It is encoded already."""
        return loaded


class LiveSource(Source):
    """Pairs decoded and encoded in every step, mirrored and cropped anew at every visit."""

    def __init__(self, reader: PairReader, model: Backbone, data: DataSettings, *, size: int, seed: int) -> None:
        if data.buckets:
            raise UserError("data.buckets needs data.cache, which knows the shape of every pair before the first step")
        self.reader, self.model, self.data, self.size, self.seed = reader, model, data, size, seed

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return np.tile(self.model.latent_shape(self.size), (len(rows), 1))

    def originals(self, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        found = []
        for row in rows.tolist():
            pair, where = self.reader.pair(row), self.reader.location(row)
            headers = [read_header(image, where) for image in (pair.image_0, pair.image_1)]
            found.append([(header.height, header.width) for header in headers])
        return np.array(found).reshape(-1, 2, 2)

    def load(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor, images: np.ndarray | None = None) -> Pictures:
        """See `Source`; without a cache there are no groups."""
        assert images is None
        pairs = [self.reader.pair(row) for row in rows]
        pixels, sizes = zip(*(self._view(pair, row, visit) for pair, row, visit in zip(pairs, rows, visits, strict=True)), strict=True)
        prompts = [None if drop else pair.prompt for pair, drop in zip(pairs, drop_caption, strict=True)]
        return Pictures(torch.stack(pixels), torch.stack(sizes), self.model.text.tokens(prompts))

    def encode(self, loaded: Pictures) -> Encoded:
        """See `Source`."""
        mean, std = self.model.encode_images(loaded.pixels.flatten(0, 1))
        tokens = loaded.tokens if self.model.text.adapted else None
        conditioning = replace(self.model.encode_tokens(loaded.tokens), sizes=loaded.sizes, tokens=tokens)
        return Encoded(mean.unflatten(0, (-1, 2)), std.unflatten(0, (-1, 2)), conditioning)

    def _view(self, pair: Pair, row: int, visit: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.seed, visit, VIEWS)
        return view_pair(pair, self.reader.location(row), [(self.size, self.size)], self.data, generator)


def view_pair(
    pair: Pair,
    where: str,
    shapes: Sequence[tuple[int, int]],
    data: DataSettings,
    generator: torch.Generator,
    *,
    mirrored: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode one pair, found at `where`, mirrored and cropped as the settings say: pixels (2, 3, height, width) and sizes (2, 6).

    Height and width are those of `shapes` that are nearest to the pair's; `mirrored` decides what is otherwise drawn.

    Raises:
        UserError: an image cannot be decoded.
    """
    across, down, mirror = torch.rand(3, generator=generator).tolist()
    place = (across, down) if data.crop == "random" else (0.5, 0.5)
    images = decode_pair(pair, where)
    flip = data.flip and (mirror < 0.5 if mirrored is None else mirrored)
    return pair_views(images, nearest_shape(images, shapes), place=place, flip=flip)


def decode_pair(pair: Pair, where: str) -> tuple[Image.Image, Image.Image]:
    """Both RGB images of a pair, found at `where`. Raises UserError for one that cannot be decoded."""
    return decode_image(pair.image_0, f"{where}, image_0"), decode_image(pair.image_1, f"{where}, image_1")


@dataclass(frozen=True)
class Loaded(Tensors):
    """B consecutive visits before the model sees them.

    `places` of the visited pairs, `draws`, `encoded` as the source loads it, `target` and `weight` (B,), `known`: the reference's
    errors (B, 2), if they are, `labelled` (B,) bool. Of B groups of K images and P pairs each: `places`, `target`, `weight` and `labelled`
    are of their B P pairs, `known` is (B, K); `members` and `there` as in `PairBatch`.
    """

    places: list[int]
    draws: Draws
    encoded: Encoded | Pictures
    target: Tensor
    weight: Tensor
    known: Tensor | None
    labelled: Tensor | None
    members: Tensor | None = None
    there: Tensor | None = None


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
        "buckets": model.shapes(size) if data.buckets else None,
    }  # fmt: skip


def open_cache(
    reader: PairReader, model: Backbone, data: DataSettings, *, root: Path, fingerprint: str, size: int, optional: bool = False
) -> PairCache:
    """The filled cache of this dataset under this model's encoders and these views, filled now if need be, with progress.

    It is in use until this process ends, or `core.caches.release`.

    Raises:
        UserError: another version made it, or pairs that cannot be encoded.
        NoSpace: the disk is full, or too full for an `optional` one.
    """
    identity = cache_identity(model, data, pairs=fingerprint, size=size)
    folder = cache_folder(root, identity)
    caches.take_up(folder)
    check_version(folder)
    if read_index(folder) is None:
        texts, shape = len(set(reader.prompts())) + 1, model.latent_shape(size)
        wanted = expected_bytes(len(reader) * data.views, shape, texts, model.encode_prompts([None]))
        begin_cache(folder, wanted, {"pairs": str(reader.folder.resolve()), "model": model.name}, optional=optional)
        for other in sorted(root.glob("*/index.json")):
            held = (read_index(other.parent) or {}).get("identity", {})
            if held.get("pairs") == fingerprint:
                differs = first_difference(held, identity)
                say(f"{other.parent} " + (f"does not fit ({differs})" if differs else "was made by another version; it is made anew"))
        shapes = model.shapes(size) if data.buckets else [(size, size)]
        starts = [sum(reader.counts[:k]) for k in range(len(reader.counts))]

        def views(shard: int) -> Iterator[tuple[Tensor, Tensor]]:
            for row, pair in enumerate(reader.shard_pairs(shard), starts[shard]):
                for view in range(data.views):
                    generator, where = step_generator(row, view, VIEWS), reader.location(row)
                    yield view_pair(pair, where, shapes, data, generator, mirrored=view % 2 == 1)  # half of them, whatever their number

        with Progress("encoding pairs", len(reader) * data.views) as progress:
            fill(
                folder, identity=identity, prompts=reader.prompts(), shards=reader.counts, read_shard=views,
                encode_images=model.encode_images, encode_prompts=model.encode_prompts, advance=progress.advance, locate=reader.location,
            )  # fmt: skip
        say(f"{folder} holds {size_words(caches.bytes_in(folder))}")
    return PairCache(folder)


class PairLoader:
    """Batches of weighted pairs.

    Pairs of weight 0 are never visited. The others are visited with probability p and weighted by 1 / (N p), N being
    all pairs of the pool, so that the mean over visits estimates the mean over the pool without bias. With groups a visit is of a group,
    and its pairs have their group's probability.

    Args:
        reader: the pair dataset.
        source: where encoded pairs come from.
        targets: name of the targets in the dataset's folder.
        seed: the run's seed.
        together: visits in a step, over all its micro-batches and processes; they are of one shape.
        sampling: "uniform" or "importance", see `visit_probability`.
        adaptive: the power will change: pairs that weigh nothing at the present one are visited too, see `visited_pairs`.
        merged: targets to take in place of those in the file; the visits that follow from them can change again, see `retarget`.
        grouped: numbers (N, 2) of the dataset's images, and how many of them make a group at most, see `group_pairs`; None visits pairs.
        cluster_weights: what prompts of many pairs count, see `training.cluster_weights`; not with a power that changes.

    Attributes:
        rows: the dataset's rows that are visited.
        groups: what is visited in place of single pairs, if it is.
        shapes: (C, h, w) of the latents of each bucket, and how many images its visits have; a single one without buckets and groups.
        grid: pre-drawn timesteps and noises with the reference's errors, if there are any.
        merged: target and weight (n,) float64 of the rows as they were merged, without the visits' part in the weights.
        labelled: (n,) bool, which of the rows people labelled, None where the targets do not say.
        parts, power: what the rows' targets are made of, and the power they were merged with, for one that follows; else None and NaN.

    Raises:
        UserError: targets that are not this dataset's or lack a column, or no pair that carries weight.
    """

    def __init__(
        self, reader: PairReader, source: Source, *, targets: str, seed: int, sampling: str, together: int, adaptive: bool = False,
        merged: Targets | None = None, grouped: tuple[np.ndarray, int] | None = None, cluster_weights: str = "none",
    ) -> None:  # fmt: skip
        path = targets_path(reader.folder, targets)
        merged = read_targets(reader.folder, targets) if merged is None else merged
        if not reader.has_ids(merged.pair_id):
            reader.ids()  # which tells of one that comes twice
            raise UserError(f"{path}: its pairs are not the dataset's; run `dedpo merge` again")
        self.source, self.seed, self.sampling, self.together, self.path = source, seed, sampling, together, path
        self.grid: ReferenceGrid | None = None
        self.grouped, self.cluster_weights = grouped, cluster_weights
        self.prompts = reader.prompts() if cluster_weights != "none" else []
        self.groups: Groups | None = None
        self.retarget(merged, adaptive=adaptive)

    def retarget(self, merged: Targets, *, adaptive: bool = False) -> None:
        """Take other targets of the same pairs: which pairs are visited, how often, and what is learned from each."""
        path = self.path
        if self.cluster_weights != "none":
            factor = cluster_factors(self.prompts, self.cluster_weights, merged.weight)
            say_cluster_weights(self.prompts, self.cluster_weights, merged.weight, factor)
            merged = replace(merged, weight=merged.weight * factor)
        self.rows = np.flatnonzero(visited_pairs(merged, path, adaptive=adaptive))
        if not len(self.rows):
            raise UserError(f"{path}: no pair carries any weight, so there is nothing to learn")
        self.parts: Parts | None
        self.parts, self.power = loss_parts(merged, path, self.rows) if adaptive else (None, math.nan)
        target, weight, pool = merged.target[self.rows], merged.weight[self.rows], len(merged.weight)
        planned = (target, weight) if self.parts is None else _planned(self.parts, max(self.power, LEAST_POWER))
        if self.grouped is not None:
            images, most = self.grouped
            self.groups = group_pairs(self.rows, images[self.rows], self.source.shapes(self.rows), most)
        self.visits: Order = self._order(self._probability(*planned))
        probability = self.visits.probability if self.groups is None else self.visits.probability[self.groups.group_of]
        visit = 1 / (pool * probability)
        self.target = torch.tensor(target, dtype=torch.float32)
        self.weight = torch.tensor(weight * visit, dtype=torch.float32)
        self.merged = torch.tensor(target), torch.tensor(weight)
        self.labelled = None if merged.human is None else torch.tensor(~np.isnan(merged.human[self.rows]))
        if self.parts is not None:
            self.parts = replace(self.parts, visit=self.parts.visit * torch.tensor(visit))
        idle = pool - len(self.rows)
        if idle:
            say(f"{idle} of {pool} pairs carry no weight in {path.stem!r} and are not visited")

    def _probability(self, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Of a visit to each pair, or to each group."""
        if self.groups is None:
            return visit_probability(target, weight, self.sampling)
        size = np.ones(len(self.groups)) if self.sampling == "uniform" else group_sizes(self.groups, gradient_size(target, weight))
        return size / size.sum()

    def _order(self, probability: np.ndarray) -> Order:
        """In which order the visited pairs or groups come: those of one shape and number of images together, if there are several."""
        rows = self.rows if self.groups is None else self.groups.rows
        images = np.full(len(rows), 2) if self.groups is None else self.groups.sizes
        kinds = alike(np.column_stack([self.source.shapes(rows), images]))
        self.shapes = [((c, h, w), k) for (c, h, w, k), _ in kinds]
        self.pairs = [1 if self.groups is None else int(self.groups.counts[some].max()) for _, some in kinds]
        if len(kinds) == 1:
            return PairSampler(self.seed, probability)
        share = np.array([probability[some].sum() for _, some in kinds])
        told = [f"{len(some)} of {shape[1]} x {shape[2]}" + (f" ({shape[3]} images)" if self.groups else "") for shape, some in kinds]
        say(("pairs" if self.groups is None else "groups") + " by height x width of their latents: " + ", ".join(told))
        places = [some for _, some in kinds]
        orders = [PairSampler(self.seed, probability[some] / probability[some].sum()) for some in places]
        return BucketedPairSampler(self.seed, places, orders, share / share.sum(), self.together)

    def _bucket(self, step: int) -> int:
        return self.visits.bucket(step) if isinstance(self.visits, BucketedPairSampler) else 0

    def shape(self, step: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a step's pairs."""
        return self.shapes[self._bucket(step)][0]

    def images(self, step: int) -> int:
        """How many images each visit of a step has: 2, or those of its groups."""
        return self.shapes[self._bucket(step)][1]

    def load(self, first_visit: int, draws: Draws) -> Loaded:
        """Consecutive visits that begin at `first_visit`, as many as `draws` holds, in host memory; nothing asks for the device.

        With a grid, its draws take the place of those given.
        """
        visits = range(first_visit, first_visit + len(draws.timesteps))
        places, known = self.visits.rows(visits.start, visits.stop), None
        there = self.rows if self.groups is None else self.groups.rows
        rows, numbers = [int(there[place]) for place in places], list(visits)
        if self.grid is not None:  # the view is that of the noise, whose reference errors are of that view
            numbers = self.grid.choose(rows, visits, seed=self.seed, together=self.together)
            draws, known = self.grid.at(rows, numbers)
        if self.groups is None:
            return self.at(places, numbers, draws, known)
        return self._load_groups(self.groups, places, numbers, draws, known, self.pairs[self._bucket(first_visit // self.together)])

    def _load_groups(
        self, groups: Groups, which: list[int], numbers: Sequence[int], draws: Draws, known: Tensor | None, pairs: int
    ) -> Loaded:
        """B groups, filled up to so many pairs each; a mean over all of these is a mean over the groups."""
        found, members, there = (torch.from_numpy(part) for part in groups.padded(which, pairs))
        places, there = found.flatten().tolist(), there.flatten()
        target = torch.where(there, self.target[places], 0.5)
        weight = torch.where(there, self.weight[places] * pairs, 0.0)
        labelled = None if self.labelled is None else self.labelled[places]
        images = np.stack([groups.images_of(group) for group in which])
        encoded = self.source.load(groups.rows[which].tolist(), numbers, draws.drop_caption, images)
        return Loaded(places, draws, encoded, target, weight, known, labelled, members, there)

    def at(self, places: list[int], numbers: Sequence[int], draws: Draws, known: Tensor | None = None) -> Loaded:
        """B visited pairs by their places, each in the view that its number picks, at these draws."""
        labelled = None if self.labelled is None else self.labelled[places]
        encoded = self.source.load([int(self.rows[place]) for place in places], numbers, draws.drop_caption)
        return Loaded(places, draws, encoded, self.target[places], self.weight[places], known, labelled)

    def batch(self, loaded: Loaded, model: Backbone) -> tuple[PairBatch, Draws]:
        """The batch of what was loaded, and its draws, on the model's device."""
        given = loaded.map(lambda value: value.to(model.device, non_blocking=True))
        encoded = self.source.encode(given.encoded)
        latents = model.latents(encoded.mean, encoded.std, given.draws.posterior)
        pairs = {"members": given.members, "there": given.there}
        batch = PairBatch(latents, encoded.conditioning, given.target, given.weight, given.known, given.labelled, **pairs)
        return batch, given.draws


def _planned(parts: Parts, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights at a power that visits are planned for."""
    target, weight = retarget(parts.human, parts.judge, parts.inverse, power)
    return target.numpy(), weight.numpy()


def open_source(
    settings: TrainSettings, reader: PairReader, model: Backbone, data: DataSettings, accelerator: Accelerator, *, fingerprint: str,
    size: int, views: int | None = None, optional: bool = False,
) -> Source:  # fmt: skip
    """Where encoded pairs of a dataset come from: the run's cache, filled by the main process if need be, or the encoders.

    Args:
        settings: of the run, which say whether there is a cache and whether tokens are needed.
        reader, fingerprint: the dataset.
        model: whose encoders encode.
        data: how pairs are cropped and mirrored.
        accelerator: of the run.
        size: pixels of a side.
        views: how many of a cache's are taken; None takes all.
        optional: where the disk is too full for a cache, go on without one.
    """
    root, live = settings.data.cache, partial(LiveSource, reader, model, data, size=size, seed=settings.seed)
    if not isinstance(root, Path):
        return live()
    with accelerator.main_process_first():
        folder = cache_folder(root, cache_identity(model, data, pairs=fingerprint, size=size))
        if optional and not accelerator.is_main_process and read_index(folder) is None:
            return live()  # as the main process does
        try:
            cache = open_cache(reader, model, data, root=root, fingerprint=fingerprint, size=size, optional=optional)
        except NoSpace:
            if not optional:
                raise
            say(f"{root} has no room for a cache of these pairs; they are encoded at every visit (data.cache FOLDER puts it elsewhere)")
            caches.release()
            with suppress(UserError):  # another run is filling it
                caches.remove(folder)
            return live()
    words = (model.text, reader.prompts()) if settings.lora.text_encoders else None
    return CachedSource(cache, model.channels, words=words, views=views)
