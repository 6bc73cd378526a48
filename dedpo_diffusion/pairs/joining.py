"""Several pair datasets made into one: pairs, what people and judges said of them, and how likely each was to be asked about.

People who label a random 5 % of one dataset and half of another did not label the joined pairs at random. So where shares or propensities
differ, each label carries the probability that its pair had of being labelled, which `dedpo merge` makes up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, track
from dedpo_diffusion.core.records import Labels, Pair, Votes
from dedpo_diffusion.labels.files import (
    CALIBRATED,
    label_names,
    label_origin,
    read_labels,
    read_votes,
    vote_names,
    write_labels,
    write_votes,
)
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter

DATASET = "dataset"  # the source column that says where a pair is from


def join(folders: Sequence[Path], out: Path, *, human: str = "human") -> list[str]:
    """Write the pairs of all `folders` into `out`, with their labels and votes.

    Args:
        folders: two pair datasets or more; the last part of each path names it in the column source_dataset, where a pair has none.
        out: the dataset to write, an empty folder or none yet.
        human: the label file that people filled; judges' label files must cover every dataset to be joined.

    Returns:
        What stayed behind and why, a line each.

    Raises:
        UserError: a pair_id in two of the datasets, two folders of one name, or files that cannot be read.
    """
    readers = [PairReader(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two of the datasets are called {again}; rename one, as the column source_dataset tells pairs apart by it")
    _check_ids(folders, readers)
    with PairWriter(out) as writer:
        for name, reader in zip(names, readers, strict=True):
            for pair in track(reader.iter_pairs(), f"joining {name}", len(reader)):
                writer.add(Pair(pair.pair_id, pair.prompt, pair.image_0, pair.image_1, {DATASET: name, **pair.source}))
    told = []
    for label in sorted({label for folder in folders for label in label_names(folder)}):
        told += _join_labels(folders, readers, out, label, of_people=label == human)
    for vote in sorted({vote for folder in folders for vote in vote_names(folder)}):
        write_votes(out, vote, _joined_votes([read_votes(folder, vote) for folder in folders if vote in vote_names(folder)]))
    return told


def _check_ids(folders: Sequence[Path], readers: Sequence[PairReader]) -> None:
    seen: dict[str, Path] = {}
    for folder, reader in zip(folders, readers, strict=True):
        ids = reader.ids()
        for pair_id in ids:
            if pair_id in seen:
                raise UserError(
                    f"pair_id {pair_id!r} is in {seen[pair_id]} and in {folder}: give every pair once, and proposed ones another --seed"
                )
        seen |= dict.fromkeys(ids, folder)


def _join_labels(folders: Sequence[Path], readers: Sequence[PairReader], out: Path, name: str, *, of_people: bool) -> list[str]:
    """Write one label file of the joined pairs, or say why there is none."""
    there = [name in label_names(folder) for folder in folders]
    origins = {label_origin(folder, name) for folder, held in zip(folders, there, strict=True) if held}
    if CALIBRATED in origins:
        return [f"labels {name} stay behind: they were fitted to the people of one dataset; run `dedpo calibrate` on the joined pairs"]
    if not all(there) and not of_people:
        missing = next(folder for folder, held in zip(folders, there, strict=True) if not held)
        return [f"labels {name} stay behind: {missing} has none; label it too, and join again"]
    found = [read_labels(folder, name) if held else Labels([], np.empty(0)) for folder, held in zip(folders, there, strict=True)]
    if of_people:
        found = _with_propensity(found, readers)
    origin = next(iter(origins)) if len(origins) == 1 else None
    write_labels(out, name, _joined(found), origin=origin)
    empty = [str(folder) for folder, held in zip(folders, there, strict=True) if not held]
    if not empty:
        return []
    asked = [folder.resolve().name for folder, held in zip(folders, there, strict=True) if held]
    weighted = f"--population {DATASET}={asked[0]}, or with " if len(asked) == 1 else ""
    return [
        f"labels {name}: nobody labelled {', '.join(empty)}, so these are no random sample of all pairs; "
        f"merge with {weighted}--method adapted"
    ]


def _with_propensity(found: list[Labels], readers: Sequence[PairReader]) -> list[Labels]:
    """Labels with the probability that a pair was labelled: as stored, or the labelled share of its dataset, where these differ."""
    shares = [len(labels.pair_id) / len(reader) for labels, reader in zip(found, readers, strict=True)]
    if not any("propensity" in labels.extra for labels in found) and len(set(shares)) == 1:
        return found
    stated = [labels.extra.get("propensity", [share] * len(labels.pair_id)) for labels, share in zip(found, shares, strict=True)]
    return [replace(labels, extra={**labels.extra, "propensity": given}) for labels, given in zip(found, stated, strict=True)]


Rename = Callable[[int, str, Any], Any]  # the number of a dataset, a pair_id and a value to the value in the joined file


def _joined_columns(found: Sequence[Labels | Votes], column_of: str, rename: Rename) -> dict[str, list[Any]]:
    """The further columns of several files in one: empty where a file lacks one; those of `column_of` are renamed, as they name something
    of their own dataset."""
    columns = dict.fromkeys(column for each in found for column in each.extra)
    extra: dict[str, list[Any]] = {column: [] for column in columns}
    for number, each in enumerate(found):
        for column in columns:
            values = each.extra.get(column, [None] * len(each.pair_id))
            if column == column_of:
                values = [rename(number, pair_id, value) for pair_id, value in zip(each.pair_id, values, strict=True)]
            extra[column] += values
    return extra


def _cluster(number: int, pair_id: str, cluster: Any) -> str:
    """A cluster's name that no other dataset has; a label without one is one of its own."""
    return f"{number}-pair-{pair_id}" if cluster is None else f"{number}-{cluster}"


def _ranking(number: int, pair_id: str, ranking: Any) -> str | None:
    return None if ranking is None else f"{number}-{ranking}"


def _joined(found: Sequence[Labels]) -> Labels:
    """One file of several. Clusters of different datasets stay apart."""
    extra = _joined_columns(found, "cluster", _cluster)
    label_0 = np.concatenate([labels.label_0 for labels in found])
    return Labels([pair_id for labels in found for pair_id in labels.pair_id], label_0, extra)


def _joined_votes(found: Sequence[Votes]) -> Votes:
    """The same of votes and their rankings."""
    return Votes(
        [pair_id for votes in found for pair_id in votes.pair_id],
        np.concatenate([votes.label_0 for votes in found]),
        np.concatenate([votes.votes for votes in found]),
        [rater for votes in found for rater in votes.rater],
        _joined_columns(found, "ranking", _ranking),
    )
