"""Ranked images of a prompt as a table of your own: K images make K (K - 1) / 2 pairs.

    a row an image     prompt, image, rank          and maybe prompt_id, rater
    a row a prompt     prompt, images [K], ranks [K]

What a column is, its name tells, upper and lower case alike:

    prompt      prompt, caption, text
    image       image, image_path, file_name, path; in rows of a prompt also images, image_paths, file_names, paths
    rank        rank, ranks, ranking: 1 is the best, equal ranks are a tie, an empty rank is an image that nobody ranked
    ranking     prompt_id, group, group_id: rows with one of these and one prompt are ranked together; without it, one prompt's rows are
    rater       rater, user, annotator, worker, or one of these with _id: each of them ranks by himself

The rows of one ranking must stand together where the table holds the images themselves (parquet). The pairs of one ranking
share images, and so are no independent answers: source_prompt_id names the ranking that a pair is of.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import shown
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, ImageSource, better, image_source, is_list, number, text
from dedpo_diffusion.pairs.formats.sources import Located, Row, Source, open_source
from dedpo_diffusion.pairs.formats.table import PROMPT, RATER
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = True  # as entries are made here, so that sides get shuffled
IMAGE = ("image", "image_path", "file_name", "path", "images", "image_paths", "file_names", "paths")
RANK = ("rank", "ranks", "ranking")
GROUP = ("prompt_id", "group_id", "group")
NEEDS = f"prompt, {' or '.join(IMAGE[:4])}, and {' or '.join(RANK)}"
TEXTS = ("csv", "json", "jsonl")  # kinds of tables that are small enough to be held whole


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    found = [_named(columns, names) for names in (PROMPT, IMAGE, RANK)]
    return None if None in found else f"ranks in {found[2]} (1 is the best) of the images in {found[1]}, prompts in {found[0]}"


def open(source: str, settings: IngestSettings) -> Source:  # the name that formats share
    """The rows of a table, grouped to rankings."""
    return gather(open_source(source, settings))


def gather(source: Source) -> Source:
    """The rankings of an opened table; the table itself where each row is one already, or where it holds none."""
    row, image = source.first(), _named(source.columns, IMAGE)
    if row is None or image is None or recognise(source.columns, row) is None or _listed(row.get(image)) is not None:
        return source
    return Rankings(source)


class Rankings(Source):
    """The rankings of a table that has a row for each image: its columns as lists.

    Args:
        table: the rows of images.
    """

    def __init__(self, table: Source) -> None:
        self.table, self.kind = table, table.kind
        self.by = [name for names in (GROUP, PROMPT, RATER) if (name := _named(table.columns, names)) is not None]
        super().__init__(table.path, table.columns, None, table.fingerprint)

    def rows(self, start: int = 0) -> Iterator[Located]:
        """From ranking `start` on: where its first image stands, its columns as lists, and the folder."""
        found = self._whole() if self.kind in TEXTS else self._neighbours()
        for place, (where, rows, folder) in enumerate(found):
            if place >= start:
                yield where, {name: [row.get(name) for row in rows] for name in self.columns}, folder

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in self.by)

    def _whole(self) -> Iterator[tuple[str, list[Row], Path | None]]:
        groups: dict[tuple[str, ...], tuple[str, list[Row], Path | None]] = {}
        for where, row, folder in self.table.rows():
            groups.setdefault(self._key(row), (where, [], folder))[1].append(row)
        yield from groups.values()

    def _neighbours(self) -> Iterator[tuple[str, list[Row], Path | None]]:
        done: set[tuple[str, ...]] = set()
        held: tuple[str, list[Row], Path | None] | None = None
        for where, row, folder in self.table.rows():
            if held is not None and self._key(held[1][0]) == self._key(row):
                held[1].append(row)
                continue
            if held is not None:
                yield held
            if self._key(row) in done:
                raise UserError(
                    f"{where}: the rows of this ranking ({shown(self._key(row)[0])}) do not stand together; sort the table by it"
                )
            done.add(self._key(row))
            held = where, [row], folder
        if held is not None:
            yield held


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """A comparison of each two images of a ranking, the better one first.

    Raises:
        UserError: no lists of one length, no prompt, or a rank that is none.
    """
    prompt, image, rank, group, rater = (_named(row, names) for names in (PROMPT, IMAGE, RANK, GROUP, RATER))
    values, ranks = _listed(row.get(image or "")), _listed(row.get(rank or ""))
    if values is None or ranks is None or len(values) != len(ranks):
        raise UserError(f"{where}: {image} and {rank} must be lists of one length; mend the row or remove it")
    images = [image_source(value, folder, f"{where}, {image} {k}") for k, value in enumerate(values)]
    found = [_rank(value, f"{where}, {rank} {k}") for k, value in enumerate(ranks)]
    told = _first(row.get(group)) if group else None
    said = _first(row.get(rater)) if rater else None
    words = text(_first(row.get(prompt or "")), f"{where}, {prompt}")
    if not words.strip():
        raise UserError(f"{where}: {prompt} is empty; fill it in or remove the row")
    yield from pairs_of(where, words, images, found, name=None if told is None else str(told), rater=None if said is None else str(said))


def pairs_of(
    where: str, prompt: str, images: Sequence[ImageSource], ranks: Sequence[float | None], *, name: str | None = None,
    rater: str | None = None,
) -> Iterator[Comparison]:  # fmt: skip
    """The K (K - 1) / 2 comparisons of K ranked images, the better one first; those without a rank come last, unjudged.

    Args:
        where: file and row, for messages.
        prompt: of all images.
        images: K images.
        ranks: K ranks, 1 is the best; None for an image that nobody ranked.
        name: of the ranking; None takes the prompt.
        rater: who ranked.
    """
    order = sorted(range(len(images)), key=lambda k: (ranks[k] is None, ranks[k] or 0, k))
    for i, j in combinations(order, 2):
        first, second = ranks[i], ranks[j]
        answers = () if first is None or second is None else (Answer(better(first, second), rater),)
        source = {"prompt_id": name or prompt, "better_rank": first, "worse_rank": second}
        key = None if name is None else f"{name}-{i}-{j}"
        yield Comparison(where, prompt, (images[i], images[j]), answers, key=key, source=source)


def _named(columns: Collection[str], names: Sequence[str]) -> str | None:
    """The column that has the first of these names, whatever its case."""
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _listed(value: Any) -> list[Any] | None:
    """A list, or one as JSON; None where it is none."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if is_list(value) else None


def _first(value: Any) -> Any:
    """What all images of a ranking share."""
    return value[0] if is_list(value) and value else value


def _rank(value: Any, where: str) -> float | None:
    found = number(value, where)
    if found is not None and not found >= 0:
        raise UserError(f"{where} is {shown(value)}, and must be a rank: 1, 2, 3, ..., of which 1 is the best; mend it")
    return found
