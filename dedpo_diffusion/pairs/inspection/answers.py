"""What labels, votes and targets say of the pairs: do they fit, are they balanced, do people and judges agree?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.labels.agreement import judge_agreement, share, vote_summary
from dedpo_diffusion.labels.answers import read_clusters
from dedpo_diffusion.labels.files import align, label_names, read_labels, read_targets, read_votes, target_names, vote_names
from dedpo_diffusion.pairs.clusters import label_clusters
from dedpo_diffusion.pairs.dataset import PairReader


@dataclass
class Findings:
    """A JSON-ready report, and what is wrong (`errors`) or odd (`warnings`), in words."""

    report: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look_at_answers(folder: Path, ids: list[str], human: str, found: Findings, *, resamples: int, seed: int) -> None:
    """Add `labels`, `votes`, `judges` and `targets` to the report, and what is wrong or odd with them.

    Args:
        folder: the pair dataset.
        ids: its pair_ids, each once.
        human: name of the human label file.
        found: added to.
        resamples, seed: of the bootstrap of the raters' agreement.
    """
    known = set(ids)
    aligned = {name: label_0 for name in label_names(folder) if (label_0 := _aligned(folder, name, ids, known, found)) is not None}
    found.report["labels"] = {name: _label_file(label_0, name, name == human, found) for name, label_0 in aligned.items()}
    votes = {name: _votes(folder, name, known, found, resamples, seed) for name in vote_names(folder)}
    found.report["votes"] = {name: summary for name, summary in votes.items() if summary is not None}
    people = aligned.pop(human, None)
    clusters = None if people is None else _clusters(folder, ids, human, people)
    told = {} if people is None else {name: judge_agreement(people, label_0, clusters) for name, label_0 in aligned.items()}
    found.report["judges"] = told
    found.report["targets"] = [name for name in target_names(folder) if _fits(folder, name, ids, found)]


# ---- labels


def _clusters(folder: Path, ids: list[str], human: str, people: np.ndarray) -> np.ndarray | None:
    """Which human labels (N,) hang together; by rankings alone where the pairs cannot be read, which is told elsewhere."""
    ranked = read_clusters(folder, human, ids)
    try:
        return label_clusters(PairReader(folder), people, ranked)
    except UserError:
        return ranked


def _aligned(folder: Path, name: str, ids: list[str], known: set[str], found: Findings) -> np.ndarray | None:
    """Labels in the order of the pairs, or None with all that is wrong told."""
    path = folder / "labels" / f"{name}.parquet"
    try:
        bad = _bad_rows(path, known)
        if not bad:
            return align(read_labels(folder, name), ids, folder=folder, name=name)
    except UserError as error:
        bad = [str(error)]
    found.errors += bad
    return None


def _bad_rows(path: Path, known: set[str]) -> list[str]:
    """Every row that cannot be used; what is wrong with the file as a whole is left to `read_labels`."""
    with open_parquet(path) as file:
        if not {"pair_id", "label_0"} <= set(file.schema_arrow.names):
            return []
        table = file.read(columns=["pair_id", "label_0"], use_threads=False).to_pydict()
    first: dict[Any, int] = {}
    bad = []
    for row, (pair_id, label_0) in enumerate(zip(table["pair_id"], table["label_0"], strict=True)):
        if pair_id is None:
            bad.append(f"{path} row {row}: pair_id is missing; fill it in or remove the row")
        elif pair_id not in known:
            bad.append(f"{path} row {row}: pair_id {pair_id!r} is none of the dataset's pairs; remove the row")
        elif first.setdefault(pair_id, row) != row:
            bad.append(f"{path} row {row}: pair_id {pair_id!r} is in row {first[pair_id]} already; remove one")
        if label_0 is None or (isinstance(label_0, int | float) and not 0 <= label_0 <= 1):
            shown = "missing" if label_0 is None else label_0
            bad.append(f"{path} row {row}: label_0 is {shown}, and must lie in [0, 1]; mend it, or leave the row out")
    return bad


def _label_file(label_0: np.ndarray, name: str, is_human: bool, found: Findings) -> dict[str, Any]:
    """Balance of one label file; a judge labels every pair, people only some."""
    known = label_0[~np.isnan(label_0)]
    wins, losses, ties = (int(side.sum()) for side in (known > 0.5, known < 0.5, known == 0.5))
    side = share(known[known != 0.5] > 0.5)
    if side["ci"] is not None and not side["ci"][0] <= 0.5 <= side["ci"][1]:
        won = f"{side['value']:.1%} (95 %: {side['ci'][0]:.1%} to {side['ci'][1]:.1%})"
        found.warnings.append(f"labels/{name}: image 0 wins {won} of {side['n']} decided pairs; were the sides shuffled?")
    if not is_human and len(known) < len(label_0):
        found.warnings.append(f"labels/{name} covers {len(known)} of {len(label_0)} pairs; if it is a judge, run `dedpo label` again")
    return {"labelled": len(known), "share": len(known) / len(label_0), "image_0_wins": wins, "image_1_wins": losses, "ties": ties,
            "soft": int((~np.isin(known, (0.0, 0.5, 1.0))).sum()), "image_0_share": side}  # fmt: skip


# ---- votes, targets


def _votes(folder: Path, name: str, known: set[str], found: Findings, resamples: int, seed: int) -> dict[str, Any] | None:
    try:
        votes = read_votes(folder, name)
    except UserError as error:
        found.errors.append(str(error))
        return None
    unknown = [row for row, pair_id in enumerate(votes.pair_id) if pair_id not in known]
    if unknown:
        more = f" ({len(unknown)} such rows)" if len(unknown) > 1 else ""
        where = f"{folder / 'votes' / name}.parquet row {unknown[0]}: pair_id {votes.pair_id[unknown[0]]!r}"
        found.errors.append(f"{where} is none of the dataset's pairs{more}; remove them")
    summary = vote_summary(votes, resamples=resamples, seed=seed)
    leaning = [rater for rater in summary["raters"] if (ci := rater["left"]["ci"]) is not None and not ci[0] <= 0.5 <= ci[1]]
    if leaning:
        by_chance = "; of twenty raters about one would by chance" if len(summary["raters"]) >= 10 else ""
        first = f"{leaning[0]['rater']} chose the left image {leaning[0]['left']['value']:.0%} of {leaning[0]['left']['n']} times"
        found.warnings.append(f"votes/{name}: raters who lean to one side: {len(leaning)} of {len(summary['raters'])} ({first}{by_chance})")
    return summary


def _fits(folder: Path, name: str, ids: list[str], found: Findings) -> bool:
    """Whether targets are this dataset's."""
    try:
        fits = read_targets(folder, name).pair_id == ids
    except UserError as error:
        found.errors.append(str(error))
        return False
    if not fits:
        found.errors.append(f"targets/{name}.parquet: its pairs are not the dataset's; run `dedpo merge` again")
    return fits
