"""Encoded pairs on disk: VAE posteriors, sizes and text embeddings, made once and shared between runs.

One folder per (VAE and text encoders, pair dataset, size, views), named by their digest; a run that visits few of the pairs has one of
these alone. Pictures lie in one safetensors file per shard of the pair dataset, those of one shape as rows of one tensor, prompts in files
of 256, each once. Files are memory-mapped and read by row, so memory does not grow with the number of pairs; every row carries a checksum
that is looked at whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dedpo_diffusion.core import caches
from dedpo_diffusion.core.console import NoSpace, UserError, say
from dedpo_diffusion.core.files import atomic_file, remove_leftovers, write_json
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.core.texts import size_words

LAYOUT = 4  # of the files, and the rules images are decoded by; a cache of another layout gets another name
ROOM = 0.9  # of the free disk that an optional cache may take
PROMPTS = 256  # in one file
PIXELS = 1 << 20  # encoded at once, in either image of the pairs
SHAPES = "shapes"  # tensor of a shard's file: height and width of the latents of each of its pairs
REMEDY = "the model's files may be damaged or overflow: check or replace them"


def cache_folder(root: Path, identity: Mapping[str, Any]) -> Path:
    """The cache's folder for what it depends on: fingerprints of encoders and dataset, image size, views."""
    key = json.dumps({"layout": LAYOUT, **identity}, sort_keys=True)
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]


def read_index(folder: Path) -> dict[str, Any] | None:
    """What a cache holds, None where it is not complete.

    Raises:
        UserError: the index is damaged.
    """
    file = folder / "index.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove {folder}, and it is made anew") from error


