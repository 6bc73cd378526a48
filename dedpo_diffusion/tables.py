"""Parquet files of named, typed columns, and what is wrong with them in the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .console import UserError

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


def check_unique(path: Path, ids: Sequence[str]) -> None:
    """No pair_id comes twice; UserError names both rows."""
    first: dict[str, int] = {}
    for row, pair_id in enumerate(ids):
        if first.setdefault(pair_id, row) != row:
            raise UserError(f"{path}: pair_id {pair_id!r} stands in row {first[pair_id]} and again in row {row}; remove one")
