"""Encoded pairs on disk: VAE posteriors and text embeddings, made once and shared between runs.

One folder per (VAE and text encoder, pair dataset, size), named by their digest, with one safetensors file per shard of the pair
dataset. Files are memory-mapped and read by row, so memory does not grow with the number of pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import atomic_file, write_json

LAYOUT = 2  # of the files, and the rules images are decoded by; a cache of another layout gets another name


def cache_folder(root: Path, *, encoders: str, pairs: str, size: int) -> Path:
    """The cache's folder for the encoders' and the dataset's fingerprints and an image size."""
    key = json.dumps({"layout": LAYOUT, "encoders": encoders, "pairs": pairs, "size": size}, sort_keys=True)
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]


class PairCache:
    """Reads what `fill` wrote.

    Args:
        folder: as `cache_folder` names it, filled.

    Raises:
        ValueError: the folder is not complete.
    """

    def __init__(self, folder: Path) -> None:
        index_file = folder / "index.json"
        if not index_file.is_file():
            raise ValueError(f"{folder} is no complete cache; fill it first")
        index = json.loads(index_file.read_text(encoding="utf-8"))
        self.folder, self.counts = folder, index["counts"]
        self.starts = [sum(self.counts[:k]) for k in range(len(self.counts))]
        self.text = load_file(folder / "text.safetensors")["text"]  # (U + 1, L, D), row 0 is the empty prompt
        self.text_row = torch.tensor(index["text_row"])
        self._open: dict[int, object] = {}

    def posterior(self, pair: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (2, C, h, w) float32, of the pair at this row of the dataset."""
        shard = max(k for k, start in enumerate(self.starts) if start <= pair)
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / f"shard-{shard:05d}.safetensors", "pt").get_slice("posterior")
        mean, std = self._open[shard][pair - self.starts[shard]].chunk(2, dim=1)  # type: ignore[index]
        return mean, std

    def embedding(self, pair: int, *, empty: bool = False) -> Tensor:
        """Text embedding (L, D) of the pair's prompt, or of the empty one."""
        return self.text[0 if empty else self.text_row[pair]]


def fill(
    folder: Path,
    *,
    prompts: Sequence[str],
    shards: Sequence[int],
    read_shard: Callable[[int], Iterable[Tensor]],
    encode_images: Callable[[Tensor], tuple[Tensor, Tensor]],
    encode_prompts: Callable[[Sequence[str]], Tensor],
    advance: Callable[[int], object] = lambda count: None,
    batch: int = 16,
) -> None:
    """Encode every pair; shards that are there already are kept, so a killed run goes on.

    Args:
        prompts: the prompt of every pair, in the dataset's order.
        shards: pairs in each shard of the dataset.
        read_shard: shard number -> its pairs' pixels, (2, 3, H, W) each.
        encode_images: (N, 3, H, W) -> posterior mean and standard deviation, (N, C, h, w) each.
        encode_prompts: N prompts -> (N, L, D).
        advance: told how many pairs were just done.
        batch: pairs encoded at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").is_file():
        return
    for shard, count in enumerate(shards):
        path = folder / f"shard-{shard:05d}.safetensors"
        if not path.is_file():
            posteriors = _encode_shard(read_shard(shard), encode_images, advance, batch)
            with atomic_file(path) as temporary:
                save_file({"posterior": posteriors}, temporary)
        else:
            advance(count)
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(["", *prompts]))}
    unique = list(rows)
    text = torch.cat([encode_prompts(unique[start : start + 64]).cpu() for start in range(0, len(unique), 64)])
    with atomic_file(folder / "text.safetensors") as temporary:
        save_file({"text": text.contiguous()}, temporary)
    write_json(folder / "index.json", {"counts": list(shards), "text_row": [rows[prompt] for prompt in prompts]})


def _encode_shard(
    pixels: Iterable[Tensor], encode: Callable[[Tensor], tuple[Tensor, Tensor]], advance: Callable[[int], object], batch: int
) -> Tensor:
    """Posteriors of one shard, (n, 2, 2 C, h, w): mean and standard deviation one after the other."""
    done: list[Tensor] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        stacked = torch.stack(waiting)
        mean, std = encode(stacked.flatten(0, 1))
        done.append(torch.cat([mean, std], dim=1).cpu().unflatten(0, (len(waiting), 2)))
        advance(len(waiting))
        waiting.clear()

    for pair in pixels:
        waiting.append(pair)
        if len(waiting) == batch:
            flush()
    if waiting:
        flush()
    return torch.cat(done).contiguous()
