"""Embeddings beside the scores: from the same pass, of the same images, written and resumed together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.comparison import embeddings
from dedpo_diffusion.evaluation.comparison.embeddings import Embeddings, read_embeddings, write_embeddings
from dedpo_diffusion.evaluation.comparison.samples import load_images
from dedpo_diffusion.evaluation.score import read_index
from dedpo_diffusion.judges import scorers
from dedpo_diffusion.judges.scorers import Embedder, aesthetic, clip, hps, pickscore
from dedpo_diffusion.judges.scorers.embedding import EmbeddingScorer
from support.doubles import Brightness, Watched, register
from support.judges import PROMPTS, build_judge, count_rows, load, pictures
from support.samples import rows_of, run, write_samples


class Seeing(Watched):
    """Brightness with an embedding: the direction of the mean colour."""

    name = "seeing"

    def score_and_embed(self, prompts, images):
        colours = np.array([np.asarray(image, dtype=np.float64).mean((0, 1)) for image in images])
        return self.score(prompts, images), (colours / np.linalg.norm(colours, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return write_samples(tmp_path / "base")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)
    monkeypatch.setitem(scorers.SCORERS, "seeing", lambda location, **options: Seeing())


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge") / "judge")


def expected(folder):
    rows = read_index(folder)
    return Seeing().score_and_embed([""] * len(rows), load_images(folder, rows))[1]


def held(folder):
    return read_embeddings(folder, read_index(folder))


def check(folder):
    """Complete, of norm 1, and those of the images, in float16."""
    found = held(folder)["seeing"]
    assert found.version == Watched.version and found.values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, atol=1e-6)
    Watched.last = float("inf")
    np.testing.assert_allclose(found.values, expected(folder), atol=1e-3)


# ---- the scorers


def test_embeddings_come_from_the_pass_that_scores(judge):
    scorer, images = load(f"pickscore={judge}", batch=2), pictures()
    rows = count_rows(scorer.model.vision_model)
    values, vectors = scorer.score_and_embed(PROMPTS, images)
    assert rows == [2, 2, 1]
    np.testing.assert_array_equal(values, scorer.score(PROMPTS, images))
    assert vectors.shape == (5, 8) and vectors.dtype == np.float32
    with torch.no_grad():
        pixels = torch.stack([scorer.pixels(image) for image in images])
        seen = scorer.model.visual_projection(scorer.model.vision_model(pixel_values=pixels).pooler_output)
    np.testing.assert_allclose(vectors, seen / seen.norm(dim=1, keepdim=True), atol=1e-5)
    assert [part.shape for part in scorer.score_and_embed([], [])] == [(0,), (0, 0)]


def test_half_precision_towers_give_embeddings_of_norm_1(judge):
    vectors = load(f"pickscore={judge}", dtype="float16").score_and_embed(PROMPTS, pictures())[1]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_who_embeds(judge):
    for kind in (pickscore.PickScore, clip.ClipScore, hps.HpsScore, aesthetic.AestheticScore):
        assert issubclass(kind, EmbeddingScorer)
    assert isinstance(load(f"pickscore={judge}"), Embedder) and isinstance(Seeing(), Embedder)
    assert not isinstance(load("oracle_reward"), Embedder) and not isinstance(Brightness(), Embedder)


# ---- the command


def test_a_clip_scorer_writes_what_its_tower_saw(folder, judge):
    assert run(folder, f"pickscore={judge}", "oracle_reward") == 0
    rows, scorer = read_index(folder), load(f"pickscore={judge}", batch=5)
    found = held(folder)
    assert list(found) == ["pickscore"] and found["pickscore"].version == scorer.version
    vectors = scorer.score_and_embed([row["prompt"] for row in rows], load_images(folder, rows))[1]
    np.testing.assert_allclose(found["pickscore"].values, vectors, atol=1e-3)
    assert held_in_another_order(folder, rows[::-1]) == pytest.approx(found["pickscore"].values[::-1])
    assert (folder / "embeddings" / "pickscore.safetensors").stat().st_size < 12 * 8 * 2 + 1000  # float16


def held_in_another_order(folder, rows):
    return read_embeddings(folder, rows)["pickscore"].values


def test_a_stopped_run_keeps_scores_and_embeddings_and_ends_with_the_same_files(folder, tmp_path, monkeypatch):
    whole = write_samples(tmp_path / "whole")
    assert run(whole, "seeing") == 0
    monkeypatch.setattr(score, "SAVE_EVERY", -1.0)
    Watched.scored, Watched.last = 0, 7
    assert run(folder, "seeing") == 130
    assert len(rows_of(folder, "seeing")) == 5 and held(folder) == {}  # of 5 images: not yet of all
    assert len(embeddings.read_some(folder, read_index(folder), "seeing")[1]) == 5
    Watched.scored, Watched.last = 0, float("inf")
    assert run(folder, "seeing") == 0
    assert Watched.scored == 7
    assert (folder / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()
    np.testing.assert_array_equal(held(folder)["seeing"].values, held(whole)["seeing"].values)
    assert run(folder, "seeing") == 0 and Watched.scored == 7
    check(folder)


def test_a_kill_between_the_two_files_leaves_no_score_without_an_embedding(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(score, "write_scores", killed)
        assert run(folder, "seeing") == 130
    assert not (folder / "scores.parquet").exists() and (folder / "embeddings").is_dir()
    assert run(folder, "seeing") == 0 and len(rows_of(folder, "seeing")) == 12
    check(folder)


def test_scores_without_embeddings_get_them_and_stay_as_they_are(folder, capsys):
    assert run(folder, "seeing", "--embeddings", "false") == 0
    assert not (folder / "embeddings").exists()
    rows = read_index(folder)
    old = [{**row, "scorer": "seeing", "version": "brightness-1", "score": float(k)} for k, row in enumerate(rows)]
    score.write_scores(folder, rows, old)
    capsys.readouterr()
    assert run(folder, "seeing") == 0
    assert "12 of 12 images have a score of seeing and no embedding; they go through its image tower once more" in capsys.readouterr().out
    assert [row["score"] for row in rows_of(folder, "seeing")] == list(range(12))
    check(folder)


def test_embeddings_of_another_version_are_made_again(folder, capsys):
    assert run(folder, "seeing") == 0
    write_embeddings(folder, read_index(folder), "seeing", Embeddings("brightness-0", np.eye(12, dtype=np.float32)))
    assert run(folder, "seeing") == 0
    assert "embeddings of brightness-0 are replaced by brightness-1" in capsys.readouterr().out
    check(folder)
    Watched.version = "brightness-2"
    assert run(folder, "seeing") == 0
    assert {row["version"] for row in rows_of(folder, "seeing")} == {"brightness-2"}
    check(folder)


def test_embeddings_of_earlier_images_do_not_count(folder):
    assert run(folder, "seeing") == 0
    load_images(folder, read_index(folder))[0].transpose(1).save(folder / "0-0.png")
    assert held(folder) == {}
    assert run(folder, "seeing") == 0
    check(folder)


def damage(folder, **changes):
    """Embeddings on which the shapes of a file and what it says of itself do not agree."""
    from safetensors.numpy import load_file, save_file

    path = folder / "embeddings" / "seeing.safetensors"
    values = changes.pop("values", load_file(path)["embeddings"])
    digest = score.images_digest(folder, read_index(folder))
    files = '["' + '","'.join(row["file"] for row in read_index(folder)) + '"]'
    metadata = {"version": "brightness-1", "images": digest, "files": files, **changes}
    save_file({"embeddings": values}, path, metadata={key: value for key, value in metadata.items() if value})


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "embeddings" / "seeing.safetensors").write_bytes(b"no"),
        lambda f: damage(f, files="[]"),
        lambda f: damage(f, files="["),
        lambda f: damage(f, version=""),
        lambda f: damage(f, values=np.zeros((12, 3), np.float16)),
        lambda f: damage(f, values=np.full((12, 3), np.nan, np.float16)),
        lambda f: damage(f, values=np.ones(12, np.float16)),
    ],
)
def test_damaged_embeddings_are_refused(folder, harm, capsys):
    assert run(folder, "seeing") == 0
    damage(folder)
    check(folder)
    harm(folder)
    assert run(folder, "seeing") == 2
    message = "seeing.safetensors cannot be read"
    assert message in (said := capsys.readouterr().err) and "remove it and run `dedpo score` again" in said


def test_an_embedding_that_is_no_direction_stops_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(Seeing, "score_and_embed", lambda self, prompts, images: (np.ones(len(images)), np.zeros((len(images), 3))))
    assert run(folder, "seeing") == 2
    assert "scorer seeing gave 0-0.png an embedding that is not of norm 1" in capsys.readouterr().err
    assert not (folder / "embeddings").exists()


def test_one_embedding_for_each_named_image(folder):
    with pytest.raises(ValueError, match="3 embeddings of 2 images"):
        write_embeddings(folder, read_index(folder), "x", Embeddings("1", np.eye(3)), files=["0-0.png", "0-1.png"])
