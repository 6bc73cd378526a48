"""Scores of sample folders.

    dedpo score samples/base samples/tuned --with pickscore=FOLDER oracle_reward

Reads `DIR/index.parquet` (file, prompt, prompt_index, seed), writes `DIR/scores.parquet` with the same columns plus scorer,
version and score; and `DIR/embeddings/SCORER.safetensors`, where the scorer embeds images (see `embeddings`). What is there
already, of the same version, is kept; so a stopped run goes on. Several processes of one machine may be given the same folders: each
scores those that no other has in hand. With `--engine ray`, the nodes of a cluster score all folders together.

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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.engine import Crew, open_engine
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


@dataclass(frozen=True)
class ScorerFacts:
    """What this stage must know of a scorer that a worker has loaded: its name and version, whether it embeds images, and whether it
    is a large model on a CPU."""

    name: str
    version: str
    embeds: bool
    slow: bool


@dataclass(frozen=True)
class Part:
    """Images of a folder that are scored together."""

    folder: Path
    rows: Sequence[Row]

    def __str__(self) -> str:
        return f"the images {self.rows[0]['file']} to {self.rows[-1]['file']} of {self.folder}"


class ScoreWorker:
    """Scores images: a function of a `Part` that gives the scores (n,) and, where they are wanted, the embeddings (n, D), or None.

    Raises:
        UserError: the scorer that this worker has loaded is another one.
    """

    def __init__(self, planned: ScorerFacts, embed: bool, scorer: Scorer) -> None:
        if scorer.version != planned.version:
            words = f"the nodes of the cluster load different scorers ({scorer.version}, {planned.version})"
            raise UserError(f"{words}; give all the same files, and a --dtype that all of them have")
        self.scorer, self.embed = scorer, embed

    def __call__(self, part: Part) -> tuple[np.ndarray, np.ndarray | None]:
        """See above."""
        prompts, images = [row["prompt"] for row in part.rows], load_images(part.folder, part.rows)
        if self.embed:
            return cast("Embedder", self.scorer).score_and_embed(prompts, images)
        return self.scorer.score(prompts, images), None


class Ledger:
    """What a folder holds of one scorer, and of the others, as it grows; for whoever holds the folder's lock.

    Attributes:
        scores: by file, this scorer's.
        embed: whether the scorer embeds images, and that is wanted.
        seen: by file, its embeddings (D,) of norm 1.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], scorer: ScorerFacts, *, embeddings: bool) -> None:
        from dedpo_diffusion.evaluation.comparison.embeddings import read_some

        self.folder, self.rows, self.scorer = folder, rows, scorer
        held, name = _read_scores(folder, rows)[0], scorer.name
        self.others = [row for row in held if row["scorer"] != name]
        mine = [row for row in held if row["scorer"] == name]
        self.scores = {row["file"]: row["score"] for row in mine if row["version"] == scorer.version}
        self.stale = {row["version"] for row in mine} - {scorer.version}
        self.embed = embeddings and scorer.embeds
        self.seen: dict[str, np.ndarray] = {}
        self.saved = time.monotonic()
        if self.stale:
            say(f"{folder}: scores of {', '.join(sorted(self.stale))} are replaced by {scorer.version}")
        if self.embed:
            version, seen = read_some(folder, rows, name)
            if version == scorer.version:
                self.seen = seen
            elif version:
                say(f"{folder}: embeddings of {version} are replaced by {scorer.version}")

    def lacking(self) -> list[Row]:
        """The rows that have no score yet, or no embedding."""
        done = self.scores.keys() & self.seen.keys() if self.embed else self.scores
        return [row for row in self.rows if row["file"] not in done]

    def add(self, part: Sequence[Row], values: np.ndarray, vectors: np.ndarray | None) -> None:
        """Take what a worker found of some rows; an image that only lacked its embedding keeps its score."""
        if vectors is not None:
            self.seen |= {row["file"]: _checked_vector(self.scorer, row, vector) for row, vector in zip(part, vectors, strict=True)}
        found = {row["file"]: _checked_score(self.scorer, row, float(value)) for row, value in zip(part, values, strict=True)}
        self.scores = found | self.scores
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

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
        self.saved = time.monotonic()


def _checked_score(scorer: ScorerFacts, row: Row, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"scorer {scorer.name} gave {value} for {row['file']}; look at that image, or use another scorer")
    return value


def _checked_vector(scorer: ScorerFacts, row: Row, vector: np.ndarray) -> np.ndarray:
    if not abs(float((vector**2).sum()) - 1) < 1e-3:
        raise UserError(f"scorer {scorer.name} gave {row['file']} an embedding that is not of norm 1; use another scorer")
    return vector


