"""Your own pairs as a table: CSV, TSV, JSON, JSON lines, parquet, webdataset or saved by `datasets`, one comparison a row.

What a column is, its name tells; upper and lower case are alike. Of names on one line the first that is there counts.

    prompt      prompt, caption, text
    images      image_0 image_1; image0 image1; image_a image_b; image_1 image_2; image1 image2; left right;
                image_left image_right; left_image right_image; jpg_0 jpg_1; path_0 path_1; path_1 path_2; path1 path2;
                image_path_0 image_path_1; image_path_1 image_path_2; chosen rejected; chosen_image rejected_image
    answer      label_0 (in [0, 1]: 1 image 0 is preferred, 0.5 a tie), with label_1 = 1 - label_0 as a check
                winner, preferred, preference, choice, or chosen without rejected: which image (see below)
                votes_0 votes_1 and maybe votes_tie: how many people said so
                chosen rejected: the answer is in the order, and the sides get shuffled
    rater       rater, user, annotator, worker, or one of these with _id
    key         pair_id, id, key: the pair's own name

An image is a path (relative to the table's folder, or to --images), the file's bytes, or these as text (image_values.py). A
row whose answer is empty is a pair that nobody judged.

A winner is named by its column (image_0), by the end of that name (a, left), by its path as the row has it, or by number;
tie, both, equal and draw mean a tie. Trap: where the images are called image_1 and image_2, people count from 1, so
winner 1 is the first image, which is image_0 here, and so are label_1 and votes_1; elsewhere they count from 0.

--columns says it where names do not: {"prompt": "my caption", "image_0": "before", "image_1": "after"}. It knows image_0,
image_1, chosen, rejected, prompt, label_0, label_1, winner, votes_0, votes_1, votes_tie, rater and key. Once it names a kind
of answer, no other kind is looked for.

All other columns are kept as source_*: text, numbers and dates as they are, lists and objects as JSON text. Bytes that are not
one of the two images are not kept; their column then says how many there were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import shown
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, ImageSource, counted, image_source, number, text
from dedpo_diffusion.pairs.formats.sources import Source
from dedpo_diffusion.settings import IngestSettings

PROMPT = ("prompt", "caption", "text")
ORDERED = ("chosen", "rejected")
IMAGES = {  # names of the two image columns, and what short names and numbers their answers go by
    ("image_0", "image_1"): ("0", "1"),
    ("image0", "image1"): ("0", "1"),
    ("jpg_0", "jpg_1"): ("0", "1"),
    ("image_1", "image_2"): ("1", "2"),
    ("image1", "image2"): ("1", "2"),
    ("path_0", "path_1"): ("0", "1"),
    ("path_1", "path_2"): ("1", "2"),
    ("path1", "path2"): ("1", "2"),
    ("image_path_0", "image_path_1"): ("0", "1"),
    ("image_path_1", "image_path_2"): ("1", "2"),
    ("image_a", "image_b"): ("a", "b"),
    ("left", "right"): ("left", "right"),
    ("image_left", "image_right"): ("left", "right"),
    ("left_image", "right_image"): ("left", "right"),
    ("chosen", "rejected"): ORDERED,
    ("chosen_image", "rejected_image"): ORDERED,
}
WINNER = ("winner", "preferred", "preference", "choice")
TIES = ("tie", "both", "equal", "draw")
RATER = ("rater", "user", "annotator", "worker", "rater_id", "user_id", "annotator_id", "worker_id")
KEY = ("pair_id", "id", "key", "__key__")
OURS = ("prompt", "image_0", "image_1", "chosen", "rejected", "label_0", "label_1", "winner", "votes_0", "votes_1", "votes_tie")
MAPPED = (*OURS, "rater", "key")  # what --columns may name
WRITTEN = (".txt", ".text", ".jpg", ".jpeg", ".png", ".webp")  # endings of a webdataset's columns


@dataclass(frozen=True)
class Layout:
    """Which of a table's columns is what, by the table's own names.

    Attributes:
        prompt: the prompt's column.
        images: the columns of the two images.
        short: short names of the two images ("0" and "1", "left" and "right").
        kind: "label", "winner", "votes", "order" (the preferred image first), or None where the table has no answers.
        answers: the columns of that kind of answer: label_0 and label_1, winner, or votes_0, votes_1 and votes_tie; None for
            one that is not there.
        rater: the column that names the person.
        key: the column that names the pair.
        others: the name in source_* of every column that is kept as it is.
    """

    prompt: str
    images: tuple[str, str]
    short: tuple[str, str]
    kind: str | None
    answers: tuple[str | None, ...] = ()
    rater: str | None = None
    key: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """The layout in words."""
        said = {"order": "the preferred image first", None: "no labels found (no column such as label_0, winner or chosen)"}.get(self.kind)
        said = said or f"answers in {' and '.join(filter(None, self.answers))}"
        people = "" if self.rater is None else f", people in {self.rater}"
        return f"prompts in {self.prompt}, images in {self.images[0]} and {self.images[1]}, {said}{people}"


class Reader:
    """Reads the rows of one table, in place of the module."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.WINNER_FIRST = layout.kind == "order"

    def entries(self, row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
        """The one comparison of a row.

        Raises:
            UserError: an empty prompt, no image, or an answer that is none.
        """
        layout = self.layout
        prompt = text(row.get(layout.prompt), f"{where}: {layout.prompt}")
        if not prompt.strip():
            raise UserError(f"{where}: {layout.prompt} is empty; fill it in or remove the row")
        image_0, image_1 = (_image(row.get(name), folder, f"{where}: {name}") for name in layout.images)
        rater = _name(row.get(layout.rater)) if layout.rater else None
        yield Comparison(
            where,
            prompt,
            (image_0, image_1),
            _answers(layout, row, where, rater),
            key=_name(row.get(layout.key)) if layout.key else None,
            source={called: _kept(row.get(name), name) for name, called in layout.others.items()},
        )


def bind(source: Source, settings: IngestSettings) -> tuple[str, Reader]:
    """A reader of this table, and what its columns are.

    Raises:
        UserError: a column is missing, could be several things, or --columns names what is not there.
    """
    try:
        layout = layout_of(source.columns, tuple(sorted(settings.columns.items())))
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    return layout.why, Reader(layout)


# ---- which column is what


@lru_cache(maxsize=16)
def layout_of(columns: tuple[str, ...], mapping: tuple[tuple[str, str], ...]) -> Layout:
    """What a table's columns are.

    Args:
        columns: the table's columns.
        mapping: what --columns says, as (our name, the table's name).

    Raises:
        UserError: no prompt or images, several of them, or a mapping that names what is not there.
    """
    given = dict(mapping)
    _check_given(given, columns)
    free = {_plain(name, columns).lower(): name for name in columns if name not in given.values()}

    def find(*names: str, ours: str) -> str | None:
        return given.get(ours) or next((free[name] for name in names if name in free), None)

    prompt = find(*PROMPT, ours="prompt")
    if prompt is None:
        raise UserError(f"no column is the prompt (called {', '.join(PROMPT)}){_remedy('prompt', columns)}")
    images, short = _find_images(given, free, columns)
    kind, answers = _find_answers(given, free, images, short)
    rater = None if kind == "votes" and "rater" not in given else find(*RATER, ours="rater")
    key = find(*KEY, ours="key")
    used = {prompt, *images, *answers, rater, key}
    others = _others([name for name in columns if name not in used], columns)
    if kind == "order" and "swapped" in others.values():
        raise UserError("the column 'swapped' has the name by which turned pairs are marked; rename it")
    return Layout(prompt, images, short, kind, answers, rater, key, others)


def answer_columns(columns: Collection[str]) -> list[str]:
    """The columns that are an answer by their names, in whatever table."""
    sides = {side for pair in IMAGES.values() for side in pair}
    known = {*WINNER, *ORDERED, "votes_tie", *(f"{kind}_{side}" for kind in ("label", "votes") for side in sides)}
    return [plain for name in columns if (plain := _plain(name, columns).lower()) in known]


def has_two_images(columns: Collection[str]) -> bool:
    """Whether a table's columns name the two images of a pair."""
    names = {_plain(name, columns).lower() for name in columns}
    return any(set(pair) <= names for pair in IMAGES)


def _check_given(given: Mapping[str, str], columns: tuple[str, ...]) -> None:
    for ours, theirs in given.items():
        if ours not in MAPPED:
            raise UserError(f"--columns names {ours!r}, which is none of {', '.join(MAPPED)}")
        if theirs not in columns:
            raise UserError(f"--columns says that {ours} is the column {theirs!r}, which is not there (there are {', '.join(columns)})")
    for theirs in given.values():
        if list(given.values()).count(theirs) > 1:
            raise UserError(f"--columns names the column {theirs!r} twice; each can be one thing only")
    for pair in (("image_0", "image_1"), ("chosen", "rejected"), ("votes_0", "votes_1")):
        if len(given.keys() & set(pair)) == 1:
            raise UserError(f"--columns names only one of {pair[0]} and {pair[1]}; name both")
    for ours, needed in (("label_1", "label_0"), ("votes_tie", "votes_0")):
        if ours in given and needed not in given:
            raise UserError(f"--columns names {ours} without {needed}; name both")
    if {"image_0", "chosen"} <= given.keys():
        raise UserError("--columns names image_0 and image_1, and also chosen and rejected; name one of these pairs")


def _remedy(ours: str, columns: Collection[str]) -> str:
    there = ", ".join(columns) or "none"
    return f'; the columns are {there}; rename one, or say it with --columns \'{{"{ours}": "..."}}\''


def _plain(name: str, columns: Collection[str]) -> str:
    """A column's name; in a webdataset without the file ending, where that leaves it the only one so called."""
    if "__key__" not in columns:
        return name
    stems = {other: next((other.removesuffix(end) for end in WRITTEN if other.endswith(end)), other) for other in columns}
    return stems[name] if list(stems.values()).count(stems[name]) == 1 else name


def _find_images(given: Mapping[str, str], free: Mapping[str, str], columns: Collection[str]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The image columns and their short names."""
    if "chosen" in given:
        return (given["chosen"], given["rejected"]), ORDERED
    if "image_0" in given:
        pair = given["image_0"], given["image_1"]
        known = IMAGES.get((pair[0].lower(), pair[1].lower()), ORDERED)
        return pair, _numbers(*pair) if known == ORDERED else known  # named image_0, so the order says nothing
    found = [pair for pair in IMAGES if pair[0] in free and pair[1] in free]
    if len(found) > 1:
        shown = "; ".join(" and ".join(pair) for pair in found)
        raise UserError(f"several pairs of columns could be the two images ({shown}){_remedy('image_0', columns)} and image_1")
    if not found:
        shown = "; ".join(" and ".join(pair) for pair in IMAGES)
        raise UserError(f"no two columns are the images (called {shown}){_remedy('image_0', columns)} and image_1")
    return (free[found[0][0]], free[found[0][1]]), IMAGES[found[0]]


def _numbers(first: str, second: str) -> tuple[str, str]:
    """How people count two columns of their own: as their names end, else from 0."""
    end_0, end_1 = (name[len(name.rstrip("0123456789")) :] for name in (first, second))
    return (end_0, end_1) if end_0 and end_1 and end_0 != end_1 else ("0", "1")


def _find_answers(
    given: Mapping[str, str], free: Mapping[str, str], images: tuple[str, str], short: tuple[str, str]
) -> tuple[str | None, tuple[str | None, ...]]:
    """The kind of answer, and its columns."""
    found: dict[str, tuple[str | None, ...]] = {}
    if short == ORDERED:
        found["order"] = ()
    if "label_0" in given:
        found["label"] = given["label_0"], given.get("label_1")
    if "winner" in given:
        found["winner"] = (given["winner"],)
    if "votes_0" in given:
        found["votes"] = given["votes_0"], given["votes_1"], given.get("votes_tie")
    if not (set(found) - {"order"} or "chosen" in given):
        found |= _named_answers(free, short)
    if len(found) > 1:
        shown = ", ".join(" and ".join(filter(None, names)) or " and ".join(images) for names in found.values())
        raise UserError(
            f"several columns could be the answer ({shown}); say which with --columns: "
            'label_0, winner, votes_0 and votes_1, or chosen and rejected, as {"winner": "..."}'
        )
    return next(iter(found.items()), (None, ()))


def _named_answers(free: Mapping[str, str], short: tuple[str, str]) -> dict[str, tuple[str | None, ...]]:
    """The kinds of answer that columns are named after."""
    found: dict[str, tuple[str | None, ...]] = {}
    for kind in ("label", "votes"):
        pairs = {pair for pair in ((f"{kind}_0", f"{kind}_1"), (f"{kind}_{short[0]}", f"{kind}_{short[1]}")) if set(pair) <= free.keys()}
        if len(pairs) > 1:
            shown = ", ".join(sorted({name for pair in pairs for name in pair}))
            raise UserError(f"the columns {shown} could all be the answer; rename those that are not")
        if pairs:
            first, second = next(iter(pairs))
            found[kind] = free[first], free[second]
    alone = [free[name] for name in dict.fromkeys(("label_0", f"label_{short[0]}")) if name in free]
    if "label" not in found and alone:
        found["label"] = alone[0], None
    elif "label" not in found and f"label_{short[1]}" in free:
        raise UserError(f"there is a column label_{short[1]}, and none of the first image; rename it to what it is, or add label_0")
    if "votes" in found:
        found["votes"] += (free.get("votes_tie"),)
    winner = next((free[name] for name in (*WINNER, "chosen") if name in free and (name != "chosen" or "rejected" not in free)), None)
    return found | ({"winner": (winner,)} if winner else {})


def _others(names: list[str], columns: Collection[str]) -> dict[str, str]:
    """What the columns that are kept are called: as they are, since the pair dataset adds source_ itself."""
    called = {name: _plain(name, columns).removeprefix("source_") for name in names}
    for one in called.values():
        if list(called.values()).count(one) > 1:
            raise UserError(
                f"the columns {' and '.join(n for n in called if called[n] == one)} would both be kept as source_{one}; rename one"
            )
    return called


# ---- what a row says


def _image(value: Any, folder: Path | None, where: str) -> ImageSource:
    return None if isinstance(value, str) and not value.strip() else image_source(value, folder, where)


def _answers(layout: Layout, row: Mapping[str, Any], where: str, rater: str | None) -> tuple[Answer, ...]:
    values = [None if name is None else row.get(name) for name in layout.answers]
    if layout.kind == "votes":
        return _votes(layout, values, where)
    if layout.kind == "order":
        return (Answer(1.0, rater),)
    label = None
    if layout.kind == "label":
        label = _label(layout, values, where)
    elif layout.kind == "winner":
        label = _winner(layout, values[0], row, where)
    return () if label is None else (Answer(label, rater),)


def _label(layout: Layout, values: list[Any], where: str) -> float | None:
    names = layout.answers
    label, other = (number(value, f"{where}: {name}") for name, value in zip(names, values, strict=True))
    if label is not None and not 0 <= label <= 1:
        raise UserError(
            f"{where}: {names[0]} is {shown(values[0])}, and must be in [0, 1] (1: the first image is preferred); mend it, or if it names "
            f'an image, say so with --columns \'{{"winner": "{names[0]}"}}\''
        )
    if names[1] is not None and (
        (label is None) != (other is None) or (label is not None and other is not None and abs(label + other - 1) > 1e-6)
    ):
        raise UserError(
            f"{where}: {names[0]} is {values[0]!r} and {names[1]} is {values[1]!r}; they must add up to 1, or both be empty; mend the row"
        )
    return label


def _votes(layout: Layout, values: list[Any], where: str) -> tuple[Answer, ...]:
    counts = [_count(value, f"{where}: {name}") for name, value in zip(layout.answers, values, strict=True) if name is not None]
    if all(count is None for count in counts):
        return ()
    for name, count in zip(layout.answers, counts, strict=False):
        if count is None:
            raise UserError(f"{where}: {name} is empty, and other counts are not; write 0 where nobody said so")
    return counted(*(count or 0 for count in counts))


def _count(value: Any, where: str) -> int | None:
    found = number(value, where)
    if found is not None and (found < 0 or not found.is_integer()):
        raise UserError(f"{where} is {shown(value)}, and must count people: 0, 1, 2, ...; mend it")
    return None if found is None else int(found)


def _winner(layout: Layout, value: Any, row: Mapping[str, Any], where: str) -> float | None:
    """1.0 for the first image, 0.0 for the second, 0.5 for a tie, None for nothing."""
    said = _name(value)
    if said is None:
        return None
    legal = _words(layout)
    found = [label for label, words in legal.items() if said.lower() in words]
    paths = [_name(row.get(name)) if isinstance(row.get(name), str) else None for name in layout.images]
    if not found and paths[0] != paths[1]:
        found = [label for label, path in ((1.0, paths[0]), (0.0, paths[1])) if said == path]
    if found:
        return found[0]
    first, second, ties = (" or ".join(dict.fromkeys(legal[label])) for label in (1.0, 0.0, 0.5))
    raise UserError(
        f"{where}: {layout.answers[0]} is {shown(said)}, and must be {first} (the first image), {second} (the second), {ties} (a tie), or "
        "empty (nobody judged); mend it, or if it is the probability that the first is preferred, say so with "
        f'--columns \'{{"label_0": "{layout.answers[0]}"}}\''
    )


def _words(layout: Layout) -> dict[float, tuple[str, ...]]:
    """What names the first image, the second, and a tie. Never one word for two of them: image_1 is what the table calls so."""
    sides: list[tuple[str, ...]] = [(name.lower(), short) for name, short in zip(layout.images, layout.short, strict=True)]
    if layout.short == ("0", "1") or not "".join(layout.short).isdigit():
        ours = [[word for word in (f"image_{side}", str(side)) if word not in sides[1 - side]] for side in (0, 1)]
        sides = [(*words, *more) for words, more in zip(sides, ours, strict=True)]
    return {1.0: sides[0], 0.0: sides[1], 0.5: TIES}


def _name(value: Any) -> str | None:
    """A word, or a whole number, as text; None for nothing. Tables with gaps hold whole numbers as 1.0."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, float) and value != value):
        return None
    said = str(value).strip()
    return re.sub(r"^(\d+)\.0$", r"\1", said) or None


def _kept(value: Any, name: str) -> Any:
    """A value as it is kept with the pair: JSON text of what has parts, and of stray bytes their number."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace") if name.endswith((".txt", ".text", ".json", ".cls")) else _unkept(value)
    return json.dumps(value, ensure_ascii=False, default=_unkept) if isinstance(value, list | dict) else value


def _unkept(value: Any) -> str:
    return f"{len(value)} bytes, not kept" if isinstance(value, bytes) else str(value)
