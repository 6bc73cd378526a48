"""The pair dataset: a folder of parquet files, read and written piece by piece.

    PAIRS/pairs/pairs-00000.parquet ...   pair_id, prompt, image_0, image_1 (encoded image files), any source_* columns
    PAIRS/labels/<name>.parquet           pair_id, label_0 in [0, 1], what else is known of the answer, any source_* columns
    PAIRS/targets/<name>.parquet, .json   pair_id, target, weight; and the report of the merge

Rows are counted from 0, in a file or in the whole dataset. Never more than a few row groups (reading) or one shard
(writing) of images are in memory.
"""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFile

from .console import UserError
from .files import atomic_file, atomic_folder, write_json
from .records import Labels, Pair, Targets

PAIR_COLUMNS = ("pair_id", "prompt", "image_0", "image_1")
LABEL_COLUMNS = ("pair_id", "label_0")
LABEL_EXTRAS = ("rater", "score_0", "score_1", "judge_version", "order_consistent", "seconds")
TARGET_COLUMNS = ("pair_id", "target", "weight")
SOURCE = "source_"
ROW_GROUP = 32  # pairs read for one random access
SHARD_BYTES = 256 << 20  # a shard of large images is closed early: it is buffered whole
CACHED_GROUPS = 4


# ---- images

_strict_lock = threading.Lock()


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Make Pillow refuse truncated files even where another library told it to pad them with grey."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:  # the ordinary case, in which threads need not wait for each other
        yield
        return
    with _strict_lock:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode an image file's bytes entirely, to RGB.

    Args:
        data: bytes of a PNG, JPEG, WebP or other file that Pillow reads.
        where: file, row and column, for the message.

    Raises:
        UserError: the bytes are truncated, damaged or no image.
    """
    try:
        with _strict_decoding(), Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: the image cannot be decoded ({error}); replace it, or leave its pair out") from error


# ---- columns


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); write or copy it again") from error


def _check_columns(path: Path, schema: pa.Schema, required: Sequence[str], optional: Sequence[str] = (), *, source: bool = True) -> None:
    """Every column there, none unknown."""
    for name in required:
        if name not in schema.names:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(schema.names)}); add it")
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has two columns named {name!r}; remove one")
        if name in (*required, *optional) or (source and name.startswith(SOURCE)):
            continue
        keep = f"rename it to {SOURCE}{name} to keep it, or remove it" if source else "remove it"
        labels = "; labels belong to the labels folder" if "label" in name and required is PAIR_COLUMNS else ""
        raise UserError(f"{path} has an unknown column {name!r}: {keep}{labels}")


def _check_types(path: Path, schema: pa.Schema, wanted: dict[str, str]) -> None:
    tests = {
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        "binary": lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t),
        "a number": lambda t: pa.types.is_floating(t) or pa.types.is_integer(t),
    }
    for name, kind in wanted.items():
        found = schema.field(name).type
        if not tests[kind](found):
            raise UserError(f"{path}: column {name!r} holds {found}, and must hold {kind}; convert it")


def _check_no_nulls(path: Path, name: str, values: Sequence[Any]) -> None:
    if None in values:
        raise UserError(f"{path} row {list(values).index(None)}: {name} is missing; fill it in or remove the row")


def _check_unique(path: Path, ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, pair_id in enumerate(ids):
        if first.setdefault(pair_id, row) != row:
            raise UserError(f"{path}: pair_id {pair_id!r} stands in row {first[pair_id]} and again in row {row}; remove one")


# ---- pairs


class PairWriter:
    """Write pairs into `folder/pairs`, which appears when the block ends without an error, and not before.

    Args:
        folder: the pair dataset.
        shard_pairs: pairs in one parquet file; a file of large images is closed earlier, since it is buffered in memory.

    Raises:
        UserError: the folder has pairs already, a pair_id comes twice, or no pair was added.
    """

    def __init__(self, folder: Path, *, shard_pairs: int = 1000) -> None:
        if shard_pairs < 1:
            raise UserError(f"shard_pairs is {shard_pairs}; it must be at least 1")
        self.folder, self.shard_pairs = Path(folder), shard_pairs
        self._rows: dict[str, int] = {}
        self._buffer: list[Pair] = []
        self._bytes = self._shards = 0
        self._target: Path | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> PairWriter:
        if (self.folder / "pairs").exists():
            raise UserError(f"{self.folder} holds pairs already; choose another folder, or remove it first")
        self._context = atomic_folder(self.folder / "pairs")
        self._target = self._context.__enter__()
        return self

    def add(self, pair: Pair) -> None:
        """Append one pair."""
        row = len(self._rows)
        if self._rows.setdefault(pair.pair_id, row) != row:
            earlier = self._rows[pair.pair_id]
            raise UserError(f"pair_id {pair.pair_id!r} comes twice, as pair {earlier} and as pair {row} of {self.folder}; make it unique")
        self._buffer.append(pair)
        self._bytes += len(pair.image_0) + len(pair.image_1)
        if len(self._buffer) >= self.shard_pairs or self._bytes >= SHARD_BYTES:
            self._write_shard()

    def _write_shard(self) -> None:
        if self._target is None:
            raise RuntimeError("PairWriter is used outside of its with block")
        path = self._target / f"pairs-{self._shards:05d}.parquet"
        small = ["pair_id", "prompt"]
        table = _pair_table(self._buffer)
        pq.write_table(
            table,
            path,
            row_group_size=ROW_GROUP,
            compression={name: "none" if name.startswith("image_") else "zstd" for name in table.column_names},
            use_dictionary=[name for name in table.column_names if not name.startswith("image_")],
            write_statistics=small,  # statistics of an image column would hold images
        )
        self._shards, self._buffer, self._bytes = self._shards + 1, [], 0

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
        columns[SOURCE + key] = pa.array([pair.source.get(key) for pair in pairs])
    return pa.table(columns)


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
        groups = [self._check_shard(path) for path in self.shards]
        self._shard_starts = np.concatenate([[0], np.cumsum([sum(rows) for rows in groups])])
        self._group_starts = [np.concatenate([[0], np.cumsum(rows)]).astype(int) for rows in groups]
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    @staticmethod
    def _check_shard(path: Path) -> list[int]:
        """Check a shard's header and return the rows of its row groups."""
        with _open(path) as file:
            schema, header = file.schema_arrow, file.metadata
            _check_columns(path, schema, PAIR_COLUMNS)
            _check_types(path, schema, {"pair_id": "text", "prompt": "text", "image_0": "binary", "image_1": "binary"})
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
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(max(0, size - 8))
                footer = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - 8 - footer))
                digest.update(f"{path.name} {size}".encode() + file.read())
        digest.update("\0".join([*self._column("pair_id"), *self._column("prompt")]).encode())
        return digest.hexdigest()

    def ids(self) -> list[str]:
        """Every pair_id in order; UserError where one comes twice."""
        ids = self._column("pair_id")
        first: dict[str, int] = {}
        for row, pair_id in enumerate(ids):
            if first.setdefault(pair_id, row) != row:
                places = f"{self.location(first[pair_id])} and again in {self.location(row)}"
                raise UserError(f"{self.folder / 'pairs'}: pair_id {pair_id!r} stands in {places}; make it unique")
        return ids

    def prompts(self) -> list[str]:
        """Every prompt in order."""
        return self._column("prompt")

    def _column(self, name: str) -> list[str]:
        values: list[str] = []
        for path in self.shards:
            with _open(path) as file:
                found = file.read(columns=[name], use_threads=False).column(0).to_pylist()
            _check_no_nulls(path, name, found)
            values += found
        return values

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
        with _open(self.shards[k]) as file:
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
            with _open(self.shards[k]) as file:
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


