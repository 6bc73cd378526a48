"""`dedpo validate`: what is planted in a dataset is found and named, whatever the number of processes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse.csgraph import connected_components

from dedpo_diffusion.core.records import Labels, Pair, Targets, Votes
from dedpo_diffusion.labels.files import write_labels, write_targets, write_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.inspection import scan as scanning
from dedpo_diffusion.pairs.inspection.near import close_hashes, look_alikes
from dedpo_diffusion.pairs.inspection.scan import perceptual_hash, scan_dataset, tasks
from dedpo_diffusion.pipelines.validate import main
from support.pictures import picture, write_pairs


def smooth(seed, size=(64, 64)):
    """A picture with large shapes, which a perceptual hash tells from others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(folder, pairs, **options):
    """Pairs given as (prompt, image_0, image_1); their ids are p0, p1, ..."""
    with PairWriter(folder, **options) as writer:
        for k, (prompt, image_0, image_1) in enumerate(pairs):
            writer.add(Pair(f"p{k}", prompt, image_0, image_1))
    return folder


def plain(count, start=0):
    return [(f"prompt {k}", saved(smooth(2 * k)), saved(smooth(2 * k + 1))) for k in range(start, start + count)]


def validate(folder, *options, code=0, workers=1):
    assert main([str(folder), "--workers", str(workers), *options]) == code
    return json.loads((folder / "validate.json").read_text())


# ---- near-duplicates


def near_pairs(hashes, distance):
    """All pairs of places i < j whose hashes are within a distance, each once and sorted."""
    found = [
        (i, j) for one, two, _ in close_hashes(hashes, distance, lambda _: None) for i, j in zip(one.tolist(), two.tolist(), strict=True)
    ]
    return np.array(sorted({(min(pair), max(pair)) for pair in found}), dtype=np.int64).reshape(-1, 2)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(0, 8), st.randoms())
@settings(max_examples=150, deadline=None)
def test_the_search_finds_what_comparing_all_with_all_finds(values, distance, random):
    near = [value ^ sum(1 << bit for bit in random.sample(range(64), random.randint(0, 9))) for value in values]
    hashes = np.array(sorted({*values, *near}), dtype=np.uint64)
    expected = [[i, j] for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if int(hashes[i] ^ hashes[j]).bit_count() <= distance]
    assert near_pairs(hashes, distance).tolist() == expected


def test_chunks_change_nothing(monkeypatch):
    hashes = np.unique(np.random.default_rng(0).integers(0, 64, 60, dtype=np.uint64))
    whole = near_pairs(hashes, 2)
    for compared in (1, 7, 100):
        monkeypatch.setattr("dedpo_diffusion.pairs.inspection.near.COMPARED", compared)
        np.testing.assert_array_equal(near_pairs(hashes, 2), whole)
    assert len(whole) > 50


