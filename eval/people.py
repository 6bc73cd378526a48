"""What people said of two models' images: `ARM/votes/NAME.parquet`, written by `dedpo vote BASE ARM` and read by `dedpo compare`.

| column | what it holds |
|---|---|
| file_base, file | the two images, in the base's folder and in the arm's |
| prompt, prompt_index, seed | as in the arm's index |
| rater | who answered; empty where nobody was asked, since both pictures are the same: such a row is a tie |
| preferred | 1 the arm's image, 0 the base's, 0.5 a tie |
| repeat | whether this is a hidden repetition, which measures the rater and nothing else |
| swapped, seconds, time | whether the arm stood on the left, how long it took, when; null where nobody was asked |

Metadata: fingerprints of all images of both folders (base_images, arm_images), the base's folder name, the voting's session and design.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError
from dedpo_diffusion.evaluation.arms import counted
from dedpo_diffusion.evaluation.samples import Row, images_digest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

COLUMNS = ("file_base", "file", "prompt_index", "seed", "rater", "preferred", "repeat")
TYPES = {
    "file_base": "string", "file": "string", "prompt": "string", "prompt_index": "int64", "seed": "int64", "rater": "string",
    "preferred": "float64", "repeat": "bool", "swapped": "bool", "seconds": "float64", "time": "string",
}  # fmt: skip


@dataclass(frozen=True)
class Votes:
    """Single answers about pairs of images, V of them.

    Attributes:
        row: (V,) which row of the arm.
        rater: V names; "" where nobody was asked, since both pictures are the same.
        preferred: (V,) 1 the arm's image, 0 the base's, 0.5 a tie; 0.5 where nobody was asked.
        repeat: (V,) whether the rater had answered this pair before: says how consistent people are, not which image is better.
    """

    row: np.ndarray
    rater: list[str]
    preferred: np.ndarray
    repeat: np.ndarray


def write_votes(arm: Path, name: str, answers: Sequence[Row], metadata: dict[str, Any]) -> Path:
    """Write `ARM/votes/NAME.parquet` atomically, replacing an older one, and return its path.

    Args:
        arm: the sample folder.
        name: the voting's.
        answers: rows with all columns of this module's table.
        metadata: base_images, arm_images, base, session, design; what is not text becomes JSON.
    """
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.files import atomic_file

    path = arm / "votes" / f"{name}.parquet"
    held = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    schema = pa.schema([(column, pa.type_for_alias(kind)) for column, kind in TYPES.items()], metadata=held)
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(answers), schema=schema), temporary)
    return path


def votes_session(path: Path) -> str | None:
    """The session of the voting that made a vote file; None where it says nothing, or there is no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        held = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return held[b"session"].decode() if b"session" in held else None


