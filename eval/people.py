"""What people said of two models' images: `ARM/votes/NAME.parquet`, written by `dedpo vote BASE ARM` and read by `dedpo compare`.

| column | what it holds |
|---|---|
| file_base, file | the two images, in the base's folder and in the arm's |
| prompt, prompt_index, seed | as in the arm's index |
| rater | who answered; empty where nobody was asked, since both pictures are the same: such a row is a tie |
| preferred | 1 the arm's image, 0 the base's, 0.5 a tie |
| repeat | whether this is a hidden repetition, which measures the rater and nothing else |
| swapped, seconds, time | whether the arm stood on the left, how long it took, when; null where nobody was asked |

Metadata: fingerprints of all images of both folders (base_images, arm_images), the base's folder name, the voting's session and design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError
from dedpo_diffusion.evaluation.samples import Row, images_digest

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("file_base", "file", "prompt_index", "seed", "rater", "preferred", "repeat")
TYPES = {
    "file_base": "string", "file": "string", "prompt": "string", "prompt_index": "int64", "seed": "int64", "rater": "string",
    "preferred": "float64", "repeat": "bool", "swapped": "bool", "seconds": "float64", "time": "string",
}  # fmt: skip


@dataclass(frozen=True)
class Votes:
    """Single answers about pairs of images, V of them.

    Attributes:
        row: (V,) which row of the arm.
        rater: V names; "" where nobody was asked, since both pictures are the same.
        preferred: (V,) 1 the arm's image, 0 the base's, 0.5 a tie; 0.5 where nobody was asked.
        repeat: (V,) whether the rater had answered this pair before: says how consistent people are, not which image is better.
    """

    row: np.ndarray
    rater: list[str]
    preferred: np.ndarray
    repeat: np.ndarray


def write_votes(arm: Path, name: str, answers: Sequence[Row], metadata: dict[str, Any]) -> Path:
    """Write `ARM/votes/NAME.parquet` atomically, replacing an older one, and return its path.

    Args:
        arm: the sample folder.
        name: the voting's.
        answers: rows with all columns of this module's table.
        metadata: base_images, arm_images, base, session, design; what is not text becomes JSON.
    """
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.files import atomic_file

    path = arm / "votes" / f"{name}.parquet"
    held = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    schema = pa.schema([(column, pa.type_for_alias(kind)) for column, kind in TYPES.items()], metadata=held)
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(answers), schema=schema), temporary)
    return path


def votes_session(path: Path) -> str | None:
    """The session of the voting that made a vote file; None where it says nothing, or there is no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        held = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return held[b"session"].decode() if b"session" in held else None


def read_votes(base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> Votes | None:
    """All votes that an arm's folder holds on its present images against the base's present ones; None where there are none.

    A file of votes on other images, of this arm or against another base, does not count.

    Args:
        base, arm: sample folders.
        base_rows, arm_rows: of their indexes.

    Raises:
        UserError: a file that cannot be read.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    mine = {b"base_images": images_digest(base, base_rows).encode(), b"arm_images": images_digest(arm, arm_rows).encode()}
    place = {row["file"]: number for number, row in enumerate(arm_rows)}
    answers: list[Row] = []
    for path in sorted((arm / "votes").glob("*.parquet")):
        try:
            table = pq.read_table(path)
            held = table.schema.metadata or {}
            if all(held.get(key) == value for key, value in mine.items()):
                found = table.select(COLUMNS).to_pylist()
                _check(found, place)
                answers += found
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read as votes ({error}); restore it, or remove it") from error
    if not answers:
        return None
    return Votes(
        np.array([place[answer["file"]] for answer in answers]),
        [answer["rater"] for answer in answers],
        np.array([answer["preferred"] for answer in answers], dtype=np.float64),
        np.array([answer["repeat"] for answer in answers], dtype=bool),
    )


def _check(answers: Sequence[Row], place: dict[str, int]) -> None:
    """ValueError where an answer is none, or about no image of the arm."""
    for number, answer in enumerate(answers):
        if answer["file"] not in place:
            raise ValueError(f"row {number} is about {answer['file']!r}, which the folder does not list")
        if answer["preferred"] not in (0, 0.5, 1) or answer["rater"] is None or answer["repeat"] is None:
            raise ValueError(f"row {number} is no answer: preferred {answer['preferred']}, rater {answer['rater']!r}")
