"""A disk that is full: every write in turn fails once, in words, and the same command goes on when there is room again."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from dedpo_diffusion.core import console, files
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.training import cache, reference_grid
from dedpo_diffusion.weights import checkpoints
from dedpo_diffusion.weights import run_folder as runs
from support.pictures import write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture


class Full:
    """A disk on which the first attempt to write each file fails, leaving half of it.

    Tensors fail while they are written, other files when they are flushed; of later checkpoints only the optimizer's state fails.
    """

    def __init__(self, monkeypatch, error: Exception) -> None:
        self.seen: set[str] = set()
        self.error, self.sync = error, files._sync_file
        monkeypatch.setattr(files, "_sync_file", self.flush)
        for module in (reference_grid, cache, checkpoints):
            monkeypatch.setattr(module, "save_file", self.save)

    def meet(self, path: Path) -> None:
        """Fail for a file that has not been met, by its final name."""
        ours = f".{files.HOST}.{os.getpid()}.tmp"
        name = path.name.removesuffix(ours).removeprefix("." if path.name.endswith(ours) else "")
        if name == "optimizer.safetensors":
            name = f"{path.parent.name} {name}"
        if name not in self.seen:
            self.seen.add(name)
            raise self.error

    def flush(self, path: Path) -> None:
        if ".safetensors" not in path.name:
            self.meet(path)
        self.sync(path)

    def save(self, tensors, path: Path) -> None:
        save_file(tensors, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        self.meet(path)
        path.write_bytes(content)


BY_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
ERRORS = [OSError(errno.ENOSPC, "No space left on device"), BY_SAFETENSORS, OSError(errno.EDQUOT, "Disk quota exceeded")]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.replace("\n", " ").split())


@pytest.mark.slow
def test_every_write_of_a_run_may_meet_a_full_disk(tiny_model, tmp_path, monkeypatch, capsys):
    pairs = write_pairs(tmp_path / "data", 4)
    options = {"optim__steps": 2, "optim__batch": 2, "checkpoint_every": 1, "optim__average": 0.9, "lora__rank": 2}
    whole = tmp_path / "whole"
    assert train.main(arguments(tiny_model, pairs, whole, data__cache=tmp_path / "whole-cache", **options)) == 0
    run, failures = tmp_path / "run", 0
    disk = Full(monkeypatch, BY_SAFETENSORS)
    capsys.readouterr()
    while train.main(arguments(tiny_model, pairs, run, data__cache=tmp_path / "cache", **options)) == 2:
        failures += 1
        error = said(capsys)
        assert error.startswith("dedpo train: error: ")
        assert error.endswith(": no space left on its disk; make some room there, then give the same command again")
        assert ".tmp" not in error
        assert str(tmp_path) in error
        for _, folder in runs.checkpoints(run):
            checkpoints.check_checkpoint(folder)
        assert not [file for file in tmp_path.rglob("*") if files.is_leftover(file)]
    assert failures == len(disk.seen)
    tensors = {f"{name}.safetensors" for name in ("shard-00000", "text-00000", "parameters", "average")}
    others = {"settings.yaml", "identity.json", "metrics.jsonl", "index.json", "about.json", "state.json", "checksums.json"}
    assert {name for name in disk.seen if "optimizer" not in name} == tensors | others
    assert len(disk.seen) == 13
    assert deviation(final(whole), final(run)) == (0, 0)
    assert metrics(whole) == metrics(run)
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.*")} for name in ("cache", "whole-cache"))
    assert one == other


@pytest.mark.parametrize("error", ERRORS, ids=["space", "safetensors", "quota"])
def test_the_old_file_stays_and_the_name_is_told(tmp_path, error):
    files.write_text(tmp_path / "a", "old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(console.NoSpace, match=r"/a: no space left"), files.atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    with (
        pytest.raises(console.NoSpace, match=r"/folder: no space left"),
        files.atomic_folder(tmp_path / "folder") as temporary,
        files.atomic_file(temporary / "part"),
    ):
        raise error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "folder"]
    assert (tmp_path / "a").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EIO, "Input/output error"), SafetensorError("invalid"), ValueError("28"), OSError("no number")):
        with pytest.raises(type(error)) as found, files.writing(tmp_path / "a"):
            raise error
        assert found.value is error


def test_a_line_of_metrics_that_did_not_fit_is_written_after_all(tmp_path, monkeypatch, capsys):
    """The line may have been cut anywhere; the next start removes what is left of it."""
    log = runs.MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 0.5})
    descriptor = os.dup(log.file.fileno())
    with open("/dev/full", "w") as full:  # what is written there finds no space
        os.dup2(full.fileno(), log.file.fileno())
        with pytest.raises(console.NoSpace, match=r"metrics.jsonl: no space left"):
            log.write({"step": 2, "loss": 0.25})
    os.close(descriptor)
    log.board.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    log = runs.MetricsLog(tmp_path, 1)
    log.write({"step": 2, "loss": 0.25})
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


def test_a_stage_that_meets_it_elsewhere_says_so_too(capsys):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Nothing:
        """Nothing."""

    def body(_: Nothing) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    assert console.stage(Nothing, body, [], prog="dedpo test") == 2
    assert "/some/file: no space left" in said(capsys)


def test_export_tells_it_too(tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=1)) == 0

    def fails(*_):
        raise ERRORS[0]

    monkeypatch.setattr(files.os, "fsync", fails)
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors: no space left" in said(capsys)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pages", [6, 25, 45])  # full while it claims its folder, encodes, saves
def test_a_disk_that_really_is_full(tiny_model, tiny_pairs, tmp_path, pages):
    """A file system of a few pages of memory in a name space of its own, then with room again."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = arguments(tiny_model, tiny_pairs, disk / "run", data__cache=disk / "cache", optim__steps=4, checkpoint_every=2, lora__rank=2)
    command = " ".join([sys.executable, "-m", "dedpo_diffusion.pipelines.train", *argv])
    script = (
        f"mount -t tmpfs -o size={4096 * pages} none {disk} || exit 77; {command}; echo ended $? >&2; mount -o remount,size=100M {disk};"
        f"{command} && cp -r {disk}/run {tmp_path}/copy"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this system lets nobody mount")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ended 2" in done.stderr
    assert f"{disk}" in done.stderr and ": no space left on its disk" in " ".join(done.stderr.split())
    assert train.main([*argv[:-2], "--lora.rank", "2", "--out", str(tmp_path / "whole"), "--data.cache", str(tmp_path / "cache")]) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "copy")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "copy")
