"""From a source's comparisons to a pair dataset: policies, sides, duplicates, votes, and a count of everything.

    source row -> Comparison -> images read and decoded (threads) -> kept, merged or dropped (in order, counted) -> PairWriter
                                                             -> answers, in terms of the pair's own sides -> labels, votes

Every comparison ends in exactly one count: kept, `duplicates_merged`, or dropped as `identical`, `unlabelled`, `ties` or
`unreadable`. After each whole shard a journal is written, from which an interrupted import goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.core.prefetch import prefetch
from dedpo_diffusion.core.records import Pair, Votes
from dedpo_diffusion.core.texts import shown
from dedpo_diffusion.labels.files import aggregate, write_labels, write_votes
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, Unreadable
from dedpo_diffusion.settings import IngestSettings

COUNTS = (
    "empty_rows", "comparisons", "kept", "duplicates_merged", "duplicates_kept", "renamed", "sides_swapped",
    "identical", "identical_dropped", "unlabelled", "unlabelled_dropped", "ties", "ties_dropped", "unreadable_dropped",
    "tie_answers", "tie_answers_dropped", "labelled", "votes", "conflicting",
)  # fmt: skip
RECENT = 64  # images known to decode: a ranking's images come in several comparisons
MOST_VOTES = 10**9  # more than any crowd, and sums of them fit 64 bits
NAMED = 5  # rows that are named of those dropped for one reason
IN_FLIGHT = 4  # comparisons in flight for each thread
NOTED = "noted: "  # what a count is called that a format's own words tell of
SWAPPED = "swapped"  # source column of pairs whose sides were shuffled
SEEN = {
    "ties": "comparisons that every answer calls a tie",
    "unlabelled": "comparisons that nobody judged",
    "identical": "comparisons of one image with itself",
}


@dataclass(frozen=True)
class Place:
    """Where in the source the next comparison stands: source row, and comparisons of that row already taken."""

    row: int = 0
    part: int = 0


@dataclass(frozen=True)
class Images:
    """Both images' bytes, their digests, or what is wrong with them."""

    data: tuple[bytes, bytes] = (b"", b"")
    digests: tuple[bytes, bytes] = (b"", b"")
    error: UserError | None = None

    @property
    def same(self) -> bool:
        """Whether both were read and are the same file."""
        return self.digests[0] == self.digests[1] != b""


@dataclass
class Ledger:
    """What an import knows so far: everything but the pairs themselves.

    `seen` maps the digest of a prompt and two images to the pair's id and whether its image_0 has the smaller digest.
    """

    place: Place = Place()
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    answers: list[tuple[str, float, int, str | None]] = field(default_factory=list)
    seen: dict[str, tuple[str, bool]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def name(self, reason: str, where: str) -> None:
        """Note where in the source a comparison was that is not kept; of each reason the first few."""
        places = self.dropped.setdefault(reason, [])
        if len(places) < NAMED:
            places.append(where)


# ---- reading


def comparisons(
    source: Any, entries: Callable[..., Iterable[Comparison]], settings: IngestSettings, start: Place
) -> Iterator[tuple[Comparison | None, Place]]:
    """The source's comparisons from `start` on, each with the place behind it; None for a row that holds none."""
    for row, (where, values, folder) in enumerate(source.rows(start.row), start.row):
        skip = start.part if row == start.row else 0
        part, last = 0, None
        for part, comparison in enumerate(entries(values, where, folder, settings), 1):
            if last is not None:
                yield last, Place(row, part - 1)
            last = comparison if part > skip else None
        if last is not None or part == 0:  # the row is done with its last comparison
            yield last, Place(row + 1)


class Tried:
    """Reads images and sees whether they can be decoded; remembers the last ones that could. Used by several threads."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def images(self, comparison: Comparison) -> Images:
        """Both images of a comparison; an error is returned, not raised."""
        try:
            (data_0, digest_0), (data_1, digest_1) = self._image(comparison, 0), self._image(comparison, 1)
        except UserError as error:
            return Images(error=error)
        return Images((data_0, data_1), (digest_0, digest_1))

    def _image(self, comparison: Comparison, side: int) -> tuple[bytes, bytes]:
        """An image's bytes and their digest."""
        image = comparison.images[side]
        where = f"{comparison.where}, image {side}" + (f" ({image})" if isinstance(image, Path) else "")
        if isinstance(image, Unreadable):
            raise UserError(f"{where} {image.why}, or leave its pair out")
        data = image if isinstance(image, bytes) else _read_file(image, where)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._good:
            decode_image(data, where)
            self._good[digest] = None
            while len(self._good) > RECENT:
                self._good.popitem(last=False)
        return data, digest


def _read_file(path: Path | None, where: str) -> bytes:
    if path is None:
        raise UserError(f"{where} is missing; add it, or leave its pair out")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); give --images the folder of the images, mend the row, or leave its pair out"
        ) from error


