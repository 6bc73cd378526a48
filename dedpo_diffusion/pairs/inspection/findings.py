"""What a scan and the files beside the pairs say: what there is, what training would trip over, and what is odd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.inspection.answers import Findings, look_at_answers
from dedpo_diffusion.pairs.inspection.near import hamming, look_alikes
from dedpo_diffusion.pairs.inspection.scan import SIDES, Scan
from dedpo_diffusion.pairs.pixels import crop_warning, not_square
from dedpo_diffusion.pairs.prompt_tokens import TokenCounter

TINY = 64  # pixels of a side: less than the smallest model here draws
SHOWN = 10  # examples of a kind


def look(
    reader: PairReader, scan: Scan, *, depth: str, human: str, near: int, resamples: int, seed: int, counter: TokenCounter
) -> Findings:
    """Everything that is known of a pair dataset.

    Args:
        reader: the pair dataset.
        scan: of all its pairs.
        depth: of the scan.
        human: name of the human label file.
        near: largest Hamming distance of near-duplicates.
        resamples, seed: of the bootstrap of the raters' agreement.
        counter: of the prompts' tokens.
    """
    found = Findings()
    found.report = {"pairs": len(reader), "shards": len(reader.shards), "depth": depth}
    found.errors += [f"{reader.location(row)}, {text}" for row, _, text in scan.problems]
    unique = _pair_ids(reader, scan, found)
    found.report["prompts"] = _prompts(reader, scan, found, counter)
    found.report["images"] = _images(reader, scan, found)
    found.report["duplicates"] = _duplicates(reader, scan, found)
    if depth == "decode":
        found.report["near_duplicates"] = _near(reader, scan, near, found)
    if unique:
        look_at_answers(reader.folder, reader.column("pair_id"), human, found, resamples=resamples, seed=seed)
    else:
        found.errors.append("labels, votes and targets were not looked at, since pair_ids are missing or not unique")
    found.report |= {"errors": found.errors, "warnings": found.warnings}
    return found


# ---- helpers


def _both(scan: Scan, name: str) -> np.ndarray:
    """(N, 2) of a number that both images have."""
    return np.stack([scan.pairs[f"{name}_0"], scan.pairs[f"{name}_1"]], axis=1)


def _kinds(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal values in all columns (N,) are of one kind: each kind's first row, and each row's kind (N,)."""
    order = np.lexsort(columns)  # stable: the first of a run is the first of its kind
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    kind = np.empty(len(order), dtype=np.int64)
    kind[order] = np.cumsum(new) - 1
    return order[new], kind


def _common(kind: np.ndarray, first: np.ndarray, most: int) -> list[tuple[int, int]]:
    """First row and count of the most frequent kinds, earlier ones before later ones."""
    counts = np.bincount(kind, minlength=len(first))
    return [(int(first[k]), int(counts[k])) for k in np.lexsort((first, -counts))[:most]]


def _texts(reader: PairReader, name: str, rows: Sequence[int]) -> dict[int, str]:
    """Texts of a few pairs; no image is read."""
    texts: dict[int, str] = {}
    start = 0
    for path, count in zip(reader.shards, reader.counts, strict=True):
        here = [row for row in rows if start <= row < start + count]
        if here:
            with open_parquet(path) as file:
                column = file.read(columns=[name], use_threads=False).column(0)
            texts |= {row: column[row - start].as_py() or "" for row in here}
        start += count
    return texts


def _all_texts(reader: PairReader, name: str) -> list[str]:
    """A column of texts; empty where one is missing, which the scan has found."""
    texts: list[str] = []
    for path in reader.shards:
        with open_parquet(path) as file:
            texts += [text or "" for text in file.read(columns=[name], use_threads=False).column(0).to_pylist()]
    return texts


# ---- pairs


def _pair_ids(reader: PairReader, scan: Scan, found: Findings) -> bool:
    """Whether every pair has an id of its own."""
    missing = {row for row, name, _ in scan.problems if name == "pair_id"}
    first, kind = _kinds(scan.pairs["id"])
    repeated = [row for row in np.flatnonzero(first[kind] != np.arange(len(kind))).tolist() if row not in missing]
    ids = _texts(reader, "pair_id", repeated)
    for row in repeated:
        places = f"{reader.location(int(first[kind[row]]))} and again in {reader.location(row)}"
        found.errors.append(f"{places}: the same pair_id {ids[row]!r}; make it unique")
    return not missing and not repeated


