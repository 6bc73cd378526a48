"""What `dedpo pairs export --to datasets`, `imagefolder` and `csv` write: one row a pair, read back as it was.

    pair_id, prompt, image_0, image_1    the pair; it keeps its id
    label_0, votes, rater                what people said, for readers: the mean answer, how many, and who if it was one person
    answers                              the single answers as JSON: [{"label_0": 1.0, "votes": 1, "rater": "ann"}, ...]
    source_...                           what else is known of the pair

Where answers is empty, label_0 and rater count, so that such a table can be filled in by hand. Where both are there they must agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.annotated import ANSWERS, PAIR_ID, earlier_answers
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, image_source, number, text
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
COLUMNS = (PAIR_ID, "prompt", "image_0", "image_1", "label_0", "votes", "rater", ANSWERS)
NEEDS = ", ".join(COLUMNS)
OWN = (COLUMNS,)
READ = ("label_0",)


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    return f"columns {NEEDS}" if set(COLUMNS) <= set(columns) else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a row.

    Raises:
        UserError: no name, or a label that does not agree with the answers.
    """
    pair_id = text(row.get(PAIR_ID), f"{where}, {PAIR_ID}")
    if not pair_id:
        raise UserError(f"{where}: {PAIR_ID} is empty; fill it in, or remove the row")
    image_0, image_1 = (image_source(row.get(side) or None, folder, f"{where}, {side}") for side in ("image_0", "image_1"))
    source = {name.removeprefix("source_"): value for name, value in row.items() if name.startswith("source_") and value not in (None, "")}
    yield Comparison(
        where, text(row.get("prompt"), f"{where}, prompt"), (image_0, image_1), _answers(row, where), source=source, pair_id=pair_id
    )


def _answers(row: Mapping[str, Any], where: str) -> tuple[Answer, ...]:
    """The single answers; where there are none, the label."""
    label = number(row.get("label_0"), f"{where}, label_0")
    answers = earlier_answers(row.get(ANSWERS), where)
    if not answers:
        return () if label is None else (Answer(label, None if row.get("rater") in (None, "") else str(row["rater"])),)
    mean = sum(one.label_0 * one.votes for one in answers) / sum(one.votes for one in answers)
    if label is None or abs(label - mean) > 1e-6:
        raise UserError(
            f"{where}: label_0 is {row.get('label_0')!r}, and the mean of {ANSWERS} is {mean:g}; mend one of them, or empty {ANSWERS} "
            "where the label is to count"
        )
    return tuple(answers)
