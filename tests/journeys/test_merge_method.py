"""`dedpo merge --method adapted`: people teach the judges first where they can, and the power is tuned where they cannot."""

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


def merged(folder, *options, method="adapted", judge="adapt"):
    """Merge into targets `adapted`, which were merged by this method from these labels."""
    assert main([str(folder), "--method", "adapted", "--picture", "false", *options]) == 0
    report = json.loads((folder / "targets" / "adapted.json").read_text())
    assert (report["method"], report["judge"]) == (method, judge)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "labels").iterdir()}


@pytest.mark.slow
def test_people_teach_the_judge_first_and_again_only_after_labels_changed(folder, capsys):
    merged(folder)
    assert "people teach clip, as by `dedpo calibrate --method adapt`" in capsys.readouterr().out
    target = read_targets(folder, "adapted").target
    assert calibrate([str(folder), "--method", "adapt"]) == 0 and main([str(folder), "--judge", "adapt", "--method", "adapted"]) == 0
    np.testing.assert_array_equal(read_targets(folder, "adapted").target, target)  # as by the two commands
    before = stamps(folder)
    merged(folder)
    assert stamps(folder) == before
    write_labels(folder, "human", Labels(IDS[:50], ANSWERS[:50]))
    capsys.readouterr()
    merged(folder)
    assert "people teach clip again, since labels have changed" in capsys.readouterr().out
    assert len(read_labels(folder, "adapt").pair_id) == COUNT and (read_targets(folder, "adapted").target != target).any()


@pytest.mark.slow
def test_those_whom_its_maker_chose_stay_the_judges(folder):
    write_judge(folder, "other", -DIFFERENCE)
    assert calibrate([str(folder), "--judges", "clip", "--method", "adapt"]) == 0
    before = stamps(folder)
    merged(folder)
    assert stamps(folder) == before
    (folder / "labels" / "adapt.parquet").unlink()
    merged(folder)
    made_of = [entry["file"] for entry in json.loads((folder / "labels" / "adapt.json").read_text())["label_files"]]
    assert made_of == ["labels/human.parquet", "labels/clip.parquet", "labels/other.parquet"]


def test_what_teaches_no_judge_tunes_its_power(folder, capsys):
    def told():
        merged(folder, method="tuned", judge="clip")
        return capsys.readouterr().out

    write_labels(folder, "human", Labels(IDS[:19], ANSWERS[:19]))
    assert "the method is tuned, since 19 human labels teach no judge, as 20 do" in told()
    write_labels(folder, "human", Labels(IDS[:40], np.ones(40)))
    assert "the method is tuned, since human labels that are all alike teach no judge" in told()
    write_labels(folder, "human", Labels(IDS[:40], ANSWERS[:40]))
    write_judge(folder, "clip", scores=False)
    assert "the method is tuned, since no judge has raw scores" in told()
    assert label_names(folder) == ["clip", "human"]


def test_a_judge_that_is_named_is_taken_as_it_is(folder, capsys):
    merged(folder, "--judge", "clip", judge="clip")
    assert "clip learned nothing from people" in capsys.readouterr().out and label_names(folder) == ["clip", "human"]


def test_without_human_labels_nothing_is_said_but_that_they_are_missing(folder, capsys):
    (folder / "labels" / "human.parquet").unlink()
    assert main([str(folder), "--method", "adapted"]) == 2
    printed = capsys.readouterr()
    assert "human.parquet" in printed.err and "tuned" not in printed.out
