"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.formats import FORMATS
from dedpo_diffusion.pipelines import STAGES
from support.pictures import picture

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAIRS_PAGE = (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8")
LINES, CHARACTERS, WIDTH = 180, 12_000, 120  # what two screens hold
JOURNEY, ROWS = 12, 6  # lines of the journey on one's own model, rows of a table of results


def section(title, text=TEXT):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(text):
    """The contents of its bash blocks."""
    return re.findall(r"```bash\n(.*?)```", text, re.S)


def rows(text):
    """The lines of its tables, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(set(line) <= set("|- ") for line in lines)


def test_it_stays_within_two_screens():
    assert TEXT.count("\n") <= LINES and len(TEXT) <= CHARACTERS
    assert not [line for line in TEXT.splitlines() if len(line) > WIDTH]
    assert sum(len(block.strip().splitlines()) for block in code(section("Your own SDXL checkpoint"))) <= JOURNEY
    assert 1 <= rows(section("What was measured")) <= ROWS
    assert len(re.findall(r"!\[", TEXT)) == 1, "one picture"


def test_the_two_commands_are_one_line_each_and_the_second_runs_the_tests():
    quickstart, tests = (block.strip() for block in code(section("Two commands")))
    assert quickstart == "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/dedpo quickstart"
    assert tests == '.venv/bin/pip install -e ".[test]" && .venv/bin/pytest'
    assert f"\n{tests.rpartition(' && ')[2]} ||" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("title", [pytest.param("A folder with one line for each pair", marks=pytest.mark.slow), "A table"])
def test_a_few_lines_bring_your_own_pairs(tmp_path, title):
    (tmp_path / "my-images").mkdir()
    for k, name in enumerate(("fox-a.png", "fox-b.png", "owl-a.png", "owl-b.png")):
        (tmp_path / "my-images" / name).write_bytes(picture(k))
    block = code(section(title, PAIRS_PAGE))[0]
    assert len(block.strip().splitlines()) <= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    (out,) = re.findall(r"--out (\S+)", block)
    pairs, labels = list(PairReader(tmp_path / out).iter_pairs()), read_labels(tmp_path / out, "human")
    chosen = {pair.prompt: pair.image_0 if label == 1 else pair.image_1 for pair, label in zip(pairs, labels.label_0, strict=True)}
    assert {pair.prompt: {pair.image_0, pair.image_1} for pair in pairs} == {
        "a red fox": {picture(0), picture(1)},
        "a grey owl": {picture(2), picture(3)},
    }
    assert chosen == {"a red fox": picture(0), "a grey owl": picture(3)}


def test_every_format_and_stage_is_named():
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section("Public data", PAIRS_PAGE), re.M))))
    assert {*FORMATS, "auto"} <= named and all(f"dedpo {stage}" in TEXT for stage in STAGES)


def test_every_picture_and_file_it_names_is_there():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) > 10
    for path in links + re.findall(r"`((?:eval|dedpo_diffusion|configs|pipelines)/[\w/.-]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_heading_that_it_links_to_is_there():
    for page, anchor in re.findall(r"\]\((docs/[\w.]+)#([^)]+)\)", TEXT):
        heads = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], f"{page}#{anchor}"


def test_every_figure_of_its_table_stands_among_the_results():
    """Nothing is claimed on the first page that the page of results does not hold, with its command."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]\d\.\d+ \([^)]*\)", section("What was measured"))
    assert figures
    for figure in figures:
        assert figure in results, figure
