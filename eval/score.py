"""Scores of sample folders.

    dedpo score samples/base samples/tuned --with pickscore=FOLDER oracle_reward

Reads `DIR/index.parquet` (file, prompt, prompt_index, seed), writes `DIR/scores.parquet` with the same columns plus scorer,
version and score; and `DIR/embeddings/SCORER.safetensors`, where the scorer embeds images (see `embeddings`). What is there
already, of the same version, is kept; so a stopped run goes on. Several processes may be given the same folders: each scores
those that no other has in hand.

| in `scores.parquet` | rule |
|---|---|
| scores of images of another name or content | do not count, which is told |
| scores of an earlier version of a scorer | replaced, which is told |
| one scorer in two versions, or with two scores of an image | do not count, which is told: scores of two versions do not compare |
| a score that is missing or not finite, a file that is not as above | refused |
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.pace import Forecast
from dedpo_diffusion.evaluation.comparison.samples import INDEX, Row, images_digest, load_images, read_index, resolutions, unlisted
from dedpo_diffusion.settings import ScoreSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.judges.scorers import Embedder, Scorer

__all__ = ["INDEX", "Row", "images_digest", "load_images", "read_index", "read_scores", "resolutions", "write_scores"]
SAVE_EVERY = 30.0  # seconds of scoring that a kill may cost
LOCK = ".score.lock"


def read_scores(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The scores that a folder holds of its present images; those that do not count, by this module's table, are told.

    Raises:
        UserError: scores.parquet is no parquet file of the expected columns, or a score is missing or not finite.
    """
    held, notes = _read_scores(folder, rows)
    for note in notes:
        say(note)
    return held


