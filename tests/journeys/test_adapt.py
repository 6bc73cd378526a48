"""`dedpo calibrate --method adapt` and `dedpo merge --method adapted` on Shapes pairs with the carried judge, and on bad input."""

from __future__ import annotations

import io
import json
from importlib.resources import files

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.special import expit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.judges.scorers import Embedder, load_scorer
from dedpo_diffusion.labels import adaptation
from dedpo_diffusion.labels.calibration import calibrate
from dedpo_diffusion.labels.embedding_files import components, has_embeddings
from dedpo_diffusion.labels.files import align, label_names, read_labels, read_targets, write_labels
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.features import known_differences
from dedpo_diffusion.pipelines.calibrate import main
from dedpo_diffusion.pipelines.label import main as label
from dedpo_diffusion.pipelines.merge import main as merge
from dedpo_diffusion.pipelines.train import main as train
from dedpo_diffusion.shapes import oracle
from support.judges import build_judge
from support.pictures import picture
from support.scenes import scenes
from support.training import fresh_accelerate_state  # noqa: F401

pytestmark = pytest.mark.slow

N, N_HUMAN = 160, 90


def png(image):
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="module", autouse=True)
def few_inner_folds():
    """Nothing here depends on their number, and each costs time."""
    before, adaptation.INNER = adaptation.INNER, 5
    yield
    adaptation.INNER = before


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """160 Shapes pairs, 90 answers of their people, the carried CLIP judge with its embeddings, and adapted labels."""
    folder = tmp_path_factory.mktemp("adapt") / "pairs"
    prompts, images = scenes(N, 0)
    with PairWriter(folder) as writer:
        for k, (prompt, (one, other)) in enumerate(zip(prompts, images, strict=True)):
            writer.add(Pair(f"p{k}", prompt, png(one), png(other)))
    rewards = [oracle.reward(prompts, [pair[side] for pair in images]) for side in (0, 1)]
    z = oracle.answers(np.random.default_rng(1), *rewards)
    rows = np.random.default_rng(2).permutation(N)[:N_HUMAN]
    write_labels(folder, "human", Labels([f"p{k}" for k in rows], z[rows]))
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    options = ["--device", "cpu", "--summary", "false", "--keep_embeddings", "true", "--shard", "50"]
    assert label([str(folder), "--with", f"pickscore={judge}", *options]) == 0
    assert main([str(folder), "--method", "adapt"]) == 0
    return folder, oracle.preference(*rewards), rows


def test_people_teach_the_judge_what_it_overlooks(shapes):
    folder, likely, rows = shapes
    report = json.loads((folder / "labels" / "adapt.json").read_text())
    taught = report["calibration"]
    assert taught["adapted"] and taught["n_human"] == N_HUMAN and taught["temperature_of"] == "pickscore"
    detail = next(entry for entry in taught["features"] if entry["name"] == "detail")
    assert detail["weight"] < 0 and detail["ci"][0] < detail["weight"] < detail["ci"][1]
    others = np.setdiff1d(np.arange(N), rows)
    adapted, raw = (align(read_labels(folder, name), PairReader(folder).ids(), folder=folder, name=name) for name in ("adapt", "pickscore"))
    right = [np.mean((g[others] > 0.5) == (likely[others] > 0.5)) for g in (adapted, raw)]
    assert right[0] > right[1]
    assert [file["file"] for file in report["label_files"]] == ["labels/human.parquet", "labels/pickscore.parquet"]


def test_the_file_is_like_any_calibrated_judges(shapes):
    folder, _, _ = shapes
    found = read_labels(folder, "adapt")
    np.testing.assert_array_equal(expit(np.subtract(found.extra["score_0"], found.extra["score_1"])), found.label_0)
    assert pq.read_schema(folder / "labels" / "adapt.parquet").metadata[b"origin"] == b"dedpo calibrate"
    (version,) = set(found.extra["judge_version"])
    assert version.startswith("calibrated adapt of pickscore-")
    assert Image.open(folder / "labels" / "adapt.png").size == (1400, 640)
    assert label_names(folder) == ["adapt", "human", "pickscore"]


