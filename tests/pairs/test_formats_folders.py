"""Pairs in folders without a table, and ranked images: which images belong together, which is preferred, and what is not assumed."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.formats import choose
from dedpo_diffusion.pipelines.ingest import main
from support.layouts import settings
from support.pictures import picture


def put(folder, images, captions=None):
    """Image files with the pictures of these numbers, and captions."""
    for name, number in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    for name, text in (captions or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def ingest(source, out, *options, format="auto"):
    """Prompt, better image, worse image of each pair; the better one is None where nobody said so."""
    assert main([format, str(source), "--out", str(out), *options]) == 0
    labels = {}
    if (out / "labels" / "human.parquet").is_file():
        found = read_labels(out, "human")
        labels = dict(zip(found.pair_id, found.label_0.tolist(), strict=True))
    found = []
    for pair in PairReader(out).iter_pairs():
        label, images = labels.get(pair.pair_id), [pair.image_0, pair.image_1]
        found.append((pair.prompt, *((None, frozenset(images)) if label in (None, 0.5) else images if label == 1 else images[::-1])))
    return found


def refusal(source, format="folders", **changes):
    with pytest.raises(UserError) as caught:
        wanted = settings(source, format, **changes)
        chosen = choose(wanted)
        for where, row, folder in chosen.source.rows():
            list(chosen.module.entries(row, where, folder, wanted))
    return str(caught.value)


LAYOUTS = {
    "chosen and rejected": ("chosen/a red fox.png", "rejected/a red fox.png", "chosen/an owl.png", "rejected/an owl.png"),
    "other endings": ("Chosen/a red fox.png", "Rejected/a red fox.jpg", "Chosen/an owl.webp", "Rejected/an owl.png"),
    "winner and loser": ("winner/a red fox.png", "loser/a red fox.png", "winner/an owl.png", "loser/an owl.png"),
    "w and l inside": ("a red fox/w/1.png", "a red fox/l/7.png", "an owl/w/x.png", "an owl/l/y.png"),
    "w and l as files": ("a red fox/w.png", "a red fox/l.png", "an owl/w.png", "an owl/l.png"),
    "at the end": ("a_red_fox_w.png", "a_red_fox_l.png", "an_owl_w.png", "an_owl_l.png"),
    "at the end, after a dash": ("a_red_fox-win.png", "a_red_fox-lose.png", "an_owl-win.png", "an_owl-lose.png"),
    "at the beginning": ("chosen_a_red_fox.png", "rejected_a_red_fox.png", "chosen_an_owl.png", "rejected_an_owl.png"),
    "twice": ("w/a red fox_w.png", "l/a red fox_l.png", "w/an owl_w.png", "l/an owl_l.png"),
    "below": ("x/chosen/a red fox.png", "x/rejected/a red fox.png", "y/chosen/an owl.png", "y/rejected/an owl.png"),
    "ranks of two": ("a_red_fox_rank1.png", "a_red_fox_rank2.png", "an_owl_rank1.png", "an_owl_rank2.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout, tmp_path, capsys):
    names = LAYOUTS[layout]
    source = put(tmp_path / "images", {name: k for k, name in enumerate(names)})
    found = ingest(source, tmp_path / "P")
    assert sorted(found) == [("a red fox", picture(0), picture(1)), ("an owl", picture(2), picture(3))]
    said = capsys.readouterr().out
    assert "is read as folders: images with " in said and "no .txt files, so the names are the prompts" in said
    assert "sides_shuffled" in (tmp_path / "P" / "ingest.json").read_text()


def test_sides_are_shuffled_and_labels_follow(tmp_path):
    names = [(f"chosen/fox {k}.png", f"rejected/fox {k}.png") for k in range(12)]
    source = put(tmp_path / "images", {name: 2 * k + side for k, pair in enumerate(names) for side, name in enumerate(pair)})
    assert sorted(ingest(source, tmp_path / "P")) == sorted((f"fox {k}", picture(2 * k), picture(2 * k + 1)) for k in range(12))
    assert 2 <= sum(read_labels(tmp_path / "P", "human").label_0 == 1) <= 10


@pytest.mark.parametrize(
    "captions",
    [
        {"chosen/1.txt": "a red fox", "rejected/2.txt": "an owl"},
        {"chosen/1.txt": "a red fox\n", "rejected/1.txt": " a red fox", "2.txt": "an owl"},
        {"1.txt": "a red fox", "2/prompt.txt": "an owl"},
        {"1/caption.txt": "a red fox", "2.txt": "an owl"},
    ],
)
def test_captions_stand_beside_an_image_or_the_name(tmp_path, captions):
    images = {"chosen/1.png": 0, "rejected/1.png": 1, "chosen/2.png": 2, "rejected/2.png": 3}
    found = ingest(put(tmp_path / "images", images, captions), tmp_path / "P")
    assert sorted(found) == [("a red fox", picture(0), picture(1)), ("an owl", picture(2), picture(3))]


@pytest.mark.parametrize("ends", ["01", "12", "ab"])
def test_numbers_and_letters_say_nothing_of_preference(tmp_path, capsys, ends):
    source = put(tmp_path / "images", {f"a fox_{ends[0]}.png": 0, f"a fox_{ends[1]}.png": 1})
    assert ingest(source, tmp_path / "P") == [("a fox", None, frozenset([picture(0), picture(1)]))]
    said = capsys.readouterr().out
    assert f"{ends[0]} and {ends[1]} (which says nothing of preference: no labels)" in said and "0 of them with a human label" in said


@pytest.mark.parametrize(
    ("images", "captions", "words"),
    [
        ({"chosen/1.png": 0, "rejected/1.png": 1}, {}, "has no caption, and its name says nothing"),
        (
            {"chosen/a.png": 0, "rejected/a.png": 1, "chosen/b.png": 2, "rejected/b.png": 3},
            {"a.txt": "x"},
            "has no caption, and others have",
        ),
        ({"chosen/a.png": 0, "rejected/a.png": 1}, {"chosen/a.txt": "x", "rejected/a.txt": "y"}, "several captions that differ"),
        ({"chosen/a.png": 0, "rejected/a.png": 1}, {"a.txt": "  "}, "is empty; write the prompt"),
        ({"chosen/a.png": 0, "rejected/a.png": 1, "a.png": 2}, {}, "a.png has nothing like chosen or rejected in its place"),
        ({"chosen/a.png": 0, "chosen/a.jpg": 2, "rejected/a.png": 1}, {}, "have one name and one place"),
        ({"a_0.png": 0, "a_1.png": 1, "a_2.png": 2}, {}, "do not say which belong together"),
        ({"0/a.png": 0, "1/b.png": 1}, {}, "do not say which belong together"),
        ({"a.png": 0, "b.png": 1}, {}, "do not say which belong together"),
        ({"a_rank1.png": 0, "a_rank2.png": 1, "b.png": 2}, {}, "b.png has nothing like rank1"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path, images, captions, words):
    assert words in refusal(put(tmp_path / "images", images, captions))


def test_an_image_without_its_other_half_is_named_and_can_be_left_out(tmp_path, capsys):
    source = put(tmp_path / "images", {"chosen/a.png": 0, "rejected/a.png": 1, "chosen/b.png": 2})
    assert main(["auto", str(source), "--out", str(tmp_path / "P")]) == 2
    assert f"{source} b, image 1 is missing" in capsys.readouterr().err
    assert ingest(source, tmp_path / "P", "--unreadable", "skip") == [("a", picture(0), picture(1))]
    assert "comparisons with an unreadable image: 1 dropped" in capsys.readouterr().out


def test_a_folder_of_other_things_is_told_as_before(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no table" in refusal(tmp_path / "empty", "auto")
    put(tmp_path / "photos", {"a.png": 0, "b.png": 1})
    assert "holds no table" in refusal(tmp_path / "photos", "auto")


# ---- K ranked images


def expected(ranks):
    """(better, worse) of every two pictures that differ in rank, and the sets of those that do not."""
    pairs = combinations(range(len(ranks)), 2)
    return {
        ("a fox", picture(i), picture(j)) if ranks[i] < ranks[j] else ("a fox", picture(j), picture(i)) if ranks[i] > ranks[j]
        else ("a fox", None, frozenset([picture(i), picture(j)]))
        for i, j in pairs
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["fox_rank{}.png", "a fox/rank_{}.png", "rank-{}/a fox.png", "a fox-Rank0{}.png"])
def test_k_images_with_ranks_in_their_names_make_every_pair_once(tmp_path, layout):
    captions = {"fox.txt": "a fox"} if "fox_" in layout else {}
    ranks = [3, 1, 4, 2]
    source = put(tmp_path / "images", {layout.format(rank): k for k, rank in enumerate(ranks)}, captions)
    found = ingest(source, tmp_path / "P")
    assert len(found) == 6 and set(found) == expected(ranks)
    assert len({pair.source["prompt_id"] for pair in PairReader(tmp_path / "P").iter_pairs()}) == 1


def ranked_table(folder, kind, ranks):
    """A table of the same ranking, a row an image or a row a prompt; another prompt's single image stands in between."""
    put(folder, {f"{k}.png": k for k in range(len(ranks))})
    rows = [{"prompt": "a fox", "image": f"{k}.png", "rank": rank} for k, rank in enumerate(ranks)]
    mixed = [rows[0], {"prompt": "alone", "image": "0.png", "rank": 1}, *rows[1:]]
    if kind == "csv":
        with open(folder / "t.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(mixed)
    elif kind == "jsonl":
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row | {"image": picture(k)} for k, row in enumerate(rows)]), folder / "t.parquet")
    elif kind == "json":  # a row a prompt
        (folder / "t.json").write_text(json.dumps([{"prompt": "a fox", "images": [row["image"] for row in rows], "ranks": ranks}]))
    else:  # the same in a CSV, whose lists are text
        with open(folder / "t.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["prompt", "images", "ranks"], ["a fox", json.dumps([r["image"] for r in rows]), json.dumps(ranks)]]
            )
    return next(folder.glob("t.*"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json", "csv of lists"])
@pytest.mark.parametrize("ranks", [[1, 2], [3, 1, 2], [2, 2, 1, 4, 3]])
def test_tables_of_ranks_make_every_pair_once(tmp_path, kind, ranks):
    found = ingest(ranked_table(tmp_path, kind, ranks), tmp_path / "P")
    assert len(found) == len(ranks) * (len(ranks) - 1) // 2 and set(found) == expected(ranks)


def test_reversed_ranks_turn_every_answer(tmp_path):
    """An invariance: 1 is the best, so ranks counted from the other end swap better and worse in every pair."""
    first = ingest(ranked_table(tmp_path / "a", "csv", [1, 2, 3]) if (tmp_path / "a").mkdir() is None else None, tmp_path / "P")
    (tmp_path / "b").mkdir()
    second = ingest(ranked_table(tmp_path / "b", "csv", [3, 2, 1]), tmp_path / "Q")
    assert {(prompt, worse, better) for prompt, better, worse in first} == set(second)


def test_each_rater_ranks_by_himself(tmp_path):
    put(tmp_path, {"0.png": 0, "1.png": 1})
    rows = [("ann", "0.png", 1), ("bob", "0.png", 2), ("ann", "1.png", 2), ("bob", "1.png", 1)]
    text = "prompt,rater,image,rank\n" + "".join(f"a fox,{rater},{image},{rank}\n" for rater, image, rank in rows)
    (tmp_path / "t.csv").write_text(text)
    ingest(tmp_path / "t.csv", tmp_path / "P")
    labels = read_labels(tmp_path / "P", "human")
    assert labels.label_0.tolist() == [0.5] and labels.extra["votes"] == [2]


@pytest.mark.parametrize(("rank", "words"), [("best", "must be a number"), ("-1", "must be a rank"), ("9" * 400, "")])
def test_a_rank_that_is_none_names_its_row(tmp_path, rank, words):
    put(tmp_path, {"0.png": 0, "1.png": 1})
    (tmp_path / "t.csv").write_text(f"prompt,image,rank\na fox,0.png,1\na fox,1.png,{rank}\n")
    if words:
        said = refusal(tmp_path / "t.csv", "auto")
        assert f"{tmp_path / 't.csv'} line 2, rank 1 is" in said and words in said
    else:  # so far behind that only its order counts
        assert ingest(tmp_path / "t.csv", tmp_path / "P") == [("a fox", picture(0), picture(1))]


def test_an_image_without_a_rank_is_a_pair_that_nobody_judged(tmp_path):
    put(tmp_path, {f"{k}.png": k for k in range(3)})
    (tmp_path / "t.csv").write_text("prompt,image,rank\na fox,0.png,\na fox,1.png,2\na fox,2.png,1\n")
    found = ingest(tmp_path / "t.csv", tmp_path / "P")
    assert ("a fox", picture(2), picture(1)) in found and sum(better is None for _, better, _ in found) == 2


def test_rankings_in_parquet_must_stand_together(tmp_path):
    rows = [{"prompt": prompt, "image": picture(k), "rank": k} for k, prompt in enumerate(["a", "b", "a"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert "row 2: the rows of this ranking ('a') do not stand together" in refusal(tmp_path / "t.parquet", "auto")


def test_a_table_of_two_images_and_a_rank_is_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,image_0,image_1,rank,winner\na fox,0.png,1.png,3,image_1\n")
    assert choose(settings(tmp_path / "t.csv", "auto")).name == "table"
