"""`dedpo merge --population` and `--from`: human labels of bright Shapes images for training on dark ones; reports, targets, mistakes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.debias import hard_targets, merge_labels
from dedpo_diffusion.labels import adaptation
from dedpo_diffusion.labels.files import read_labels, read_targets, write_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.joining import join
from dedpo_diffusion.pairs.populations import known_pairs
from dedpo_diffusion.pipelines.merge import main as stage
from support.populations import lights, write_population

BRIGHT, DARK = 60, 70


def main(arguments) -> int:
    return stage([*map(str, arguments), "--picture", "false"])


@pytest.fixture(scope="module", autouse=True)
def few_inner_folds():
    """Nothing here depends on their number, and each costs time."""
    before, adaptation.INNER, adaptation.RESAMPLES = (adaptation.INNER, adaptation.RESAMPLES), 3, 5
    yield
    adaptation.INNER, adaptation.RESAMPLES = before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """60 labelled pairs of bright images, 70 of dark ones without labels, and both joined; all images measured."""
    root = tmp_path_factory.mktemp("populations")
    bright = write_population(root / "bright", lights(BRIGHT, 5, 2, 0), 1, labelled=True, start=1000)
    dark = write_population(root / "dark", lights(DARK, 2, 4, 1), 2, labelled=False)
    join([bright, dark], root / "both")
    for folder in ("bright", "dark", "both"):
        reader = PairReader(root / folder)
        known_pairs(reader, reader.ids(), [])
    return root


@pytest.fixture
def folders(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "made")


def report_of(folder, name: str) -> dict:
    return json.loads((folder / "targets" / f"{name}.json").read_text())


# ---- a column of one dataset


def test_labels_of_one_population_are_weighted_for_the_other(folders, capsys):
    """Targets are those of merge_labels with the ratio as inverse propensity, which the targets file keeps."""
    both = folders / "both"
    assert main([both, "--population", "dataset=bright", "--method", "dedpo"]) == 0
    found, report = read_targets(both, "dedpo"), report_of(both, "dedpo")
    h, human = found.inverse, found.human
    labelled = ~np.isnan(human)
    assert labelled.sum() == BRIGHT and h[labelled].min() > 1 and (h[~labelled] == 0).all()
    assert (h[labelled] - 1).sum() == pytest.approx(DARK)
    expected = merge_labels(human, found.judge, method="dedpo", propensity=np.where(labelled, 1 / np.maximum(h, 1), 1))
    np.testing.assert_allclose(found.target, expected.target)
    np.testing.assert_allclose(found.weight, expected.weight)
    light = dict(zip(read_labels(folders / "bright", "human").pair_id, lights(BRIGHT, 5, 2, 0), strict=True))
    factors = [light[name] for name in np.array(found.pair_id)[labelled]]
    assert np.corrcoef(factors, np.log(h[labelled] - 1))[0, 1] < -0.15  # darker ones, like those that are trained on, count more
    about = report["population"]
    assert about["column"] == "dataset=bright" and (about["n_labelled"], about["n_target"]) == (BRIGHT, DARK)
    assert about["effective"] < BRIGHT and "brightness" in about["columns"] and "difference of score of clip" in about["columns"]
    assert about["imbalance"]["after"] < about["imbalance"]["before"]
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in report["sentences"])
    assert f"{BRIGHT} labels tell as much as about {about['effective']:.0f} of equal weight" in printed
    assert "the stored propensities are not used" in printed and "do not look taken at random" not in printed
    assert report["propensity_model"] == {"from": "density_ratio"}


def test_a_truth_value_of_the_pairs_or_of_the_labels_and_a_value_are_one(folders):
    both = folders / "both"
    assert main([both, "--population", "source_dataset=bright", "--name", "value"]) == 0
    path = both / "labels" / "human.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("source_asked", [[True] * len(table)]), path)
    assert main([both, "--population", "asked", "--name", "truth"]) == 0
    one, other = read_targets(both, "value"), read_targets(both, "truth")
    np.testing.assert_array_equal(one.target, other.target)
    np.testing.assert_array_equal(one.weight, other.weight)


def test_pairs_that_were_drawn_and_not_labelled_are_left_out(folders, capsys):
    both = folders / "both"
    labels = read_labels(both, "human")
    write_labels(both, "human", Labels(labels.pair_id[:40], labels.label_0[:40]))
    assert main([both, "--population", "dataset=bright"]) == 0
    found = read_targets(both, "tuned")
    idle = np.array([name in labels.pair_id[40:] for name in found.pair_id])
    assert (found.weight[idle] == 0).all() and (found.weight[~idle] > 0).all()
    assert "20 pairs have weight 0: those that were drawn for people and have no label" in capsys.readouterr().out


def test_folds_have_ratios_of_their_own(folders):
    both = folders / "both"
    assert main([both, "--population", "dataset=bright", "--folds", "2"]) == 0
    whole, part = read_targets(both, "tuned"), read_targets(both, "tuned-fold-0")
    kept = part.weight > 0
    assert 0 < kept.sum() < len(kept) and report_of(both, "tuned-fold-0")["population"]["n_target"] < DARK
    assert not np.allclose(whole.inverse[kept], part.inverse[kept])


def test_judges_are_taught_with_the_ratio(folders):
    both = folders / "both"
    assert main([both, "--population", "dataset=bright", "--method", "adapted"]) == 0
    report = report_of(both, "adapted")
    taught = report["propensity_model"]["taught"]
    assert taught["judges"] == ["clip"] and [group["group"] for group in taught["groups"]][:2] == ["scores", "statistics"]
    assert read_targets(both, "adapted").weight.sum() == pytest.approx(BRIGHT + DARK)
    assert sorted(path.name for path in (both / "labels").glob("*.parquet")) == ["clip.parquet", "human.parquet"]


# ---- labels of another folder


@pytest.mark.parametrize("method", ["dedpo", "tuned"])
def test_labels_of_another_folder_move_the_targets_of_this_one(folders, method, capsys):
    dark, bright = folders / "dark", folders / "bright"
    assert main([dark, "--from", bright, "--method", method]) == 0
    found, report = read_targets(dark, method), report_of(dark, method)
    assert found.pair_id == PairReader(dark).ids() and found.human is None and (found.weight == 1).all()
    judge, power, about = read_labels(dark, "clip").label_0, report["power"], report["population"]
    assert power == 1 if method == "dedpo" else 0 <= power <= 1
    moved = found.target - 0.5 - power * (judge - 0.5)
    assert np.abs(moved).max() > 0.01 and about["carried"]["directions"][0] == "the judge's label"
    assert len(about["carried"]["directions"]) <= max(1, about["effective"] // 4)
    assert about["from"] == "bright"
    printed = capsys.readouterr().out
    assert "carried over to the target pairs" in printed and all(sentence in printed for sentence in report["sentences"])
    joined = folders / "both"  # the same ratio as in one dataset
    assert main([joined, "--population", "dataset=bright", "--method", method]) == 0
    assert report_of(joined, method)["population"]["effective"] == pytest.approx(about["effective"], rel=0.1)


def test_a_judge_that_people_agree_with_in_everything_is_not_moved(folders):
    """With people's labels equal to the judge's, z - g is 0 everywhere."""
    dark, bright = folders / "dark", folders / "bright"
    judge = read_labels(bright, "clip")
    write_labels(bright, "human", Labels(judge.pair_id, judge.label_0))
    assert main([dark, "--from", bright, "--method", "dedpo"]) == 0
    np.testing.assert_allclose(read_targets(dark, "dedpo").target, read_labels(dark, "clip").label_0, atol=1e-9)


def test_a_taught_judge_says_what_people_would_of_the_other_folder(folders):
    dark, bright = folders / "dark", folders / "bright"
    assert main([dark, "--from", bright, "--method", "adapted"]) == 0
    found = read_targets(dark, "adapted")
    again = hard_targets(0.5 + found.weight * (found.target - 0.5))
    np.testing.assert_allclose(again[1], found.weight, rtol=1e-6)
    assert found.human is None and report_of(dark, "adapted")["population"]["carried"] is None


def test_human_labels_here_are_told_to_have_no_part(folders, capsys):
    dark, bright = folders / "dark", folders / "bright"
    assert main([dark, "--from", bright, "--name", "without"]) == 0
    write_labels(dark, "human", Labels(PairReader(dark).ids()[:5], np.ones(5)))
    assert main([dark, "--from", bright, "--name", "with"]) == 0
    assert "human labels of" in (told := capsys.readouterr().out) and "have no part in this merge" in told
    np.testing.assert_array_equal(read_targets(dark, "with").target, read_targets(dark, "without").target)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--population", "nothing"], "has a column source_nothing; name one of them"),
        (["--population", "dataset"], "as --population dataset=bright"),
        (["--population", "dataset=none"], "says of none of the 130 pairs that they were drawn"),
        (["--population", "dataset=dark"], "60 pairs have a human label and were not drawn for one (first: 'p1000')"),
        (["--population", "dataset=bright", "--method", "naive"], "which method naive takes as they are"),
        (["--population", "dataset=bright", "--plan", "100"], "--plan counts further labels as taken at random"),
        (["--population", "dataset=bright", "--propensities", "estimate"], "so does --propensities"),
        (["--population", "dataset=bright", "--from", "x"], "give one of them"),
        (["--from", "BOTH"], "the pairs themselves"),
        (["--from", "BRIGHT", "--method", "human_only"], "dedpo pairs join"),
        (["--from", "BRIGHT", "--folds", "2"], "with --from none is trained on"),
        (["--from", "BRIGHT", "--visits", "100", "--noise_ratio", "8"], "--visits is about labelled pairs in training"),
        (["--from", "DARK"], "holds no human labels 'human', which --from takes from there; run `dedpo vote"),
        (["--from", "NOWHERE"], "holds no parquet files"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(made, options, words, capsys):
    named = {name.upper(): str(made / name) for name in ("both", "bright", "dark", "nowhere")}
    before = sorted(made.rglob("*"))
    assert main([made / "both", *(named.get(word, word) for word in options)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(made.rglob("*")) == before


def test_too_few_labels_are_refused(folders, capsys):
    labels = read_labels(folders / "both", "human")
    write_labels(folders / "both", "human", Labels(labels.pair_id[:19], labels.label_0[:19]))
    assert main([folders / "both", "--population", "dataset=bright"]) == 2
    assert "there are 19 labelled pairs, and a density ratio takes at least 20" in capsys.readouterr().err


def test_populations_that_do_not_overlap_are_refused(tmp_path, capsys):
    write_population(tmp_path / "bright", np.linspace(0.9, 1.0, 40), 1, labelled=True, start=1000)
    write_population(tmp_path / "dark", np.linspace(0.05, 0.1, 40), 2, labelled=False)
    assert main([tmp_path / "dark", "--from", tmp_path / "bright"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the populations do not overlap" in told and "label some of these" in told


def test_a_judge_that_did_not_label_both_is_refused(folders, capsys):
    dark, bright = folders / "dark", folders / "bright"
    labels = read_labels(bright, "clip")
    write_labels(bright, "clip", Labels(labels.pair_id[:50], labels.label_0[:50], {k: v[:50] for k, v in labels.extra.items()}))
    assert main([dark, "--from", bright]) == 2
    assert "lacks 10 of the 60 pairs that people labelled" in capsys.readouterr().err
    write_labels(bright, "clip", Labels(labels.pair_id, labels.label_0, labels.extra | {"judge_version": ["clip-2"] * 60}))
    assert main([dark, "--from", bright]) == 2
    assert "are of judge clip-1 in" in capsys.readouterr().err
    (bright / "labels" / "clip.parquet").unlink()
    assert main([dark, "--from", bright]) == 2
    assert (
        f"has no labels of judge 'clip', and what people said there is compared with what the judge says; run `dedpo label {bright}`"
        in (" ".join(capsys.readouterr().err.split()))
    )


def test_a_missing_value_of_the_column_is_named(folders, capsys):
    path = folders / "both" / "labels" / "human.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("source_asked", [[True] * (len(table) - 1) + [None]]), path)
    assert main([folders / "both", "--population", "asked"]) == 2
    assert f"labels/human.parquet row {BRIGHT - 1} has no value; fill it in" in capsys.readouterr().err
