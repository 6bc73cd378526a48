"""The engine of one process: it loads once, shares tasks among processes, and leaves out what is done."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.engine import LocalEngine, open_engine
from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.core.ray_engine import Attempts, Place
from dedpo_diffusion.settings import RaySettings


class Writer:
    """Writes a file a task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pending(self, task: str) -> dict[str, Path]:
        return {} if (self.folder / task).exists() else {"file": self.folder / f"{task}.lock"}

    def work(self, task: str, parts: list[str]) -> str:
        assert parts == ["file"]
        (self.folder / task).touch()
        return task.upper()


def test_what_a_crew_needs_is_loaded_once_and_not_before():
    loads = []
    crew = LocalEngine().crew(lambda: loads.append(1) or 7)
    assert loads == []
    assert crew.ask(lambda found: found + 1) == 8
    assert list(crew.run([1, 2], lambda found: lambda task: found * task)) == [(0, 7), (1, 14)]
    assert loads == [1]


def test_finished_tasks_stay_as_they_are(tmp_path):
    (tmp_path / "b").touch()
    found = dict(LocalEngine().crew(lambda: tmp_path).run(["a", "b", "c"], Writer))
    assert found == {0: "A", 1: None, 2: "C"}


def test_a_task_that_another_has_in_hand_is_waited_for(tmp_path):
    crew, found = LocalEngine().crew(lambda: tmp_path), []
    with hold_lock(tmp_path / "a.lock") as held:
        assert held
        thread = threading.Thread(target=lambda: found.extend(crew.run(["a", "b"], Writer)))
        thread.start()
        while not found:
            assert thread.is_alive()
        (tmp_path / "a").touch()  # the other one finishes it
    thread.join(20)
    assert found == [(1, "B"), (0, None)]


def test_an_unfinished_task_of_another_is_taken_over(tmp_path):
    crew, found = LocalEngine().crew(lambda: tmp_path), []
    with hold_lock(tmp_path / "a.lock"):
        thread = threading.Thread(target=lambda: found.extend(crew.run(["a"], Writer)))
        thread.start()
    thread.join(20)
    assert found == [(0, "A")]


def test_attempts_count_what_was_begun_and_not_ended():
    attempts = Attempts()
    assert [attempts.begin(3), attempts.begin(3), attempts.begin(4)] == [1, 2, 1]
    attempts.end(3)
    assert attempts.begin(3) == 1


def test_a_worker_goes_to_the_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "mark").touch()
    Place(str(tmp_path), (str(tmp_path / "mark"),), {"DEDPO_NOWHERE": "1"}).enter()
    assert Path.cwd() == tmp_path
    monkeypatch.delenv("DEDPO_NOWHERE")


@pytest.mark.parametrize("options", [RaySettings(address="127.0.0.1:1"), RaySettings(workers=2)])
def test_a_cluster_without_its_engine_is_refused(options):
    with pytest.raises(UserError, match="are for --engine ray"), open_engine("local", options):
        pass


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        (RaySettings(), "cuda:1", "--device cuda:1 is one of this machine's"),
        (RaySettings(workers=0), None, "--ray.workers is 0"),
        (RaySettings(cpus=0), None, "--ray.cpus is 0"),
    ],
)
def test_what_no_cluster_can_do_is_refused_before_ray_is_imported(options, device, words):
    with pytest.raises(UserError, match=words), open_engine("ray", options, device=device):
        pass
