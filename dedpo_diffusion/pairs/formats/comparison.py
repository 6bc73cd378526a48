"""What an importer makes of a source's row: one comparison of two images, as the source has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import misfit, shown
from dedpo_diffusion.pairs.formats.image_values import ImageSource as ImageSource
from dedpo_diffusion.pairs.formats.image_values import Unreadable as Unreadable
from dedpo_diffusion.pairs.formats.image_values import image_source as image_source


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


def number(value: Any, where: str) -> float | None:
    """A number, or a number as text; None for nothing, an empty text and NaN.

    Raises:
        UserError: no number, or one that no float can hold.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {shown(value)}, and must be a number; mend the row") from error
    except OverflowError as error:
        raise UserError(f"{where} is a number of {len(str(value))} digits, more than can be counted with; mend the row") from error
    return None if math.isnan(found) else found


def text(value: Any, where: str) -> str:
    """Text as it stands; UserError where there is none, or it holds what no file can."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise UserError(
            f"{where} is {'missing' if value is None else type(value).__name__}, and must be text; fill it in or remove the row"
        )
    wrong = misfit(value)
    if wrong is not None:
        raise UserError(f"{where} {wrong}; mend it, or remove the row")
    return value
