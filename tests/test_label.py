"""`dedpo label` on pair datasets on disk: labels, resuming, refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit
from test_scorers import build_judge

from dedpo_diffusion.labels import read_labels, write_labels
from dedpo_diffusion.pairs import PairReader, PairWriter
from dedpo_diffusion.pipelines.label import main
from dedpo_diffusion.records import Labels, Pair
from doubles import Watched, register

COUNT, SHARD = 11, 4
PROMPT = "a small red circle on a white background"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


LEVELS = np.random.default_rng(0).integers(0, 256, (COUNT, 2))


def write(folder, levels=LEVELS):
    with PairWriter(folder, shard_pairs=SHARD) as writer:
        for k, (a, b) in enumerate(levels):
            writer.add(Pair(f"p{k}", PROMPT, png(int(a)), png(int(b))))
    return folder


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "d")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def label(folder, *more: str) -> int:
    return main([str(folder), "--with", "brightness", "--batch", "3", *more])


def test_labels_scores_and_version_of_every_pair_in_order(pairs):
    assert label(pairs, "--temperature", "50") == 0
    found = read_labels(pairs, "brightness")
    assert found.pair_id == PairReader(pairs).ids()
    np.testing.assert_array_equal(np.transpose([found.extra["score_0"], found.extra["score_1"]]), LEVELS)
    np.testing.assert_allclose(found.label_0, expit((LEVELS[:, 0] - LEVELS[:, 1]) / 50), rtol=1e-14)
    assert set(found.extra["judge_version"]) == {"brightness-1 temperature 50.0"}
    assert Watched.scored == 2 * COUNT
    assert sorted(path.name for path in (pairs / "labels").iterdir()) == ["brightness.parquet"]


@pytest.mark.parametrize("last", [0, 7, 8, 14, 21])
def test_a_killed_run_goes_on_and_ends_with_the_same_file(pairs, tmp_path, last, capsys):
    """11 pairs in shards of 4, 4, 3; batches of 3. After 8 images (4 pairs) the first shard is kept, after 16 the second."""
    whole = write(tmp_path / "whole")
    assert label(whole) == 0
    Watched.scored, Watched.last = 0, last
    assert label(pairs) == 130
    assert not (pairs / "labels" / "brightness.parquet").exists()
    Watched.scored, Watched.last = 0, float("inf")
    assert label(pairs) == 0
    kept = last // 8 * 8
    assert Watched.scored == 2 * COUNT - kept
    assert ("labelled already" in capsys.readouterr().out) == (kept > 0)
    files = [folder / "labels" / "brightness.parquet" for folder in (pairs, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in (pairs / "labels").iterdir()] == ["brightness.parquet"]


def test_a_finished_file_is_recognised_and_not_made_again(pairs, capsys):
    assert label(pairs) == 0
    before, Watched.scored = (pairs / "labels" / "brightness.parquet").stat().st_mtime_ns, 0
    assert label(pairs) == 0
    assert Watched.scored == 0 and (pairs / "labels" / "brightness.parquet").stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out


def change_version():
    Watched.version = "brightness-2"


def test_finished_labels_of_another_judge_are_not_overwritten(pairs, capsys):
    assert label(pairs) == 0
    before = (pairs / "labels" / "brightness.parquet").read_bytes()
    change_version()
    assert label(pairs) == 2
    error = capsys.readouterr().err
    assert "brightness.parquet holds labels of brightness-1 temperature 1.0, not of brightness-2" in error and "--name" in error
    assert (pairs / "labels" / "brightness.parquet").read_bytes() == before
    assert label(pairs, "--name", "second") == 0
    assert set(read_labels(pairs, "second").extra["judge_version"]) == {"brightness-2 temperature 1.0"}
    assert label(pairs, "--name", "second", "--temperature", "3") == 2


def test_human_labels_are_never_overwritten(pairs, capsys):
    write_labels(pairs, "human", Labels(["p0"], np.array([1.0])))
    assert label(pairs, "--name", "human") == 2
    assert "holds labels of no judge" in capsys.readouterr().err
    assert read_labels(pairs, "human").pair_id == ["p0"]


@pytest.mark.parametrize("change", ["version", "temperature", "pairs"])
def test_unfinished_labels_of_other_settings_are_refused(pairs, capsys, change):
    Watched.last = 8
    assert label(pairs) == 130
    Watched.last, more = float("inf"), []
    if change == "version":
        change_version()
    elif change == "temperature":
        more = ["--temperature", "2"]
    else:
        (pairs / "pairs").rename(pairs / "old")
        write(pairs, LEVELS[::-1][:9])
    assert label(pairs, *more) == 2
    error = capsys.readouterr().err
    assert f"unfinished labels of another {'dataset' if change == 'pairs' else 'judge version'}" in error and "remove that folder" in error
    assert label(pairs, *more, "--name", "fresh") == 0


def test_finished_labels_of_other_pairs_are_refused(pairs, capsys):
    assert label(pairs) == 0
    (pairs / "pairs").rename(pairs / "old")
    write(pairs, LEVELS[:5])
    assert label(pairs) == 2
    assert "labels other pairs" in capsys.readouterr().err


def test_a_broken_image_is_named_by_file_row_and_column(tmp_path, capsys):
    with PairWriter(tmp_path / "d", shard_pairs=SHARD) as writer:
        for k in range(7):
            writer.add(Pair(f"p{k}", PROMPT, png(k), png(k)[:-30] if k == 6 else png(k)))
    assert label(tmp_path / "d") == 2
    assert "pairs-00001.parquet row 2 image_1: the image cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "d" / "labels" / "brightness.parquet").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--with", "nobody"], "known: pickscore, oracle_reward, brightness"),
        (["--batch", "0"], "batch is 0"),
        (["--temperature", "0"], "temperature is 0"),
        (["--name", "../out"], "cannot name a label file"),
    ],
)
def test_bad_settings(pairs, capsys, more, message):
    assert label(pairs, *more) == 2
    assert message in capsys.readouterr().err
    assert not (pairs / "labels").exists()


def test_a_folder_without_pairs(tmp_path, capsys):
    assert label(tmp_path) == 2
    assert "dedpo ingest" in capsys.readouterr().err


def test_a_clip_judge_labels_through_the_command(pairs, tmp_path):
    folder = build_judge(tmp_path / "judge")
    assert main([str(pairs), "--with", f"pickscore={folder}", "--device", "cpu"]) == 0
    found = read_labels(pairs, "pickscore")
    scores = np.transpose([found.extra["score_0"], found.extra["score_1"]])
    np.testing.assert_allclose(found.label_0, expit(scores[:, 0] - scores[:, 1]), rtol=1e-14)
    assert np.ptp(found.label_0) > 0.001
