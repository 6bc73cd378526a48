"""A shard of pairs -> raw answers, as tables that are kept until all shards are done.

A judge made of a scorer looks at single images: an image that comes in several pairs of one prompt is scored once, where it
comes first in the data set. Other judges look at pairs. What a batch holds depends on the shard alone, so that an
interrupted run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.judges.bradley_terry import BradleyTerry
from dedpo_diffusion.judges.journal import Journal
from dedpo_diffusion.judges.judge import Answers, Judge, Question

if TYPE_CHECKING:
    from PIL.Image import Image

PART_COLUMNS = (
    "score",
    "pair_id",
    "score_0",
    "score_1",
    "missing",
    "failed",
)  # whatever else a judge tells goes into the label file as it is
TOKENS = ("prompt_tokens", "answer_tokens")
KEY = "S32"  # an image under a prompt: 32 hexadecimal digits

Images = tuple["Image | None", "Image | None"]


# ---- which images come first where


def item_keys(pairs: Iterable[Pair]) -> np.ndarray:
    """A key (n, 2) of KEY for each image under its prompt: the same file under the same prompt has the same key."""
    keys = []
    for pair in pairs:
        start = hashlib.blake2b(pair.prompt.encode() + b"\0", digest_size=16)
        for image in (pair.image_0, pair.image_1):
            digest = start.copy()
            digest.update(image)
            keys.append(digest.hexdigest().encode())
    return np.array(keys, dtype=KEY).reshape(-1, 2)


class FirstUses:
    """Where each image under its prompt comes first.

    Args:
        keys: (N, 2) of `item_keys`, of the whole data set.
    """

    def __init__(self, keys: np.ndarray) -> None:
        _, first, inverse = np.unique(keys.ravel(), return_index=True, return_inverse=True)
        self.first = np.zeros(keys.size, dtype=bool)
        self.first[first] = True
        self._source = first[inverse]

    def mask(self, rows: range) -> np.ndarray:
        """(len(rows), 2) bool: the images that come first in these pairs."""
        return self.first.reshape(-1, 2)[rows.start : rows.stop]

    def places(self) -> np.ndarray:
        """(N, 2) int64: the place, among first uses in the order of the data set, of each pair's images."""
        return (np.cumsum(self.first) - 1)[self._source].reshape(-1, 2)

    def everywhere(self, scores: np.ndarray) -> np.ndarray:
        """(N, 2) scores of all images from those of first uses, (U,), in the order of the data set."""
        spread = np.full(self.first.size, np.nan)
        spread[self.first] = scores
        return spread[self._source].reshape(-1, 2)


# ---- one shard


class Work(Protocol):
    """One judge's share of a shard of pairs."""

    def wants(self, place: int) -> tuple[bool, bool]:
        """Which images of the pair at `place` of the shard it has to see."""
        ...

    def take(self, place: int, pair: Pair, images: Images) -> None:
        """Judge a pair, now or with those that follow; every pair of the shard comes, in order."""
        ...

    def finish(self) -> pa.Table:
        """Judge what is left, and give out the answers."""
        ...


class ImageWork:
    """Scores of the images that come first in a shard.

    Args:
        judge: whose scorer it is.
        first: (n, 2) bool, from `FirstUses.mask`.
        batch: images scored at once.
        embed: whether to keep the embeddings of a scorer that gives them.
    """

    def __init__(self, judge: BradleyTerry, first: np.ndarray, batch: int, *, embed: bool = False) -> None:
        self.judge, self.first, self.batch, self.embed = judge, first, batch, embed
        self._seen: list[np.ndarray] = []
        self._prompts: list[str] = []
        self._images: list[Image] = []
        self._scores: list[np.ndarray] = [np.empty(0)]

    def wants(self, place: int) -> tuple[bool, bool]:
        """See `Work`."""
        return bool(self.first[place, 0]), bool(self.first[place, 1])

    def take(self, place: int, pair: Pair, images: Images) -> None:
        """See `Work`."""
        for wanted, image in zip(self.wants(place), images, strict=True):
            if wanted and image is not None:
                self._prompts.append(pair.prompt)
                self._images.append(image)
        while len(self._images) >= self.batch:
            self._score(self.batch)

    def _score(self, count: int) -> None:
        if self.embed:
            scores, seen = self.judge.score_and_embed(self._prompts[:count], self._images[:count])
            self._seen.append(seen.astype(np.float16))
        else:
            scores = self.judge.score(self._prompts[:count], self._images[:count])
        self._scores.append(scores)
        del self._prompts[:count], self._images[:count]

    def finish(self) -> pa.Table:
        """One column, `score`."""
        if self._images:
            self._score(len(self._images))
        return pa.table({"score": np.concatenate(self._scores)})

    def embeddings(self) -> np.ndarray:
        """(U, D) float16 of the images that were scored, in order, once `finish` is done; (0, 0) where there were none."""
        return np.concatenate(self._seen) if self._seen else np.zeros((0, 0), np.float16)


