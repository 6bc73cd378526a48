"""Labels, votes and targets on disk: round trips, aggregation, messages."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.console import UserError
from dedpo_diffusion.labels import align, label_names, read_labels, read_targets, write_labels, write_targets
from dedpo_diffusion.records import Labels, Targets


def table_file(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- labels


def test_labels_round_trip_with_their_extra_columns(tmp_path):
    extra = {"rater": ["ann", None], "order_consistent": [True, False], "source_page": [1, 2]}
    write_labels(tmp_path, "human", Labels(["a", "b"], np.array([0.25, 1.0]), extra))
    labels = read_labels(tmp_path, "human")
    assert labels.pair_id == ["a", "b"] and labels.label_0.tolist() == [0.25, 1.0] and labels.extra == extra
    assert labels.label_0.dtype == np.float64 and label_names(tmp_path) == ["human"]


def test_an_error_while_writing_labels_keeps_the_old_file(tmp_path):
    write_labels(tmp_path, "human", Labels(["a"], np.array([1.0])))
    with pytest.raises(UserError, match=r"labels/human\.parquet row 1: label_0 is 1\.5"):
        write_labels(tmp_path, "human", Labels(["a", "b"], np.array([1.0, 1.5])))
    assert read_labels(tmp_path, "human").pair_id == ["a"] and files_below(tmp_path) == ["labels", "labels/human.parquet"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label_0": [1.0, -0.1]}, r"row 1: label_0 is -0\.1.*\[0, 1\]"),
        ({"label_0": [math.nan, 1.0]}, r"row 0: label_0 is nan"),
        ({"label_0": [1.0, None]}, r"row 1: label_0 is nan"),
        ({"label_0": ["1", "0"]}, r"'label_0' holds string, and must hold a number"),
        ({"pair_id": ["a", "a"]}, r"'a' stands in row 0 and again in row 1"),
        ({"pair_id": ["a", None]}, r"row 1: pair_id is missing"),
        ({"confidence": [1, 2]}, r"unknown column 'confidence': rename it to source_confidence"),
        ({"label_0": None}, r"no column 'label_0'"),
    ],
)
def test_bad_label_files_name_file_and_row(tmp_path, columns, words):
    columns = {key: value for key, value in ({"pair_id": ["a", "b"], "label_0": [1, 0]} | columns).items() if value is not None}
    path = table_file(tmp_path / "labels" / "vlm.parquet", **columns)
    with pytest.raises(UserError, match=words) as error:
        read_labels(tmp_path, "vlm")
    assert str(path) in str(error.value)


def test_a_missing_label_file_lists_those_there_are(tmp_path):
    write_labels(tmp_path, "clip", Labels(["a"], np.array([1.0])))
    with pytest.raises(UserError, match=r"there is no .*labels/human\.parquet \(labels there: clip\)"):
        read_labels(tmp_path, "human")
    with pytest.raises(UserError, match="cannot name a file"):
        read_labels(tmp_path, "../human")


def test_align_puts_labels_in_the_order_of_the_pairs(tmp_path):
    labels = Labels(["c", "a"], np.array([0.25, 1.0]))
    np.testing.assert_array_equal(align(labels, ["a", "b", "c"], folder=tmp_path, name="x"), [1.0, math.nan, 0.25])
    np.testing.assert_array_equal(align(labels, ["c", "a"], folder=tmp_path, name="x", complete=True), [0.25, 1.0])


def test_align_refuses_partial_judges_and_unknown_pairs(tmp_path):
    labels = Labels(["c", "a"], np.array([0.25, 1.0]))
    with pytest.raises(UserError, match=r"labels/x\.parquet covers 2 of 4 pairs \(first missing: 'b'\); run `dedpo label` again"):
        align(labels, ["a", "b", "c", "d"], folder=tmp_path, name="x", complete=True)
    with pytest.raises(UserError, match=r"labels/x\.parquet row 0: pair_id 'c' is none of the dataset's pairs"):
        align(labels, ["a", "b"], folder=tmp_path, name="x")


# ---- targets


def test_targets_round_trip_outside_the_unit_interval(tmp_path):
    targets = Targets(["a", "b"], np.array([-3.0, 1.75]), np.array([0.0, 1.5]))
    path = write_targets(tmp_path, "tuned", targets, {"power": 0.5})
    found = read_targets(tmp_path, "tuned")
    assert found.pair_id == ["a", "b"] and found.target.tolist() == [-3.0, 1.75] and found.weight.tolist() == [0.0, 1.5]
    assert path.with_suffix(".json").read_text() == '{\n  "power": 0.5\n}\n'


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"target": [1.0, math.nan]}, "row 1: target is missing, infinite"),
        ({"weight": [1.0, -1.0]}, "row 1: weight is missing, infinite or negative"),
        ({"source_x": [1, 2]}, "unknown column 'source_x': remove it"),
        ({"weight": None}, "no column 'weight'"),
        ({"pair_id": ["a", "a"]}, "row 0 and again in row 1"),
    ],
)
def test_bad_targets_are_refused(tmp_path, columns, words):
    columns = {"pair_id": ["a", "b"], "target": [1.0, 0.0], "weight": [1.0, 1.0]} | columns
    table_file(tmp_path / "targets" / "t.parquet", **{key: value for key, value in columns.items() if value is not None})
    with pytest.raises(UserError, match=words):
        read_targets(tmp_path, "t")