def _read_scores(folder: Path, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The scores that count, and what is to be told of the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "scores.parquet"
    if not path.is_file():
        return [], []
    try:
        table = pq.read_table(path)
        held = table.select(_schema().names).cast(_schema()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run `dedpo score` again") from error
    for number, row in enumerate(held):
        if row["score"] is None or not math.isfinite(row["score"]):
            what = f"row {number} has the score {row['score']} of {row['scorer']}"
            raise UserError(f"{path}: {what}; remove the file and run `dedpo score` again")
    again = f"give all its scorers again ({', '.join(dict.fromkeys(row['scorer'] for row in held))}): the next run writes it anew"
    images = (table.schema.metadata or {}).get(b"images", b"").decode()
    if len(images) == 64:  # hexadecimal digits: a digest of names and sizes
        return [], [f"{path} was written when images were told apart by name and size alone; its scores do not count any more; {again}"]
    present = {tuple(row[name] for name in INDEX) for row in rows}
    if images != images_digest(folder, rows) or any(tuple(row[name] for name in INDEX) not in present for row in held):
        return [], [f"{path} holds scores of other images; they do not count; {again}"]
    return _without_mixtures(path, held)


def _without_mixtures(path: Path, held: list[Row]) -> tuple[list[Row], list[str]]:
    versions: dict[str, set[str]] = {}
    files: dict[str, list[str]] = {}
    for row in held:
        versions.setdefault(row["scorer"], set()).add(row["version"])
        files.setdefault(row["scorer"], []).append(row["file"])
    notes = {}
    for scorer, found in versions.items():
        if len(found) > 1:
            what = f"scores of {scorer} by several versions ({', '.join(sorted(found))}), which do not compare"
            notes[scorer] = f"{path} holds {what}; none of them counts"
        elif len(set(files[scorer])) < len(files[scorer]):
            notes[scorer] = f"{path} holds several scores of {scorer} for one image; none of {scorer}'s counts"
    return [row for row in held if row["scorer"] not in notes], list(notes.values())


def _schema() -> Any:
    import pyarrow as pa

    texts, whole = pa.string(), pa.int64()
    kinds = {"file": texts, "prompt": texts, "prompt_index": whole, "seed": whole, "scorer": texts, "version": texts, "score": pa.float64()}
    return pa.schema(kinds)


def write_scores(folder: Path, rows: Sequence[Row], scores: Sequence[Row]) -> None:
    """Write `scores.parquet` atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.core.files import atomic_file

    schema = _schema().with_metadata({"images": images_digest(folder, rows)})
    with atomic_file(folder / "scores.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(list(scores), schema=schema), temporary)


class Ledger:
    """What a folder holds of one scorer, and of the others, as it grows; for whoever holds the folder's lock.

    Attributes:
        scores: by file, this scorer's.
        embedder: the scorer, where it embeds images and that is wanted.
        seen: by file, its embeddings (D,) of norm 1.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], scorer: Scorer, *, embeddings: bool) -> None:
        from dedpo_diffusion.evaluation.comparison.embeddings import read_some
        from dedpo_diffusion.judges.scorers import Embedder

        self.folder, self.rows, self.scorer = folder, rows, scorer
        held, name = _read_scores(folder, rows)[0], scorer.name
        self.others = [row for row in held if row["scorer"] != name]
        mine = [row for row in held if row["scorer"] == name]
        self.scores = {row["file"]: row["score"] for row in mine if row["version"] == scorer.version}
        self.stale = {row["version"] for row in mine} - {scorer.version}
        self.embedder: Embedder | None = scorer if embeddings and isinstance(scorer, Embedder) else None
        self.seen: dict[str, np.ndarray] = {}
        if self.stale:
            say(f"{folder}: scores of {', '.join(sorted(self.stale))} are replaced by {scorer.version}")
        if self.embedder is not None:
            version, seen = read_some(folder, rows, name)
            if version == scorer.version:
                self.seen = seen
            elif version:
                say(f"{folder}: embeddings of {version} are replaced by {scorer.version}")

    def lacking(self) -> list[Row]:
        """The rows that have no score yet, or no embedding."""
        done = self.scores if self.embedder is None else self.scores.keys() & self.seen.keys()
        return [row for row in self.rows if row["file"] not in done]

    def add(self, part: Sequence[Row]) -> None:
        """Score some rows; an image that only lacks its embedding keeps its score."""
        prompts, images = [row["prompt"] for row in part], load_images(self.folder, part)
        if self.embedder is None:
            values = self.scorer.score(prompts, images)
        else:
            values, vectors = self.embedder.score_and_embed(prompts, images)
            self.seen |= {row["file"]: _checked_vector(self.scorer, row, vector) for row, vector in zip(part, vectors, strict=True)}
        found = {row["file"]: _checked_score(self.scorer, row, float(value)) for row, value in zip(part, values, strict=True)}
        self.scores = found | self.scores

    def save(self) -> None:
        """Write both files; the embeddings first, so that no run leaves a score without one."""
        import numpy as np

        from dedpo_diffusion.evaluation.comparison.embeddings import Embeddings, write_embeddings

        if self.seen:
            files = [row["file"] for row in self.rows if row["file"] in self.seen]
            found = Embeddings(self.scorer.version, np.stack([self.seen[file] for file in files]))
            write_embeddings(self.folder, self.rows, self.scorer.name, found, files=files)
        label = {"scorer": self.scorer.name, "version": self.scorer.version}
        mine = [{**row, **label, "score": self.scores[row["file"]]} for row in self.rows if row["file"] in self.scores]
        write_scores(self.folder, self.rows, self.others + mine)


def _checked_score(scorer: Scorer, row: Row, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"scorer {scorer.name} gave {value} for {row['file']}; look at that image, or use another scorer")
    return value


def _checked_vector(scorer: Scorer, row: Row, vector: np.ndarray) -> np.ndarray:
    if not abs(float((vector**2).sum()) - 1) < 1e-3:
        raise UserError(f"scorer {scorer.name} gave {row['file']} an embedding that is not of norm 1; use another scorer")
    return vector


def add_scores(settings: ScoreSettings, scorer: Scorer, folder: Path, rows: Sequence[Row]) -> None:
    """Complete a folder's scores, and embeddings, of one scorer; written along the way."""
    from dedpo_diffusion.models.memory import slow_on_cpu

    ledger = Ledger(folder, rows, scorer, embeddings=settings.embeddings)
    todo = ledger.lacking()
    if not todo:
        say(f"{folder}: {scorer.name} ({scorer.version}): all {len(rows)} images are scored already")
    scored = sum(row["file"] in ledger.scores for row in todo)
    if scored:
        fact = f"{scored} of {len(rows)} images have a score of {scorer.name} and no embedding"
        say(f"{folder}: {fact}; they go through its image tower once more (--embeddings false leaves that out)")
    saved, batch = time.monotonic(), int(settings.batch)
    forecast = Forecast(len(todo), after=batch if slow_on_cpu(scorer) else 0)
    with Progress(f"scoring {folder} with {scorer.name}", len(rows), start=len(rows) - len(todo)) as progress:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            ledger.add(part)
            forecast.advance(len(part))
            progress.advance(len(part))
            if time.monotonic() - saved > SAVE_EVERY:
                ledger.save()
                saved = time.monotonic()
    if todo or ledger.stale:
        ledger.save()
    say(summary(folder, rows, scorer, ledger.scores))


