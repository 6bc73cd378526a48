"""Row sources: where the rows of a preference format lie, whatever they say.

A source is opened by what it is (a file's ending, what a folder holds, a hub id) and yields located raw rows; what a row
means is a format's business. Nothing is decoded or interpreted here.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Row, Source, fingerprint, listed, picked, split_file
from dedpo_diffusion.pairs.formats.sources.hub import HubSource, SavedSource, is_saved
from dedpo_diffusion.pairs.formats.sources.imagefolder import METADATA, ImageFolderSource
from dedpo_diffusion.pairs.formats.sources.parquet import ParquetSource
from dedpo_diffusion.pairs.formats.sources.texts import CsvSource, JsonLinesSource, JsonSource
from dedpo_diffusion.pairs.formats.sources.webdataset import WebdatasetSource
from dedpo_diffusion.settings import IngestSettings

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
TARS = (".tar", ".tar.gz", ".tgz")
ENDINGS = (".parquet", *TABLES, *TARS)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

__all__ = ["METADATA", "Located", "Row", "Source", "fingerprint", "is_saved", "listed", "open_file", "open_source", "picked", "split_file"]


def open_source(source: str, settings: IngestSettings) -> Source:
    """Open a file, a folder or a hub dataset.

    Args:
        source: a parquet, JSON, JSON lines, CSV, TSV or tar file; a folder of parquet or tar files, an image folder, a folder
            that `datasets` saved, or a folder with one table; or OWNER/NAME on the hub.
        settings: `split` chooses among several, `images` is what relative paths are relative to.

    Raises:
        UserError: nothing there, nothing that can be read, or several things or splits to choose from.
    """
    images = settings.images
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images} is no folder; give the folder that the image paths are relative to")
    path = Path(source)
    if path.is_file():
        if settings.split is not None:
            raise UserError(f"{path} is one file, which has no splits; leave out --split")
        return open_file(path, images, path=source)
    if path.is_dir():
        return _open_folder(source, path, settings)
    if HUB_ID.fullmatch(source) and not source.startswith(".") and not source.lower().endswith(ENDINGS):
        return HubSource(source, settings.split, images)
    if source.lower().endswith(ENDINGS):
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1) if path.parent.is_dir() else []
        raise UserError(
            f"there is no file {source}; " + (f"did you mean {path.parent / near[0]}?" if near else "give the location of the data")
        )
    raise UserError(f"{source} is no file, no folder and no hub id (OWNER/NAME); give the location of the data")


def open_file(file: Path, folder: Path | None = None, *, path: str | None = None) -> Source:
    """Open one file by its ending.

    Args:
        file: the file.
        folder: what relative paths in it are relative to; None takes the file's folder.
        path: the source as the user gave it, if it is not the file.

    Raises:
        UserError: it cannot be read, or has another ending.
    """
    given, ending, name = path or str(file), file.suffix.lower(), file.name.lower()
    images = folder or file.parent
    if path is not None and name in METADATA and _is_metadata(file):
        return ImageFolderSource(given, [file], file.parent, folder, open_file)
    if ending == ".parquet":
        return ParquetSource(given, [file], file.parent, images)
    if ending == ".json":
        return JsonSource(given, file, images)
    if ending in (".jsonl", ".ndjson"):
        return JsonLinesSource(given, file, images)
    if ending in (".csv", ".tsv"):
        return CsvSource(given, file, images)
    if name.endswith(TARS):
        return WebdatasetSource(given, [file], file.parent, images)
    raise UserError(f"{file} has an ending of no known kind; give a file named {', '.join(ENDINGS)}, or a folder")


def _is_metadata(file: Path) -> bool:
    """Whether this table of an image folder's usual name tells of images by X_file_name."""
    return any(name.endswith("file_name") for name in open_file(file).columns)


def _open_folder(source: str, folder: Path, settings: IngestSettings) -> Source:
    """Open what a folder holds: the first of saved dataset, image folder, parquet or tar files, one table."""
    if is_saved(folder):
        return SavedSource(source, folder, settings.split, settings.images or folder)
    images = settings.images or folder
    metadata = [path for path in listed(folder, METADATA) if path.name.lower() in METADATA and _is_metadata(path)]
    if metadata:
        return ImageFolderSource(source, picked(metadata, folder, settings.split), folder, settings.images, open_file)
    parquet, tars = listed(folder, (".parquet",)), listed(folder, TARS)
    if parquet and tars:
        raise UserError(f"{folder} holds parquet files ({parquet[0].name}, ...) and tar files ({tars[0].name}, ...); give one kind")
    if parquet:
        return ParquetSource(source, picked(parquet, folder, settings.split), folder, images)
    if tars:
        return WebdatasetSource(source, picked(tars, folder, settings.split), folder, images)
    return _open_only_table(source, folder, settings)


def _open_only_table(source: str, folder: Path, settings: IngestSettings) -> Source:
    tables = [path for path in listed(folder, TABLES) if path.parent == folder]
    if not tables:
        raise UserError(f"{folder} holds no table ({', '.join(ENDINGS)}) that could be read; give the file or the folder of the pairs")
    chosen = tables if settings.split is None else picked(tables, folder, settings.split)
    if len(chosen) > 1:
        raise UserError(f"{folder} holds several tables ({', '.join(path.name for path in chosen)}); give one of them")
    return open_file(chosen[0], settings.images, path=source)
