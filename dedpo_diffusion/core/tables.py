"""Parquet files of named, typed columns, and what is wrong with them in the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedpo_diffusion.core.console import UserError

SOURCE = "source_"


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file, whose header is read now; UserError where it is none."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); write or copy it again") from error


def check_columns(
    path: Path,
    schema: pa.Schema,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    source: bool = True,
    hints: dict[str, str] | None = None,
) -> None:
    """Every required column there, none twice, none unknown.

    Args:
        source: columns named source_* may be there too.
        hints: what else to say of an unknown column whose name contains this word.
    """
    for name in required:
        if name not in schema.names:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(schema.names)}); add it")
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has two columns named {name!r}; remove one")
        if name in (*required, *optional) or (source and name.startswith(SOURCE)):
            continue
        keep = f"rename it to {SOURCE}{name} to keep it, or remove it" if source else "remove it"
        more = "".join(f"; {hint}" for word, hint in (hints or {}).items() if word in name)
        raise UserError(f"{path} has an unknown column {name!r}: {keep}{more}")


def check_types(path: Path, schema: pa.Schema, wanted: dict[str, str]) -> None:
    """Columns hold what they must: "text", "binary", "a number" or "true or false"."""
    tests = {
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        "binary": lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t),
        "true or false": pa.types.is_boolean,
        "a number": lambda t: pa.types.is_floating(t) or pa.types.is_integer(t),
    }
    for name, kind in wanted.items():
        found = schema.field(name).type
        if not tests[kind](found):
            raise UserError(f"{path}: column {name!r} holds {found}, and must hold {kind}; convert it")


def check_no_nulls(path: Path, name: str, values: Sequence[Any]) -> None:
    """No value of this column is missing; UserError names the first row."""
    if None in values:
        raise UserError(f"{path} row {list(values).index(None)}: {name} is missing; fill it in or remove the row")


def first_repeat(ids: Sequence[str]) -> tuple[int, int] | None:
    """Rows of the first value that comes a second time and of its first coming; None if all differ."""
    if len(set(ids)) == len(ids):  # the rule, and fast
        return None
    first: dict[str, int] = {}
    return next((first[pair_id], row) for row, pair_id in enumerate(ids) if first.setdefault(pair_id, row) != row)


def check_unique(path: Path, ids: Sequence[str]) -> None:
    """No pair_id comes twice; UserError names both rows."""
    rows = first_repeat(ids)
    if rows is not None:
        raise UserError(f"{path}: pair_id {ids[rows[0]]!r} is in row {rows[0]} and again in row {rows[1]}; remove one")


def categories(values: Any) -> tuple[list[str], np.ndarray]:
    """The different values as texts, sorted, and (N,) int64, which of them each value is. None and NaN are "none".

    Args:
        values: (N,) numbers or texts: a list, an array, or a column of a table.
    """
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, from_pandas=True)
    texts = pc.fill_null(pc.cast(column, pa.string()), "none")
    found = (texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts).dictionary_encode()
    names = found.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return [names[k] for k in order], place[found.indices.to_numpy()]
