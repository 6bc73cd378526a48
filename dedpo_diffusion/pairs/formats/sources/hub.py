"""Rows of datasets of the `datasets` library: saved to disk, or streamed from the hub. Images come undecoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Source, fingerprint, listed

BATCH = 32  # rows in memory
FETCHED = "hf://"  # how the hub's own files are named; other addresses in a row are not followed
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes beside the tables
LOCAL = "download it (`hf download NAME --repo-type dataset --local-dir FOLDER`) and give the folder"


class SavedSource(Source):
    """A Dataset or one split of a DatasetDict that save_to_disk wrote.

    Args:
        path: the source as the user gave it.
        root: its folder.
        split: the split's name; None where there is only one.
        folder: what relative paths are relative to.

    Raises:
        UserError: it cannot be loaded, has several splits and none is chosen, or lacks the chosen one.
    """

    kind = "datasets"

    def __init__(self, path: str, root: Path, split: str | None, folder: Path | None) -> None:
        from datasets import DatasetDict, load_from_disk

        try:
            loaded = load_from_disk(str(root))
        except Exception as error:
            raise UserError(f"{root} cannot be loaded by `datasets` ({_line(error)}); save or copy it again") from error
        self.place = str(root)
        if isinstance(loaded, DatasetDict):
            name = _choose(str(root), list(loaded), split)
            loaded, self.place = loaded[name], f"{root} split {name}"
        elif split is not None:
            raise UserError(f"{root} has no splits; leave out --split")
        self.table, self.folder = loaded.with_format("arrow"), folder  # arrow rows hold images as they are stored
        super().__init__(path, loaded.column_names, len(loaded), fingerprint(listed(root, ("",)), root))

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on, which are found at once."""
        for first in range(start, len(self.table), BATCH):
            for number, row in enumerate(self.table[first : first + BATCH].to_pylist(), first):
                yield f"{self.place} row {number}", row, self.folder


class HubSource(Source):
    """A split of a dataset, streamed: nothing of it is stored here, and no code of it is run.

    Args:
        name: OWNER/NAME on the hub.
        split: the split's name; None where there is only one.
        folder: what relative paths are relative to.

    Raises:
        UserError: it cannot be reached or streamed, has several splits and none is chosen, or lacks the chosen one.
    """

    kind = "hub"

    def __init__(self, name: str, split: str | None, folder: Path | None) -> None:
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(name)
            splits = builder.as_streaming_dataset()
        except Exception as error:
            raise UserError(_refusal(name, error)) from error
        self.split = _choose(name, list(splits), split)
        self.stream, self.folder = splits[self.split].decode(False), folder
        known = (builder.info.splits or {}).get(self.split)
        print_ = hashlib.sha256(f"{name}\0{self.split}\0{builder.hash}".encode()).hexdigest()
        super().__init__(name, (), known.num_examples if known else None, print_)
        self.columns = tuple(self.first() or ())

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on; where the hub's files cannot be skipped, earlier rows are read and dropped."""
        stream, number = iter(self.stream.skip(start) if start else self.stream), start
        while True:
            try:
                row = next(stream)
                row = {name: _fetched(value) for name, value in row.items()}
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"{self.path} split {self.split} could not be read at row {number} ({_line(error)}); "
                    f"give the same command again to resume, or {LOCAL}"
                ) from error
            yield f"{self.path} split {self.split} row {number}", row, self.folder
            number += 1


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((folder / name).is_file() for name in SAVED)


def _choose(where: str, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise UserError(f"{where} has several splits ({', '.join(splits)}); say which with --split")
    if split not in splits:
        raise UserError(f"{where} has no split {split!r} (it has {', '.join(splits)})")
    return split


def _refusal(name: str, error: Exception) -> str:
    """Why a hub dataset cannot be streamed, and what to do instead."""
    told = str(error)
    if "script" in told.lower():
        return f"{name} needs a program of its own to be read ({_line(error)}), which is never run here; {LOCAL}"
    if "config name is missing" in told.lower():
        return f"{name} holds several tables ({_line(error)}); {LOCAL} of one of them"
    return f"{name} is no file or folder here, and as a hub dataset it cannot be reached ({_line(error)}); check the name, or {LOCAL}"


def _line(error: Exception) -> str:
    """A library's message, in one line of bearable length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:300]} ..."


def _fetched(value: Any) -> Any:
    """A streamed value, with the bytes of an image that the hub holds as a file of its own."""
    if isinstance(value, list):
        return [_fetched(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"bytes", "path"} and value["bytes"] is None and str(value["path"]).split("::")[-1].startswith(FETCHED):
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": value["path"]}
    return {name: _fetched(item) for name, item in value.items()}
