"""Which pairs people were asked about, where they are no sample of those that are trained on, and what is known of both populations.

`dedpo merge --population COLUMN` names a column that tells the two apart; `--from OTHER_PAIRS` takes labels from another folder. What is
known of a pair here does not need anybody's answer: image statistics, generators, judges' scores, embeddings where they were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.tables import SOURCE
from dedpo_diffusion.labels.adaptation import Group
from dedpo_diffusion.labels.embedding_files import component_axes, has_embeddings, projections
from dedpo_diffusion.labels.files import CALIBRATED, align, label_names, label_origin, read_labels, row_of
from dedpo_diffusion.labels.image_statistics import WORDS
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.features import MOST_GENERATORS, generator_differences, generator_sides, statistics_group
from dedpo_diffusion.pairs.statistics import measure_statistics

TAUGHT = ("self-", "adapted-")  # one of these starts the version of a judge that trained on people's labels
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


# ---- the column that tells populations apart


def asked_rows(reader: PairReader, ids: Sequence[str], human: str, column: str) -> np.ndarray:
    """(N,) bool: pairs that were drawn for people to label, by a column of the dataset or of the human label file.

    Args:
        reader: of the dataset.
        ids: its pair_ids.
        human: name of the human label file, whose pairs alone its columns tell of; all others were not drawn.
        column: name of a source column, with or without source_, of truth values; or NAME=VALUE, drawn where it has this value.

    Raises:
        UserError: no such column, a value that is missing or none of a truth value, or pairs of one kind alone.
    """
    name, _, value = column.partition("=")
    name = name.removeprefix(SOURCE)
    path = reader.folder / "labels" / f"{human}.parquet"
    in_labels = SOURCE + name in pq.read_schema(path).names
    if name in reader.source_types:
        drawn = _truths(reader.sources([name])[name], value, column, lambda row: f"{reader.folder / 'pairs'}, {reader.location(row)}")
    elif in_labels:
        table = pq.read_table(path, columns=["pair_id", SOURCE + name])
        drawn = np.zeros(len(ids), dtype=bool)
        drawn[row_of(table.column("pair_id").to_pylist(), ids)] = _truths(table.column(1), value, column, lambda row: f"{path} row {row}")
    else:
        held = ", ".join(SOURCE + key for key in reader.source_types) or "none"
        raise UserError(f"--population {column}: neither the pairs ({held}) nor {path} has a column {SOURCE}{name}; name one of them")
    if drawn.all() or not drawn.any():
        kind = "all" if drawn.all() else "none"
        raise UserError(
            f"--population {column}: it says of {kind} of the {len(ids)} pairs that they were drawn for people to label, so there are no "
            "two populations; name another column or value, or leave --population out"
        )
    return drawn


def _truths(values: pa.ChunkedArray, wanted: str, column: str, where: Callable[[int], str]) -> np.ndarray:
    """(N,) bool of a column of truth values, or of any whose value is looked for."""
    found = np.zeros(len(values), dtype=bool)
    for row, value in enumerate(values.to_pylist()):
        text = None if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)
        if text is None:
            raise UserError(f"--population {column}: {where(row)} has no value; fill it in")
        if wanted:
            found[row] = text == wanted
        elif text.lower() in TRUE + FALSE:
            found[row] = text.lower() in TRUE
        else:
            raise UserError(
                f"--population {column}: {where(row)} is {text!r}, which is neither true nor false; say which value stands for pairs that "
                f"people were asked about, as --population {column}={text}"
            )
    return found


# ---- what is known of pairs


@dataclass(frozen=True)
class Known:
    """What is known of N pairs without asking people.

    `statistics` (N, S, 2) of both images; `generators` names and (N, 2), which of them made each image, None where no column tells;
    `scores` (N, 2) and `labels` (N,) by judge; `embeddings` (N, 2, C), components by judge.
    """

    statistics: np.ndarray
    generators: tuple[list[str], np.ndarray] | None
    scores: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    embeddings: dict[str, np.ndarray]

    def at(self, rows: np.ndarray) -> Known:
        """Those of some pairs."""

        def some(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: value[rows] for name, value in values.items()}

        made = None if self.generators is None else (self.generators[0], self.generators[1][rows])
        return Known(self.statistics[rows], made, some(self.scores), some(self.labels), some(self.embeddings))


def known_pairs(reader: PairReader, ids: Sequence[str], judges: Sequence[str], axes: Mapping[str, np.ndarray] | None = None) -> Known:
    """What is known of the pairs of a folder; images are measured once.

    Args:
        reader: of the folder.
        ids: its pair_ids.
        judges: whose labels, scores and embeddings are taken; NaN where there is none.
        axes: (D, C) of the embeddings of a judge, as `embedding_axes` of another folder; None takes this folder's own.

    Raises:
        UserError: an image or a label file that cannot be read.
    """
    folder, scores, labels, embeddings = reader.folder, {}, {}, {}
    axes = embedding_axes(reader, judges) if axes is None else axes
    for name in judges:
        found = read_labels(folder, name, extras=("score_0", "score_1", "judge_version"))
        labels[name] = align(found, ids, folder=folder, name=name)
        if {"score_0", "score_1"} <= set(found.extra):
            both = np.full((len(ids), 2), np.nan)
            both[row_of(found.pair_id, ids)] = np.array([found.extra["score_0"], found.extra["score_1"]], dtype=np.float64).T
            scores[name] = both
        if name in axes and _has_embeddings(reader, name):
            embeddings[name] = projections(folder, name, axes[name])
    return Known(measure_statistics(reader), generator_sides(reader), scores, labels, embeddings)


def embedding_axes(reader: PairReader, judges: Sequence[str]) -> dict[str, np.ndarray]:
    """(D, C) the first principal axes of the embeddings of those judges that left complete ones."""
    return {name: component_axes(reader.folder, name) for name in judges if _has_embeddings(reader, name)}


def judge_version(folder: Path, name: str) -> str | None:
    """The one version of a judge's labels; None where the file does not tell, or holds several."""
    found = set(read_labels(folder, name, extras=("judge_version",)).extra.get("judge_version", []))
    return str(found.pop()) if len(found) == 1 else None


