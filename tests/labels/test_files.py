"""Labels, votes and targets on disk: round trips, aggregation, messages."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels, Targets, Votes
from dedpo_diffusion.labels.files import (
    aggregate,
    align,
    label_names,
    label_origin,
    read_labels,
    read_report,
    read_targets,
    read_votes,
    vote_names,
    write_labels,
    write_targets,
    write_votes,
)  # fmt: skip


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
        ({"pair_id": ["a", "a"]}, r"'a' is in row 0 and again in row 1"),
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


@pytest.mark.parametrize("text", ["{", "[1]", '{"method": "tuned"'])
def test_a_damaged_report_is_named(tmp_path, text):
    assert read_report(tmp_path, "tuned") is None
    path = write_targets(tmp_path, "tuned", Targets(["a"], np.array([1.0]), np.array([1.0])), {"method": "tuned"}).with_suffix(".json")
    assert read_report(tmp_path, "tuned") == {"method": "tuned"}
    path.write_text(text)
    with pytest.raises(UserError, match=r"targets/tuned\.json: cannot be read \(.+\); run `dedpo merge` again"):
        read_report(tmp_path, "tuned")


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


# ---- votes


def votes(rows, **extra):
    ids, label_0, count, rater = zip(*rows, strict=True)
    return Votes(list(ids), np.array(label_0), np.array(count), list(rater), extra)


def test_votes_round_trip_with_what_else_is_known(tmp_path):
    extra = {"swapped": [True, False], "repeat": [False, True], "seconds": [1.5, None], "time": ["2026-01-01T00:00:00Z", None]}
    write_votes(tmp_path, "human", votes([("a", 1.0, 1, "ann"), ("a", 0.5, 3, None)], **extra))
    found = read_votes(tmp_path, "human")
    assert (found.pair_id, found.label_0.tolist(), found.votes.tolist(), found.rater) == (["a", "a"], [1.0, 0.5], [1, 3], ["ann", None])
    assert found.extra == extra and vote_names(tmp_path) == ["human"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_0": [1.0, 2.0]}, r"votes/human\.parquet row 1: label_0 is 2\.0"),
        ({"votes": [1, 0]}, r"row 1: votes is 0, and must be at least 1"),
        ({"votes": [1, None]}, r"row 1: votes is missing"),
        ({"pair_id": [None, "a"]}, r"row 0: pair_id is missing"),
        ({"swapped": [1, 0]}, r"column 'swapped' holds int64, and must hold true or false"),
        ({"mood": ["good", "bad"]}, r"unknown column 'mood'"),
    ],
)
def test_bad_vote_files_name_file_and_row(tmp_path, changes, words):
    columns = {"pair_id": ["a", "a"], "label_0": [1.0, 0.0], "votes": [1, 1], "rater": ["ann", "bob"]} | changes
    table_file(tmp_path / "votes" / "human.parquet", **columns)
    with pytest.raises(UserError, match=words):
        read_votes(tmp_path, "human")


def test_a_label_is_the_mean_of_its_votes_and_repeats_do_not_count():
    found = aggregate(
        votes(
            [
                ("b", 1.0, 3, None),
                ("a", 1.0, 1, "ann"),
                ("b", 0.0, 1, None),
                ("a", 0.0, 1, "ann"),
                ("c", 0.5, 1, "bob"),
                ("c", 1.0, 1, "ann"),
            ],
            repeat=[False, False, False, True, False, False],
            seconds=[None, 2.0, None, 9.0, 1.0, 4.0],
        )
    )
    assert found.pair_id == ["b", "a", "c"] and found.label_0.tolist() == [0.75, 1.0, 0.75]
    assert found.extra == {"votes": [4, 1, 2], "rater": [None, "ann", None], "seconds": [None, 2.0, 2.5]}


def test_votes_of_nobody_named_make_labels_without_a_rater():
    assert aggregate(votes([("a", 1.0, 2, None)])).extra == {"votes": [2]}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 5)), min_size=1, max_size=20), st.randoms()
)
def test_neither_the_order_of_votes_nor_the_way_they_are_counted_matters(rows, random):
    counted = aggregate(votes([(*row, None) for row in rows]))
    single = [(pair_id, label, 1, None) for pair_id, label, count in rows for _ in range(count)]
    random.shuffle(single)
    one_by_one = aggregate(votes(single))
    first = dict(zip(counted.pair_id, zip(counted.label_0, counted.extra["votes"], strict=True), strict=True))
    second = dict(zip(one_by_one.pair_id, zip(one_by_one.label_0, one_by_one.extra["votes"], strict=True), strict=True))
    assert first.keys() == second.keys()
    for pair_id in first:
        assert first[pair_id] == pytest.approx(second[pair_id])


# ---- where labels come from, and how likely they were


def test_a_label_file_says_what_made_it(tmp_path):
    assert label_origin(tmp_path, "human") is None
    write_labels(tmp_path, "human", Labels(["a"], np.array([1.0])))
    assert label_origin(tmp_path, "human") is None
    write_labels(tmp_path, "human", Labels(["a"], np.array([1.0])), origin="a test")
    assert label_origin(tmp_path, "human") == "a test" and read_labels(tmp_path, "human").pair_id == ["a"]


@pytest.mark.parametrize("value", [0.0, 1.5, -0.1, math.nan, None])
def test_a_propensity_outside_its_range_names_its_row(tmp_path, value):
    labels = Labels(["a", "b"], np.array([1.0, 0.0]), {"propensity": [0.5, value]})
    with pytest.raises(UserError, match=r"labels/human\.parquet row 1: propensity is .*\(0, 1\]"):
        write_labels(tmp_path, "human", labels)
    table_file(
        tmp_path / "labels" / "human.parquet", pair_id=["a", "b"], label_0=[1.0, 0.0], propensity=pa.array([0.5, value], pa.float64())
    )
    with pytest.raises(UserError, match=r"row 1: propensity is"):
        read_labels(tmp_path, "human")
