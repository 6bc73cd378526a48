"""What the exports of annotation tools have in common: which value is what, whose answer it is, and where images lie.

A task that `dedpo pairs export` wrote holds, beside prompt, left and right,

    pair_id    the pair's id, which it keeps
    left_is    image_0 or image_1: which image of the pair stands on the left, since sides are shuffled
    answers    what people had said before, as JSON: [{"label_0": 1.0, "votes": 1, "rater": "ann"}, ...] about image_0

Tasks of other origin have none of these; their left image becomes image_0.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, ImageSource, image_source, is_list
from dedpo_diffusion.pairs.formats.sources.base import Located, Row, Source
from dedpo_diffusion.pairs.formats.table import IMAGES, ORDERED, PROMPT, TIES, WINNER

PAIR_ID, LEFT_IS, ANSWERS = "pair_id", "left_is", "answers"
OURS = (PAIR_ID, LEFT_IS, ANSWERS)
SIDES = ("image_0", "image_1")
QUESTION, LEFT, RIGHT, TIE, SKIP = "choice", "left", "right", "tie", "skip"
CHOICES = (LEFT, RIGHT, TIE, SKIP)
LEFT_WINS = {LEFT: 1.0, TIE: 0.5, RIGHT: 0.0}
OPTIONS = ("prompt", "left", "right", "answer", "says_left", "says_right", "says_tie", "says_skip")  # what --columns may say
MORE = "__more__"  # of a row: further rows about the same pair, each with its place
UPLOADED = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file


@dataclass(frozen=True)
class Said:
    """One answer of a tool's user: one of `CHOICES`, and who gave it."""

    choice: str
    rater: str | None


@dataclass(frozen=True)
class Roles:
    """Which value of a task is the prompt and which are the two images, and what short names the images go by."""

    prompt: str
    left: str
    right: str
    short: tuple[str, str] = (LEFT, RIGHT)


# ---- which value is what


def find_roles(names: Collection[str], options: Mapping[str, str], where: str) -> Roles:
    """The prompt and the images of a task, by the names that tables may use for them, or as --columns says.

    Raises:
        UserError: one is missing, or several fit.
    """
    plain = {name.lower(): name for name in names}
    for ours in ("prompt", "left", "right"):
        if ours in options and options[ours] not in names:
            raise UserError(f"{where}: --columns says that {ours} is {options[ours]!r}, which is not there (there are {', '.join(names)})")
    prompt = options.get("prompt") or next((plain[name] for name in PROMPT if name in plain), None)
    found = [(pair, short) for pair, short in IMAGES.items() if short != ORDERED and set(pair) <= plain.keys()]
    if {"left", "right"} <= options.keys():
        given = (options["left"], options["right"])
        found = [(given, next((short for pair, short in found if (plain[pair[0]], plain[pair[1]]) == given), (LEFT, RIGHT)))]
    if prompt is None or len(found) != 1:
        which = "the prompt" if prompt is None else "the two images"
        raise UserError(
            f"{where}: which value is {which} cannot be told from {', '.join(names) or 'nothing'}; say it with "
            """--columns '{"prompt": "...", "left": "...", "right": "..."}'"""
        )
    (first, second), short = found[0]
    return Roles(prompt, plain.get(first.lower(), first), plain.get(second.lower(), second), short)


