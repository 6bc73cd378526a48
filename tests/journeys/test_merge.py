"""`dedpo merge` on pair datasets on disk: targets, report, messages; and the way from Pick-a-Pic files to targets."""

from __future__ import annotations

import hashlib
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.core.records import Labels, Pair, Targets
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.labels.calibration import assign_folds
from dedpo_diffusion.labels.files import read_targets, write_labels, write_targets
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines.ingest import main as ingest
from dedpo_diffusion.pipelines.merge import main as stage

N, N_HUMAN = 80, 20
RNG = np.random.default_rng(0)
HUMAN = (RNG.random(N) < 0.5).astype(float)
JUDGE = np.clip(0.5 + 0.3 * (2 * HUMAN - 1) + RNG.normal(0, 0.25, N), 0, 1)
LABELLED = RNG.permutation(N)[:N_HUMAN]
IDS = [f"p{i}" for i in range(N)]


def main(arguments):
    """The stage, without its picture, which takes longer than all else; test_merge_more.py looks at that."""
    return stage([*arguments, "--picture", "false"])


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
    found, expected = read_targets(folder, method), merge_labels(human_column(), JUDGE, method=method, judges=["clip"])
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
    assert report["propensities"] is True and any("not drawn at random" in text for text in report["sentences"])
    assert report["worth_reference"] == "same_propensities" and report["curve"] is None
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
        assert "--missing tie" in message
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
    assert main([str(folder), "--methd", "tuned"]) == 2


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


# ---- a judge that does not answer everywhere, and targets by fold


def test_a_judge_without_an_answer_counts_as_undecided_and_is_counted(folder, capsys):
    write_labels(folder, "clip", Labels(IDS[:73], JUDGE[:73]))
    filled = np.where(np.arange(N) < 73, JUDGE, 0.5)
    for method in ("tuned", "dedpo", "naive"):
        assert main([str(folder), "--method", method, "--missing", "tie"]) == 0
        found, expected = read_targets(folder, method), merge_labels(human_column(), filled, method=method)
        np.testing.assert_array_equal(found.target, expected.target)
        np.testing.assert_array_equal(found.weight, expected.weight)
        report = json.loads((folder / "targets" / f"{method}.json").read_text())
        sentence = "The judge has no answer for 7 of 80 pairs and counts as undecided there (0.5)."
        assert report["n_judge_missing"] == 7 and report["sentences"][-1] == sentence
        assert sentence in capsys.readouterr().out.splitlines()
    assert main([str(folder), "--method", "human_only"]) == 0
    report = json.loads((folder / "targets" / "human_only.json").read_text())
    assert report["n_judge_missing"] == 7 and not any("undecided" in sentence for sentence in report["sentences"])


def test_a_complete_judge_has_none_missing(folder):
    assert main([str(folder), "--missing", "tie"]) == 0
    report = json.loads((folder / "targets" / "tuned.json").read_text())
    assert (report["n_judge_missing"], report["fold"]) == (0, None)


def mean_coefficients(p, g, silent, power):
    """Each pair's mean coefficient weight * (0.5 - target), over every choice of 2 of 4 pairs to ask and every answer."""
    mean = np.zeros(4)
    for asked in itertools.combinations(range(4), 2):
        rows = list(asked)
        for answer in itertools.product([0.0, 1.0], repeat=2):
            human = np.full(4, np.nan)
            human[rows] = answer
            merged = merge_labels(human, np.where(silent(human), 0.5, g), power=power)
            chance = np.prod(np.where(np.array(answer) > 0.5, p[rows], 1 - p[rows])) / 6
            mean += chance * merged.weight * (0.5 - merged.target)
    return mean


def test_ties_keep_the_estimate_unbiased_unless_the_judge_is_silent_where_people_were_asked():
    p, g = np.array([0.9, 0.2, 0.7, 0.4]), np.array([0.1, 0.8, 0.7, 0.9])
    for power in (0.3, 1.0):
        by_pair = mean_coefficients(p, g, lambda human: np.array([True, False, False, True]), power)
        np.testing.assert_allclose(by_pair, 0.5 - p, atol=1e-12)
        by_asking = mean_coefficients(p, g, lambda human: ~np.isnan(human), power)
        np.testing.assert_allclose(by_asking, 0.5 - p + power * 0.5 * (0.5 - g), atol=1e-12)  # half the pairs keep the judge's error


