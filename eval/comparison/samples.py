"""A sample folder: what its `index.parquet` says, and its images. Whatever is wrong with it is refused here, with file, row and remedy.

| in the index or the folder | rule |
|---|---|
| a column is missing or of another type, a value is missing | refused |
| a file outside of the folder, or listed twice | refused |
| a prompt twice with the same seed | refused: images are paired by prompt and seed |
| a listed image is missing or cannot be decoded | refused |
| another order of rows, another `prompt_index` | makes no difference |
| images of several sizes; images that the index does not list | told by `dedpo score`; the latter are not scored |
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = ("file", "prompt", "prompt_index", "seed")
WHOLE = ("prompt_index", "seed")  # the others are text
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EDGE = 1 << 16  # bytes at either end of a file that its fingerprint sees
FRESH = 2.0  # seconds in which a file may change once more without another time of change: the coarsest file systems'
REMEDY = "restore it, or remove it and index.parquet and sample again"

Row = dict[str, Any]
_prints: dict[tuple[Any, ...], str] = {}  # by path and state of a file: a process reads a file once


def read_index(folder: Path) -> list[Row]:
    """The rows of a sample folder's index, each with file, prompt, prompt_index and seed, and category (None where there is none).

    Raises:
        UserError: see this module's table; whether an image can be decoded is not looked at.
    """
    path = folder / "index.parquet"
    rows = _read_table(path).to_pylist()
    if not rows:
        raise UserError(f"{path} lists no images; sample again")
    files: dict[PurePath, int] = {}
    pairs: dict[tuple[str, int], int] = {}
    for number, row in enumerate(rows):
        for name in INDEX:
            if row[name] is None:
                raise UserError(f"{path} row {number} has no {name}; mend the row, or sample again")
        file, image = PurePath(row["file"]), folder / row["file"]
        if not file.parts or file.is_absolute() or ".." in file.parts:
            raise UserError(f"{path} row {number}: file {row['file']!r} leads out of the folder; name images as they lie in {folder}")
        if files.setdefault(file, number) != number:
            raise UserError(f"{path} lists {file} in row {files[file]} and again in row {number}; sample again")
        pair = (row["prompt"], row["seed"])
        if pairs.setdefault(pair, number) != number:
            what = f"prompt {row['prompt']!r} with seed {row['seed']} in row {pairs[pair]} and again in row {number}"
            raise UserError(f"{path} lists {what}, and images are paired by prompt and seed; leave one of the rows out, or sample again")
        if not image.is_file():
            raise UserError(f"{image} is missing ({path.name} row {number}); restore it, or sample the folder again")
    return rows


def _read_table(path: Path) -> pa.Table:
    """The columns of an index, of the expected types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"there is no {path}; `dedpo sample --out {path.parent}` makes a sample folder")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); sample again") from error
    if "category" not in table.column_names:
        table = table.append_column("category", pa.nulls(len(table), pa.string()))
    for name in (*INDEX, "category"):
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(table.column_names)}); add it, or sample again")
        kind = table.schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        fits = pa.types.is_integer(kind) if name in WHOLE else pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not fits and not pa.types.is_null(kind):
            wanted = "whole numbers" if name in WHOLE else "text"
            raise UserError(f"{path}: column {name!r} holds {kind}, and must hold {wanted}; write it so, or sample again")
    schema = pa.schema({name: pa.int64() if name in WHOLE else pa.string() for name in (*INDEX, "category")})
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {error}; sample again") from error


def images_digest(folder: Path, rows: Sequence[Row]) -> str:
    """A fingerprint of the images, by name and content: scores of earlier images must not pass for theirs.

    Of a file it sees the size and EDGE bytes at either end; a PNG's last bytes hold a checksum of all its pixels.
    """
    prints = sorted(f"{row['file']} {_fingerprint(folder / row['file'])}" for row in rows)
    return "content-" + hashlib.sha256("\n".join(prints).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    state = path.stat()
    key = (str(path.absolute()), state.st_ino, state.st_size, state.st_mtime_ns)
    if key in _prints:
        return _prints[key]
    with open(path, "rb") as file:
        edges = file.read(EDGE)
        file.seek(max(EDGE, state.st_size - EDGE))
        edges += file.read()
    found = f"{state.st_size} {hashlib.sha256(edges).hexdigest()}"
    if abs(time.time() - state.st_mtime) > FRESH:
        _prints[key] = found
    return found


def resolutions(folder: Path, rows: Sequence[Row]) -> dict[tuple[int, int], int]:
    """How many images there are of each size (width, height), by their headers alone; the commonest first. `rows`: of the index, all.

    Raises:
        UserError: a file that is no image, or one of a kind that is refused.
    """
    from dedpo_diffusion.pairs.decoding import read_header

    images = [folder / row["file"] for row in rows]
    headers = [read_header(image, f"{image} (index.parquet row {number})", remedy=REMEDY) for number, image in enumerate(images)]
    return dict(Counter((header.width, header.height) for header in headers).most_common())


def unlisted(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Names of images that lie where the listed ones lie, and are not listed."""
    listed = {folder / row["file"] for row in rows}
    beside = {path for parent in {image.parent for image in listed} for path in parent.iterdir() if path.suffix.lower() in SUFFIXES}
    return sorted(str(path.relative_to(folder)) for path in beside - listed)


def load_images(folder: Path, rows: Sequence[Row]) -> list[Any]:
    """The images of some rows, RGB.

    Raises:
        UserError: an image that cannot be decoded.
    """
    from dedpo_diffusion.pairs.decoding import decode_image

    paths = [folder / row["file"] for row in rows]
    return [decode_image(path.read_bytes(), str(path), remedy=REMEDY) for path in paths]