def _prompts(reader: PairReader, scan: Scan, found: Findings, counter: TokenCounter) -> dict[str, Any]:
    first, kind = _kinds(scan.pairs["prompt"])
    empty = np.flatnonzero(scan.pairs["words"] == 0)
    if len(empty):
        found.warnings.append(f"empty prompts: {len(empty)} (first: {reader.location(int(empty[0]))})")
    prompts = _all_texts(reader, "prompt")
    with Progress("counting tokens", len(set(prompts))) as progress:
        tokens = np.array(counter.lengths(prompts, progress.advance))
    cut = counter.cut(prompts, tokens.tolist(), reader.location)
    found.warnings += [] if cut is None else [cut]
    most = [(row, count) for row, count in _common(kind, first, SHOWN) if count > 1]
    texts = _texts(reader, "prompt", [row for row, _ in most])
    return {
        "unique": len(first),
        "empty": len(empty),
        "tokens_of": counter.name,
        "tokens_read": counter.limit,
        "mean_tokens": float(tokens.mean()),
        "least_tokens": int(tokens.min()),
        "most_tokens": int(tokens.max()),
        "longest": reader.location(int(tokens.argmax())),
        "cut": int((tokens > counter.limit).sum()),
        "most_repeated": [{"prompt": texts[row], "pairs": count} for row, count in most],
    }


def _images(reader: PairReader, scan: Scan, found: Findings) -> dict[str, Any]:
    width, height, size = (_both(scan, name).astype(np.int64) for name in ("width", "height", "bytes"))
    readable = (width > 0).all(axis=1)
    other_size = readable & ((width[:, 0] != width[:, 1]) | (height[:, 0] != height[:, 1]))
    other_aspect = readable & (np.abs(width[:, 0] * height[:, 1] - width[:, 1] * height[:, 0]) > 0.02 * width[:, 1] * height[:, 0])
    smaller = np.minimum(width, height).min(axis=1)
    oblong = int(not_square(width[readable], height[readable]).sum())
    if oblong:
        found.warnings.append(f"{crop_warning(oblong, int(readable.sum()) * 2)} in `dedpo train`")
    tiny = np.flatnonzero(readable & (smaller < TINY))
    if len(tiny):
        found.warnings.append(f"pairs with an image below {TINY} pixels a side: {len(tiny)} (first: {reader.location(int(tiny[0]))})")
    if other_aspect.any():
        where = reader.location(int(np.flatnonzero(other_aspect)[0]))
        found.warnings.append(f"pairs of images of different shapes: {int(other_aspect.sum())} (first: {where}); crops will differ")
    good = width > 0
    sizes = _sizes(width[good], height[good])
    return {
        "formats": dict(scan.kinds.most_common()),
        **sizes,
        "below_64_pixels": len(tiny),
        "pairs_of_two_sizes": int(other_size.sum()),
        "pairs_of_two_shapes": int(other_aspect.sum()),
        "not_square": oblong,
        "unreadable": int((~good).sum()),
        "bytes": int(size.sum()),
        "smallest": [int(row) for row in np.argsort(np.where(readable, smaller, 1 << 40), kind="stable")[:6]],
    }


def _sizes(width: np.ndarray, height: np.ndarray) -> dict[str, Any]:
    """Sizes and shapes of (M,) readable images."""
    first, kind = _kinds(width, height)
    ratio = np.round(width / height, 2)
    shape, shapes = _kinds(ratio)
    side = np.minimum(width, height)
    return {
        "sizes": [{"width": int(width[k]), "height": int(height[k]), "images": n} for k, n in _common(kind, first, SHOWN)],
        "distinct_sizes": len(first),
        "width_by_height": [{"ratio": float(ratio[k]), "images": n} for k, n in _common(shapes, shape, SHOWN)],
        "smallest_side": {"least": int(side.min()), "median": float(np.median(side))} if len(side) else None,
    }


