"""`dedpo calibrate` on pair datasets on disk: the new label files, what is refused, and the way on to merge."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.labels.calibration import calibrate
from dedpo_diffusion.labels.files import align, label_names, read_labels, read_targets, write_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines.calibrate import choose_judges, main, run
from dedpo_diffusion.pipelines.merge import main as merge
from dedpo_diffusion.settings import CalibrateSettings
from support.pictures import picture

N, N_HUMAN = 240, 90
RNG = np.random.default_rng(0)
IDS = [f"p{i}" for i in range(N)]
PROMPTS = [f"prompt {i % 60}" for i in range(N)]
DIFFERENCES = RNG.normal(0, 4, (N, 2))
HUMAN = (RNG.random(N) < expit(DIFFERENCES @ [0.4, 0.3])).astype(float)
LABELLED = RNG.permutation(N)[:N_HUMAN]
HUMAN_COLUMN = np.where(np.isin(np.arange(N), LABELLED), HUMAN, np.nan)


def write_judge(folder, name, difference, rows=None, **change):
    """A judge's label file with raw scores, in reverse order of the pairs."""
    rows = list(range(N))[::-1] if rows is None else rows
    d = difference[rows]
    extra = {"score_0": (d + 1).tolist(), "score_1": [1.0] * len(rows), "judge_version": [f"{name}-1"] * len(rows), **change}
    write_labels(
        folder, name, Labels([IDS[row] for row in rows], expit(d), {key: value for key, value in extra.items() if value is not None})
    )


@pytest.fixture
def folder(tmp_path):
    with PairWriter(tmp_path / "d") as writer:
        for pair_id, prompt in zip(IDS, PROMPTS, strict=True):
            writer.add(Pair(pair_id, prompt, picture(0), picture(1)))
    write_labels(tmp_path / "d", "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED]))
    write_judge(tmp_path / "d", "clip", DIFFERENCES[:, 0])
    write_judge(tmp_path / "d", "vlm", DIFFERENCES[:, 1])
    return tmp_path / "d"


def labels_of(folder, name):
    return align(read_labels(folder, name), IDS, folder=folder, name=name)


@pytest.mark.parametrize(("method", "judges", "name"), [("temperature", ["clip"], "clip-temperature"), ("stack", ["vlm", "clip"], "stack")])
def test_the_command_writes_what_calibrate_returns(folder, capsys, method, judges, name):
    assert main([str(folder), "--judges", *judges, "--method", method]) == 0
    columns = [{"clip": 0, "vlm": 1}[judge] for judge in judges]
    made = calibrate((DIFFERENCES[:, columns] + 1) - 1, HUMAN_COLUMN, method=method, groups=PROMPTS, names=judges)
    np.testing.assert_array_equal(labels_of(folder, name), made.probability)
    report = json.loads((folder / "labels" / f"{name}.json").read_text())
    assert report["calibration"]["judges"][0]["name"] == judges[0]
    assert report["calibration"]["map"] == made.report["map"]
    human = {"file": "labels/human.parquet", "sha256": file_digest(folder / "labels" / "human.parquet")}
    assert report["human"] == report["label_files"][0] == human and report["name"] == name and not report["propensities"]
    assert [file["file"] for file in report["label_files"][1:]] == [f"labels/{judge}.parquet" for judge in judges]
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in report["calibration"]["sentences"])
    assert printed.splitlines()[-1] == f"next: dedpo merge {folder} --judge {name}"


def test_the_scores_of_the_new_file_give_its_labels_and_its_version_says_what_it_depends_on(folder):
    assert main([str(folder), "--judges", "clip", "vlm", "--method", "temperature", "--folds", "4", "--seed", "7", "--invert", "true"]) == 0
    found = read_labels(folder, "vlm-temperature")
    np.testing.assert_array_equal(expit(np.subtract(found.extra["score_0"], found.extra["score_1"])), found.label_0)
    np.testing.assert_array_equal(found.extra["score_0"], -np.array(found.extra["score_1"]))
    (version,) = set(found.extra["judge_version"])
    assert version.startswith("calibrated temperature of vlm-1 on human ")
    assert version.endswith(" folds 4 seed 7 inversion allowed")
    assert label_names(folder) == ["clip", "clip-temperature", "human", "vlm", "vlm-temperature"]


