"""Look at every pair once, in parallel processes, and keep a few numbers of each; images never stay in memory.

A finished shard's numbers are kept in `PAIRS/.validate`, named by the shard's content and the depth, so that a stopped
run goes on and a second one is instant.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.pairs.dataset import PAIR_COLUMNS, PairReader, shard_digest
from dedpo_diffusion.pairs.decoding import decode_image, read_header

if TYPE_CHECKING:
    from dedpo_diffusion.core.engine import Engine

VERSION = 1  # of the numbers below
ROWS = 256  # pairs of one task, in whole row groups
BATCH = 32  # pairs in memory at once
SIDES = ("image_0", "image_1")
PAIR = np.dtype(
    [("id", "u8"), ("prompt", "u8"), ("words", "u4")]
    + [(f"{name}_{side}", kind) for side in (0, 1) for name, kind in
       (("width", "u4"), ("height", "u4"), ("bytes", "u8"), ("digest", "u8"), ("hash", "u8"))]
)  # fmt: skip


@dataclass
class Scan:
    """What a look at some pairs found.

    `pairs` is a (N,) structured array of dtype PAIR: 64-bit digests of pair_id, prompt and image files, sizes in pixels (0
    where the image cannot be read), file sizes, perceptual hashes (depth decode). `kinds` counts "FORMAT MODE" of the images.
    `problems` are (row, column, what is wrong) with rows counted as in `pairs`.
    """

    pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, PAIR))
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[int, str, str]] = field(default_factory=list)


def join(scans: list[Scan]) -> Scan:
    """One scan after the other."""
    together, start = Scan(np.concatenate([np.zeros(0, PAIR), *(scan.pairs for scan in scans)])), 0
    for scan in scans:
        together.kinds += scan.kinds
        together.problems += [(start + row, column, text) for row, column, text in scan.problems]
        start += len(scan.pairs)
    return together


# ---- some rows of a shard


def digest64(data: bytes) -> int:
    """The first 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def perceptual_hash(image: Any) -> int:
    """The 64-bit DCT hash of `imagehash.phash`: pictures that look alike differ in few bits."""
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "little")


def scan_rows(path: Path, groups: list[int], depth: str) -> Scan:
    """Look at the pairs of some row groups of a shard.

    Args:
        path: the shard.
        groups: numbers of its row groups.
        depth: headers, or decode.
    """
    found, scan, row = [], Scan(), 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=BATCH, row_groups=groups, columns=list(PAIR_COLUMNS), use_threads=False):
            for values in batch.to_pylist():
                found.append(_scan_pair(values, row, depth, scan))
                row += 1
    scan.pairs = np.array(found, dtype=PAIR) if found else scan.pairs
    return scan


def _scan_pair(values: dict[str, Any], row: int, depth: str, scan: Scan) -> tuple[int, ...]:
    for name in ("pair_id", "prompt"):
        if values[name] is None:
            scan.problems.append((row, name, f"{name} is missing; fill it in or remove the row"))
    prompt = values["prompt"] or ""
    numbers = [digest64((values["pair_id"] or "").encode()), digest64(prompt.encode()), len(prompt.split())]
    for name in SIDES:
        numbers += _scan_image(values[name], row, name, depth, scan)
    return tuple(numbers)


def _scan_image(data: bytes | None, row: int, name: str, depth: str, scan: Scan) -> list[int]:
    if data is None:
        scan.problems.append((row, name, f"{name} is missing; add the image or remove the row"))
        return [0, 0, 0, 0, 0]
    digest = digest64(data)
    try:
        header = read_header(data, name)
        hashed = perceptual_hash(decode_image(data, name)) if depth == "decode" else 0
    except UserError as error:
        scan.problems.append((row, name, str(error)))
        return [0, 0, len(data), digest, 0]
    scan.kinds[f"{header.format} {header.mode}"] += 1
    return [header.width, header.height, len(data), digest, hashed]


# ---- the whole dataset


