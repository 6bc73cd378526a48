"""`dedpo ingest` on your own pairs, from every layout to a pair dataset, and on from where it stopped."""

from __future__ import annotations

import json

import pytest

from dedpo_diffusion.labels.files import read_labels, read_votes
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines.ingest import main
from support.layouts import LAYOUTS, PICTURES, records, save_csv, save_jsonl, write

COUNT = 23


def ingest(format, source, out, *options):
    return main([format, str(source), "--out", str(out), *options])


def pairs_of(out):
    return [(pair.pair_id, pair.prompt, pair.image_0, pair.image_1, str(pair.source["seed"])) for pair in PairReader(out).iter_pairs()]


def labels_of(out):
    labels = read_labels(out, "human")
    return dict(zip(labels.pair_id, labels.label_0.tolist(), strict=True))


def distinct(count):
    """Rows of which no two have the same prompt, and so none are merged."""
    return [row | {"prompt": f"{row['prompt']} {k}"} for k, row in enumerate(records(count))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_same_pairs_labels_and_votes(tmp_path, capsys, layout):
    rows = distinct(COUNT)
    source, out = write(layout, tmp_path, rows), tmp_path / "pairs"
    assert ingest("auto", source, out, "--shard_pairs", "10") == 0
    name = "imagefolder" if LAYOUTS[layout][0] == "imagefolder" else "table"
    assert f"{source} is read as {'a ' * (name == 'table')}{name}: prompts in prompt" in capsys.readouterr().out.replace(".txt", "")
    assert pairs_of(out) == [(f"{name}-n{k}", row["prompt"], row["image_0"], row["image_1"], str(k)) for k, row in enumerate(rows)]
    assert labels_of(out) == {f"{name}-n{k}": row["label_0"] for k, row in enumerate(rows) if row["label_0"] is not None}
    assert read_votes(out, "human").rater == [row["rater"] for row in rows if row["label_0"] is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_import_that_stopped_goes_on_to_the_same_pairs(tmp_path, capsys, layout):
    rows = distinct(COUNT)
    rows[17]["image_1"] = None
    if layout == "webdataset":
        rows[17]["image_1"] = b"broken"
    source = write(layout, tmp_path, rows)
    assert ingest("auto", source, tmp_path / "stopped", "--shard_pairs", "5") == 2
    error = capsys.readouterr().err
    assert "image 1" in error and "--unreadable skip" in error and not (tmp_path / "stopped").exists()
    for out in ("stopped", "straight"):
        assert ingest("auto", source, tmp_path / out, "--shard_pairs", "5", "--unreadable", "skip") == 0
        assert ("resuming after 15 pairs" in capsys.readouterr().out) == (out == "stopped")
    assert pairs_of(tmp_path / "stopped") == pairs_of(tmp_path / "straight") and len(PairReader(tmp_path / "stopped")) == COUNT - 1
    assert labels_of(tmp_path / "stopped") == labels_of(tmp_path / "straight")


def test_a_table_of_winners_has_its_sides_shuffled_and_its_labels_follow(tmp_path, capsys):
    chosen = [{"prompt": f"p{k}", "chosen": PICTURES[k % 3], "rejected": PICTURES[3 + k % 3]} for k in range(40)]
    assert ingest("table", save_jsonl(tmp_path / "t.jsonl", chosen), tmp_path / "pairs") == 0
    labels, swaps = labels_of(tmp_path / "pairs"), 0
    for pair, row in zip(PairReader(tmp_path / "pairs").iter_pairs(), chosen, strict=True):
        winner, loser = (pair.image_0, pair.image_1) if labels[pair.pair_id] == 1 else (pair.image_1, pair.image_0)
        assert (winner, loser) == (row["chosen"], row["rejected"]) and pair.source["swapped"] == (labels[pair.pair_id] == 0)
        swaps += pair.source["swapped"]
    assert 8 < swaps < 32 and f"{swaps} pairs had their sides swapped" in capsys.readouterr().out


def test_the_same_pair_by_several_people_becomes_one_pair_with_their_votes(tmp_path):
    rows = [
        records(1)[0] | {"rater": rater, "label_0": label} for rater, label in (("ann", 1.0), ("bob", 1.0), ("cleo", 0.0), ("dan", 0.5))
    ]
    assert ingest("table", save_csv(tmp_path / "t.csv", rows), tmp_path / "pairs") == 0
    assert labels_of(tmp_path / "pairs") == {"table-n0": 0.625}
    votes = read_votes(tmp_path / "pairs", "human")
    assert votes.rater == ["ann", "bob", "cleo", "dan"] and votes.label_0.tolist() == [1.0, 1.0, 0.0, 0.5]


def test_columns_come_from_the_command_line(tmp_path):
    rows = [{"my caption": "a", "before": PICTURES[0], "after": PICTURES[1], "vote": "after"}]
    mapping = json.dumps({"prompt": "my caption", "image_0": "before", "image_1": "after", "winner": "vote"})
    assert ingest("table", save_csv(tmp_path / "t.csv", rows), tmp_path / "pairs", "--columns", mapping) == 0
    assert labels_of(tmp_path / "pairs") == {"table-0": 0.0}


@pytest.mark.parametrize(
    ("format", "words"),
    [
        ("imagefolder", "is no image folder"),
        ("datasets", "is no folder that save_to_disk"),
        ("pickapic", "is not pickapic: it has the columns"),
    ],
)
def test_a_format_that_does_not_fit_leaves_nothing(tmp_path, capsys, format, words):
    source = save_csv(tmp_path / "t.csv", records(2))
    assert ingest(format, source, tmp_path / "pairs") == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.csv"]
