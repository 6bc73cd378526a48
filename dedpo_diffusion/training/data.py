"""From a pair dataset and its targets to the batches of a step."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.core.files import atomic_file, remove_leftovers
from dedpo_diffusion.core.records import Conditioning, Pair, PairBatch, Targets, Tensors
from dedpo_diffusion.dpo.adaptive_power import LEAST_POWER, Parts, loss_parts, retarget, visited_pairs
from dedpo_diffusion.dpo.noising import Draws, TimestepDraw, draw, step_generator
from dedpo_diffusion.labels.files import read_targets, targets_path
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.text_encoders import TextEncoders
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image, read_header
from dedpo_diffusion.pairs.pixels import nearest_shape, pair_views
from dedpo_diffusion.settings import DataSettings, TrainSettings
from dedpo_diffusion.training.cache import PairCache, cache_folder, fill, read_index
from dedpo_diffusion.training.pair_sampler import BucketedPairSampler, Order, PairSampler, visit_probability
from dedpo_diffusion.weights.run_folder import first_difference

if TYPE_CHECKING:
    from accelerate import Accelerator

VIEWS = 1  # stream of `step_generator` for flips and crops
CHOICE = 1001  # for which of a pair's pre-drawn noises a visit gets
GRID = 1002  # for the pre-drawn noises
GRID_TIMESTEPS = 1007  # for the pre-drawn timesteps of a pair, where they are drawn in strata


@dataclass(frozen=True)
class Encoded(Tensors):
    """Encoded pairs: posterior `mean` and `std` (B, 2, C, h, w), and what the UNet is conditioned on."""

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
    def load(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded | Pictures:
        """The pairs at these dataset rows, in host memory, each in the view that its visit's number picks.

        `drop_caption` (B,) bool replaces prompts by the absent one.
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

    def fetch(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """Both parts, one after the other."""
        return self.encode(self.load(rows, visits, drop_caption))


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

    def load(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Encoded:
        """See `Source`."""
        views = [step_generator(0, visit, VIEWS).initial_seed() % self.views for visit in visits]
        mean, std, sizes = zip(*(self.cache.posterior(row, view) for row, view in zip(rows, views, strict=True)), strict=True)
        text = [self.cache.embedding(row, empty=bool(drop)) for row, drop in zip(rows, drop_caption, strict=True)]
        conditioning = replace(Conditioning.stack(text), sizes=torch.stack(sizes))
        if self.words is not None:
            encoders, prompts = self.words
            said = [None if drop else prompts[row] for row, drop in zip(rows, drop_caption, strict=True)]
            conditioning = replace(conditioning, tokens=encoders.tokens(said))
        return Encoded(torch.stack(mean), torch.stack(std), conditioning)

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

    def load(self, rows: Sequence[int], visits: Sequence[int], drop_caption: Tensor) -> Pictures:
        """See `Source`."""
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


class ReferenceGrid:
    """A fixed set of draws for every pair, with the reference's errors at them, kept beside the cache and shared by all runs on it
    that compute alike.

    With timesteps in strata each of a pair's K draws has its timestep in another K-th of their distribution, in an order of the pair's
    own, and the visits of a step take draws from each K-th as evenly as they can.

    Args:
        folder: of the cache; the grid gets a folder of its own there, by what it depends on.
        source: encoded pairs.
        model: the model, whose reference is its base.
        pairs: pairs of the dataset.
        rows: those that will be visited; only their shards are computed, with progress, and only once.
        draws: K, draws of each pair.
        timesteps: how they are drawn.
        caption_dropout: share of draws with the empty prompt.
        batch: draws predicted at once: the pairs of a forward pass of the run, so that both round alike.
        kernels: what else the errors' rounding depends on.
    """

    SHARD = 64

    def __init__(
        self, folder: Path, source: Source, model: Backbone, rows: np.ndarray, *, pairs: int, draws: int,
        timesteps: TimestepDraw, caption_dropout: float, batch: int = 8, kernels: Sequence[object] = (),
    ) -> None:  # fmt: skip
        if draws < 1:
            raise UserError(f"data.reference_draws is {draws}; it must be at least 1")
        drawn = {name: getattr(timesteps, name) for name in ("first", "last", "sampling", "location", "spread")}
        drawn |= {"strata": True} if timesteps.strata else {}
        precision = [str(model.dtype), str(next(model.unet.parameters()).dtype)]
        rounding = [batch, model.device.type, *kernels]
        key = json.dumps([model.reference_fingerprint(), precision, drawn, draws, caption_dropout, rounding], sort_keys=True)
        self.draws, self.timesteps, self.source, self.caption_dropout, self.batch = draws, timesteps, source, caption_dropout, batch
        self.folder = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        shards = np.unique(rows // self.SHARD)
        missing = [shard for shard in shards if not self._file(shard).is_file()]
        if missing:
            with Progress("reference errors", len(missing) * self.SHARD) as progress:
                for shard in missing:
                    there = range(int(shard) * self.SHARD, min((int(shard) + 1) * self.SHARD, pairs))
                    errors = torch.empty(len(there), draws, 2)
                    for _, some in _alike(source.shapes(np.array(there))):
                        found = self._errors([(there[place], number) for place in some for number in range(draws)], model)
                        errors[some] = found.view(len(some), draws, 2)
                    with atomic_file(self._file(shard)) as temporary:
                        save_file({"errors": errors}, temporary)
                    progress.advance(self.SHARD)
        self.errors = torch.full((pairs, draws, 2), torch.nan)
        for shard in shards:
            self.errors[int(shard) * self.SHARD : (int(shard) + 1) * self.SHARD] = load_file(self._file(shard))["errors"]

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{int(shard):05d}.safetensors"

    def _draw(self, row: int, number: int) -> Draws:
        shape = self.source.shapes(np.array([row]))[0].tolist()
        drawn = draw(row, number, 1, shape, timesteps=self.timesteps, caption_dropout=self.caption_dropout, stream=GRID)
        return replace(drawn, timesteps=self._strata(row)[number : number + 1]) if self.timesteps.strata else drawn

    def _strata(self, row: int) -> Tensor:
        """The timesteps (K,) of a pair's draws, one in each K-th of their distribution."""
        return self.timesteps.draw(self.draws, step_generator(row, 0, GRID_TIMESTEPS))

    def choose(self, rows: Sequence[int], visits: Sequence[int], *, seed: int, together: int) -> list[int]:
        """Which draw each visit of a pair takes, each of the K equally often on average; `together` visits make a step."""
        if not self.timesteps.strata:
            return [int(step_generator(seed, visit, CHOICE).initial_seed()) % self.draws for visit in visits]
        steps = {visit // together for visit in visits}
        shares = {step: self.timesteps.shares(together, step_generator(seed, step, CHOICE)) for step in steps}
        parts = [int(self.draws * shares[visit // together][visit % together]) for visit in visits]
        # the draw that lies in a part, whose number differs from pair to pair: so no view of the pairs goes with some timesteps
        return [int(self._strata(row).argsort(stable=True)[part]) for row, part in zip(rows, parts, strict=True)]

    def _errors(self, wanted: Sequence[tuple[int, int]], model: Backbone) -> Tensor:
        """The reference's errors (N, 2) at N draws, (pair, its number), of one shape.

        `batch` are predicted at a time, so that they round as in a step of the run.
        """
        found = []
        for first in range(0, len(wanted), self.batch):
            part = wanted[first : first + self.batch]
            rows, numbers = zip(*(*part, *[part[-1]] * (self.batch - len(part))), strict=True)
            draws = Draws.join([self._draw(row, number) for row, number in zip(rows, numbers, strict=True)])
            encoded = self.source.fetch(rows, numbers, draws.drop_caption)
            draws, given = draws.to(model.device), encoded.conditioning.to(model.device)
            latents = model.latents(encoded.mean.to(model.device), encoded.std.to(model.device), draws.posterior)
            errors = model.errors(latents, draws.noise[:, None], draws.timesteps, given, reference=True)
            found.append(errors[: len(part)].cpu())
        return torch.cat(found)

    def at(self, rows: Sequence[int], numbers: Sequence[int]) -> tuple[Draws, Tensor]:
        """The draws with these numbers of these pairs, and the reference's errors (B, 2) at them."""
        draws = Draws.join([self._draw(row, number) for row, number in zip(rows, numbers, strict=True)])
        return draws, self.errors[list(rows), list(numbers)]


@dataclass(frozen=True)
class Loaded(Tensors):
    """B consecutive visits before the model sees them.

    `places` of the visited pairs, `draws`, `encoded` as the source loads it, `target` and `weight` (B,), `known`: the reference's
    errors (B, 2), if they are, `labelled` (B,) bool.
    """

    places: list[int]
    draws: Draws
    encoded: Encoded | Pictures
    target: Tensor
    weight: Tensor
    known: Tensor | None
    labelled: Tensor | None


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


def open_cache(reader: PairReader, model: Backbone, data: DataSettings, *, root: Path, fingerprint: str, size: int) -> PairCache:
    """The filled cache of this dataset under this model's encoders and these views, filled now if need be, with progress."""
    identity = cache_identity(model, data, pairs=fingerprint, size=size)
    folder = cache_folder(root, identity)
    if read_index(folder) is None:
        for other in sorted(root.glob("*/index.json")):
            held = (read_index(other.parent) or {}).get("identity", {})
            if held.get("pairs") == fingerprint:
                say(f"{other.parent} does not fit ({first_difference(held, identity)})")
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
    return PairCache(folder)


class PairLoader:
    """Batches of weighted pairs.

    Pairs of weight 0 are never visited. The others are visited with probability p and weighted by 1 / (N p), N being
    all pairs of the pool, so that the mean over visits estimates the mean over the pool without bias.

    Args:
        reader: the pair dataset.
        source: where encoded pairs come from.
        targets: name of the targets in the dataset's folder.
        seed: the run's seed.
        together: visits in a step, over all its micro-batches and processes; they are of one shape.
        sampling: "uniform" or "importance", see `visit_probability`.
        adaptive: the power will change: pairs that weigh nothing at the present one are visited too, see `visited_pairs`.
        merged: targets to take in place of those in the file; the visits that follow from them can change again, see `retarget`.

    Attributes:
        rows: the dataset's rows that are visited.
        shapes: (C, h, w) of the latents of each bucket; a single one without buckets.
        grid: pre-drawn timesteps and noises with the reference's errors, if there are any.
        merged: target and weight (n,) float64 of the rows as they were merged, without the visits' part in the weights.
        labelled: (n,) bool, which of the rows people labelled, None where the targets do not say.
        parts, power: what the rows' targets are made of, and the power they were merged with, for one that follows; else None and NaN.

    Raises:
        UserError: targets that are not this dataset's or lack a column, or no pair that carries weight.
    """

    def __init__(
        self, reader: PairReader, source: Source, *, targets: str, seed: int, sampling: str, together: int, adaptive: bool = False,
        merged: Targets | None = None,
    ) -> None:  # fmt: skip
        path = targets_path(reader.folder, targets)
        merged = read_targets(reader.folder, targets) if merged is None else merged
        if not reader.has_ids(merged.pair_id):
            reader.ids()  # which tells of one that comes twice
            raise UserError(f"{path}: its pairs are not the dataset's; run `dedpo merge` again")
        self.source, self.seed, self.sampling, self.together, self.path = source, seed, sampling, together, path
        self.grid: ReferenceGrid | None = None
        self.retarget(merged, adaptive=adaptive)

    def retarget(self, merged: Targets, *, adaptive: bool = False) -> None:
        """Take other targets of the same pairs: which pairs are visited, how often, and what is learned from each."""
        path = self.path
        self.rows = np.flatnonzero(visited_pairs(merged, path, adaptive=adaptive))
        if not len(self.rows):
            raise UserError(f"{path}: no pair carries any weight, so there is nothing to learn")
        self.parts: Parts | None
        self.parts, self.power = loss_parts(merged, path, self.rows) if adaptive else (None, math.nan)
        target, weight, pool = merged.target[self.rows], merged.weight[self.rows], len(merged.weight)
        planned = (target, weight) if self.parts is None else _planned(self.parts, max(self.power, LEAST_POWER))
        self.visits: Order = self._order(visit_probability(*planned, self.sampling))
        visit = 1 / (pool * self.visits.probability)
        self.target = torch.tensor(target, dtype=torch.float32)
        self.weight = torch.tensor(weight * visit, dtype=torch.float32)
        self.merged = torch.tensor(target), torch.tensor(weight)
        self.labelled = None if merged.human is None else torch.tensor(~np.isnan(merged.human[self.rows]))
        if self.parts is not None:
            self.parts = replace(self.parts, visit=self.parts.visit * torch.tensor(visit))
        idle = pool - len(self.rows)
        if idle:
            say(f"{idle} of {pool} pairs carry no weight in {path.stem!r} and are not visited")

    def _order(self, probability: np.ndarray) -> Order:
        """In which order the visited pairs come: those of one shape together, if there are several shapes."""
        alike = _alike(self.source.shapes(self.rows))
        self.shapes = [shape for shape, _ in alike]
        if len(alike) == 1:
            return PairSampler(self.seed, probability)
        share = np.array([probability[some].sum() for _, some in alike])
        say("pairs by height x width of their latents: " + ", ".join(f"{len(some)} of {shape[1]} x {shape[2]}" for shape, some in alike))
        places = [some for _, some in alike]
        orders = [PairSampler(self.seed, probability[some] / probability[some].sum()) for some in places]
        return BucketedPairSampler(self.seed, places, orders, share / share.sum(), self.together)

    def shape(self, step: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a step's pairs."""
        return self.shapes[self.visits.bucket(step) if isinstance(self.visits, BucketedPairSampler) else 0]

    def load(self, first_visit: int, draws: Draws) -> Loaded:
        """Consecutive visits that begin at `first_visit`, as many as `draws` holds, in host memory; nothing asks for the device.

        With a grid, its draws take the place of those given.
        """
        visits = range(first_visit, first_visit + len(draws.timesteps))
        places, known = self.visits.rows(visits.start, visits.stop), None
        rows, numbers = [int(self.rows[place]) for place in places], list(visits)
        if self.grid is not None:  # the view is that of the noise, whose reference errors are of that view
            numbers = self.grid.choose(rows, visits, seed=self.seed, together=self.together)
            draws, known = self.grid.at(rows, numbers)
        return self.at(places, numbers, draws, known)

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
        batch = PairBatch(latents, encoded.conditioning, given.target, given.weight, given.known, given.labelled)
        return batch, given.draws


def _alike(shapes: np.ndarray) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """Every shape among (n, 3), with the places that have it."""
    found, which = np.unique(shapes, axis=0, return_inverse=True)
    return [((int(c), int(h), int(w)), np.flatnonzero(which.reshape(-1) == k)) for k, (c, h, w) in enumerate(found)]


def _planned(parts: Parts, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights at a power that visits are planned for."""
    target, weight = retarget(parts.human, parts.judge, parts.inverse, power)
    return target.numpy(), weight.numpy()


def open_source(
    settings: TrainSettings, reader: PairReader, model: Backbone, data: DataSettings, accelerator: Accelerator, *, fingerprint: str,
    size: int, views: int | None = None,
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
    """
    if settings.data.cache is None:
        return LiveSource(reader, model, data, size=size, seed=settings.seed)
    with accelerator.main_process_first():
        cache = open_cache(reader, model, data, root=settings.data.cache, fingerprint=fingerprint, size=size)
    words = (model.text, reader.prompts()) if settings.lora.text_encoders else None
    return CachedSource(cache, model.channels, words=words, views=views)
