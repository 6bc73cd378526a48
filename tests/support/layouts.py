"""The same comparisons, written in every layout that people keep pairs in."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.settings import IngestSettings
from support.pictures import picture

PICTURES = [picture(k) for k in range(6)]


def settings(source, format="auto", **changes) -> IngestSettings:
    return IngestSettings(format, str(source), Path("out"), **changes)


def records(count: int) -> list[dict]:
    """Rows of a table: answers of every kind among them, and one column more than is needed."""
    return [
        {
            "pair_id": f"n{k}",
            "prompt": f'a "large" circle, number {k}\nälter' if k % 3 else f"plain {k}",
            "image_0": PICTURES[k % 3],
            "image_1": PICTURES[3 + k % 3],
            "label_0": (1.0, 0.0, 0.5, None, 0.25)[k % 5],
            "rater": f"person {k % 2}",
            "seed": k,
        }
        for k in range(count)
    ]


def with_files(rows: list[dict], folder: Path) -> list[dict]:
    """The same rows with their images written below `folder`, named by relative paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(PICTURES):
        (folder / "images" / f"{k}.png").write_bytes(data)
    named = {data: f"images/{k}.png" for k, data in enumerate(PICTURES)}
    return [{name: named[value] if isinstance(value, bytes) else value for name, value in row.items()} for row in rows]


def save_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(with_files(rows, path.parent)), encoding="utf-8")
    return path


def save_wrapped_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps({"version": 2, "pairs": with_files(rows, path.parent)}), encoding="utf-8")
    return path


def save_jsonl(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in with_files(rows, path.parent)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as text:  # as spreadsheets write it
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(with_files(rows, path.parent))
    return path


def save_parquet(path: Path, rows: list[dict], row_group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    pq.write_table(table, path, row_group_size=row_group)
    return path


def save_parquet_folder(folder: Path, rows: list[dict]) -> Path:
    third = len(rows) // 3
    for k, part in enumerate((rows[:third], rows[third : 2 * third], rows[2 * third :])):
        save_parquet(folder / "data" / f"train-{k:05d}-of-00003.parquet", part, row_group=4 + k)
    return folder


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def save_webdataset(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        with tarfile.open(folder / f"pairs-{k:04d}.tar", "w") as tar:
            for i, row in enumerate(part):
                for name, value in row.items():
                    ending, data = (".png", value) if isinstance(value, bytes) else (".txt", str("" if value is None else value).encode())
                    add_to_tar(tar, f"{i:05d}.{name}{ending}", data)
    return folder


def dataset_of(rows: list[dict]):
    """A `datasets` Dataset with real Image columns."""
    from datasets import Dataset, Image

    made = Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    for name in ("image_0", "image_1"):
        made = made.cast_column(name, Image())
    return made


def save_dataset(folder: Path, rows: list[dict]) -> Path:
    dataset_of(rows).save_to_disk(str(folder))
    return folder


def save_dataset_dict(folder: Path, rows: list[dict]) -> Path:
    from datasets import DatasetDict

    DatasetDict({"train": dataset_of(rows)}).save_to_disk(str(folder))
    return folder


def save_imagefolder(folder: Path, rows: list[dict], ending: str = "jsonl") -> Path:
    named = [{f"{name}_file_name" if name.startswith("image") else name: value for name, value in row.items()} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    {"jsonl": save_jsonl, "csv": save_csv}[ending](folder / f"metadata.{ending}", named)
    return folder


def save_imagefolder_splits(folder: Path, rows: list[dict]) -> Path:
    """Two metadata tables, each beside its own images."""
    half = len(rows) // 2
    save_imagefolder(folder / "part-1", rows[:half], "csv")
    save_imagefolder(folder / "part-2", rows[half:], "csv")
    return folder


LAYOUTS = {  # layout -> (kind, its writer, the name that it is written under)
    "parquet": ("parquet", save_parquet, "pairs.parquet"),
    "parquet folder": ("parquet", save_parquet_folder, "download"),
    "json": ("json", save_json, "pairs.json"),
    "wrapped json": ("json", save_wrapped_json, "wrapped.json"),
    "jsonl": ("jsonl", save_jsonl, "pairs.jsonl"),
    "csv": ("csv", save_csv, "pairs.csv"),
    "tsv": ("csv", save_csv, "pairs.tsv"),
    "webdataset": ("webdataset", save_webdataset, "shards"),
    "datasets": ("datasets", save_dataset, "saved"),
    "datasets dict": ("datasets", save_dataset_dict, "saved-splits"),
    "imagefolder": ("imagefolder", save_imagefolder, "folder"),
    "imagefolder parts": ("imagefolder", save_imagefolder_splits, "parts"),
}


def write(layout: str, folder: Path, rows: list[dict]) -> Path:
    """The rows in this layout; returns what to give as the source."""
    _, save, name = LAYOUTS[layout]
    folder.mkdir(parents=True, exist_ok=True)
    return save(folder / name, rows)
