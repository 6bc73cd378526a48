"""Pick-a-Pic v1 and v2 (arXiv 2305.01569): parquet with caption, jpg_0, jpg_1 and labels.

Traps of the format: label_0 = 0.5 is a tie, not a win of image 0; has_label = False means that nobody answered, whatever
label_0 says; are_different = False is one image twice, and some files lack that column.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..console import UserError
from ..decoding import decode_image
from ..records import Pair
from ..settings import IngestSettings

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "are_different")
SOURCE = (  # kept with each pair, as source_*
    "ranking_id",
    "user_id",
    "image_0_uid",
    "image_1_uid",
    "best_image_uid",
    "model_0",
    "model_1",
    "num_example_per_prompt",
    "created_at",
)
BATCH = 32  # rows in memory


def files(source: Path) -> list[Path]:
    """The parquet files of a source, in order, each with the columns that are needed.

    Raises:
        UserError: no such file or folder, no parquet in it, or a column is missing.
    """
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not paths or not source.exists():
        raise UserError(f"{source} is neither a parquet file nor a folder of parquet files; give the download's location")
    for path in paths:
        with _open(path) as file:
            _check_columns(path, file.schema_arrow.names)
    return paths


def rows(source: Path) -> int:
    """How many rows a source has."""
    return sum(_open(path).metadata.num_rows for path in files(source))


def read(source: Path, settings: IngestSettings, counts: Counter[str]) -> Iterator[tuple[Pair, float | None]]:
    """Stream the pairs of a source with their human label, None where nobody answered.

    Args:
        source: a parquet file, or a folder of them (searched deeply, in the order of their names).
        settings: what becomes of ties, unlabelled and identical pairs and unreadable images.
        counts: counts `rows`, `identical`, `unlabelled` and `ties` as seen, each `..._dropped`, `unreadable_dropped`,
            `labelled` and `kept`; rows is kept plus everything dropped.

    Raises:
        UserError: a missing column, an impossible label, or (unless skipped) an unreadable image; names file and row.
    """
    for path in files(source):
        with _open(path) as file:
            columns = [name for name in (*REQUIRED, *OPTIONAL, *SOURCE) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    found = _read_row(row, path, number, settings, counts)
                    number += 1
                    if found is not None:
                        yield found


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); download it again") from error


def _check_columns(path: Path, names: list[str]) -> None:
    for name in REQUIRED:
        if name not in names:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(names)}); is it Pick-a-Pic with images?")


def _read_row(
    row: dict[str, Any], path: Path, number: int, settings: IngestSettings, counts: Counter[str]
) -> tuple[Pair, float | None] | None:
    """One row's pair and label, None where it is dropped; each row is dropped, and counted as such, for one reason."""
    where = f"{path} row {number}"
    label = _label(row, where)
    counts["rows"] += 1
    fate = {"identical": settings.identical, "unlabelled": settings.unlabelled, "ties": settings.ties}
    kinds = [kind for kind, found in (("identical", _identical(row)), ("unlabelled", label is None), ("ties", label == 0.5)) if found]
    counts.update(kinds)
    dropped = next((kind for kind in kinds if fate[kind] == "drop"), None)
    if dropped is None and not _readable(row, where, settings.unreadable == "skip"):
        dropped = "unreadable"
    if dropped is not None:
        counts[f"{dropped}_dropped"] += 1
        return None
    counts["kept"] += 1
    counts["labelled"] += label is not None
    return _pair(row, path, number, where), label


def _label(row: dict[str, Any], where: str) -> float | None:
    """The human label, None where nobody answered."""
    values = [math.nan if row[name] is None else float(row[name]) for name in ("label_0", "label_1")]
    answered = row["has_label"] if row.get("has_label") is not None else not any(math.isnan(value) for value in values)
    if not answered:
        return None
    if not (0 <= values[0] <= 1 and abs(sum(values) - 1) < 1e-6):
        shown = f"label_0 is {row['label_0']} and label_1 is {row['label_1']}"
        raise UserError(f"{where}: {shown}; both must lie in [0, 1] and add up to 1. Mend the row, or set has_label to False")
    return values[0]


def _identical(row: dict[str, Any]) -> bool:
    return row.get("are_different") is False or (row["jpg_0"] is not None and row["jpg_0"] == row["jpg_1"])


def _readable(row: dict[str, Any], where: str, skip: bool) -> bool:
    """Whether both images decode; an error unless `skip`."""
    try:
        for name in ("jpg_0", "jpg_1"):
            decode_image(row[name] or b"", f"{where}, {name}")
    except UserError as error:
        if not skip:
            raise UserError(f"{error} with --unreadable skip") from error
        return False
    return True


def _pair(row: dict[str, Any], path: Path, number: int, where: str) -> Pair:
    if row["caption"] is None:
        raise UserError(f"{where}: caption is missing; fill it in or remove the row")
    ranking = row.get("ranking_id")
    pair_id = f"pickapic-{path.stem}-{number}" if ranking is None else f"pickapic-{ranking}"
    return Pair(pair_id, row["caption"], row["jpg_0"], row["jpg_1"], {name: row[name] for name in SOURCE if name in row})