def summary(folder: Path, rows: Sequence[Row], scorer: Scorer, scores: dict[str, float]) -> str:
    """A folder's mean score in words: never without its scorer, version, number of images and interval."""
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.intervals import is_rate, mean_interval, rate_interval

    values, prompts = np.array([scores[row["file"]] for row in rows]), np.array([row["prompt"] for row in rows])
    count = len(set(prompts))
    if count > 1:
        found = (rate_interval if is_rate(values) else mean_interval)(values, prompts)
        sure = f"95 % interval {found.low:.4f} to {found.high:.4f}"
    else:
        sure = "no interval: one prompt says nothing about others"
    of = f"{len(rows)} images of {count} {'prompt' if count == 1 else 'prompts'}"
    return f"{folder}: {scorer.name} {values.mean():.4f} ({sure}), the mean of {of} ({scorer.version})"


def share_out(settings: ScoreSettings, scorer: Scorer, indexes: dict[Path, list[Row]]) -> None:
    """Score every folder that no other process is scoring, then wait for the others and complete what those left."""
    from dedpo_diffusion.core.locks import hold_lock

    busy = []
    for folder, rows in indexes.items():
        with hold_lock(folder / LOCK) as mine:
            if mine:
                add_scores(settings, scorer, folder, rows)
            else:
                busy.append(folder)
    for folder in busy:
        say(f"{folder} is being scored by another process; waiting for that to end")
        with hold_lock(folder / LOCK, wait=True):
            add_scores(settings, scorer, folder, indexes[folder])


def open_folders(folders: Sequence[Path]) -> dict[Path, list[Row]]:
    """The indexes of all folders; what is wrong or strange about one is told before anything is loaded.

    Raises:
        UserError: a folder is given twice, or an index, image header, scores.parquet cannot be used.
    """
    indexes: dict[Path, list[Row]] = {}
    for folder in folders:
        if any(folder.resolve() == other.resolve() for other in indexes):
            raise UserError(f"{folder} is given twice; give each folder once")
        indexes[folder] = rows = read_index(folder)
        sizes, extra = resolutions(folder, rows), unlisted(folder, rows)
        if len(sizes) > 1:
            listed = ", ".join(f"{count} of {width} x {height}" for (width, height), count in sizes.items())
            say(f"{folder}: images of {len(sizes)} sizes ({listed}); scorers shrink all to their own, so compare scores within a size only")
        if extra:
            say(f"{folder}: images that index.parquet does not list are not scored: {len(extra)}, the first {extra[0]}")
        read_scores(folder, rows)
    return indexes


def run(settings: ScoreSettings) -> list[Path]:
    """Score sample folders; several processes may share them."""
    from dedpo_diffusion.judges.registry import MOST
    from dedpo_diffusion.judges.scorers import load_scorer
    from dedpo_diffusion.models.memory import resolved, slow_on_cpu, tell_cpu
    from dedpo_diffusion.sampling.strength_folders import expanded

    names = [spec if spec.startswith("http=") else spec.partition("=")[0] for spec in settings.scorers]  # servers name themselves
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"scorer {twice[0]} is named twice; name each scorer once")
    indexes = open_folders(expanded(settings.folders))
    settings = resolved(settings, most=MOST)
    named: set[str] = set()
    for spec in settings.scorers:
        scorer = load_scorer(spec, device=settings.device, batch=int(settings.batch), dtype=settings.dtype)
        if scorer.name in named:
            raise UserError(f"two of the scorers are called {scorer.name}; score with one of them alone")
        named.add(scorer.name)
        if slow_on_cpu(scorer):
            tell_cpu(scorer.name)
        share_out(settings, scorer, indexes)
    say_next("compare", *(["BASE"] if len(indexes) == 1 else []), *settings.folders)
    return [folder / "scores.parquet" for folder in indexes]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(ScoreSettings, run, argv, prog="dedpo score", positional=("folders",), flags={"with": "scorers"})


if __name__ == "__main__":
    raise SystemExit(main())
