"""`dedpo score` on sample folders: what is written, kept, replaced and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_scorers import build_judge

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.shapes import oracle, world
from doubles import Watched, register

PROMPTS = [attributes.prompt for attributes in world.VOCABULARY[::24]]  # six


def write_samples(folder: Path, seed: int = 0, *, clutter: float = 0.5, each: int = 2) -> Path:
    """A sample folder as `dedpo sample` leaves it: renders of six prompts, with or without clutter."""
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        for k in range(each):
            row = {"file": f"{index}-{k}.png", "prompt": prompt, "prompt_index": index, "seed": 100 + index * each + k}
            rng = np.random.default_rng((seed, row["seed"]))
            world.render(world.sample_scene(rng, world.parse_prompt(prompt), clutter=clutter)).save(folder / row["file"])
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_samples(tmp_path / "base")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def run(folder, *names: str, batch: int = 5) -> int:
    return score.main([str(folder), "--with", *names, "--batch", str(batch), "--device", "cpu"])


def rows_of(folder, scorer):
    return [row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["scorer"] == scorer]


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
    assert "holds scores of other images" in capsys.readouterr().out
    assert rows_of(folder, "brightness")[0]["score"] == 0.0 and rows_of(folder, "oracle_reward") == []


def test_a_clip_scorer_through_the_command(folder, tmp_path):
    assert run(folder, f"pickscore={build_judge(tmp_path / 'judge')}") == 0
    assert np.ptp([row["score"] for row in rows_of(folder, "pickscore")]) > 0.001


def rewrite(folder, change):
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), folder / "index.parquet")


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
