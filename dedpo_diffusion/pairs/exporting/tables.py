"""Pairs as tables of one row a pair, with the columns of pairs.formats.exported.

datasets      OUT/data/train-*.parquet and a card: `datasets.load_dataset(OUT)` gives two columns of images
imagefolder   OUT/metadata.jsonl and OUT/images/: `datasets.load_dataset("imagefolder", data_dir=OUT)` gives the same
csv           OUT/pairs.csv and OUT/images/, named by their paths
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.core.tables import SOURCE
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.exporting.rows import Item, as_text, write_image
from dedpo_diffusion.pairs.formats.annotated import ANSWERS, PAIR_ID, SIDES, written_answers
from dedpo_diffusion.settings import PairsSettings

GROUP_ROWS, GROUP_BYTES, FILE_BYTES = 100, 64 << 20, 500 << 20  # of a row group, and of a parquet file
DATA_FILES = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
"""  # in the head of a card: where `datasets` looks for the rows
CARD = f"""---
{DATA_FILES}---
Pairs of images for one prompt, and which of the two people prefer. `label_0` is the mean answer: 1 where image_0 is preferred, 0 where
image_1 is, 0.5 for a tie, empty where nobody answered. `answers` holds the single answers as JSON.
"""


def row(item: Item, images: dict[str, Any], sources: Iterable[str]) -> dict[str, Any]:
    """One pair's row.

    Args:
        item: the pair.
        images: the values of image_0 and image_1, under the names that the layout gives them.
        sources: the source columns, without source_.
    """
    answers = json.dumps(written_answers(item.answers)) if item.answers else None
    told = {"label_0": item.label_0, "votes": item.votes if item.answers else None, "rater": item.rater, ANSWERS: answers}
    more = {SOURCE + name: as_text(item.pair.source.get(name)) for name in sources}
    return {PAIR_ID: item.pair.pair_id, "prompt": item.pair.prompt, **images, **told, **more}


def _files(item: Item, folder: Path) -> list[str]:
    """Write both images; their paths."""
    return [write_image(folder, f"images/{item.number:06d}-{side[-1]}{item.suffix(side)}", item.image(side)) for side in SIDES]


# ---- a folder of images with metadata.jsonl, or a CSV


def write_imagefolder(items: Iterable[Item], settings: PairsSettings, folder: Path) -> list[str]:
    """Write the export into `folder`; returns what to do with it, in sentences."""
    sources = list(PairReader(settings.pairs).source_types)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as text:
        for item in items:
            images = dict(zip((f"{side}_file_name" for side in SIDES), _files(item, folder), strict=True))
            text.write(json.dumps(row(item, images, sources), ensure_ascii=False) + "\n")
    return [f'in Python: datasets.load_dataset("imagefolder", data_dir="{settings.folder}")']


def write_csv(items: Iterable[Item], settings: PairsSettings, folder: Path) -> list[str]:
    """Write the export into `folder`; returns what to do with it, in sentences."""
    sources = list(PairReader(settings.pairs).source_types)
    names = [PAIR_ID, "prompt", *SIDES, "label_0", "votes", "rater", ANSWERS, *(SOURCE + name for name in sources)]
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        for item in items:
            writer.writerow(row(item, dict(zip(SIDES, _files(item, folder), strict=True)), sources))
    return [f"the table is {settings.folder}/pairs.csv; paths in it are relative to {settings.folder}"]


# ---- parquet


def write_datasets(items: Iterable[Item], settings: PairsSettings, folder: Path) -> list[str]:
    """Write the export into `folder`; returns what to do with it, in sentences."""
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_parquet(items, settings, folder)
    return [f'in Python: datasets.load_dataset("{settings.folder}")']


def write_parquet(items: Iterable[Item], settings: PairsSettings, folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the pairs as FOLDER/data/train-*.parquet, without these source columns."""
    schema = _schema(PairReader(settings.pairs), without)
    sources = [name.removeprefix(SOURCE) for name in schema.names if name.startswith(SOURCE)]
    (folder / "data").mkdir()
    files: list[Path] = []
    writer, written = None, 0
    for group in _groups(items):
        if writer is None or written >= FILE_BYTES:
            if writer is not None:
                writer.close()
            files.append(folder / "data" / f"{len(files)}.parquet")
            writer, written = pq.ParquetWriter(files[-1], schema), 0
        writer.write_table(pa.Table.from_pylist([_parquet_row(item, sources, schema) for item in group], schema=schema))
        written += sum(map(_size, group))
    if writer is not None:
        writer.close()
    for k, path in enumerate(files):
        path.rename(path.with_name(f"train-{k:05d}-of-{len(files):05d}.parquet"))


def _size(item: Item) -> int:
    return len(item.pair.image_0) + len(item.pair.image_1)


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Pairs in groups that fit into memory."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) >= GROUP_ROWS or sum(map(_size, group)) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _parquet_row(item: Item, sources: list[str], schema: pa.Schema) -> dict[str, Any]:
    images = {side: {"bytes": item.image(side), "path": f"{item.number:06d}-{side[-1]}{item.suffix(side)}"} for side in SIDES}
    made = row(item, images, sources)
    texts = {SOURCE + name for name in sources if pa.types.is_string(schema.field(SOURCE + name).type)}
    return {name: str(value) if name in texts and value is not None else value for name, value in made.items()}


def _schema(reader: PairReader, without: Collection[str]) -> pa.Schema:
    """The columns as `datasets` knows them, so that it shows images; a source column that shards have in several types is text."""
    from datasets import Features, Image, Value

    told = {"label_0": Value("float64"), "votes": Value("int64"), "rater": Value("string"), ANSWERS: Value("string")}
    more = {SOURCE + name: Value(_kind(kinds)) for name, kinds in reader.source_types.items() if name not in without}
    return Features({PAIR_ID: Value("string"), "prompt": Value("string"), **dict.fromkeys(SIDES, Image()), **told, **more}).arrow_schema


def _kind(types: set[pa.DataType]) -> str:
    """What `datasets` calls a source column's type."""
    found = types - {pa.null()}
    kind = next(iter(found)) if len(found) == 1 else pa.string()
    for test, name in ((pa.types.is_boolean, "bool"), (pa.types.is_integer, "int64"), (pa.types.is_floating, "float64")):
        if test(kind):
            return name
    return "string"
