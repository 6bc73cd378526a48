"""Every format, in its true layout, says the same of the same pictures, and leads into a training step on Shapes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import ingest, merge, train, validate
from dedpo_diffusion.shapes.world import VOCABULARY, render, sample_scene
from support.format_rows import chosen_row, counts_row, pair_row, ranked_row, result_row, train_row


@dataclass(frozen=True)
class Case:
    """A prompt, two pictures of it as PNG files, and which of them people prefer."""

    prompt: str
    images: tuple[bytes, bytes]
    winner: int

    @property
    def loser(self) -> int:
        return 1 - self.winner


def scene(seed: int, attributes) -> bytes:
    buffer = io.BytesIO()
    render(sample_scene(np.random.default_rng(seed), attributes)).save(buffer, "PNG")
    return buffer.getvalue()


CASES = [
    Case(VOCABULARY[31 * k].prompt, (scene(2 * k, VOCABULARY[31 * k]), scene(2 * k + 1, VOCABULARY[31 * k])), winner)
    for k, winner in enumerate((0, 1, 1, 0))
]


def put(folder, name, data):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name


def put_all(folder, pattern):
    """Write every picture under a name of (case, image); the names, by case."""
    return [[put(folder, pattern.format(k, i), data) for i, data in enumerate(case.images)] for k, case in enumerate(CASES)]


def save(folder, rows, name="train-00000-of-00001.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def struct(data):
    return {"bytes": data, "path": None}


# ---- each format's layout


def pickapic_rows():
    return [
        {
            "caption": case.prompt,
            "jpg_0": case.images[0],
            "jpg_1": case.images[1],
            "label_0": float(case.winner == 0),
            "label_1": float(case.winner == 1),
            "has_label": True,
            "are_different": True,
            "ranking_id": k,
            "user_id": 3,
        }
        for k, case in enumerate(CASES)
    ]


def pickapic(folder):
    return save(folder / "data", pickapic_rows())


def pickapic_webdataset(folder):
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for k, row in enumerate(pickapic_rows()):
            files = {"jpg_0.jpg": row["jpg_0"], "jpg_1.jpg": row["jpg_1"], "original_prompt.txt": row["caption"].encode()}
            files |= {f"label_{i}.txt": str(row[f"label_{i}"]).encode() for i in (0, 1)}
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{k:05d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "00000.tar"


def hpdv2_train(folder):
    names = put_all(folder, "train/{:04d}{}.jpg")
    rows = [
        train_row(prompt=case.prompt, file_path=[name.removeprefix("train/") for name in pair], human_preference=[case.loser, case.winner])
        for case, pair in zip(CASES, names, strict=True)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def hpdv2_test(folder):
    names = put_all(folder, "test/{:04d}{}.jpg")
    rows = [
        ranked_row((1 + case.winner, 1 + case.loser), prompt=case.prompt, image_path=[name.removeprefix("test/") for name in pair])
        for case, pair in zip(CASES, names, strict=True)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def hpdv3(folder):
    names = put_all(folder, "images/{}-{}.jpg")
    rows = [
        pair_row(prompt=case.prompt, path1=pair[case.winner], path2=pair[case.loser], choice_dist=[9, 0])
        for case, pair in zip(CASES, names, strict=True)
    ]
    (folder / "all.json").write_text(json.dumps(rows))
    return folder / "all.json"


def imagereward(folder):
    (folder / "images" / "train").mkdir(parents=True)
    rows = []
    with zipfile.ZipFile(folder / "images" / "train" / "train_1.zip", "w") as archive:
        for k, case in enumerate(CASES):
            for i, data in enumerate(case.images):
                archive.writestr(f"{k}-{i}.webp", data)
                row = {"image_path": f"images/train/train_1/{k}-{i}.webp", "prompt_id": str(k), "prompt": case.prompt}
                rows.append(row | {"classification": "x", "image_amount_in_total": 2, "rank": 1 + (i != case.winner), "overall_rating": 4})
    return save(folder, rows, "metadata-train.parquet")


def open_image_preferences(folder):
    names = put_all(folder / "images", "image_quality_{1}/{0}.jpg")
    hub = "https://huggingface.co/datasets/data-is-better-together/open-image-preferences-v1/resolve/main/"
    rows = []
    for k, (case, pair) in enumerate(zip(CASES, names, strict=True)):
        images = {"image_1": hub + pair[0], "image_2": hub + pair[1], "prompt": case.prompt}
        rows.append(result_row([f"image_{1 + case.winner}"] * 3, images=images, id=f"{k}-quality"))
    return save(folder / "data", rows), "--images", str(folder / "images")


def open_image_preferences_binarised(folder):
    rows = [
        chosen_row(k, prompt=case.prompt, chosen=struct(case.images[case.winner]), rejected=struct(case.images[case.loser]))
        for k, case in enumerate(CASES)
    ]
    return save(folder / "data", rows)


def rapidata(folder):
    rows = [
        counts_row(
            *((8, 0) if case.winner == 0 else (0, 8)), prompt=case.prompt, image1=struct(case.images[0]), image2=struct(case.images[1])
        )
        for case in CASES
    ]
    return save(folder / "data", rows)


def own_rows(folder):
    names = put_all(folder, "{}-{}.png")
    return [
        {"prompt": case.prompt, "image_0": pair[0], "image_1": pair[1], "label_0": 1 - case.winner}
        for case, pair in zip(CASES, names, strict=True)
    ]


def imagefolder(folder):
    rows = [{key + "_file_name" if key.startswith("image") else key: value for key, value in row.items()} for row in own_rows(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def jsonl_with_label_0(folder):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows(folder)))
    return folder / "pairs.jsonl"


def csv_of(folder, rows):
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "pairs.csv"


def csv_with_chosen_and_rejected(folder):
    rows = own_rows(folder)
    sides = [(row["image_0"], row["image_1"])[:: 1 if row["label_0"] else -1] for row in rows]
    return csv_of(folder, [{"prompt": row["prompt"], "chosen": a, "rejected": b} for row, (a, b) in zip(rows, sides, strict=True)])


def csv_with_a_winner(folder):
    rows = own_rows(folder)
    labels = [row.pop("label_0") for row in rows]
    return csv_of(folder, [row | {"winner": f"image_{1 - label}"} for row, label in zip(rows, labels, strict=True)])


def csv_with_votes(folder):
    rows = own_rows(folder)
    return csv_of(folder, [{"prompt": r["prompt"], "image_0": r["image_0"], "image_1": r["image_1"],
                            "votes_0": 3 * r["label_0"], "votes_1": 3 - 3 * r["label_0"]} for r in rows])  # fmt: skip


def saved_to_disk(folder):
    import datasets

    data = datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "image_0": str(folder / row["image_0"]), "image_1": str(folder / row["image_1"]),
          "label_0": float(row["label_0"])} for row in own_rows(folder)]
    )  # fmt: skip
    data = data.cast_column("image_0", datasets.Image()).cast_column("image_1", datasets.Image())
    data.save_to_disk(folder / "saved")
    return folder / "saved"


LAYOUTS = {
    pickapic: "pickapic",
    pickapic_webdataset: "pickapic",
    hpdv2_train: "hpdv2",
    hpdv2_test: "hpdv2",
    hpdv3: "hpdv3",
    imagereward: "imagereward",
    open_image_preferences: "open_image_preferences",
    open_image_preferences_binarised: "open_image_preferences",
    rapidata: "rapidata",
    imagefolder: "imagefolder",
    jsonl_with_label_0: "table",
    csv_with_chosen_and_rejected: "table",
    csv_with_a_winner: "table",
    csv_with_votes: "table",
    saved_to_disk: "datasets",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_from_its_true_layout_into_a_training_step(tmp_path, layout, capsys):
    (tmp_path / "source").mkdir()
    source, *options = made if isinstance(made := layout(tmp_path / "source"), tuple) else (made,)
    for name in ("auto", LAYOUTS[layout]):
        assert ingest.main([name, str(source), "--out", str(tmp_path / name), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{source} is " in printed  # auto says what it took it for
    pairs = tmp_path / LAYOUTS[layout]
    labels = read_labels(pairs, "human")
    label_0 = dict(zip(labels.pair_id, labels.label_0, strict=True))
    found = {}
    for pair in PairReader(pairs).iter_pairs():
        sides = (pair.image_0, pair.image_1)[:: 1 if label_0[pair.pair_id] == 1 else -1]
        found[pair.prompt] = sides
    assert found == {case.prompt: (case.images[case.winner], case.images[case.loser]) for case in CASES}
    assert set(labels.label_0) <= {0.0, 1.0}
    assert [*PairReader(tmp_path / "auto").prompts()] == [*PairReader(pairs).prompts()]
    assert validate.main([str(pairs), "--workers", "1"]) == 0
    assert merge.main([str(pairs), "--method", "human_only"]) == 0
    arguments = ["--model", "shapes", "--data.pairs", pairs, "--data.targets", "human_only", "--out", tmp_path / "run", "--device", "cpu"]
    arguments += ["--optim.steps", "1", "--optim.batch", "4", "--optim.warmup", "0", "--log_every", "1"]
    assert train.main([str(argument) for argument in arguments]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-6) and line["gradient_norm"] > 0
