"""Where encoded pairs come from: a cache, filled if need be, or the encoders at every visit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
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
from dedpo_diffusion.core.records import Conditioning, Pair, Tensors
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.dpo.noising import step_generator
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.text_encoders import TextEncoders
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image, read_header
from dedpo_diffusion.pairs.pixels import nearest_shape, pair_views
from dedpo_diffusion.settings import DataSettings, TrainSettings
from dedpo_diffusion.training.cache import PairCache, begin_cache, check_version, choose_folder, expected_bytes, fill, read_index
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
        found = self.cache.shapes[torch.from_numpy(self.cache.places(rows))].numpy()
        return np.column_stack([np.full(len(rows), self.channels), found])

    def originals(self, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return self.cache.originals()[torch.from_numpy(self.cache.places(rows))].numpy()

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
    reader: PairReader, model: Backbone, data: DataSettings, *, root: Path, fingerprint: str, size: int, optional: bool = False,
    rows: np.ndarray | None = None,
) -> PairCache:  # fmt: skip
    """The filled cache of this dataset under this model's encoders and these views, filled now if need be, with progress.

    It is in use until this process ends, or `core.caches.release`. It holds the dataset's `rows` at least, None for all.

    Raises:
        UserError: another version made it, or pairs that cannot be encoded.
        NoSpace: the disk is full, or too full for an `optional` one.
    """
    identity = cache_identity(model, data, pairs=fingerprint, size=size)
    folder, some = choose_folder(root, identity, len(reader), rows)
    caches.take_up(folder)
    check_version(folder)
    if read_index(folder) is None:
        every = np.arange(len(reader)) if some is None else some
        prompts, shape = reader.prompts(), model.latent_shape(size)
        here = [prompts[row] for row in every]
        wanted = expected_bytes(len(every) * data.views, shape, len(set(here)) + 1, model.encode_prompts([None]))
        about = {"pairs": str(reader.folder.resolve()), "model": model.name}
        begin_cache(folder, wanted, about if some is None else about | {"some": f"{len(some)} of {len(reader)}"}, optional=optional)
        _say_others(root, identity)
        shapes = model.shapes(size) if data.buckets else [(size, size)]
        ends = np.searchsorted(every, np.cumsum([0, *reader.counts])).tolist()

        def views(shard: int) -> Iterator[tuple[Tensor, Tensor]]:
            visited, first = set(every[ends[shard] : ends[shard + 1]].tolist()), sum(reader.counts[:shard])
            for row, pair in enumerate(reader.shard_pairs(shard) if visited else (), first):
                for view in range(data.views) if row in visited else ():
                    generator, where = step_generator(row, view, VIEWS), reader.location(row)
                    yield view_pair(pair, where, shapes, data, generator, mirrored=view % 2 == 1)  # half of them, whatever their number

        with Progress("encoding pairs", len(every) * data.views) as progress:
            fill(
                folder, identity=identity, prompts=here, shards=np.diff(ends).tolist(), read_shard=views,
                encode_images=model.encode_images, encode_prompts=model.encode_prompts, advance=progress.advance,
                locate=lambda place: reader.location(int(every[place])), rows=None if some is None else some.tolist(),
            )  # fmt: skip
        say(f"{folder} holds {size_words(caches.bytes_in(folder))}")
    return PairCache(folder)


def _say_others(root: Path, identity: Mapping[str, Any]) -> None:
    """Say why other caches of the same pairs do not do."""
    for other in sorted(root.glob("*/index.json")):
        index = read_index(other.parent) or {}
        held = index.get("identity", {})
        if held.get("pairs") == identity["pairs"] and not ("rows" in index and held == identity):
            differs = first_difference(held, identity)
            say(f"{other.parent} " + (f"does not fit ({differs})" if differs else "was made by another version; it is made anew"))


def open_source(
    settings: TrainSettings, reader: PairReader, model: Backbone, data: DataSettings, accelerator: Accelerator, *, fingerprint: str,
    size: int, views: int | None = None, optional: bool = False, rows: np.ndarray | None = None,
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
        rows: of the dataset, rising, that will be visited; None for all.
    """
    root, live = settings.data.cache, partial(LiveSource, reader, model, data, size=size, seed=settings.seed)
    if not isinstance(root, Path):
        return live()
    with accelerator.main_process_first():
        folder, _ = choose_folder(root, cache_identity(model, data, pairs=fingerprint, size=size), len(reader), rows)
        if optional and not accelerator.is_main_process and read_index(folder) is None:
            return live()  # as the main process does
        try:
            cache = open_cache(reader, model, data, root=root, fingerprint=fingerprint, size=size, optional=optional, rows=rows)
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