def raw_judges(folder: Path, human: str) -> list[str]:
    """The judges' label files that learned from nobody's answers."""
    found = [name for name in label_names(folder) if name != human and label_origin(folder, name) != CALIBRATED]
    return [name for name in found if not str(judge_version(folder, name)).startswith(TAUGHT)]


def has_scores(folder: Path, name: str) -> bool:
    """Whether a label file holds raw scores."""
    return {"score_0", "score_1"} <= set(read_labels(folder, name, extras=("score_0", "score_1")).extra)


def _has_embeddings(reader: PairReader, name: str) -> bool:
    version = judge_version(reader.folder, name)
    return version is not None and has_embeddings(reader.folder, name, {"judge version": version, "dataset": reader.fingerprint()})


def together(one: Known, other: Known) -> Known:
    """The pairs of two folders as one, with what is known of both."""

    def both(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([mine[name], theirs[name]]) for name in mine if name in theirs}

    made = None
    if one.generators is not None and other.generators is not None:
        names = sorted({*one.generators[0], *other.generators[0]})
        place = {name: k for k, name in enumerate(names)}
        codes = [np.array([place[name] for name in found], dtype=np.int64)[code] for found, code in (one.generators, other.generators)]
        made = names, np.concatenate(codes)
    statistics = np.concatenate([one.statistics, other.statistics])
    return Known(statistics, made, both(one.scores, other.scores), both(one.labels, other.labels), both(one.embeddings, other.embeddings))


def shared_generators(known: Known, labelled: np.ndarray) -> tuple[Known, list[str]]:
    """The same without generators that only one population (M,) has, and the names of these; beyond 50 the rarest go too."""
    if known.generators is None:
        return known, []
    names, codes = known.generators
    counts = [np.bincount(codes[rows].ravel(), minlength=len(names)) for rows in (labelled, ~labelled)]
    common = np.flatnonzero(np.minimum(*counts) > 0)
    kept = np.sort(common[np.argsort(-counts[0][common], kind="stable")[:MOST_GENERATORS]])
    place = np.full(len(names), -1)
    place[kept] = np.arange(len(kept))
    left_out = [name for k, name in enumerate(names) if k not in set(kept.tolist())]
    return replace(known, generators=([names[k] for k in kept], place[codes]) if len(kept) else None), left_out


# ---- as features


def even_features(known: Known) -> dict[str, np.ndarray]:
    """(M,) each, what tells populations apart: for every measure the mean of both images and the size of their difference, neither of which
    changes when the images are swapped. A measure that is not known of all pairs is left out."""
    measures: dict[str, np.ndarray] = {}
    log = [list(WORDS).index(name) for name in ("pixels", "aspect")]
    statistics = known.statistics.astype(np.float64)
    statistics[:, log] = np.log(statistics[:, log])
    measures |= {name: statistics[:, k] for k, name in enumerate(WORDS)}
    measures |= {f"score of {name}": both for name, both in known.scores.items()}
    for name, both in known.embeddings.items():
        measures |= {f"{name} component {k + 1}": both[:, :, k].astype(np.float64) for k in range(both.shape[2])}
    found: dict[str, np.ndarray] = {}
    for name, both in measures.items():
        found |= {name: both.mean(axis=1), f"difference of {name}": np.abs(both[:, 0] - both[:, 1])}
    if known.generators is not None:
        names, codes = known.generators
        found |= {f"images by {name}": (codes == k).sum(axis=1).astype(float) for k, name in enumerate(names)}
    found |= {f"confidence of {name}": np.abs(label - 0.5) for name, label in known.labels.items()}
    return {name: values for name, values in found.items() if np.isfinite(values).all() and np.ptp(values) > 0}


def odd_groups(known: Known, judges: Sequence[str]) -> tuple[Group, list[Group]]:
    """Differences of both images, for `labels.adaptation.adapt`: raw scores of the judges, and what else is known."""
    scores = Group("scores", list(judges), np.stack([known.scores[name][:, 0] - known.scores[name][:, 1] for name in judges], axis=1))
    others = [statistics_group(known.statistics)]
    if known.generators is not None:
        others.append(generator_differences(*known.generators))
    if known.embeddings:
        parts = {name: both[:, 0] - both[:, 1] for name, both in known.embeddings.items()}
        columns = [f"{name} component {k + 1}" for name, part in parts.items() for k in range(part.shape[1])]
        others.append(Group("embeddings", columns, np.concatenate(list(parts.values()), axis=1)))
    return scores, others


def odd_differences(known: Known) -> tuple[np.ndarray, list[str]]:
    """(M, F) differences in which a judge's systematic error may show, and their names: raw scores, image statistics, generators."""
    complete = [name for name, both in known.scores.items() if np.isfinite(both).all()]
    columns = {f"score of {name}": known.scores[name][:, 0] - known.scores[name][:, 1] for name in complete}
    group = statistics_group(known.statistics)
    columns |= dict(zip(group.columns, group.values.T.astype(np.float64), strict=True))
    if known.generators is not None:
        made = generator_differences(*known.generators)
        columns |= dict(zip([f"made by {name}" for name in made.columns], made.values.T.astype(np.float64), strict=True))
    return np.stack(list(columns.values()), axis=1), list(columns)
