"""Columns of many rows: categories, places of pair_ids, source columns and label files of which only a part is read."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.core.tables import categories, first_repeat
from dedpo_diffusion.labels.files import read_labels, row_of, write_labels
from dedpo_diffusion.labels.merge_columns import comparable
from dedpo_diffusion.pairs.dataset import PairReader


@given(st.lists(st.one_of(st.none(), st.sampled_from(["b", "a", "c c"])), min_size=1))
def test_categories_are_the_values_sorted_and_nothing_is_none(values):
    names, codes = categories(values)
    assert [names[code] for code in codes] == ["none" if value is None else value for value in values]
    assert names == sorted(set(names)) and codes.dtype == np.int64


@pytest.mark.parametrize("values", [np.array([2.0, math.nan, 1.5]), pa.chunked_array([[2.0], [None, 1.5]])])
def test_categories_of_numbers(values):
    names, codes = categories(values)
    assert [names[code] for code in codes] == ["2", "none", "1.5"]


@given(st.lists(st.integers(0, 30)))
def test_the_first_repeat_is_that_of_a_plain_search(values):
    found = [(values.index(value), row) for row, value in enumerate(values) if value in values[:row]]
    assert first_repeat(values) == (found[0] if found else None)


def test_places_of_pair_ids():
    assert row_of(["c", "x", "a"], ["a", "b", "c"]).tolist() == [2, -1, 0] and row_of([], ["a"]).tolist() == []


def test_only_the_wanted_columns_of_a_label_file_are_read(tmp_path):
    write_labels(tmp_path, "human", Labels(["a", "b"], np.array([0.0, 1.0]), {"rater": ["x", "y"], "propensity": [0.5, 1.0]}))
    assert read_labels(tmp_path, "human", extras=()).extra == {}
    assert read_labels(tmp_path, "human", extras=("propensity", "votes")).extra == {"propensity": [0.5, 1.0]}


def shard(folder, name, ids, **source):
    path = folder / "pairs" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {"pair_id": ids, "prompt": ids, "image_0": [b""] * len(ids), "image_1": [b""] * len(ids)}
    pq.write_table(pa.table(base | {f"source_{key}": values for key, values in source.items()}), path)


def test_source_columns_are_joined_over_shards_that_lack_them_or_differ(tmp_path):
    shard(tmp_path, "a", ["p", "q"], seed=[1, 2], model=["m", None], both=[1, 2])
    shard(tmp_path, "b", ["r"], seed=[0.5], both=["x"])
    reader = PairReader(tmp_path)
    assert list(reader.source_types) == ["seed", "model", "both"]
    found = reader.sources(["both", "model", "seed"])
    assert {name: column.to_pylist() for name, column in found.items()} == {
        "both": ["1", "2", "x"], "model": ["m", None, None], "seed": [1.0, 2.0, 0.5],
    }  # fmt: skip


def test_columns_to_compare_are_numbers_and_few_texts(tmp_path):
    many, large = [f"t{k}" for k in range(60)], pa.array(["x", "y"] * 30, pa.large_string())
    shard(
        tmp_path,
        "a",
        many,
        seed=[None, float("inf"), *range(58)],
        ok=[True, False] * 30,
        page=many,
        kind=large,
        bag=[[1]] * 60,
        void=pa.nulls(60),
    )
    columns = PairReader(tmp_path).plain_sources()
    found = comparable(columns)
    assert set(columns) == {"seed", "ok", "page", "kind", "void"} and list(found) == ["source_seed", "source_ok", "source_kind"]
    np.testing.assert_array_equal(found["source_seed"], [math.nan, math.nan, *range(58)])
    np.testing.assert_array_equal(found["source_ok"], [1.0, 0.0] * 30)
    assert found["source_kind"].tolist() == ["x", "y"] * 30
