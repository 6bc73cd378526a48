"""Rows of an image folder: image files, and a metadata table beside them that says which belong to which row.

    FOLDER/metadata.jsonl (or .csv, .parquet)   {"prompt": ..., "image_0_file_name": "a.png", "image_1_file_name": "b.png", ...}

The column X_file_name becomes the image column X. Paths are relative to the metadata file's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Source, fingerprint

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME = "_file_name"


class ImageFolderSource(Source):
    """The metadata files of an image folder, one after the other.

    Args:
        path: the source as the user gave it.
        files: the metadata files, in order.
        root: what they lie below.
        folder: what relative paths are relative to; None takes the folder of each metadata file.
        open_file: opens one table file, given its path and the folder of its images.

    Raises:
        UserError: only one image a row, or files of different kinds or columns.
    """

    kind = "imagefolder"

    def __init__(
        self, path: str, files: Sequence[Path], root: Path, folder: Path | None, open_file: Callable[[Path, Path], Source]
    ) -> None:
        self.tables = [open_file(file, folder or file.parent) for file in files]
        for file in files:
            if file.suffix.lower() != files[0].suffix.lower():
                raise UserError(f"{files[0]} and {file} are of different kinds; make them alike, or remove the one that repeats the other")
        names = [_renamed(file, table.columns) for file, table in zip(files, self.tables, strict=True)]
        self.names = names[0]
        for file, found in zip(files, names, strict=True):
            if set(found) != set(self.names):
                different = ", ".join(sorted(set(found) ^ set(self.names)))
                raise UserError(f"{file} and {files[0]} have different columns ({different}); make them alike, or give one of them")
        counts = [table.count for table in self.tables]
        total = None if None in counts else sum(count or 0 for count in counts)
        super().__init__(path, tuple(self.names.values()), total, fingerprint(files, root, contents=True))

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on."""
        located = (found for table in self.tables for found in table.rows())  # text alone, so skipping is cheap
        for where, row, folder in islice(located, start, None):
            yield where, {self.names[name]: value for name, value in row.items()}, folder


def _renamed(file: Path, columns: Sequence[str]) -> dict[str, str]:
    """The metadata's column names, and what they are called here."""
    names = {name: name.removesuffix(NAME) if name != NAME else name for name in columns}
    if not any(name != called for name, called in names.items()):
        one = " ('file_name' names one image only)" if "file_name" in columns else ""
        raise UserError(
            f"{file} has the columns {', '.join(columns)}, and a pair needs two images{one}; "
            f"name them in columns image_0{NAME} and image_1{NAME}"
        )
    called = list(names.values())
    for name in called:
        if called.count(name) > 1:
            raise UserError(f"{file} has both a column {name!r} and a column '{name}{NAME}'; rename one")
    return names
