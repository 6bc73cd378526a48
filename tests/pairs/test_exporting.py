"""`dedpo pairs export` into tables: what other programs find there, and that the way back loses nothing."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st
from PIL import Image

from dedpo_diffusion.core.records import Labels, Pair, Votes
from dedpo_diffusion.labels.files import read_labels, read_votes, write_labels, write_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.exporting.rows import Item
from dedpo_diffusion.pairs.formats.annotated import earlier_answers, written_answers
from dedpo_diffusion.pairs.formats.comparison import Answer
from dedpo_diffusion.pipelines import main
from support.annotating import export, ingest, labels, make_pairs, state
from support.pictures import picture

TABLES = ("datasets", "imagefolder", "csv")
EVERY = ("labelstudio", "argilla", *TABLES)


def refusal(capsys, *words):
    assert main(["pairs", "export", *map(str, words)]) == 2
    return capsys.readouterr().err


def source_of(to, out):
    return out / "tasks.json" if to == "labelstudio" else out


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("answers", [True, False])
def test_a_round_trip_keeps_every_pair_side_label_tie_and_rater(tmp_path, to, answers):
    pairs = make_pairs(tmp_path / "P", answers=answers)
    out = export(pairs, to, tmp_path / "out")
    if to == "labelstudio":  # tasks without annotations, as Label Studio exports them when nobody has worked yet
        tasks = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
        (out / "tasks.json").write_text(json.dumps([{"id": k, "annotations": [], **task} for k, task in enumerate(tasks)]))
    ingest(source_of(to, out), tmp_path / "back")
    assert state(tmp_path / "back") == state(pairs)
    assert PairReader(tmp_path / "back").ids() == PairReader(pairs).ids()
    if answers:
        assert labels(tmp_path / "back") == pytest.approx(labels(pairs))


@pytest.mark.parametrize("to", TABLES)
def test_tables_keep_what_else_is_known(tmp_path, to):
    pairs = make_pairs(tmp_path / "P")
    ingest(export(pairs, to, tmp_path / "out"), tmp_path / "back")
    kind = str if to == "csv" else lambda value: value
    assert [p.source for p in PairReader(tmp_path / "back").iter_pairs()] == [
        {name: kind(value) for name, value in p.source.items()} | {"swapped": False} for p in PairReader(pairs).iter_pairs()
    ]


@pytest.mark.parametrize("to", TABLES)
def test_twice_there_and_back_is_once(tmp_path, to):
    ingest(export(make_pairs(tmp_path / "P"), to, tmp_path / "one"), tmp_path / "Q")
    ingest(export(tmp_path / "Q", to, tmp_path / "two"), tmp_path / "R")
    assert state(tmp_path / "R") == state(tmp_path / "P")


@pytest.mark.parametrize("to", EVERY)
def test_human_null_leaves_the_answers_out(tmp_path, to):
    pairs = make_pairs(tmp_path / "P")
    out = export(pairs, to, tmp_path / "out", "--human", "null")
    for path in out.rglob("*"):
        if path.is_file():
            assert b"ann@example.org" not in path.read_bytes()


def test_datasets_shows_images(tmp_path):
    from datasets import load_dataset

    pairs = make_pairs(tmp_path / "P")
    for to, name, words in (("datasets", str(tmp_path / "d"), {}), ("imagefolder", "imagefolder", {"data_dir": str(tmp_path / "i")})):
        export(pairs, to, tmp_path / to[0])
        found = load_dataset(name, split="train", cache_dir=str(tmp_path / "cache"), **words)
        assert len(found) == 8
        for row, pair in zip(found, PairReader(pairs).iter_pairs(), strict=True):
            assert row["prompt"] == pair.prompt and row["pair_id"] == pair.pair_id
            for side in ("image_0", "image_1"):
                assert row[side].tobytes() == Image.open(io.BytesIO(getattr(pair, side))).tobytes()
        assert found["label_0"][0] == 0.5 and found["label_0"][5] is None and found["votes"][2] == 5 and found["source_seed"][3] == 3


def test_the_csv_names_files_and_labels(tmp_path):
    pairs = make_pairs(tmp_path / "P")
    out = export(pairs, "csv", tmp_path / "out")
    with open(out / "pairs.csv", encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    for row, pair in zip(rows, PairReader(pairs).iter_pairs(), strict=True):
        assert (out / row["image_0"]).read_bytes() == pair.image_0 and (out / row["image_1"]).read_bytes() == pair.image_1
    assert [row["label_0"] for row in rows] == ["0.5", "0.5", "0.4", "0.25", "0.0", "", "", ""]
    assert [row["rater"] for row in rows] == ["", "ann@example.org", "", "", "bob", "", "", ""]


def test_a_csv_can_be_filled_in_by_hand(tmp_path):
    out = export(make_pairs(tmp_path / "P"), "csv", tmp_path / "out")
    with open(out / "pairs.csv", encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    rows[5] |= {"label_0": "1", "rater": "cid"}
    with open(out / "pairs.csv", "w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    ingest(out, tmp_path / "Q")
    assert state(tmp_path / "Q")["own-5 ü"][3] == [(1.0, 1, "cid")]


def test_a_label_that_contradicts_its_answers_is_named(tmp_path, capsys):
    out = export(make_pairs(tmp_path / "P"), "imagefolder", tmp_path / "out")
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[4]["label_0"] = 1.0
    (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(["ingest", "auto", str(out), "--out", str(tmp_path / "Q")]) == 2
    assert "metadata.jsonl line 5: label_0 is 1.0, and the mean of answers is 0; mend one of them" in capsys.readouterr().err


@trials(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 9), st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), max_size=5
    )
)
def test_answers_survive_being_written(found):
    answers = [Answer(label, rater, votes) for label, votes, rater in found]
    assert earlier_answers(json.dumps(written_answers(answers)), "here") == answers == earlier_answers(written_answers(answers), "here")


@trials(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_sides_are_shuffled_by_half_and_the_same_each_time(seed):
    items = [Item(k, Pair(f"p{k}", "", b"", b""), ()) for k in range(400)]
    left = [item.left_is(seed) for item in items]
    assert left == [item.left_is(seed) for item in items]
    assert abs(left.count("image_0") - 200) < 60  # six standard deviations


@trials(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_dataset_survives_any_table(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    ids = data.draw(st.lists(words.filter(lambda w: bool(w.strip())), min_size=1, max_size=4, unique=True))
    with PairWriter(folder / "P") as writer:
        for k, name in enumerate(ids):
            writer.add(Pair(name, data.draw(words), picture(2 * k), picture(2 * k + 1)))
    for to in TABLES:
        ingest(export(folder / "P", to, folder / to), folder / f"{to}-back")
        assert state(folder / f"{to}-back") == state(folder / "P")


@pytest.mark.parametrize(("to", "format"), [("imagefolder", "imagefolder"), ("csv", "table")])
def test_the_layouts_own_name_reads_it_too(tmp_path, to, format):
    ingest(export(make_pairs(tmp_path / "P"), to, tmp_path / "out"), tmp_path / "Q", format=format)
    assert state(tmp_path / "Q") == state(tmp_path / "P")


def test_hidden_repetitions_and_propensities_stay_behind_and_are_told(tmp_path, capsys):
    pairs = make_pairs(tmp_path / "P")
    votes = read_votes(pairs, "human")
    again = Votes(
        [*votes.pair_id, votes.pair_id[0]],
        np.append(votes.label_0, 0.0),
        np.append(votes.votes, 1),
        [*votes.rater, "bob"],
        {"repeat": [False] * len(votes.pair_id) + [True]},
    )
    write_votes(pairs, "human", again)
    found = read_labels(pairs, "human")
    write_labels(pairs, "human", Labels(found.pair_id, found.label_0, found.extra | {"propensity": [0.5] * len(found.pair_id)}))
    before = state(make_pairs(tmp_path / "without"))
    ingest(export(pairs, "csv", tmp_path / "out"), tmp_path / "Q")
    assert state(tmp_path / "Q") == before
    said = capsys.readouterr().out
    assert "hidden repetitions, which make no label: 1 left out" in said and "(propensity) stay behind" in said


def test_pairs_that_are_there_twice_come_back_twice_where_that_is_asked_for(tmp_path):
    with PairWriter(tmp_path / "P") as writer:
        for k, name in enumerate(("a", "b", "same")):
            writer.add(Pair(name, "x", picture(1), picture(1 if name == "same" else 2), {"k": k}))
    for to in EVERY[1:]:
        out = export(tmp_path / "P", to, tmp_path / to)
        counts = ingest(out, tmp_path / f"Q-{to}", "--duplicates", "keep", "--identical", "keep")
        assert state(tmp_path / f"Q-{to}") == state(tmp_path / "P") and counts["duplicates_kept"] == 1
        counts = ingest(out, tmp_path / f"R-{to}")
        assert (counts["kept"], counts["duplicates_merged"], counts["identical_dropped"]) == (1, 1, 1)


def test_labels_without_votes_go_along(tmp_path):
    pairs = make_pairs(tmp_path / "P", answers=False)
    write_labels(pairs, "human", Labels(["own-1 ü", "own-2 ü"], np.array([0.3, 1.0]), {"votes": [3, 1], "rater": [None, "ann"]}))
    for to in EVERY[1:]:
        ingest(export(pairs, to, tmp_path / to), tmp_path / f"Q-{to}")
        assert labels(tmp_path / f"Q-{to}") == {"own-1 ü": pytest.approx(0.3), "own-2 ü": 1.0}
        assert read_labels(tmp_path / f"Q-{to}", "human").extra == {"votes": [3, 1], "rater": [None, "ann"]}


# ---- what is refused


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, capsys):
    pairs = make_pairs(tmp_path / "P")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "exists and is not an empty folder; choose another --out" in refusal(capsys, pairs, "--to", "csv", "--out", tmp_path / "out")
    with PairWriter(tmp_path / "bad") as writer:
        writer.add(Pair("broken", "x", b"no image", picture(1)))
    said = refusal(capsys, tmp_path / "bad", "--to", "csv", "--out", tmp_path / "new")
    assert "pair 'broken', image_0: the image cannot be decoded" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P", "bad", "out"]


def test_labels_that_their_votes_contradict_are_named(tmp_path, capsys):
    pairs = make_pairs(tmp_path / "P")
    found = read_labels(pairs, "human")
    found.label_0[0] = 1.0
    write_labels(pairs, "human", found)
    said = refusal(capsys, pairs, "--to", "csv", "--out", tmp_path / "out")
    assert "the label of 'own-0 ü' in labels/human.parquet is 1, and the mean of its votes 0.5" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to csv --images data", "--images is for labelstudio, and csv has one way to hold images; leave it out"),
        ("--to argilla --images files", "--images files is for labelstudio: Argilla keeps images inside its records; leave it out"),
        ("--to argilla --root /", "--root is for --to labelstudio with images as files; leave it out"),
        ("--to labelstudio --images data --root /", "--root is for --to labelstudio with images as files; leave it out"),
        ("--to csv --fields html", "--fields html is for --to argilla; leave it out"),
        ("--to csv --human judge", "judge"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path, capsys, words, message):
    assert message in refusal(capsys, make_pairs(tmp_path / "P"), *words.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_root_must_hold_the_export(tmp_path, capsys):
    pairs = make_pairs(tmp_path / "P")
    (tmp_path / "served").mkdir()
    said = refusal(capsys, pairs, "--to", "labelstudio", "--out", tmp_path / "out", "--root", tmp_path / "served")
    assert "does not hold" in said and "give the folder that Label Studio serves files from" in said
    out = export(pairs, "labelstudio", tmp_path / "served" / "a b" / "out", "--root", str(tmp_path / "served"))
    task = json.loads((out / "tasks.json").read_text(encoding="utf-8"))[0]
    assert task["data"]["left"] == "/data/local-files/?d=a%20b/out/images/000000-left.png"