def read_votes(base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> Votes | None:
    """All votes that an arm's folder holds on its present images against the base's present ones; None where there are none.

    A file of votes on other images, of this arm or against another base, does not count (`votes_left_out` tells of it).

    Args:
        base, arm: sample folders.
        base_rows, arm_rows: of their indexes.

    Raises:
        UserError: a file that cannot be read, or whose answers are about other prompts, seeds or pairs than the indexes list.
    """
    mine, answers = _digests(base, base_rows, arm, arm_rows), []
    for path in sorted((arm / "votes").glob("*.parquet")):
        table = _read_table(path)
        if all(_held(table, key) == value for key, value in mine.items()):
            try:
                found = table.select([*COLUMNS, *({"prompt"} & set(table.column_names))]).to_pylist()
                _check(found, base_rows, arm_rows)
            except (KeyError, ValueError) as error:
                remedy = "restore what was changed, or remove the file and vote again with another --name"
                raise UserError(f"{path} cannot be read as votes on {arm} ({error}); {remedy}") from error
            answers += found
    return as_votes(answers, arm_rows) if answers else None


def as_votes(answers: Sequence[Row], arm_rows: Sequence[Row]) -> Votes:
    """Rows of a vote file as `Votes`; `arm_rows` hold their files."""
    import numpy as np

    place = {row["file"]: number for number, row in enumerate(arm_rows)}
    return Votes(
        np.array([place[answer["file"]] for answer in answers]),
        [answer["rater"] for answer in answers],
        np.array([answer["preferred"] for answer in answers], dtype=np.float64),
        np.array([answer["repeat"] for answer in answers], dtype=bool),
    )


def _digests(base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> dict[str, str]:
    """What the metadata of votes on these images hold."""
    return {"base_images": images_digest(base, base_rows), "arm_images": images_digest(arm, arm_rows)}


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        table.column("rater")
        return table
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as votes ({error}); restore it, or remove it") from error


def _held(table: pa.Table, key: str) -> str | None:
    value = (table.schema.metadata or {}).get(key.encode())
    return None if value is None else value.decode(errors="replace")


def _check(answers: Sequence[Row], base_rows: Sequence[Row], arm_rows: Sequence[Row]) -> None:
    """ValueError where an answer is none, or is not about the arm's image of its prompt and seed and the base's of the same."""
    mine = {row["file"]: row for row in arm_rows}
    theirs = {(row["prompt"], row["seed"]): row["file"] for row in base_rows}
    for number, answer in enumerate(answers):
        if answer["file"] not in mine:
            raise ValueError(f"row {number} is about {answer['file']!r}, which the folder does not list")
        if answer["preferred"] not in (0, 0.5, 1) or answer["rater"] is None or answer["repeat"] is None:
            raise ValueError(f"row {number} is no answer: preferred {answer['preferred']}, rater {answer['rater']!r}")
        row = mine[answer["file"]]
        for name in ("prompt", "seed"):
            if answer.get(name, row[name]) != row[name]:
                raise ValueError(f"row {number} is about {answer['file']} of {name} {answer[name]!r}, and the index has {row[name]!r}")
        partner = theirs.get((row["prompt"], row["seed"]))
        if answer["file_base"] != partner:
            of = f"prompt {row['prompt']!r} with seed {row['seed']}"
            raise ValueError(
                f"row {number} compares {answer['file']} with {answer['file_base']}, and the base's image of {of} is {partner}"
            )


# ---- votes that do not count


def votes_left_out(base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> list[str]:
    """What there is to tell of an arm's votes against this base that `read_votes` leaves out: those on images that were changed since,
    and those that a killed `dedpo vote` did not write. Votes against another base are none of them. Arguments as in `read_votes`."""
    mine, of, notes = _digests(base, base_rows, arm, arm_rows), base.resolve().name, []
    for path in sorted((arm / "votes").glob("*.parquet")):
        table = _read_table(path)
        other = [key for key, value in mine.items() if _held(table, key) != value]
        if other and (_held(table, "base") == of or "base_images" not in other):
            notes.append(
                _changed(sum(map(bool, table["rater"].to_pylist())), path, [arm if key == "arm_images" else base for key in other])
            )
    for path in sorted((arm / "votes").glob("*.sqlite")):
        try:
            note = _unwritten(path, base, base_rows, arm, arm_rows)
        except UserError as error:
            note = str(error)
        notes += [] if note is None else [note]
    return notes


def _changed(number: int, path: Path, folders: Sequence[Path]) -> str:
    folder = " and ".join(map(str, folders))
    what = f"{counted(number, 'vote')} in {path} are of other images than {folder} holds now, and do not count"
    return f"{what}; vote again, with another --name."


def _unwritten(path: Path, base: Path, base_rows: Sequence[Row], arm: Path, arm_rows: Sequence[Row]) -> str | None:
    """What to tell of the votes that a server keeps in `path`, where the vote file does not hold them all, or holds others."""
    from dedpo_diffusion.ballot.poll import SKIP
    from dedpo_diffusion.ballot.samples import fingerprint, match_samples
    from dedpo_diffusion.ballot.store import read_store

    meta, events = read_store(path)
    undone, file = {event.undoes for event in events}, path.with_suffix(".parquet")
    # two answers may come within one millisecond, so they are counted
    answers = Counter((e.rater, e.time) for e in events if e.kind == "vote" and e.answer != SKIP and e.number not in undone)
    digests = (images_digest(base, base_rows), images_digest(arm, arm_rows))
    if meta.get("images") != fingerprint(digests, match_samples(base, base_rows, arm, arm_rows)):
        told = file.is_file() or not answers or path.stem != f"vs-{base.resolve().name}"
        return None if told else _changed(answers.total(), path, [base, arm])
    held = _read_table(file).to_pylist() if file.is_file() else []
    written = Counter((row["rater"], row.get("time")) for row in held if row["rater"])
    if written == answers:
        return None
    what = f"{counted((answers - written).total(), 'vote')} in {path} do not count, since {file.name} was not written with them"
    if written >= answers:
        what = f"{counted((written - answers).total(), 'vote')} in {file} count, and were undone since"
    return f"{what}; write it: `{_export_command(path.stem, meta, base, arm)}`."


def _export_command(name: str, meta: dict[str, Any], base: Path, arm: Path) -> str:
    """The command that writes the vote file of this voting, with the design it was begun with."""
    from dedpo_diffusion.settings import VoteSettings

    usual = {"name": f"vs-{base.resolve().name}", **{key: getattr(VoteSettings, key) for key in ("seed", "repeats", "overlap")}}
    options = [f"--{key} {value}" for key, value in {**meta, "name": name}.items() if key in usual and value != usual[key]]
    return " ".join(["dedpo vote", str(base), str(arm), *options, "--export_only true"])
