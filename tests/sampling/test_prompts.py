"""Prompts: the carried sets, HPSv2's lists, people's own files; what is picked from them, and what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.sampling import prompts
from dedpo_diffusion.sampling.prompts import STYLES, read_prompts, spread_evenly
from dedpo_diffusion.sampling.sampler import Prompt, jobs

PARTI = {
    "Abstract": 51, "Animals": 314, "Artifacts": 287, "Arts": 66, "Food & Beverage": 74, "Illustrations": 124, "Indoor Scenes": 40,
    "Outdoor Scenes": 131, "People": 177, "Produce & Plants": 50, "Vehicles": 104, "World Knowledge": 214,
}  # fmt: skip
GENEVAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


@pytest.mark.parametrize(("name", "counts"), [("parti", PARTI), ("geneval", GENEVAL)])
def test_carried_sets(name, counts):
    found = read_prompts(name)
    assert Counter(prompt.category for prompt in found) == counts
    assert [prompt.index for prompt in found] == list(range(sum(counts.values())))
    assert len({prompt.text for prompt in found}) == len(found)
    assert all(prompt.text == prompt.text.strip() != "" for prompt in found)


def test_quotation_marks_of_a_prompt_stay():
    found = [prompt.text for prompt in read_prompts("parti") if prompt.text.startswith('"')]
    assert found == [
        '"G I G G L E" painted in thick colorful lettering as graffiti on a faded red brick wall with a splotch of exploding white paint.'
    ]


def test_what_is_carried_is_told_with_its_licences():
    folder = files("dedpo_diffusion.sampling.prompts")
    notice = (folder / "NOTICE.md").read_text()
    for name in ("parti", "geneval"):
        assert name in notice and f"LICENSE.{name}" in notice
    assert "Apache License" in (folder / "LICENSE.parti").read_text()
    assert "MIT License" in (folder / "LICENSE.geneval").read_text()


ROWS = [("a fox", "animals"), ('the word "fox", in red', "signs"), ("été", None), ("a fox", "animals")]


def write(folder: Path, kind: str, keys=("prompt", "category")) -> Path:
    path = folder / f"own.{kind}"
    objects = [dict(zip(keys, row, strict=True)) | {"note": 1} for row in ROWS]
    if kind == "json":
        path.write_text(json.dumps(objects))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in objects))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[kind])
            writer.writerows([(*keys, "note"), *((text, kind or "", 1) for text, kind in ROWS)])
    return path


@pytest.mark.parametrize("keys", [("prompt", "category"), ("Prompt", "Category"), ("caption", "tag")])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_own_tables_say_the_same(tmp_path, kind, keys):
    assert read_prompts(write(tmp_path, kind, keys)) == [Prompt(k, *row) for k, row in enumerate(ROWS)]


def test_a_line_ends_at_a_line_break_alone(tmp_path):
    """Not at a form feed, U+2028 and the like, which text from web pages and PDFs has within a prompt."""
    (tmp_path / "own.txt").write_bytes("a\x0cfox\r\na\u2028cat\x85\x1cb\x0bc\na dog".encode())
    assert read_prompts(tmp_path / "own.txt") == [Prompt(0, "a\x0cfox"), Prompt(1, "a\u2028cat\x85\x1cb\x0bc"), Prompt(2, "a dog")]


def test_lists_and_lines_have_no_categories(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([text for text, _ in ROWS]))
    (tmp_path / "own.txt").write_text("\n\n".join(f"  {text} " for text, _ in ROWS), encoding="utf-8-sig")
    wanted = [Prompt(k, text) for k, (text, _) in enumerate(ROWS)]
    assert read_prompts(tmp_path / "own.json") == read_prompts(tmp_path / "own.txt") == wanted


def hpsv2(folder: Path) -> dict[str, list[str]]:
    lists = {style: [f"{style} {k}" for k in range(3)] for style in STYLES}
    for style, texts in lists.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{style}.json").write_text(json.dumps(texts))
    return lists


def test_hpsv2_from_the_hub_and_from_a_folder(tmp_path, monkeypatch):
    import huggingface_hub

    lists = hpsv2(tmp_path / "hub" / "benchmark")
    asked = []

    def download(repository, file, *, repo_type):
        asked.append((repository, file, repo_type))
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = read_prompts("hpsv2")
    assert asked == [("zhwang/HPDv2", f"benchmark/{style}.json", "dataset") for style in ("anime", "concept-art", "paintings", "photo")]
    assert [(prompt.category, prompt.text) for prompt in found] == [(style, text) for style in lists for text in lists[style]]
    assert [prompt.index for prompt in found] == list(range(12))
    assert read_prompts(tmp_path / "hub" / "benchmark") == found


def test_a_hub_out_of_reach_is_said_with_the_way_round_it(monkeypatch):
    import huggingface_hub

    def download(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"no connection.*give --prompts FOLDER"):
        read_prompts("hpsv2")


def test_picking_keeps_places_and_seeds():
    whole = {job.prompt_index: job for job in jobs(read_prompts("geneval"), 1, 100)}
    picked = read_prompts("geneval", categories=["colors", "counting"], limit=7)
    assert Counter(prompt.category for prompt in picked) == {"counting": 4, "colors": 3}  # counting comes first in the set
    assert [whole[job.prompt_index] for job in jobs(picked, 1, 100)] == jobs(picked, 1, 100)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_limit_spreads_evenly(kinds, data):
    """As many of each category as of any other, unless it has no more; the same every time, in order, none twice."""
    whole = [Prompt(k, f"p{k}", None if kind == 0 else f"c{kind}") for k, kind in enumerate(kinds)]
    limit = data.draw(st.integers(1, len(whole)))
    found = spread_evenly(whole, limit, "here")
    places = [prompt.index for prompt in found]
    assert len(found) == limit and places == sorted(set(places)) and all(whole[prompt.index] == prompt for prompt in found)
    have, took = Counter(kinds), Counter(kinds[place] for place in places)
    most = max(took.values())
    assert all(took[kind] >= most - 1 or took[kind] == have[kind] for kind in have)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '["a fox", 3]', r"p.json row 1: a prompt is text, and this is int"),
        ("p.json", '["a fox", " "]', r"p.json row 1: the prompt is empty"),
        ("p.json", "[]", "no prompt in it"),
        ("p.json", '["a fox"', "p.json is no JSON"),
        ("p.json", '[{"prompt": "a", "category": 3}]', r"p.json row 0: category is int"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p.jsonl line 2 is no JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"category": "b"}\n', r"p.jsonl line 2: a prompt is text, and this is NoneType"),
        ("p.jsonl", '{"text": "a"}\n', r"no column prompt or Prompt or caption \(it has text\)"),
        ("p.csv", "prompt,caption\na,b\n", "columns prompt and caption could both be the prompt"),
        ("p.csv", "prompt,category\na fox, red,signs\n", "p.csv line 2 has 3 values"),
        ("p.csv", "prompt\n\n", "no prompt in it"),
        ("p.csv", "", "p.csv is empty"),
        ("p.tsv", "prompt,category\n", "seems to have commas"),
        ("p.parquet", "prompt", "cannot be read"),
        ("p.txt", " \n", "no prompt in it"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name)


def test_choices_that_cannot_be_made(tmp_path):
    (tmp_path / "own.txt").write_text("a\nb\n")
    for source, options, words in (
        ("partiprompts", {}, "one of the sets parti, geneval, hpsv2"),
        ("parti", {"categories": ["Animals", "Cars"]}, "no prompt of category 'Cars'; its categories are Abstract, Vehicles"),
        (tmp_path / "own.txt", {"categories": ["Animals"]}, "its prompts have no categories"),
        (tmp_path / "own.txt", {"limit": 3}, "from 1 to 2"),
        (tmp_path / "own.txt", {"limit": 0}, "from 1 to 2"),
        (tmp_path, {}, "anime.json is missing"),
    ):
        with pytest.raises(UserError, match=words):
            read_prompts(source, **options)
    hpsv2(tmp_path)
    (tmp_path / "photo.json").write_text('{"photo": []}')
    with pytest.raises(UserError, match=r"photo.json: no JSON list of prompts"):
        read_prompts(tmp_path)
    assert prompts.CARRIED.keys() == {"parti", "geneval"}


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("p.txt", "a fox\nan owl\0\n", "line 2"),
        ("p.txt", "a fox\n\nan owl".encode("utf-16-le").decode(), "line 1"),  # UTF-16 without its mark is UTF-8 with NUL characters
        ("p.json", '["a fox", "an owl \\ud83d"]', "row 1"),
        ("p.json", '[{"prompt": "a fox"}, {"prompt": "an owl \\udc00"}]', "row 1"),
        ("p.jsonl", '{"prompt": "a fox"}\n{"prompt": "an \\u0000 owl"}', "line 2"),
        ("p.csv", "prompt\na fox\nan \0 owl\n", "line 3"),
    ],
)
def test_characters_that_no_prompt_can_hold_name_their_row(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{where}.* (holds a NUL|holds half a character).*; mend it"):
        read_prompts(tmp_path / name)
