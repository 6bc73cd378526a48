"""What an importer makes of a source's row: one comparison of two images, as the source has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from dedpo_diffusion.core.console import UserError

ImageSource = bytes | Path | None  # an encoded file's bytes, where the file lies, or nothing


@dataclass(frozen=True)
class Answer:
    """`votes` people gave the answer `label_0`, in [0, 1]: 1 image 0, 0 image 1, 0.5 a tie; `rater` names one of them."""

    label_0: float
    rater: str | None = None
    votes: int = 1


@dataclass(frozen=True)
class Comparison:
    """One comparison, in the source's own order of the two images.

    Attributes:
        where: file and row, for messages.
        prompt: the text both images were made for.
        images: the two images; a file is read when its turn comes.
        answers: what people said; empty where nobody answered.
        key: the source's own name of this comparison, of which the pair_id is made; None where it has none.
        same: the source says that this is one image twice.
        source: what else to keep with the pair, as source_* columns.
        pair_id: the id that the pair had in the dataset it was exported from, which it keeps; None for pairs from elsewhere.
        noted: what is odd about it, in words, and how often: it is counted and said.
    """

    where: str
    prompt: str
    images: tuple[ImageSource, ImageSource]
    answers: tuple[Answer, ...] = ()
    key: str | None = None
    same: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    pair_id: str | None = None
    noted: Mapping[str, int] = field(default_factory=dict)


def counted(image_0: int, image_1: int, ties: int = 0) -> tuple[Answer, ...]:
    """Answers from vote counts."""
    counts = ((1.0, image_0), (0.0, image_1), (0.5, ties))
    return tuple(Answer(label, votes=int(votes)) for label, votes in counts if votes)


def better(rank_0: float, rank_1: float) -> float:
    """label_0 of two ranks, of which 1 is the best."""
    return 1.0 if rank_0 < rank_1 else 0.0 if rank_0 > rank_1 else 0.5


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value of a row holds several values; text and bytes do not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@lru_cache(maxsize=64)
def is_folder(path: Path) -> bool:
    """Whether there is such a folder, asked of the disk once: every row of a source asks the same."""
    return path.is_dir()


def image_source(value: Any, folder: Path | None, where: str) -> ImageSource:
    """An image as tables hold it: bytes, a path, or the {"bytes", "path"} of `datasets`.

    Args:
        value: what the row holds.
        folder: what relative paths are relative to; None where the source has no files beside it.
        where: file, row and column, for messages.

    Raises:
        UserError: a path without a folder, a path that leaves the folder, or a value of another kind.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str | Path):
        raise UserError(f"{where} holds {type(value).__name__}, and must hold an image file's bytes or its path; convert it")
    if str(value).startswith(("http://", "https://")):
        raise UserError(f"{where} is an address ({value}); download the images and give their paths")
    if folder is None:
        raise UserError(f"{where} is a path ({value}), and the source has no folder of images; give it with --images")
    return _inside(Path(value), folder, where)


def _inside(path: Path, folder: Path, where: str) -> Path:
    """The path, below `folder` unless it is absolute: a table from elsewhere must not reach into other folders by `..`."""
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise UserError(f"{where}: {path} leaves {folder}; give --images the folder that all paths are relative to")
    return folder / path


def number(value: Any, where: str) -> float | None:
    """A number, or a number as text; None for nothing, an empty text and NaN.

    Raises:
        UserError: no number.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {value!r}, and must be a number; mend the row") from error
    return None if math.isnan(found) else found


def text(value: Any, where: str) -> str:
    """Text as it stands; UserError where there is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise UserError(
            f"{where} is {'missing' if value is None else type(value).__name__}, and must be text; fill it in or remove the row"
        )
    return value
