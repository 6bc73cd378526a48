"""Rows of parquet files, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Row, Source, fingerprint

BATCH = 32  # rows in memory
BUFFER = 1 << 20  # bytes read at once of each column; else whole row groups are read (a page is always read whole)


class ParquetSource(Source):
    """One or more parquet files with the same columns.

    Args:
        path: the source as the user gave it.
        files: the files, in order.
        root: what they lie below.
        folder: what relative paths are relative to.

    Raises:
        UserError: a file that is no parquet, or whose columns differ from the first file's.
    """

    kind = "parquet"

    def __init__(self, path: str, files: Sequence[Path], root: Path, folder: Path | None) -> None:
        self.files, self.folder = list(files), folder
        self.groups: list[list[int]] = []  # rows of each row group of each file
        columns: list[str] = []
        for file in self.files:
            with _open(file) as opened:
                names, header = opened.schema_arrow.names, opened.metadata
                columns = columns or names
                _check_columns(file, names, self.files[0], columns)
                self.groups.append([header.row_group(k).num_rows for k in range(header.num_row_groups)])
        super().__init__(path, columns, sum(map(sum, self.groups)), fingerprint(self.files, root))

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on; row groups before it are not read."""
        for file, groups in zip(self.files, self.groups, strict=True):
            if start >= sum(groups):
                start -= sum(groups)
                continue
            skipped, group = 0, 0
            while skipped + groups[group] <= start:
                skipped, group = skipped + groups[group], group + 1
            yield from self._file_rows(file, list(range(group, len(groups))), skipped, start)
            start = 0

    def _file_rows(self, file: Path, groups: list[int], number: int, start: int) -> Iterator[Located]:
        """Rows of one file's row groups, of which the first begins with row `number`, from row `start` on."""
        with _open(file) as opened:
            batches = opened.iter_batches(batch_size=BATCH, row_groups=groups, use_threads=False)
            while (batch := _next(batches, file, number)) is not None:
                skip = min(max(0, start - number), batch.num_rows)
                for i, row in enumerate(_rows(batch.slice(skip), file, number + skip), number + skip):
                    yield f"{file} row {i}", row, self.folder
                number += batch.num_rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); download or write it again") from error


def _rows(batch: pa.RecordBatch, file: Path, number: int) -> list[Row]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:  # parquet does not look into its texts
        row, name = next((i, name) for i in range(batch.num_rows) for name in batch.schema.names if not _is_text(batch.column(name)[i]))
        raise UserError(f"{file} row {number + row}: {name} is not UTF-8 text; write the file again") from error


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _next(batches: Iterator[pa.RecordBatch], file: Path, number: int) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged behind row {number} ({error}); download or write it again") from error


def _check_columns(file: Path, names: list[str], first: Path, wanted: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{file} has two columns named {name!r}; remove one")
    for name in wanted:
        if name not in names:
            raise UserError(f"{file} has no column {name!r}, and {first} has; move one of them elsewhere")
    for name in names:
        if name not in wanted:
            raise UserError(f"{file} has a column {name!r}, and {first} has not; move one of them elsewhere")
