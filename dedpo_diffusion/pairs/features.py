"""What is known of a pair's two images before training, as differences: statistics, generators, components of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.tables import categories
from dedpo_diffusion.labels.adaptation import Group
from dedpo_diffusion.labels.embedding_files import components, has_embeddings
from dedpo_diffusion.labels.files import label_names, label_origin, read_labels, row_of
from dedpo_diffusion.labels.image_statistics import WORDS
from dedpo_diffusion.pairs.dataset import PairReader

GENERATORS = (("model_0", "model_1"), ("model1", "model2"), ("model_1", "model_2"))  # source columns, as importers write them
SWAPPED = "swapped"  # source column of pairs whose images were exchanged, unlike their other columns
MOST_GENERATORS = 50  # further, rarer ones are one


def statistics_group(statistics: np.ndarray) -> Group:
    """Differences of image statistics (N, S, 2); their sizes in pixels on a log scale."""
    values = statistics.copy()
    for name in ("pixels", "aspect"):
        place = list(WORDS).index(name)
        values[:, place] = np.log(values[:, place])
    return Group("statistics", list(WORDS), values[:, :, 0] - values[:, :, 1])


def generator_sides(reader: PairReader) -> tuple[list[str], np.ndarray] | None:
    """Names of generators, sorted, and (N, 2), which of them made image 0 and image 1; None where no column names any."""
    there = [names for names in GENERATORS if set(names) <= set(reader.source_types)]
    if not there:
        return None
    columns = reader.sources([*there[0], *([SWAPPED] if SWAPPED in reader.source_types else [])])
    sides = [categories(columns[name]) for name in there[0]]
    names = sorted({name for found, _ in sides for name in found})
    place = {name: k for k, name in enumerate(names)}
    codes = np.stack([np.array([place[name] for name in found])[code] for found, code in sides], axis=1)
    if SWAPPED in columns:
        swapped = np.array([value is True for value in columns[SWAPPED].to_pylist()])
        codes[swapped] = codes[swapped][:, ::-1]
    return names, codes


def generator_group(reader: PairReader) -> Group | None:
    """For every generator 1 where it made image 0 alone, -1 where it made image 1 alone; None where no column names any."""
    found = generator_sides(reader)
    if found is None:
        return None
    return generator_differences(*_common(*found))


def generator_differences(names: list[str], codes: np.ndarray) -> Group:
    """The same of these names and sides (N, 2); a code below 0 is none of them."""
    values = np.zeros((len(codes), len(names)), np.float32)
    for side, sign in ((0, 1), (1, -1)):
        rows = np.flatnonzero(codes[:, side] >= 0)
        np.add.at(values, (rows, codes[rows, side]), sign)
    return Group("generators", names, values)


def _common(names: list[str], codes: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The 49 that made most images and one for all others, where there are more than 50."""
    if len(names) <= MOST_GENERATORS:
        return names, codes
    kept = np.sort(np.argsort(-np.bincount(codes.ravel(), minlength=len(names)), kind="stable")[: MOST_GENERATORS - 1])
    place = np.full(len(names), len(kept))
    place[kept] = np.arange(len(kept))
    return [*(names[k] for k in kept), "(rarer ones)"], place[codes]


def embedding_group(reader: PairReader, versions: dict[str, str | None], *, seed: int = 0) -> Group | None:
    """Components of the embeddings of those judges, by the version of their labels, that left complete ones; None where none did."""
    dataset, found, names = reader.fingerprint(), [], []
    for judge, version in versions.items():
        if version is not None and has_embeddings(reader.folder, judge, {"judge version": version, "dataset": dataset}):
            values = components(reader.folder, judge, seed=seed)
            found.append(values)
            names += [f"{judge} component {k + 1}" for k in range(values.shape[1])]
    return Group("embeddings", names, np.concatenate(found, axis=1)) if found else None


def known_differences(reader: PairReader, ids: list[str], *, human: str) -> tuple[np.ndarray | None, list[str]]:
    """(N, F) differences that are there without any work, for `merge`, and their names: complete raw scores of judges that did not
    learn from people, and image statistics where they were measured; None where there are none."""
    from dedpo_diffusion.labels.files import CALIBRATED
    from dedpo_diffusion.pairs.statistics import read_statistics

    columns: dict[str, Any] = {}
    for name in label_names(reader.folder):
        if name == human or label_origin(reader.folder, name) == CALIBRATED:
            continue
        try:
            labels = read_labels(reader.folder, name, extras=("score_0", "score_1"))
        except UserError:  # a file that this merge has no use for
            continue
        rows = row_of(ids, labels.pair_id)
        if {"score_0", "score_1"} <= set(labels.extra) and (rows >= 0).all():
            scores = np.array([labels.extra["score_0"], labels.extra["score_1"]], dtype=np.float64)[:, rows]
            if np.isfinite(scores).all():
                columns[name] = scores[0] - scores[1]
    statistics = read_statistics(reader)
    if statistics is not None:
        group = statistics_group(statistics)
        columns |= dict(zip(group.columns, group.values.T.astype(np.float64), strict=True))
    return (np.stack(list(columns.values()), axis=1), list(columns)) if columns else (None, [])
