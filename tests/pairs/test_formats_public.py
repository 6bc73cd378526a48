"""HPDv2, HPDv3, ImageReward, Open Image Preferences, Rapidata: files of their layout with real small images, and their traps."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats import hpdv2, hpdv3, imagereward, open_image_preferences, rapidata
from dedpo_diffusion.pairs.formats.comparison import Answer
from support.format_rows import (
    chosen_row,
    counts_row,
    image_row,
    labels,
    pair_row,
    ranked_row,
    ranking_row,
    read,
    result_row,
    settings,
    shares_row,
    train_row,
    two_images,
)

MODULES = {
    "hpdv2": hpdv2,
    "hpdv3": hpdv3,
    "imagereward": imagereward,
    "open_image_preferences": open_image_preferences,
    "rapidata": rapidata,
}


ROWS = {
    "hpdv2": [train_row(), train_row(file_path=None, image_path=["a.jpg", "b.jpg"]), ranked_row()],
    "hpdv3": [pair_row(), {name: pair_row()[name] for name in ("prompt", "path1", "path2", "model1", "model2")}],
    "imagereward": [ranking_row(), image_row()],
    "open_image_preferences": [result_row(), chosen_row()],
    "rapidata": [counts_row(), shares_row()],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_row_is_recognised_by_its_own_format_and_no_other(name, row):
    row = {key: value for key, value in row.items() if value is not None}
    found = {other: module.recognise(list(row), row) for other, module in MODULES.items()}
    assert [other for other, why in found.items() if why] == [name]
    assert found[name].startswith("columns ")
    for module in MODULES.values():
        assert module.recognise(["caption", "jpg_0", "jpg_1", "label_0"], None) is None
        assert module.recognise(["prompt", "chosen", "rejected"], None) is None  # people's own tables


# ---- rankings


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize(("module", "make"), [(hpdv2, ranked_row), (imagereward, ranking_row)])
def test_n_ranked_images_make_every_pair_once_under_unique_names(tmp_path, module, make, count):
    row = make(tuple(range(1, count + 1)))
    found = read(module, row, tmp_path)
    names = [Path(name).name for name in row.get("image_path") or row["generations"]]
    pairs = [tuple(image.name for image in entry.images) for entry in found]
    assert pairs == list(combinations(names, 2)) and len(pairs) == count * (count - 1) // 2
    assert len({entry.key for entry in found}) == len(found)
    assert all(labels(entry) == [1.0] for entry in found)  # earlier images have lower ranks


@pytest.mark.parametrize(("module", "make"), [(hpdv2, ranked_row), (imagereward, ranking_row)])
def test_reversed_ranks_flip_every_label_and_keep_ties(tmp_path, module, make):
    ranks = (2, 1, 2, 4, 1)
    there = [labels(entry)[0] for entry in read(module, make(ranks), tmp_path)]
    back = [labels(entry)[0] for entry in read(module, make(tuple(-rank for rank in ranks)), tmp_path)]
    assert there == [0.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 0.0]
    assert [1 - label for label in there] == back


# ---- HPDv2


def test_the_preferred_image_of_a_train_row_wins(tmp_path):
    (tmp_path / "train").mkdir()
    (entry,) = read(hpdv2, train_row(), tmp_path)
    assert entry.images == (tmp_path / "train" / "00001.jpg", tmp_path / "train" / "00002.jpg")
    assert (entry.prompt, entry.key, labels(entry)) == ("a red fox", "00001-00002", [0.0])
    (swapped,) = read(hpdv2, train_row(human_preference=[1, 0]), tmp_path)
    (tie,) = read(hpdv2, train_row(human_preference=[1, 1]), tmp_path)
    assert labels(swapped) == [1.0] and labels(tie) == [0.5]
    (other,) = read(hpdv2, {"prompt": "x", "image_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}, tmp_path)
    assert other.images[0] == tmp_path / "train" / "a.jpg" and labels(other) == [1.0]


@pytest.mark.parametrize("name", ["00001.jpg", "train/00001.jpg"])
def test_hpdv2_images_are_found_from_both_folders(tmp_path, name):
    (tmp_path / "train").mkdir()
    row = train_row(file_path=[name, "00002.jpg"])
    assert read(hpdv2, row, tmp_path)[0].images[0] == tmp_path / "train" / "00001.jpg"
    assert read(hpdv2, row, tmp_path / "train")[0].images[0] == tmp_path / "train" / "00001.jpg"


def test_each_person_of_a_test_row_answers_for_each_pair(tmp_path):
    people = [(1, 2, 3, 4), (2, 1, 3, 4), (3, 1, 2, 4)]
    found = read(hpdv2, ranked_row((2, 1, 3, 4), people), tmp_path)
    assert found[0].answers == (Answer(1.0, "user0"), Answer(0.0, "user1"), Answer(0.0, "user2"))
    assert labels(found[2]) == [1.0, 1.0, 1.0]  # image 3 is everybody's last
    assert found[0].source == {"rank_0": 2.0, "rank_1": 1.0}
    older = read(hpdv2, ranked_row((2, 1, 3, 4)), tmp_path)
    assert [labels(entry) for entry in older] == [[0.0], [1.0], [1.0], [1.0], [1.0], [1.0]]
    assert older[0].answers == (Answer(0.0),)
    renamed = ranked_row((2, 1, 3, 4)) | {"raw_annotations": [{"annotation": [2, 1, 3, 4], "user_hash": "u"}]}
    assert read(hpdv2, renamed, tmp_path)[0].answers == (Answer(0.0, "u"),)


def test_people_who_contradict_their_average_are_refused(tmp_path):
    backwards = [(4, 3, 2, 1)] * 3
    with pytest.raises(UserError, match=r"list\.json row 3.*contradict their own average.*remove raw_annotations"):
        read(hpdv2, ranked_row((1, 2, 3, 4), backwards), tmp_path)
    split = [(1, 2, 3, 4), (2, 1, 4, 3), (1, 3, 2, 4)]  # people may differ from each other
    assert len(read(hpdv2, ranked_row((1, 2, 3, 4), split), tmp_path)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_path": "00001.jpg"}, "file_path is '00001.jpg', and must be a list"),
        ({"file_path": ["00001.jpg"]}, "must be a list of two images"),
        ({"human_preference": [1]}, r"human_preference is \[1\], and must have a number for each of the 2 images"),
        ({"human_preference": [0.3, 0.7]}, "must be 1 for the preferred of two"),
        ({"human_preference": [1, None]}, "must have a number for each"),
        ({"prompt": None}, "prompt is missing"),
        ({"file_path": ["../00001.jpg", "00002.jpg"]}, "leaves"),
    ],
)
def test_bad_train_rows_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"list\.json row 3.*{message}"):
        read(hpdv2, train_row(**changes), tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ranked_row() | {"rank": [1, 2, 3]}, "rank is .* and must have a number for each of the 4 images"),
        (ranked_row() | {"rank": [1, 2, "x", 4]}, "rank 2 is 'x', and must be a number"),
        (ranked_row() | {"raw_annotations": [[1, 2, 3, 4]]}, "raw_annotations 0 is .* must hold user_hash and rank or annotation"),
        (ranked_row(people=[(1, 2, 3)]), r"raw_annotations 0 is \[1, 2, 3\], and must have a number for each"),
    ],
)
def test_bad_test_rows_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"list\.json row 3.*{message}"):
        read(hpdv2, row, tmp_path)


def test_a_test_row_without_ranks_has_no_answers(tmp_path):
    found = read(hpdv2, {"prompt": "x", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": None}, tmp_path)
    assert [entry.answers for entry in found] == [(), (), ()]


def write_lists(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps([train_row()] if "train" in name else [ranked_row()]))
    return folder


def test_a_folder_of_hpdv2_wants_a_split_and_unpacked_images(tmp_path):
    folder = write_lists(tmp_path / "HPD", "train.json", "test.json")
    (folder / "test.tar.gz").write_bytes(b"packed")
    with pytest.raises(UserError, match="has several splits; give --split one of train, test"):
        hpdv2.open(str(folder), settings(folder))
    with pytest.raises(UserError, match="no split 'val'; give --split one of train, test"):
        hpdv2.open(str(folder), settings(folder, split="val"))
    with pytest.raises(UserError, match=r"test\.json are still packed in .*test\.tar\.gz; unpack it there"):
        hpdv2.open(str(folder), settings(folder, split="test"))
    (folder / "test").mkdir()
    source = hpdv2.open(str(folder), settings(folder, split="test"))
    ((where, row, root),) = source.rows()
    assert where == f"{folder / 'test.json'} row 0" and root == folder and row["prompt"] == "a blue boat"
    images = tmp_path / "images"
    images.mkdir()
    ((_, _, root),) = hpdv2.open(str(folder), settings(folder, split="test", images=images)).rows()
    assert root == images


def test_another_folder_or_a_file_is_opened_as_any_table(tmp_path):
    folder = write_lists(tmp_path / "lists", "train.json")
    for source in (folder, folder / "train.json"):
        assert hpdv2.open(str(source), settings(source)).kind == "json"
    with pytest.raises(UserError, match="is no file, no folder and no hub id"):
        hpdv2.open(str(tmp_path / "no" / "such" / "thing"), settings())


# ---- HPDv3


def test_hpdv3_counts_votes_for_path1(tmp_path):
    (entry,) = read(hpdv3, pair_row(), tmp_path)
    assert hpdv3.WINNER_FIRST and entry.images == (tmp_path / "images/u1.jpg", tmp_path / "images/u2.jpg")
    assert entry.answers == (Answer(1.0, votes=12), Answer(0.0, votes=7))
    assert entry.source == {
        "model1": "flux",
        "model2": "infinity",
        "confidence": 0.9999907,
        "choice_1": 12.0,
        "choice_2": 7.0,
        "choice_reversed": False,
    }


def test_hpdv3_gives_path1_the_greater_count_in_whatever_order_and_says_so(tmp_path):
    (entry,) = read(hpdv3, pair_row(choice_dist=[7, 12]), tmp_path)
    assert entry.answers == (Answer(1.0, votes=12), Answer(0.0, votes=7))
    assert (entry.source["choice_1"], entry.source["choice_2"], entry.source["choice_reversed"]) == (7.0, 12.0, True)
    (even,) = read(hpdv3, pair_row(choice_dist=[8, 8]), tmp_path)
    assert even.answers == (Answer(1.0, votes=8), Answer(0.0, votes=8)) and even.source["choice_reversed"] is False


@pytest.mark.parametrize("choice", [None, [0, 0], "absent"])
def test_hpdv3_without_counts_says_that_path1_won(tmp_path, choice):
    row = pair_row(choice_dist=choice, confidence=None)
    if choice == "absent":
        row = {key: row[key] for key in ("prompt", "path1", "path2", "model1", "model2")}
    (entry,) = read(hpdv3, row, tmp_path)
    assert entry.answers == (Answer(1.0),) and entry.source == {"model1": "flux", "model2": "infinity"}


def test_hpdv3_shares_become_a_soft_answer(tmp_path):
    (entry,) = read(hpdv3, pair_row(choice_dist=[0.3, 0.7]), tmp_path)
    assert [answer.votes for answer in entry.answers] == [1] and labels(entry) == [pytest.approx(0.7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice_dist": [12]}, "must be two counts of votes"),
        ({"choice_dist": "12, 7"}, "must be two counts of votes"),
        ({"choice_dist": [-1, 3]}, "must be two counts of votes"),
        ({"choice_dist": [1.5, 2.5]}, "neither whole votes nor shares"),
        ({"path1": None}, "path1 is missing"),
        ({"path2": "../../etc/passwd"}, "leaves"),
    ],
)
def test_bad_hpdv3_rows_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"list\.json row 3.*{message}"):
        read(hpdv3, pair_row(**changes), tmp_path)


# ---- Open Image Preferences


def test_each_submitted_answer_counts_and_ties_are_kept_apart(tmp_path):
    (entry,) = read(open_image_preferences, result_row(("both_good", "image_1", "image_2", "both_bad", "toxic_content")), tmp_path)
    assert entry.answers == (Answer(0.5, "user0"), Answer(1.0, "user1"), Answer(0.0, "user2"), Answer(0.5, "user3"))
    assert {name: entry.source[name] for name in ("both_good", "both_bad", "toxic", "not_submitted")} == {
        "both_good": 1,
        "both_bad": 1,
        "toxic": 1,
        "not_submitted": 0,
    }
    assert (entry.prompt, entry.key) == ("a manga street", "3368-quality")
    assert (entry.source["model_1"], entry.source["evolution"]) == ("dev", "quality")


def test_drafts_and_discarded_answers_do_not_count(tmp_path):
    row = result_row() | {"preference.responses.status": ["draft", "submitted", "discarded"]}
    (entry,) = read(open_image_preferences, row, tmp_path)
    assert entry.answers == (Answer(1.0, "user1"),) and entry.source["not_submitted"] == 2
    unanswered = {f"preference.responses{end}": None for end in ("", ".users", ".status")}
    (nobody,) = read(open_image_preferences, result_row() | unanswered, tmp_path)
    assert nobody.answers == ()


def test_hub_addresses_are_files_below_images(tmp_path):
    (entry,) = read(open_image_preferences, result_row(), tmp_path)
    assert entry.images == (tmp_path / "image_quality_dev/3368.jpg", tmp_path / "image_quality_sd/3368.jpg")
    with pytest.raises(UserError, match=r"images\.image_1 is an address"):
        read(open_image_preferences, result_row())
    images = result_row()["images"]
    for tail, message in (("../../secret.jpg", "leaves"), ("%2e%2e/secret.jpg", "leaves")):
        with pytest.raises(UserError, match=message):
            read(open_image_preferences, result_row(images=images | {"image_1": f"https://hub/resolve/main/{tail}"}), tmp_path)
    (rooted,) = read(open_image_preferences, result_row(images=images | {"image_1": "https://hub/resolve/main//etc/passwd"}), tmp_path)
    assert rooted.images[0] == tmp_path / "etc/passwd"
    with pytest.raises(UserError, match="is an address"):
        read(open_image_preferences, result_row(images=images | {"image_1": "https://elsewhere/a.jpg"}), tmp_path)


def test_flat_columns_are_read_too_and_the_embedding_is_not_the_prompt(tmp_path):
    row = result_row()
    flat = {f"images.{name}": value for name, value in row.pop("images").items()} | row
    assert open_image_preferences.recognise(list(flat), flat)
    (entry,) = read(open_image_preferences, flat, tmp_path)
    assert entry.prompt == "a manga street" and entry.images[1] == tmp_path / "image_quality_sd/3368.jpg"
    row["images"] = {"image_1": b"x", "image_2": b"y"}
    with pytest.raises(UserError, match="prompt is missing"):
        read(open_image_preferences, row, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference.responses": ["image_3", "image_1", "image_1"]}, "holds 'image_3', and must be one of image_1, image_2, both_good"),
        ({"preference.responses.users": ["u"]}, "has 3 items and preference.responses.users 1"),
    ],
)
def test_bad_responses_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"list\.json row 3.*{message}"):
        read(open_image_preferences, result_row() | changes, tmp_path)


def test_only_the_binarised_set_lists_the_winner_first():
    row = chosen_row(4)
    assert open_image_preferences.winner_first(list(row)) and not open_image_preferences.winner_first(list(result_row()))
    (entry,) = read(open_image_preferences, row)
    assert entry.images == (row["chosen"]["bytes"], row["rejected"]["bytes"]) and entry.answers == (Answer(1.0),)
    assert entry.key == "4-simplified" and entry.source["chosen_model"] == "black-forest-labs/FLUX.1-dev"


# ---- Rapidata


def test_pieces_of_a_rapidata_set_follow_each_other(tmp_path):
    for piece in (2, 1):
        rows = pa.Table.from_pylist([counts_row(piece, 0, prompt=f"piece {piece}")])
        pq.write_table(rows, tmp_path / f"train_000{piece}-00000-of-00001.parquet")
    source = rapidata.open(str(tmp_path), settings(tmp_path))
    assert [row["prompt"] for _, row, _ in source.rows()] == ["piece 1", "piece 2"]
    one = rapidata.open(str(tmp_path), settings(tmp_path, split="train_0002"))
    assert [row["prompt"] for _, row, _ in one.rows()] == ["piece 2"]


def test_whole_votes_are_counted():
    (entry,) = read(rapidata, counts_row())
    assert entry.answers == (Answer(1.0, votes=17), Answer(0.0, votes=9))
    assert entry.key == "dalle-3-155_0.jpg-flux-155_0.jpg" and entry.source["model2"] == "flux"
    assert entry.images == tuple(two_images()[f"image{k}"]["bytes"] for k in (1, 2))
    assert read(rapidata, counts_row(0, 0))[0].answers == ()
    assert read(rapidata, counts_row(0, 4))[0].answers == (Answer(0.0, votes=4),)


def test_weighted_shares_become_one_answer_that_weighs_its_votes():
    (entry,) = read(rapidata, shares_row())
    assert entry.answers == (Answer(0.75, votes=26),) and entry.source["criterion"] == "preference"
    assert entry.source["weighted_results_image2_alignment"] == 1.25  # the others are kept beside it
    (other,) = read(rapidata, shares_row(), columns={"criterion": "coherence"})
    assert other.answers == (Answer(0.5, votes=26),)
    (bare,) = read(rapidata, shares_row(detailed_results_preference=None))
    assert bare.answers == (Answer(0.75),)
    nothing = {"weighted_results_image1_preference": float("nan"), "weighted_results_image2_preference": float("nan")}
    assert read(rapidata, shares_row(**nothing))[0].answers == ()


def test_a_criterion_is_never_guessed():
    others = shares_row(("coherence", "alignment"))
    with pytest.raises(UserError, match=r"but on coherence, alignment; choose with the format rapidata and --columns '\{\"criterion\": "):
        read(rapidata, others)
    assert read(rapidata, others, columns={"criterion": "alignment"})[0].answers == (Answer(0.5, votes=26),)
    with pytest.raises(UserError, match="votes on style are not here"):
        read(rapidata, shares_row(), columns={"criterion": "style"})
    with pytest.raises(UserError, match="none named after alignment; leave criterion out"):
        read(rapidata, counts_row(), columns={"criterion": "alignment"})
    with pytest.raises(UserError, match="--columns names prompt; this format reads only criterion"):
        read(rapidata, counts_row(), columns={"prompt": "caption"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (shares_row(detailed_results_preference="{'3_dev.jpg': 4}"), "detailed_results_preference is no JSON"),
        (shares_row(detailed_results_preference="3"), "detailed_results_preference must be a list of votes"),
        (counts_row(votes_image1=2.5), "votes_image1 is 2.5, and must be a count"),
        (counts_row(votes_image2=-1), "votes_image2 is -1, and must be a count"),
        (shares_row(weighted_results_image1_preference=0.0, weighted_results_image2_preference=0.0), "not both 0"),
        (shares_row(weighted_results_image1_preference=-0.1), "must be 0 or more"),
    ],
)
def test_votes_that_mean_nothing_are_refused(row, message):
    with pytest.raises(UserError, match=rf"list\.json row 3.*{message}"):
        read(rapidata, row)
