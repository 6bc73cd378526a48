"""Which human labels hang together, by prompt, ranking or image; and that intervals of the commands count them so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.labels.calibration import score_agreement
from dedpo_diffusion.labels.files import write_labels
from dedpo_diffusion.pairs.clusters import label_clusters
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines.merge import main as merge
from dedpo_diffusion.pipelines.validate import main as validate
from support.pictures import picture


def dataset(folder, prompts: list[str], images: list[tuple[int, int]] | None = None) -> PairReader:
    """Pairs of these prompts, of images by number; without numbers every image is another."""
    images = [(2 * k, 2 * k + 1) for k in range(len(prompts))] if images is None else images
    with PairWriter(folder) as writer:
        for k, (prompt, (one, other)) in enumerate(zip(prompts, images, strict=True)):
            writer.add(Pair(f"p{k}", prompt, b"%d" % one, b"%d" % other))
    return PairReader(folder)


def parts(clusters: np.ndarray) -> list[list[int]]:
    """The rows of each cluster, without those of no label."""
    return sorted(np.flatnonzero(clusters == k).tolist() for k in set(clusters.tolist()) - {-1})


def test_labels_of_one_prompt_are_one_cluster(tmp_path):
    reader = dataset(tmp_path / "d", [f"prompt {k % 25}" for k in range(50)])
    human = np.where(np.arange(50) < 30, 1.0, np.nan)
    found = label_clusters(reader, human)
    assert parts(found) == sorted([[k, k + 25] for k in range(5)] + [[k] for k in range(5, 25)])
    assert (found[30:] == -1).all()
    assert label_clusters(reader, np.where(np.arange(50) < 25, 1.0, np.nan)) is None  # all of prompts of their own
    assert label_clusters(reader, np.full(50, np.nan)) is None


def test_a_ranking_joins_prompts(tmp_path):
    reader = dataset(tmp_path / "d", [f"prompt {k // 2}" for k in range(60)])
    ranked = np.full(60, -1)
    ranked[[1, 2]] = 7
    found = label_clusters(reader, np.ones(60), ranked)
    assert parts(found)[0] == [0, 1, 2, 3] and len(parts(found)) == 29


def test_few_prompts_are_no_clusters_and_shared_images_are(tmp_path):
    """One prompt; pairs 0, 1, 2 are a chain of images, 3 and 4 share one, which is on another side."""
    images = [(0, 1), (1, 2), (2, 3), (10, 11), (12, 10), *((20 + 2 * k, 21 + 2 * k) for k in range(25))]
    reader = dataset(tmp_path / "d", ["a prompt"] * 30, images)
    found = label_clusters(reader, np.ones(30))
    assert parts(found)[:2] == [[0, 1, 2], [3, 4]] and len(parts(found)) == 27


def test_where_all_images_hang_together_rankings_alone_count(tmp_path):
    reader = dataset(tmp_path / "d", ["a prompt"] * 30, [(k, k + 1) for k in range(30)])
    assert label_clusters(reader, np.ones(30)) is None
    ranked = np.where(np.arange(30) < 3, 5, -1)
    assert parts(label_clusters(reader, np.ones(30), ranked))[0] == [0, 1, 2]


@pytest.fixture
def repeated(tmp_path):
    """30 prompts of 4 pairs each, all labelled, on which a judge is right or wrong by prompt."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(30), 4)
    human = rng.integers(0, 2, 120).astype(float)
    judge = np.where((rng.random(30) < 0.7)[prompt], human, 1 - human) * 0.8 + 0.1
    with PairWriter(tmp_path / "d") as writer:
        for k in range(120):
            writer.add(Pair(f"p{k}", f"prompt {prompt[k]}", picture(2 * k), picture(2 * k + 1)))
    write_labels(tmp_path / "d", "human", Labels([f"p{k}" for k in range(120)], human))
    write_labels(tmp_path / "d", "clip", Labels([f"p{k}" for k in range(120)], judge))
    return tmp_path / "d", prompt, human, judge


def test_the_intervals_of_a_merge_count_prompts(repeated):
    folder, prompt, human, judge = repeated
    assert merge([str(folder), "--picture", "false"]) == 0
    report = json.loads((folder / "targets" / "tuned.json").read_text())
    plain, expected = merge_labels(human, judge).report, merge_labels(human, judge, clusters=prompt).report
    for key in ("agreement", "judge_bias", "effective_human_labels", "power_se"):
        assert report[key] == expected[key], key
    assert report["clusters"] == 30 and report["power"] == plain["power"]  # what is trained on does not change
    low, high = report["agreement"]["ci"]
    assert high - low > 1.5 * np.ptp(plain["agreement"]["ci"]) and report["agreement"]["independent"] == pytest.approx(30, rel=0.2)
    assert any("the 120 come from 30 independent ones" in sentence for sentence in report["sentences"])


def test_those_of_validate_do(repeated):
    folder, prompt, _, _ = repeated
    assert validate([str(folder)]) == 0
    judge = json.loads((folder / "validate.json").read_text())["judges"]["clip"]
    assert judge["clusters"] == 30 and judge["independent"] == pytest.approx(30, rel=0.2)


def test_and_those_of_a_calibration():
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(40), 5)
    right = (rng.random(40) < 0.7)[prompt]
    differences, human, even = np.where(right, 1.0, -1.0), np.ones(200), np.ones(200)
    plain, counted = score_agreement(differences, human, even), score_agreement(differences, human, even, prompt)
    assert counted["value"] == plain["value"] and np.ptp(counted["ci"]) > 1.8 * np.ptp(plain["ci"])
    assert score_agreement(differences, human, even, np.arange(200)) == plain
    assert score_agreement(differences, human, even, prompt // 10) == plain  # four groups tell no interval
