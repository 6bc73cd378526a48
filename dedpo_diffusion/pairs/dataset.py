"""The pairs of a pair dataset: a folder of parquet files, read and written piece by piece.

    PAIRS/pairs/pairs-00000.parquet ...   pair_id, prompt, image_0, image_1 (encoded image files), any source_* columns
    PAIRS/labels, votes, targets          what people and judges say of them, and what is trained on: labels.py

Rows are counted from 0, in a file or in the whole dataset. Never more than a few row groups (reading) or one shard
(writing) of images are in memory.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file, atomic_folder
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.core.tables import SOURCE, check_columns, check_no_nulls, check_types, first_repeat, open_parquet

PAIR_COLUMNS = ("pair_id", "prompt", "image_0", "image_1")
PAIR_TYPES = {"pair_id": "text", "prompt": "text", "image_0": "binary", "image_1": "binary"}
ROW_GROUP = 32  # pairs read for one random access
SHARD_BYTES = 256 << 20  # a shard of large images is closed early: it is buffered whole
CACHED_GROUPS = 4


class PairWriter:
    """Write pairs into `folder/pairs`.

    They appear when the block ends without an error, and not before; with `goes_on`, shard by shard, and what is there stays.

    Args:
        folder: the pair dataset.
        shard_pairs: pairs in one parquet file; a file of large images is closed earlier, since it is buffered in memory.
        goes_on: how many shards of an interrupted run to keep (later ones are removed); None writes all or nothing.

    Raises:
        UserError: the folder has pairs already, a pair_id comes twice, or no pair was added.
    """

    def __init__(self, folder: Path, *, shard_pairs: int = 1000, goes_on: int | None = None) -> None:
        if shard_pairs < 1:
            raise UserError(f"shard_pairs is {shard_pairs}; it must be at least 1")
        self.folder, self.shard_pairs, self.goes_on = Path(folder), shard_pairs, goes_on
        self._rows: dict[str, int] = {}
        self._buffer: list[Pair] = []
        self._bytes = self.shards = 0
        self._target: Path | None = None
        self._context: AbstractContextManager[Path] = nullcontext(self.folder / "pairs")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, pair_id: str) -> bool:
        return pair_id in self._rows

    def __enter__(self) -> PairWriter:
        if self.goes_on is not None:
            self._keep(self.goes_on)
        elif (self.folder / "pairs").exists():
            raise UserError(f"{self.folder} holds pairs already; choose another folder, or remove it first")
        else:
            self._context = atomic_folder(self.folder / "pairs")
        self._target = self._context.__enter__()
        return self

    def _keep(self, shards: int) -> None:
        """Take up the first `shards` files, remove the rest."""
        (self.folder / "pairs").mkdir(parents=True, exist_ok=True)
        for path in (self.folder / "pairs").iterdir():
            if path.name not in {_shard_name(k) for k in range(shards)}:
                path.unlink()
        if shards:
            self._rows = {pair_id: row for row, pair_id in enumerate(PairReader(self.folder).ids())}
        self.shards = shards

    def add(self, pair: Pair) -> bool:
        """Append one pair; True where that finished a shard, so that all pairs so far are on disk."""
        row = len(self._rows)
        if self._rows.setdefault(pair.pair_id, row) != row:
            earlier = self._rows[pair.pair_id]
            raise UserError(f"pair_id {pair.pair_id!r} comes twice, as pair {earlier} and as pair {row} of {self.folder}; make it unique")
        self._buffer.append(pair)
        self._bytes += len(pair.image_0) + len(pair.image_1)
        if len(self._buffer) < self.shard_pairs and self._bytes < SHARD_BYTES:
            return False
        self._write_shard()
        return True

    def _write_shard(self) -> None:
        if self._target is None:
            raise RuntimeError("PairWriter is used outside of its with block")
        small = ["pair_id", "prompt"]
        table = _pair_table(self._buffer)
        with atomic_file(self._target / _shard_name(self.shards)) as temporary:
            pq.write_table(
                table,
                temporary,
                row_group_size=ROW_GROUP,
                compression={name: "none" if name.startswith("image_") else "zstd" for name in table.column_names},
                use_dictionary=[name for name in table.column_names if not name.startswith("image_")],
                write_statistics=small,  # statistics of an image column would hold images
            )
        self.shards, self._buffer, self._bytes = self.shards + 1, [], 0

    def _finish(self) -> None:
        if not self._rows:
            raise UserError(f"there is no pair to write into {self.folder}")
        if self._buffer:
            self._write_shard()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._context.__exit__(*sys.exc_info())
            raise
        self._context.__exit__(kind, error, trace)


def shard_digest(path: Path) -> str:
    """SHA-256 of a shard's name, size and footer, which knows every row group's sizes; image bytes are not read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - footer))
        return hashlib.sha256(f"{path.name} {size}".encode() + file.read()).hexdigest()