def alike(hashes, distance, *, files=None, pairs=None, shown=10):
    numbers = np.arange(len(hashes))
    files, pairs = (numbers if known is None else np.array(known) for known in (files, pairs))
    return look_alikes(np.array(hashes, dtype=np.uint64), files, pairs, distance, shown=shown, advance=lambda bands: None)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.integers(0, 6), st.randoms(), st.sampled_from([1, 5, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_groups_are_chains_of_near_duplicates_and_examples_are_the_closest(values, distance, random, compared):
    hashes = [*values, *(value ^ sum(1 << bit for bit in random.sample(range(64), random.randint(0, 8))) for value in values)]
    pairs = [k // 2 for k in range(len(hashes))]
    bits = np.array([[(one ^ two).bit_count() for two in hashes] for one in hashes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dedpo_diffusion.pairs.inspection.near.COMPARED", compared)
        group, examples = alike(hashes, distance, pairs=pairs, shown=1000)
    number, expected = connected_components(bits <= distance, directed=False)
    assert len(set(group.tolist())) == number == len({*zip(group.tolist(), expected.tolist(), strict=True)})
    apart = [(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if bits[i, j] <= distance and pairs[i] != pairs[j]]
    found = examples.tolist()
    assert found == sorted(found) and all((i, j) in apart and bits[i, j] == near for near, i, j in found)
    # an example stands for all images of its two hashes
    assert {frozenset((hashes[i], hashes[j])) for _, i, j in found} == {frozenset((hashes[i], hashes[j])) for i, j in apart}
    assert alike(hashes, distance, pairs=pairs, shown=3)[1].tolist() == found[:3]


def test_equal_hashes_of_other_files_are_the_closest_and_copies_of_a_file_are_none():
    _, examples = alike([7, 7, 9, 9, 6], 1, files=[1, 2, 3, 3, 4], pairs=[0, 1, 2, 3, 4])
    assert examples.tolist() == [[0, 0, 1], [1, 0, 4]]


def test_many_equal_hashes_are_one_group_and_no_work():
    group, examples = alike([5] * 100_000 + [6] + [2**64 - 1], 3)
    assert len(set(group[:100_001].tolist())) == 1 and group[-1] != group[0] and len(examples) == 10


def test_a_hash_survives_scaling_and_compression():
    image = smooth(3, (256, 256))
    other = Image.open(io.BytesIO(saved(image.resize((128, 128)), "JPEG", quality=70)))
    assert int(perceptual_hash(image) ^ perceptual_hash(other)).bit_count() <= 3
    assert int(perceptual_hash(image) ^ perceptual_hash(smooth(4, (256, 256)))).bit_count() > 10


# ---- what is found


def test_a_good_dataset_has_nothing_to_complain_of(tmp_path, capsys):
    folder = write(tmp_path / "d", plain(12))
    report = validate(folder)
    assert report["errors"] == report["warnings"] == [] and report["pairs"] == 12
    assert report["images"]["formats"] == {"PNG RGB": 24} and report["images"]["sizes"] == [{"width": 64, "height": 64, "images": 24}]
    assert report["prompts"]["unique"] == 12 and report["prompts"]["mean_tokens"] == 26 / 12  # "10" is two
    assert report["near_duplicates"]["within_pairs"] == 0 and report["duplicates"]["distinct_images"] == 24
    assert "12 in 1 file" in capsys.readouterr().out


@pytest.fixture
def odd(tmp_path):
    """A dataset with one of everything that is odd, at known rows."""
    twin = smooth(100)
    rows = plain(10)
    rows[1] = ("same", saved(twin), saved(twin))
    rows[2] = ("alike", saved(twin), saved(twin.resize((80, 80)), "JPEG", quality=80))
    rows[3] = ("", saved(smooth(101)), saved(smooth(102)))
    rows[4] = ("small", saved(smooth(103, (32, 32))), saved(smooth(104, (32, 32))))
    rows[5] = ("wide", saved(smooth(105, (128, 64))), saved(smooth(106)))
    rows[6] = ("word " * 80, saved(smooth(107)), saved(smooth(108)))
    rows[7] = ("again", saved(smooth(109)), saved(smooth(110)))
    rows[8] = ("again", saved(smooth(110)), saved(smooth(109)))
    return write(tmp_path / "odd", rows, shard_pairs=6)


def test_what_is_odd_is_counted_and_placed(odd):
    report = validate(odd)
    assert report["errors"] == []
    text = "\n".join(report["warnings"])
    for words in (
        "pairs that hold one image twice: 1 (first: pairs-00000.parquet row 1)",
        "pairs of two images that look the same, within 3 of 64 bits: 1 (first: pairs-00000.parquet row 2)",
        "empty prompts: 1 (first: pairs-00000.parquet row 3)",
        "pairs with an image below 64 pixels a side: 1 (first: pairs-00000.parquet row 4)",
        "1 of 20 images are not square: they will be cropped to the centre; --data.buckets true keeps their shape",
        "pairs of images of different shapes: 1 (first: pairs-00000.parquet row 5)",
        "1 of 10 prompts have more than the 75 tokens that CLIP reads, and are cut off there; the longest has 80 at pairs-00001.parquet "
        "row 0: ",
        "pairs that repeat an earlier one, with the same prompt and images on either side: 1 (first: pairs-00001.parquet row 2 repeats "
        "pairs-00001.parquet row 1)",
        "images that are near-duplicates of others: 2, groups of them: 1; closest in different pairs: pairs-00000.parquet row 1 image_",
    ):
        assert words in text
    assert report["images"]["pairs_of_two_sizes"] == 2 and report["images"]["smallest"][0] == 4
    shared = report["duplicates"].pop("most_shared")
    assert report["duplicates"] == {"one_image_twice": 1, "repeated_pairs": 1, "distinct_images": 16, "images_in_several_pairs": 3}
    assert [(file["where"], file["pairs"]) for file in shared] == [
        ("pairs-00000.parquet row 1", 2), ("pairs-00001.parquet row 1", 2), ("pairs-00001.parquet row 1", 2),
    ]  # fmt: skip
    prompts = report["prompts"]
    assert (prompts["least_tokens"], prompts["most_tokens"], prompts["longest"], prompts["cut"]) == (0, 80, "pairs-00001.parquet row 0", 1)
    assert report["images"]["width_by_height"] == [{"ratio": 1.0, "images": 19}, {"ratio": 2.0, "images": 1}]
    assert report["prompts"]["most_repeated"] == [{"prompt": "again", "pairs": 2}]
    near = report["near_duplicates"]
    assert near["closest"] == [{"row": 2, "where": "pairs-00000.parquet row 2", "bits": near["closest"][0]["bits"]}]
    assert near["largest"] == [{"images": 2, "rows": [1, 2], "where": [f"pairs-00000.parquet row {k}" for k in (1, 2)]}]
    assert near["images_in_groups"] == 2
    assert [place[:-1] for place in near["closest_in_different_pairs"][0]["where"]] == [
        f"pairs-00000.parquet row {k} image_" for k in (1, 2)
    ]


@pytest.mark.parametrize("depth", ["headers", "decode"])
def test_processes_change_nothing(odd, depth, monkeypatch):
    one = validate(odd, "--depth", depth)
    for file in (odd / ".validate").iterdir():
        file.unlink()
    monkeypatch.setattr(scanning, "ROWS", 2)
    assert validate(odd, "--depth", depth, workers=2) == one
    assert ("near_duplicates" in one) is (depth == "decode")


def test_the_page_shows_the_pictures_and_escapes_the_prompts(tmp_path):
    rows = [*plain(3), ("<script>alert(1)</script>", saved(smooth(100)), saved(smooth(100), "JPEG", quality=90))]
    folder = write(tmp_path / "d", rows)
    validate(folder)
    page = (folder / "validate.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert "Pairs whose two images look the same" in page and page.count("data:image/png;base64,") >= 10
    assert "http" not in page.replace("http-equiv", "")


def test_pairs_without_labels_say_how_to_get_them_and_answers_are_told_in_words(tmp_path, capsys):
    folder = write(tmp_path / "d", plain(4))
    validate(folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert "none; run `dedpo vote" in shown
    (folder / "labels").mkdir()
    ids = PairReader(folder).ids()
    pq.write_table(pa.table({"pair_id": ids[:3], "label_0": [0.0, 0.5, 0.75]}), folder / "labels" / "human.parquet")
    (folder / "ingest.json").write_text('{"settings": {"source": "mine/labelled.csv"}}')
    validate(folder)
    assert "none; run" not in capsys.readouterr().out
    page = (folder / "validate.html").read_text()
    assert "read from mine/labelled.csv" in page and "pairs with a human label" in page
    answers = ("people preferred image 1", "people: a tie", "people preferred image 0 (75%)", "no human label")
    for pair_id, words in zip(ids, answers, strict=True):
        assert re.search(rf">{pair_id} \(pairs-00000.parquet row \d\), {re.escape(words)}<", page)


# ---- what is wrong


def broken(folder, **columns):
    """Replace columns of the first shard; nobody but another program would write this."""
    path = folder / "pairs" / "pairs-00000.parquet"
    table = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table(table), path)
    return folder


def test_every_error_is_named_with_file_row_and_remedy(tmp_path, capsys):
    folder = write(tmp_path / "d", plain(6))
    images = [pair.image_0 for pair in PairReader(folder).iter_pairs()]
    images[1], images[2], images[3] = images[1][:100], None, b""
    prompts = [f"prompt {k}" for k in range(5)] + [None]
    broken(folder, image_0=pa.array(images, pa.binary()), prompt=prompts)
    report = validate(folder, code=2)
    error = capsys.readouterr().err
    assert "4 things are wrong" in error
    for words in (
        "pairs-00000.parquet row 1, image_0: the image cannot be decoded",
        "pairs-00000.parquet row 2, image_0 is missing; add the image or remove the row",
        "pairs-00000.parquet row 3, image_0: the image cannot be decoded (the file is empty)",
        "pairs-00000.parquet row 5, prompt is missing; fill it in or remove the row",
    ):
        assert words in error and words in report["errors"][["row 1", "row 2", "row 3", "row 5"].index(words.split("parquet ")[1][:5])]


def test_a_missing_id_or_image_hides_nothing_else(tmp_path):
    """The report is written, whole, though the pairs themselves cannot be read by their reader."""
    same = [("same", saved(smooth(k)), saved(smooth(k + 10))) for k in range(4)]
    folder = write(tmp_path / "d", [*same, ("x", b"no image", saved(smooth(30)))])
    images = [pair.image_0 for pair in PairReader(folder).iter_pairs()]
    images[0] = None
    broken(folder, pair_id=[None, "p1", None, "p3", "p4"], image_0=pa.array(images, pa.binary()), image_1=pa.array(images, pa.binary()))
    report = validate(folder, code=2)
    for words in (
        "row 0, pair_id is missing",
        "row 2, pair_id is missing",
        "row 0, image_0 is missing",
        "row 4, image_0: the image cannot",
    ):
        assert sum(words in error for error in report["errors"]) == 1
    assert not any("the same pair_id" in error for error in report["errors"])
    assert "labels, votes and targets were not looked at" in report["errors"][-1]
    assert report["prompts"]["most_repeated"] == [{"prompt": "same", "pairs": 4}]
    assert report["duplicates"]["one_image_twice"] == 4 and report["images"]["unreadable"] == 4  # the missing image is no twin


def test_headers_find_what_headers_tell(tmp_path):
    folder = write(tmp_path / "d", [*plain(3), ("x", b"no image", saved(smooth(9)))])
    report = validate(folder, "--depth", "headers", code=2)
    assert len(report["errors"]) == 1 and report["images"]["unreadable"] == 1


def test_many_errors_are_counted_and_ten_named(tmp_path, capsys):
    folder = write(tmp_path / "d", [("x", b"no image", picture(k)) for k in range(15)])
    report = validate(folder, code=2)
    error = capsys.readouterr().err
    assert len(report["errors"]) == 15 and "and 5 more, in " in error and len(error.splitlines()) == 12


def test_duplicate_ids_name_both_rows(tmp_path):
    folder = broken(write(tmp_path / "d", plain(4)), pair_id=["a", "b", "a", "c"])
    errors = validate(folder, code=2)["errors"]
    assert errors[0] == "pairs-00000.parquet row 0 and again in pairs-00000.parquet row 2: the same pair_id 'a'; make it unique"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (
            lambda d: write_labels(d, "human", Labels(["p0", "nobody"], np.array([1.0, 0.0]))),
            r"labels/human.parquet row 1: pair_id 'nobody'",
        ),
        (
            lambda d: write_targets(d, "t", Targets(["p0"], np.ones(1), np.ones(1)), {}),
            "targets/t.parquet: its pairs are not the dataset's",
        ),
        (
            lambda d: write_votes(d, "human", Votes(["p0", "x", "y"], np.ones(3), np.ones(3, int), ["a"] * 3)),
            "votes/human.parquet row 1: pair_id 'x' is none of the dataset's pairs (2 such rows)",
        ),
        (lambda d: (d / "labels").mkdir() or (d / "labels" / "clip.parquet").write_bytes(b"x"), "clip.parquet cannot be read as parquet"),
    ],
)
def test_labels_votes_and_targets_that_do_not_fit(tmp_path, plant, words):
    folder = write(tmp_path / "d", plain(3))
    plant(folder)
    errors = validate(folder, code=2)["errors"]
    assert len(errors) == 1 and words in errors[0]


def test_every_bad_row_of_a_label_file_is_told(tmp_path):
    folder = write(tmp_path / "d", plain(3))
    (folder / "labels").mkdir()
    table = {"pair_id": ["p0", "p1", "x", None, "p0", "p2"], "label_0": [2.0, None, 1.0, 1.0, 1.0, 0.5]}
    pq.write_table(pa.table(table), folder / "labels" / "human.parquet")
    report = validate(folder, code=2)
    expected = [
        "row 0: label_0 is 2.0, and must lie in [0, 1]",
        "row 1: label_0 is missing",
        "row 2: pair_id 'x' is none of",
        "row 3: pair_id is missing",
        "row 4: pair_id 'p0' is in row 0 already",
    ]
    assert len(report["errors"]) == 5 and report["labels"] == {}
    assert all(f"labels/human.parquet {words}" in error for words, error in zip(expected, report["errors"], strict=True))


def test_a_rater_who_leans_to_one_side_of_the_screen_is_odd(tmp_path):
    folder = write_pairs(tmp_path / "d", 40)
    ids, turned = PairReader(folder).ids(), [k % 2 == 0 for k in range(40)]
    label_0 = np.array([0.0 if side else 1.0 for side in turned])  # always the image on the left
    write_votes(folder, "human", Votes(ids, label_0, np.ones(40, dtype=int), ["ann"] * 40, {"swapped": turned}))
    report = validate(folder)
    assert any(
        "votes/human: raters who lean to one side: 1 of 1 (ann chose the left image 100% of 40 times)" in text
        for text in report["warnings"]
    )


def test_a_killed_process_is_told_in_words(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "d", plain(8), shard_pairs=2)
    (tmp_path / "dies").mkdir()
    (tmp_path / "dies" / "sitecustomize.py").write_text(
        "import os, sys\nif 'spawn_main' in ' '.join(sys.orig_argv):\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "dies"))
    assert main([str(folder), "--workers", "2"]) == 2
    assert "was killed (no memory left?); run again with fewer than 2 --workers" in capsys.readouterr().err
    monkeypatch.delenv("PYTHONPATH")
    assert validate(folder)["pairs"] == 8


def test_what_is_no_dataset_or_setting_is_refused(tmp_path, capsys):
    folder = write(tmp_path / "d", plain(1))
    for argv, words in [
        ([str(tmp_path / "nothing")], "holds no parquet files"),
        ([str(folder), "--workers", "0"], "workers is 0"),
        ([str(folder), "--near", "40"], "near is 40"),
    ]:
        assert main(argv) == 2
        assert words in capsys.readouterr().err


# ---- labels


def test_balance_lean_and_agreement_are_reported(tmp_path, capsys):
    folder = write_pairs(tmp_path / "d", 60)
    ids = PairReader(folder).ids()
    human = np.array([1.0] * 20 + [0.0] * 5 + [0.5] * 5)
    judge = np.concatenate([human[:20], 1 - human[20:25], np.full(35, 0.7)])
    write_labels(folder, "human", Labels(ids[:30], human))
    write_labels(folder, "clip", Labels(ids, judge))
    write_labels(folder, "half", Labels(ids[:10], judge[:10]))
    rows = [(pair_id, label, rater) for pair_id, label in zip(ids[:30], human, strict=True) for rater in ("ann", "bob")]
    votes = [list(column) for column in zip(*rows, strict=True)]
    write_votes(folder, "human", Votes(votes[0], np.array(votes[1]), np.ones(60, dtype=int), votes[2]))
    report = validate(folder, "--resamples", "100")
    assert report["labels"]["human"] | {"image_0_share": 0} == {
        "labelled": 30, "share": 0.5, "image_0_wins": 20, "image_1_wins": 5, "ties": 5, "soft": 0, "image_0_share": 0,
    }  # fmt: skip
    assert report["labels"]["human"]["image_0_share"]["value"] == 0.8
    text = "\n".join(report["warnings"])
    assert "labels/human: image 0 wins 80.0% (95 %: 60.9% to 91.1%) of 25 decided pairs; were the sides shuffled?" in text
    assert "labels/half covers 10 of 60 pairs; if it is a judge" in text and "labels/human covers" not in text
    assert report["judges"]["clip"]["value"] == 0.8 and report["judges"]["clip"]["n"] == 25
    assert report["votes"]["human"]["between"]["raw"]["value"] == 1.0
    assert report["targets"] == ["soft"]
    assert "clip agrees with people" in capsys.readouterr().out


# ---- large datasets


def test_a_second_look_reads_no_image_and_a_changed_shard_is_read_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "d", plain(12), shard_pairs=4)
    first, looked = validate(folder), []
    real = scanning.scan_rows
    monkeypatch.setattr(scanning, "scan_rows", lambda path, *rest: looked.append(path.name) or real(path, *rest))
    assert validate(folder) == first and looked == []
    path = folder / "pairs" / "pairs-00001.parquet"
    os.utime(path, ns=(1, 1))
    assert validate(folder) == first and looked == ["pairs-00001.parquet"]
    assert len(list((folder / ".validate").iterdir())) == 3


@pytest.mark.slow
def test_a_killed_look_goes_on_behind_its_whole_shards(tmp_path):
    folder = write(tmp_path / "d", [("x", picture(2 * k, (256, 256)), picture(2 * k + 1, (256, 256))) for k in range(60)], shard_pairs=6)
    process = subprocess.Popen(
        [sys.executable, "-m", "dedpo_diffusion.pipelines.validate", str(folder), "--workers", "1"], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.glob(".validate/pairs-00001-*")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = len([path for path in folder.glob(".validate/*") if not path.name.endswith(".tmp")])
    assert 2 <= kept < 10 and not (folder / "validate.json").exists()
    counted = []
    scan = scan_dataset(PairReader(folder), "decode", workers=1, advance=counted.append)
    assert len(scan.pairs) == 60 and sum(counted) == 60 and validate(folder)["pairs"] == 60


def test_tasks_are_small_and_cover_every_row_group(tmp_path):
    folder = write(tmp_path / "d", [("x", b"0", b"1")] * 1 + [("x", b"%d" % k, b"1") for k in range(699)])
    found = tasks(folder / "pairs" / "pairs-00000.parquet")
    assert [group for task in found for group in task] == list(range(22)) and max(map(len, found)) <= 8
    path = folder / "pairs" / "pairs-00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1000)  # as another program writes it
    assert tasks(path) == [[0]]


@pytest.mark.slow
def test_no_more_than_a_few_images_are_in_memory(tmp_path):
    """Images of 64 MB in all are looked at with a quarter of that, in one row group."""
    images = [saved(Image.effect_noise((640, 640), 60 + k % 7)) for k in range(8)]
    size = sum(map(len, images))
    folder = write(tmp_path / "d", [("x", images[k % 8] + b"%d" % k, images[(k + 1) % 8]) for k in range(64_000_000 // (size // 4))])
    code = (
        "import resource, sys\n"
        "from dedpo_diffusion.pairs.inspection.scan import scan_dataset\nfrom dedpo_diffusion.pairs.dataset import PairReader\n"
        "reader = PairReader(sys.argv[1])\n"
        "import imagehash, PIL.Image\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "scan = scan_dataset(reader, 'headers', workers=1, advance=lambda n: None)\n"
        "print(len(scan.pairs), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    pairs, kib = map(int, done.stdout.split())
    total = sum(path.stat().st_size for path in (folder / "pairs").iterdir())
    assert pairs == len(PairReader(folder)) and total > 60_000_000 and kib * 1024 < 0.6 * total
