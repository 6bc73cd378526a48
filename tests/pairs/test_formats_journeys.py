"""`dedpo ingest` on each public set's layout, into the files that every other stage reads."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.labels.files import read_labels, read_votes
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines.ingest import main
from support.format_rows import (
    chosen_row,
    counts_row,
    pair_row,
    ranked_row,
    ranking_row,
    result_row,
    shares_row,
    train_row,
    two_images,
    write_database,
)
from support.pictures import picture


def put(folder, name, seed):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, format={"jpg": "JPEG", "webp": "WEBP"}[path.suffix[1:]]))
    return path


def ingest(source, out, *options):
    return main([options[0] if options else "auto", str(source), "--out", str(out), *options[1:]])


def counts_of(out):
    return json.loads((out / "ingest.json").read_text())["counts"]


def label_of(out):
    held = read_labels(out, "human")
    return dict(zip(held.pair_id, held.label_0.tolist(), strict=True))


def winners(out, folder, names):
    """For each pair, the names of the preferred and the other image, by their bytes; ties are left out."""
    name_of = {(folder / name).read_bytes(): name for name in names}
    found = []
    for pair in PairReader(out).iter_pairs():
        label = label_of(out)[pair.pair_id]
        sides = (name_of[pair.image_0], name_of[pair.image_1])
        if label != 0.5:
            found.append(sides if label > 0.5 else sides[::-1])
    return found


def test_hpdv2_train_and_test(tmp_path):
    names = [f"train/{k:05d}.jpg" for k in range(4)]
    for k, name in enumerate(names):
        put(tmp_path, name, k)
    rows = [train_row(file_path=["00000.jpg", "00001.jpg"], human_preference=[0, 1])]
    rows += [train_row(file_path=["00002.jpg", "00003.jpg"], human_preference=[1, 0])]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert ingest(tmp_path / "train.json", tmp_path / "out") == 0
    assert winners(tmp_path / "out", tmp_path, names) == [("train/00001.jpg", "train/00000.jpg"), ("train/00002.jpg", "train/00003.jpg")]
    ranks, people = (2, 1, 3), [(2, 1, 3), (2, 1, 3), (1, 2, 3)]
    tests = [f"test/{100 + k:05d}.jpg" for k in range(3)]
    for k, name in enumerate(tests):
        put(tmp_path, name, 10 + k)
    (tmp_path / "test.json").write_text(json.dumps([ranked_row(ranks, people)]))
    assert ingest(tmp_path, tmp_path / "two", "hpdv2", "--split", "test") == 0
    held, votes = read_labels(tmp_path / "two", "human"), read_votes(tmp_path / "two", "human")
    assert held.pair_id == ["hpdv2-00100-00101", "hpdv2-00100-00102", "hpdv2-00101-00102"]
    np.testing.assert_allclose(held.label_0, [1 / 3, 1, 1])
    assert votes.rater == ["user0", "user1", "user2"] * 3 and votes.label_0.tolist() == [0, 0, 1] + [1] * 6


def test_hpdv3_shuffles_the_winner_and_keeps_the_counts(tmp_path):
    rows = []
    for k in range(24):
        put(tmp_path, f"images/w{k}.jpg", 2 * k)
        put(tmp_path, f"images/l{k}.jpg", 2 * k + 1)
        choice = [[12, 7], [7, 12], None][k % 3]
        rows.append(pair_row(path1=f"images/w{k}.jpg", path2=f"images/l{k}.jpg", choice_dist=choice, prompt=f"tower {k}"))
    (tmp_path / "all.json").write_text(json.dumps(rows))
    assert ingest(tmp_path / "all.json", tmp_path / "out") == 0
    names = [f"images/{side}{k}.jpg" for side in "wl" for k in range(24)]
    assert winners(tmp_path / "out", tmp_path, names) == [(f"images/w{k}.jpg", f"images/l{k}.jpg") for k in range(24)]
    swapped = [pair.source["swapped"] for pair in PairReader(tmp_path / "out").iter_pairs()]
    assert 4 < sum(swapped) < 20  # 24 fair coins
    for k, pair in enumerate(PairReader(tmp_path / "out").iter_pairs()):
        label = label_of(tmp_path / "out")[pair.pair_id]
        assert (1 - label if swapped[k] else label) == pytest.approx(1.0 if k % 3 == 2 else 12 / 19)
        assert pair.source.get("choice_reversed") is (None if k % 3 == 2 else k % 3 == 1)
    assert read_votes(tmp_path / "out", "human").votes.sum() == 16 * 19 + 8


def test_imagereward_from_archives_goes_on_and_counts_what_is_missing(tmp_path, capsys):
    folder = write_database(tmp_path / "db")
    assert ingest(folder, tmp_path / "out", "auto", "--shard_pairs", "4") == 0
    assert "is read as imagereward: columns prompt_id, prompt, image_path, rank" in capsys.readouterr().out
    assert len(PairReader(tmp_path / "out")) == 19 and counts_of(tmp_path / "out")["ties"] == 3
    ids = PairReader(tmp_path / "out").ids()
    assert ids[0] == "imagereward-000-train-0-1" and len(set(ids)) == 19
    (folder / "images/train/train_2.zip").unlink()
    assert ingest(folder, tmp_path / "less", "imagereward") == 2
    assert "train_2/p2i" in capsys.readouterr().err
    assert ingest(folder, tmp_path / "less", "imagereward", "--unreadable", "skip") == 0
    assert counts_of(tmp_path / "less")["unreadable_dropped"] == 10 and len(PairReader(tmp_path / "less")) == 9


def test_an_interrupted_import_of_archives_goes_on_to_the_same_pairs(tmp_path, capsys):
    folder, options = write_database(tmp_path / "db"), ("imagereward", "--shard_pairs", "2", "--workers", "1")
    assert ingest(folder, tmp_path / "whole", *options) == 0
    archive = folder / "images/train/train_2.zip"
    good = archive.read_bytes()
    archive.write_bytes(bytes(len(good)))  # broken, and of the same size
    assert ingest(folder, tmp_path / "out", *options) == 2
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    archive.write_bytes(good)
    capsys.readouterr()
    assert ingest(folder, tmp_path / "out", *options) == 0
    assert "resuming after" in capsys.readouterr().out
    whole, gone_on = ([*PairReader(tmp_path / name).iter_pairs()] for name in ("whole", "out"))
    assert whole == gone_on and label_of(tmp_path / "whole") == label_of(tmp_path / "out")


def test_imagerewards_test_list(tmp_path):
    row = ranking_row()
    for k, name in enumerate(row["generations"]):
        put(tmp_path / "test_images", name, k)
    (tmp_path / "test.json").write_text(json.dumps([row]))
    assert ingest(tmp_path / "test.json", tmp_path / "out") == 0
    assert list(label_of(tmp_path / "out").values()) == [1, 1, 1, 1, 1, 0]


def test_open_image_preferences_results_and_binarised(tmp_path):
    rows = [result_row(("both_good", "image_1", "image_1")), result_row(("image_2", "toxic_content", "image_2"), id="7-quality")]
    rows[1]["images"] = {name: value.replace("3368", "7") for name, value in rows[0]["images"].items()}
    table = pa.Table.from_pylist(rows)
    (tmp_path / "results").mkdir()
    pq.write_table(table, tmp_path / "results" / "train-00000-of-00001.parquet")
    for k, name in enumerate(("3368", "7")):
        put(tmp_path / "hub", f"image_quality_dev/{name}.jpg", 2 * k)
        put(tmp_path / "hub", f"image_quality_sd/{name}.jpg", 2 * k + 1)
    assert ingest(tmp_path / "results", tmp_path / "out", "auto", "--images", str(tmp_path / "hub")) == 0
    assert label_of(tmp_path / "out") == {
        "open_image_preferences-3368-quality": pytest.approx(2.5 / 3),
        "open_image_preferences-7-quality": 0.0,
    }
    assert read_votes(tmp_path / "out", "human").rater == ["user0", "user1", "user2", "user0", "user2"]
    (tmp_path / "binarised").mkdir()
    pq.write_table(pa.Table.from_pylist([chosen_row(k) for k in range(16)]), tmp_path / "binarised" / "train-00000-of-00001.parquet")
    assert ingest(tmp_path / "binarised", tmp_path / "two") == 0
    held = label_of(tmp_path / "two")
    assert set(held.values()) == {0.0, 1.0}
    for k, pair in enumerate(PairReader(tmp_path / "two").iter_pairs()):
        won, lost = (pair.image_0, pair.image_1) if held[pair.pair_id] == 1 else (pair.image_1, pair.image_0)
        assert (won, lost) == (picture(2 * k), picture(2 * k + 1)) and pair.source["category"] == "Anime"


@pytest.mark.parametrize(("make", "label", "votes"), [(counts_row, 17 / 26, 26), (shares_row, 0.75, 26)])
def test_rapidatas_layouts(tmp_path, make, label, votes):
    (tmp_path / "data").mkdir()
    rows = [make(), make() | two_images(5) | {"prompt": "another"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    assert ingest(tmp_path / "data", tmp_path / "out") == 0
    held = read_labels(tmp_path / "out", "human")
    np.testing.assert_allclose(held.label_0, [label, label])
    assert held.extra["votes"] == [votes, votes]


def test_hpdv2_as_downloaded_asks_to_unpack(tmp_path, capsys):
    put(tmp_path / "made", "test/00100.jpg", 1)
    (tmp_path / "HPDv2").mkdir()
    with tarfile.open(tmp_path / "HPDv2" / "test.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "test", "test")
    (tmp_path / "HPDv2" / "test.json").write_text(json.dumps([ranked_row()]))
    assert ingest(tmp_path / "HPDv2", tmp_path / "out", "hpdv2") == 2
    assert "still packed in" in capsys.readouterr().err and not (tmp_path / "out").exists()
