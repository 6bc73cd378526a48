"""What a scan and the files beside the pairs say: what there is, what training would trip over, and what is odd."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..agreement import judge_agreement, vote_summary
from ..console import UserError
from ..debias import wilson_interval
from ..labels import align, label_names, read_labels, read_targets, read_votes, target_names, vote_names
from ..pairs import PairReader
from .near import groups, hamming
from .scan import Scan

TINY = 64  # pixels of a side: less than the smallest model here draws
LONG_PROMPT = 60  # words; CLIP reads 77 tokens, and English has about 1.3 tokens a word
SHOWN = 10  # examples of a kind


@dataclass
class Findings:
    """A JSON-ready report, and what is wrong (`errors`) or odd (`warnings`), in words."""

    report: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look(reader: PairReader, scan: Scan, *, depth: str, human: str, near: int, resamples: int, seed: int) -> Findings:
    """Everything that is known of a pair dataset.

    Args:
        reader: the pair dataset.
        scan: of all its pairs.
        depth: of the scan.
        human: name of the human label file.
        near: largest Hamming distance of near-duplicates.
        resamples, seed: of the bootstrap of the raters' agreement.
    """
    found = Findings()
    found.report = {"pairs": len(reader), "shards": len(reader.shards), "depth": depth}
    for row, _, text in scan.problems:
        found.errors.append(f"{reader.location(row)}, {text}")
    _pair_ids(reader, scan, found)
    found.report["prompts"] = _prompts(reader, scan, found)
    found.report["images"] = _images(reader, scan, found)
    found.report["duplicates"] = _duplicates(reader, scan, found)
    if depth == "decode":
        found.report["near_duplicates"] = _near(reader, scan, near, found)
    _answers(reader, human, found, resamples=resamples, seed=seed)
    found.report |= {"errors": found.errors, "warnings": found.warnings}
    return found


# ---- pairs


def _pair_ids(reader: PairReader, scan: Scan, found: Findings) -> None:
    first: dict[int, int] = {}
    for row, digest in enumerate(scan.pairs["id"].tolist()):
        if first.setdefault(digest, row) != row:
            places = f"{reader.location(first[digest])} and again in {reader.location(row)}"
            found.errors.append(f"{places}: the same pair_id; make it unique")


def _prompts(reader: PairReader, scan: Scan, found: Findings) -> dict[str, Any]:
    words = scan.pairs["words"].astype(int)
    _, first, counts = np.unique(scan.pairs["prompt"], return_index=True, return_counts=True)
    most = sorted(range(len(counts)), key=lambda k: (-counts[k], first[k]))[:SHOWN]
    empty, long = int((words == 0).sum()), int((words > LONG_PROMPT).sum())
    if empty:
        found.warnings.append(f"{empty} prompts are empty (first: {reader.location(int(np.flatnonzero(words == 0)[0]))})")
    if long:
        found.warnings.append(f"{long} prompts have more than {LONG_PROMPT} words; CLIP reads about that many and no more")
    repeated = [{"prompt": reader.pair(int(first[k])).prompt, "pairs": int(counts[k])} for k in most if counts[k] > 1]
    return {"unique": len(counts), "empty": empty, "mean_words": float(words.mean()), "most_words": int(words.max()),
            f"over_{LONG_PROMPT}_words": long, "most_repeated": repeated}  # fmt: skip


def _both(scan: Scan, name: str) -> np.ndarray:
    """(N, 2) of a number that both images have."""
    return np.stack([scan.pairs[f"{name}_0"], scan.pairs[f"{name}_1"]], axis=1)


def _images(reader: PairReader, scan: Scan, found: Findings) -> dict[str, Any]:
    width, height, size = (_both(scan, name).astype(np.int64) for name in ("width", "height", "bytes"))
    good = width.ravel() > 0
    flat_width, flat_height = width.ravel()[good], height.ravel()[good]
    sizes = Counter(zip(flat_width.tolist(), flat_height.tolist(), strict=True))
    side = np.minimum(flat_width, flat_height)
    readable = (width > 0).all(axis=1)
    other_size = readable & ((width[:, 0] != width[:, 1]) | (height[:, 0] != height[:, 1]))
    other_aspect = readable & (np.abs(width[:, 0] * height[:, 1] - width[:, 1] * height[:, 0]) > 0.02 * width[:, 1] * height[:, 0])
    tiny = np.flatnonzero(readable & (np.minimum(width, height).min(axis=1) < TINY))
    if len(tiny):
        found.warnings.append(f"{len(tiny)} pairs have an image below {TINY} pixels a side (first: {reader.location(int(tiny[0]))})")
    if other_aspect.any():
        where = reader.location(int(np.flatnonzero(other_aspect)[0]))
        found.warnings.append(f"{int(other_aspect.sum())} pairs hold images of different shapes (first: {where}); crops will differ")
    return {
        "formats": dict(scan.kinds.most_common()),
        "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in sizes.most_common(SHOWN)],
        "distinct_sizes": len(sizes),
        "smallest_side": {"least": int(side.min()), "median": float(np.median(side))} if len(side) else None,
        "below_64_pixels": len(tiny),
        "pairs_of_two_sizes": int(other_size.sum()),
        "pairs_of_two_shapes": int(other_aspect.sum()),
        "unreadable": int((~good).sum()),
        "bytes": int(size.sum()),
        "smallest": [int(row) for row in np.argsort(np.where(readable, np.minimum(width, height).min(axis=1), 1 << 40), kind="stable")[:6]],
    }


def _duplicates(reader: PairReader, scan: Scan, found: Findings) -> dict[str, Any]:
    digest = _both(scan, "digest")
    same = np.flatnonzero(digest[:, 0] == digest[:, 1])
    if len(same):
        where = reader.location(int(same[0]))
        found.warnings.append(f"{len(same)} pairs hold one image twice (first: {where}); they teach nothing but a tie")
    pair = np.sort(digest, axis=1)
    keys = np.stack([scan.pairs["prompt"], pair[:, 0], pair[:, 1]], axis=1)
    _, counts = np.unique(keys, axis=0, return_counts=True)
    again = int((counts - 1).sum())
    if again:
        found.warnings.append(f"{again} pairs repeat an earlier one (same prompt, same two images on either side); votes can be merged")
    distinct, place = np.unique(digest.ravel(), return_inverse=True)
    rows = np.unique(np.stack([place, np.repeat(np.arange(len(digest)), 2)], axis=1), axis=0)[:, 0]
    return {"one_image_twice": len(same), "repeated_pairs": again, "distinct_images": len(distinct),
            "images_in_several_pairs": int((np.bincount(rows) > 1).sum())}  # fmt: skip


def _near(reader: PairReader, scan: Scan, near: int, found: Findings) -> dict[str, Any]:
    """Images that look alike: the two of a pair, and different files in different pairs."""
    hashes, digest = _both(scan, "hash"), _both(scan, "digest")
    readable = (_both(scan, "width") > 0).all(axis=1)
    apart = hamming(hashes[:, 0], hashes[:, 1])
    alike = np.flatnonzero(readable & (apart <= near) & (digest[:, 0] != digest[:, 1]))
    alike = alike[np.argsort(apart[alike], kind="stable")]
    if len(alike):
        where = reader.location(int(alike[0]))
        found.warnings.append(f"{len(alike)} pairs hold two images that look the same (distance <= {near} of 64 bits; first: {where})")
    rows = np.repeat(np.flatnonzero(readable), 2)
    group = groups(hashes[readable].ravel(), near)
    files = digest[readable].ravel()
    members = np.unique(np.stack([group.astype(np.uint64), files], axis=1), axis=0)[:, 0].astype(np.int64)
    count = np.bincount(members) if len(members) else np.zeros(0, dtype=int)  # different files in each group
    largest = [int(k) for k in np.argsort(-count, kind="stable")[:SHOWN] if count[k] > 1]
    return {
        "distance": near,
        "within_pairs": len(alike),
        "closest": [{"row": int(row), "where": reader.location(int(row)), "bits": int(apart[row])} for row in alike[:SHOWN]],
        "groups": int((count > 1).sum()),
        "images_in_groups": int(count[count > 1].sum()),
        "largest": [{"images": int(count[k]), "rows": [int(row) for row in np.unique(rows[group == k])[:6]]} for k in largest],
    }


# ---- labels, votes, targets


def _answers(reader: PairReader, human: str, found: Findings, *, resamples: int, seed: int) -> None:
    folder, ids = reader.folder, reader.column("pair_id")
    if len(set(ids)) != len(ids):
        found.errors.append("labels, votes and targets were not looked at, since pair_ids are not unique")
        return
    aligned: dict[str, np.ndarray] = {}
    labels: dict[str, Any] = {}
    for name in label_names(folder):
        try:
            aligned[name] = align(read_labels(folder, name), ids, folder=folder, name=name)
        except UserError as error:
            found.errors.append(str(error))
            continue
        labels[name] = _label_file(aligned[name], name, name == human, found)
    found.report["labels"] = labels
    found.report["votes"] = {name: votes for name in vote_names(folder) if (votes := _votes(folder, name, ids, found, resamples, seed))}
    judges = {name: label_0 for name, label_0 in aligned.items() if name != human}
    found.report["judges"] = (
        {name: judge_agreement(aligned[human], label_0) for name, label_0 in judges.items()} if human in aligned else {}
    )
    found.report["targets"] = [name for name in target_names(folder) if _fits(folder, name, ids, found)]


def _label_file(label_0: np.ndarray, name: str, is_human: bool, found: Findings) -> dict[str, Any]:
    """Balance of one label file; a judge labels every pair, people only some."""
    known = label_0[~np.isnan(label_0)]
    wins, losses, ties = (int(side.sum()) for side in (known > 0.5, known < 0.5, known == 0.5))
    decided = wins + losses
    side: dict[str, Any] = {"value": None, "ci": None, "n": decided}
    if decided:
        side |= {"value": wins / decided, "ci": wilson_interval(wins, decided)}
    if side["ci"] is not None and not side["ci"][0] <= 0.5 <= side["ci"][1]:
        share = f"{side['value']:.1%} (95 %: {side['ci'][0]:.1%} to {side['ci'][1]:.1%})"
        found.warnings.append(f"labels/{name}: image 0 wins {share} of {decided} decided pairs; were the sides shuffled?")
    if not is_human and len(known) < len(label_0):
        found.warnings.append(f"labels/{name} covers {len(known)} of {len(label_0)} pairs; if it is a judge, run `dedpo label` again")
    return {"labelled": len(known), "share": len(known) / len(label_0), "image_0_wins": wins, "image_1_wins": losses, "ties": ties,
            "soft": int((~np.isin(known, (0.0, 0.5, 1.0))).sum()), "image_0_share": side}  # fmt: skip


def _votes(folder: Path, name: str, ids: list[str], found: Findings, resamples: int, seed: int) -> dict[str, Any] | None:
    try:
        votes = read_votes(folder, name)
    except UserError as error:
        found.errors.append(str(error))
        return None
    unknown = sorted(set(votes.pair_id) - set(ids))
    if unknown:
        found.errors.append(
            f"votes/{name}.parquet: pair_id {unknown[0]!r} is none of the dataset's pairs ({len(unknown)} such); remove them"
        )
    return vote_summary(votes, resamples=resamples, seed=seed)


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
