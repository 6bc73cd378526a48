"""What a scorer's image tower saw of a sample folder's images: `DIR/embeddings/SCORER.safetensors`, for diversity and drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dedpo_diffusion.console import UserError
from dedpo_diffusion.evaluation.score import Row, images_digest

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Embeddings:
    """`values` (N, D) float32 of norm 1, in the order of the rows they were read for; `version` is the scorer's."""

    version: str
    values: np.ndarray


def write_embeddings(folder: Path, rows: Sequence[Row], scorer: str, found: Embeddings) -> Path:
    """Write the embeddings of all rows of a folder's index, in float16, atomically."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    from dedpo_diffusion.files import atomic_file

    path = folder / "embeddings" / f"{scorer}.safetensors"
    path.parent.mkdir(exist_ok=True)
    metadata = {"version": found.version, "images": images_digest(folder, rows), "files": json.dumps([row["file"] for row in rows])}
    with atomic_file(path) as temporary:
        save_file({"embeddings": np.ascontiguousarray(found.values, dtype=np.float16)}, temporary, metadata=metadata)
    return path


def read_embeddings(folder: Path, rows: Sequence[Row]) -> dict[str, Embeddings]:
    """By scorer, the embeddings that a folder holds of its present images; those of other images do not count.

    Raises:
        UserError: a file that cannot be read.
    """
    import json

    import numpy as np
    from safetensors import SafetensorError, safe_open

    found, digest = {}, images_digest(folder, rows)
    for path in sorted((folder / "embeddings").glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                metadata, values = file.metadata() or {}, file.get_tensor("embeddings").astype(np.float32)
            place = {name: number for number, name in enumerate(json.loads(metadata["files"]))}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it and run `dedpo score` again") from error
        if metadata.get("images") == digest and all(row["file"] in place for row in rows):
            chosen = values[[place[row["file"]] for row in rows]]
            found[path.stem] = Embeddings(metadata["version"], chosen / np.linalg.norm(chosen, axis=1, keepdims=True))
    return found