# ---- what becomes of a comparison


def reasons(comparison: Comparison) -> list[str]:
    """What is special about a comparison before its images are seen, and so may drop it: identical, unlabelled, ties."""
    ties = [answer.label_0 == 0.5 for answer in comparison.answers]
    found = {"identical": comparison.same, "unlabelled": not ties, "ties": bool(ties) and all(ties)}
    return [reason for reason, holds in found.items() if holds]


def dropped_for(why: list[str], settings: IngestSettings) -> str | None:
    """The first of these reasons for which such comparisons are dropped."""
    policies = {"identical": settings.identical, "unlabelled": settings.unlabelled, "ties": settings.ties}
    return next((reason for reason in why if policies[reason] == "drop"), None)


class Importer:
    """Takes comparisons one by one into a pair dataset.

    Args:
        name: the format's name, which begins every pair_id.
        settings: the policies.
        winner_first: the source lists the preferred image first, so sides are shuffled by `settings.seed`.
        writer: takes the kept pairs.
        ledger: where an interrupted import stood.
    """

    def __init__(self, name: str, settings: IngestSettings, *, winner_first: bool, writer: PairWriter, ledger: Ledger) -> None:
        self.name, self.settings, self.winner_first, self.writer, self.ledger = name, settings, winner_first, writer, ledger
        self._tried = Tried()

    def images(self, item: tuple[Comparison | None, Place]) -> Images:
        """Read and try a comparison's images, unless there is none, or it is dropped whatever they show. Runs in threads."""
        comparison, _ = item
        return Images() if comparison is None or dropped_for(reasons(comparison), self.settings) else self._tried.images(comparison)

    def take(self, comparison: Comparison, images: Images) -> bool:
        """Keep, merge or drop one comparison, and count it; True where that finished a shard.

        Raises:
            UserError: an answer outside [0, 1], or an unreadable image that is not to be skipped.
        """
        counts, settings = self.ledger.counts, self.settings
        _check_answers(comparison)
        why = reasons(comparison)
        if images.same and "identical" not in why:
            why.insert(0, "identical")
        counts["comparisons"] += 1
        counts.update(why)
        counts.update({NOTED + words: number for words, number in comparison.noted.items()})
        counts["tie_answers"] += sum(answer.votes for answer in comparison.answers if answer.label_0 == 0.5)
        reason = dropped_for(why, settings)
        if reason is None and images.error is not None:
            if settings.unreadable == "error":
                raise UserError(f"{images.error} with --unreadable skip")
            reason = "unreadable"
        if reason is not None:
            counts[f"{reason}_dropped"] += 1
            self.ledger.name(reason, comparison.where if images.error is None else str(images.error).partition(";")[0])
            return False
        return self._keep(comparison, images)

    def _keep(self, comparison: Comparison, images: Images) -> bool:
        smaller_first = images.digests[0] <= images.digests[1]
        low, high = sorted(images.digests)
        digest = hashlib.blake2b(comparison.prompt.encode() + b"\0" + low + high, digest_size=16).hexdigest()
        if digest in self.ledger.seen and self.settings.duplicates == "merge":
            pair_id, stored = self.ledger.seen[digest]
            self._answer(pair_id, comparison.answers, flip=stored != smaller_first)
            self.ledger.counts["duplicates_merged"] += 1
            self.ledger.name("duplicates", f"{comparison.where} (into {pair_id})")
            return False
        self.ledger.counts["duplicates_kept"] += digest in self.ledger.seen
        pair_id = self._free_id(comparison)
        swap = self.winner_first and hashlib.blake2b(f"{self.settings.seed}\0{pair_id}".encode(), digest_size=1).digest()[0] % 2 == 1
        self.ledger.seen.setdefault(digest, (pair_id, smaller_first != swap))
        self.ledger.counts["kept"] += 1
        self.ledger.counts["sides_swapped"] += swap
        self._answer(pair_id, comparison.answers, flip=swap)
        image_0, image_1 = images.data[::-1] if swap else images.data
        source = dict(comparison.source) | {SWAPPED: swap}
        return self.writer.add(Pair(pair_id, comparison.prompt, image_0, image_1, source))

    def _free_id(self, comparison: Comparison) -> str:
        """The pair's id, after the source's own name where it has one; a name that comes again gets a number."""
        number = self.ledger.counts["comparisons"] - 1
        pair_id = comparison.pair_id or f"{self.name}-{number if comparison.key is None else comparison.key}"
        if pair_id not in self.writer:
            return pair_id
        self.ledger.counts["renamed"] += 1
        return f"{pair_id}-{number}"

    def _answer(self, pair_id: str, answers: Iterable[Answer], *, flip: bool) -> None:
        for answer in answers:
            if answer.label_0 == 0.5 and self.settings.ties == "drop":
                self.ledger.counts["tie_answers_dropped"] += answer.votes
                continue
            label = 1 - answer.label_0 if flip else answer.label_0
            self.ledger.answers.append((pair_id, label, answer.votes, answer.rater))


