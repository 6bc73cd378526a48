"""What other installed packages add is used by the real commands; CONTRIBUTING.md's examples work as they stand there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
from support.pictures import picture, write_pairs
from support.training import arguments
from support.worked_examples import changed_house, dedpo, extras, install, wheel

BETTER = ("left", "right", "same", "left")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return extras(tmp_path_factory.mktemp("extras"))


def table(folder: Path) -> Path:
    """Four comparisons in the layout of the page's importer, with their images beside."""
    rows = [["caption_text", "left", "right", "better"]]
    for k, better in enumerate(BETTER):
        for side in (0, 1):
            (folder / f"{k}-{side}.png").write_bytes(picture(2 * k + side))
        rows.append([f"prompt {k}", f"{k}-0.png", f"{k}-1.png", better])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "table.csv"


def ok(*words: object, path: Path, folder: Path) -> str:
    done = dedpo(*words, path=path, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*words: object, path: Path, folder: Path) -> str:
    """The one line that a refused command says."""
    done = dedpo(*words, path=path, folder=folder)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def check_ingest_and_label(path: Path, folder: Path, judges: list[str]) -> None:
    ok("ingest", "side_by_side", table(folder), "--out", "PAIRS", path=path, folder=folder)
    pairs = list(PairReader(folder / "PAIRS").iter_pairs())
    assert [pair.image_0 for pair in pairs] == [picture(2 * k) for k in range(4)]
    np.testing.assert_array_equal(read_labels(folder / "PAIRS", "human").label_0, [1, 0, 0.5, 1])
    ok("label", "PAIRS", "--with", *judges, "--summary", "false", path=path, folder=folder)
    for judge in judges:
        measure = {"brightness": np.mean, "contrast": np.std}[judge]
        found = read_labels(folder / "PAIRS", judge).extra
        for side, name in enumerate(("score_0", "score_1")):
            wanted = [measure(np.asarray(decode_image((pair.image_0, pair.image_1)[side], ""), dtype=np.float64)) for pair in pairs]
            np.testing.assert_allclose(found[name], wanted, rtol=1e-12)


def check_train(path: Path, folder: Path, model: Path) -> None:
    ok("merge", "PAIRS", "--judge", "brightness", "--method", "naive", "--name", "soft", "--picture", "false", path=path, folder=folder)
    words = arguments(model, folder / "PAIRS", folder / "run", optim__steps=2, objective__kind="slic", objective__beta=2000)
    said = ok("train", *words, path=path, folder=folder)
    assert "objective slic, balance none" in said
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)  # a fresh adapter has margin 0, where max(0, 1 - m) is 1


@pytest.mark.slow
def test_an_installed_package_adds_all_four(installed, tmp_path, tiny_model):
    check_ingest_and_label(installed, tmp_path, ["brightness", "contrast"])
    check_train(installed, tmp_path, tiny_model)


@pytest.mark.slow
def test_the_same_as_files_in_the_house(tmp_path, tiny_model):
    house = changed_house(tmp_path / "house")
    (tmp_path / "work").mkdir()
    check_ingest_and_label(house, tmp_path / "work", ["brightness"])
    check_train(house, tmp_path / "work", tiny_model)


@pytest.mark.slow
def test_help_and_messages_name_what_is_installed(installed, tmp_path):
    for stage, names in (("label", "brightness, contrast"), ("score", "brightness"), ("train", "slic"), ("ingest", "side_by_side")):
        assert f"Of other packages: {names}." in " ".join(ok(stage, "--help", path=installed, folder=tmp_path).split())
    said = refused("ingest", "sidebyside", "x", "--out", "y", path=installed, folder=tmp_path)
    assert said.endswith("did you mean 'side_by_side'?")


def project(name: str, group: str, entry: str) -> str:
    return f'[project]\nname = "{name}"\nversion = "1"\n[project.entry-points]\n"dedpo_diffusion.{group}" = {{{entry}}}\n'


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> Path:
    """Packages that offer a built-in name, one name twice, what cannot be imported, and what is no objective."""
    folder = tmp_path_factory.mktemp("troubled")
    for name, group, entry in (
        ("greedy", "scorers", 'clip = "greedy:Scorer"'),
        ("first-twin", "scorers", 'twin = "first:Scorer"'),
        ("second-twin", "judges", 'twin = "second:judge"'),
        ("broken", "importers", 'broken = "broken_for_dedpo"'),
        ("wrong", "objectives", 'wrong = "math:pi"'),
    ):
        files = {"broken_for_dedpo.py": "import no_such_module_anywhere\n"} if name == "broken" else {}
        install(wheel(folder / "wheels", project(name, group, entry), files), folder / "site")
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["label", "PAIRS", "--with", "clip"], "'clip' is offered by dedpo_diffusion and by greedy"),
        (["label", "PAIRS", "--with", "twin"], "'twin' is offered by second-twin and by first-twin"),
        (
            ["ingest", "broken", "x", "--out", "y"],
            "'broken' (broken_for_dedpo) of the package broken cannot be imported: ModuleNotFoundError: No module named 'no_such_",
        ),
        (
            ["train", "--model", "m", "--data.pairs", "p", "--out", "o", "--objective.kind", "wrong"],
            "'wrong' (math:pi) of the package wrong must be an Objective",
        ),
        (["train", "--model", "m", "--data.pairs", "p", "--out", "o", "--objective.kind", "sigmoyd"], "did you mean 'sigmoid'?"),
    ],
    ids=["built-in", "two packages", "not imported", "something else", "unknown"],
)
def test_a_package_in_trouble_is_named_in_one_line(troubled, tmp_path, words, said):
    write_pairs(tmp_path / "PAIRS", 2)
    assert said in refused(*words, path=troubled, folder=tmp_path)
