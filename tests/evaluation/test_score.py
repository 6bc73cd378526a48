"""`dedpo score` on sample folders: what is written, kept, replaced and refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.comparison.intervals import mean_interval
from dedpo_diffusion.judges import scorers
from dedpo_diffusion.shapes import oracle
from support.doubles import Watched, register
from support.judges import build_judge
from support.samples import PROMPTS, rewrite, rows_of, run, write_samples


@pytest.fixture
def folder(tmp_path):
    return write_samples(tmp_path / "base")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def brightness(folder, row):
    return np.asarray(Image.open(folder / row["file"]), dtype=np.float64).mean()


def test_every_image_gets_its_score_under_its_own_name(folder):
    assert run(folder, "oracle_reward", "brightness") == 0
    index = pq.read_table(folder / "index.parquet").to_pylist()
    for scorer in ("oracle_reward", "brightness"):
        found = rows_of(folder, scorer)
        assert [{key: row[key] for key in score.INDEX} for row in found] == index
    rewards = oracle.reward([row["prompt"] for row in index], [Image.open(folder / row["file"]) for row in index])
    np.testing.assert_array_equal([row["score"] for row in rows_of(folder, "oracle_reward")], rewards)
    assert [row["score"] for row in rows_of(folder, "brightness")] == [brightness(folder, row) for row in index]
    assert {row["version"] for row in rows_of(folder, "oracle_reward")} == {"shapes-oracle-1"}


def test_scores_of_the_same_version_are_kept_and_of_others_replaced(folder, capsys):
    assert run(folder, "brightness") == 0
    assert Watched.scored == 12
    assert run(folder, "oracle_reward", "brightness") == 0
    assert Watched.scored == 12 and "all 12 images are scored already" in capsys.readouterr().out
    assert (len(rows_of(folder, "brightness")), len(rows_of(folder, "oracle_reward"))) == (12, 12)
    Watched.version = "brightness-2"
    assert run(folder, "brightness") == 0
    assert Watched.scored == 24 and "scores of brightness-1 are replaced by brightness-2" in capsys.readouterr().out
    assert {row["version"] for row in rows_of(folder, "brightness")} == {"brightness-2"}
    assert len(rows_of(folder, "oracle_reward")) == 12


def test_a_killed_run_keeps_what_it_wrote_and_ends_with_the_same_file(folder, tmp_path, monkeypatch):
    whole = write_samples(tmp_path / "whole")
    assert run(whole, "oracle_reward", "brightness") == 0
    assert run(folder, "oracle_reward") == 0
    monkeypatch.setattr(score, "SAVE_EVERY", -1.0)
    Watched.scored, Watched.last = 0, 7
    assert run(folder, "brightness") == 130
    assert (len(rows_of(folder, "brightness")), len(rows_of(folder, "oracle_reward"))) == (5, 12)
    Watched.scored, Watched.last = 0, float("inf")
    assert run(folder, "brightness") == 0
    assert Watched.scored == 7
    assert (folder / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()


def test_scores_of_earlier_images_do_not_pass_for_those_of_new_ones(folder, capsys):
    assert run(folder, "brightness", "oracle_reward") == 0
    Image.new("RGB", (64, 64)).save(folder / "0-0.png")
    assert run(folder, "brightness") == 0
    told = "holds scores of other images; they do not count; give all its scorers again (brightness, oracle_reward)"
    assert told in capsys.readouterr().out
    assert rows_of(folder, "brightness")[0]["score"] == 0.0 and rows_of(folder, "oracle_reward") == []


def test_a_clip_scorer_through_the_command(folder, tmp_path):
    assert run(folder, f"pickscore={build_judge(tmp_path / 'judge')}") == 0
    assert np.ptp([row["score"] for row in rows_of(folder, "pickscore")]) > 0.001


SCORED = (*score.INDEX, "scorer", "version", "score")


def put_scores(folder, names=("oracle_reward",) * 12, *, metadata=None, **changes):
    """Write scores 0, 1, ... of one scorer name a row; `changes` go to row 2."""
    rows = score.read_index(folder)
    held = [{**rows[k % 12], "scorer": name, "version": f"{name}-1", "score": float(k)} for k, name in enumerate(names)]
    held[2] |= changes
    score.write_scores(folder, rows, held)
    if metadata is not None:
        path = folder / "scores.parquet"
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "2-1.png").unlink(), "2-1.png is missing (index.parquet row 5); restore it"),
        (lambda f: truncate(f / "2-1.png"), "2-1.png: the image cannot be decoded"),
        (lambda f: (f / "index.parquet").unlink(), "`dedpo sample --out"),
        (lambda f: (f / "index.parquet").write_bytes(b"no"), "cannot be read as parquet"),
        (lambda f: rewrite(f, lambda rows: [{k: v for k, v in row.items() if k != "seed"} for row in rows]), "no column 'seed'"),
        (lambda f: rewrite(f, lambda rows: [*rows, rows[3]]), "lists 1-1.png in row 3 and again in row 12"),
        (lambda f: (f / "scores.parquet").write_bytes(b"no"), "scores.parquet cannot be read"),
        (lambda f: rewrite(f, lambda rows: [{**row, "prompt": "a cat"} for row in rows]), "not a Shapes prompt: 'a cat'"),
        (lambda f: (f / "2-1.png").write_bytes(b""), "2-1.png (index.parquet row 5): the image cannot be decoded"),
        (lambda f: put_scores(f, score=None), "scores.parquet: row 2 has the score None of oracle_reward; remove the file"),
        (lambda f: put_scores(f, score=float("nan")), "scores.parquet: row 2 has the score nan of oracle_reward; remove the file"),
        (lambda f: pq.write_table(pa.table({"file": ["0-0.png"]}), f / "scores.parquet"), "scores.parquet cannot be read"),
        (lambda f: pq.write_table(pa.table({name: ["x"] for name in SCORED}), f / "scores.parquet"), "scores.parquet cannot be read"),
    ],
)
def test_bad_sample_folders(folder, damage, message, capsys):
    damage(folder)
    before = (folder / "scores.parquet").read_bytes() if (folder / "scores.parquet").exists() else None
    assert run(folder, "oracle_reward") == 2
    assert message in capsys.readouterr().err
    assert ((folder / "scores.parquet").read_bytes() if (folder / "scores.parquet").exists() else None) == before


def test_a_scorer_named_twice(folder, capsys):
    assert run(folder, "brightness", "brightness=x") == 2
    assert "scorer brightness is named twice" in capsys.readouterr().err


# ---- several folders, several processes


@pytest.fixture
def two(folder, tmp_path):
    return [folder, write_samples(tmp_path / "tuned", seed=1)]


def test_a_scorer_is_loaded_once_for_all_folders(two, monkeypatch):
    made = []
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: made.append(1) or Watched())
    assert run(two, "brightness", "oracle_reward") == 0
    assert len(made) == 1 and Watched.scored == 24
    for folder in two:
        index = pq.read_table(folder / "index.parquet").to_pylist()
        assert [row["score"] for row in rows_of(folder, "brightness")] == [brightness(folder, row) for row in index]
        assert len(rows_of(folder, "oracle_reward")) == 12


def test_nothing_is_scored_before_every_folder_was_looked_at(two, capsys):
    (two[1] / "1-1.png").unlink()
    assert run(two, "brightness") == 2
    assert "tuned/1-1.png is missing" in capsys.readouterr().err and Watched.scored == 0
    assert run([two[0], two[0].parent / "base" / ".." / "base"], "brightness") == 2
    assert "is given twice" in capsys.readouterr().err and Watched.scored == 0


def test_two_writers_lose_nothing(two, capsys):
    """While another process holds the first folder, the second is scored; then what the other wrote is kept."""
    folder, (started, done) = two[0], (threading.Event(), threading.Event())
    codes = []

    def scoring():
        started.set()
        codes.append(run(two, "brightness"))
        done.set()

    with hold_lock(folder / score.LOCK) as mine:
        assert mine
        thread = threading.Thread(target=scoring)
        thread.start()
        deadline = time.monotonic() + 20
        while not (two[1] / "scores.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(rows_of(two[1], "brightness")) == 12
        assert not done.wait(0.1) and not (folder / "scores.parquet").exists()
        put_scores(folder)
    thread.join(20)
    assert codes == [0] and (len(rows_of(folder, "brightness")), len(rows_of(folder, "oracle_reward"))) == (12, 12)
    assert f"{folder} is being scored by another process; waiting for that to end" in capsys.readouterr().out


KILLED = """
import os, signal
from dedpo_diffusion.judges import scorers
from dedpo_diffusion.evaluation import score
from support import doubles

