"""Settings from the command line, exit codes, progress."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dedpo_diffusion.core import console


@dataclass(frozen=True)
class Inner:
    """Inner.

    Args:
        depth: how deep.
    """

    depth: int = 3


@dataclass(frozen=True)
class Settings:
    """A stage's settings.

    Args:
        folder: where.
        tools: with what.
        inner: nested.
    """

    folder: Path
    tools: list[str]
    inner: Inner = field(default_factory=Inner)


def run_with(argv: list[str], body=None) -> tuple[int, list[Settings]]:
    seen: list[Settings] = []
    code = console.stage(Settings, body or seen.append, argv, prog="dedpo test", positional=("folder",), flags={"with": "tools"})
    return code, seen


def test_positionals_lists_and_nested_settings():
    assert run_with(["here", "--with", "a", "b=c", "--inner.depth", "7"]) == (0, [Settings(Path("here"), ["a", "b=c"], Inner(7))])


def test_a_file_sets_and_the_command_line_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("inner:\n  depth: 5\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert run_with(["x", "--with", "a", *config])[1][0].inner.depth == 5
    assert run_with(["x", "--with", "a", *config, "--inner.depth", "6"])[1][0].inner.depth == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["x"], "with"),
        (["x", "--with", "a", "--inner.dpth", "1"], "dpth"),
        (["x", "--wit", "a"], "--wit"),
        (["x", "--with", "a", "--inner.depth", "deep"], "depth"),
    ],
)
def test_mistakes_exit_with_two(argv, words, capsys):
    assert run_with(argv) == (2, [])
    assert words in capsys.readouterr().err


def test_an_unknown_key_of_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("inner:\n  dpth: 5\n")
    assert run_with(["x", "--with", "a", "--config", str(tmp_path / "c.yaml")]) == (2, [])
    assert capsys.readouterr().err.splitlines()[0] == (
        f"dedpo test: error: {tmp_path / 'c.yaml'} line 2: there is no option inner.dpth; did you mean depth?"
    )


def test_a_users_mistake_is_one_line_without_traceback(capsys):
    def body(_: Settings) -> None:
        raise console.UserError("file.txt row 3: mend it")

    assert run_with(["x", "--with", "a"], body)[0] == 2
    assert capsys.readouterr().err == "dedpo test: error: file.txt row 3: mend it\n"


@pytest.mark.parametrize(("words", "read"), [(["x", "--with", "a"], "line\n"), (["--help"], "")])
def test_an_output_that_nobody_reads_any_more_ends_quietly(words, read):
    code = (
        "import sys; from test_console import Settings; from dedpo_diffusion.core import console\n"
        "body = lambda _: [print('line') for _ in range(100000)]\n"
        f"sys.exit(console.stage(Settings, body, {words}, prog='dedpo test', positional=('folder',), flags={{'with': 'tools'}}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        if read:
            assert process.stdout.readline() == read
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_a_programmers_mistake_is_not_hidden():
    def body(_: Settings) -> None:
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        run_with(["x", "--with", "a"], body)


def test_progress_of_long_work_ends_with_the_time_it_took(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 30.0, 70.0, 70.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.Progress("working", 3, start=1) as progress:
        progress.advance(note="loss 0.7")
        progress.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["working: 3/3, 0:00 left, loss 0.7", "working: 3/3, took 1:10, loss 0.7"]


# ---- called by a program


def test_a_program_is_told_of_work_in_place_of_the_console(capsys):
    """Also of work within work, of a total that nobody knows, and of what a stage has another stage do."""
    seen: list[console.Update] = []

    def inner(_: Settings) -> None:
        with console.Progress("rows", None) as progress:
            progress.advance(3)
        console.say_next("validate")

    def outer(_: Settings) -> int:
        for _item in console.track([1, 2], "stages", 2):
            assert run_with(["x", "--with", "a"], inner)[0] == 0
        return 5

    assert console.call(outer, Settings(Path("x"), ["a"]), seen.append) == 5
    rows = [("rows", 0, None, False), ("rows", 3, None, False), ("rows", 3, None, True)]
    stages = [("stages", done, 2, False) for done in range(3)]
    wanted = [stages[0], *rows, stages[1], *rows, stages[2], ("stages", 2, 2, True)]
    assert [(one.what, one.done, one.total, one.finished) for one in seen] == wanted
    assert capsys.readouterr().out == ""


def test_work_that_fails_is_never_finished():
    seen: list[console.Update] = []

    def body(_: Settings) -> None:
        with console.Progress("rows", 2):
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        console.call(body, Settings(Path("x"), ["a"]), seen.append)
    assert [one.finished for one in seen] == [False]


def test_a_full_disk_is_a_users_matter_in_a_program_too():
    def body(_: Settings) -> None:
        raise OSError(errno.ENOSPC, "full", "file.bin")

    with pytest.raises(console.UserError, match=r"file\.bin"):
        console.call(body, Settings(Path("x"), ["a"]))
