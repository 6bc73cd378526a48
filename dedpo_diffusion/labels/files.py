"""What is said of the pairs of a dataset, and what is trained on: parquet files beside the pairs.

    PAIRS/labels/<name>.parquet           pair_id, label_0 in [0, 1], what else is known of the answer, any source_* columns
    PAIRS/votes/<name>.parquet            the single answers behind a label file: pair_id, label_0, votes, rater, ...
    PAIRS/targets/<name>.parquet, .json   pair_id, target, weight; and the report of the merge

Rows are counted from 0.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.defaults import DEFAULT_METHOD
from dedpo_diffusion.core.files import atomic_file, read_object, write_text
from dedpo_diffusion.core.records import Labels, Targets, Votes
from dedpo_diffusion.core.tables import check_columns, check_no_nulls, check_types, check_unique, open_parquet

LABEL_COLUMNS = ("pair_id", "label_0")
LABEL_EXTRAS = (
    "rater", "votes", "propensity", "score_0", "score_1", "judge_version", "order_consistent", "validity", "prompt_tokens", "answer_tokens",
    "seconds", "cluster",
)  # fmt: skip
CALIBRATED = "dedpo calibrate"  # origin of label files that repeat a judge's answers with what people said worked in
VOTE_COLUMNS = ("pair_id", "label_0", "votes", "rater")
VOTE_EXTRAS = {"swapped": "true or false", "repeat": "true or false", "seconds": "a number", "time": "text", "ranking": "text"}
TARGET_COLUMNS = ("pair_id", "target", "weight")
TARGET_EXTRAS = ("human", "judge", "inverse", "power")  # what the targets were merged from


# ---- labels


def named_file(folder: Path, kind: str, name: str, suffix: str = ".parquet") -> Path:
    """`folder/kind/name.parquet`; UserError where the name is none for a file there."""
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"{name!r} cannot name a file in {Path(folder) / kind}; use letters, digits, - and _")
    return Path(folder) / kind / f"{name}{suffix}"


def _names(folder: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in (Path(folder) / kind).glob("*.parquet") if not path.name.startswith("."))


def label_names(folder: Path) -> list[str]:
    """Names of the label files of a pair dataset, sorted."""
    return _names(folder, "labels")


def _maker(folder: Path, kind: str, name: str) -> str:
    """The command that makes such a file."""
    if kind == "targets":
        method = ["--method", name] if name in ("human_only", "naive", "dedpo", "tuned", "adapted") else ["--name", name]
        words = ["merge", folder, *([] if name in ("auto", DEFAULT_METHOD) else method)]
    elif kind == "votes" or name == "human":
        words = ["vote", folder, *([] if name == "human" else ["--name", name])]
    else:
        words = ["label", folder, "--with", name]
    return f"`{shlex.join(['dedpo', *map(str, words)])}`"


def _existing(folder: Path, kind: str, name: str) -> Path:
    path = named_file(folder, kind, name)
    if not path.is_file():
        held = _names(folder, kind)
        meant = difflib.get_close_matches(name, held, n=1, cutoff=0.75)
        remedy = f"did you mean {meant[0]}?" if meant else f"run {_maker(folder, kind, name)} first"
        raise UserError(f"there is no {path} ({kind} there: {', '.join(held) or 'none'}): {remedy}")
    return path


def _check_range(path: Path, name: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if bad.size:
        raise UserError(
            f"{path} row {bad[0]}: {name} is {values[bad[0]]}, and must be the probability in [0, 1] that image 0 is preferred; "
            "mend it, or leave the row out"
        )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers as (N,) float64 of its own; a null becomes NaN."""
    return np.array(table.column(name).cast(pa.float64(), safe=False).to_numpy())


def _check_propensity(path: Path, values: Sequence[Any] | None) -> None:
    for row, value in enumerate(values or ()):
        if value is None or not 0 < value <= 1:
            raise UserError(f"{path} row {row}: propensity is {value}, and must be the probability in (0, 1] that this pair was labelled")


def read_labels(folder: Path, name: str, *, extras: Sequence[str] | None = None) -> Labels:
    """Read `folder/labels/<name>.parquet`.

    Args:
        extras: which of the further columns to read, where they are there; None reads all.

    Raises:
        UserError: no such file, a missing or unknown column, a label outside [0, 1] or missing, a pair_id twice.
    """
    path = _existing(folder, "labels", name)
    with open_parquet(path) as file:
        check_columns(path, file.schema_arrow, LABEL_COLUMNS, LABEL_EXTRAS)
        types = {"pair_id": "text", "label_0": "a number", "propensity": "a number"}
        check_types(path, file.schema_arrow, {name: kind for name, kind in types.items() if name in file.schema_arrow.names})
        wanted = None if extras is None else [*LABEL_COLUMNS, *(name for name in extras if name in file.schema_arrow.names)]
        table = file.read(columns=wanted, use_threads=False)
    ids, label_0 = table.column("pair_id").to_pylist(), _numbers(table, "label_0")
    columns = table.drop_columns(list(LABEL_COLUMNS)).to_pydict()
    check_no_nulls(path, "pair_id", ids)
    _check_range(path, "label_0", label_0)
    check_unique(path, ids)
    _check_propensity(path, columns.get("propensity"))
    return Labels(ids, label_0, columns)


