"""The pair dataset on disk: round trips, random access, atomic writing, messages."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.pairs import dataset as pairs_module
from dedpo_diffusion.pairs.dataset import (
    PairReader,
    PairWriter,
)


def picture(colour, fmt="JPEG", size=16, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, fmt)
    return buffer.getvalue()


def pair(i, **source):
    return Pair(f"p{i}", f"prompt {i}", b"image 0 of %d" % i, b"image 1 of %d" % i, source or {"seed": i, "model": "m"})


def write(folder, count, **options):
    with PairWriter(folder, **options) as writer:
        for i in range(count):
            writer.add(pair(i))
    return PairReader(folder)


def table_file(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def shard(folder, name="pairs-00000", drop=(), **columns):
    """A shard of two pairs, with columns replaced, added or dropped."""
    base = {"pair_id": ["a", "b"], "prompt": ["x", "y"], "image_0": [b"0", b"1"], "image_1": [b"2", b"3"]} | columns
    return table_file(folder / "pairs" / f"{name}.parquet", **{key: value for key, value in base.items() if key not in drop})


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- round trips


@pytest.mark.parametrize(("count", "shard_pairs"), [(1, 1000), (70, 1000), (100, 40), (64, 32), (80, 40)])
def test_what_is_written_is_read(tmp_path, count, shard_pairs):
    reader = write(tmp_path, count, shard_pairs=shard_pairs)
    expected = [pair(i) for i in range(count)]
    assert len(reader) == count and len(reader.shards) == math.ceil(count / shard_pairs)
    assert list(reader.iter_pairs()) == expected
    assert reader.ids() == [p.pair_id for p in expected] and reader.prompts() == [p.prompt for p in expected]
    assert [p for k in range(len(reader.shards)) for p in reader.shard_pairs(k)] == expected


def test_random_access_and_every_start_agree_with_the_stream(tmp_path):
    reader = write(tmp_path, 150, shard_pairs=70)  # shards of 70, 70, 10; row groups of 32, 32, 6, ...
    expected = list(reader.iter_pairs())
    order = np.random.default_rng(0).permutation(150)
    assert [reader.pair(int(i)) for i in order] == [expected[i] for i in order]
    for start in (0, 1, 31, 32, 33, 69, 70, 71, 139, 140, 149, 150):
        assert list(reader.iter_pairs(start)) == expected[start:]
    with pytest.raises(IndexError):
        reader.pair(150)


def test_one_large_row_group_is_streamed_from_its_middle(tmp_path):
    n = 100  # as written by another program: no small row groups
    shard(tmp_path, pair_id=[f"p{i}" for i in range(n)], prompt=["x"] * n, image_0=[b"%d" % i for i in range(n)], image_1=[b""] * n)
    reader = PairReader(tmp_path)
    for start in (0, 31, 32, 63, 64, 99):
        assert [p.image_0 for p in reader.iter_pairs(start)] == [b"%d" % i for i in range(start, n)]
    assert reader.pair(77).image_0 == b"77"


def test_location_names_file_and_row(tmp_path):
    reader = write(tmp_path, 50, shard_pairs=40)
    assert (reader.location(12), reader.location(40)) == ("pairs-00000.parquet row 12", "pairs-00001.parquet row 0")


def test_random_access_reads_one_small_row_group_and_keeps_few(tmp_path):
    reader = write(tmp_path, 320, shard_pairs=320)
    with pq.ParquetFile(reader.shards[0]) as file:
        assert {file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)} == {32}
    for i in range(0, 320, 32):
        reader.pair(i)
    assert len(reader._cache) <= pairs_module.CACHED_GROUPS


def test_a_shard_of_large_images_is_closed_early(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "SHARD_BYTES", 100)
    reader = write(tmp_path, 10)  # 24 bytes a pair: 5 pairs reach 100 bytes
    assert len(reader.shards) == 2 and len(list(reader.iter_pairs())) == 10


def test_large_strings_of_other_writers_are_read(tmp_path):
    shard(tmp_path, pair_id=pa.array(["a", "b"], pa.large_string()), image_0=pa.array([b"0", b"1"], pa.large_binary()))
    assert PairReader(tmp_path).pair(1) == Pair("b", "y", b"1", b"3")


# ---- nothing half-written


def test_an_error_leaves_no_pairs_behind(tmp_path):
    def fill():
        with PairWriter(tmp_path / "d", shard_pairs=2) as writer:
            for i in range(5):
                writer.add(pair(i))
            raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        fill()
    assert files_below(tmp_path / "d") == []


def test_an_error_before_the_first_pair_keeps_its_own_words(tmp_path):
    with pytest.raises(RuntimeError, match="the source broke"), PairWriter(tmp_path):
        raise RuntimeError("the source broke")
    assert files_below(tmp_path) == []


def test_nothing_is_visible_before_the_end(tmp_path):
    with PairWriter(tmp_path, shard_pairs=1) as writer:
        writer.add(pair(0))
        assert not (tmp_path / "pairs").exists()
    assert (tmp_path / "pairs" / "pairs-00000.parquet").is_file()


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(UserError, match="holds pairs already"), PairWriter(tmp_path):
        pass
    assert len(PairReader(tmp_path)) == 3


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="no pair to write"), PairWriter(tmp_path):
        pass
    assert files_below(tmp_path) == []


def test_a_duplicate_names_both_pairs(tmp_path):
    def fill():
        with PairWriter(tmp_path, shard_pairs=2) as writer:
            for i in (0, 1, 2, 3, 1):
                writer.add(pair(i))

    with pytest.raises(UserError, match="'p1' comes twice, as pair 1 and as pair 4"):
        fill()
    assert files_below(tmp_path) == []


def test_a_source_key_with_the_prefix_is_a_programmers_mistake(tmp_path):
    with pytest.raises(ValueError, match="source_seed"), PairWriter(tmp_path) as writer:
        writer.add(pair(0, source_seed=1))
    assert files_below(tmp_path) == []


# ---- bad pair files


@pytest.mark.parametrize(
    ("drop", "columns", "words"),
    [
        (["image_1"], {}, r"pairs-00000\.parquet has no column 'image_1'.*add it"),
        ([], {"seed": [1, 2]}, r"pairs-00000\.parquet has an unknown column 'seed': rename it to source_seed to keep it, or remove it$"),
        ([], {"label_0": [1.0, 0.0]}, r"unknown column 'label_0'.*labels belong to the labels folder"),
        ([], {"image_0": ["a.png", "b.png"]}, r"column 'image_0' holds string, and must hold binary"),
        ([], {"pair_id": [1, 2]}, r"column 'pair_id' holds int64, and must hold text"),
    ],
)
def test_bad_columns_are_found_from_the_header(tmp_path, drop, columns, words):
    shard(tmp_path, drop=drop, **columns)
    with pytest.raises(UserError, match=words):
        PairReader(tmp_path)


def test_every_shards_header_is_checked(tmp_path):
    shard(tmp_path)
    shard(tmp_path, "pairs-00001", drop=["prompt"])
    with pytest.raises(UserError, match=r"pairs-00001\.parquet has no column 'prompt'"):
        PairReader(tmp_path)


def test_a_folder_without_pairs_and_a_file_that_is_no_parquet(tmp_path):
    with pytest.raises(UserError, match="dedpo ingest"):
        PairReader(tmp_path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs-00000.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"pairs-00000\.parquet cannot be read as parquet"):
        PairReader(tmp_path)


def test_duplicate_ids_across_files_name_both_rows(tmp_path):
    shard(tmp_path)
    shard(tmp_path, "pairs-00001", pair_id=["c", "b"])
    with pytest.raises(UserError, match=r"'b' is in pairs-00000\.parquet row 1 and again in pairs-00001\.parquet row 1"):
        PairReader(tmp_path).ids()


def test_missing_values_name_file_and_row(tmp_path):
    shard(tmp_path, pair_id=["a", None], image_1=[b"0", None], prompt=[None, "x"])
    reader = PairReader(tmp_path)
    for read, words in [
        (reader.ids, "row 1: pair_id is missing"),
        (reader.prompts, "row 0: prompt is missing"),
        (lambda: reader.pair(1), "row 1: .* is missing"),
        (lambda: list(reader.iter_pairs()), "row 0: prompt is missing"),
    ]:
        with pytest.raises(UserError, match=words):
            read()