class Mortal(doubles.Brightness):
    scored = 0

    def score(self, prompts, images):
        self.scored += len(images)
        if self.scored > 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(prompts, images)

scorers.SCORERS["brightness"] = lambda location, **options: Mortal()
score.SAVE_EVERY = -1.0
score.main([FOLDER, "--with", "brightness", "--batch", "5"])
"""


@pytest.mark.slow
def test_a_process_killed_outright_costs_what_it_had_not_saved(folder, tmp_path):
    whole = write_samples(tmp_path / "whole")
    assert run(whole, "brightness") == 0
    done = subprocess.run([sys.executable, "-c", f"FOLDER = {str(folder)!r}{KILLED}"], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -signal.SIGKILL and len(rows_of(folder, "brightness")) == 5
    Watched.scored = 0
    assert run(folder, "brightness") == 0  # its lock went with it
    assert Watched.scored == 7
    assert (folder / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()


# ---- what does not count, and what is told


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        (["brightness"] * 12, {"version": "brightness-0"}, "holds scores of brightness by several versions (brightness-0, brightness-1)"),
        (["brightness"] * 13, {}, "holds several scores of brightness for one image; none of brightness's counts"),
    ],
)
def test_scores_that_were_mixed_together_never_count(folder, names, changes, said, capsys):
    put_scores(folder, [*names, *["oracle_reward"] * 11], **changes)
    rows = score.read_index(folder)
    assert {row["scorer"] for row in score.read_scores(folder, rows)} == {"oracle_reward"}
    assert said in capsys.readouterr().out
    assert run(folder, "brightness") == 0
    assert Watched.scored == 12 and [row["score"] for row in rows_of(folder, "brightness")] == [brightness(folder, row) for row in rows]
    assert len(rows_of(folder, "oracle_reward")) == 11  # and of the others nothing is lost


def test_scores_of_images_told_apart_by_size_alone_do_not_count(folder, capsys):
    put_scores(folder, metadata={"images": 64 * "0"})
    assert score.read_scores(folder, score.read_index(folder)) == []
    assert "was written when images were told apart by name and size alone" in capsys.readouterr().out


def test_other_sizes_and_unlisted_images_are_told_once(folder, capsys):
    Image.new("RGB", (32, 48)).save(folder / "0-0.png")
    Image.new("RGB", (64, 64)).save(folder / "more.png")
    assert run(folder, "brightness", "oracle_reward") == 0
    out = capsys.readouterr().out
    assert out.count("images of 2 sizes (11 of 64 x 64, 1 of 32 x 48)") == 1
    assert out.count("images that index.parquet does not list are not scored: 1, the first more.png") == 1
    assert len(rows_of(folder, "brightness")) == 12
    assert run(write_samples(folder.parent / "plain"), "brightness") == 0
    assert "images of 2 sizes" not in (out := capsys.readouterr().out) and "not scored" not in out


def test_a_mean_comes_with_its_scorer_version_count_and_interval(folder, capsys):
    assert run(folder, "brightness") == 0
    values = np.array([row["score"] for row in rows_of(folder, "brightness")])
    found = mean_interval(values, np.repeat(PROMPTS, 2))
    line = (
        f"{folder}: brightness {values.mean():.4f} (95 % interval {found.low:.4f} to {found.high:.4f}), "
        "the mean of 12 images of 6 prompts (brightness-1)"
    )
    assert line in capsys.readouterr().out.splitlines()
    assert run(folder, "brightness") == 0 and line in capsys.readouterr().out.splitlines()  # also when all was there


def test_one_prompt_has_no_interval(folder, capsys):
    rewrite(folder, lambda rows: rows[:2])
    assert run(folder, "brightness") == 0
    assert "(no interval: one prompt says nothing about others), the mean of 2 images of 1 prompt (" in capsys.readouterr().out


def test_the_printed_mean_of_outcomes_stays_a_rate(folder):
    """0 and 1 by image, one success of 12: Student's interval would begin below 0."""
    rows = score.read_index(folder)
    told = score.summary(folder, rows, Watched(), {row["file"]: float(k == 0) for k, row in enumerate(rows)})
    low, high = map(float, told.split("95 % interval ")[1].split(")")[0].split(" to "))
    assert 0 < low < 1 / 12 < high < 1