def _duplicates(reader: PairReader, scan: Scan, found: Findings) -> dict[str, Any]:
    digest = _both(scan, "digest")
    there = (digest != 0).all(axis=1)  # else an image is missing, which is an error already
    same = np.flatnonzero(there & (digest[:, 0] == digest[:, 1]))
    if len(same):
        where = reader.location(int(same[0]))
        found.warnings.append(f"pairs that hold one image twice: {len(same)} (first: {where}); they teach nothing but a tie")
    low, high = digest.min(axis=1), digest.max(axis=1)
    first, kind = _kinds(low, high, scan.pairs["prompt"])
    again = np.flatnonzero(there & (first[kind] != np.arange(len(kind))))
    if len(again):
        where = f"{reader.location(int(again[0]))} repeats {reader.location(int(first[kind[again[0]]]))}"
        found.warnings.append(
            f"pairs that repeat an earlier one, with the same prompt and images on either side: {len(again)} (first: {where}); "
            "votes can be merged"
        )
    files, pairs = digest.ravel(), np.repeat(np.arange(len(digest)), 2)
    files, pairs = files[files != 0], pairs[files != 0]
    once, of_file = _kinds(files)
    held = np.bincount(of_file[_kinds(pairs, files)[0]], minlength=len(once))  # in how many pairs each file is
    return {
        "one_image_twice": len(same),
        "repeated_pairs": len(again),
        "distinct_images": len(once),
        "images_in_several_pairs": int((held > 1).sum()),
        "most_shared": [
            {"where": f"{reader.location(int(pairs[once[k]]))}", "pairs": int(held[k])}
            for k in np.lexsort((once, -held))[:SHOWN]
            if held[k] > 1
        ],
    }


def _near(reader: PairReader, scan: Scan, near: int, found: Findings) -> dict[str, Any]:
    """Images that look alike: the two of a pair, and different files in different pairs."""
    hashes, digest = _both(scan, "hash"), _both(scan, "digest")
    readable = (_both(scan, "width") > 0).all(axis=1)
    apart = hamming(hashes[:, 0], hashes[:, 1])
    alike = np.flatnonzero(readable & (apart <= near) & (digest[:, 0] != digest[:, 1]))
    alike = alike[np.argsort(apart[alike], kind="stable")]
    if len(alike):
        where = reader.location(int(alike[0]))
        found.warnings.append(f"pairs of two images that look the same, within {near} of 64 bits: {len(alike)} (first: {where})")
    rows, files = np.repeat(np.flatnonzero(readable), 2), digest[readable].ravel()
    with Progress("comparing images", near + 1) as progress:
        group, examples = look_alikes(hashes[readable].ravel(), files, rows, near, shown=SHOWN, advance=progress.advance)
    count = np.bincount(group[_kinds(files, group)[0]]) if len(group) else np.zeros(0, dtype=int)  # different files of a group
    if (count > 1).any():
        text = f"images that are near-duplicates of others: {int(count[count > 1].sum())}, groups of them: {int((count > 1).sum())}"
        if len(examples):
            text += f"; closest in different pairs: {_image(reader, rows, examples[0][1])} and {_image(reader, rows, examples[0][2])}"
        found.warnings.append(text)
    largest = [int(k) for k in np.argsort(-count, kind="stable")[:SHOWN] if count[k] > 1]
    return {
        "distance": near,
        "within_pairs": len(alike),
        "closest": [{"row": int(row), "where": reader.location(int(row)), "bits": int(apart[row])} for row in alike[:SHOWN]],
        "closest_in_different_pairs": [
            {"bits": int(bits), "where": [_image(reader, rows, one), _image(reader, rows, two)], "rows": [int(rows[one]), int(rows[two])]}
            for bits, one, two in examples
        ],
        "groups": int((count > 1).sum()),
        "images_in_groups": int(count[count > 1].sum()),
        "largest": [_group(reader, rows, group, k, int(count[k])) for k in largest],
    }


def _image(reader: PairReader, rows: np.ndarray, place: int) -> str:
    """File, row and column of one of the images, which come two a pair."""
    return f"{reader.location(int(rows[place]))} {SIDES[place % 2]}"


def _group(reader: PairReader, rows: np.ndarray, group: np.ndarray, number: int, images: int) -> dict[str, Any]:
    members = np.unique(rows[group == number])[:6]
    return {"images": images, "rows": [int(row) for row in members], "where": [reader.location(int(row)) for row in members]}