class PairWork:
    """Answers to the pairs of a shard.

    Args:
        judge: is asked.
        batch: pairs asked about at once.
        known: the table of an earlier run, whose missing answers alone are asked for again.
        journal: where a judge whose answers cost money keeps them until every pair of the shard is answered.
        failed_only: of missing answers, ask only for those that a server failed to give.
    """

    def __init__(
        self, judge: Judge, batch: int, known: pa.Table | None = None, *, journal: Journal | None = None, failed_only: bool = False
    ) -> None:
        self.judge, self.batch, self.journal = judge, judge.parallel or batch, journal or Journal()
        self._rows: list[dict[str, Any]] = [] if known is None else known.to_pylist()
        self._asked = None if known is None else {place for place, row in enumerate(self._rows) if _is_open(row, failed_only)}
        self._waiting: list[tuple[int, Question]] = []

    def wants(self, place: int) -> tuple[bool, bool]:
        """See `Work`."""
        asked = self._asked is None or place in self._asked
        return asked, asked

    def take(self, place: int, pair: Pair, images: Images) -> None:
        """See `Work`."""
        if self._asked is None:
            self._rows.append({})
        if self.wants(place)[0] and images[0] is not None and images[1] is not None:
            self._waiting.append((place, Question(pair.pair_id, pair.prompt, images[0], images[1])))
        if len(self._waiting) == self.batch:
            self._ask()

    def _ask(self) -> None:
        answers = self.judge.answer_with([question for _, question in self._waiting], self.journal)
        for k, (place, question) in enumerate(self._waiting):
            earlier, self._rows[place] = self._rows[place], _row(question.pair_id, answers, k)
            for count in TOKENS:  # those of earlier attempts were paid for too
                if count in self._rows[place]:
                    self._rows[place][count] += earlier.get(count) or 0
        self._waiting = []

    def finish(self) -> pa.Table:
        """Columns pair_id, score_0, score_1, missing, and what else the judge tells."""
        if self._waiting:
            self._ask()
        return pa.Table.from_pylist(self._rows)

    def failed(self) -> set[str]:
        """The pairs that a server failed to answer in one order or both."""
        return {row["pair_id"] for row in self._rows if row.get("failed")}


def _row(pair_id: str, answers: Answers, k: int) -> dict[str, Any]:
    score_0, score_1 = (float(score) for score in answers.scores[k])
    extra = {name: values[k] for name, values in answers.extra.items()}
    return {"pair_id": pair_id, "score_0": score_0, "score_1": score_1, "missing": answers.missing[k], **extra}


# ---- kept on disk


def write_part(path: Path, table: pa.Table, stamp: dict[str, str]) -> None:
    """Keep a finished shard; `stamp` says which judge looked at which pairs."""
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(stamp), temporary)


def read_part(path: Path, stamp: dict[str, str]) -> pa.Table:
    """A finished shard.

    Raises:
        UserError: another judge, temperature or dataset made it.
    """
    with open_parquet(path) as file:
        table = file.read(use_threads=False)
    check_stamp(path.parent, {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}, stamp)
    return table


def check_stamp(folder: Path, held: dict[str, str], stamp: dict[str, str]) -> None:
    """The unfinished labels in `folder` are of this stamp.

    Raises:
        UserError: another judge, temperature, dataset or shard size made them.
    """
    for key, value in stamp.items():
        if held.get(key) != value:
            raise UserError(
                f"{folder} holds unfinished labels of another {key} ({held.get(key)}, now {value}): "
                "finish them with the same settings, give another --name, or remove that folder"
            )


def _is_open(row: dict[str, Any], failed_only: bool) -> bool:
    """Whether an answer is missing; `failed_only`: because a server failed, as far as its judge tells such from refusals."""
    return bool(row["missing"]) and not (failed_only and row.get("failed") is False)


def count_missing(table: pa.Table, *, failed_only: bool = False) -> int:
    """Pairs of a shard without an answer."""
    if "missing" not in table.column_names:
        return 0
    names = [name for name in ("missing", "failed") if name in table.column_names]
    return sum(_is_open(row, failed_only) for row in table.select(names).to_pylist())


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """All shards in one table; a column that some lack is null there."""
    return pa.concat_tables(tables, promote_options="permissive")
