"""Sample folders: what an index may hold, what is refused, and what tells images apart."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison import samples
from dedpo_diffusion.evaluation.comparison.samples import images_digest, load_images, read_index, resolutions, unlisted
from support.samples import rewrite, write_samples


@pytest.fixture
def folder(tmp_path):
    return write_samples(tmp_path / "base")


def put_column(folder, name, values):
    table = pq.read_table(folder / "index.parquet")
    pq.write_table(table.set_column(table.column_names.index(name), name, values), folder / "index.parquet")


def recast(folder, **kinds):
    for name, kind in kinds.items():
        put_column(folder, name, pq.read_table(folder / "index.parquet")[name].cast(kind))


def with_row(folder, number, **changes):
    rewrite(folder, lambda rows: [{**row, **(changes if place == number else {})} for place, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: recast(f, seed=pa.string()), "column 'seed' holds string, and must hold whole numbers"),
        (lambda f: recast(f, seed=pa.float64()), "column 'seed' holds double, and must hold whole numbers"),
        (lambda f: recast(f, prompt_index=pa.string()), "column 'prompt_index' holds string, and must hold whole numbers"),
        (lambda f: with_row(f, 4, seed=None), "index.parquet row 4 has no seed; mend the row"),
        (lambda f: with_row(f, 0, file=None), "index.parquet row 0 has no file"),
        (lambda f: with_row(f, 11, prompt=None), "index.parquet row 11 has no prompt"),
        (lambda f: rewrite(f, lambda rows: [{**row, "seed": None} for row in rows]), "row 0 has no seed"),
        (lambda f: put_column(f, "seed", pa.array([2**63] * 12, pa.uint64())), "9223372036854775808"),
        (lambda f: rewrite(f, lambda rows: [{**row, "prompt": 7} for row in rows]), "column 'prompt' holds int64, and must hold text"),
        (lambda f: rewrite(f, lambda rows: [{**row, "category": 7} for row in rows]), "column 'category' holds int64, and must hold text"),
        (lambda f: with_row(f, 2, file=str(f.absolute() / "1-0.png")), "leads out of the folder; name images as they lie in"),
        (lambda f: with_row(f, 2, file="../base/1-0.png"), "row 2: file '../base/1-0.png' leads out of the folder"),
        (lambda f: with_row(f, 2, file=""), "row 2: file '' leads out of the folder"),
        (lambda f: with_row(f, 2, file="./0-0.png"), "lists 0-0.png in row 0 and again in row 2"),
        (lambda f: with_row(f, 1, seed=100), "with seed 100 in row 0 and again in row 1, and images are paired by prompt and seed"),
        (lambda f: with_row(f, 1, file="no\0such.png"), "is missing (index.parquet row 1)"),
        (lambda f: with_row(f, 1, file="."), "leads out of the folder"),
    ],
)
def test_an_index_that_cannot_be_meant_is_refused_by_row(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError) as caught:
        read_index(folder)
    assert message in str(caught.value) and "index.parquet" in str(caught.value) and "; " in str(caught.value)


def test_other_types_of_the_same_meaning_make_no_difference(folder):
    before = read_index(folder)
    recast(folder, seed=pa.int32(), prompt_index=pa.uint8(), file=pa.large_string(), prompt=pa.dictionary(pa.int8(), pa.string()))
    assert read_index(folder) == before


def test_the_same_seed_serves_many_prompts_and_a_prompt_many_seeds(folder):
    rewrite(folder, lambda rows: [{**row, "seed": number % 2} for number, row in enumerate(rows)])
    assert len(read_index(folder)) == 12


def test_categories_are_read_and_may_be_missing(folder):
    assert {row["category"] for row in read_index(folder)} == {None}
    rewrite(folder, lambda rows: [{**row, "category": "colour" if row["prompt_index"] < 3 else None} for row in rows])
    assert [row["category"] for row in read_index(folder)] == ["colour"] * 6 + [None] * 6
    rewrite(folder, lambda rows: [{**row, "category": None} for row in rows])
    assert {row["category"] for row in read_index(folder)} == {None}


def test_sizes_are_counted_from_headers_alone(folder, monkeypatch):
    Image.new("L", (20, 30)).save(folder / "3-0.png")
    Image.new("RGB", (30, 20)).save(folder / "0-1.png", format="JPEG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    found = resolutions(folder, read_index(folder))
    assert found == {(64, 64): 10, (20, 30): 1, (30, 20): 1} and next(iter(found)) == (64, 64)


def test_what_is_no_image_is_named_with_its_row(folder):
    (folder / "2-1.png").write_text("<html>")
    with pytest.raises(UserError, match=r"2-1\.png \(index\.parquet row 5\): the image cannot be decoded .*; restore it, or remove it and"):
        resolutions(folder, read_index(folder))
    with pytest.raises(UserError, match=r"2-1\.png: the image cannot be decoded .*; restore it, or remove it and index\.parquet"):
        load_images(folder, read_index(folder))


def test_images_beside_the_listed_ones_are_found(folder):
    rows = read_index(folder)
    assert unlisted(folder, rows) == []
    for name in ("9-0.png", "b.JPG", "notes.txt", ".9-1.png.host.12.tmp"):
        (folder / name).write_bytes(b"")
    assert unlisted(folder, rows) == ["9-0.png", "b.JPG"]


# ---- the fingerprint


@settings(max_examples=20)
@given(st.permutations(range(12)))
def test_the_fingerprint_does_not_depend_on_the_order_of_rows(tmp_path_factory, order):
    folder = tmp_path_factory.getbasetemp() / "order"
    if not folder.is_dir():
        write_samples(folder)
    rows = read_index(folder)
    assert images_digest(folder, [rows[k] for k in order]) == images_digest(folder, rows)


@pytest.mark.parametrize("place", [0, 90_000, 149_999], ids=["first", "middle", "last"])
def test_one_pixel_changes_the_fingerprint_though_the_size_does_not(folder, place):
    """Noise does not compress, so both files have 450 kB; the middle pixel lies far from the ends that are read."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0-0.png")
    rows, size = read_index(folder), (folder / "0-0.png").stat().st_size
    before = images_digest(folder, rows)
    assert size > 3 * samples.EDGE and images_digest(folder, rows) == before
    pixels.reshape(-1, 3)[place] ^= 1
    Image.fromarray(pixels).save(folder / "0-0.png")
    assert (folder / "0-0.png").stat().st_size == size and images_digest(folder, rows) != before


def test_a_file_is_read_once_a_process_and_again_after_a_change(folder):
    rows, stamp = read_index(folder), 1_700_000_000
    for row in rows:
        os.utime(folder / row["file"], (stamp, stamp))
    before = images_digest(folder, rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(samples, "open", lambda *_: pytest.fail("a file was read again"), raising=False)
        assert images_digest(folder, rows) == before
    data = bytearray((folder / "0-0.png").read_bytes())
    data[-1] ^= 1
    (folder / "0-0.png").write_bytes(data)
    changed, tick = images_digest(folder, rows), (folder / "0-0.png").stat().st_mtime_ns
    data[-2] ^= 1
    (folder / "0-0.png").write_bytes(data)
    os.utime(folder / "0-0.png", ns=(tick, tick))  # as if within the same tick of the file system's clock
    assert len({before, changed, images_digest(folder, rows)}) == 3


def test_a_swap_of_two_images_changes_the_fingerprint(folder):
    before, (a, b) = images_digest(folder, read_index(folder)), (folder / "0-0.png", folder / "1-0.png")
    a.rename(folder / "c"), b.rename(a), (folder / "c").rename(b)
    assert images_digest(folder, read_index(folder)) != before
