"""Rows of a folder of images without a table: folders and file names say which images belong together, and which is preferred.

    chosen/fox.png  rejected/fox.png        also winner loser, win lose, w l, preferred rejected, better worse
    fox/w/1.png     fox/l/1.png             the same words as folders inside
    fox_w.png       fox_l.png               or at the end or the beginning of the names
    fox_0.png       fox_1.png               also 1 2, a b, left right: two images, and nobody has judged them
    fox_rank1.png   fox_rank2.png ...       K ranked images, 1 is the best; also as folders rank1, rank2, ...

An image's place without the word that tells its side is the pair's name. Its caption stands in a .txt file beside one of its
images, or of the pair's name, or in prompt.txt or caption.txt of its folder; where there is no .txt at all, the name is the
prompt, with blanks for the signs _ in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Source, fingerprint, listed

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
ORDERED = (
    ("chosen", "rejected"), ("preferred", "rejected"), ("winner", "loser"), ("win", "lose"), ("win", "loss"), ("w", "l"),
    ("better", "worse"),
)  # fmt: skip
UNORDERED = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"))
RANK = r"rank[_-]?\d{1,4}"
NAMES = ("prompt.txt", "caption.txt")
WAYS = "folders or names that end in chosen and rejected, w and l, _0 and _1, or rank1, rank2, ..."


@dataclass(frozen=True)
class Placed:
    """An image, the name that it shares with the others of its row, and its place: 0 and 1 for two sides, or its rank."""

    path: Path
    name: str
    place: int


class ImageTreeSource(Source):
    """The comparisons of a folder of images: rows of name, prompt, images and, where they are known, ranks, of which 1 is the best.

    Args:
        path: the source as the user gave it.
        root: the folder.

    Raises:
        UserError: its names do not tell which images belong together.
    """

    kind = "folders"

    def __init__(self, path: str, root: Path) -> None:
        self.root = root
        images, self.captions = listed(root, IMAGES), set(listed(root, (".txt",)))
        self.ranked = any(_rank_of(image.relative_to(root)) is not None for image in images)
        if self.ranked:
            self.words = ("", "")
            placed = [_must(_placed(root, image, _rank_of), image, "rank1") for image in images]
        else:
            self.words, placed = _two_sides(root, images)
        self.groups: dict[str, dict[int, Path]] = {}
        for one in placed:
            group = self.groups.setdefault(one.name, {})
            if one.place in group:
                raise UserError(f"{group[one.place]} and {one.path} have one name and one place; remove or rename one")
            group[one.place] = one.path
        self.judged = self.ranked or self.words in ORDERED
        columns = ("name", "prompt", "images", *(("ranks",) if self.ranked else ()))
        super().__init__(path, columns, len(self.groups), fingerprint([*images, *self.captions], root))

    @property
    def assumed(self) -> str:
        """How the folder is read, in words."""
        said = "the first is preferred" if self.judged else "which says nothing of preference: no labels"
        words = "rank1, rank2, ... (1 is the best)" if self.ranked else f"{self.words[0]} and {self.words[1]} ({said})"
        captions = "captions in .txt files" if self.captions else "no .txt files, so the names are the prompts, with blanks for _"
        return f"images with {words} in their places or names; {captions}"

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on, by name."""
        for name, group in islice(sorted(self.groups.items()), start, None):
            where = f"{self.root} {name or self.root.name}"
            places = sorted(group) if self.ranked else [0, 1]
            row = {"name": name, "prompt": self._prompt(name, group.values(), where), "images": [_text(group.get(one)) for one in places]}
            yield where, row | ({"ranks": places} if self.ranked else {}), self.root

    def _prompt(self, name: str, images: Iterable[Path], where: str) -> str:
        """The caption of a row.

        Raises:
            UserError: there is none, or there are several that differ.
        """
        beside = {image.with_suffix(".txt") for image in images}
        beside |= {self.root / f"{name}.txt", *(self.root / name / one for one in NAMES)}
        found = {path: _caption(path) for path in sorted(beside & self.captions)}
        if len(set(found.values())) > 1:
            raise UserError(
                f"{where} has several captions that differ ({', '.join(map(str, found))}); make them alike, or remove all but one"
            )
        if found:
            return next(iter(found.values()))
        if self.captions:
            raise UserError(f"{where} has no caption, and others have; write it into {self.root / (name or 'caption')}.txt")
        said = Path(name or self.root.name).name.replace("_", " ").strip()
        if not any(sign.isalpha() for sign in said):
            raise UserError(f"{where} has no caption, and its name says nothing; write it into {self.root / (name or 'caption')}.txt")
        return said


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _caption(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it again as UTF-8") from error
    if not found:
        raise UserError(f"{path} is empty; write the prompt into it")
    return " ".join(found.split("\n")) if "\n" in found else found


# ---- which image is of which row


def _two_sides(root: Path, images: Sequence[Path]) -> tuple[tuple[str, str], list[Placed]]:
    """The words that tell the sides, and every image's place.

    Raises:
        UserError: no such words are there, or an image has none of them.
    """
    for words in (*ORDERED, *UNORDERED):
        placed = [_placed(root, image, partial(_side_of, words=words)) for image in images]
        found = [one for one in placed if one is not None]
        if {one.place for one in found} != {0, 1}:
            continue
        if words in ORDERED:
            for image, one in zip(images, placed, strict=True):
                _must(one, image, f"{words[0]} or {words[1]}")
            return words, _alone(root, found, words)
        if len(found) == len(images) and _are_whole(found):
            return words, found
    raise UserError(f"{root} holds {len(images)} images, and their names do not say which belong together; it takes {WAYS}, or a table")


def _must(placed: Placed | None, image: Path, what: str) -> Placed:
    if placed is None:
        raise UserError(f"{image} has nothing like {what} in its place or name, and other images have; rename it, or move it elsewhere")
    return placed


def _are_whole(placed: Sequence[Placed]) -> bool:
    """Whether every name has both its sides, each once."""
    sides: dict[str, list[int]] = {}
    for one in placed:
        sides.setdefault(one.name, []).append(one.place)
    return all(sorted(found) == [0, 1] for found in sides.values())


def _alone(root: Path, placed: list[Placed], words: tuple[str, str]) -> list[Placed]:
    """Two images that are alone in fox/w and fox/l belong together, whatever they are called; the pair is then called fox.

    Not so in the folders of the source itself, which may be there for any number of pairs.
    """
    folders: dict[Path, list[Placed]] = {}
    for one in placed:
        if one.path.parent.name.lower() in words and one.path.parent.parent != root:
            folders.setdefault(one.path.parent.parent, []).append(one)
    alone = {
        one.path: Placed(one.path, folder.relative_to(root).as_posix(), one.place)
        for folder, found in folders.items()
        if [one.place for one in sorted(found, key=lambda one: one.place)] == [0, 1] and found[0].name != found[1].name
        for one in found
    }
    return [alone.get(one.path, one) for one in placed]


def _placed(root: Path, image: Path, place_of: Callable[[Path], tuple[int, str] | None]) -> Placed | None:
    found = place_of(image.relative_to(root))
    return None if found is None else Placed(image, found[1], found[0])


def _side_of(path: Path, words: tuple[str, str]) -> tuple[int, str] | None:
    """0 or 1 and the name, by one of two words; None where it is not there, or both are."""
    begins = words in ORDERED  # names may well begin with a number, or with "a"
    found = [(side, name) for side, word in enumerate(words) if (name := _without(path, re.escape(word), begins=begins))]
    return found[0] if len(found) == 1 else None


def _rank_of(path: Path) -> tuple[int, str] | None:
    """The rank that a path's first such word tells, and the name; None where there is none."""
    name = _without(path, RANK)
    words = [found[0] for part in (*path.parts[:-1], path.stem) if (found := re.search(RANK, part, re.I))]
    return None if not name else (int(re.sub(r"\D", "", words[0])), name)


def _without(path: Path, word: str, *, begins: bool = True) -> str | None:
    """The place of an image without a word that is a folder, or all or the end of its name; None where it is nowhere.

    Args:
        path: of the image, below the source.
        word: a pattern without groups.
        begins: the word may be the beginning of a name too.
    """
    kept = [part for part in path.parts[:-1] if not re.fullmatch(word, part, re.I)]
    patterns = [rf"(.+)[_\-.]{word}", *([rf"{word}[_\-.](.+)"] if begins else [])]
    ends = next((found for pattern in patterns if (found := re.fullmatch(pattern, path.stem, re.I))), None)
    if re.fullmatch(word, path.stem, re.I):
        return "/".join(kept) or None
    if ends is None and len(kept) == len(path.parts) - 1:
        return None
    return "/".join([*kept, path.stem if ends is None else ends[1]])
