"""What every row source offers, and which files of a folder it reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest

Row = dict[str, Any]
Located = tuple[str, Row, Path | None]  # where the row stands, the row, the folder that its paths are relative to

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")  # what splits' names begin with
SHARD = re.compile(r"(.+)-\d+-of-\d+")  # train-00000-of-00004-0a1b2c.parquet


class Source:
    """Rows of a file, a folder or a hub dataset, each with the place it stands at.

    Attributes:
        path: the source as the user gave it.
        kind: "parquet", "json", "jsonl", "csv", "webdataset", "datasets", "imagefolder" or "hub".
        columns: names of the values in a row.
        count: how many rows there are; None where only reading them tells.
        fingerprint: digest of the names and sizes of all files, of text tables also of their contents: an import that goes on
            must find the same.
    """

    kind = ""
    _first: list[Row | None] | None = None

    def __init__(self, path: str, columns: Sequence[str], count: int | None, fingerprint: str) -> None:
        self.path, self.columns, self.count, self.fingerprint = path, tuple(columns), count, fingerprint

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on (0-based), read as they are asked for; earlier ones are skipped as cheaply as the kind allows.

        Yields:
            Place ("FILE row N" counted from 0; in text files "FILE line N", from 1), the row, and the folder that relative
            paths in it are relative to, None where there is none.
        """
        raise NotImplementedError

    def first(self) -> Row | None:
        """The first row, None where there is none; read once."""
        if self._first is None:
            self._first = [next((row for _, row, _ in self.rows()), None)]
        return self._first[0]


def fingerprint(files: Iterable[Path], root: Path, *, contents: bool = False) -> str:
    """Digest of the files' names below `root` and their sizes; of small tables also of what they hold."""
    lines = [f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0{file_digest(path) if contents else ''}" for path in files]
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def listed(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files below a folder whose names end so, by name; hidden files and folders (a download's cache) are passed over."""
    found = [path for path in folder.rglob("*") if path.name.lower().endswith(tuple(endings))]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).parts)


def picked(files: Sequence[Path], folder: Path, split: str | None) -> list[Path]:
    """The files of one split, which their names tell (train-00000-of-00004.parquet, train.jsonl, train/0000.parquet).

    Args:
        files: files below `folder`.
        folder: the source.
        split: the split's name; None where there is only one.

    Raises:
        UserError: several splits and no choice, or no file of that split.
    """
    names = {path: _split(path.relative_to(folder)) for path in files}
    there = sorted({name for name in names.values() if name is not None})
    if split is None:
        if len(there) > 1:
            raise UserError(f"{folder} has several splits ({', '.join(there)}); say which with --split")
        return list(files)
    chosen = [path for path in files if split == names[path] or _is_of(path.relative_to(folder), split)]
    if not chosen:
        raise UserError(f"{folder} has no split {split!r} (it has {', '.join(there) or 'no splits, so leave out --split'})")
    return chosen


def split_file(files: Mapping[str, Path], split: str | None, folder: Path) -> tuple[str, Path]:
    """The split that is asked for and its file, or the only one, of a source with a file for each split.

    Raises:
        UserError: several and no choice, or none of that name.
    """
    split = split or (next(iter(files)) if len(files) == 1 else None)
    if split is None or split not in files:
        shown = "has several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{folder} {shown}; give --split one of {', '.join(files)}")
    return split, files[split]


def _stem(path: Path) -> str:
    return path.name.split(".", 1)[0]


def _is_of(path: Path, split: str) -> bool:
    return _stem(path) == split or path.name.startswith(f"{split}-") or split in path.parts[:-1]


def _split(path: Path) -> str | None:
    """The split that a file's name or folder tells, None where they tell none."""
    shard = SHARD.match(path.name)
    if shard:
        return shard[1]
    if _begins_as_split(_stem(path)):
        return re.split(r"-\d", _stem(path))[0]
    return next((part for part in reversed(path.parts[:-1]) if _begins_as_split(part)), None)


def _begins_as_split(name: str) -> bool:
    return re.split(r"[_\-.]", name)[0].lower() in SPLITS
