"""`dedpo merge` on pair datasets on disk: targets, report, messages; and the way from Pick-a-Pic files to targets."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.labels import read_targets, write_labels
from dedpo_diffusion.pairs import PairReader, PairWriter
from dedpo_diffusion.pipelines.ingest import main as ingest
from dedpo_diffusion.pipelines.merge import main
from dedpo_diffusion.records import Labels, Pair

N, N_HUMAN = 80, 20
RNG = np.random.default_rng(0)
HUMAN = (RNG.random(N) < 0.5).astype(float)
JUDGE = np.clip(0.5 + 0.3 * (2 * HUMAN - 1) + RNG.normal(0, 0.25, N), 0, 1)
LABELLED = RNG.permutation(N)[:N_HUMAN]
IDS = [f"p{i}" for i in range(N)]


@pytest.fixture
def folder(tmp_path):
    """80 pairs, 20 human labels in another order than the pairs, judge labels for all in reverse order."""
    with PairWriter(tmp_path / "d") as writer:
        for pair_id in IDS:
            writer.add(Pair(pair_id, "a prompt", b"0", b"1"))
    write_labels(tmp_path / "d", "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED]))
    write_labels(tmp_path / "d", "clip", Labels(IDS[::-1], JUDGE[::-1]))
    return tmp_path / "d"


def human_column():
    human = np.full(N, np.nan)
    human[LABELLED] = HUMAN[LABELLED]
    return human


def target_files(folder):
    return sorted(path.name for path in folder.glob("targets/*"))


@pytest.mark.parametrize("method", ["human_only", "naive", "dedpo", "tuned"])
def test_targets_are_those_of_merge_labels_in_the_order_of_the_pairs(folder, method):
    assert main([str(folder), "--method", method]) == 0
    found, expected = read_targets(folder, method), merge_labels(human_column(), JUDGE, method=method)
    assert found.pair_id == IDS
    np.testing.assert_array_equal(found.target, expected.target)
    np.testing.assert_array_equal(found.weight, expected.weight)
    report = json.loads((folder / "targets" / f"{method}.json").read_text())
    assert {key: report[key] for key in expected.report} == expected.report


def test_the_report_names_its_label_files_and_the_sentences_are_printed(folder, capsys):
    assert main([str(folder)]) == 0
    report = json.loads((folder / "targets" / "tuned.json").read_text())
    assert (report["name"], report["judge"], report["human"]) == ("tuned", "clip", "human")
    for role, name in (("human", "human"), ("judge", "clip")):
        digest = hashlib.sha256((folder / "labels" / f"{name}.parquet").read_bytes()).hexdigest()
        assert report["label_files"][role] == {"file": f"labels/{name}.parquet", "sha256": digest}
    printed = capsys.readouterr().out.splitlines()
    assert all(sentence in printed for sentence in report["sentences"])
    assert report["sentences"][0].startswith("These 20 human and 60 judge labels are worth about ")
    assert any("effective human labels" in line for line in printed)


def test_options_reach_the_estimator(folder):
    assert main([str(folder), "--name", "half", "--power", "0.5"]) == 0
    assert json.loads((folder / "targets" / "half.json").read_text())["power"] == 0.5
    assert main([str(folder), "--name", "tight", "--max_overshoot", "1.1"]) == 0
    assert json.loads((folder / "targets" / "tight.json").read_text())["overshoot"] <= 1.1 + 1e-9


def test_stored_propensities_reach_the_estimator_and_are_told(folder, capsys):
    propensity = np.linspace(0.1, 0.9, N)
    extra = {"propensity": propensity[LABELLED].tolist()}
    write_labels(folder, "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED], extra))
    assert main([str(folder)]) == 0
    expected = merge_labels(human_column(), JUDGE, propensity=propensity)
    found = read_targets(folder, "tuned")
    np.testing.assert_array_equal(found.target, expected.target)
    np.testing.assert_array_equal(found.weight, expected.weight)
    assert not np.allclose(found.weight, merge_labels(human_column(), JUDGE).weight)
    assert "the stored propensities make up for it" in capsys.readouterr().out
    report = json.loads((folder / "targets" / "tuned.json").read_text())
    assert report["propensities"] is True and "not drawn at random" in report["sentences"][-1]
    assert main([str(folder), "--method", "naive"]) == 0  # which has no use for them


def test_several_judges_must_be_chosen_from(folder, capsys):
    write_labels(folder, "vlm", Labels(IDS, 1 - JUDGE))
    assert main([str(folder)]) == 2
    assert "several judges (clip, vlm); name one with --judge" in capsys.readouterr().err and target_files(folder) == []
    assert main([str(folder), "--judge", "vlm"]) == 0
    assert json.loads((folder / "targets" / "tuned.json").read_text())["power"] == 0
    assert main([str(folder), "--method", "human_only"]) == 0


def test_without_a_judge_only_human_only_works(folder, capsys):
    (folder / "labels" / "clip.parquet").unlink()
    assert main([str(folder)]) == 2
    assert "no judge labels" in capsys.readouterr().err
    assert main([str(folder), "--method", "human_only"]) == 0
    weights = read_targets(folder, "human_only").weight
    assert (weights > 0).sum() == N_HUMAN and weights.mean() == pytest.approx(1.0)


def test_a_judge_of_part_of_the_pairs_is_refused_but_for_human_only(folder, capsys):
    write_labels(folder, "clip", Labels(IDS[:73], JUDGE[:73]))
    for method in ("tuned", "dedpo", "naive"):
        assert main([str(folder), "--method", method]) == 2
        message = capsys.readouterr().err
        assert "labels/clip.parquet covers 73 of 80 pairs (first missing: 'p73'); run `dedpo label` again" in message
    assert main([str(folder), "--method", "human_only"]) == 0
    assert target_files(folder) == ["human_only.json", "human_only.parquet"]


def test_without_human_labels_only_naive_works(folder, capsys):
    (folder / "labels" / "human.parquet").unlink()
    for method in ("tuned", "dedpo", "human_only"):
        assert main([str(folder), "--method", method]) == 2
        assert "labels/human.parquet" in capsys.readouterr().err
    assert main([str(folder), "--method", "naive"]) == 0
    np.testing.assert_array_equal(read_targets(folder, "naive").target, JUDGE)
    assert main([str(folder), "--method", "naive", "--human", "peopel"]) == 2  # a name that was typed must exist


def test_an_empty_human_file_says_what_to_do(folder, capsys):
    write_labels(folder, "human", Labels([], np.array([])))
    assert main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert "none of the 80 pairs has a human label" in message and "(human, clip)" in message and "naive" in message


def test_bad_options_and_bad_labels_leave_the_old_targets(folder, capsys):
    assert main([str(folder)]) == 0
    before = (folder / "targets" / "tuned.parquet").read_bytes()
    for options, words in [
        (["--power", "2"], "power is 2.0"),
        (["--max_overshoot", "0.5"], "max_overshoot is 0.5"),
        (["--judge", "nobody"], "there is no"),
        (["--judge", "human"], "both name 'human'"),
        (["--name", "a/b"], "cannot name a file"),
    ]:
        assert main([str(folder), *options]) == 2
        assert words in capsys.readouterr().err
    pq.write_table(pa.table({"pair_id": ["p0", "p1"], "label_0": [0.5, 7.0]}), folder / "labels" / "human.parquet")
    assert main([str(folder)]) == 2
    assert "labels/human.parquet row 1: label_0 is 7.0" in capsys.readouterr().err
    pq.write_table(pa.table({"pair_id": ["p0", "q"], "label_0": [0.5, 1.0]}), folder / "labels" / "human.parquet")
    assert main([str(folder)]) == 2
    assert "row 1: pair_id 'q' is none of the dataset's pairs" in capsys.readouterr().err
    assert (folder / "targets" / "tuned.parquet").read_bytes() == before


def test_an_unknown_option_is_an_error(folder):
    with pytest.raises(SystemExit) as stop:
        main([str(folder), "--methd", "tuned"])
    assert stop.value.code == 2


def test_from_pick_a_pic_to_targets(tmp_path):
    """Eight rows, four labelled (one a tie), a judge that always prefers image 0: power by hand.

    rho_z = -1/2, -1/2, 1/2, 0 and rho_g = -1/2: lam = (1/4 + 1/4 - 1/4) / (4 / 4) = 1/4, below the cap of 1.
    A = 1 / (1 - 1/4 * 1/2) = 8/7: the third pair's target is 1 + 8/7 (0 - 1) = -1/7, the tie's 1 - 4/7 = 3/7.
    """
    labels = [1.0, 1.0, 0.0, 0.5]
    rows = [(labels[i] if i < 4 else 0.0, i < 4) for i in range(8)]
    pictures = [io.BytesIO() for _ in range(16)]
    for i, buffer in enumerate(pictures):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(buffer, "JPEG")
    table = {
        "caption": [f"prompt {i}" for i in range(8)],
        "jpg_0": [buffer.getvalue() for buffer in pictures[:8]],
        "jpg_1": [buffer.getvalue() for buffer in pictures[8:]],
        "label_0": [label for label, _ in rows],
        "label_1": [1 - label for label, _ in rows],
        "has_label": [has for _, has in rows],
        "ranking_id": list(range(8)),
    }
    pq.write_table(pa.table(table), tmp_path / "pick.parquet")
    assert ingest(["pickapic", str(tmp_path / "pick.parquet"), "--out", str(tmp_path / "d")]) == 0
    ids = PairReader(tmp_path / "d").ids()
    write_labels(tmp_path / "d", "first", Labels(ids, np.ones(8), {"judge_version": ["1"] * 8}))
    assert main([str(tmp_path / "d")]) == 0
    targets = read_targets(tmp_path / "d", "tuned")
    assert targets.pair_id == [f"pickapic-{i}" for i in range(8)]
    np.testing.assert_allclose(targets.target, [1, 1, -1 / 7, 3 / 7, 1, 1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(targets.weight, [1.75] * 4 + [0.25] * 4, atol=1e-12)
