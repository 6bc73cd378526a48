"""Every pair of a dataset with the answers that people gave, and what all exports do with its images."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.labels.files import label_names, read_labels, read_votes, vote_names
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import read_header
from dedpo_diffusion.pairs.formats.annotated import SIDES
from dedpo_diffusion.pairs.formats.comparison import Answer

SUFFIX = {"JPEG": ".jpg", "TIFF": ".tif"}  # of other formats their name


@dataclass(frozen=True)
class Item:
    """One pair of an export: its place, the pair, and what people said of it."""

    number: int
    pair: Pair
    answers: tuple[Answer, ...]

    @property
    def votes(self) -> int:
        """How many people answered."""
        return sum(one.votes for one in self.answers)

    @property
    def label_0(self) -> float | None:
        """The mean answer; None where nobody answered."""
        return sum(one.label_0 * one.votes for one in self.answers) / self.votes if self.answers else None

    @property
    def rater(self) -> str | None:
        """Who answered, if it was one person."""
        return next(iter({one.rater for one in self.answers}), None) if len({one.rater for one in self.answers}) == 1 else None

    def left_is(self, seed: int) -> str:
        """Which image an annotation tool shows on the left: by a hash of the pair's id, so that an export can be made again."""
        return SIDES[hashlib.blake2b(f"{seed}\0{self.pair.pair_id}".encode(), digest_size=1).digest()[0] % 2]

    def image(self, side: str) -> bytes:
        """The encoded file of image_0 or image_1."""
        return self.pair.image_0 if side == SIDES[0] else self.pair.image_1

    def suffix(self, side: str) -> str:
        """The ending of that file's name; UserError where it is no image."""
        header = read_header(self.image(side), f"pair {self.pair.pair_id!r}, {side}")
        return SUFFIX.get(header.format, f".{header.format.lower()}")

    def uri(self, side: str) -> str:
        """That file as a data URI."""
        kind = {".jpg": "jpeg", ".tif": "tiff"}.get(self.suffix(side), self.suffix(side)[1:])
        return f"data:image/{kind};base64,{base64.b64encode(self.image(side)).decode()}"


def other(side: str) -> str:
    """The other image of a pair."""
    return SIDES[1 - SIDES.index(side)]


def items(reader: PairReader, answers: Mapping[str, list[Answer]]) -> Iterator[Item]:
    """The pairs in order, each with its answers."""
    for number, pair in enumerate(reader.iter_pairs()):
        yield Item(number, pair, tuple(answers.get(pair.pair_id, ())))


def answers_of(folder: Path, name: str) -> tuple[dict[str, list[Answer]], list[str]]:
    """What people said, by pair_id: the single votes where there are any, else the label.

    Args:
        folder: the pair dataset.
        name: of the label file and the vote file.

    Returns:
        The answers, and what they leave out, in sentences.

    Raises:
        UserError: neither file is there, or they disagree.
    """
    found, said = _single(folder, name) if name in vote_names(folder) else ({}, [])
    if found and name not in label_names(folder):
        return found, said
    labels = read_labels(folder, name)
    people, counts = (labels.extra.get(column) or [None] * len(labels.pair_id) for column in ("rater", "votes"))
    for pair_id, label, rater, votes in zip(labels.pair_id, labels.label_0.tolist(), people, counts, strict=True):
        if pair_id not in found:
            found[pair_id] = [Answer(label, rater, int(votes or 1))]
        elif abs(_mean(found[pair_id]) - label) > 1e-6:
            raise UserError(
                f"{folder}: the label of {pair_id!r} in labels/{name}.parquet is {label:g}, and the mean of its votes "
                f"{_mean(found[pair_id]):g}; write them again with `dedpo vote {folder} --export_only true`, or remove one file"
            )
    if "propensity" in labels.extra:
        said.append("the probabilities with which pairs came up (propensity) stay behind; keep the dataset to merge with them")
    return found, said


def _single(folder: Path, name: str) -> tuple[dict[str, list[Answer]], list[str]]:
    """Single answers by pair_id, without hidden repetitions."""
    votes = read_votes(folder, name)
    found: dict[str, list[Answer]] = {}
    repeats = votes.extra.get("repeat") or [False] * len(votes.pair_id)
    for pair_id, label, number, rater, again in zip(
        votes.pair_id, votes.label_0.tolist(), votes.votes.tolist(), votes.rater, repeats, strict=True
    ):
        if not again:
            found.setdefault(pair_id, []).append(Answer(label, rater, number))
    hidden = sum(map(bool, repeats))
    return found, [f"hidden repetitions, which make no label: {hidden} left out"] * bool(hidden)


def _mean(answers: list[Answer]) -> float:
    return sum(one.label_0 * one.votes for one in answers) / sum(one.votes for one in answers)


def write_image(folder: Path, name: str, data: bytes) -> str:
    """Write an image below `folder` and return its relative path."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return name


def as_text(value: Any) -> Any:
    """A value of a source column as JSON and tables hold it: what has parts as text."""
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value, default=str)