def test_merge_takes_the_new_labels_unchanged(folder):
    assert main([str(folder), "--judges", "clip", "vlm", "--method", "stack"]) == 0
    assert merge([str(folder), "--judge", "stack"]) == 0
    targets = read_targets(folder, "tuned")
    unlabelled = np.isnan(HUMAN_COLUMN)
    np.testing.assert_allclose(targets.target[unlabelled], labels_of(folder, "stack")[unlabelled], atol=1e-12)


@pytest.mark.slow
def test_without_names_all_judges_with_raw_scores_are_taken(folder, capsys):
    write_labels(folder, "imported", Labels(IDS, np.full(N, 0.5)))
    made = run(CalibrateSettings(folder))
    assert [path.stem for path in made] == ["clip-temperature", "vlm-temperature"]
    assert "left out, as they have no raw scores: imported" in capsys.readouterr().out
    assert [path.stem for path in run(CalibrateSettings(folder))] == ["clip-temperature", "vlm-temperature"]  # not of calibrated ones


@pytest.mark.slow
def test_other_human_labels_make_other_labels_in_its_own_file_alone(folder, capsys):
    assert main([str(folder), "--judges", "clip"]) == 0
    before = read_labels(folder, "clip-temperature")
    write_labels(folder, "human", Labels([IDS[i] for i in LABELLED[:60]], HUMAN[LABELLED[:60]]))
    assert main([str(folder), "--judges", "clip"]) == 0
    after = read_labels(folder, "clip-temperature")
    assert not np.array_equal(before.label_0, after.label_0)
    assert before.extra["judge_version"] != after.extra["judge_version"]
    capsys.readouterr()
    for name in ("vlm", "human"):
        kept = (folder / "labels" / f"{name}.parquet").read_bytes()
        assert main([str(folder), "--judges", "clip", "--name", name]) == 2
        assert "holds labels that calibration did not make" in capsys.readouterr().err
        assert (folder / "labels" / f"{name}.parquet").read_bytes() == kept


def test_pairs_without_every_judges_answer_are_left_out_and_counted(folder, capsys):
    write_judge(folder, "vlm", DIFFERENCES[:, 1], rows=list(range(230)))
    assert main([str(folder), "--judges", "clip", "vlm", "--method", "stack"]) == 0
    assert read_labels(folder, "stack").pair_id == IDS[:230]
    printed = capsys.readouterr().out
    lost = int((LABELLED >= 230).sum())
    assert f"10 pairs lack the answer of a judge and get no label; {lost} of them have a human label" in printed
    assert printed.splitlines()[-1].endswith("--judge stack --missing tie")


def test_too_few_labels_for_a_summary_still_make_a_report(folder):
    write_labels(folder, "human", Labels([IDS[i] for i in LABELLED[:8]], HUMAN[LABELLED[:8]]))
    assert main([str(folder), "--judges", "clip", "--folds", "2"]) == 0
    report = json.loads((folder / "labels" / "clip-temperature.json").read_text())
    assert set(report) == {"name", "judge_version", "human", "propensities", "label_files", "calibration"}
    assert report["human"] == {"file": "labels/human.parquet", "sha256": file_digest(folder / "labels" / "human.parquet")}
    assert {report["judge_version"]} == set(read_labels(folder, "clip-temperature").extra["judge_version"])
    assert not (folder / "labels" / "clip-temperature.png").exists()


