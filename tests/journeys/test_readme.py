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


def section(title):
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", section("Bring your own pairs"), re.S), ids=["folder", "csv"])
def test_three_lines_bring_your_own_pairs(tmp_path, block):
    (tmp_path / "my-images").mkdir()
    for k, name in enumerate(("fox-a.png", "fox-b.png")):
        (tmp_path / "my-images" / name).write_bytes(picture(k))
    assert len(block.strip().splitlines()) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    (pair,), labels = list(PairReader(tmp_path / "PAIRS").iter_pairs()), read_labels(tmp_path / "PAIRS", "human")
    assert pair.prompt == "a red fox" and {pair.image_0, pair.image_1} == {picture(0), picture(1)}
    assert (pair.image_0 if labels.label_0[0] == 1 else pair.image_1) == picture(0)


def test_every_format_and_stage_is_named():
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section("Bring your own pairs"), re.M))))
    assert named == {*FORMATS, "auto"} and all(f"dedpo {stage}" in TEXT for stage in STAGES)


def test_every_picture_and_file_it_names_is_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT) + re.findall(r"`((?:eval|dedpo_diffusion|configs|pipelines)/[\w/.-]+)`", TEXT):
        assert (ROOT / path).exists(), path
