"""Runs the notebooks of examples/ small, in a folder of their own and without a network.

PYTHONPATH=tests python -m support.notebooks        runs all of them, and keeps what they show in them
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SMALL = {
    "SMOKE": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
PATIENCE = 1200  # seconds a cell may take


def run(path: Path, folder: Path) -> Any:
    """The notebook with what it shows when it is run in a folder.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    with patch.dict(os.environ, SMALL):
        NotebookClient(book, timeout=PATIENCE, record_timing=False, resources={"metadata": {"path": str(folder)}}).execute()
    return book


def joined(outputs: list[Any]) -> Iterator[Any]:
    """A cell's outputs with streams that follow each other as one, nothing of warnings, and no text where there is a page or a picture."""
    kept = [output for output in outputs if output.get("name") != "stderr"]
    for kind, some in groupby(kept, key=lambda output: output.output_type):
        if kind == "stream":
            first, *more = some
            first.text += "".join(output.text for output in more)
            yield first
            continue
        for output in some:
            if {"text/html", "image/png"} & output.get("data", {}).keys():
                output.data.pop("text/plain", None)
            yield output


def refresh(path: Path) -> None:
    """Run a notebook and keep what it shows."""
    import nbformat

    with TemporaryDirectory() as folder:
        book = run(path, Path(folder))
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = list(joined(cell.outputs))
    nbformat.write(book, path)


if __name__ == "__main__":
    for each in NOTEBOOKS:
        refresh(each)
        print(each.name, f"{each.stat().st_size / 1000:.0f} kB")
