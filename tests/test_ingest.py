"""`dedpo ingest pickapic` on files of that format: what is kept, dropped and counted, and what is refused."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.decoding import decode_image
from dedpo_diffusion.labels import label_names, read_labels
from dedpo_diffusion.pairs import PairReader
from dedpo_diffusion.pipelines.ingest import main


def jpeg(red, size=24):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def row(i, label=1.0, **changes):
    """One row of Pick-a-Pic v2."""
    return {
        "caption": f"a picture of {i}",
        "jpg_0": jpeg(10 + 5 * i),
        "jpg_1": jpeg(200),
        "label_0": label,
        "label_1": 1 - label,
        "has_label": True,
        "are_different": True,
        "image_0_uid": f"u0-{i}",
        "image_1_uid": f"u1-{i}",
        "best_image_uid": f"u0-{i}",
        "ranking_id": 1000 + i,
        "user_id": 7 + i % 2,
        "num_example_per_prompt": 1,
        "model_0": "sdxl",
        "model_1": "sd15",
        "image_0_url": "https://example.invalid/not-kept",
    } | changes


def mixed_rows():
    """Six rows: won, lost, tie, unlabelled, identical, tie of identical images."""
    return [
        row(0, 1.0),
        row(1, 0.0),
        row(2, 0.5),
        row(3, 0.0, has_label=False, label_1=0.0),
        row(4, 1.0, are_different=False),
        row(5, 0.5, jpg_0=jpeg(200)),  # the bytes are the same, whatever are_different says
    ]


def save(path, rows, without=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in rows[0] if name not in without]
    pq.write_table(pa.table({name: [r[name] for r in rows] for name in names}), path)
    return path


def ingest(source, out, *options):
    return main(["pickapic", str(source), "--out", str(out), *options])


def counts_of(out):
    return json.loads((out / "ingest.json").read_text())["counts"]


def balance(counts):
    """Rows that are neither kept nor counted as dropped."""
    return counts["rows"] - counts["kept"] - sum(value for key, value in counts.items() if key.endswith("_dropped"))


def nothing_left(folder):
    return [path for path in folder.iterdir() if path.suffix != ".parquet"] == []


def test_defaults_keep_ties_and_unlabelled_and_drop_identical(tmp_path, capsys):
    source, out = save(tmp_path / "train.parquet", mixed_rows()), tmp_path / "pairs"
    assert ingest(source, out) == 0
    reader, labels = PairReader(out), read_labels(out, "human")
    assert reader.ids() == ["pickapic-1000", "pickapic-1001", "pickapic-1002", "pickapic-1003"]
    assert labels.pair_id == reader.ids()[:3] and labels.label_0.tolist() == [1.0, 0.0, 0.5]
    assert labels.extra == {"rater": ["7", "8", "7"]}
    counts = counts_of(out)
    assert balance(counts) == 0
    assert counts == {"rows": 6, "kept": 4, "labelled": 3, "ties": 2, "unlabelled": 1, "identical": 2, "identical_dropped": 2}
    printed = capsys.readouterr().out
    for line in (
        "rows read: 6",
        "ties: 2 (dropped 0)",
        "pairs that nobody judged: 1 (dropped 0)",
        "pairs of one image with itself: 2 (dropped 2)",
        "pairs with an unreadable image: 0 dropped",
        "pairs kept: 4, 3 of them with a human label",
    ):
        assert line in printed.splitlines()


def test_images_and_sources_arrive_unchanged(tmp_path):
    rows = mixed_rows()
    save(tmp_path / "train.parquet", rows)
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs") == 0
    pair = PairReader(tmp_path / "pairs").pair(1)
    assert (pair.prompt, pair.image_0, pair.image_1) == (rows[1]["caption"], rows[1]["jpg_0"], rows[1]["jpg_1"])
    assert pair.source["model_0"] == "sdxl" and pair.source["user_id"] == 8 and "image_0_url" not in pair.source
    assert decode_image(pair.image_0, "here").size == (24, 24)


@pytest.mark.parametrize(
    ("options", "kept", "labelled", "dropped"),
    [
        (["--ties", "drop"], 3, 2, {"ties_dropped": 1, "identical_dropped": 2}),
        (["--unlabelled", "drop"], 3, 3, {"unlabelled_dropped": 1, "identical_dropped": 2}),
        (["--identical", "keep"], 6, 5, {}),
        (["--identical", "keep", "--ties", "drop"], 4, 3, {"ties_dropped": 2}),
    ],
)
def test_every_choice_is_obeyed_and_counted(tmp_path, options, kept, labelled, dropped):
    source, out = save(tmp_path / "train.parquet", mixed_rows()), tmp_path / "pairs"
    assert ingest(source, out, *options) == 0
    counts = counts_of(out)
    assert (counts["kept"], counts["labelled"], len(PairReader(out))) == (kept, labelled, kept) and balance(counts) == 0
    assert {key: value for key, value in counts.items() if key.endswith("_dropped")} == dropped


def test_without_the_optional_columns_bytes_and_rows_decide(tmp_path):
    optional = ["are_different", "has_label", "ranking_id", "user_id", "model_0", "best_image_uid"]
    rows = mixed_rows()
    rows[3] |= {"label_0": None, "label_1": None}
    source, out = save(tmp_path / "train.parquet", rows, without=optional), tmp_path / "pairs"
    assert ingest(source, out) == 0
    assert PairReader(out).ids() == [f"pickapic-train-{i}" for i in range(5)]  # row 4 differs in its bytes, row 5 does not
    assert counts_of(out)["unlabelled"] == 1 and counts_of(out)["identical"] == 1
    assert read_labels(out, "human").extra == {}


def test_a_folder_is_read_in_the_order_of_its_files_and_written_in_shards(tmp_path):
    for k in range(3):
        save(tmp_path / "in" / f"part-{k}.parquet", [row(10 * k + i) for i in range(3)])
    assert ingest(tmp_path / "in", tmp_path / "pairs", "--shard_pairs", "4") == 0
    reader = PairReader(tmp_path / "pairs")
    assert [path.name for path in reader.shards] == ["pairs-00000.parquet", "pairs-00001.parquet", "pairs-00002.parquet"]
    assert reader.ids() == [f"pickapic-{1000 + 10 * k + i}" for k in range(3) for i in range(3)]


def test_pairs_that_nobody_judged_make_no_label_file(tmp_path):
    save(tmp_path / "train.parquet", [row(i, has_label=False) for i in range(2)])
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs") == 0
    assert label_names(tmp_path / "pairs") == [] and len(PairReader(tmp_path / "pairs")) == 2


def test_an_unreadable_image_can_be_skipped(tmp_path):
    rows = [row(0), row(1, jpg_1=jpeg(200)[:300]), row(2, jpg_0=None), row(3)]
    save(tmp_path / "train.parquet", rows)
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs", "--unreadable", "skip") == 0
    counts = counts_of(tmp_path / "pairs")
    assert PairReader(tmp_path / "pairs").ids() == ["pickapic-1000", "pickapic-1003"]
    assert counts["unreadable_dropped"] == 2 and balance(counts) == 0


@pytest.mark.parametrize(
    ("changes", "without", "words"),
    [
        ({"jpg_1": jpeg(200)[:300]}, [], ["train.parquet row 2, jpg_1", "cannot be decoded", "--unreadable skip"]),
        ({"jpg_0": None}, [], ["train.parquet row 2, jpg_0", "cannot be decoded"]),
        ({"label_1": 1.0}, [], ["train.parquet row 2", "label_0 is 1.0 and label_1 is 1.0", "add up to 1"]),
        ({"label_0": 1.5, "label_1": -0.5}, [], ["train.parquet row 2", "[0, 1]"]),
        ({"label_0": None}, [], ["train.parquet row 2", "label_0 is None", "has_label"]),
        ({"caption": None}, [], ["train.parquet row 2", "caption is missing"]),
        ({"ranking_id": 1000}, [], ["'pickapic-1000' comes twice, as pair 0 and as pair 2"]),
        ({}, ["jpg_0"], ["train.parquet has no column 'jpg_0'", "it has caption, jpg_1", "with images?"]),
    ],
)
def test_bad_rows_stop_with_one_message_and_leave_nothing(tmp_path, capsys, changes, without, words):
    save(tmp_path / "train.parquet", [row(0), row(1), row(2, **changes), row(3)], without=without)
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs", "--shard_pairs", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("dedpo ingest: error: ") and len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert nothing_left(tmp_path)


def test_a_late_files_missing_column_is_found_before_any_row_is_read(tmp_path, capsys):
    save(tmp_path / "in" / "a.parquet", [row(0, jpg_0=b"broken")])
    save(tmp_path / "in" / "b.parquet", [row(1)], without=["label_1"])
    assert ingest(tmp_path / "in", tmp_path / "pairs") == 2
    assert "b.parquet has no column 'label_1'" in capsys.readouterr().err


def test_missing_sources_unknown_formats_and_files_that_are_no_parquet(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("hello")
    for argv, words in [
        (["pickapic", str(tmp_path / "nowhere")], "neither a parquet file nor a folder"),
        (["pickapic", str(tmp_path / "empty")], "neither a parquet file nor a folder"),
        (["pickapic", str(tmp_path / "text.parquet")], "cannot be read as parquet"),
        (["picapic", str(tmp_path / "empty")], "unknown format 'picapic': use one of pickapic"),
    ]:
        assert main([*argv, "--out", str(tmp_path / "pairs")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "pairs").exists()


def test_an_occupied_output_is_left_alone_and_an_empty_one_is_used(tmp_path, capsys):
    source, out = save(tmp_path / "train.parquet", [row(0)]), tmp_path / "pairs"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert ingest(source, out) == 2
    assert "not an empty folder" in capsys.readouterr().err and [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert ingest(source, out) == 0 and len(PairReader(out)) == 1


def test_when_everything_is_dropped_the_counts_say_why(tmp_path, capsys):
    save(tmp_path / "train.parquet", [row(0, 0.5), row(1, 0.5)])
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs", "--ties", "drop") == 2
    assert "ties: 2 (dropped 2)" in capsys.readouterr().err and nothing_left(tmp_path)
