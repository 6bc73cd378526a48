"""What a .safetensors file holds by its header: names, shapes, dtypes, metadata; no weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.single_file import unreadable

PICKLED = {".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle"}
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes ("float16") by tensor name, and the file's metadata."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def parameters(self, names: Iterable[str] | None = None) -> int:
        """How many numbers these tensors hold; None takes all."""
        return sum(math.prod(self.shapes[name]) for name in (self.shapes if names is None else names))

    def dtype_counts(self) -> dict[str, int]:
        """Numbers held in each dtype, the commonest first."""
        counts: dict[str, int] = {}
        for name, dtype in self.dtypes.items():
            counts[dtype] = counts.get(dtype, 0) + math.prod(self.shapes[name])
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def stored_json(self, key: str) -> dict[str, Any] | None:
        """A dictionary that the metadata hold as JSON under this key; None where there is none that can be read."""
        try:
            return json_dictionary(self.path, self.metadata, key) if key in self.metadata else None
        except UserError:
            return None


def json_dictionary(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON dictionary that the metadata of a file hold under a key, {} where there is none.

    Raises:
        UserError: it is something else.
    """
    try:
        found = strict_json(metadata.get(key, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: its {key} is no JSON ({error}); export it again with the program that wrote it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: its {key} is no JSON dictionary; export it again with the program that wrote it")
    return found


def strict_json(text: str) -> Any:
    """What JSON holds. Raises ValueError, for NaN and Infinity too, which are none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        UserError: there is no such file, it is a pickle (which is never opened), or no whole safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'no such file or folder'}; give a .safetensors file")
    if path.suffix.lower() in PICKLED:
        raise UserError(f"{path}: a pickled file, which is not opened because it can run code; convert it to safetensors")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: DTYPES.get(part.get_dtype(), part.get_dtype().lower()) for name, part in slices.items()}
            return Header(path, shapes, dtypes, file.metadata() or {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); give a .safetensors file you may read") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {unreadable(path, error)}") from error
