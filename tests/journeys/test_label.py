"""`dedpo label` on pair datasets on disk: labels, images in several pairs, several judges, resuming, refusals."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.judges import registry
from dedpo_diffusion.judges.judge import Answers, Judge
from dedpo_diffusion.labels.files import read_labels, write_labels
from dedpo_diffusion.pairs import decoding
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines.label import main
from dedpo_diffusion.shapes import world
from support.doubles import Brightness, Watched, register
from support.judges import build_judge

COUNT, SHARD = 11, 4
PROMPT = "a small red circle on a white background"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


LEVELS = np.random.default_rng(0).permutation(256)[: 2 * COUNT].reshape(COUNT, 2)  # no image comes twice


def write(folder, levels=LEVELS, prompts=None):
    with PairWriter(folder, shard_pairs=5) as writer:  # of the dataset; labels are kept in shards of SHARD
        for k, (a, b) in enumerate(levels):
            writer.add(Pair(f"p{k}", prompts[k] if prompts else PROMPT, png(int(a)), png(int(b))))
    return folder


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "d")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def label(folder, *more: str) -> int:
    judges = () if "--with" in more else ("--with", "brightness")
    return main([str(folder), *judges, "--batch", "3", "--shard", str(SHARD), "--summary", "false", *more])


def scores(folder, name="brightness"):
    found = read_labels(folder, name)
    return np.transpose([found.extra["score_0"], found.extra["score_1"]])


def test_labels_scores_and_version_of_every_pair_in_order(pairs):
    assert label(pairs, "--temperature", "50") == 0
    found = read_labels(pairs, "brightness")
    assert found.pair_id == PairReader(pairs).ids()
    np.testing.assert_array_equal(scores(pairs), LEVELS)
    np.testing.assert_allclose(found.label_0, expit((LEVELS[:, 0] - LEVELS[:, 1]) / 50), rtol=1e-14)
    assert set(found.extra["judge_version"]) == {"brightness-1 temperature 50.0"}
    assert Watched.scored == 2 * COUNT
    assert sorted(path.name for path in (pairs / "labels").iterdir()) == ["brightness.parquet"]


# ---- images in several pairs, several judges


def test_an_image_in_several_pairs_of_a_prompt_is_scored_once_wherever_they_stand(tmp_path):
    """Four pictures, all their ordered pairs, over three shards; the same pictures again under another prompt."""
    levels = [(a, b) for a in (10, 80, 160, 240) for b in (10, 80, 160, 240) if a != b]
    folder = write(tmp_path / "d", levels)
    assert label(folder) == 0
    assert Watched.scored == 4
    np.testing.assert_array_equal(scores(folder), levels)
    Watched.scored = 0
    folder = write(tmp_path / "e", [*levels, *levels], [PROMPT] * 12 + ["another"] * 12)
    assert label(folder) == 0
    assert Watched.scored == 8
    np.testing.assert_array_equal(scores(folder), [*levels, *levels])


class Darkness(Brightness):
    name, version = "darkness", "darkness-1"

    def score(self, prompts, images):
        return -super().score(prompts, images)


class Picky(Judge):
    """A judge of pairs that has no answer where image 0 is darker than `least`."""

    least = 100

    def __init__(self):
        super().__init__("picky", "picky-1", 2.0)
        self.asked = []

    def answer(self, questions):
        levels = [[np.asarray(q.image_0).mean(), np.asarray(q.image_1).mean()] for q in questions]
        self.asked += [q.pair_id for q in questions]
        missing = ["too dark" if level[0] < Picky.least else "" for level in levels]
        shown = [[np.nan, np.nan] if why else level for why, level in zip(missing, levels, strict=True)]
        consistent = [None if why else True for why in missing]
        return Answers(np.array(shown), missing, {"order_consistent": consistent, "prompt_tokens": [7] * len(questions),
                                                  "answer_tokens": [1] * len(questions)})  # fmt: skip


@pytest.fixture
def picky(monkeypatch):
    judge = Picky()
    load = registry.load_judge
    monkeypatch.setattr(Picky, "least", 100)
    monkeypatch.setattr(registry, "load_judge", lambda spec, settings: judge if spec == "picky" else load(spec, settings))
    return judge


def test_several_judges_share_the_decoded_images(pairs, monkeypatch, picky, tmp_path):
    from dedpo_diffusion.judges import scorers

    monkeypatch.setitem(scorers.SCORERS, "darkness", lambda location, **options: Darkness())
    decoded, decode, Picky.least = [], decoding.decode_image, -1
    monkeypatch.setattr(decoding, "decode_image", lambda data, where: decoded.append(where) or decode(data, where))
    assert label(pairs, "--with", "brightness", "darkness", "picky") == 0
    assert len(decoded) == 2 * COUNT == len(set(decoded))
    np.testing.assert_array_equal(scores(pairs), LEVELS)
    np.testing.assert_array_equal(scores(pairs, "darkness"), -LEVELS)
    np.testing.assert_array_equal(scores(pairs, "picky"), LEVELS)
    np.testing.assert_allclose(read_labels(pairs, "picky").label_0, expit((LEVELS[:, 0] - LEVELS[:, 1]) / 2), rtol=1e-14)
    alone = write(tmp_path / "alone")
    assert label(alone) == 0
    assert (alone / "labels" / "brightness.parquet").read_bytes() == (pairs / "labels" / "brightness.parquet").read_bytes()


def test_a_second_judge_is_added_without_asking_the_first_again(pairs, monkeypatch, picky):
    assert label(pairs) == 0
    Watched.scored = 0
    assert label(pairs, "--with", "brightness", "picky") == 0
    assert Watched.scored == 0 and len(picky.asked) == COUNT


def test_missing_answers_are_left_out_said_and_asked_for_again(pairs, picky, capsys):
    assert label(pairs, "--with", "picky") == 0
    known = [f"p{k}" for k in range(COUNT) if LEVELS[k, 0] >= 100]
    assert 0 < len(known) < COUNT
    assert read_labels(pairs, "picky").pair_id == known
    said = capsys.readouterr().out
    assert f"{COUNT - len(known)} of {COUNT} pairs have no answer of picky" in said and "too dark" in said
    picky.asked, Picky.least = [], 50
    assert label(pairs, "--with", "picky") == 0
    assert picky.asked == [f"p{k}" for k in range(COUNT) if LEVELS[k, 0] < 100]
    assert read_labels(pairs, "picky").pair_id == [f"p{k}" for k in range(COUNT) if LEVELS[k, 0] >= 50]
    picky.asked, Picky.least = [], -1
    assert label(pairs, "--with", "picky") == 0
    assert read_labels(pairs, "picky").pair_id == [f"p{k}" for k in range(COUNT)]
    np.testing.assert_array_equal(scores(pairs, "picky"), LEVELS)
    assert [path.name for path in (pairs / "labels").iterdir()] == ["picky.parquet"]


def test_a_judge_without_any_answer_is_an_error_and_does_not_hold_up_the_others(pairs, picky, capsys):
    Picky.least = 1000
    assert label(pairs, "--with", "picky", "brightness") == 2
    assert "answered none of the 11 pairs (pair p0: too dark)" in capsys.readouterr().err
    np.testing.assert_array_equal(scores(pairs), LEVELS)


def test_the_summary_counts_the_tokens_of_missing_and_repeated_answers(pairs, picky, monkeypatch):
    """11 pairs at 7 tokens, and those without an answer once more."""
    from dedpo_diffusion.judges import summary as judge_summary

    told = []
    monkeypatch.setattr(judge_summary, "summarise", lambda *_, extra, **__: told.append(extra["picky"]))
    assert label(pairs, "--with", "picky", "--summary", "true") == 0
    missing = int((LEVELS[:, 0] < 100).sum())
    Picky.least = -1
    assert label(pairs, "--with", "picky", "--summary", "true") == 0
    assert [(extra["prompt_tokens"], extra["answer_tokens"]) for extra in told] == [(77, 11), (7 * (11 + missing), 11 + missing)]


def test_missing_answers_without_their_parts_are_told_as_such(pairs, picky, capsys):
    assert label(pairs, "--with", "picky") == 0
    shutil.rmtree(pairs / "labels" / ".picky.parts")
    assert label(pairs, "--with", "picky") == 2
    assert "of 11 pairs, and .picky.parts, from which it would resume, is not there" in capsys.readouterr().err


def test_labels_of_other_images_under_the_same_ids_are_not_taken_for_these(pairs, capsys):
    assert label(pairs) == 0
    (pairs / "pairs").rename(pairs / "old")
    write(pairs, LEVELS[::-1], ["another prompt"] * COUNT)
    assert label(pairs) == 2
    assert "labels other pairs" in capsys.readouterr().err


def test_runs_that_begin_at_once_with_other_judges_of_one_name_do_not_mix(pairs, capsys):
    Watched.last = 0
    assert label(pairs) == 130  # nothing is kept yet
    Watched.last, Watched.version = float("inf"), "brightness-2"
    assert label(pairs) == 2
    assert "unfinished labels of another judge version" in capsys.readouterr().err


def test_keys_that_another_run_removes_are_made_again(pairs, monkeypatch):
    from dedpo_diffusion.core import engine

    share_tasks, removed = engine.share_tasks, []

    def interfere(tasks, **options):
        yield from share_tasks(tasks, **options)
        for folder in list((pairs / "labels").glob(".keys-*"))[: 1 - len(removed)]:
            removed.append(folder)
            shutil.rmtree(folder)

    monkeypatch.setattr(engine, "share_tasks", interfere)
    assert label(pairs) == 0
    assert len(removed) == 1
    np.testing.assert_array_equal(scores(pairs), LEVELS)


# ---- killed, resumed, shared


@pytest.mark.parametrize("last", [0, 7, 8, 14, 21])
def test_a_killed_run_goes_on_and_ends_with_the_same_file(pairs, tmp_path, last, capsys):
    """11 pairs in shards of 4, 4, 3; 6 images at once. After 8 images (4 pairs) the first shard is kept, after 16 the second."""
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


def command(folder, *more: str) -> list[str]:
    options = ["--with", "oracle_reward", "--batch", "4", "--shard", "8", "--summary", "false"]
    return [sys.executable, "-m", "dedpo_diffusion.pipelines.label", str(folder), *options, *more]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """400 pairs of renders, some of which come in several pairs, and the label file of an uninterrupted run."""
    rng = np.random.default_rng(1)
    prompts = [attributes.prompt for attributes in world.VOCABULARY[::9]]
    images = []
    for _ in range(40):
        buffer = io.BytesIO()
        world.render(world.sample_scene(rng, clutter=0.5)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    folder = tmp_path_factory.mktemp("rendered") / "d"
    with PairWriter(folder, shard_pairs=150) as writer:
        for k in range(400):
            one, other = rng.choice(len(images), 2, replace=False)
            writer.add(Pair(f"p{k}", prompts[rng.integers(len(prompts))], images[one], images[other]))
    assert subprocess.run(command(folder), capture_output=True, check=False).returncode == 0
    whole = (folder / "labels" / "oracle_reward.parquet").read_bytes()
    (folder / "labels" / "oracle_reward.parquet").unlink()
    return folder, whole


@pytest.mark.slow
def test_twenty_kills_leave_the_labels_of_an_uninterrupted_run(rendered):
    folder, whole = rendered
    rng, path, kills, kept = random.Random(0), folder / "labels" / "oracle_reward.parquet", 0, []
    parts = folder / "labels" / ".oracle_reward.parts"
    while kills < 20:
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(parts.glob("shard-*.parquet"))) <= (kept[-1] if kept else 0) and not path.exists():
            time.sleep(0.005)  # until it has finished one more shard
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if path.exists():  # it was done before: once more from the start
            assert path.read_bytes() == whole
            path.unlink()
            kept.append(0)
        else:
            kept.append(len(list(parts.glob("shard-*.parquet"))))
    assert max(kept) > 0
    assert subprocess.run(command(folder), capture_output=True, check=False).returncode == 0
    assert path.read_bytes() == whole
    assert [file.name for file in (folder / "labels").iterdir()] == ["oracle_reward.parquet"]
    path.unlink()


@pytest.mark.slow
def test_processes_that_know_nothing_of_each_other_share_the_pairs(rendered):
    folder, whole = rendered
    started = [subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    path = folder / "labels" / "oracle_reward.parquet"
    assert path.read_bytes() == whole
    assert sum("wrote " in text for text in said) == 1
    assert [file.name for file in (folder / "labels").iterdir()] == ["oracle_reward.parquet"]
    path.unlink()


@pytest.mark.slow
def test_a_launchers_processes_share_the_pairs(rendered):
    """As accelerate launch starts them, with the variables that it sets."""
    folder, whole = rendered
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
    done = subprocess.run(
        [sys.executable, *launch, "--dynamo_backend", "no", "-m", "dedpo_diffusion.pipelines.label", *command(folder)[3:]],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    path = folder / "labels" / "oracle_reward.parquet"
    assert path.read_bytes() == whole
    path.unlink()


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
    assert "no judge may take it" in capsys.readouterr().err
    assert label(pairs, "--name", "human", "--human", "people") == 2
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
        (["--with", "nobody"], "aesthetic, adapted, http, brightness, vlm, openai, self; for Shapes only: oracle_reward"),
        (["--batch", "0"], "batch is 0"),
        (["--temperature", "0"], "temperature is 0"),
        (["--name", "../out"], "cannot name a file"),
        (["--shard", "0"], "shard is 0"),
        (["--with", "brightness", "hps=/no/such/file"], "/no/such/file"),
        (["--with", "brightness", "clip=/no/such/folder"], "/no/such/folder"),
        (["--with", "brightness", "vlm=/no/such/folder"], "/no/such/folder"),
        (["--with", "brightness", "vlm"], "judge vlm needs a location"),
        (["--with", "brightness", "openai=http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["--with", "brightness", "http=http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["--with", "brightness", "self=/no/such/run"], "/no/such/run"),
        (["--with", "brightness", "brightness"], "two of the judges are called brightness"),
        (["--with", "brightness", "oracle_reward", "--name", "both"], "names one label file, and there are 2 judges"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line_before_any_work(pairs, capsys, more, message):
    assert label(pairs, *more) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert Watched.scored == 0 and not (pairs / "labels").exists()


def test_with_human_labels_there_the_summary_is_written_beside_the_labels(pairs, capsys):
    """People who always choose the brighter image agree with a judge that measures brightness."""
    human = (LEVELS[:, 0] > LEVELS[:, 1]).astype(float)
    write_labels(pairs, "human", Labels([f"p{k}" for k in range(COUNT)], human))
    assert label(pairs, "--summary", "true") == 0
    report = json.loads((pairs / "labels" / "brightness.json").read_text())
    assert report["agreement"]["value"] == 1.0 and report["agreement"]["n"] == COUNT
    assert 0 <= report["waiting_share"] <= 1 and report["pairs_per_second"] > 0
    with Image.open(pairs / "labels" / "brightness.png") as picture:
        assert picture.width > 1000
    assert "agrees with people on 100.0% of 11 pairs" in " ".join(capsys.readouterr().out.split())


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