def test_a_judge_that_is_silent_where_people_answered_is_warned_of(folder, capsys):
    unlabelled = [i for i in range(N) if i not in LABELLED]
    write_labels(folder, "clip", Labels([IDS[i] for i in unlabelled], JUDGE[unlabelled]))
    assert main([str(folder), "--missing", "tie"]) == 0
    assert "Warning: the judge has no answer for 20 of 20 pairs with a human label, but for 0 of 60 others" in capsys.readouterr().out
    write_labels(folder, "clip", Labels(IDS[:73], JUDGE[:73]))
    assert main([str(folder), "--missing", "tie"]) == 0
    assert "with a human label, but for" not in capsys.readouterr().out


@pytest.fixture
def grouped(tmp_path):
    """As `folder`, with 10 prompts of 8 pairs each; which pairs are labelled, and what is labelled, does not depend on the prompt."""
    with PairWriter(tmp_path / "d") as writer:
        for i, pair_id in enumerate(IDS):
            writer.add(Pair(pair_id, f"prompt {i % 10}", b"0", b"1"))
    write_labels(tmp_path / "d", "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED]))
    write_labels(tmp_path / "d", "clip", Labels(IDS, JUDGE))
    return tmp_path / "d"


@pytest.mark.parametrize("method", ["human_only", "tuned", "naive"])
def test_targets_of_a_fold_are_those_of_a_merge_without_its_pairs(grouped, method):
    assert main([str(grouped), "--method", method, "--folds", "3", "--seed", "4"]) == 0
    fold = assign_folds([f"prompt {i % 10}" for i in range(N)], 3, 4)
    pooled, whole = read_targets(grouped, method), merge_labels(human_column(), JUDGE, method=method)
    np.testing.assert_array_equal(pooled.target, whole.target)
    np.testing.assert_array_equal(pooled.weight, whole.weight)
    for k in range(3):
        found, rest = read_targets(grouped, f"{method}-fold-{k}"), fold != k
        expected = merge_labels(human_column()[rest], JUDGE[rest], method=method)
        assert found.pair_id == IDS and (found.weight[fold == k] == 0).all() and (found.target[fold == k] == 0.5).all()
        np.testing.assert_array_equal(found.target[rest], expected.target)
        np.testing.assert_array_equal(found.weight[rest], expected.weight)
        report = json.loads((grouped / "targets" / f"{method}-fold-{k}.json").read_text())
        assert report["fold"] == {"number": k, "of": 3, "seed": 4} and report["n"] == rest.sum()
    assert sorted(np.bincount(fold)) == [24, 24, 32]


def test_propensities_are_those_of_the_pairs_outside_the_fold(grouped):
    propensity = np.linspace(0.1, 0.9, N)
    extra = {"propensity": propensity[LABELLED].tolist()}
    write_labels(grouped, "human", Labels([IDS[i] for i in LABELLED], HUMAN[LABELLED], extra))
    assert main([str(grouped), "--folds", "2"]) == 0
    for k in range(2):
        rest = assign_folds([f"prompt {i % 10}" for i in range(N)], 2, 0) != k
        expected = merge_labels(human_column()[rest], JUDGE[rest], propensity=propensity[rest])
        np.testing.assert_array_equal(read_targets(grouped, f"tuned-fold-{k}").weight[rest], expected.weight)


def test_no_answer_within_a_fold_reaches_its_targets(grouped):
    fold = assign_folds([f"prompt {i % 10}" for i in range(N)], 2, 0)
    assert main([str(grouped), "--folds", "2"]) == 0
    before = [(grouped / "targets" / f"tuned-fold-{k}.parquet").read_bytes() for k in range(2)]
    changed = np.where(fold == 1, 1 - HUMAN, HUMAN)
    write_labels(grouped, "human", Labels([IDS[i] for i in LABELLED], changed[LABELLED]))
    assert main([str(grouped), "--folds", "2"]) == 0
    after = [(grouped / "targets" / f"tuned-fold-{k}.parquet").read_bytes() for k in range(2)]
    assert after[1] == before[1] and after[0] != before[0]


def test_the_commands_after_folds_are_printed_and_name_their_files(grouped, capsys):
    assert main([str(grouped), "--method", "human_only", "--folds", "2", "--name", "mine"]) == 0
    printed = capsys.readouterr().out
    for k in range(2):
        assert f"dedpo train --config CONFIG --data.pairs {grouped} --data.targets mine-fold-{k} --out runs/mine-fold-{k}" in printed
    assert f"dedpo label {grouped} --with self=runs/mine-fold-0,runs/mine-fold-1" in printed
    assert "carries them across folds" not in printed
    assert main([str(grouped), "--folds", "2"]) == 0
    assert "if judge clip learned from the human labels, it carries them across folds" in capsys.readouterr().out


def test_folds_that_cannot_be_made_are_refused_and_nothing_is_written(grouped, capsys):
    for folds, words in ((1, "--folds is 1"), (-2, "--folds is -2"), (81, "--folds 81: 80 rows")):
        assert main([str(grouped), f"--folds={folds}"]) == 2
        assert words in capsys.readouterr().err
    write_labels(grouped, "human", Labels(["p0"], np.array([1.0])))
    fold = assign_folds([f"prompt {i % 10}" for i in range(N)], 2, 0)[0]
    assert main([str(grouped), "--folds", "2"]) == 2
    message = capsys.readouterr().err
    assert f"(human, clip; targets tuned-fold-{fold})" in message and "none of the 40 pairs has a human label" in message
    assert target_files(grouped) == []


def test_one_prompt_for_all_is_split_by_pairs_and_told(folder, capsys):
    assert main([str(folder), "--folds", "2"]) == 0
    assert "fewer prompts (1) than folds (2)" in capsys.readouterr().out
    held_out = [read_targets(folder, f"tuned-fold-{k}").weight == 0 for k in range(2)]
    assert (held_out[0] ^ held_out[1]).all()


def test_targets_by_fold_of_an_earlier_merge_are_named(grouped, capsys):
    assert main([str(grouped), "--folds", "3"]) == 0
    assert "of an earlier merge" not in capsys.readouterr().out
    assert main([str(grouped), "--folds", "2"]) == 0
    assert "Warning: tuned-fold-2 are of an earlier merge, not of this one" in capsys.readouterr().out
    assert main([str(grouped)]) == 0
    assert "Warning: tuned-fold-0, tuned-fold-1, tuned-fold-2 are of an earlier merge" in capsys.readouterr().out


def test_a_report_that_is_no_json_leaves_the_old_targets(folder):
    assert main([str(folder)]) == 0
    before = (folder / "targets" / "tuned.parquet").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_targets(folder, "tuned", Targets(IDS, np.zeros(N), np.ones(N)), {"mean": np.inf})
    assert (folder / "targets" / "tuned.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "cross_fitted", "--human", "few"], "label more pairs, or use rule plug_in"),
        (
            ["--propensities", "estimate", "--human", "few"],
            "too few for 5 folds; take labels as taken at random instead (--propensities none)",
        ),
        (["--human", "worded"], "column 'propensity' holds string, and must hold a number"),
        (["--plan", "60", "--human", "skewed"], "these have unequal propensities; give --propensities none"),
    ],
)
def test_messages_name_remedies_that_the_command_has(folder, capsys, options, words):
    write_labels(folder, "few", Labels(IDS[:3], HUMAN[:3]))
    write_labels(folder, "skewed", Labels(IDS[:30], HUMAN[:30], {"propensity": [0.2, 0.6] * 15}))
    pq.write_table(pa.table({"pair_id": IDS, "label_0": HUMAN, "propensity": ["often"] * N}), folder / "labels" / "worded.parquet")
    assert main([str(folder), "--judge", "clip", *options]) == 2
    assert words in capsys.readouterr().err and target_files(folder) == []