def check_options(options: Mapping[str, str]) -> None:
    """UserError where --columns names what is none of `OPTIONS`, or only one of the two images."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UserError(f"--columns names {', '.join(unknown)}; this format reads {', '.join(OPTIONS)} from it")
    if ("left" in options) != ("right" in options):
        raise UserError("--columns names only one of left and right; name both")


def only(found: Collection[str], options: Mapping[str, str], where: str) -> str | None:
    """The question that is the answer: as --columns says, else `choice` or a name that tables use, else the only one.

    Raises:
        UserError: several questions and none of these.
    """
    if "answer" in options:
        return options["answer"] if options["answer"] in found else None
    for name in (QUESTION, *WINNER):
        if name in found:
            return name
    if len(found) > 1:
        raise UserError(
            f"""{where}: there are answers to {", ".join(found)}; say which counts with --columns '{{"answer": "{next(iter(found))}"}}'"""
        )
    return next(iter(found), None)


def read_choice(value: Any, roles: Roles, options: Mapping[str, str], where: str) -> str:
    """What somebody chose, as one of `CHOICES`.

    Raises:
        UserError: none of the known words.
    """
    word = _plain(value)
    known = {
        LEFT: {LEFT, roles.left, roles.short[0]},
        RIGHT: {RIGHT, roles.right, roles.short[1]},
        TIE: {*TIES, "both good", "both bad", "same"},
        SKIP: {SKIP},
    }
    for choice in CHOICES:
        if word in ({_plain(options[f"says_{choice}"])} if f"says_{choice}" in options else {_plain(one) for one in known[choice]}):
            return choice
    raise UserError(
        f"{where}: the answer is {value!r}, and must be one of {', '.join(CHOICES)}; "
        f"""if it means one of these, say so with --columns '{{"says_left": "{value}"}}' (or says_right, says_tie, says_skip)"""
    )


def _plain(value: Any) -> str:
    return re.sub(r"[\s_-]+", " ", str(value)).strip().lower()


# ---- whose answer, about which image


def about_image_0(said: Iterable[Said], left_is: str, noted: Counter[str]) -> list[Answer]:
    """Answers about the left image as answers about image_0; skips are counted."""
    answers = []
    for one in said:
        if one.choice == SKIP:
            noted["answers that say skip"] += 1
            continue
        wins = LEFT_WINS[one.choice]
        answers.append(Answer(wins if left_is == SIDES[0] else 1 - wins, one.rater))
    return answers


def which_is_left(values: Mapping[str, Any], where: str) -> str:
    """Which image of the pair stands on the left; image_0 where the task does not say.

    Raises:
        UserError: it says something else.
    """
    said = values.get(LEFT_IS)
    if said is not None and said not in SIDES:
        raise UserError(f"{where}: {LEFT_IS} is {said!r}, and must be {' or '.join(SIDES)}; export the pairs again")
    return said or SIDES[0]


def earlier_answers(value: Any, where: str) -> list[Answer]:
    """The answers that a task brought along.

    Raises:
        UserError: they are not as they were written.
    """
    if value in (None, ""):
        return []
    try:
        found = json.loads(value) if isinstance(value, str) else value
        answers = [Answer(float(one["label_0"]), one.get("rater"), int(one.get("votes", 1))) for one in found]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: {ANSWERS} is {value!r}, and must be a JSON list of label_0, votes and rater; export again") from error
    if any(not isinstance(answer.rater, str | None) or answer.votes < 1 for answer in answers):
        raise UserError(f"{where}: {ANSWERS} is {value!r}; a rater must be text, and votes at least 1: export again")
    return answers


def written_answers(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Answers as a task brings them along."""
    return [{"label_0": answer.label_0, "votes": answer.votes, "rater": answer.rater} for answer in answers]


def count_again(answers: Iterable[Answer], noted: Counter[str]) -> None:
    """Count the answers of a person who had answered the pair before: each of them is kept."""
    people = Counter(answer.rater for answer in answers if answer.rater is not None)
    again = sum(people.values()) - len(people)
    if again:
        noted["further answers of one person on one pair, all kept"] += again


