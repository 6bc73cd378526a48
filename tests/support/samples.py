"""What the tests of scores and comparisons share: sample folders of random pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.shapes import world

PROMPTS = [attributes.prompt for attributes in world.VOCABULARY[::24]]  # six


def write_samples(folder: Path, seed: int = 0, *, clutter: float = 0.5, each: int = 2) -> Path:
    """A sample folder as `dedpo sample` leaves it: renders of six prompts, with or without clutter."""
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        for k in range(each):
            row = {"file": f"{index}-{k}.png", "prompt": prompt, "prompt_index": index, "seed": 100 + index * each + k}
            rng = np.random.default_rng((seed, row["seed"]))
            world.render(world.sample_scene(rng, world.parse_prompt(prompt), clutter=clutter)).save(folder / row["file"])
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    return folder


def run(folder, *names: str, batch: int = 5) -> int:
    """`dedpo score` on one folder, or on a list of them."""
    folders = folder if isinstance(folder, list) else [folder]
    return score.main([*map(str, folders), "--batch", str(batch), "--device", "cpu", "--with", *names])


def rows_of(folder, scorer):
    return [row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["scorer"] == scorer]


def rewrite(folder, change):
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), folder / "index.parquet")
