"""Diversity over seeds and drift from the base: identities, known values, and what folders lacking embeddings get."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.compare import compare
from dedpo_diffusion.evaluation.comparison.arms import load_arms
from dedpo_diffusion.evaluation.comparison.embeddings import Embeddings, write_embeddings
from dedpo_diffusion.evaluation.comparison.spread import diversity, drift, spread
from support.samples import write_samples
from support.scores import BASE, put_scores, settings

FEW = {"resamples": 200, "seed": 0}


def directions(seed, rows=12, size=8):
    e = np.random.default_rng(seed).normal(size=(rows, size))
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def test_diversity_is_the_mean_over_pairs_written_as_a_loop():
    e, prompts = directions(0), np.array([0, 1, 0, 1, 1, 2, 0, 2, 1, 3, 0, 0])
    found = diversity(e, prompts)
    for prompt in range(3):
        mine = e[prompts == prompt]
        pairs = [1 - mine[i] @ mine[j] for i in range(len(mine)) for j in range(i)]
        assert found[prompt] == pytest.approx(np.mean(pairs))
    assert np.isnan(found[3])  # one image has no pair


def test_known_values_and_invariances():
    """Equal images 0, orthogonal ones 1, opposite ones 2; turning the space changes nothing."""
    x, y = np.eye(2)
    np.testing.assert_allclose(diversity(np.stack([x, x, x, y, x, -x]), np.repeat([0, 1, 2], 2)), [0, 1, 2], atol=1e-15)
    np.testing.assert_allclose(drift(np.stack([x, x, x]), np.stack([x, y, -x])), [0, 1, 2], atol=1e-15)
    e, b, turn = directions(1), directions(2), np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    prompts = np.repeat(np.arange(6), 2)
    np.testing.assert_allclose(diversity(e @ turn, prompts), diversity(e, prompts))
    np.testing.assert_allclose(drift(e @ turn, b @ turn), drift(e, b))
    np.testing.assert_allclose(drift(e, b), 1 - (e * b).sum(axis=1))


def sampled(tmp_path, each=2, **embedders):
    """A base and an arm; embeddings by embedder: those of the base, of the arm, and the versions."""
    folders = []
    for k, name in enumerate(("base", "tuned")):
        folder = put_scores(write_samples(tmp_path / name, each=each), truth=np.arange(6 * each) + k)
        rows = score.read_index(folder)
        for embedder, (*values, versions) in embedders.items():
            if values[k] is not None:
                write_embeddings(folder, rows, embedder, Embeddings(versions[k], values[k]))
        folders.append(folder)
    return folders


def test_an_arm_that_draws_one_image_for_all_seeds_of_a_prompt(tmp_path):
    """Diversity 0, so the loss is the base's own diversity, prompt by prompt; the base against itself is exactly nothing."""
    base = directions(4)
    folders = sampled(tmp_path, clip=(base, np.repeat(base[::2], 2, axis=0), "11"))
    found = {name: arm["spread"]["clip"] for name, arm in compare(settings(folders))["arms"].items()}
    assert found["base"]["diversity_minus_base"] == found["base"]["drift"] == {"mean": 0.0, "ci": [0.0, 0.0]}
    tuned = found["tuned"]
    assert tuned["version"] == "1" and tuned["diversity"]["mean"] == pytest.approx(0, abs=1e-12)
    assert tuned["diversity_minus_base"]["mean"] == pytest.approx(-found["base"]["diversity"]["mean"])
    low, high = tuned["diversity_minus_base"]["ci"]
    assert [-high, -low] == pytest.approx(found["base"]["diversity"]["ci"])
    expected = np.mean([0, 1] * 6 * (1 - np.repeat((base[::2] * base[1::2]).sum(axis=1), 2)))
    assert tuned["drift"]["mean"] == pytest.approx(expected, abs=2e-3)  # float16 in the file


def test_embedders_that_not_all_folders_hold_alike_are_left_out_and_told(tmp_path):
    e = directions(5)
    arms, _ = load_arms(sampled(tmp_path, a=(e, e, "11"), b=(e, None, "11"), c=(e, e, "12")))
    found, notes = spread(arms, **FEW)
    assert list(found["tuned"]) == ["a"]
    assert notes[0].startswith("Embeddings of b are left out, since tuned has none of the present images; run `dedpo score`")
    assert notes[1].startswith("Embeddings of c are left out, since they are of 1 and of 2; run `dedpo score`")


def test_one_seed_a_prompt_has_drift_and_no_diversity(tmp_path):
    arms, _ = load_arms(sampled(tmp_path, each=1, clip=(directions(6, 6), directions(7, 6), "11")))
    found, _ = spread(arms, **FEW)
    entry = found["tuned"]["clip"]
    assert entry["diversity"] is None and entry["diversity_minus_base"] is None and entry["drift"]["ci"][0] > 0


def test_without_embeddings_nothing_is_said(tmp_path):
    found = compare(settings([put_scores(write_samples(tmp_path / name), truth=BASE) for name in ("base", "tuned")]))
    assert found["arms"]["tuned"]["spread"] == {} and found["notes"] == []