def test_a_judge_that_trained_on_peoples_labels_must_be_named(folder, capsys):
    write_judge(folder, "mine", DIFFERENCES[:, 0], judge_version=["self-0123"] * N)
    assert list(choose_judges(CalibrateSettings(folder))) == ["clip", "vlm"]
    assert "left out, since they trained on people's labels: mine; --judges can name them" in capsys.readouterr().out
    assert main([str(folder), "--judges", "mine"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: mine trained on people's labels")]
    assert len(warnings) == 1 and "not quite unbiased" in warnings[0]
    for name in ("clip", "vlm"):
        (folder / "labels" / f"{name}.parquet").unlink()
    assert main([str(folder)]) == 2
    assert "holds no other judge with raw scores" in capsys.readouterr().err


def test_stored_propensities_reach_the_fit(folder, capsys):
    propensity = np.random.default_rng(1).uniform(0.1, 0.9, N_HUMAN)
    write_labels(folder, "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED], {"propensity": propensity.tolist()}))
    assert main([str(folder), "--judges", "clip"]) == 0
    weights = np.ones(N)
    weights[LABELLED] = 1 / propensity
    made = calibrate((DIFFERENCES[:, :1] + 1) - 1, HUMAN_COLUMN, groups=PROMPTS, weights=weights)
    np.testing.assert_allclose(labels_of(folder, "clip-temperature"), made.probability, atol=1e-9)
    assert not np.allclose(made.probability, calibrate(DIFFERENCES[:, :1], HUMAN_COLUMN, groups=PROMPTS).probability, atol=1e-6)
    printed = capsys.readouterr().out
    assert "the stored propensities make up for it" in printed and "All figures are weighted by the stored propensities" in printed
    assert "calibrated on human, weighted by" in " ".join(printed.split())


@pytest.mark.slow
def test_a_judge_below_half_is_told_and_turned_round_only_on_request(folder, capsys):
    write_judge(folder, "contrary", -DIFFERENCES[:, 0])
    assert main([str(folder), "--judges", "contrary"]) == 0
    assert "less often than a coin would, so it counts as undecided" in capsys.readouterr().out
    np.testing.assert_array_equal(labels_of(folder, "contrary-temperature"), np.full(N, 0.5))
    assert main([str(folder), "--judges", "contrary", "clip", "--invert", "true"]) == 0
    assert "as you asked, it counts the other way round" in capsys.readouterr().out
    np.testing.assert_allclose(labels_of(folder, "contrary-temperature"), labels_of(folder, "clip-temperature"), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--judges", "nobody"], "there is no"),
        (["--judges", "human"], "the human label file"),
        (["--judges", "clip", "clip"], "twice"),
        (["--judges", "clip", "--human", "people"], "calibration learns from people; run `dedpo vote`"),
        (["--judges", "clip", "--method", "stack"], "needs two or more judges"),
        (["--judges", "clip", "vlm", "--name", "both"], "names one file, but 2 judges make one each"),
        (["--judges", "clip", "--name", "a/b"], "cannot name a file"),
        (["--judges", "clip", "--folds", "1"], "give 2 or more"),
        (["--judges", "clip", "--folds", "50"], "50 folds need 100: have more pairs answered, or use fewer folds"),
        (["--judges", "bare"], "bare.parquet has no column 'score_0', and calibration needs raw scores; run `dedpo label` again"),
        (["--judges", "broken"], "broken.parquet row 3: a raw score is missing or infinite"),
    ],
)
def test_what_cannot_be_done_is_said_and_writes_nothing(folder, capsys, options, words):
    write_labels(folder, "bare", Labels(IDS, np.full(N, 0.5)))
    write_judge(folder, "broken", DIFFERENCES[:, 0], score_0=[0.0, 1.0, 2.0, None, *[0.5] * (N - 4)])
    before = label_names(folder)
    assert main([str(folder), *options]) == 2
    assert words in capsys.readouterr().err
    assert label_names(folder) == before


def test_calibrated_labels_are_not_calibrated_again(folder, capsys):
    assert main([str(folder), "--judges", "clip"]) == 0
    assert main([str(folder), "--judges", "clip-temperature"]) == 2
    assert "name the judge that it was made from" in capsys.readouterr().err
    assert pq.read_schema(folder / "labels" / "clip-temperature.parquet").metadata[b"origin"] == b"dedpo calibrate"
