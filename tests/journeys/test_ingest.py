"""`dedpo ingest`, the command, on Pick-a-Pic files: what is kept, dropped and printed, what is refused, and going on."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.labels.files import label_names, read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
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
    """Comparisons that are neither kept nor merged nor counted as dropped."""
    dropped = sum(value for key, value in counts.items() if key.endswith("_dropped") and key != "tie_answers_dropped")
    return counts["comparisons"] - counts["kept"] - counts["duplicates_merged"] - dropped


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
    expected = {"comparisons": 6, "kept": 4, "labelled": 3, "votes": 3, "ties": 2, "unlabelled": 1, "identical": 2, "identical_dropped": 2}
    assert {key: value for key, value in counts.items() if value and key != "tie_answers"} == expected
    printed = capsys.readouterr().out
    for line in (
        "comparisons read: 6",
        "comparisons that every answer calls a tie: 2 (dropped 0)",
        "comparisons that nobody judged: 1 (dropped 0)",
        "comparisons of one image with itself: 2 (dropped 2)",
        "comparisons with an unreadable image: 0 dropped",
        "the same two images under the same prompt again: 0 merged into the first pair, 0 kept as pairs of their own",
        "pairs kept: 4, 3 of them with a human label from 3 votes, 0 with votes for both sides",
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
        (["--ties", "drop"], 3, 2, {"ties_dropped": 2, "identical_dropped": 1}),
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
    found = {key: value for key, value in counts.items() if key.endswith("_dropped") and key != "tie_answers_dropped" and value}
    assert found == dropped


def test_without_the_optional_columns_bytes_and_rows_decide(tmp_path):
    optional = ["are_different", "has_label", "ranking_id", "user_id", "model_0", "best_image_uid"]
    rows = mixed_rows()
    rows[3] |= {"label_0": None, "label_1": None}
    source, out = save(tmp_path / "train.parquet", rows, without=optional), tmp_path / "pairs"
    assert ingest(source, out) == 0
    assert PairReader(out).ids() == [f"pickapic-{i}" for i in range(5)]  # row 4 differs in its bytes, row 5 does not
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


def test_an_unreadable_image_can_be_skipped_and_its_row_is_named(tmp_path, capsys):
    rows = [row(0), row(1, jpg_1=jpeg(200)[:300]), row(2, jpg_0=None), row(3)]
    save(tmp_path / "train.parquet", rows)
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs", "--unreadable", "skip") == 0
    counts = counts_of(tmp_path / "pairs")
    assert PairReader(tmp_path / "pairs").ids() == ["pickapic-1000", "pickapic-1003"]
    assert counts["unreadable_dropped"] == 2 and balance(counts) == 0
    dropped = json.loads((tmp_path / "pairs" / "ingest.json").read_text())["dropped"]["unreadable"]
    assert [text.startswith(f"{tmp_path / 'train.parquet'} row {k}, image") for k, text in zip((1, 2), dropped, strict=True)] == [True] * 2
    shown = capsys.readouterr().out.splitlines()
    place = next(k for k, line in enumerate(shown) if line == "comparisons with an unreadable image: 2 dropped")
    assert shown[place + 1 : place + 3] == [f"  {text}" for text in dropped]


@pytest.mark.parametrize(
    ("changes", "without", "words"),
    [
        ({"jpg_1": jpeg(200)[:300]}, [], ["train.parquet row 2, image 1", "cannot be decoded", "--unreadable skip"]),
        ({"jpg_0": None}, [], ["train.parquet row 2, image 0 is missing"]),
        ({"label_1": 1.0}, [], ["train.parquet row 2", "label_0 is 1.0 and label_1 is 1.0", "add up to 1"]),
        ({"label_0": 1.5, "label_1": -0.5}, [], ["train.parquet row 2", "[0, 1]"]),
        ({"label_0": None}, [], ["train.parquet row 2", "label_0 is None", "has_label"]),
        ({"caption": None}, [], ["train.parquet row 2", "caption is missing"]),
        ({}, ["jpg_0"], ["train.parquet is not pickapic", "it has the columns caption, jpg_1", "(the images themselves)"]),
    ],
)
def test_bad_rows_stop_with_one_message_and_leave_nothing(tmp_path, capsys, changes, without, words):
    save(tmp_path / "train.parquet", [row(0), row(1), row(2, **changes), row(3)], without=without)
    assert ingest(tmp_path / "train.parquet", tmp_path / "pairs") == 2
    error = capsys.readouterr().err
    assert error.startswith("dedpo ingest: error: ") and len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert nothing_left(tmp_path)


def test_a_late_files_other_columns_are_found_before_any_row_is_read(tmp_path, capsys):
    save(tmp_path / "in" / "a.parquet", [row(0, jpg_0=b"broken")])
    save(tmp_path / "in" / "b.parquet", [row(1)], without=["label_1"])
    assert ingest(tmp_path / "in", tmp_path / "pairs") == 2
    error = capsys.readouterr().err
    assert "b.parquet" in error and "label_1" in error


def test_missing_sources_unknown_formats_and_files_that_are_no_parquet(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("hello")
    for argv, words in [
        (["pickapic", str(tmp_path / "nowhere")], "is no file, no folder and no hub id"),
        (["pickapic", str(tmp_path / "empty")], str(tmp_path / "empty")),
        (["pickapic", str(tmp_path / "text.parquet")], "cannot be read as parquet"),
        (["picapic", str(tmp_path / "empty")], "unknown format 'picapic': known: pickapic, hpdv2, "),
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
    assert "calls a tie: 2 (dropped 2)" in capsys.readouterr().err and nothing_left(tmp_path)


# ---- going on


def contents(out):
    labels = read_labels(out, "human")
    return list(PairReader(out).iter_pairs()), labels.pair_id, labels.label_0.tolist(), counts_of(out)


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_like_an_uninterrupted_one(tmp_path):
    source = save(tmp_path / "train.parquet", [row(i, float(i % 2), jpg_0=jpeg(5 * i, 256), jpg_1=jpeg(250 - i, 256)) for i in range(50)])
    options = ["--shard_pairs", "5", "--workers", "1"]
    assert ingest(source, tmp_path / "whole", *options) == 0
    command = [
        sys.executable,
        "-m",
        "dedpo_diffusion.pipelines.ingest",
        "pickapic",
        str(source),
        "--out",
        str(tmp_path / "pairs"),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    partial = tmp_path / ".pairs.partial"
    while process.poll() is None and not (partial / "journal" / "00001.json").is_file():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert (partial / "journal" / "00001.json").is_file() and not (tmp_path / "pairs").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming after " in done.stdout
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole") and not partial.exists()


def test_a_row_that_stops_an_import_keeps_the_whole_shards_and_may_then_be_skipped(tmp_path, capsys):
    source = save(tmp_path / "train.parquet", [row(i) if i != 7 else row(i, jpg_1=b"broken") for i in range(12)])
    options = ["--shard_pairs", "3", "--workers", "1"]
    assert ingest(source, tmp_path / "pairs", *options) == 2
    assert "what is done stays in" in capsys.readouterr().out
    assert ingest(source, tmp_path / "pairs", *options, "--unreadable", "skip") == 0
    assert "resuming after 6 pairs" in capsys.readouterr().out
    assert counts_of(tmp_path / "pairs")["unreadable_dropped"] == 1 and len(PairReader(tmp_path / "pairs")) == 11


def test_another_choice_or_source_starts_again(tmp_path, capsys):
    rows = [row(i) if i != 7 else row(i, jpg_1=b"broken") for i in range(12)]
    source = save(tmp_path / "train.parquet", rows)
    options = ["--shard_pairs", "3", "--workers", "1"]
    assert ingest(source, tmp_path / "pairs", *options) == 2
    save(tmp_path / "train.parquet", [row(i) for i in range(11)])
    assert ingest(source, tmp_path / "pairs", *options) == 0
    assert "resuming" not in capsys.readouterr().out and len(PairReader(tmp_path / "pairs")) == 11