def _checksum(*rows: Tensor) -> int:
    """CRC-32 over the bytes of tensors."""
    value = 0
    for row in rows:
        value = zlib.crc32(row.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


class Rows:
    """Rows of the tensors of one file, memory-mapped and checked; tensors whose names begin alike ("16x16.sizes") go together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = safe_open(path, "pt")
            self.parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> UserError:
        index = self.path.parent / "index.json"
        also = f" and {index}" if index.is_file() else ""
        return UserError(f"{self.path}: damaged ({why}); remove this file{also}, and it is made anew")

    def at(self, row: int, group: str) -> dict[str, Tensor]:
        """The row of the tensors of a group, by the rest of their names.

        Raises:
            UserError: it is not what was written.
        """
        found = {name.removeprefix(f"{group}."): part[row] for name, part in self.parts.items() if name.startswith(f"{group}.")}
        known = int(found.pop("checksum"))
        if _checksum(*(found[name] for name in sorted(found))) != known:
            raise self._damaged(f"row {row} of {group} is not what was written")
        return found


def check_version(folder: Path) -> None:
    """Refuse what another version of this program wrote.

    Raises:
        UserError: so it is.
    """
    layout = caches.read_about(folder).get("layout", LAYOUT)
    if layout != LAYOUT:
        raise UserError(f"{folder}: made by another version of this program; remove it (`dedpo cache`), and it is made anew")


def expected_bytes(views: int, shape: tuple[int, int, int], prompts: int, text: Conditioning) -> int:
    """What a cache will take, about: views of pairs of latents of this shape (C, h, w), and embeddings of prompts like that one."""
    channels, height, width = shape
    words = sum(value.numel() * value.element_size() for value in (text.text, text.pooled) if value is not None)
    return views * 2 * 2 * channels * height * width * 4 + prompts * words


def rows_digest(rows: np.ndarray) -> str:
    """Which of a dataset's rows these are, in 16 hexadecimal digits."""
    return hashlib.sha256(np.asarray(rows, dtype="<i8").tobytes()).hexdigest()[:16]


def choose_folder(root: Path, identity: Mapping[str, Any], pairs: int, rows: np.ndarray | None) -> tuple[Path, np.ndarray | None]:
    """The folder of the cache that a run has, and the rows that it holds, None for all.

    A run that visits fewer than half of the pairs has one of these alone, unless one of all is there already.

    Args:
        root: where caches lie.
        identity: what one of all pairs depends on.
        pairs: of the dataset.
        rows: that the run visits, rising; None for all.
    """
    whole = cache_folder(root, identity)
    if rows is None or 2 * len(rows) >= pairs:
        return whole, None
    some = cache_folder(root, {**identity, "rows": rows_digest(rows)})
    return (whole, None) if read_index(some) is None and read_index(whole) is not None else (some, rows)


def begin_cache(folder: Path, wanted: int, about: Mapping[str, str], *, optional: bool) -> None:
    """Say where a cache is made and what it will take, `wanted` bytes, and keep what it is of: `pairs`, `model`, and `some` of them.

    Raises:
        NoSpace: the disk is full, or too full for an optional one.
    """
    there = caches.bytes_in(folder) if folder.is_dir() else 0
    if optional and (not folder.is_dir() or wanted - there > ROOM * shutil.disk_usage(folder).free):
        raise NoSpace(folder)
    which = f"{about['some']} pairs, those that this run visits," if "some" in about else "the pairs"
    say(f"{which} are encoded once, into {folder}: about {size_words(wanted)} in all")
    caches.describe(folder, {**about, "layout": LAYOUT, "version": version("dedpo_diffusion")})


class PairCache:
    """Reads what `fill` wrote.

    Args:
        folder: as `choose_folder` names it, filled.

    Attributes:
        rows: (n,) int64, rising, the dataset's rows that it holds; None for all.
        shapes: (n, 2) int64, height and width of the latents of every pair that it holds.

    Raises:
        ValueError: the folder is not complete.
        UserError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        if index is None:
            raise ValueError(f"{folder} is no complete cache; fill it first")
        self.folder, self.counts, self.views = folder, index["counts"], int(index["identity"].get("views", 1))
        self.starts = torch.tensor([0, *self.counts]).cumsum(0)
        self.rows = np.array(index["rows"]) if "rows" in index else None
        self.text_row = torch.tensor(index["text_row"])
        shapes = torch.tensor(index["shapes"])
        self.shapes = shapes[torch.tensor(index["shape"])]
        self._open: dict[str, Rows] = {}

    def _rows(self, name: str) -> Rows:
        if name not in self._open:
            self._open[name] = Rows(self.folder / name)
        return self._open[name]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where the dataset's rows are among those that it holds.

        Raises:
            ValueError: it does not hold one.
        """
        if self.rows is None:
            return rows
        found = np.searchsorted(self.rows, rows)  # each in the time of a few comparisons: rows are asked for one by one
        there = self.rows[np.minimum(found, len(self.rows) - 1)] == rows
        if not there.all():
            raise ValueError(f"{self.folder} does not hold row {int(rows[~there][0])}")
        return found

    def _place(self, row: int) -> int:
        return row if self.rows is None else int(self.places(np.array([row]))[0])

    def posterior(self, row: int, view: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation, each (2, C, h, w), and sizes (2, 6), float32, of a view of the pair at this row of the dataset."""
        pair = self._place(row)
        shard = int(torch.searchsorted(self.starts, pair, right=True)) - 1
        before = self.shapes[int(self.starts[shard]) : pair]
        alike = int((before == self.shapes[pair]).all(dim=1).sum())  # pairs of the shard that come before it in its tensor
        found = self._rows(f"shard-{shard:05d}.safetensors").at(alike * self.views + view, _group(*self.shapes[pair].tolist()))
        mean, std = found["posterior"].chunk(2, dim=1)
        return mean, std, found["sizes"]

    def originals(self) -> Tensor:
        """Height and width in pixels of both images of every pair that it holds, before they were cropped, (n, 2, 2)."""
        found = torch.zeros(len(self.shapes), 2, 2)
        for shard, count in enumerate(self.counts):
            rows, start = self._rows(f"shard-{shard:05d}.safetensors"), int(self.starts[shard])
            here = self.shapes[start : start + count]
            for shape in here.unique(dim=0):
                sizes = rows.parts[f"{_group(*shape.tolist())}.sizes"][:]
                found[start : start + count][(here == shape).all(dim=1)] = sizes[:: self.views, :, :2]
        return found

    def embedding(self, row: int, *, empty: bool = False) -> Conditioning:
        """Text (L, D), and pooled (P,) where the model has it, of the prompt of the pair at this row, or of the absent one."""
        text = 0 if empty else int(self.text_row[self._place(row)])
        found = self._rows(f"text-{text // PROMPTS:05d}.safetensors").at(text % PROMPTS, "text")
        return Conditioning(found["text"], found.get("pooled"))


def _group(height: int, width: int) -> str:
    """Where the pictures of a shape lie in a file."""
    return f"{height}x{width}"


def fill(
    folder: Path,
    *,
    identity: Mapping[str, Any],
    prompts: Sequence[str],
    shards: Sequence[int],
    read_shard: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    encode_images: Callable[[Tensor], tuple[Tensor, Tensor]],
    encode_prompts: Callable[[Sequence[str | None]], Conditioning],
    advance: Callable[[int], object] = lambda count: None,
    locate: Callable[[int], str] = "pair {}".format,
    rows: Sequence[int] | None = None,
) -> None:
    """Encode the pairs; files that are there already are kept, so a killed run goes on.

    Args:
        folder: of the cache.
        identity: what it depends on, kept in the index.
        prompts: the prompt of every pair, in the dataset's order.
        shards: how many of the pairs are in each shard of the dataset.
        read_shard: shard number -> pixels (2, 3, H, W) and sizes (2, 6) of each view of each of its pairs, one after the other.
        encode_images: (N, 3, H, W) -> posterior mean and standard deviation, (N, C, h, w) each.
        encode_prompts: N prompts, None for the absent one.
        advance: told how many views were just done.
        locate: where in the dataset each of the pairs is, to be named.
        rows: of the dataset, where these are not all of its pairs.

    Raises:
        UserError: an image or a prompt whose encoding is not finite, or the disk is full.
    """
    if (folder / "index.json").is_file():
        return
    remove_leftovers(folder)
    views = int(identity.get("views", 1))
    found_shapes: list[tuple[int, int]] = []
    for shard, count in enumerate(shards):
        path = folder / f"shard-{shard:05d}.safetensors"
        if not path.is_file():
            where = partial(_locate, locate, sum(shards[:shard]), views)
            groups, shapes = _encode_shard(read_shard(shard), views, encode_images, advance, where)
            write_rows(path, groups, {SHAPES: torch.tensor(shapes)})
        else:
            advance(count * views)
        found_shapes += _read_shapes(path)
    texts: dict[str | None, int] = {prompt: row for row, prompt in enumerate([None, *dict.fromkeys(prompts)])}
    unique = list(texts)
    for start in range(0, len(unique), PROMPTS):
        path = folder / f"text-{start // PROMPTS:05d}.safetensors"
        if not path.is_file():
            part = unique[start : start + PROMPTS]
            found = Conditioning.cat([encode_prompts(part[k : k + 16]).to(torch.device("cpu")) for k in range(0, len(part), 16)])
            tensors = {name: value for name in ("text", "pooled") if (value := getattr(found, name)) is not None}
            for value in tensors.values():
                bad = _not_finite(value)
                if bad is not None:
                    raise UserError(f"the prompt {part[bad] or ''!r}: the text encoder's numbers of it are not finite; {REMEDY}")
            write_rows(path, {"text": tensors})
    shapes = sorted(set(found_shapes))
    index = {
        "identity": dict(identity), "counts": list(shards), "text_row": [texts[prompt] for prompt in prompts],
        "shapes": shapes, "shape": [shapes.index(shape) for shape in found_shapes],
    } | ({} if rows is None else {"rows": list(rows)})  # fmt: skip
    write_json(folder / "index.json", index)


def write_rows(path: Path, groups: Mapping[str, Mapping[str, Tensor]], more: Mapping[str, Tensor] | None = None) -> None:
    """Write groups of tensors with a checksum of each of their rows, and more tensors, whose rows are none of theirs."""
    tensors = dict(more or {})
    for group, members in groups.items():
        names = sorted(members)
        sums = [_checksum(*(members[name][row] for name in names)) for row in range(len(members[names[0]]))]
        tensors |= {f"{group}.{name}": value.contiguous() for name, value in members.items()}
        tensors[f"{group}.checksum"] = torch.tensor(sums)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)


def _read_shapes(path: Path) -> list[tuple[int, int]]:
    """The shapes of a shard's pairs, for the index."""
    with safe_open(path, "pt") as file:
        return [(height, width) for height, width in file.get_tensor(SHAPES).tolist()]


def _locate(locate: Callable[[int], str], first: int, views: int, view: int) -> str:
    return locate(first + view // views)


def _not_finite(rows: Tensor) -> int | None:
    """The first row that holds NaN or infinity, None if none does."""
    good = rows.flatten(1).isfinite().all(dim=1)
    return None if good.all() else int((~good).nonzero()[0])


def _encode_shard(
    read: Iterable[tuple[Tensor, Tensor]],
    views: int,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    advance: Callable[[int], object],
    locate: Callable[[int], str],
) -> tuple[dict[str, dict[str, Tensor]], list[tuple[int, int]]]:
    """Of one shard: posteriors (n, 2, 2 C, h, w), mean and standard deviation one after the other, and sizes (n, 2, 6), for each shape.

    Returns:
        Those, and the shape (h, w) of every pair.
    """
    done: list[Tensor] = []
    sizes: list[Tensor] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        if not waiting:
            return
        mean, std = encode(torch.stack(waiting).flatten(0, 1))
        encoded = torch.cat([mean, std], dim=1).cpu().unflatten(0, (len(waiting), 2))
        bad = _not_finite(encoded)
        if bad is not None:
            raise UserError(f"{locate(len(done) + bad)}: the VAE's numbers of its images are not finite; {REMEDY}, or remove the pair")
        done.extend(encoded)
        advance(len(waiting))
        waiting.clear()

    for pixels, told in read:
        if waiting and (waiting[0].shape != pixels.shape or len(waiting) >= min(16, max(1, PIXELS // pixels[0, 0].numel()))):
            flush()
        waiting.append(pixels)
        sizes.append(told)
    flush()
    shapes = [(values.shape[-2], values.shape[-1]) for values in done]
    groups = {}
    for shape in dict.fromkeys(shapes):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        groups[_group(*shape)] = {"posterior": torch.stack([done[row] for row in rows]), "sizes": torch.stack([sizes[row] for row in rows])}
    return groups, shapes[::views]