def test_the_command_prints_what_people_taught_and_the_next_one(shapes, capsys):
    folder, _, _ = shapes
    before = read_labels(folder, "adapt").label_0
    assert main([str(folder), "--method", "adapt"]) == 0  # never of its own labels
    np.testing.assert_array_equal(read_labels(folder, "adapt").label_0, before)
    printed = capsys.readouterr().out
    report = json.loads((folder / "labels" / "adapt.json").read_text())
    assert all(sentence in printed for sentence in report["calibration"]["sentences"])
    assert printed.splitlines()[-1] == f"next: dedpo merge {folder} --judge adapt --method adapted"


def test_the_adapted_judge_scores_single_images(shapes):
    """Differences of its scores are the log-odds of the pairs that people did not label, whose labels the whole map made."""
    folder, _, rows = shapes
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    scorer = load_scorer(f"adapted={folder},pickscore={judge}", device="cpu", batch=64)
    reader, found = PairReader(folder), read_labels(folder, "adapt")
    groups = {entry["group"] for entry in json.loads((folder / "labels" / "adapt.json").read_text())["calibration"]["features"]}
    assert "statistics" in groups and isinstance(scorer, Embedder)
    others = np.setdiff1d(np.arange(N), rows)[:40]
    pairs = [reader.pair(row) for row in others]
    images = [[Image.open(io.BytesIO(data)) for data in (pair.image_0, pair.image_1)] for pair in pairs]
    scores = [scorer.score([pair.prompt for pair in pairs], [pair[side] for pair in images]) for side in (0, 1)]
    odds = np.subtract(found.extra["score_0"], found.extra["score_1"])[others]
    np.testing.assert_allclose(scores[0] - scores[1], odds, atol=0.02)  # embeddings are kept in half precision
    assert np.std(odds) > 0.5


def test_a_judge_that_did_not_label_is_no_part_of_the_adapted_one(shapes, tmp_path):
    folder, _, _ = shapes
    other = build_judge(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"was made by pickscore-.*, and pickscore=.* is pickscore-.*give adapted=REPORT,pickscore=LOCATION"
    ):
        load_scorer(f"adapted={folder},pickscore={other}", device="cpu", batch=8)
    with pytest.raises(UserError, match="it was made from pickscore, not from clip"):
        load_scorer(f"adapted={folder},clip=x", device="cpu", batch=8)
    with pytest.raises(UserError, match="this is no report of `dedpo calibrate"):
        load_scorer(f"adapted={other_report(tmp_path)}", device="cpu", batch=8)


def other_report(folder):
    (folder / "other.json").write_text('{"calibration": {"method": "temperature"}}')
    return folder / "other.json"


def test_training_takes_its_lower_bound_as_a_reward(shapes, tmp_path):
    """The uncertainty is that of images unlike those that people labelled; less of it is a reward of its own."""
    folder, _, rows = shapes
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    spec = f"adapted={folder / 'labels' / 'adapt.json'},pickscore={judge}"
    argv = ["--model", "shapes", "--data.pairs", str(folder), "--out", str(tmp_path / "run"), "--objective.kind", "loop", "--device", "cpu"]
    argv += ["--loop.reward", spec, "--loop.uncertainty", "2", "--loop.prompts", "2", "--loop.images", "3", "--loop.steps", "3"]
    argv += ["--loop.guidance", "1", "--optim.steps", "1", "--optim.batch", "4", "--tracker", "none"]
    assert train(argv) == 0
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["uncertainty"]["adapted"] > 0
    assert line["reward"] == pytest.approx(line["scores"]["adapted"] - 2 * line["uncertainty"]["adapted"])


def test_merge_imputes_with_the_adapted_judge(shapes, capsys):
    folder, _, rows = shapes
    assert merge([str(folder), "--method", "adapted"]) == 0  # adapt is the judge that people taught
    ids = PairReader(folder).ids()
    p, z = (align(read_labels(folder, name), ids, folder=folder, name=name) for name in ("adapt", "human"))
    features, names = known_differences(PairReader(folder), ids, human="human")
    assert names[0] == "pickscore" and "detail" in names
    expected = merge_labels(z, p, method="adapted", features=features)
    targets = read_targets(folder, "adapted")
    np.testing.assert_array_equal(targets.target, expected.target)
    np.testing.assert_allclose(targets.weight, expected.weight)
    assert targets.inverse is None and targets.power is None
    others = np.isnan(z)
    pull = targets.weight * (targets.target - 0.5)
    np.testing.assert_allclose(pull[others] / pull[others][0], (p - 0.5)[others] / (p - 0.5)[others][0], rtol=1e-6)
    report = json.loads((folder / "targets" / "adapted.json").read_text())
    assert report["correction"] == expected.report["correction"] and report["judge"] == "adapt"
    printed = capsys.readouterr().out
    assert (
        "the labels ask for a correction of" in printed
        and "every target is 0 or 1: labelled pairs have" in printed
        and "warning" not in printed
    )


