"""Pick-a-Pic, your own tables and image folders, saved datasets, and how a format is recognised."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats import FORMATS, PUBLISHED, choose, load
from dedpo_diffusion.pairs.formats.comparison import Answer
from dedpo_diffusion.pairs.formats.sources.hub import HubSource
from dedpo_diffusion.pairs.formats.table import IMAGES, bind
from support.format_rows import counts_row, pair_row
from support.layouts import LAYOUTS, PICTURES, add_to_tar, records, save_csv, save_jsonl, save_parquet, settings, with_files, write
from support.pictures import picture


def entries(source, format="auto", **changes):
    """All entries of a source, and the Chosen that made them."""
    wanted = settings(source, format, **changes)
    chosen = choose(wanted)
    return [e for where, row, folder in chosen.source.rows() for e in chosen.module.entries(row, where, folder, wanted)], chosen


def refusal(source, format="auto", **changes) -> str:
    with pytest.raises(UserError) as caught:
        entries(source, format, **changes)
    return str(caught.value)


def content(image):
    return image.read_bytes() if isinstance(image, Path) else image


def table(tmp_path, *rows, name="t.jsonl"):
    """A table of rows that need no images: paths stay paths."""
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row(**changes):
    return {"prompt": "a circle", "image_0": "a.png", "image_1": "b.png"} | changes


def labels(tmp_path, *rows, **changes):
    """The label of each row's one answer, None where it has none."""
    found, _ = entries(table(tmp_path, *rows), "table", **changes)
    assert all(len(entry.answers) <= 1 for entry in found)
    return [entry.answers[0].label_0 if entry.answers else None for entry in found]


# ---- one table in every layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_entries(tmp_path, layout):
    rows = records(11)
    found, chosen = entries(write(layout, tmp_path, rows))
    assert chosen.name == ("imagefolder" if LAYOUTS[layout][0] == "imagefolder" else "table")
    assert not chosen.module.WINNER_FIRST
    for entry, expected in zip(found, rows, strict=True):
        assert entry.prompt == expected["prompt"] and entry.key == expected["pair_id"]
        assert [content(image) for image in entry.images] == [expected["image_0"], expected["image_1"]]
        answer = expected["label_0"]
        assert entry.answers == (() if answer is None else (Answer(answer, expected["rater"]),))
        assert {name: str(value) for name, value in entry.source.items() if name != "__key__"} == {"seed": str(expected["seed"])}


def test_streamed_rows_give_the_same_entries(tmp_path):
    save_parquet(tmp_path / "train-00000-of-00001.parquet", records(5))
    source = HubSource(str(tmp_path), None, None)
    _, reader = bind(source, settings(tmp_path))
    streamed = [e for where, r, folder in source.rows() for e in reader.entries(r, where, folder, settings(tmp_path))]
    stored, _ = entries(tmp_path)
    assert [(e.prompt, e.images, e.answers, e.key) for e in streamed] == [(e.prompt, e.images, e.answers, e.key) for e in stored]


@trials(max_examples=50, deadline=None)
@given(label=st.one_of(st.none(), st.floats(0, 1)), rater=st.text(st.characters(categories=["L", "N"]), max_size=4))
def test_a_label_and_its_rater_survive_csv_and_jsonl(tmp_path_factory, label, rater):
    folder = tmp_path_factory.mktemp("round")
    rows = [records(1)[0] | {"label_0": label, "rater": rater}]
    for save, name in ((save_csv, "t.csv"), (save_jsonl, "t.jsonl")):
        (entry,), _ = entries(save(folder / name, rows))
        assert entry.answers == (() if label is None else (Answer(label, rater or None),))


# ---- names of columns


