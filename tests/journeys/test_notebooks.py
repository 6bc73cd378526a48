"""The notebooks of examples/: what they show was made by their own cells, tells nothing of a machine, and every cell runs small."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dedpo_diffusion
from dedpo_diffusion.core.privacy import check_private
from support.notebooks import EXAMPLES, NOTEBOOKS, run

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def texts(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """What is to read in a cell's outputs."""
    for output in outputs:
        yield "".join(output.get("text", []))
        yield from ("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["align_your_sdxl", "what_are_my_labels_worth"]


@each
def test_it_was_run_from_its_first_cell_to_its_last(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
    shown = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(shown) >= 3 and path.stat().st_size < 1_500_000


@each
def test_it_tells_nothing_of_a_machine(path):
    for cell in cells(path, "code"):
        for text in texts(cell["outputs"]):
            check_private(path.name, text.replace("/content/", ""))
            assert not re.search(r"/(tmp|home|root|Users|work)/", text), text


@each
def test_what_it_imports_and_links_to_is_there(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source(cell), flags=re.M))):
            if isinstance(node, ast.ImportFrom) and node.module == "dedpo_diffusion":
                assert {alias.name for alias in node.names} <= set(dedpo_diffusion.__all__), source(cell)
    for link in re.findall(r"\]\((\.\./[^)#]+)", "".join(map(source, cells(path, "markdown")))):
        assert (EXAMPLES / link).resolve().is_file(), link


@pytest.mark.slow
@each
def test_every_cell_runs_small_without_a_network(path, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = run(path, tmp_path)
    ran = [cell for cell in book.cells if cell.cell_type == "code"]
    kept = cells(path, "code")
    assert [len([o for o in cell.outputs if "image/png" in o.get("data", {})]) for cell in ran] == [
        len([o for o in cell["outputs"] if "image/png" in o.get("data", {})]) for cell in kept
    ]
    assert not [output for cell in ran for output in cell.outputs if output.output_type == "error"]
