"""A run folder is taken once a step is done: claims of starts that came to nothing refuse no other command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights.run_folder import began, give_up, has_begun, open_run, starting

CLAIM = "import os, sys; from pathlib import Path; from dedpo_diffusion.weights.run_folder import open_run; "


@dataclass(frozen=True)
class Optim:
    steps: int = 4
    batch: int = 1


@dataclass(frozen=True)
class Run:
    name: str = "a"
    optim: Optim = Optim()


def killed_start(folder: Path, settings: str = "{'name': 'a'}") -> None:
    """Another process claims the folder, and is gone before its first step."""
    subprocess.run([sys.executable, "-c", CLAIM + f"open_run(Path(sys.argv[1]), {settings}, {{'model': 'x'}}); os._exit(9)", folder])
    assert (folder / "settings.yaml").is_file() and (folder / "identity.json").is_file()


def first_step(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    began(folder)


def held(folder: Path) -> dict:
    return yaml.safe_load((folder / "settings.yaml").read_text())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_an_error_before_the_first_step_leaves_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="no memory"), starting(run):
        open_run(run, Run(), {"model": "x"})
        (run / "tensorboard").mkdir()
        (run / "metrics.jsonl").touch()
        (run / "samples" / "step-00000000").mkdir(parents=True)
        raise ValueError("no memory")
    assert not run.exists()


def test_an_error_after_the_first_step_leaves_all(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), starting(run):
        open_run(run, Run(), {"model": "x"})
        first_step(run)
        raise KeyboardInterrupt
    assert files(run) == ["identity.json", "metrics.jsonl", "settings.yaml"]
    with pytest.raises(UserError, match="name is 'a' there, 'b' now"):
        open_run(run, Run("b"), {"model": "x"})


def test_a_refused_command_takes_nothing_of_the_run_that_is_there(tmp_path):
    run = tmp_path / "run"
    open_run(run, Run(), {"model": "x"})
    first_step(run)
    before = files(run)
    with pytest.raises(UserError, match="holds another run"), starting(run):
        open_run(run, Run("b"), {"model": "x"})
    with pytest.raises(KeyboardInterrupt), starting(run):  # the same run, stopped before it went on
        open_run(run, Run(), {"model": "x"})
        raise KeyboardInterrupt
    assert files(run) == before


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "identity"), [({"name": "b"}, {"model": "x"}), ({"name": "a"}, {"model": "y"})])
def test_the_claim_of_a_killed_start_is_taken_over(tmp_path, capsys, settings, identity):
    killed_start(tmp_path / "run")
    (tmp_path / "run" / "samples").mkdir()  # of other prompts, perhaps
    open_run(tmp_path / "run", settings, identity)
    assert held(tmp_path / "run") == settings and json.loads((tmp_path / "run" / "identity.json").read_text()) == identity
    assert "samples" not in files(tmp_path / "run") and "is taken over" in capsys.readouterr().out


@pytest.mark.slow
def test_the_claim_of_a_running_process_stands(tmp_path):
    open_run(tmp_path / "run", {"name": "a"}, {"model": "x"})  # by this process, which is at its first step
    command = CLAIM + "open_run(Path(sys.argv[1]), {'name': 'b'}, {'model': 'x'})"
    done = subprocess.run([sys.executable, "-c", command, tmp_path / "run"], capture_output=True, text=True)
    assert "holds another run (name is 'a' there, 'b' now)" in done.stderr and held(tmp_path / "run") == {"name": "a"}


@pytest.mark.slow
@pytest.mark.parametrize("other", ["notes.txt", "0001.png", "checkpoints/step-00000001/state.json", "index.parquet", ".hidden"])
def test_what_is_not_a_bare_claim_is_never_removed(tmp_path, other):
    run = tmp_path / "run"
    killed_start(run)
    (run / other).parent.mkdir(parents=True, exist_ok=True)
    (run / other).write_text("mine")
    with pytest.raises(UserError, match="holds another run"), starting(run):
        open_run(run, {"name": "b"}, {"model": "x"})
    assert (run / other).read_text() == "mine" and held(run) == {"name": "a"}


def test_a_claim_is_given_up_by_its_own_process_alone(tmp_path):
    killed_start(tmp_path / "run")
    give_up(tmp_path / "run")
    assert held(tmp_path / "run") == {"name": "a"} and not has_begun(tmp_path / "run")


# ---- what may grow


def test_steps_may_be_raised_and_are_then_noted(tmp_path):
    open_run(tmp_path, Run(), {"model": "x"})
    first_step(tmp_path)
    open_run(tmp_path, Run(optim=Optim(8, 2)), {"model": "x"}, free=("optim.batch",), grows={"optim.steps": None})
    assert held(tmp_path)["optim"] == {"steps": 8, "batch": 1}  # the rest is as the run began
    open_run(tmp_path, Run(optim=Optim(8)), {"model": "x"})
    with pytest.raises(UserError, match=r"optim.steps is 8 there, 4 now"):
        open_run(tmp_path, Run(), {"model": "x"}, grows={"optim.steps": None})


@pytest.mark.parametrize(
    ("settings", "identity", "words"),
    [
        (Run(optim=Optim(8)), "x", "optim.steps is 4 there, 8 now, and the rates are spread"),
        (Run("b", Optim(8)), "x", "name is 'a' there, 'b' now"),  # what makes it another run comes first
        (Run(optim=Optim(8)), "y", "model is 'x' there, 'y' now"),
    ],
)
def test_what_may_not_grow_says_why(tmp_path, settings, identity, words):
    open_run(tmp_path, Run(), {"model": "x"})
    first_step(tmp_path)
    with pytest.raises(UserError, match=words):
        open_run(tmp_path, settings, {"model": identity}, grows={"optim.steps": "the rates are spread over all steps"})
    assert held(tmp_path)["optim"]["steps"] == 4
