"""HPDv3 (arXiv 2508.03789, data card MizzenAI/HPDv3): JSON lists of pairs beside a folder `images`.

    all.json, train.json   prompt, path1, path2, model1, model2, choice_dist [2] or null, confidence or null
    test.json              prompt, path1, path2, model1, model2

The layout is that of the README of github.com/MizzenAI/HPSv3.

Traps of the format:
* path1 is always the preferred image, so the import shuffles the sides.
* choice_dist counts votes, but not always in the order of the paths: the authors' own training code sorts it, and gives
  path1 the greater count (`pairwise_dataset.py`). So does this importer. The counts stay as they were in
  source_choice_1 and source_choice_2, and source_choice_reversed says where they were turned; drop those rows if you
  rather read them as a majority for path2. Equal counts are a tie.
* choice_dist is null for the parts from Midjourney and HPDv2, and absent in test.json: one answer, path1 is preferred.
* confidence is not a share of votes, but how sure the authors are of the winner (they train on 0.95 and more); it is
  kept as source_confidence.
* train.json also lists pairs of Pick-a-Pic and ImageRewardDB, whose images are not in the download: --unreadable skip.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, counted, image_source, is_list, number, text
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = True
COLUMNS = ("prompt", "path1", "path2")
NEEDS = ", ".join(COLUMNS)
OWN = (("choice_dist",),)  # of test.json, whose columns any table may have, only the format's name tells
READ = ()


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    return f"columns {', '.join(COLUMNS)}" if set(COLUMNS) <= set(columns) else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a row, path1 first.

    Raises:
        UserError: a missing path, or a choice_dist that is neither counts nor shares.
    """
    paths = [text(row.get(name), f"{where}, {name}") for name in ("path1", "path2")]
    images = [image_source(path, folder, f"{where}, path{k}") for k, path in enumerate(paths, 1)]
    source: dict[str, Any] = {name: str(row[name]) for name in ("model1", "model2") if row.get(name) is not None}
    confidence = number(row.get("confidence"), f"{where}, confidence")
    if confidence is not None:
        source["confidence"] = confidence
    answers: tuple[Answer, ...] = (Answer(1.0),)
    choice = _choice(row.get("choice_dist"), f"{where}, choice_dist")
    if choice is not None:
        answers = _answers(max(choice), min(choice), f"{where}, choice_dist")
        source |= {"choice_1": choice[0], "choice_2": choice[1], "choice_reversed": choice[0] < choice[1]}
    key = "-".join(Path(path).stem for path in paths)
    yield Comparison(where, text(row.get("prompt"), f"{where}, prompt"), (images[0], images[1]), answers, key=key, source=source)


def _choice(value: Any, where: str) -> tuple[float, float] | None:
    """Votes or shares, in the file's order; None where nobody was counted."""
    if value is None:
        return None
    found = [number(item, where) for item in value] if is_list(value) else []
    if len(found) != 2 or found[0] is None or found[1] is None or min(found[0], found[1]) < 0:
        raise UserError(f"{where} is {value!r}, and must be two counts of votes, or null; mend the row")
    return (found[0], found[1]) if found[0] + found[1] > 0 else None


def _answers(most: float, least: float, where: str) -> tuple[Answer, ...]:
    """Answers for path1, which has the greater count or share."""
    if most.is_integer() and least.is_integer():
        return counted(int(most), int(least))
    if abs(most + least - 1) > 0.01:
        raise UserError(f"{where} holds {most} and {least}, which are neither whole votes nor shares that add up to 1; mend the row")
    return (Answer(most / (most + least)),)
