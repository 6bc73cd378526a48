"""What `dedpo merge` knows of a pair besides its labels: strata, source columns, the probability that people were asked about it.

No stage: `merge` calls it.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from dedpo_diffusion.labels.answers import Answers

BINS = 4  # strata by confidence


def comparable(columns: dict[str, pa.ChunkedArray]) -> dict[str, np.ndarray]:
    """Those of numbers, (N,) float64, NaN where missing or infinite, and of few texts, (N,) objects, by their name in the files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from dedpo_diffusion.core.tables import SOURCE, categories
    from dedpo_diffusion.labels.warnings import MOST

    found = {}
    for name, column in columns.items():
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            if pc.count_distinct(column).as_py() <= MOST:
                names, codes = categories(column)
                found[SOURCE + name] = np.array(names, dtype=object)[codes]
        elif not pa.types.is_null(column.type):
            numbers = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
            known = np.array(numbers.cast(pa.float64(), safe=False).to_numpy())
            found[SOURCE + name] = np.where(np.isfinite(known), known, np.nan)
    return found


def strata_of(
    column: str, prompts: list[str], columns: dict[str, pa.ChunkedArray], judged: np.ndarray | None, *, folder: Path
) -> tuple[list[str], np.ndarray]:
    """Names of the strata and, (N,), the number of each pair's.

    Args:
        column: prompt, confidence, or a source column, with source_ or without.
        prompts: N, of the pairs.
        columns: source columns of numbers, truth values and texts, by their name without source_.
        judged: (N, K) the judges' labels.
        folder: of the pair dataset, for messages.

    Raises:
        UserError: no such column.
    """
    from dedpo_diffusion.core.tables import SOURCE, categories

    if column == "prompt":
        return categories(prompts)
    if column == "confidence":
        if judged is None:
            raise UserError("--strata confidence needs a judge; name one with --judge")
        return by_confidence(judged)
    name = column.removeprefix(SOURCE)
    if name not in columns:
        there = ", ".join(["prompt", "confidence", *(SOURCE + name for name in columns)])
        raise UserError(f"--strata {column}: {folder / 'pairs'} has no column {SOURCE}{name} of texts or numbers; there are {there}")
    return categories(columns[name])


def by_confidence(judged: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Four groups of equal size by |mean judge label - 0.5|; fewer where a judge gives few different answers."""
    import numpy as np

    sure = np.abs(judged.mean(axis=1) - 0.5)
    inner = np.unique(np.quantile(sure, np.arange(1, BINS) / BINS))
    inner = inner[inner > sure.min()]
    code = np.searchsorted(inner, sure, side="right")
    ends = [float(sure.min()), *inner.tolist(), float(sure.max())]
    names = [f"{k + 1}: sure {0.5 + low:.2f} to {0.5 + high:.2f}" for k, (low, high) in enumerate(pairwise(ends))]
    return names, code.astype(np.int64)


def with_propensity(settings: MergeSettings, answers: Answers) -> tuple[Answers, dict[str, Any] | None]:
    """The answers with an estimated propensity, if that is asked for, and what the report says of propensities (None: at random)."""
    if settings.method == "naive" or settings.propensities != "estimate":
        return answers, None if answers.propensity is None else {"from": "stored"}
    import numpy as np

    from dedpo_diffusion.debias import estimate_propensity
    from dedpo_diffusion.labels.warnings import MOST

    labelled = ~np.isnan(answers.human)
    if not labelled.any() or labelled.all():
        say("--propensities estimate: there are no pairs with a human label, or none without; nothing to estimate")
        return answers, None
    columns, beyond = features(answers), left_out(answers)
    if beyond:
        say(f"--propensities estimate: more than {MOST} values, so no part of the model: {', '.join(beyond)}")
    if not columns:
        raise UserError("--propensities estimate: there is no judge and no source column to estimate them from; give --propensities none")
    try:
        found = estimate_propensity(labelled, np.stack(list(columns.values()), axis=1), seed=settings.seed)
    except ValueError as error:
        raise UserError(f"--propensities estimate: {error}") from error
    about = {"from": "estimate", "auc": found.auc, "n_clipped": int(found.n_clipped), "columns": list(columns), "left_out": beyond}
    return dataclasses.replace(answers, propensity=found.p), about


def features(answers: Answers) -> dict[str, np.ndarray]:
    """Columns (N,) that tell who was asked about: judges' labels and confidence, strata, source columns; constant ones not.

    An unknown number counts as the column's mean, with a column of its own that says so; a text has a column for every value.
    """
    import numpy as np

    from dedpo_diffusion.labels.warnings import MOST

    judged = answers.judged()
    found: dict[str, np.ndarray] = {}
    for k, name in enumerate([] if judged is None else answers.names):
        assert judged is not None
        found |= {f"label of {name}": judged[:, k], f"confidence of {name}": np.abs(judged[:, k] - 0.5)}
    if answers.strata is not None and len(answers.strata_names) <= MOST:
        found |= {f"stratum {name}": (answers.strata == k).astype(float) for k, name in enumerate(answers.strata_names)}
    for name, values in answers.sources.items():
        if values.dtype == np.float64:
            unknown = ~np.isfinite(values)
            known = values[~unknown]
            found[name] = np.where(unknown, known.mean() if known.size else 0.0, values)
            found[f"{name} unknown"] = unknown.astype(float)
        else:
            found |= {f"{name} = {value}": (values == value).astype(float) for value in sorted(set(values))}
    return {name: values for name, values in found.items() if np.ptp(values) > 0}


def left_out(answers: Answers) -> list[str]:
    """What `features` cannot use: strata and source columns of too many values."""
    from dedpo_diffusion.labels.warnings import MOST

    strata = [] if answers.strata is None or len(answers.strata_names) <= MOST else ["the strata"]
    return [*strata, *answers.too_many]