def add_scores(settings: ScoreSettings, crew: Crew[Scorer], scorer: ScorerFacts, indexes: dict[Path, list[Row]], *, tell: bool) -> None:
    """Complete the scores, and embeddings, of one scorer in some folders; written along the way.

    Args:
        settings: of the stage.
        crew: scores.
        scorer: which one it is.
        indexes: the rows of each folder.
        tell: soon say how long all of it takes, where that is long.
    """
    ledgers = {folder: Ledger(folder, rows, scorer, embeddings=settings.embeddings) for folder, rows in indexes.items()}
    batch, parts, images = int(settings.batch), [], sum(map(len, indexes.values()))
    for folder, ledger in ledgers.items():
        todo = ledger.lacking()
        if not todo:
            say(f"{folder}: {scorer.name} ({scorer.version}): all {len(ledger.rows)} images are scored already")
        scored = sum(row["file"] in ledger.scores for row in todo)
        if scored:
            fact = f"{scored} of {len(ledger.rows)} images have a score of {scorer.name} and no embedding"
            say(f"{folder}: {fact}; they go through its image tower once more (--embeddings false leaves that out)")
        parts += [Part(folder, todo[start : start + batch]) for start in range(0, len(todo), batch)]
    left, embed = sum(len(part.rows) for part in parts), any(ledger.embed for ledger in ledgers.values())
    where = str(next(iter(indexes))) if len(indexes) == 1 else f"{len(indexes)} folders"
    forecast = Forecast(left, after=batch if tell and scorer.slow else 0)
    with Progress(f"scoring {where} with {scorer.name}", images, start=images - left) as progress:
        for number, (values, vectors) in crew.run(parts, partial(ScoreWorker, scorer, embed)) if parts else ():
            ledgers[parts[number].folder].add(parts[number].rows, values, vectors)
            forecast.advance(len(parts[number].rows))
            progress.advance(len(parts[number].rows))
    touched = {part.folder for part in parts}
    for folder, ledger in ledgers.items():
        if folder in touched or ledger.stale:
            ledger.save()
        say(summary(folder, ledger.rows, scorer, ledger.scores))


def summary(folder: Path, rows: Sequence[Row], scorer: ScorerFacts, scores: dict[str, float]) -> str:
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


def share_out(settings: ScoreSettings, crew: Crew[Scorer], scorer: ScorerFacts, indexes: dict[Path, list[Row]]) -> None:
    """Score every folder that no other process is scoring, then wait for the others and complete what those left."""
    from dedpo_diffusion.core.locks import hold_lock

    busy = []
    for folder, rows in indexes.items():
        with hold_lock(folder / LOCK) as mine:
            if mine:
                add_scores(settings, crew, scorer, {folder: rows}, tell=True)
            else:
                busy.append(folder)
    for folder in busy:
        say(f"{folder} is being scored by another process; waiting for that to end")
        with hold_lock(folder / LOCK, wait=True):
            add_scores(settings, crew, scorer, {folder: indexes[folder]}, tell=True)


def score_together(settings: ScoreSettings, crew: Crew[Scorer], scorer: ScorerFacts, indexes: dict[Path, list[Row]]) -> None:
    """Score all folders at once, so that workers elsewhere load the scorer once."""
    from dedpo_diffusion.core.locks import hold_lock

    with ExitStack() as locks:
        for folder in indexes:
            locks.enter_context(hold_lock(folder / LOCK, wait=True))
        add_scores(settings, crew, scorer, indexes, tell=False)


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


def load(settings: ScoreSettings, spec: str) -> Scorer:
    """The scorer that a worker loads."""
    from dedpo_diffusion.judges.scorers import load_scorer

    return load_scorer(spec, device=settings.device, batch=int(settings.batch), dtype=settings.dtype)


def facts(scorer: Scorer) -> ScorerFacts:
    """What this stage must know of a scorer."""
    from dedpo_diffusion.judges.scorers import Embedder
    from dedpo_diffusion.models.memory import slow_on_cpu

    return ScorerFacts(scorer.name, scorer.version, isinstance(scorer, Embedder), slow_on_cpu(scorer))


def run(settings: ScoreSettings) -> list[Path]:
    """Score sample folders; several processes of one machine may share them."""
    from dedpo_diffusion.judges.registry import MOST
    from dedpo_diffusion.models.memory import resolved_by, tell_cpu
    from dedpo_diffusion.sampling.strength_folders import expanded

    names = [spec if spec.startswith("http=") else spec.partition("=")[0] for spec in settings.scorers]  # servers name themselves
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"scorer {twice[0]} is named twice; name each scorer once")
    indexes = open_folders(expanded(settings.folders))
    named: set[str] = set()
    with open_engine(settings.engine, settings.ray, folders=list(indexes), device=settings.device) as engine:
        settings = resolved_by(engine, settings, most=MOST)
        for spec in settings.scorers:
            crew = engine.crew(partial(load, settings, spec))
            scorer = crew.ask(facts)
            if scorer.name in named:
                raise UserError(f"two of the scorers are called {scorer.name}; score with one of them alone")
            named.add(scorer.name)
            if scorer.slow and not engine.many:
                tell_cpu(scorer.name)
            (score_together if engine.many else share_out)(settings, crew, scorer, indexes)
    say_next("compare", *(["BASE"] if len(indexes) == 1 else []), *settings.folders)
    return [folder / "scores.parquet" for folder in indexes]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(ScoreSettings, run, argv, prog="dedpo score", positional=("folders",), flags={"with": "scorers"})


if __name__ == "__main__":
    raise SystemExit(main())