def label_origin(folder: Path, name: str) -> str | None:
    """What made `folder/labels/<name>.parquet`, as its writer put it; None if there is no such file or it does not say."""
    path = named_file(folder, "labels", name)
    if not path.is_file():
        return None
    with open_parquet(path) as file:
        found = (file.schema_arrow.metadata or {}).get(b"origin")
    return None if found is None else found.decode()


def write_labels(folder: Path, name: str, labels: Labels, *, origin: str | None = None) -> Path:
    """Write `folder/labels/<name>.parquet` atomically, replacing an older one, and return its path.

    Args:
        origin: what made the labels, for `label_origin`.

    Raises:
        UserError: what `read_labels` would refuse.
        ValueError: columns of unequal length.
    """
    path = named_file(folder, "labels", name)
    columns = {"pair_id": pa.array(labels.pair_id, pa.string()), "label_0": pa.array(np.asarray(labels.label_0, dtype=np.float64))}
    columns |= {key: pa.array(values) for key, values in labels.extra.items()}
    table = pa.table(columns)
    check_columns(path, table.schema, LABEL_COLUMNS, LABEL_EXTRAS)
    _check_range(path, "label_0", np.asarray(labels.label_0))
    check_unique(path, labels.pair_id)
    _check_propensity(path, labels.extra.get("propensity"))
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(None if origin is None else {"origin": origin}), temporary)
    return path


def row_of(wanted: Sequence[str], ids: Sequence[str]) -> np.ndarray:
    """(M,) int64: where each of M `wanted` pair_ids stands among `ids`; -1 where it does not."""
    places = pc.index_in(pa.array(wanted, pa.string()), value_set=pa.array(ids, pa.string()))
    return places.fill_null(-1).to_numpy().astype(np.int64)


def align(labels: Labels, ids: Sequence[str], *, folder: Path, name: str, complete: bool = False) -> np.ndarray:
    """Labels in the order of the pairs.

    Args:
        labels: read from `folder/labels/<name>.parquet`.
        ids: the N pair_ids of the dataset.
        folder, name: for messages.
        complete: every pair must have a label.

    Returns:
        (N,) float64, NaN where there is no label.

    Raises:
        UserError: a label of an unknown pair; with `complete`, a pair without a label.
    """
    path = named_file(folder, "labels", name)
    rows = row_of(labels.pair_id, ids)
    if (rows < 0).any():
        row = int(np.argmax(rows < 0))
        raise UserError(f"{path} row {row}: pair_id {labels.pair_id[row]!r} is none of the dataset's pairs; remove the row")
    aligned = np.full(len(ids), np.nan)
    aligned[rows] = labels.label_0
    missing = np.flatnonzero(np.isnan(aligned))
    if complete and missing.size:
        covered = f"covers {len(ids) - missing.size} of {len(ids)} pairs (first missing: {ids[missing[0]]!r})"
        raise UserError(f"{path} {covered}; run `dedpo label` again")
    return aligned


# ---- votes


def vote_names(folder: Path) -> list[str]:
    """Names of the vote files of a pair dataset, sorted."""
    return _names(folder, "votes")


def read_votes(folder: Path, name: str) -> Votes:
    """Read `folder/votes/<name>.parquet`.

    Raises:
        UserError: no such file, a missing or unknown column, a label outside [0, 1] or missing, a count below 1.
    """
    path = _existing(folder, "votes", name)
    with open_parquet(path) as file:
        _check_vote_columns(path, file.schema_arrow)
        columns = file.read(use_threads=False).to_pydict()
    ids, label_0, votes, rater = (columns.pop(column) for column in VOTE_COLUMNS)
    check_no_nulls(path, "pair_id", ids)
    check_no_nulls(path, "votes", votes)
    found = Votes(ids, np.array(label_0, dtype=np.float64), np.array(votes, dtype=np.int64), rater, columns)
    _check_votes(path, found)
    return found


def write_votes(folder: Path, name: str, votes: Votes) -> Path:
    """Write `folder/votes/<name>.parquet` atomically, replacing an older one, and return its path.

    Raises:
        UserError: what `read_votes` would refuse.
    """
    path = named_file(folder, "votes", name)
    columns = {
        "pair_id": pa.array(votes.pair_id, pa.string()),
        "label_0": pa.array(np.asarray(votes.label_0, dtype=np.float64)),
        "votes": pa.array(np.asarray(votes.votes, dtype=np.int64)),
        "rater": pa.array(votes.rater, pa.string()),
    }
    table = pa.table(columns | {key: pa.array(values) for key, values in votes.extra.items()})
    _check_vote_columns(path, table.schema)
    _check_votes(path, votes)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    return path