def kept_values(values: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """What else a task holds, to be kept with the pair: what has parts as JSON text; images are left out."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in used or name in OURS or value is None or isinstance(value, bytes) or _is_image(value):
            continue
        kept[name.removeprefix("source_")] = value if isinstance(value, str | int | float) else json.dumps(value, default=str)
    return kept


def _is_image(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("data:image")) or (isinstance(value, Mapping) and "bytes" in value)


# ---- images


def find_image(value: Any, folder: Path | None, where: str, noted: Counter[str]) -> ImageSource:
    """An image of a task: a data URI, a path, or an address under which the tool serves a file.

    Label Studio writes /data/local-files/?d=PATH and /data/upload/PROJECT/HASH-NAME. Such paths, and absolute ones that are not
    on this machine, are looked for below `folder` by their end, the longest first; `noted` counts them.

    Raises:
        UserError: another address, or a path that leaves the folder.
    """
    if not isinstance(value, str):
        return image_source(value, folder, where)
    if value.startswith("data:"):
        return data_of(value)
    served = _served(value)
    moved = served is None and Path(value).is_absolute() and not Path(value).is_file()
    if folder is None or (served is None and not moved):
        return image_source(value, folder, where)
    path = (served if served is not None else value).lstrip("/")
    image_source(path, folder, where)  # refuses what leaves the folder
    if "/data/local-files" in value and (folder / path).is_file():
        return folder / path
    noted["images with an absolute path or an upload's, looked for in the folder of images"] += 1
    found = _by_its_end(path, folder)
    if found is None:
        return folder / path
    if found.name != PurePosixPath(path).name:
        noted["of these, images found under their name without the tool's prefix"] += 1
    return found


def data_of(value: str) -> bytes:
    """The bytes of a data URI; of a damaged one its first characters, which are no image and are told of as unreadable."""
    head, _, body = value.partition(",")
    try:
        return base64.b64decode(body if head.endswith(";base64") else "?", validate=True)
    except (binascii.Error, ValueError):
        return value[:64].encode()


def _served(value: str) -> str | None:
    """The path behind an address of Label Studio's own; None for anything else."""
    parts = urlsplit(value)
    if parts.path.rstrip("/").endswith("data/local-files") and parts.query.startswith("d="):
        return unquote(parts.query.removeprefix("d="))
    if "/data/upload/" in parts.path:
        return unquote(parts.path[parts.path.index("/data/upload/") + len("/data/") :])
    return None


def _by_its_end(path: str, folder: Path) -> Path | None:
    """The file below `folder` that the longest end of a path names, at last without Label Studio's prefix; None where there is none."""
    parts = PurePosixPath(path).parts
    bare = (*parts[:-1], UPLOADED.sub("", parts[-1], count=1)) if parts else ()
    for names in dict.fromkeys((parts, bare)):
        for start in range(len(names)):
            candidate = folder.joinpath(*names[start:])
            if candidate.is_file():
                return candidate
    return None


# ---- several rows about one pair


class Grouped(Source):
    """A source of which rows with the same key are one row: the first, with the others in its value `MORE`.

    Args:
        source: the rows.
        key: what a row is about; None for a row that is alone.
    """

    def __init__(self, source: Source, key: Callable[[Row], str | None]) -> None:
        self.source, self.kind = source, source.kind
        first: dict[str, int] = {}
        self.more: dict[int, list[tuple[str, Row]]] = {}
        self.followers: set[int] = set()
        total = 0
        for total, (where, row, _) in enumerate(source.rows(), 1):
            name = key(row)
            start = total - 1 if name is None else first.setdefault(name, total - 1)
            if start != total - 1:
                self.followers.add(total - 1)
                self.more.setdefault(start, []).append((where, row))
        super().__init__(source.path, source.columns, total - len(self.followers), source.fingerprint)

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on, each with those that belong to it."""
        yield from islice(self._leaders(), start, None)

    def _leaders(self) -> Iterator[Located]:
        for number, (where, row, folder) in enumerate(self.source.rows()):
            if number not in self.followers:
                yield where, {**row, MORE: self.more.get(number, [])}, folder


def grouped(source: Source, key: Callable[[Row], str | None]) -> Source:
    """The source with rows about one pair together; a stream is read twice only where its first row names a pair."""
    first = source.first()
    return source if first is None or (source.kind == "hub" and key(first) is None) else Grouped(source, key)


def together(row: Row, where: str) -> list[tuple[str, Row]]:
    """A grouped row's own rows, each with its place."""
    own = {name: value for name, value in row.items() if name != MORE}
    return [(where, own), *row.get(MORE, ())]


def as_list(value: Any, where: str) -> list[Any]:
    """A list, empty for nothing; UserError for anything else."""
    if value is None:
        return []
    if not is_list(value):
        raise UserError(f"{where} is {type(value).__name__}, and must be a list; export it again")
    return list(value)
