"""Reading pairs keeps little of each in memory, however many there are."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning, Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.training.cache import PairCache, fill
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.training.sources import CachedSource
from support.pictures import picture


def make_cache(folder: Path, count: int, *, shard_pairs: int = 1000) -> Path:
    """Tiny pairs with targets "all" and a filled cache beside them."""
    with PairWriter(folder, shard_pairs=shard_pairs) as writer:
        for k in range(count):
            writer.add(Pair(f"pair-{k:09d}", f"a prompt of several words, number {k // 4}", picture(2 * k), picture(2 * k + 1)))
    reader = PairReader(folder)
    write_targets(folder, "all", Targets(reader.ids(), np.random.default_rng(0).random(count), np.ones(count)), {})
    pixels, sizes = torch.zeros(2, 3, 8, 8), torch.full((2, 6), 8.0)
    fill(
        folder / "cache", identity={}, prompts=reader.prompts(), shards=reader.counts,
        read_shard=lambda shard: ((pixels, sizes) for _ in range(reader.counts[shard])),
        encode_images=lambda images: (torch.randn(len(images), 4, 8, 8), torch.ones(len(images), 4, 8, 8)),
        encode_prompts=lambda prompts: Conditioning(torch.randn(len(prompts), 4, 8)),
    )  # fmt: skip
    return folder


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def read(folder: Path) -> tuple[int, int, int]:
    """Open a dataset and read its pairs; the peak of Python's memory in bytes, and tensors and files that are held at the end."""
    before, files = tensors(), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    reader = PairReader(folder)
    reader.fingerprint()
    source = CachedSource(PairCache(folder / "cache"), 4)
    loader = PairLoader(reader, source, targets="all", seed=0, sampling="importance", together=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for row in loader.rows[::5].tolist():
        source.fetch([row], [row], torch.zeros(1, dtype=torch.bool))
        reader.pair(row)
    return peak, tensors() - before, len(os.listdir("/proc/self/fd")) - files


@pytest.mark.slow
def test_memory_tensors_and_open_files_hardly_grow_with_the_pairs(tmp_path):
    few, many = (make_cache(tmp_path / str(count), count, shard_pairs=20) for count in (40, 540))
    read(few)  # whatever is imported or made once
    (least, held, _), (most, more, files) = read(few), read(many)
    assert (most - least) / 500 < 700, (least, most)  # bytes; encoded, a pair has 4600
    assert more == held
    assert files == 0


def test_ids_are_compared_shard_by_shard(tmp_path):
    with PairWriter(tmp_path, shard_pairs=3) as writer:
        for k in range(7):
            writer.add(Pair(f"p{k}", "a prompt", b"0", b"1"))
    reader, ids = PairReader(tmp_path), [f"p{k}" for k in range(7)]
    assert reader.has_ids(ids)
    for other in (ids[:-1], [*ids, "p7"], ids[::-1], [*ids[:3], "p9", *ids[4:]], []):
        assert not reader.has_ids(other)


def test_a_pair_that_comes_twice_is_still_named(tmp_path):
    make_cache(tmp_path, 8)
    shard = tmp_path / "pairs" / "pairs-00000.parquet"
    (tmp_path / "pairs" / "pairs-00001.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="'pair-000000000' is in"):
        PairLoader(
            PairReader(tmp_path), CachedSource(PairCache(tmp_path / "cache"), 4), targets="all", seed=0, sampling="uniform", together=4
        )
