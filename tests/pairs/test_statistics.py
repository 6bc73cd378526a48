"""Image statistics of all pairs: the same by one process or several, kept, resumed, and remeasured for other pairs."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.labels.files import label_names
from dedpo_diffusion.labels.image_statistics import WORDS, image_statistics
from dedpo_diffusion.pairs import statistics
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pairs.features import generator_group, statistics_group
from dedpo_diffusion.pairs.statistics import measure_statistics, read_statistics, statistics_path
from support.pictures import picture


def dataset(folder, count, **change):
    with PairWriter(folder) as writer:
        for k in range(count):
            writer.add(Pair(f"p{k}", "a prompt", picture(k), change.get(f"p{k}", picture(k + 1))))
    return PairReader(folder)


def test_they_are_those_of_each_image_and_kept_where_no_judge_is(tmp_path):
    reader = dataset(tmp_path / "d", 5)
    assert read_statistics(reader) is None
    found = measure_statistics(reader)
    assert found.shape == (5, len(WORDS), 2) and found.dtype == np.float32
    pair = reader.pair(3)
    for side in (0, 1):
        one = image_statistics(decode_image(getattr(pair, f"image_{side}"), "here"))
        np.testing.assert_array_equal(found[3, :, side], np.array([one[name] for name in WORDS], np.float32))
    np.testing.assert_array_equal(read_statistics(reader), found)
    assert label_names(tmp_path / "d") == [] and [path.name for path in (tmp_path / "d" / "statistics").iterdir()] == ["images.parquet"]


def test_a_stopped_run_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "PART", 2)
    reader = dataset(tmp_path / "d", 7)
    seen, real = [], statistics.measure_part

    def counted(folder, start, path):
        seen.append(start)
        if start == 4 and seen.count(4) == 1:
            raise KeyboardInterrupt
        return real(folder, start, path)

    monkeypatch.setattr(statistics, "measure_part", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_statistics(reader, workers=1)
    assert seen == [0, 2, 4] and read_statistics(reader) is None
    found = measure_statistics(reader, workers=1)
    assert seen == [0, 2, 4, 4, 6]
    statistics_path(reader.folder).unlink()
    monkeypatch.setattr(statistics, "PART", 256)
    monkeypatch.setattr(statistics, "measure_part", real)
    np.testing.assert_array_equal(measure_statistics(reader), found)


@pytest.mark.slow
def test_several_processes_measure_the_same(tmp_path):
    reader = dataset(tmp_path / "d", 3 * statistics.PART + 5)
    many = measure_statistics(reader, workers=2)
    statistics_path(reader.folder).unlink()
    np.testing.assert_array_equal(measure_statistics(reader, workers=1), many)


def test_other_pairs_are_measured_anew(tmp_path):
    first = dataset(tmp_path / "a", 3)
    measure_statistics(first)
    other = dataset(tmp_path / "b", 4)
    statistics_path(other.folder).parent.mkdir()
    statistics_path(first.folder).rename(statistics_path(other.folder))
    assert read_statistics(other) is None
    assert len(measure_statistics(other)) == 4
    path = statistics_path(other.folder)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"dataset": other.fingerprint(), "rule": "another"}), path)
    assert read_statistics(other) is None


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    reader = dataset(tmp_path / "d", 4, p2=b"no image")
    with pytest.raises(UserError, match=r"pairs-00000.parquet row 2 image_1.*replace it, or leave its pair out"):
        measure_statistics(reader)
    assert not statistics_path(reader.folder).is_file()


def test_differences_change_sign_with_the_images():
    values = np.random.default_rng(0).uniform(0.1, 1, (6, len(WORDS), 2)).astype(np.float32)
    np.testing.assert_array_equal(statistics_group(values[:, :, ::-1]).values, -statistics_group(values).values)
    assert statistics_group(values).columns == list(WORDS)


@pytest.mark.parametrize("names", [("model_0", "model_1"), ("model1", "model2"), ("model_1", "model_2")])
def test_generators_are_one_hot_differences(tmp_path, names):
    made = [("sdxl", "sd15"), ("sd15", "sdxl"), ("flux", "flux"), ("sdxl", None)]
    with PairWriter(tmp_path / "d") as writer:
        for k, pair in enumerate(made):
            source = dict(zip(names, pair, strict=True)) | ({"swapped": k == 1} if names[0] != "model_0" else {})
            writer.add(Pair(f"p{k}", "a prompt", picture(k), picture(k + 1), source))
    group = generator_group(PairReader(tmp_path / "d"))
    assert group.columns == ["flux", "none", "sd15", "sdxl"]
    second = [0, 0, 1, -1] if names[0] == "model_0" else [0, 0, -1, 1]
    np.testing.assert_array_equal(group.values, [[0, 0, -1, 1], second, [0, 0, 0, 0], [0, -1, 0, 1]])


def test_no_generators_where_no_column_names_them(tmp_path):
    assert generator_group(dataset(tmp_path / "d", 2)) is None
