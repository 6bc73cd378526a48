"""What a .safetensors file holds by its header: names, shapes, dtypes, metadata; no weight is read.

Files are written so that their bytes depend on nothing but what is in them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.models.single_file import PICKLED, how_to_convert, opened

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
    if path.is_file() and path.suffix.lower() in PICKLED:
        raise UserError(f"{path}: a pickled file, which is not opened because it can run code; {how_to_convert(path)}")
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: DTYPES.get(part.get_dtype(), part.get_dtype().lower()) for name, part in slices.items()}
        return Header(path, shapes, dtypes, file.metadata() or {})


# ---- writing


DIGEST = "sha256 of the tensors".ljust(
    64, "."
)  # in metadata: to be replaced by the SHA-256 of all the tensors' bytes, as they lie in the file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, the same bytes for the same tensors and metadata.

    Args:
        path: the file.
        tensors: contiguous.
        metadata: "format" is added; DIGEST in it becomes the tensors' digest.

    Raises:
        NoSpace: the disk is full.
    """
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})
        _settle(temporary)


def _settle(path: Path) -> None:
    """Put the metadata in order, which safetensors (0.8) writes in another one each time, and the digest in its place."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        known = header.pop("__metadata__")
        if any(DIGEST in value for value in known.values()):
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
            known = {key: value.replace(DIGEST, digest.hexdigest()) for key, value in known.items()}
        ordered = {"__metadata__": dict(sorted(known.items())), **header}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) != size:
            raise ValueError(f"{path}: its header cannot be put in order")
        file.seek(8)
        file.write(text)
