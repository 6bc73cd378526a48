"""Image embeddings that `dedpo label --keep_embeddings` leaves, and a few principal components of their differences.

    PAIRS/embeddings/NAME/about.json             which judge, which pairs
    PAIRS/embeddings/NAME/shard-000000.safetensors ...   float16, a row for each image that comes first in a shard of pairs
    PAIRS/embeddings/NAME/uses.npy               (N, 2): the row, over all shards, of each pair's images; written last

Never more than a shard is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file, write_json

COMPONENTS = 8  # of one judge's embeddings
SAMPLED = 4096  # pairs that the components are those of


def embedding_folder(pairs: Path, name: str) -> Path:
    """Where a judge's embeddings are."""
    return Path(pairs) / "embeddings" / name


def shard_path(pairs: Path, name: str, shard: int) -> Path:
    """The file of one shard of pairs."""
    return embedding_folder(pairs, name) / f"shard-{shard:06d}.safetensors"


def prepare(pairs: Path, name: str, stamp: dict[str, str]) -> None:
    """Begin or go on with a judge's embeddings; those of another judge, dataset or shard size are removed."""
    folder = embedding_folder(pairs, name)
    if folder.is_dir() and _about(folder) != stamp:
        shutil.rmtree(folder)
    if not folder.is_dir():
        write_json(folder / "about.json", stamp)


def write_shard(path: Path, vectors: np.ndarray) -> None:
    """Keep the embeddings (U, D) of one shard, atomically."""
    from safetensors.numpy import save_file

    with atomic_file(path) as temporary:
        save_file({"embedding": np.ascontiguousarray(vectors, dtype=np.float16)}, str(temporary))


def write_uses(pairs: Path, name: str, uses: np.ndarray) -> None:
    """Complete a judge's embeddings by (N, 2) rows of all pairs' images."""
    with atomic_file(embedding_folder(pairs, name) / "uses.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, uses)


def _about(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def has_embeddings(pairs: Path, name: str, stamp: dict[str, str]) -> bool:
    """Whether all embeddings of this stamp's judge version and dataset are there."""
    folder = embedding_folder(pairs, name)
    held = _about(folder) or {}
    return (folder / "uses.npy").is_file() and all(held.get(key) == stamp[key] for key in ("judge version", "dataset"))


def _shards(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """First row and embeddings (U, D) float32 of every shard."""
    from safetensors.numpy import load_file

    start = 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            vectors = load_file(path)["embedding"].astype(np.float32)
        except Exception as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove its folder, and run `dedpo label --keep_embeddings true` again"
            ) from error
        if len(vectors) == 0:  # all of its images came earlier
            continue
        yield start, vectors
        start += len(vectors)


def components(pairs: Path, name: str, *, count: int = COMPONENTS, seed: int = 0) -> np.ndarray:
    """(N, C) float32: the differences of both images' embeddings along their first principal components, without centring.

    Components are those of at most 4096 pairs, drawn at random; labels have no part in them.

    Args:
        pairs: the pair dataset; its embeddings of judge `name` are complete.
        count: at most so many components.
        seed: of the draw.

    Raises:
        UserError: a file that cannot be read.
    """
    both = projections(pairs, name, component_axes(pairs, name, count=count, seed=seed))
    return (both[:, 0] - both[:, 1]).astype(np.float32)


def projections(pairs: Path, name: str, axes: np.ndarray) -> np.ndarray:
    """(N, 2, C): both images' embeddings along axes (D, C), which may be another dataset's. Raises: as `components`."""
    folder = embedding_folder(pairs, name)
    seen = np.concatenate([vectors @ axes for _, vectors in _shards(folder)])
    return seen[_uses(folder)]


def component_axes(pairs: Path, name: str, *, count: int = COMPONENTS, seed: int = 0) -> np.ndarray:
    """(D, C) float32: the axes of `components`, along which other images' embeddings (N, D) can be measured too. Args, Raises: as there."""
    folder = embedding_folder(pairs, name)
    uses = _uses(folder)
    rows = np.arange(len(uses)) if len(uses) <= SAMPLED else np.sort(np.random.default_rng(seed).choice(len(uses), SAMPLED, replace=False))
    return _axes(_gather(folder, uses[rows]), count)


def scatter(pairs: Path, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the embeddings of all images of the pairs at these rows: their mean (D,), and the sum of (e - mean)(e - mean)^T, (D, D), float64.

    Raises:
        UserError: a file that cannot be read.
    """
    folder = embedding_folder(pairs, name)
    used = np.unique(_uses(folder)[rows])
    count, total, square = 0, np.zeros(0), np.zeros((0, 0))
    for start, vectors in _shards(folder):
        some = vectors[used[(used >= start) & (used < start + len(vectors))] - start].astype(np.float64)
        if not len(total):
            total, square = np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1],) * 2)
        count, total, square = count + len(some), total + some.sum(axis=0), square + some.T @ some
    mean = total / max(count, 1)
    return mean, square - count * np.outer(mean, mean)


def _uses(folder: Path) -> np.ndarray:
    """(N, 2): the row, over all shards, of each pair's images."""
    return np.load(folder / "uses.npy", allow_pickle=False)


def _gather(folder: Path, uses: np.ndarray) -> np.ndarray:
    """(n, D) differences of the embeddings at rows (n, 2)."""
    found: np.ndarray | None = None
    for start, vectors in _shards(folder):
        found = np.zeros((len(uses), vectors.shape[1]), np.float32) if found is None else found
        for side, sign in ((0, 1), (1, -1)):
            here = np.flatnonzero((uses[:, side] >= start) & (uses[:, side] < start + len(vectors)))
            found[here] += sign * vectors[uses[here, side] - start]
    assert found is not None
    return found


def _axes(differences: np.ndarray, count: int) -> np.ndarray:
    """(D, C) principal axes of (n, D) differences, their largest entry positive."""
    values, vectors = np.linalg.eigh(differences.T.astype(np.float64) @ differences)
    kept = values[::-1][:count] > 1e-9 * max(values[-1], 1e-30)
    axes = vectors[:, ::-1][:, :count][:, kept]
    return (axes * np.sign(axes[np.argmax(np.abs(axes), axis=0), np.arange(axes.shape[1])])).astype(np.float32)
