"""Scores of a folder of samples.

    dedpo score samples/tuned --with pickscore=FOLDER oracle_reward

Reads `DIR/index.parquet` (file, prompt, prompt_index, seed), writes `DIR/scores.parquet` with the same columns plus scorer,
version and score. Scores that are there already, of the same version, are kept; so a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import Progress, UserError, say, stage
from dedpo_diffusion.settings import ScoreSettings

if TYPE_CHECKING:
    from dedpo_diffusion.scorers import Scorer

INDEX = ("file", "prompt", "prompt_index", "seed")
SAVE_EVERY = 30.0  # seconds of scoring that a kill may cost

Row = dict[str, Any]


def read_index(folder: Path) -> list[Row]:
    """The rows of a sample folder's index, each with file, prompt, prompt_index and seed.

    Raises:
        UserError: no index, a missing column, no rows, a file listed twice, an image that is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "index.parquet"
    if not path.is_file():
        raise UserError(f"there is no {path}; `dedpo sample --out {folder}` makes a sample folder")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); sample again") from error
    for name in INDEX:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(table.column_names)}); add it, or sample again")
    rows = table.select(INDEX).to_pylist()
    if not rows:
        raise UserError(f"{path} lists no images; sample again")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if seen.setdefault(row["file"], number) != number:
            raise UserError(f"{path} lists {row['file']} in row {seen[row['file']]} and again in row {number}; sample again")
        if not (folder / row["file"]).is_file():
            raise UserError(f"{folder / row['file']} is missing ({path.name} row {number}); restore it, or sample the folder again")
    return rows


def images_digest(folder: Path, rows: Sequence[Row]) -> str:
    """A fingerprint of the images, by name and size: scores of earlier images must not pass for theirs."""
    sizes = sorted(f"{row['file']} {(folder / row['file']).stat().st_size}" for row in rows)
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()


def read_scores(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The scores that a folder holds of its present images.

    Raises:
        UserError: scores.parquet is no parquet file of the expected columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "scores.parquet"
    if not path.is_file():
        return []
    try:
        table = pq.read_table(path)
        held = table.select([*INDEX, "scorer", "version", "score"]).to_pylist()
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run `dedpo score` again") from error
    present = {tuple(row[name] for name in INDEX) for row in rows}
    same = (table.schema.metadata or {}).get(b"images", b"").decode() == images_digest(folder, rows)
    if not same or any(tuple(row[name] for name in INDEX) not in present for row in held):
        say(f"{path} holds scores of other images; they do not count")
        return []
    return held


def write_scores(folder: Path, rows: Sequence[Row], scores: Sequence[Row]) -> None:
    """Write `scores.parquet` atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.files import atomic_file

    texts, whole = pa.string(), pa.int64()
    kinds = {"file": texts, "prompt": texts, "prompt_index": whole, "seed": whole, "scorer": texts, "version": texts, "score": pa.float64()}
    schema = pa.schema(kinds.items(), metadata={"images": images_digest(folder, rows)})
    with atomic_file(folder / "scores.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(list(scores), schema=schema), temporary)


def load_images(folder: Path, rows: Sequence[Row]) -> list[Any]:
    """The images of some rows, RGB.

    Raises:
        UserError: an image that cannot be decoded.
    """
    from dedpo_diffusion.decoding import decode_image

    return [decode_image((folder / row["file"]).read_bytes(), str(folder / row["file"])) for row in rows]


def add_scores(settings: ScoreSettings, scorer: Scorer, rows: Sequence[Row], scores: list[Row]) -> list[Row]:
    """All scores, with those of one scorer completed; written along the way."""
    others = [row for row in scores if row["scorer"] != scorer.name]
    kept = [row for row in scores if row["scorer"] == scorer.name and row["version"] == scorer.version]
    replaced = {row["version"] for row in scores if row["scorer"] == scorer.name} - {scorer.version}
    if replaced:
        say(f"{scorer.name}: scores of {', '.join(sorted(replaced))} are replaced by {scorer.version}")
    files = {row["file"] for row in kept}
    todo = [row for row in rows if row["file"] not in files]
    if not todo:
        say(f"{scorer.name} ({scorer.version}): all {len(rows)} images are scored already")
    saved = time.monotonic()
    with Progress(f"scoring with {scorer.name}", len(rows), start=len(kept)) as progress:
        for start in range(0, len(todo), settings.batch):
            part = todo[start : start + settings.batch]
            values = scorer.score([row["prompt"] for row in part], load_images(settings.folder, part))
            kept += [_scored(row, scorer, float(value)) for row, value in zip(part, values, strict=True)]
            progress.advance(len(part))
            if time.monotonic() - saved > SAVE_EVERY:
                write_scores(settings.folder, rows, others + kept)
                saved = time.monotonic()
    if todo or replaced:
        write_scores(settings.folder, rows, others + kept)
    return others + kept


def _scored(row: Row, scorer: Scorer, value: float) -> Row:
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"scorer {scorer.name} gave {value} for {row['file']}; look at that image, or use another scorer")
    return {**row, "scorer": scorer.name, "version": scorer.version, "score": value}


def run(settings: ScoreSettings) -> Path:
    """Score a folder of samples."""
    import numpy as np

    from dedpo_diffusion.scorers import load_scorer

    names = [spec if spec.startswith("http=") else spec.partition("=")[0] for spec in settings.scorers]  # servers name themselves
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"scorer {twice[0]} is named twice; name each scorer once")
    rows = read_index(settings.folder)
    scores = read_scores(settings.folder, rows)
    named: set[str] = set()
    for spec in settings.scorers:
        scorer = load_scorer(spec, device=settings.device, batch=settings.batch, dtype=settings.dtype)
        if scorer.name in named:
            raise UserError(f"two of the scorers are called {scorer.name}; score with one of them alone")
        named.add(scorer.name)
        scores = add_scores(settings, scorer, rows, scores)
        mine = np.array([row["score"] for row in scores if row["scorer"] == scorer.name])
        say(f"{settings.folder}: {scorer.name} {mine.mean():.4f} on average of {len(mine)} images ({scorer.version})")
    return settings.folder / "scores.parquet"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(ScoreSettings, run, argv, prog="dedpo score", positional=("folder",), flags={"with": "scorers"})


if __name__ == "__main__":
    raise SystemExit(main())