def test_merge_with_raw_labels_says_so_and_options_reach_it(shapes, capsys):
    folder, _, _ = shapes
    assert merge([str(folder), "--judge", "pickscore", "--method", "adapted", "--name", "raw", "--correction", "1"]) == 0
    assert "pickscore learned nothing from people" in capsys.readouterr().out
    assert merge([str(folder), "--judge", "pickscore", "--method", "dedpo", "--picture", "false"]) == 0
    ends = [read_targets(folder, name) for name in ("raw", "dedpo")]
    pulls = [end.weight * (end.target - 0.5) for end in ends]
    np.testing.assert_allclose(pulls[0] / np.abs(pulls[0]).sum(), pulls[1] / np.abs(pulls[1]).sum(), atol=1e-9)
    run = ["--visits", "2000", "--noise_ratio", "8", "--picture", "false"]
    assert merge([str(folder), "--judge", "pickscore", *run]) == 0
    assert json.loads((folder / "targets" / "tuned.json").read_text())["run"]["visits"] == 2000
    assert "In a run of 2000 visits at noise ratio 8" in capsys.readouterr().out
    assert merge([str(folder), "--judge", "pickscore", "--visits", "2000"]) == 2
    assert "go together" in capsys.readouterr().err
    assert merge([str(folder), "--method", "adapted", "--folds", "2", "--name", "parts", "--picture", "false"]) == 0
    assert read_targets(folder, "parts-fold-0").weight.sum() < N


def test_embeddings_are_kept_and_their_components_are_odd(shapes):
    folder, _, _ = shapes
    reader = PairReader(folder)
    (version,) = set(read_labels(folder, "pickscore").extra["judge_version"])
    assert has_embeddings(folder, "pickscore", {"judge version": version, "dataset": reader.fingerprint()})
    assert not has_embeddings(folder, "pickscore", {"judge version": version, "dataset": "another"})
    found = components(folder, "pickscore")
    assert found.shape == (N, 8)
    gram = found.T.astype(np.float64) @ found
    off = gram - np.diag(np.diag(gram))
    assert np.abs(off).max() < 1e-3 * gram.max() and (np.diff(np.diag(gram)) < 0).all()  # principal: uncorrelated, falling
    taught = json.loads((folder / "labels" / "adapt.json").read_text())["calibration"]
    assert "embeddings" in [entry["group"] for entry in taught["groups"]]


def test_embeddings_come_later_too_and_change_no_label(shapes, tmp_path, capsys):
    import shutil
    from importlib.resources import files

    folder, spec = tmp_path / "d", f"pickscore={files('dedpo_diffusion.shapes') / 'model' / 'judge'}"
    shutil.copytree(shapes[0], folder)
    shutil.rmtree(folder / "embeddings")
    before = read_labels(folder, "pickscore")
    options = [str(folder), "--with", spec, "--device", "cpu", "--summary", "false", "--shard", "50"]
    assert label(options) == 0 and "is there already" in capsys.readouterr().out
    assert label([*options, "--keep_embeddings", "true"]) == 0
    after = read_labels(folder, "pickscore")
    assert after.pair_id == before.pair_id and after.extra["score_0"] == before.extra["score_0"]
    np.testing.assert_array_equal(components(folder, "pickscore"), components(shapes[0], "pickscore"))
    capsys.readouterr()
    assert label([*options, "--keep_embeddings", "true"]) == 0 and "is there already" in capsys.readouterr().out


# ---- bad input, on pairs without a model