def _check_answers(comparison: Comparison) -> None:
    for answer in comparison.answers:
        if not 0 <= answer.label_0 <= 1:
            raise UserError(
                f"{comparison.where}: label_0 is {answer.label_0}, and must be the probability in [0, 1] that image 0 is preferred; mend it"
            )
        if not 1 <= answer.votes <= MOST_VOTES:
            raise UserError(f"{comparison.where}: an answer with {shown(answer.votes)} votes; mend the count, or leave it out")


# ---- labels at the end


def write_answers(folder: Path, ledger: Ledger) -> None:
    """Write the human labels, and the single votes where a pair has several or a person is named; complete the counts."""
    if not ledger.answers:
        return
    ids, label_0, count, rater = (list(column) for column in zip(*ledger.answers, strict=True))
    votes = Votes(ids, np.array(label_0, dtype=np.float64), np.array(count, dtype=np.int64), rater)
    labels = aggregate(votes)
    if labels.extra["votes"] == [1] * len(labels.pair_id):
        del labels.extra["votes"]
    write_labels(folder, "human", labels, origin="dedpo ingest")
    if "votes" in labels.extra or any(name is not None for name in rater):
        write_votes(folder, "human", votes)
    sides: dict[str, set[bool]] = {}
    for pair_id, label in zip(ids, label_0, strict=True):
        if label != 0.5:
            sides.setdefault(pair_id, set()).add(label > 0.5)
    ledger.counts["labelled"] = len(labels.pair_id)
    ledger.counts["votes"] = int(votes.votes.sum())
    ledger.counts["conflicting"] = sum(len(found) == 2 for found in sides.values())


# ---- the journal of an interrupted import


class Journal:
    """One JSON file for each finished shard: what the ledger gained since the one before.

    Args:
        folder: where the import is being made.
        identity: what must be the same for an import to go on: the source and every setting that shapes the pairs.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.pairs = self.answers = 0

    def _file(self, shard: int) -> Path:
        return self.folder / "journal" / f"{shard:05d}.json"

    def shards(self) -> int:
        """How many shards are journaled under this identity; another identity's are none."""
        start = self.folder / "journal" / "identity.json"
        if not start.is_file() or json.loads(start.read_text(encoding="utf-8")) != self.identity:
            return 0
        shard = 0
        while self._file(shard).is_file():
            shard += 1
        return shard

    def begin(self) -> None:
        """Start a new import."""
        write_json(self.folder / "journal" / "identity.json", self.identity)

    def read(self, shards: int) -> Ledger:
        """The ledger as it was after that many shards."""
        ledger = Ledger()
        for shard in range(shards):
            record = json.loads(self._file(shard).read_text(encoding="utf-8"))
            ledger.place = Place(*record["place"])
            ledger.counts = Counter(record["counts"])
            ledger.answers += [tuple(answer) for answer in record["answers"]]
            ledger.seen |= {digest: tuple(found) for digest, found in record["seen"].items()}
            ledger.dropped = record.get("dropped", {})
        self._mark(ledger)
        return ledger

    def write(self, shard: int, ledger: Ledger) -> None:
        """Note that a shard is on disk."""
        fresh = islice(ledger.seen.items(), self.pairs, None)
        record = {"place": [ledger.place.row, ledger.place.part], "counts": dict(ledger.counts), "dropped": ledger.dropped}
        write_json(self._file(shard), record | {"answers": ledger.answers[self.answers :], "seen": dict(fresh)})
        self._mark(ledger)

    def _mark(self, ledger: Ledger) -> None:
        self.pairs, self.answers = len(ledger.seen), len(ledger.answers)