# ---- labels


def _named(folder: Path, kind: str, name: str, suffix: str = ".parquet") -> Path:
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"{name!r} cannot name a file in {Path(folder) / kind}; use letters, digits, - and _")
    return Path(folder) / kind / f"{name}{suffix}"


def _names(folder: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in (Path(folder) / kind).glob("*.parquet") if not path.name.startswith("."))


def label_names(folder: Path) -> list[str]:
    """Names of the label files of a pair dataset, sorted."""
    return _names(folder, "labels")


def _existing(folder: Path, kind: str, name: str) -> Path:
    path = _named(folder, kind, name)
    if not path.is_file():
        raise UserError(f"there is no {path} ({kind} there: {', '.join(_names(folder, kind)) or 'none'})")
    return path


def _check_labels(path: Path, ids: Sequence[str], label_0: np.ndarray) -> None:
    bad = np.flatnonzero(~((label_0 >= 0) & (label_0 <= 1)))
    if bad.size:
        raise UserError(
            f"{path} row {bad[0]}: label_0 is {label_0[bad[0]]}, and must be the probability in [0, 1] that image 0 is preferred; "
            "mend it, or leave the row out"
        )
    _check_unique(path, ids)


def read_labels(folder: Path, name: str) -> Labels:
    """Read `folder/labels/<name>.parquet`.

    Raises:
        UserError: no such file, a missing or unknown column, a label outside [0, 1] or missing, a pair_id twice.
    """
    path = _existing(folder, "labels", name)
    with _open(path) as file:
        _check_columns(path, file.schema_arrow, LABEL_COLUMNS, LABEL_EXTRAS)
        _check_types(path, file.schema_arrow, {"pair_id": "text", "label_0": "a number"})
        columns = file.read(use_threads=False).to_pydict()
    ids, values = columns.pop("pair_id"), columns.pop("label_0")
    _check_no_nulls(path, "pair_id", ids)
    label_0 = np.array(values, dtype=np.float64)  # a null becomes NaN, which is refused with its row
    _check_labels(path, ids, label_0)
    return Labels(ids, label_0, columns)