def _check_vote_columns(path: Path, schema: pa.Schema) -> None:
    check_columns(path, schema, VOTE_COLUMNS, tuple(VOTE_EXTRAS))
    types = {"pair_id": "text", "label_0": "a number", "votes": "a number"}
    check_types(path, schema, types | {name: kind for name, kind in VOTE_EXTRAS.items() if name in schema.names})


def _check_votes(path: Path, votes: Votes) -> None:
    _check_range(path, "label_0", np.asarray(votes.label_0))
    few = np.flatnonzero(np.asarray(votes.votes) < 1)
    if few.size:
        raise UserError(f"{path} row {few[0]}: votes is {votes.votes[few[0]]}, and must be at least 1; remove the row")


def aggregate(votes: Votes) -> Labels:
    """One label per pair: the mean of its answers, each counted as often as it was given; hidden repeats are left out.

    Returns:
        Labels in the order in which pairs first occur, with `votes` (their number), `rater` (None where several people
        answered) and, where the votes have it, `seconds` (their mean; None where no answer has it).
    """
    repeats = votes.extra.get("repeat") or [False] * len(votes.pair_id)
    rows = [row for row, again in enumerate(repeats) if not again]
    place = {pair_id: k for k, pair_id in enumerate(dict.fromkeys(votes.pair_id[row] for row in rows))}
    total, count = np.zeros(len(place)), np.zeros(len(place), dtype=np.int64)
    raters: list[set[str | None]] = [set() for _ in place]
    seconds: list[list[float]] = [[] for _ in place]
    times = votes.extra.get("seconds")
    for row in rows:
        k = place[votes.pair_id[row]]
        total[k] += votes.label_0[row] * votes.votes[row]
        count[k] += votes.votes[row]
        raters[k].add(votes.rater[row])
        if times is not None and times[row] is not None:
            seconds[k].append(times[row])
    extra: dict[str, list[Any]] = {"votes": count.tolist()}
    if any(rater is not None for rater in votes.rater):
        extra["rater"] = [next(iter(who)) if len(who) == 1 else None for who in raters]
    if times is not None:
        extra["seconds"] = [sum(spent) / len(spent) if spent else None for spent in seconds]
    return Labels(list(place), total / count, extra)


# ---- targets


def _check_targets(path: Path, ids: Sequence[str], target: np.ndarray, weight: np.ndarray) -> None:
    for name, good in (("target", np.isfinite(target)), ("weight", np.isfinite(weight) & (weight >= 0))):
        bad = np.flatnonzero(~good)
        if bad.size:
            raise UserError(f"{path} row {bad[0]}: {name} is missing, infinite or negative; run `dedpo merge` again")
    check_unique(path, ids)


def targets_path(folder: Path, name: str, suffix: str = ".parquet") -> Path:
    """`folder/targets/<name><suffix>`; UserError where the name would lead elsewhere."""
    return named_file(folder, "targets", name, suffix)


def target_names(folder: Path) -> list[str]:
    """Names of the merged targets of a pair dataset, sorted."""
    return _names(folder, "targets")


def read_targets(folder: Path, name: str) -> Targets:
    """Read `folder/targets/<name>.parquet`.

    Raises:
        UserError: no such file, a missing or unknown column, a target or weight that is not finite, a negative weight, a pair_id twice.
    """
    path = _existing(folder, "targets", name)
    with open_parquet(path) as file:
        schema = file.schema_arrow
        check_columns(path, schema, TARGET_COLUMNS, TARGET_EXTRAS, source=False)
        numbers = [name for name in (*TARGET_COLUMNS[1:], *TARGET_EXTRAS) if name in schema.names]
        check_types(path, schema, {"pair_id": "text"} | dict.fromkeys(numbers, "a number"))
        table = file.read(use_threads=False)
    found, ids = {name: _numbers(table, name) for name in numbers}, table.column("pair_id").to_pylist()
    check_no_nulls(path, "pair_id", ids)
    _check_targets(path, ids, found["target"], found["weight"])
    return Targets(ids, **found)


def read_report(folder: Path, name: str) -> dict[str, Any] | None:
    """The report that `dedpo merge` wrote beside `folder/targets/<name>.parquet`; None where there is none.

    Raises:
        UserError: the report is damaged.
    """
    path = targets_path(folder, name, ".json")
    return read_object(path, "run `dedpo merge` again") if path.is_file() else None


def write_targets(folder: Path, name: str, targets: Targets, report: dict[str, Any]) -> Path:
    """Write `folder/targets/<name>.parquet` and the report beside it as JSON, each atomically; return the parquet's path."""
    path, text = targets_path(folder, name), json.dumps(report, indent=2, allow_nan=False) + "\n"  # a report that is none stops here
    given = {name: getattr(targets, name) for name in (*TARGET_COLUMNS[1:], *TARGET_EXTRAS)}
    numbers = {name: np.asarray(values, dtype=np.float64) for name, values in given.items() if values is not None}
    _check_targets(path, targets.pair_id, numbers["target"], numbers["weight"])
    table = pa.table({"pair_id": pa.array(targets.pair_id, pa.string())} | {name: pa.array(values) for name, values in numbers.items()})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    write_text(path.with_suffix(".json"), text)
    return path