def shuffles(chosen: Any) -> bool:
    """Whether the chosen source lists the preferred image first, so that sides must be shuffled."""
    decide = getattr(chosen.module, "winner_first", None)
    return bool(decide(chosen.source.columns) if decide else chosen.module.WINNER_FIRST)


def take_in(
    chosen: Any, settings: IngestSettings, folder: Path, journal: Journal, ledger: Ledger, advance: Callable[[int], object]
) -> None:
    """Read a source's comparisons into `folder`, from where the ledger stands.

    Args:
        chosen: name, module and source of the format.
        settings: the policies.
        folder: the dataset being made, with the whole shards that the journal knows.
        journal: notes every whole shard.
        ledger: what is known so far, and then of everything.
        advance: told how many source rows are done.

    Raises:
        UserError: bad rows or images, or no pair kept.
    """
    with PairWriter(folder, shard_pairs=settings.shard_pairs, goes_on=journal.shards()) as writer:
        importer = Importer(chosen.name, settings, winner_first=shuffles(chosen), writer=writer, ledger=ledger)
        found = comparisons(chosen.source, chosen.module.entries, settings, ledger.place)
        workers = settings.workers or os.cpu_count() or 1
        for (comparison, behind), images in prefetch(found, importer.images, workers=workers, depth=IN_FLIGHT * workers):
            finished = comparison is not None and importer.take(comparison, images)
            ledger.counts["empty_rows"] += comparison is None
            advance(behind.row - ledger.place.row)
            ledger.place = behind
            if finished:
                journal.write(writer.shards - 1, ledger)
        if not len(writer):
            raise UserError(f"no pair of {settings.source} was kept: {'; '.join(count_lines(ledger.counts))}")
    write_answers(folder, ledger)


# ---- the count of everything


def count_lines(counts: Counter[str], dropped: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Iterator[str]:
    """What was kept, dropped and why, one line each; `dropped` of a `Ledger` adds lines that name the first rows."""

    def rows(kind: str, count: int) -> Iterator[str]:
        named = dropped.get(kind, ())
        yield from (f"  {where}" for where in named)
        if named and count > len(named):
            yield f"  and {count - len(named)} more"

    yield f"comparisons read: {counts['comparisons']}"
    if counts["empty_rows"]:
        yield f"rows without a comparison, as of a single image: {counts['empty_rows']}"
    yield from (f"{name.removeprefix(NOTED)}: {number}" for name, number in counts.items() if name.startswith(NOTED))
    for kind, words in SEEN.items():
        yield f"{words}: {counts[kind]} (dropped {counts[f'{kind}_dropped']})"
        yield from rows(kind, counts[f"{kind}_dropped"])
    yield f"single tie answers: {counts['tie_answers']} ({counts['tie_answers_dropped']} left out of pairs that were kept)"
    yield f"comparisons with an unreadable image: {counts['unreadable_dropped']} dropped"
    yield from rows("unreadable", counts["unreadable_dropped"])
    yield (
        f"the same two images under the same prompt again: {counts['duplicates_merged']} merged into the first pair, "
        f"{counts['duplicates_kept']} kept as pairs of their own"
    )
    yield from rows("duplicates", counts["duplicates_merged"])
    if counts["renamed"]:
        yield f"names that the source gives to several comparisons: {counts['renamed']} got a number behind them"
    yield (
        f"pairs kept: {counts['kept']}, {counts['labelled']} of them with a human label from {counts['votes']} votes, "
        f"{counts['conflicting']} with votes for both sides"
    )