def write_labels(folder: Path, name: str, labels: Labels) -> Path:
    """Write `folder/labels/<name>.parquet` atomically, replacing an older one, and return its path.

    Raises:
        UserError: what `read_labels` would refuse.
        ValueError: columns of unequal length.
    """
    path = _named(folder, "labels", name)
    columns = {"pair_id": pa.array(labels.pair_id, pa.string()), "label_0": pa.array(np.asarray(labels.label_0, dtype=np.float64))}
    columns |= {key: pa.array(values) for key, values in labels.extra.items()}
    table = pa.table(columns)
    _check_columns(path, table.schema, LABEL_COLUMNS, LABEL_EXTRAS)
    _check_labels(path, labels.pair_id, np.asarray(labels.label_0))
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    return path


def align(labels: Labels, ids: Sequence[str], *, folder: Path, name: str, complete: bool = False) -> np.ndarray:
    """Labels in the order of the pairs.

    Args:
        labels: read from `folder/labels/<name>.parquet`.
        ids: the N pair_ids of the dataset.
        folder, name: for messages.
        complete: every pair must have a label.

    Returns:
        (N,) float64, NaN where there is no label.

    Raises:
        UserError: a label of an unknown pair; with `complete`, a pair without a label.
    """
    path = _named(folder, "labels", name)
    place = {pair_id: i for i, pair_id in enumerate(ids)}
    rows = [place.get(pair_id, -1) for pair_id in labels.pair_id]
    if -1 in rows:
        row = rows.index(-1)
        raise UserError(f"{path} row {row}: pair_id {labels.pair_id[row]!r} is none of the dataset's pairs; remove the row")
    aligned = np.full(len(ids), np.nan)
    aligned[rows] = labels.label_0
    missing = np.flatnonzero(np.isnan(aligned))
    if complete and missing.size:
        covered = f"covers {len(ids) - missing.size} of {len(ids)} pairs (first missing: {ids[missing[0]]!r})"
        raise UserError(f"{path} {covered}; run `dedpo label` again")
    return aligned


# ---- targets


def _check_targets(path: Path, ids: Sequence[str], target: np.ndarray, weight: np.ndarray) -> None:
    for name, good in (("target", np.isfinite(target)), ("weight", np.isfinite(weight) & (weight >= 0))):
        bad = np.flatnonzero(~good)
        if bad.size:
            raise UserError(f"{path} row {bad[0]}: {name} is missing, infinite or negative; run `dedpo merge` again")
    _check_unique(path, ids)


def read_targets(folder: Path, name: str) -> Targets:
    """Read `folder/targets/<name>.parquet`.

    Raises:
        UserError: no such file, a missing or extra column, a value that is not finite, a negative weight, a pair_id twice.
    """
    path = _existing(folder, "targets", name)
    with _open(path) as file:
        _check_columns(path, file.schema_arrow, TARGET_COLUMNS, source=False)
        _check_types(path, file.schema_arrow, {"pair_id": "text", "target": "a number", "weight": "a number"})
        columns = file.read(use_threads=False).to_pydict()
    target, weight = (np.array(columns[name], dtype=np.float64) for name in ("target", "weight"))
    _check_no_nulls(path, "pair_id", columns["pair_id"])
    _check_targets(path, columns["pair_id"], target, weight)
    return Targets(columns["pair_id"], target, weight)


def write_targets(folder: Path, name: str, targets: Targets, report: dict[str, Any]) -> Path:
    """Write `folder/targets/<name>.parquet` and the report beside it as JSON, each atomically; return the parquet's path."""
    path = _named(folder, "targets", name)
    target, weight = np.asarray(targets.target, dtype=np.float64), np.asarray(targets.weight, dtype=np.float64)
    _check_targets(path, targets.pair_id, target, weight)
    table = pa.table({"pair_id": pa.array(targets.pair_id, pa.string()), "target": pa.array(target), "weight": pa.array(weight)})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    write_json(path.with_suffix(".json"), report)
    return path
