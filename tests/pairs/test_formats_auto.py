"""What `auto` takes a table for, and rows whose values nothing can hold."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats import choose
from dedpo_diffusion.pairs.formats.comparison import Answer
from dedpo_diffusion.pipelines.ingest import main as ingest
from support.layouts import save_parquet, settings
from support.pictures import picture


def entries(source, format="auto"):
    """All entries of a source, and the Chosen that made them."""
    wanted = settings(source, format)
    chosen = choose(wanted)
    return [e for where, row, folder in chosen.source.rows() for e in chosen.module.entries(row, where, folder, wanted)], chosen


def refusal(source, format="auto"):
    with pytest.raises(UserError) as caught:
        entries(source, format)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "answer", "label"),
    [
        ("prompt path1 path2", {"winner": "path2"}, 0.0),
        ("prompt path1 path2 model1 model2", {"label_0": 0.25}, 0.25),
        ("prompt path1 path2 choice_dist", {"preferred": 2}, 0.0),  # even where the columns are all of the published format
        ("caption jpg_0 jpg_1 label_0 label_1 has_label", {"winner": "jpg_1"}, None),
        ("prompt image1 image2 votes_image1 votes_image2", {"votes_1": 0, "votes_2": 5}, 0.0),
    ],
)
def test_auto_overrides_no_answer_that_it_can_see(tmp_path, columns, answer, label):
    line = {name: "a.png" for name in columns.split()} | {"label_0": 1.0, "label_1": 0.0, "has_label": True, "choice_dist": [3, 1]} | answer
    line = {name: value for name, value in line.items() if name in (*columns.split(), *answer)}
    path = save_parquet(tmp_path / "t.parquet", [line])
    if label is None:  # two answers: the person must say which
        assert "several columns could be the answer (label_0 and label_1, winner)" in refusal(path)
        return
    (entry,), chosen = entries(path)
    assert chosen.name == "table" and {one.label_0 for one in entry.answers} == {label}
    if "model1" in columns or "choice_dist" in columns:
        assert f"has answers in {next(iter(answer))}, which hpdv3 does not read" in refusal(path, "hpdv3")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ({"prompt": "a", "path1": "a.png", "path2": "b.png"}, "hpdv3"),
        ({"prompt": "a", "path1": "a.png", "path2": "b.png", "model1": "x", "model2": "y"}, "hpdv3"),  # test.json, or anybody's
    ],
)
def test_general_names_make_no_published_format_and_their_pairs_no_label(tmp_path, line, name):
    path = save_parquet(tmp_path / "t.parquet", [line])
    (entry,), chosen = entries(path)
    assert chosen.name == "table" and entry.answers == ()
    assert chosen.why.endswith(f"; if it is {name}, give that name instead of auto")
    (entry,), _ = entries(path, name)  # the person says so
    assert entry.answers == (Answer(1.0),)


def test_pick_a_pics_names_without_its_own_columns_are_a_table_with_the_same_answers(tmp_path):
    path = save_parquet(tmp_path / "t.parquet", [{"caption": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5, "rater": "ann"}])
    (entry,), chosen = entries(path)
    assert chosen.name == "table" and entry.answers == (Answer(0.5, "ann"),)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_0": 10**400}, "label_0 is a number of 401 digits"),
        ({"label_0": float("inf")}, "label_0 is"),
        ({"label_0": -float("inf")}, "must be in [0, 1]"),
        ({"votes_0": 10**400, "votes_1": 0}, "votes_0 is a number of 401 digits"),
        ({"votes_0": float("inf"), "votes_1": 0}, "must count people"),
        ({"votes_0": 10**19, "votes_1": 0}, "votes; mend the count"),  # sums of it fit no column
        ({"votes_0": 1e300, "votes_1": 0}, "votes; mend the count"),
        ({"votes_0": 1.5, "votes_1": 0}, "must count people"),
    ],
)
def test_numbers_that_nothing_can_hold_name_their_row(tmp_path, capsys, changes, words, name):
    line = {"prompt": "a fox", "image_0": "0.png", "image_1": "1.png"} | changes
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
    if name == "t.csv":
        if 10**400 in changes.values():
            words = "is inf, and must"
            line = {key: "9" * 400 if value == 10**400 else value for key, value in line.items()}
            words = "must"
        (tmp_path / name).write_text(",".join(line) + "\n" + ",".join(map(str, line.values())) + "\n")
    else:
        (tmp_path / name).write_text(json.dumps(line if name == "t.jsonl" else [line]))
    assert ingest(["table", str(tmp_path / name), "--out", str(tmp_path / "P")]) == 2
    said = capsys.readouterr().err
    row = {"t.jsonl": "line 1", "t.json": "row 0", "t.csv": "line 2"}[name]
    assert f"{tmp_path / name} {row}" in said and words in said and len(said) < 500
    assert not (tmp_path / "P").exists()


def test_nan_is_an_answer_that_nobody_gave(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label_0": NaN}')
    assert entries(tmp_path / "t.jsonl")[0][0].answers == ()


@pytest.mark.parametrize(("prompt", "words"), [("a \\u0000 fox", "holds a NUL character"), ("half \\ud83d", "\\ud83d")])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_prompts_that_no_file_can_hold_name_their_row(tmp_path, capsys, prompt, words, name):
    line = f'{{"prompt": "{prompt}", "image_0": "0.png", "image_1": "1.png"}}'
    (tmp_path / name).write_text(line if name == "t.jsonl" else f"[{line}]")
    assert ingest(["table", str(tmp_path / name), "--out", str(tmp_path / "P")]) == 2
    said = capsys.readouterr().err
    assert ("line 1" if name == "t.jsonl" else "row 0") in said and words in said


def test_a_text_in_parquet_that_is_no_utf8_names_its_row_and_column(tmp_path, capsys):
    raw = pa.array([b"a fox", b"caf\xe9"], pa.binary()).view(pa.string())  # as some writers leave it
    table = pa.table({"prompt": raw, "image_0": [picture(0)] * 2, "image_1": [picture(1)] * 2})
    pq.write_table(table, tmp_path / "t.parquet")
    assert ingest(["table", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "P")]) == 2
    assert "t.parquet row 1: prompt is not UTF-8 text" in capsys.readouterr().err