COUNT = 60


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    with PairWriter(tmp_path / "d") as writer:
        for k in range(COUNT):
            writer.add(Pair(f"p{k}", f"prompt {k}", picture(k), picture(k + 1)))
    difference = rng.normal(size=COUNT)
    write_judge(tmp_path / "d", "clip", difference)
    z = (rng.random(COUNT) < expit(difference)).astype(float)
    write_labels(tmp_path / "d", "human", Labels([f"p{k}" for k in range(40)], z[:40]))
    return tmp_path / "d"


def write_judge(folder, name, difference, rows=None):
    rows = range(COUNT) if rows is None else rows
    d = np.asarray(difference)[list(rows)]
    extra = {"score_0": d.tolist(), "score_1": [0.0] * len(d), "judge_version": [f"{name}-1"] * len(d)}
    write_labels(folder, name, Labels([f"p{k}" for k in rows], expit(d), extra))


def refused(folder, capsys, *options):
    before = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    assert main([str(folder), "--method", "adapt", *options]) == 2
    assert sorted(str(path) for path in folder.rglob("*") if path.is_file()) == before
    return capsys.readouterr().err


def test_too_few_or_equal_answers_are_refused_before_anything_is_done(folder, capsys):
    ids = [f"p{k}" for k in range(40)]
    write_labels(folder, "human", Labels(ids[:19], np.arange(19) % 2.0))
    error = refused(folder, capsys)
    assert "there are 19 human labels" in error and f"run `dedpo vote {folder}`, or use --method temperature" in error
    write_labels(folder, "human", Labels(ids, np.ones(40)))
    assert "all 40 human labels are 1" in refused(folder, capsys)


def test_judges_without_scores_for_some_pairs_or_without_any_difference_are_named(folder, capsys):
    write_judge(folder, "vlm", np.ones(COUNT), rows=range(50))
    error = refused(folder, capsys)
    assert "vlm.parquet has no scores for 10 of 60 pairs (first missing: 'p50')" in error and "--judges" in error
    write_judge(folder, "vlm", np.zeros(COUNT))
    assert "vlm give both images of every pair the same score" in refused(folder, capsys, "--judges", "vlm")
    assert main([str(folder), "--method", "adapt"]) == 0
    assert "vlm gives both images of every pair the same score and was left out." in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named_and_no_label_written(tmp_path, folder, capsys):
    broken = tmp_path / "broken"
    with PairWriter(broken) as writer:
        for k in range(COUNT):
            writer.add(Pair(f"p{k}", f"prompt {k}", picture(k), b"no image" if k == 7 else picture(k + 1)))
    (folder / "labels").rename(broken / "labels")
    assert main([str(broken), "--method", "adapt"]) == 2
    assert "pairs-00000.parquet row 7 image_1" in capsys.readouterr().err
    assert label_names(broken) == ["clip", "human"] and not (broken / "labels" / "adapt.json").exists()


def test_what_does_not_help_is_temperature_to_the_bit(folder, capsys):
    """People who say what the judge says have nothing to teach it."""
    said = np.array(read_labels(folder, "clip").label_0)[:40] > 0.5
    write_labels(folder, "human", Labels([f"p{k}" for k in range(40)], said.astype(float)))
    assert main([str(folder), "--method", "adapt", "--seed", "3"]) == 0
    taught = json.loads((folder / "labels" / "adapt.json").read_text())["calibration"]
    assert not taught["adapted"]
    assert main([str(folder), "--seed", "3"]) == 0
    one, other = read_labels(folder, "adapt"), read_labels(folder, "clip-temperature")
    np.testing.assert_array_equal(one.label_0, other.label_0)
    assert one.extra["score_0"] == other.extra["score_0"]
    z = np.where(
        np.arange(COUNT) < 40, align(read_labels(folder, "human"), [f"p{k}" for k in range(COUNT)], folder=folder, name="human"), np.nan
    )
    d = np.array(read_labels(folder, "clip").extra["score_0"])
    np.testing.assert_array_equal(one.label_0, calibrate(d, z, groups=[f"prompt {k}" for k in range(COUNT)], seed=3).probability)
    assert "so these are the labels of clip with a temperature" in capsys.readouterr().out


def test_an_adapted_file_overwrites_only_its_own_kind(folder, capsys):
    write_labels(folder, "adapt", Labels(["p0"], np.array([1.0])))
    assert "holds labels that calibration did not make" in refused(folder, capsys)