@pytest.mark.parametrize("pair", IMAGES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_documented_pair_of_image_columns_is_known(tmp_path, pair, upper):
    first, second = (name.title() if upper else name for name in pair)
    (entry,), chosen = entries(table(tmp_path, {"Caption": "a circle", first: "a.png", second: "b.png"}), "table")
    assert entry.images == (tmp_path / "a.png", tmp_path / "b.png") and entry.prompt == "a circle" and not entry.source
    assert ("chosen" in pair[0]) == chosen.module.WINNER_FIRST
    assert entry.answers == ((Answer(1.0),) if "chosen" in pair[0] else ())


@pytest.mark.parametrize("names", [("prompt",), ("caption",), ("text",), ("prompt", "caption", "text"), ("caption", "text")])
def test_the_first_name_of_a_prompt_counts_and_the_others_are_kept(tmp_path, names):
    line = {"image_0": "a.png", "image_1": "b.png"} | {name: f"in {name}" for name in reversed(names)}
    (entry,), _ = entries(table(tmp_path, line))
    assert entry.prompt == f"in {names[0]}" and dict(entry.source) == {name: f"in {name}" for name in names[1:]}


@pytest.mark.parametrize("name", ["rater", "user", "annotator", "worker", "user_id"])
@pytest.mark.parametrize("value", ["ann", 7, 7.0])
def test_a_rater_is_known_by_any_of_its_names(tmp_path, name, value):
    (entry,), _ = entries(table(tmp_path, row(label_0=1, **{name: value})))
    assert entry.answers == (Answer(1.0, str(value).removesuffix(".0")),)


@pytest.mark.parametrize("name", ["pair_id", "id", "key"])
def test_a_key_is_known_by_any_of_its_names(tmp_path, name):
    (entry, other), _ = entries(table(tmp_path, row(label_0=1, **{name: 12}), row(label_0=1)))
    assert entry.key == "12" and other.key is None


@pytest.mark.parametrize(
    ("columns", "mapping", "words"),
    [
        ({"image_0": "a", "image_1": "b"}, {}, "no column is the prompt (called prompt, caption, text); the columns are image_0, image_1"),
        ({"prompt": "a", "picture": "a"}, {}, "no two columns are the images (called image_0 and image_1; "),
        (row(image_2="c"), {}, "several pairs of columns could be the two images (image_0 and image_1; image_1 and image_2)"),
        (row(label_0=1, winner=0), {}, "several columns could be the answer (label_0, winner); say which with --columns"),
        (row(winner=0, votes_0=1, votes_1=2), {}, "several columns could be the answer (votes_0 and votes_1, winner)"),
        ({"prompt": "a", "chosen": "a", "rejected": "b", "label_0": 1}, {}, "could be the answer (chosen and rejected, label_0)"),
        (row(label_1=1), {}, "there is a column label_1, and none of the first image"),
        ({"prompt": "a", "left": "a", "right": "b", "label_0": 1, "label_1": 0, "label_left": 1, "label_right": 0}, {}, "could all be the"),
        ({"prompt": "a", "image1": "a", "image2": "b", "label_0": 1, "label_1": 0, "label_2": 1}, {}, "label_1, label_2 could all be the"),
        (row(seed=1, source_seed=2), {}, "the columns seed and source_seed would both be kept as source_seed"),
        ({"prompt": "a", "chosen": "a", "rejected": "b", "swapped": True}, {}, "the column 'swapped'"),
        (row(), {"promt": "prompt"}, "--columns names 'promt', which is none of prompt, image_0"),
        (row(), {"prompt": "my caption"}, "prompt is the column 'my caption', which is not there (there are prompt, image_0, image_1)"),
        (row(), {"image_0": "image_1"}, "only one of image_0 and image_1"),
        (row(), {"prompt": "image_0", "key": "image_0"}, "the column 'image_0' twice"),
        (row(label_1=1), {"label_1": "label_1"}, "--columns names label_1 without label_0"),
        (row(c="c", d="d"), {"image_0": "image_0", "image_1": "image_1", "chosen": "c", "rejected": "d"}, "name one of these pairs"),
    ],
)  # fmt: skip
def test_columns_that_are_missing_or_unclear_are_named_with_the_remedy(tmp_path, columns, mapping, words):
    said = refusal(table(tmp_path, columns), "table", columns=mapping)
    assert words in said and said.startswith(str(tmp_path / "t.jsonl"))


def test_columns_say_what_names_do_not(tmp_path):
    line = {"my caption": "a circle", "before": "a.png", "after": "b.png", "vote": "after", "who": "ann", "prompt": "kept", "label_0": 3}
    mapping = {"prompt": "my caption", "image_0": "before", "image_1": "after", "winner": "vote", "rater": "who"}
    (entry,), chosen = entries(table(tmp_path, line), columns=mapping)
    assert chosen.name == "table" and entry.prompt == "a circle" and entry.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert entry.answers == (Answer(0.0, "ann"),) and dict(entry.source) == {"prompt": "kept", "label_0": 3}


def test_columns_decide_between_an_order_and_a_label(tmp_path):
    path = table(tmp_path, {"prompt": "a", "chosen": "a.png", "rejected": "b.png", "label_0": 0.2})
    (entry,), chosen = entries(path, columns={"chosen": "chosen", "rejected": "rejected"})
    assert entry.answers == (Answer(1.0),) and chosen.module.WINNER_FIRST and dict(entry.source) == {"label_0": 0.2}
    (entry,), chosen = entries(path, columns={"image_0": "chosen", "image_1": "rejected", "label_0": "label_0"})
    assert entry.answers == (Answer(0.2),) and not chosen.module.WINNER_FIRST and not entry.source


def test_columns_are_only_for_own_tables(tmp_path):
    assert "pickapic has columns of its own" in refusal(tmp_path, "pickapic", columns={"prompt": "text"})


# ---- answers


COUNTED_FROM_0 = {0: 1.0, "0": 1.0, "image_0": 1.0, 1: 0.0, "1": 0.0, "image_1": 0.0, " Image_1 ": 0.0, "1.0": 0.0}
NAMED = {**COUNTED_FROM_0, **{word: 0.5 for word in ("tie", "both", "equal", "draw", "TIE")}, None: None, "": None, " ": None}
WORDS = {
    ("image_0", "image_1"): {**NAMED, "a.png": 1.0, "b.png": 0.0},
    ("image0", "image1"): {**NAMED, "image0": 1.0, "image1": 0.0},
    ("image_a", "image_b"): {**NAMED, "a": 1.0, "b": 0.0, "image_a": 1.0, "B": 0.0},
    ("left", "right"): {**NAMED, "left": 1.0, "right": 0.0, "Right": 0.0},
    ("left_image", "right_image"): {**NAMED, "left": 1.0, "right": 0.0, "right_image": 0.0},
    ("image_1", "image_2"): {1: 1.0, "1": 1.0, "image_1": 1.0, 2: 0.0, "2": 0.0, "image_2": 0.0, "2.0": 0.0, "tie": 0.5, "": None},
    ("image1", "image2"): {1: 1.0, "image1": 1.0, "2": 0.0, "image2": 0.0, "draw": 0.5, None: None},
}  # fmt: skip


@pytest.mark.parametrize("name", ["winner", "preferred", "preference", "choice", "chosen"])
@pytest.mark.parametrize("pair", WORDS)
def test_every_documented_word_names_its_winner(tmp_path, pair, name):
    lines = [{"prompt": "a", pair[0]: "a.png", pair[1]: "b.png", name: word} for word in WORDS[pair]]
    assert labels(tmp_path, *lines) == list(WORDS[pair].values())


@pytest.mark.parametrize(
    ("pair", "word", "legal"),
    [
        (("image_0", "image_1"), 2, "image_0 or 0 (the first image), image_1 or 1 (the second), tie or both or equal or draw (a tie)"),
        (("image_0", "image_1"), "a", "image_0 or 0"),
        (("image_0", "image_1"), 0.7, '--columns \'{"label_0": "winner"}\''),
        (("image_0", "image_1"), True, "winner is 'True'"),
        (("image_1", "image_2"), 0, "image_1 or 1 (the first image), image_2 or 2 (the second)"),
        (("image_1", "image_2"), "image_0", "image_1 or 1 (the first image)"),
        (("left", "right"), "a", "left or image_0 or 0 (the first image), right or image_1 or 1 (the second)"),
    ],
)
def test_a_word_that_names_no_winner_is_refused_with_the_legal_ones(tmp_path, pair, word, legal):
    path = table(
        tmp_path, {"prompt": "a", pair[0]: "a", pair[1]: "b", "winner": None}, {"prompt": "a", pair[0]: "x", pair[1]: "y", "winner": word}
    )
    said = refusal(path, "table")
    assert said.startswith(f"{path} line 2: winner is ") and legal in said


def test_images_named_by_the_columns_option_are_counted_as_their_names_end(tmp_path):
    from_one, reverse, bare = {1: 1.0, 2: 0.0}, {1: 1.0, 0: 0.0}, {0: 1.0, 1: 0.0, "y": 0.0}
    for first, second, words in (("pic1", "pic2", from_one), ("pic1", "pic0", reverse), ("x", "y", bare)):
        lines = [{"prompt": "a", first: "a.png", second: "b.png", "winner": word} for word in words]
        assert labels(tmp_path, *lines, columns={"image_0": first, "image_1": second}) == list(words.values())
    swapped = {"image_0": "image_1", "image_1": "image_0"}
    assert labels(tmp_path, *(row(winner=word) for word in ("image_1", "image_0", 1, 0)), columns=swapped) == [1.0, 0.0, 1.0, 0.0]


def test_in_tables_counted_from_one_label_1_and_votes_1_are_the_first_images(tmp_path):
    line = {"prompt": "a", "image_1": "a.png", "image_2": "b.png"}
    assert labels(tmp_path, line | {"label_1": 0.75, "label_2": 0.25}) == [0.75]
    assert labels(tmp_path, line | {"label_1": 0.75}) == [0.75]
    assert labels(tmp_path, line | {"label_0": 0.75, "label_1": 0.25}) == [0.75]
    (entry,), _ = entries(table(tmp_path, line | {"votes_1": 3, "votes_2": 1}))
    assert entry.answers == (Answer(1.0, votes=3), Answer(0.0, votes=1))


def test_labels_may_be_soft_and_may_be_missing(tmp_path):
    values = {0: 0, 1: 1, 0.5: 0.5, 0.3: 0.3, "0.3": 0.3, "": None, None: None, "1": 1}
    assert labels(tmp_path, *(row(label_0=value) for value in values)) == list(values.values())
    assert labels(tmp_path, row(label_0=0.3, label_1=0.7), row(label_0=None, label_1=None)) == [0.3, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_0": 1.5}, "label_0 is 1.5, and must be in [0, 1] (1: the first image is preferred); mend it"),
        ({"label_0": -1}, "label_0 is -1, and must be in [0, 1]"),
        ({"label_0": 2}, 'if it names an image, say so with --columns \'{"winner": "label_0"}\''),
        ({"label_0": "first"}, "label_0 is 'first', and must be a number"),
        ({"label_0": 1, "label_1": 1}, "label_0 is 1 and label_1 is 1; they must add up to 1, or both be empty"),
        ({"label_0": 1, "label_1": None}, "label_0 is 1 and label_1 is None"),
        ({"votes_0": 1, "votes_1": -1}, "votes_1 is -1, and must count people"),
        ({"votes_0": 0.5, "votes_1": 1}, "votes_0 is 0.5, and must count people"),
        ({"votes_0": 1, "votes_1": None}, "votes_1 is empty, and other counts are not; write 0"),
        ({"prompt": None}, "prompt is missing, and must be text"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"image_0": "https://example.invalid/a.png"}, "image_0 is an address"),
        ({"image_1": "../b.png"}, "give --images the folder"),
        ({"image_1": 4}, "image_1 holds int"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line_and_the_remedy(tmp_path, changes, words):
    good = {name: 0.5 if name.startswith("label") else 1 for name in changes if name.startswith(("label", "votes"))}
    said = refusal(table(tmp_path, row(**good), row(**good), row(**{**good, **changes})), "table")
    assert f"{tmp_path / 't.jsonl'} line 3" in said and words in said


def test_votes_are_counted_and_raters_of_counts_are_only_kept(tmp_path):
    lines = [
        row(votes_0=2, votes_1=0, votes_tie=1, user=5),
        row(votes_0=0, votes_1=0, votes_tie=0),
        row(votes_0=None, votes_1="", votes_tie=None),
    ]
    found, _ = entries(table(tmp_path, *lines))
    assert [entry.answers for entry in found] == [(Answer(1.0, votes=2), Answer(0.5, votes=1)), (), ()]
    assert found[0].source["user"] == 5


def test_a_missing_image_is_left_to_the_intake(tmp_path):
    found, _ = entries(table(tmp_path, row(image_0=None), row(image_0=""), row(image_0=" ")))
    assert [entry.images for entry in found] == [(None, tmp_path / "b.png")] * 3


def test_images_may_lie_in_another_folder(tmp_path):
    (entry,), _ = entries(table(tmp_path, row()), images=tmp_path.parent)
    assert entry.images == (tmp_path.parent / "a.png", tmp_path.parent / "b.png")


def test_other_columns_are_kept_and_bytes_leave_their_number(tmp_path):
    line = {"prompt": "a", "image_0": PICTURES[0], "image_1": PICTURES[1], "model": "sdxl", "steps": 20, "good": True, "none": None}
    line |= {"tags": ["a", "ä"], "size": {"w": 3}, "mask": b"12345", "thumbs": [{"bytes": b"123", "path": None}], "source_seed": 4}
    (entry,), _ = entries(save_parquet(tmp_path / "t.parquet", [line]), "table")
    assert dict(entry.source) == {
        "model": "sdxl", "steps": 20, "good": True, "none": None, "tags": '["a", "ä"]', "size": '{"w": 3}', "seed": 4,
        "mask": "5 bytes, not kept", "thumbs": '[{"bytes": "3 bytes, not kept", "path": null}]',
    }  # fmt: skip


def test_a_webdatasets_columns_go_by_their_names_without_endings(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        files = {
            "prompt.txt": b"a",
            "image_0.jpg": PICTURES[0],
            "image_1.png": PICTURES[1],
            "winner.txt": b"image_1\n",
            "model.txt": b"sdxl",
        }
        for name, data in files.items():
            add_to_tar(tar, f"7.{name}", data)
    (entry,), _ = entries(tmp_path / "t.tar")
    assert (entry.key, entry.images, entry.answers) == ("7", (PICTURES[0], PICTURES[1]), (Answer(0.0),))
    assert dict(entry.source) == {"model": "sdxl"}


# ---- Pick-a-Pic


def pick(i, label: float | None = 1.0, **changes):
    """One row of Pick-a-Pic v2."""
    return {
        "caption": f"a picture of {i}", "jpg_0": PICTURES[0], "jpg_1": PICTURES[1], "label_0": label,
        "label_1": None if label is None else 1 - label, "has_label": True, "are_different": True, "image_0_uid": f"u0-{i}",
        "best_image_uid": f"u0-{i}", "ranking_id": 1000 + i, "user_id": 7, "model_0": "sdxl", "image_0_url": "https://example.invalid/no",
    } | changes  # fmt: skip


def test_pick_a_pic_rows(tmp_path):
    rows = [pick(0), pick(1, 0.0), pick(2, 0.5), pick(3, 0.0, label_1=0.0, has_label=False), pick(4, are_different=False)]
    found, chosen = entries(save_parquet(tmp_path / "train.parquet", rows))
    assert (chosen.name, chosen.why) == ("pickapic", "columns caption, jpg_0, jpg_1, label_0 (parquet)")
    assert [entry.answers for entry in found] == [(Answer(1.0, "7"),), (Answer(0.0, "7"),), (Answer(0.5, "7"),), (), (Answer(1.0, "7"),)]
    assert [entry.same for entry in found] == [False, False, False, False, True]
    assert [entry.key for entry in found] == [str(1000 + i) for i in range(5)]
    assert found[1].images == (PICTURES[0], PICTURES[1]) and found[1].prompt == "a picture of 1"
    assert dict(found[0].source) == {"image_0_uid": "u0-0", "best_image_uid": "u0-0", "ranking_id": 1000, "user_id": 7, "model_0": "sdxl"}


def test_pick_a_pic_without_its_optional_columns(tmp_path):
    optional = ("has_label", "are_different", "ranking_id", "user_id", "label_1")
    rows = [{name: value for name, value in line.items() if name not in optional} for line in (pick(0, 0.25), pick(1, None))]
    found, _ = entries(save_parquet(tmp_path / "train.parquet", rows))
    assert [(entry.answers, entry.key, entry.same) for entry in found] == [((Answer(0.25),), None, False), ((), None, False)]


def test_the_webdataset_mirror_of_pick_a_pic_has_labels_as_text(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for key, label_0, label_1 in (("a", b"1.0", b"0.0"), ("b", b"0.5", b"0.5\n")):
            values = {"jpg_0.jpg": PICTURES[0], "jpg_1.jpg": PICTURES[1], "label_0.txt": label_0, "label_1.txt": label_1}
            for name, data in (values | {"original_prompt.txt": f"prompt {key}".encode()}).items():
                add_to_tar(tar, f"{key}.{name}", data)
    found, chosen = entries(tmp_path / "t.tar")
    assert chosen.why == "columns original_prompt.txt, jpg_0.jpg, jpg_1.jpg, label_0.txt (webdataset)"
    assert [(e.prompt, e.key, e.answers) for e in found] == [("prompt a", "a", (Answer(1.0),)), ("prompt b", "b", (Answer(0.5),))]
    assert found[0].images == (PICTURES[0], PICTURES[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_1": 1.0}, "label_0 is 1.0 and label_1 is 1.0; both must lie in [0, 1] and add up to 1"),
        ({"label_0": 1.5, "label_1": -0.5}, "[0, 1]"),
        ({"label_0": None}, "label_0 is None and label_1 is 0.0; both must lie"),
        ({"caption": None}, "caption is missing"),
    ],
)
def test_bad_rows_of_pick_a_pic(tmp_path, changes, words):
    path = save_parquet(tmp_path / "train.parquet", [pick(0), pick(1, **changes)])
    said = refusal(path, "pickapic")
    assert said.startswith(f"{path} row 1") and words in said


def test_pick_a_pic_without_images_is_told_apart(tmp_path):
    rows = [{name: value for name, value in pick(0).items() if not name.startswith("jpg")}]
    said = refusal(save_parquet(tmp_path / "train.parquet", rows), "pickapic")
    assert "is not pickapic: it has the columns caption, label_0" in said and "jpg_1 (the images themselves)" in said


# ---- image folders and saved datasets


def test_the_format_imagefolder_wants_one(tmp_path):
    assert "is no image folder" in refusal(save_csv(tmp_path / "t.csv", records(2)), "imagefolder")


def test_an_image_folder_of_winners(tmp_path):
    (tmp_path / "metadata.csv").write_text("prompt,chosen_file_name,rejected_file_name\na,x.png,y.png\n")
    (entry,), chosen = entries(tmp_path)
    assert chosen.name == "imagefolder" and chosen.module.WINNER_FIRST
    assert entry.images == (tmp_path / "x.png", tmp_path / "y.png") and entry.answers == (Answer(1.0),)


def test_a_saved_dataset_says_what_its_rows_are(tmp_path):
    from datasets import Dataset

    Dataset.from_list([pick(0)]).save_to_disk(str(tmp_path / "picks"))
    (entry,), chosen = entries(tmp_path / "picks", "datasets")
    assert (chosen.name, chosen.why) == ("pickapic", "columns caption, jpg_0, jpg_1, label_0 (datasets)") and entry.key == "1000"
    (entry,), chosen = entries(write("datasets", tmp_path, records(1)), "datasets")
    assert chosen.name == "table" and entry.images == (PICTURES[0], PICTURES[3])
    assert "is no folder that save_to_disk of `datasets` wrote" in refusal(save_csv(tmp_path / "t.csv", records(1)), "datasets")


# ---- which format


def test_every_format_has_what_formats_have():
    for name in FORMATS:
        module = load(name)
        if name in PUBLISHED:
            assert callable(module.recognise) and callable(module.entries) and isinstance(module.WINNER_FIRST, bool)
            assert module.recognise(("nothing", "known"), {"nothing": 1, "known": 2}) is None
        else:
            assert hasattr(module, "bind") or hasattr(module, "open")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    assert refusal(tmp_path, "picapic").startswith("unknown format 'picapic': known: pickapic, hpdv2, ") and "auto" in refusal(
        tmp_path, "x"
    )


def test_nothing_known_is_said_with_what_was_seen(tmp_path):
    pq.write_table(pa.table({"url": ["x"], "score": [1]}), tmp_path / "t.parquet")
    said = refusal(tmp_path / "t.parquet")
    assert "t.parquet: no column is the prompt (called prompt, caption, text); the columns are url, score" in said
    assert said.endswith(
        "(and no published format has these columns: pickapic, hpdv2, hpdv3, imagereward, open_image_preferences, rapidata, exported, "
        "labelstudio, argilla)"
    )


def test_several_formats_that_fit_are_named(tmp_path):
    line = pair_row() | counts_row()
    said = refusal(save_parquet(tmp_path / "t.parquet", [line]))
    assert "could be of several formats (hpdv3: columns prompt, path1" in said and "rapidata: " in said and "instead of auto" in said
    assert entries(tmp_path / "t.parquet", "rapidata")[1].name == "rapidata"


def test_a_table_without_rows_is_read_to_its_end(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,image_0,image_1\n")
    assert entries(tmp_path / "t.csv")[0] == []
    (tmp_path / "t.jsonl").write_text("")
    assert "the columns are none; " in refusal(tmp_path / "t.jsonl")


def test_where_an_image_lies_is_told_by_the_table(tmp_path):
    rows = with_files(records(2), tmp_path / "deep")
    found, _ = entries(table(tmp_path / "deep", *rows))
    assert all(image.is_file() for entry in found for image in entry.images)
    assert picture(0) == found[0].images[0].read_bytes()
