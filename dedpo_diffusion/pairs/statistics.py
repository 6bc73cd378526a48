"""Image statistics of every pair, measured once and kept beside the labels.

    PAIRS/statistics/images.parquet    brightness_0, brightness_1, contrast_0, ...: one row a pair, in the order of the pairs

They are measured in parts by several processes; a stopped run goes on where it stopped, and runs of the same folder share the
work. The file knows the pairs that it was measured on by their fingerprint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import Progress
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.labels.image_statistics import FLAT, SIDE, TILE, WORDS, image_statistics
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image

PART = 256  # pairs of one file of a run that is not finished
RULE = f"side {SIDE} tile {TILE} flat {FLAT}"  # how they are measured; other rules, other numbers
COLUMNS = [f"{name}_{side}" for name in WORDS for side in (0, 1)]


def statistics_path(folder: Path) -> Path:
    """The file of a pair dataset's image statistics."""
    return Path(folder) / "statistics" / "images.parquet"


def read_statistics(reader: PairReader) -> np.ndarray | None:
    """(N, S, 2) float32 statistics of both images, S in the order of `WORDS`; None where these pairs were not measured."""
    return _read(reader, _stamp(reader)) if statistics_path(reader.folder).is_file() else None


def _read(reader: PairReader, stamp: dict[str, str]) -> np.ndarray | None:
    path = statistics_path(reader.folder)
    if not path.is_file():
        return None
    with open_parquet(path) as file:
        held = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        if any(held.get(key) != value for key, value in stamp.items()):
            return None
        table = file.read(columns=COLUMNS, use_threads=False)
    flat = np.stack([table.column(name).to_numpy() for name in COLUMNS], axis=1)
    return flat.reshape(len(flat), len(WORDS), 2).astype(np.float32, copy=False)


def measure_statistics(reader: PairReader, *, workers: int | None = None) -> np.ndarray:
    """(N, S, 2) as `read_statistics`, measured where they are not there.

    Args:
        reader: of the pairs.
        workers: processes; None takes one a core. Few pairs are measured in this one.

    Raises:
        UserError: an image that cannot be read; its file and row are named, and what was measured is kept.
    """
    stamp = _stamp(reader)  # it reads all ids and prompts
    found = _read(reader, stamp)
    if found is not None:
        return found
    parts = statistics_path(reader.folder).with_name(f".images-{stamp['dataset'][:12]}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, len(reader), PART))
    paths = [parts / f"rows-{start:09d}.parquet" for start in starts]
    todo = [(start, path) for start, path in zip(starts, paths, strict=True) if not path.is_file()]
    left = sum(min(PART, len(reader) - start) for start, _ in todo)
    with Progress("measuring images", len(reader), start=len(reader) - left) as progress:
        for count in _measured(reader, todo, workers):
            progress.advance(count)
    _join(statistics_path(reader.folder), paths, stamp)
    shutil.rmtree(parts, ignore_errors=True)
    made = _read(reader, stamp)
    assert made is not None
    return made


def _stamp(reader: PairReader) -> dict[str, str]:
    return {"dataset": reader.fingerprint(), "rule": RULE}


def _measured(reader: PairReader, todo: list[tuple[int, Path]], workers: int | None) -> Iterator[int]:
    """Measure these parts; yields how many pairs each had."""
    import os

    workers = min(workers or os.cpu_count() or 1, len(todo))
    if workers <= 1 or len(todo) <= 2:  # a process takes longer to start
        yield from (measure_part(reader.folder, start, path) for start, path in todo)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(measure_part, reader.folder, start, path) for start, path in todo]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def measure_part(folder: Path, start: int, path: Path) -> int:
    """Measure the pairs of one part into `path`, unless another run does; returns their number."""
    reader = PairReader(folder)
    with hold_lock(path.with_suffix(".lock"), wait=True) as held:
        if held and not path.is_file():
            rows = []
            for place, pair in enumerate(islice(reader.iter_pairs(start), PART)):
                where = reader.location(start + place)
                both = [image_statistics(decode_image(getattr(pair, f"image_{s}"), f"{where} image_{s}")) for s in (0, 1)]
                rows.append([both[side][name] for name in WORDS for side in (0, 1)])
            values = np.array(rows, dtype=np.float32)
            with atomic_file(path) as temporary:
                pq.write_table(pa.table({name: values[:, k] for k, name in enumerate(COLUMNS)}), temporary)
    return min(PART, len(reader) - start)


def _join(path: Path, parts: list[Path], stamp: dict[str, str]) -> None:
    """All parts as one file, unless another run has joined them and removed the parts."""
    try:
        tables = [pq.read_table(part, use_threads=False) for part in parts]
    except FileNotFoundError:
        return
    with atomic_file(path) as temporary:
        pq.write_table(pa.concat_tables(tables).replace_schema_metadata(stamp), temporary)