def _shard_name(k: int) -> str:
    return f"pairs-{k:05d}.parquet"


def _pair_table(pairs: Sequence[Pair]) -> pa.Table:
    """Pair.source's key k becomes the column source_k."""
    columns: dict[str, Any] = {
        "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
        "prompt": pa.array([pair.prompt for pair in pairs], pa.string()),
        "image_0": pa.array([pair.image_0 for pair in pairs], pa.binary()),
        "image_1": pa.array([pair.image_1 for pair in pairs], pa.binary()),
    }
    for key in dict.fromkeys(key for pair in pairs for key in pair.source):
        if key.startswith(SOURCE):
            raise ValueError(f"Pair.source has a key {key!r}: leave out {SOURCE!r}, the file adds it")
        columns[SOURCE + key] = _source_column([pair.source.get(key) for pair in pairs])
    return pa.table(columns)


def _source_column(values: list[Any]) -> pa.Array:
    """A source column as it is, or as text where its values are of several kinds or beyond parquet's numbers."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _joined(chunks: Sequence[pa.Array]) -> pa.ChunkedArray:
    """Pieces of one column, brought to one type."""
    kinds = {chunk.type for chunk in chunks} - {pa.null()}
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds)
    kind = next(iter(kinds), pa.null()) if len(kinds) <= 1 else pa.float64() if numbers else pa.string()
    return pa.chunked_array([chunk if chunk.type == kind else chunk.cast(kind) for chunk in chunks], kind)


class PairReader:
    """Read the pairs of a pair dataset; only headers are read until pairs are asked for.

    Args:
        folder: the pair dataset.

    Raises:
        UserError: no pairs there, a file that is no parquet, a missing or unknown column.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.shards = sorted((self.folder / "pairs").glob("*.parquet"))
        if not self.shards:
            raise UserError(f"{self.folder / 'pairs'} holds no parquet files; make a pair dataset with `dedpo ingest` or `dedpo propose`")
        self.source_types: dict[str, set[pa.DataType]] = {}  # of the source columns, without source_, in the order they first come
        groups = [self._check_shard(path) for path in self.shards]
        self._shard_starts = np.concatenate([[0], np.cumsum([sum(rows) for rows in groups])])
        self._group_starts = [np.concatenate([[0], np.cumsum(rows)]).astype(int) for rows in groups]
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def _check_shard(self, path: Path) -> list[int]:
        """Check a shard's header, note its source columns and return the rows of its row groups."""
        with open_parquet(path) as file:
            schema, header = file.schema_arrow, file.metadata
            check_columns(path, schema, PAIR_COLUMNS, hints={"label": "labels belong to the labels folder"})
            check_types(path, schema, PAIR_TYPES)
            for field in schema:
                if field.name.startswith(SOURCE):
                    self.source_types.setdefault(field.name.removeprefix(SOURCE), set()).add(field.type)
            return [header.row_group(k).num_rows for k in range(header.num_row_groups)]

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    @property
    def counts(self) -> list[int]:
        """Pairs in each shard."""
        return [int(count) for count in np.diff(self._shard_starts)]

    def fingerprint(self) -> str:
        """SHA-256 of every shard's name, size and footer, and of all ids and prompts; image bytes are not read."""
        digest = hashlib.sha256()
        for path in self.shards:
            digest.update(shard_digest(path).encode())
        pieces = (piece for name in ("pair_id", "prompt") for piece in self._pieces(name) if piece)
        for number, piece in enumerate(pieces):  # as if all were joined at once, which would hold them all
            digest.update(("\0" * (number > 0) + "\0".join(piece)).encode())
        return digest.hexdigest()

    def ids(self) -> list[str]:
        """Every pair_id in order; UserError where one comes twice."""
        ids = self.column("pair_id")
        rows = first_repeat(ids)
        if rows is not None:
            places = f"{self.location(rows[0])} and again in {self.location(rows[1])}"
            raise UserError(f"{self.folder / 'pairs'}: pair_id {ids[rows[0]]!r} is in {places}; make it unique")
        return ids

    def has_ids(self, ids: Sequence[str]) -> bool:
        """Whether these are the pairs' ids, in order; only a shard's are in memory."""
        start = 0
        for piece in self._pieces("pair_id"):
            if list(ids[start : start + len(piece)]) != piece:
                return False
            start += len(piece)
        return start == len(ids)

    def prompts(self) -> list[str]:
        """Every prompt in order."""
        return self.column("prompt")

    def column(self, name: str) -> list[str]:
        """Every value of `pair_id` or `prompt` in order; UserError where one is missing."""
        return [value for piece in self._pieces(name) for value in piece]

    def _pieces(self, name: str) -> Iterator[list[str]]:
        """A column, shard by shard."""
        for path in self.shards:
            with open_parquet(path) as file:
                found = file.read(columns=[name], use_threads=False).column(0).to_pylist()
            check_no_nulls(path, name, found)
            yield found

    def sources(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Source columns by their name without source_, each (N,); null where a shard lacks it, text where shards differ in type."""
        found: dict[str, list[pa.Array]] = {name: [] for name in names}
        if not names:
            return {}
        for path, count in zip(self.shards, self.counts, strict=True):
            with open_parquet(path) as file:
                there = [name for name in names if SOURCE + name in file.schema_arrow.names]
                table = file.read(columns=[SOURCE + name for name in there], use_threads=False)
            for name in names:
                found[name] += table.column(SOURCE + name).chunks if name in there else [pa.nulls(count)]
        return {name: _joined(chunks) for name, chunks in found.items()}

    def plain_sources(self) -> dict[str, pa.ChunkedArray]:
        """Source columns of numbers, truth values and texts, by their name without source_."""
        types = pa.types
        plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_string, types.is_large_string)
        found = self.source_types.items()
        return self.sources([name for name, kinds in found if all(any(test(kind) for test in plain) for kind in kinds)])

    def iter_pairs(self, start: int = 0) -> Iterator[Pair]:
        """Pairs in order from number `start` on, streamed."""
        for k in range(len(self.shards)):
            if start < self._shard_starts[k + 1]:
                yield from self._stream(k, max(0, start - int(self._shard_starts[k])))

    def shard_pairs(self, k: int) -> Iterator[Pair]:
        """Pairs of shard `k` in order, streamed."""
        return self._stream(k, 0)

    def _stream(self, k: int, start: int) -> Iterator[Pair]:
        starts = self._group_starts[k]
        with open_parquet(self.shards[k]) as file:
            for group in range(len(starts) - 1):
                if start >= starts[group + 1]:
                    continue
                row = int(starts[group])
                for batch in file.iter_batches(batch_size=ROW_GROUP, row_groups=[group], use_threads=False):
                    for i in range(max(0, start - row), batch.num_rows):
                        yield self._pair(batch, i, k, row + i)
                    row += batch.num_rows

    def pair(self, i: int) -> Pair:
        """Pair number `i`, read with its row group; the last few row groups stay in memory."""
        k, row = self._place(i)
        group = int(np.searchsorted(self._group_starts[k], row, side="right")) - 1
        return self._pair(self._group(k, group), row - int(self._group_starts[k][group]), k, row)

    def location(self, i: int) -> str:
        """File name and row of pair number `i`."""
        k, row = self._place(i)
        return f"{self.shards[k].name} row {row}"

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        k = int(np.searchsorted(self._shard_starts, i, side="right")) - 1
        return k, i - int(self._shard_starts[k])

    def _group(self, k: int, group: int) -> pa.Table:
        key = (k, group)
        if key not in self._cache:
            with open_parquet(self.shards[k]) as file:
                self._cache[key] = file.read_row_group(group, use_threads=False)
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _pair(self, table: pa.Table | pa.RecordBatch, i: int, k: int, row: int) -> Pair:
        values = {name: table.column(name)[i].as_py() for name in table.schema.names}
        core = {name: values.pop(name) for name in PAIR_COLUMNS}
        for name, value in core.items():
            if value is None:
                raise UserError(f"{self.shards[k]} row {row}: {name} is missing; fill it in or remove the row")
        return Pair(**core, source={name.removeprefix(SOURCE): value for name, value in values.items()})
