"""Sample folders that were killed, damaged, or are made by several processes: the images of one quiet run, bit for bit."""

from __future__ import annotations

import copy
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dedpo_diffusion.core.files import HOST
from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.pipelines import sample
from dedpo_diffusion.pipelines.label import local_device
from dedpo_diffusion.sampling import sampler as sampling
from dedpo_diffusion.sampling.png import is_whole
from support.sampling import arguments, pixels

SEEDS = 6  # with two prompts and batches of 2: six batches


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    file.write_text("prompt,category\na small red circle,round\na large cross,edged\n")
    return file


@pytest.fixture(scope="module")
def whole(tiny_model, prompts, tmp_path_factory):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert sample.main(arguments(tiny_model, prompts, folder, seeds=SEEDS)) == 0
    return folder


def check_same(folder: Path, whole: Path) -> None:
    found, wanted = pixels(folder), pixels(whole)
    assert list(found) == list(wanted)
    assert all(np.array_equal(found[file], wanted[file]) for file in wanted)
    assert pq.read_table(folder / "index.parquet").equals(pq.read_table(whole / "index.parquet"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


# ---- damaged


def png_bytes() -> bytes:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("prompt", "a large cross")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_a_cut_png_is_not_whole(tmp_path):
    data, file = png_bytes(), tmp_path / "a.png"
    assert not is_whole(file)
    for length in range(len(data) - 4):  # the last four bytes are a checksum of nothing
        file.write_bytes(data[:length])
        assert not is_whole(file), length
    file.write_bytes(data)
    assert is_whole(file)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_png_with_a_changed_byte_is_not_whole(tmp_path_factory, data):
    good, file = png_bytes(), tmp_path_factory.getbasetemp() / "changed.png"
    place, change = data.draw(st.integers(0, len(good) - 13)), data.draw(st.integers(1, 255))
    file.write_bytes(good[:place] + bytes([good[place] ^ change]) + good[place + 1 :])
    assert not is_whole(file)


def test_missing_and_damaged_images_are_sampled_again(tiny_model, prompts, whole, tmp_path, capsys, monkeypatch):
    given = arguments(tiny_model, prompts, tmp_path / "a", seeds=SEEDS)
    assert sample.main(given) == 0
    files = sorted((tmp_path / "a").glob("*.png"), key=lambda file: int(file.stem.partition("-")[2]))
    files[0].write_bytes(b"")
    files[3].write_bytes(files[3].read_bytes()[:-40])
    files[7].unlink()
    kept = files[1].stat().st_mtime_ns
    calls, real = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args, **more: calls.append(args[2]) or real(*args, **more))
    capsys.readouterr()
    assert sample.main(given) == 0
    assert calls == [[0, 1], [2, 3], [6, 7]]  # whole batches, as they were
    assert files[1].stat().st_mtime_ns == kept
    said = capsys.readouterr().out
    assert "6 of 12 images are there already; resuming" in said
    assert [line.rsplit("/")[-1] for line in said.splitlines() if "is damaged" in line] == [
        f"{files[k].name} is damaged; it is sampled again" for k in (0, 3)
    ]
    assert "all 12 images" not in said
    check_same(tmp_path / "a", whole)
    assert sample.main(given) == 0
    assert "all 12 images are there already" in capsys.readouterr().out
    assert len(calls) == 3


def test_an_index_that_says_other_things_is_written_again(tiny_model, prompts, whole, tmp_path, monkeypatch):
    given = arguments(tiny_model, prompts, tmp_path / "a", seeds=SEEDS)
    assert sample.main(given) == 0
    index = tmp_path / "a" / "index.parquet"
    monkeypatch.setattr(sampling, "load_sampler", None)  # not needed
    for damage in (
        index.unlink,
        lambda: index.write_bytes(b"PAR1"),
        lambda: pq.write_table(pq.read_table(index).drop(["category"]), index),
    ):
        damage()
        assert sample.main(given) == 0
        check_same(tmp_path / "a", whole)


def test_other_inputs_are_refused(tiny_model, folders, prompts, tmp_path, capsys):
    own, model = tmp_path / "own.csv", tmp_path / "model"
    own.write_text(prompts.read_text())
    model.symlink_to(tiny_model)
    given = arguments(model, own, tmp_path / "a", seeds=SEEDS)
    assert sample.main(given) == 0
    next((tmp_path / "a").glob("*.png")).unlink()
    own.write_text(own.read_text().replace("edged", "sharp"))
    assert sample.main(given) == 2
    assert "its inputs have changed since it began (images is" in capsys.readouterr().err
    own.write_text(prompts.read_text())
    model.unlink()
    model.symlink_to(folders["sd15"])
    assert sample.main(given) == 2
    assert "its inputs have changed since it began (model is" in capsys.readouterr().err
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    assert sample.main(arguments(tiny_model, own, tmp_path / "home")) == 2
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


# ---- several at once


def test_two_at_once_share_the_batches(tiny_model, prompts, whole, tmp_path, monkeypatch):
    """As two processes do, by locks; neither knows of the other."""
    pipe = sampling.load_sampler(str(tiny_model), device="cpu")
    pipes = [pipe, copy.deepcopy(pipe)]
    pipes[1].base_fingerprint = pipe.base_fingerprint
    monkeypatch.setattr(sampling, "load_sampler", lambda *_, **__: pipes.pop())
    real, took, meet = sampling.sample, [], threading.Barrier(2)

    def watched(pipe, words, seeds, **more):
        took.append((threading.get_ident(), tuple(seeds)))
        if len(took) <= 2:
            meet.wait(30)  # both have a batch at the same time
        return real(pipe, words, seeds, **more)

    monkeypatch.setattr(sampling, "sample", watched)
    codes = []
    given = arguments(tiny_model, prompts, tmp_path / "a", seeds=SEEDS)
    threads = [threading.Thread(target=lambda: codes.append(sample.main(given))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [0, 0]
    assert sorted(seeds for _, seeds in took) == [(k, k + 1) for k in range(0, 12, 2)]
    assert len({name for name, _ in took}) == 2
    check_same(tmp_path / "a", whole)


def test_a_batch_of_a_process_that_dies_is_taken_over(tiny_model, prompts, whole, tmp_path, monkeypatch):
    """Somebody holds the first batch's lock, and lets go of it without an image."""
    locks = tmp_path / "a" / sampling.LOCKS
    locks.mkdir(parents=True)
    real, took = sampling.sample, []
    monkeypatch.setattr(sampling, "sample", lambda *args, **more: took.append(args[2][0]) or real(*args, **more))
    with hold_lock(locks / "000000.lock") as held:
        assert held
        thread = threading.Thread(target=lambda: sample.main(arguments(tiny_model, prompts, tmp_path / "a", seeds=SEEDS)))
        thread.start()
        while len(took) < 5:
            time.sleep(0.01)
        time.sleep(0.3)
        assert took == [2, 4, 6, 8, 10] and not (tmp_path / "a" / "index.parquet").exists()
    thread.join(30)
    assert took[5:] == [0]
    check_same(tmp_path / "a", whole)


def test_what_a_kill_leaves_behind_does_no_harm(tiny_model, prompts, whole, tmp_path):
    """Half a batch, a file that was being written, the locks of a process that is gone."""
    given = arguments(tiny_model, prompts, tmp_path / "a", seeds=SEEDS)
    assert sample.main(given) == 0
    for seed in (1, 4, 5, 11):
        next((tmp_path / "a").glob(f"*-{seed}.png")).unlink()
    (tmp_path / "a" / "index.parquet").unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "a" / f".00000-1.png.{HOST}.{gone.pid}.tmp").write_bytes(png_bytes()[:50])
    (tmp_path / "a" / sampling.LOCKS).mkdir()
    (tmp_path / "a" / sampling.LOCKS / "000000.lock").touch()
    assert sample.main(given) == 0
    check_same(tmp_path / "a", whole)


def command(given: list[str], processes: int | None = None) -> list[str]:
    """The stage by itself, or as so many processes of a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return [sys.executable, *launcher, str(Path(__file__).parents[2] / "pipelines" / "sample.py"), *given]


@pytest.mark.slow
def test_kills_leave_the_images_of_a_quiet_run(tiny_model, prompts, whole, tmp_path):
    rng, folder, kills = random.Random(0), tmp_path / "a", 0
    given = arguments(tiny_model, prompts, folder, seeds=SEEDS)
    while kills < 8:
        had, more = len(list(folder.glob("*.png"))), rng.randint(1, 3)
        process = subprocess.Popen(command(given))
        while process.poll() is None and len(list(folder.glob("*.png"))) < had + more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        kills += process.poll() is None
        process.kill()
        process.wait()
        if (folder / "index.parquet").exists():  # it was done before: once more
            assert sample.main(given) == 0
            check_same(folder, whole)
            shutil.rmtree(folder)
    assert sample.main(given) == 0
    check_same(folder, whole)


def test_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device(None) is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (local_device(None), local_device("cpu")) == ("cuda:1", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("killing", [False, True])
def test_launched_processes_make_what_one_makes(tiny_model, prompts, whole, tmp_path, killing):
    """Two processes of a launcher; killed, and three begun again without one."""
    folder = tmp_path / "a"
    given = arguments(tiny_model, prompts, folder, seeds=SEEDS)
    process = subprocess.Popen(command(given, 2), start_new_session=True)
    if killing:
        while process.poll() is None and len(list(folder.glob("*.png"))) < 3:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        others = [subprocess.Popen(command(given)) for _ in range(3)]
        assert [other.wait() for other in others] == [0, 0, 0]
    else:
        assert process.wait() == 0
    check_same(folder, whole)
