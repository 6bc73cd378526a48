"""Characters that nothing can hold, seeds that no generator takes: refused where they are given, in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.console import stage
from dedpo_diffusion.core.texts import misfit, shown, size_words

DEDPO = [sys.executable, "-c", "from dedpo_diffusion.pipelines import main; raise SystemExit(main())"]


@given(st.text())
def test_a_text_that_utf8_holds_without_nul_fits(text):
    assert (misfit(text) is None) == ("\0" not in text)  # hypothesis makes no half characters


@pytest.mark.parametrize(("text", "words"), [("a\0", "NUL"), ("\ud83d", "\\ud83d"), ("x\udc80y", "half a character")])
def test_what_no_file_holds_is_said(text, words):
    assert words in misfit(text)


def test_what_is_shown_is_short_and_on_one_line():
    assert shown("a fox") == "'a fox'" and "\n" not in shown("a\nb")
    assert len(shown("x" * 10**6)) < 130 and "(1000002 characters)" in shown("x" * 10**6)


@dataclass(frozen=True)
class Seeded:
    """Settings.

    Args:
        out: where.
        name: a text.
        seed: of the draws.
    """

    out: Path
    name: str = ""
    seed: int = 0


def refused(capsys, *words):
    """What is said of these words, on one line and the next one that names the help."""
    assert stage(Seeded, lambda settings: pytest.fail("it began"), [*words, "--out", "x"], prog="draw") == 2
    return capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("seed", ["-1", "-12345678901234567890", str(2**62), str(2**64)])
def test_a_seed_that_no_generator_takes_names_the_option_and_what_is_admitted(seed, capsys, tmp_path):
    assert refused(capsys, "--seed", seed).startswith(
        f"draw: error: --seed: {seed} does not fit; it takes a whole number from 0 to {2**62 - 1}"
    )
    (tmp_path / "c.yaml").write_text(f"name: a\nseed: {seed}\n")
    assert f"{tmp_path / 'c.yaml'} line 2: seed: {seed} does not fit" in refused(capsys, "--config", str(tmp_path / "c.yaml"))


def test_the_least_and_the_largest_seed_are_taken():
    for seed in (0, 2**62 - 1):
        found = []
        assert stage(Seeded, found.append, ["--seed", str(seed), "--out", "x"], prog="draw") == 0 and found[0].seed == seed


@pytest.mark.parametrize("option", ["out", "name"])
@pytest.mark.parametrize(("text", "words"), [("a\\0b", "NUL"), ("a\\ud83d", "half a character")])
def test_a_settings_file_holds_no_such_characters(tmp_path, capsys, option, text, words):
    (tmp_path / "c.yaml").write_text(f'{option}: "{text}"\n')
    said = refused(capsys, "--config", str(tmp_path / "c.yaml"))
    assert f"line 1: {option}:" in said and words in said


@pytest.mark.parametrize(
    "words", [["train", "--model", "shapes"], ["sample", "--model", "shapes"], ["merge", "PAIRS"], ["validate", "PAIRS"]]
)
def test_every_stage_refuses_the_seed_minus_one_before_it_begins(tmp_path, words):
    command = [*DEDPO, *words, "--seed", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--seed: -1 does not fit" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="names are no bytes there")
def test_a_file_name_that_is_no_utf8_is_read_and_said(tmp_path):
    source = os.fsencode(tmp_path) + b"/caf\xe9.csv"
    with open(source, "w") as file:
        file.write("prompt,image_0,image_1\na fox,a.png,b.png\n")
    command = [*DEDPO, "ingest", "table", source, "--out", os.fsencode(tmp_path) + b"/P\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 2 and "cannot be read (No such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4_560_000, "4.6 MB"), (1.5e9, "1.5 GB"), (2e12, "2000.0 GB")]
)
def test_sizes_in_words(size, words):
    assert size_words(size) == words
