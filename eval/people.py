"""What people said of two models' images: `ARM/votes/NAME.parquet`, written by `dedpo vote BASE ARM` and read by `dedpo compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dedpo_diffusion.console import UserError
from dedpo_diffusion.evaluation.score import Row, images_digest

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("file_base", "file", "prompt_index", "seed", "rater", "preferred", "repeat")


@dataclass(frozen=True)
class Votes:
    """Single answers about pairs of images, V of them.

    Attributes:
        row: (V,) which row of the arm.
        rater: V names.
        preferred: (V,) 1 the arm's image, 0 the base's, 0.5 a tie.
        repeat: (V,) whether the rater had answered this pair before.
    """

    row: np.ndarray
    rater: list[str]
    preferred: np.ndarray
    repeat: np.ndarray


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
    answers = []
    for path in sorted((arm / "votes").glob("*.parquet")):
        try:
            table = pq.read_table(path)
            held = table.schema.metadata or {}
            if all(held.get(key) == value for key, value in mine.items()):
                answers += table.select(COLUMNS).to_pylist()
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read as votes ({error}); restore it, or remove it") from error
    if not answers:
        return None
    return Votes(
        np.array([place[answer["file"]] for answer in answers]),
        [answer["rater"] for answer in answers],
        np.array([answer["preferred"] for answer in answers], dtype=np.float64),
        np.array([answer["repeat"] for answer in answers], dtype=bool),
    )
