"""ImageRewardDB from its metadata and archives, and ImageReward's test list: pairs, ties, archives, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats import imagereward
from support.format_rows import image_row, labels, ranking_row, read, settings, write_database


def from_database(folder, **changes):
    chosen = settings(folder, **changes)
    source = imagereward.open(str(folder), chosen)
    return source, [entry for where, row, root in source.rows() for entry in imagereward.entries(row, where, root, chosen)]


def test_rows_of_images_are_grouped_by_prompt(tmp_path):
    source, found = from_database(write_database(tmp_path))
    assert source.count == 3 and len(found) == 3 + 6 + 10
    first = [entry for entry in found if entry.prompt == "train prompt 0"]
    assert sorted(labels(entry)[0] for entry in first) == [1.0, 1.0, 1.0]  # sorted by rank, so earlier ones win
    assert {entry.source["prompt_id"] for entry in found} == {"000-train", "001-train", "002-train"}
    assert len({entry.key for entry in found}) == len(found)
    for entry in found:
        ranks = entry.source["rank_0"], entry.source["rank_1"]
        assert labels(entry) == [1.0 if ranks[0] < ranks[1] else 0.5]
        assert entry.source["classification"] == "Outdoor Scenes" and entry.source["fidelity_rating_1"] == 5
    ties = [entry for entry in found if labels(entry) == [0.5]]
    assert len(ties) == 1 + 2  # of four images two share a rank, of five two times two


@pytest.mark.parametrize("prefix", ["", "train_1/", "../../", "/tmp/"])
def test_images_come_out_of_archives_whatever_folders_these_claim(tmp_path, prefix):
    before = {path for path in tmp_path.parent.rglob("*.webp")}
    _, found = from_database(write_database(tmp_path, prefix=prefix))
    expected = {entry.key: entry.images for entry in from_database(write_database(tmp_path / "plain", extracted=True))[1]}
    for entry in found:
        assert entry.images == tuple(path.read_bytes() for path in expected[entry.key])
    assert {path for path in tmp_path.parent.rglob("*.webp")} - before == set((tmp_path / "plain").rglob("*.webp"))


def test_an_image_is_read_once_for_all_pairs_of_its_prompt(tmp_path, monkeypatch):
    names = []
    plain = zipfile.ZipFile.read

    def counting(self, member, pwd=None):
        names.append(member.filename)
        return plain(self, member, pwd)

    monkeypatch.setattr(zipfile.ZipFile, "read", counting)
    from_database(write_database(tmp_path))
    assert len(names) == len(set(names)) == 3 + 4 + 5


def test_a_missing_or_damaged_image_stays_a_path(tmp_path):
    write_database(tmp_path)
    (tmp_path / "images/train/train_2.zip").unlink()
    with zipfile.ZipFile(tmp_path / "images/train/train_1.zip", "a") as archive:
        crc = archive.getinfo("p0i0.webp").header_offset
    data = bytearray((tmp_path / "images/train/train_1.zip").read_bytes())
    data[crc + 60 : crc + 64] = b"\0\0\0\0"  # inside the first image: its checksum no longer fits
    (tmp_path / "images/train/train_1.zip").write_bytes(data)
    _, found = from_database(tmp_path)
    missing = {image for entry in found for image in entry.images if isinstance(image, Path)}
    assert missing == {tmp_path / "images/train/train_1.zip/p0i0.webp"} | {tmp_path / f"images/train/train_2/p2i{k}.webp" for k in range(5)}


def test_rows_go_on_from_any_prompt(tmp_path):
    chosen = settings(write_database(tmp_path))
    source = imagereward.open(str(tmp_path), chosen)
    assert [where for where, _, _ in source.rows(1)] == [where for where, _, _ in source.rows()][1:]
    assert list(source.rows(3)) == []
    again = imagereward.open(str(tmp_path), chosen)
    assert again.fingerprint == source.fingerprint
    (tmp_path / "images/train/train_2.zip").unlink()
    assert imagereward.open(str(tmp_path), chosen).fingerprint != source.fingerprint


def test_a_database_of_several_splits_wants_one(tmp_path):
    write_database(tmp_path, splits=("train", "test"))
    with pytest.raises(UserError, match="has several splits; give --split one of test, train"):
        imagereward.open(str(tmp_path), settings(tmp_path))
    with pytest.raises(UserError, match="no split 'validation'; give --split one of test, train"):
        imagereward.open(str(tmp_path), settings(tmp_path, split="validation"))
    _, found = from_database(tmp_path, split="test")
    assert {entry.prompt for entry in found} == {f"test prompt {k}" for k in range(3)}
    with pytest.raises(UserError, match="no split 'train'; give --split one of test"):
        imagereward.open(str(tmp_path / "metadata-test.parquet"), settings(split="train"))
    one = imagereward.open(str(tmp_path / "metadata-test.parquet"), settings())
    assert next(where for where, _, _ in one.rows()) == f"{tmp_path / 'metadata-test.parquet'} prompt 000-test"


def test_images_elsewhere_are_found_by_images(tmp_path):
    write_database(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "there/metadata-train.parquet").rename(tmp_path / "here/metadata-train.parquet")
    _, found = from_database(tmp_path / "here", images=tmp_path / "there")
    assert all(isinstance(image, bytes) for entry in found for image in entry.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"image_path": "../" + row["image_path"]}, "prompt 000-train, image_path 0: .* leaves"),
        (lambda row: row | {"image_amount_in_total": 2}, "prompt 000-train has 3 images, and image_amount_in_total is 2"),
        (lambda row: row | {"rank": None}, "prompt 000-train, rank 0 is missing"),
        (lambda row: row | {"prompt": row["image_path"]}, "prompt 000-train has several prompts"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, change, message):
    write_database(tmp_path, prompts=1)
    rows = pq.read_table(tmp_path / "metadata-train.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([change(row) for row in rows]), tmp_path / "metadata-train.parquet")
    with pytest.raises(UserError, match=f"metadata-train.parquet {message}"):
        from_database(tmp_path)


def test_a_broken_archive_and_a_foreign_table_are_named(tmp_path):
    write_database(tmp_path)
    (tmp_path / "images/train/train_1.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"train_1\.zip cannot be read as a zip archive .* download it again"):
        from_database(tmp_path)
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "metadata-train.parquet")
    with pytest.raises(UserError, match=r"metadata-train\.parquet has no column 'prompt_id'"):
        from_database(tmp_path)


def test_a_row_of_one_image_asks_for_the_folder(tmp_path):
    with pytest.raises(UserError, match="row of one image; give the folder of the download"):
        read(imagereward, image_row(), tmp_path)


def test_the_test_list_has_its_known_labels(tmp_path):
    found = read(imagereward, ranking_row(), tmp_path)
    assert [labels(entry)[0] for entry in found] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]  # ranks 1 2 5 3
    assert found[5].key == "005658-0040-2-3" and found[5].source == {"prompt_id": "005658-0040", "rank_0": 5.0, "rank_1": 3.0}
    assert found[0].images[0] == tmp_path / "part-005658/images/0040/g0.webp"
    other = tmp_path / "data"
    (other / "test_images").mkdir(parents=True)
    assert read(imagereward, ranking_row(), other)[0].images[0] == other / "test_images/part-005658/images/0040/g0.webp"
    with pytest.raises(UserError, match="must be lists of one length"):
        read(imagereward, ranking_row() | {"ranking": [1, 2]}, tmp_path)
