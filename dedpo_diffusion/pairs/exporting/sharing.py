"""Pairs as others may get them: the people in them are numbers, files carry no metadata, paths are cut; and the data set's card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.privacy import check_private, without_paths
from dedpo_diffusion.pairs.exporting.bare_images import without_metadata
from dedpo_diffusion.pairs.exporting.rows import Item, as_text
from dedpo_diffusion.pairs.exporting.tables import DATA_FILES
from dedpo_diffusion.pairs.formats.annotated import ANSWERS, PAIR_ID, SIDES
from dedpo_diffusion.settings import PairsSettings

PEOPLE = {  # words in the name of a column that tells of a person
    "rater", "raters", "user", "users", "username", "annotator", "annotators", "worker", "workers", "author", "email", "mail", "person",
    "people", "ip", "voter",
}  # fmt: skip
REMEDY = "make the pairs again without it, or leave that column out with --without"
COLUMNS = {
    PAIR_ID: "the pair's name",
    "prompt": "what both images were made for",
    "image_0, image_1": "the two images",
    "label_0": "the mean answer: 1 where image_0 is preferred, 0 where image_1 is, 0.5 for a tie; empty where nobody answered",
    "votes": "how many answers",
    "rater": "who answered, if it was one person",
    ANSWERS: 'the single answers as JSON: `[{"label_0": 1.0, "votes": 1, "rater": "rater-1"}]`',
}


def told_of_people(columns: Iterable[str]) -> list[str]:
    """Those source columns whose names tell of people."""
    return [name for name in columns if PEOPLE & set(re.findall(r"[a-z]+", name.lower()))]


def left_out(settings: PairsSettings, columns: Collection[str]) -> list[str]:
    """The source columns that stay here.

    Raises:
        UserError: `--without` names one that is not there.
    """
    unknown = [name for name in settings.without if name.removeprefix("source_") not in columns]
    if unknown:
        raise UserError(f"--without {unknown[0]}: {settings.pairs} has no such source column (it has {', '.join(columns) or 'none'})")
    asked = [name.removeprefix("source_") for name in settings.without]
    people = told_of_people(columns) if settings.raters != "names" else []
    return list(dict.fromkeys([*asked, *people]))


@dataclass
class Sharing:
    """Takes pairs one by one and counts what it finds in them.

    Args:
        settings: what may be told.
        without: source columns to leave out.
    """

    settings: PairsSettings
    without: Collection[str]
    people: dict[str, str] = field(default_factory=dict)
    prompts: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """The pairs as others may get them.

        Raises:
            UserError: a prompt, name or value tells of this machine.
        """
        for item in found:
            yield self.shared(item)

    def shared(self, item: Item) -> Item:
        """One pair as others may get it."""
        pair = item.pair
        for what, text in (("id", pair.pair_id), ("prompt", pair.prompt)):
            check_private(f"{self.settings.pairs}: the {what} of pair {pair.pair_id!r}", text, REMEDY)
        images = [self._bare(item, side) for side in SIDES]
        answers = tuple(replace(answer, rater=self._person(answer.rater)) for answer in item.answers)
        source = {name: self._value(pair.pair_id, name, value) for name, value in pair.source.items() if name not in self.without}
        self.prompts.add(pair.prompt)
        self.counts.update(pairs=1, labelled=bool(answers), votes=sum(answer.votes for answer in answers))
        return Item(item.number, replace(pair, image_0=images[0], image_1=images[1], source=source), answers)

    def _bare(self, item: Item, side: str) -> bytes:
        data = item.image(side)
        bare = without_metadata(data)
        self.counts["images without their metadata"] += bare != data
        if bare == data:
            where = f"{self.settings.pairs}: {side} of pair {item.pair.pair_id!r}"
            for name, text in _texts(data, where):
                check_private(f"{where}, its {name}", text, "save the image without it")
        return bare

    def _person(self, name: str | None) -> str | None:
        if name is None or self.settings.raters == "none":
            return None
        number = self.people.setdefault(name, f"rater-{len(self.people) + 1}")
        return name if self.settings.raters == "names" else number

    def _value(self, pair_id: str, name: str, value: Any) -> Any:
        told = as_text(value)
        cut = without_paths(told)
        self.counts["values with paths cut"] += cut != told
        if isinstance(cut, str):
            check_private(f"{self.settings.pairs}: source_{name} of pair {pair_id!r}", cut, REMEDY)
        return value if cut == told else cut


def _texts(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """What a file of a format without metadata of a known place holds to read, such as a comment.

    Raises:
        UserError: it tells where it was taken.
    """
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        exif = Image.Image.getexif(image)
        if exif.get_ifd(0x8825):
            raise UserError(f"{where} tells where it was taken (EXIF), so nothing is sent; save the image without it")
        for name, value in [*image.info.items(), *((f"EXIF {tag}", value) for tag, value in exif.items())]:
            text = value.decode("latin-1") if isinstance(value, bytes) and name not in ("icc_profile", "exif") else value
            if isinstance(text, str):
                yield str(name), text


# ---- the card


def card(settings: PairsSettings, found: Sharing, columns: Iterable[str]) -> str:
    """The README.md of a data set.

    Args:
        settings: where it goes, and its licence.
        found: what was counted while its pairs were written.
        columns: the source columns that go along.
    """
    counts, name = found.counts, settings.repository
    people = f" by {len(found.people)} {'person' if len(found.people) == 1 else 'people'}" if found.people else ""
    who = {"numbers": "People are numbers here.", "names": "People are named.", "none": "Who answered is left out."}[settings.raters]
    rows = COLUMNS | {f"source_{column}": "what else is known of the pair" for column in columns}
    table = "\n".join(f"| `{column}` | {what} |" for column, what in rows.items())
    return f"""---
license: {settings.license or "unknown"}
pretty_name: {name}
tags:
- preference
- text-to-image
- dedpo_diffusion
{DATA_FILES}---

# {name}

Pairs of images for one prompt, and which of the two people prefer.

| | |
|---|---|
| pairs | {counts["pairs"]} |
| different prompts | {len(found.prompts)} |
| pairs with an answer | {counts["labelled"]} |
| single answers | {counts["votes"]}{people} |

{who} Labels that machines gave are not in here.

| column | what it is |
|---|---|
{table}

```python
from datasets import load_dataset

pairs = load_dataset("{name}", split="train")
```

With dedpo_diffusion: `dedpo ingest auto {name} --out PAIRS`
"""
