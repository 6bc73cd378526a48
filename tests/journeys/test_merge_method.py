"""`dedpo merge` without --method: people teach the judge where they can, the power is tuned where they cannot, and which of it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit

from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.labels import adaptation
from dedpo_diffusion.labels.files import label_names, read_labels, read_targets, write_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines.calibrate import main as calibrate
from dedpo_diffusion.pipelines.merge import main
from support.pictures import picture

COUNT = 60
IDS = [f"p{k}" for k in range(COUNT)]
DIFFERENCE = np.random.default_rng(0).normal(size=COUNT)
ANSWERS = (np.random.default_rng(1).random(COUNT) < expit(DIFFERENCE)).astype(float)


@pytest.fixture(autouse=True)
def few_inner_folds(monkeypatch):
    """Nothing here depends on their number, and each costs time."""
    monkeypatch.setattr(adaptation, "INNER", 5)


@pytest.fixture
def folder(tmp_path):
    """60 pairs, a judge's labels with raw scores, and 40 answers."""
    with PairWriter(tmp_path / "d") as writer:
        for k, name in enumerate(IDS):
            writer.add(Pair(name, f"prompt {k}", picture(k), picture(k + 1)))
    write_judge(tmp_path / "d", "clip")
    write_labels(tmp_path / "d", "human", Labels(IDS[:40], ANSWERS[:40]))
    return tmp_path / "d"


def write_judge(folder, name, difference=DIFFERENCE, scores=True):
    extra = {"score_0": difference.tolist(), "score_1": [0.0] * COUNT, "judge_version": [f"{name}-1"] * COUNT} if scores else {}
    write_labels(folder, name, Labels(IDS, expit(difference), extra))


def merged(folder, *options, method, judge):
    """Merge; the targets bear the method's name, and were merged by it from these labels."""
    assert main([str(folder), "--picture", "false", *options]) == 0
    report = json.loads((folder / "targets" / f"{method}.json").read_text())
    assert (report["method"], report["judge"]) == (method, judge)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "labels").iterdir()}


@pytest.mark.slow
def test_people_teach_the_judge_first_and_again_only_after_labels_changed(folder, capsys):
    merged(folder, method="adapted", judge="adapt")
    assert "people teach clip, as by `dedpo calibrate --method adapt`" in capsys.readouterr().out
    target, before = read_targets(folder, "adapted").target, stamps(folder)
    assert calibrate([str(folder), "--method", "adapt"]) == 0 and main([str(folder), "--judge", "adapt", "--method", "adapted"]) == 0
    np.testing.assert_array_equal(read_targets(folder, "adapted").target, target)  # as by the two commands
    before = stamps(folder)
    merged(folder, method="adapted", judge="adapt")
    assert stamps(folder) == before
    write_labels(folder, "human", Labels(IDS[:50], ANSWERS[:50]))
    capsys.readouterr()
    merged(folder, method="adapted", judge="adapt")
    assert "people teach clip again, since labels have changed" in capsys.readouterr().out
    assert len(read_labels(folder, "adapt").pair_id) == COUNT and (read_targets(folder, "adapted").target != target).any()


@pytest.mark.slow
def test_a_judge_that_is_named_is_taught_and_another_one_left_alone(folder):
    write_judge(folder, "other", -DIFFERENCE)
    merged(folder, "--judge", "clip", method="adapted", judge="adapt")
    made_of = [entry["file"] for entry in json.loads((folder / "labels" / "adapt.json").read_text())["label_files"]]
    assert made_of == ["labels/human.parquet", "labels/clip.parquet"]
    before = stamps(folder)
    merged(folder, method="adapted", judge="adapt")  # as it was made, by those whom its maker chose
    assert stamps(folder) == before
    merged(folder, "--judges", "clip,other", method="adapted", judge="adapt")
    assert len(json.loads((folder / "labels" / "adapt.json").read_text())["label_files"]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "half"], "--rule is given"),
        (["--power", "0.3"], "--power is given"),
        (["--visits", "100", "--noise_ratio", "8"], "--visits is given"),
        (["--folds", "2"], "--folds is given"),
        (["--missing", "tie"], "--missing is given"),
    ],
)
def test_options_of_the_power_ask_for_it(options, words, folder, capsys):
    merged(folder, *options, method="tuned", judge="clip")
    assert f"method tuned, since {words}" in capsys.readouterr().out and label_names(folder) == ["clip", "human"]


def test_what_teaches_no_judge_tunes_its_power(folder, capsys):
    def told(*options, judge="clip"):
        merged(folder, *options, method="tuned", judge=judge)
        return capsys.readouterr().out

    write_judge(folder, "bare", scores=False)
    assert "no judge has raw scores" in told("--judge", "bare", judge="bare")
    write_labels(folder, "human", Labels(IDS[:19], ANSWERS[:19]))
    assert "19 human labels teach no judge, as 20 do" in told("--judge", "clip")
    write_labels(folder, "human", Labels(IDS[:40], np.ones(40)))
    assert "human labels that are all alike teach no judge" in told("--judge", "clip")
    write_labels(folder, "human", Labels(IDS[:40], ANSWERS[:40]))
    assert calibrate([str(folder), "--judges", "clip"]) == 0
    assert "clip-temperature was not taught by method adapt" in told("--judge", "clip-temperature", judge="clip-temperature")
    assert "adapt" not in label_names(folder)


def test_without_human_labels_nothing_is_said_but_that_they_are_missing(folder, capsys):
    (folder / "labels" / "human.parquet").unlink()
    assert main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert "human.parquet" in printed.err and "method tuned" not in printed.out