def tasks(path: Path) -> list[list[int]]:
    """A shard's row groups in tasks of about `ROWS` pairs."""
    with open_parquet(path) as file:
        rows = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
    found: list[list[int]] = []
    room = 0
    for group, count in enumerate(rows):
        if room < count:
            found.append([])
            room = max(ROWS, count)
        found[-1].append(group)
        room -= count
    return found


def scan_dataset(reader: PairReader, depth: str, *, workers: int, advance: Callable[[int], object], engine: Engine | None = None) -> Scan:
    """Look at every pair of a dataset; shards seen before are not read again.

    Args:
        reader: the pair dataset.
        depth: headers reads the header of every image, decode decodes it too and takes its perceptual hash.
        workers: processes of this machine; with 1, this one does the work.
        advance: told how many pairs were just looked at.
        engine: one with workers elsewhere looks in place of this machine's processes.

    Raises:
        UserError: a process was killed from outside.
    """
    folder = reader.folder / ".validate"
    kept = {path: _kept_file(folder, path, depth) for path in reader.shards}
    wanted = [path for path in reader.shards if not kept[path].is_file()]
    jobs = [(path, groups, depth) for path in wanted for groups in tasks(path)]
    parts: dict[Path, dict[int, Scan]] = {path: {} for path in wanted}
    count = Counter(path for path, _, _ in jobs)
    done = enumerate(_run(jobs, workers)) if engine is None or not engine.many else engine.crew(_nothing, gpu=False).run(jobs, _scanner)
    for number, scan in done:
        path = jobs[number][0]
        parts[path][number] = scan
        advance(len(scan.pairs))
        if len(parts[path]) == count[path]:
            _keep(kept[path], join([scan for _, scan in sorted(parts.pop(path).items(), key=itemgetter(0))]))
    for path in set(reader.shards) - set(wanted):
        advance(reader.counts[reader.shards.index(path)])
    _forget(folder, set(kept.values()), depth)
    return join([_read_kept(path) for path in kept.values()])


def _nothing() -> None:
    """What a worker loads that needs no model."""


def _scanner(_: None) -> Callable[[tuple[Path, list[int], str]], Scan]:
    """A worker of another engine."""
    return lambda job: scan_rows(*job)


def _run(jobs: list[tuple[Path, list[int], str]], workers: int) -> Iterator[Scan]:
    """Results in the order of the jobs; only a few are in flight, so that they cannot pile up."""
    if workers == 1 or len(jobs) < 2:
        yield from (scan_rows(*job) for job in jobs)
        return
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(scan_rows, *job) for job in jobs[: 4 * workers]]
            for k in range(len(jobs)):
                yield waiting[k % len(waiting)].result()
                if k + len(waiting) < len(jobs):
                    waiting[k % len(waiting)] = pool.submit(scan_rows, *jobs[k + len(waiting)])
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that reads images was killed (no memory left?); run again with fewer than {workers} --workers"
        ) from error


# ---- kept numbers


def _kept_file(folder: Path, shard: Path, depth: str) -> Path:
    key = hashlib.sha256(f"{VERSION} {depth} {shard_digest(shard)} {shard.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    return folder / f"{shard.stem}-{depth}-{key}.parquet"


def _keep(path: Path, scan: Scan) -> None:
    table = pa.table({name: scan.pairs[name] for name in PAIR.names or ()})
    notes = {"kinds": json.dumps(scan.kinds), "problems": json.dumps(scan.problems)}
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(notes), temporary)


def _read_kept(path: Path) -> Scan:
    table = pq.read_table(path)
    pairs = np.zeros(len(table), PAIR)
    for name in PAIR.names or ():
        pairs[name] = table[name].to_numpy()
    notes = table.schema.metadata
    problems = [(row, column, text) for row, column, text in json.loads(notes[b"problems"])]
    return Scan(pairs, Counter(json.loads(notes[b"kinds"])), problems)


def _forget(folder: Path, kept: set[Path], depth: str) -> None:
    """Remove what belongs to shards that have changed or gone."""
    for path in folder.glob(f"*-{depth}-*.parquet"):
        if path not in kept:
            path.unlink()
