"""Safetensors files whose bytes depend on nothing but what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dedpo_diffusion.core.files import atomic_file

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
