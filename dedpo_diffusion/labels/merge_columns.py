"""What `dedpo merge` knows of a pair besides its labels: source columns, the probability that people were asked about it.

No stage: `merge` calls it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from dedpo_diffusion.labels.answers import Answers


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
    columns, beyond = features(answers), answers.too_many
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
    """Columns (N,) that tell who was asked about: judges' labels and confidence, source columns; constant ones not.

    An unknown number counts as the column's mean, with a column of its own that says so; a text has a column for every value.
    """
    import numpy as np

    judged = answers.judged()
    found: dict[str, np.ndarray] = {}
    for k, name in enumerate([] if judged is None else answers.names):
        assert judged is not None
        found |= {f"label of {name}": judged[:, k], f"confidence of {name}": np.abs(judged[:, k] - 0.5)}
    for name, values in answers.sources.items():
        if values.dtype == np.float64:
            unknown = ~np.isfinite(values)
            known = values[~unknown]
            found[name] = np.where(unknown, known.mean() if known.size else 0.0, values)
            found[f"{name} unknown"] = unknown.astype(float)
        else:
            found |= {f"{name} = {value}": (values == value).astype(float) for value in sorted(set(values))}
    return {name: values for name, values in found.items() if np.ptp(values) > 0}
