"""What a scorer's image tower saw of a sample folder's images: `DIR/embeddings/SCORER.safetensors`, for diversity and drift.

`dedpo score` writes it along the way, so a file may hold the embeddings of some of the images only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.samples import Row, images_digest

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Embeddings:
    """`values` (N, D) float32 of norm 1, in the order of the rows they were read for; `version` is the scorer's."""

    version: str
    values: np.ndarray


def write_embeddings(folder: Path, rows: Sequence[Row], scorer: str, found: Embeddings, *, files: Sequence[str] | None = None) -> Path:
    """Write embeddings in float16, atomically.

    Args:
        folder: the sample folder.
        rows: of its index, all of them.
        scorer: names the file.
        found: one embedding for each of `files`.
        files: the images that are embedded; None stands for all rows, in their order.
    """
    import json

    import numpy as np
    from safetensors.numpy import save_file

    from dedpo_diffusion.core.files import atomic_file

    path, names = _path(folder, scorer), list(files) if files is not None else [row["file"] for row in rows]
    if len(names) != len(found.values):
        raise ValueError(f"{len(found.values)} embeddings of {len(names)} images")
    path.parent.mkdir(exist_ok=True)
    metadata = {"version": found.version, "images": images_digest(folder, rows), "files": json.dumps(names)}
    with atomic_file(path) as temporary:
        save_file({"embeddings": np.ascontiguousarray(found.values, dtype=np.float16)}, temporary, metadata=metadata)
    return path


def read_embeddings(folder: Path, rows: Sequence[Row]) -> dict[str, Embeddings]:
    """By scorer, the embeddings that a folder holds of all its present images; those of other images do not count.

    Raises:
        UserError: a file that cannot be read.
    """
    import numpy as np

    found = {}
    for path in sorted((folder / "embeddings").glob("*.safetensors")):
        version, held = read_some(folder, rows, path.stem)
        if all(row["file"] in held for row in rows):
            found[path.stem] = Embeddings(version, np.stack([held[row["file"]] for row in rows]))
    return found


def read_some(folder: Path, rows: Sequence[Row], scorer: str) -> tuple[str, dict[str, np.ndarray]]:
    """The version, and by file the embeddings (D,) float32 of norm 1, that a folder holds of one scorer, be they of all images or not.

    Without a file, or where it is of other images: "" and nothing. Raises as `read_embeddings`.
    """
    import json

    import numpy as np
    from safetensors import SafetensorError, safe_open

    path = _path(folder, scorer)
    if not path.is_file():
        return "", {}
    try:
        with safe_open(path, "numpy") as file:
            metadata, values = file.metadata() or {}, file.get_tensor("embeddings").astype(np.float32)
        version, images, files = metadata["version"], metadata["images"], json.loads(metadata["files"])
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        if len(files) != len(values) or not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError(f"{len(values)} embeddings of {len(files)} images, or one that is no direction")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run `dedpo score` again") from error
    if images != images_digest(folder, rows):
        return "", {}
    return version, dict(zip(files, values / lengths, strict=True))


def _path(folder: Path, scorer: str) -> Path:
    return folder / "embeddings" / f"{scorer}.safetensors"
