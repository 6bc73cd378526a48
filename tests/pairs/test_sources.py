"""Row sources: the rows of every layout, from any row on, in the order of the files; what is not one is refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import image_source
from dedpo_diffusion.pairs.formats.sources import hub, open_file, open_source
from dedpo_diffusion.pairs.formats.sources.hub import HubSource
from dedpo_diffusion.pairs.formats.sources.texts import CsvSource
from support.layouts import (
    LAYOUTS,
    PICTURES,
    add_to_tar,
    dataset_of,
    records,
    save_csv,
    save_dataset_dict,
    save_imagefolder,
    save_parquet,
    save_parquet_folder,
    settings,
    write,
)
from support.pictures import picture

COUNT = 38  # more than one batch


def plain(row: dict, folder) -> dict:
    """A row with its images as bytes and everything else as text, whatever layout it comes from."""
    found = {}
    for name, value in row.items():
        if name == "__key__":
            continue
        name = name.removesuffix(".txt").removesuffix(".png")
        if name.startswith("image_"):
            image = image_source(value, folder, name)
            found[name] = image if isinstance(image, bytes) else image.read_bytes()
        else:
            found[name] = value.decode() if isinstance(value, bytes) else "" if value is None else str(value)
    return found


def refusal(source, **changes) -> str:
    with pytest.raises(UserError) as caught:
        list(open_source(str(source), settings(source, **changes)).rows())
    return str(caught.value)


# ---- every layout


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {layout: write(layout, folder / layout, records(COUNT)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows_in_the_same_order(layouts, layout):
    source = open_source(str(layouts[layout]), settings(layouts[layout]))
    assert source.kind == LAYOUTS[layout][0] and source.path == str(layouts[layout])
    assert source.count in (None, COUNT)
    rows = list(source.rows())
    assert [plain(row, folder) for _, row, folder in rows] == [plain(row, None) for row in records(COUNT)]
    assert all(tuple(row) == source.columns for _, row, _ in rows)
    assert len({where for where, _, _ in rows}) == COUNT
    assert source.first() == rows[0][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_any_row_on_the_rest_is_the_same(layouts, layout):
    source = open_source(str(layouts[layout]), settings(layouts[layout]))
    rows = list(source.rows())
    for start in range(COUNT + 2):
        assert list(source.rows(start)) == rows[start:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fingerprint_follows_the_files_and_not_where_they_lie(layouts, layout, tmp_path):
    def mark(source):
        return open_source(str(source), settings(source)).fingerprint

    copy = write(layout, tmp_path / "other", records(COUNT))
    if LAYOUTS[layout][0] != "datasets":  # which writes a random name of its own
        assert mark(copy) == mark(layouts[layout])
    assert mark(write(layout, tmp_path / "longer", records(COUNT + 12))) != mark(layouts[layout])


@pytest.mark.parametrize("layout", ["csv", "jsonl", "json", "imagefolder"])
def test_a_changed_label_of_the_same_length_changes_a_text_tables_fingerprint(layout, tmp_path):
    rows = records(4)
    marks = []
    for label in (0.0, 1.0):
        rows[0]["label_0"] = label
        source = write(layout, tmp_path / str(label), rows)
        marks.append(open_source(str(source), settings(source)).fingerprint)
    assert marks[0] != marks[1]


@pytest.mark.parametrize("layout", ["csv", "jsonl", "json", "imagefolder", "parquet"])
def test_a_folder_of_images_can_be_given(layouts, layout, tmp_path):
    source = layouts[layout]
    assert {folder for _, _, folder in open_source(str(source), settings(source, images=tmp_path)).rows()} == {tmp_path}
    assert "is no folder" in refusal(source, images=tmp_path / "nowhere")


# ---- parquet


@trials(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), group=st.integers(1, 5))
def test_parquet_from_any_row_on_however_the_rows_are_cut(tmp_path_factory, data, sizes, group):
    folder = tmp_path_factory.mktemp("cut")
    for k, size in enumerate(sizes):
        table = pa.table({"number": pa.array([sum(sizes[:k]) + i for i in range(size)], pa.int64())})
        pq.write_table(table, folder / f"{k}.parquet", row_group_size=group)
    start = data.draw(st.integers(0, sum(sizes) + 2))
    source = open_source(str(folder), settings(folder))
    assert [row["number"] for _, row, _ in source.rows(start)] == list(range(start, sum(sizes)))
    assert source.count == sum(sizes)


def test_parquet_rows_are_counted_in_each_file(tmp_path):
    folder = save_parquet_folder(tmp_path, records(9))
    places = [where for where, _, _ in open_source(str(folder), settings(folder)).rows()]
    assert places[2:5] == [
        str(folder / "data" / name)
        for name in ("train-00000-of-00003.parquet row 2", "train-00001-of-00003.parquet row 0", "train-00001-of-00003.parquet row 1")
    ]


def test_row_groups_before_the_start_are_not_read(tmp_path):
    path = save_parquet(tmp_path / "pairs.parquet", records(21), row_group=7)
    rows = list(open_file(path).rows())
    end = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[4:end] = b"\xff" * (end - 4)
    path.write_bytes(content)
    assert list(open_file(path).rows(7)) == rows[7:]
    assert "is damaged behind row 0" in refusal(path)


def test_reading_parquet_holds_a_few_rows_in_memory(tmp_path):
    images = pa.array([os.urandom(100_000) for _ in range(256)], pa.binary())
    table = pa.table({"image_0": images, "image_1": images})
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=256, write_batch_size=4, use_dictionary=False)
    total, peak = table.nbytes, 0
    del images, table
    source, before = open_file(tmp_path / "large.parquet"), pa.total_allocated_bytes()
    for _ in source.rows():
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < total / 3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": ["x"]}, "b.parquet has no column 'seed', and"),
        ({"prompt": ["x"], "seed": [1], "more": [1]}, "b.parquet has a column 'more', and"),
    ],
)
def test_all_headers_are_compared_before_a_row_is_read(tmp_path, columns, words):
    pq.write_table(pa.table({"prompt": ["x"], "seed": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=words):
        open_source(str(tmp_path), settings(tmp_path))


def test_hidden_files_of_a_download_are_passed_over(tmp_path):
    save_parquet_folder(tmp_path, records(6))
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "train-00000-of-00003.parquet").write_text("half a download")
    (tmp_path / "data" / "._train.parquet").write_text("what another system leaves")
    assert open_source(str(tmp_path), settings(tmp_path)).count == 6


# ---- splits


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/validation_unique-00000-of-00001-0a1b.parquet"),
        ("train/0000.parquet", "validation_unique/0000.parquet"),
        ("default/train/0000.parquet", "default/validation_unique/0000.parquet"),
        ("train.parquet", "validation_unique.parquet"),
        ("train-0.parquet", "validation_unique-0.parquet"),
    ],
)
def test_one_split_of_several_is_chosen_by_its_files_names(tmp_path, names):
    for k, name in enumerate(names):
        save_parquet(tmp_path / name, records(3 + k))
    assert open_source(str(tmp_path), settings(tmp_path, split="train")).count == 3
    assert open_source(str(tmp_path), settings(tmp_path, split="validation_unique")).count == 4
    assert "has several splits (train, validation_unique); say which with --split" in refusal(tmp_path)
    assert "has no split 'test' (it has train, validation_unique)" in refusal(tmp_path, split="test")


def test_a_split_is_not_mistaken_for_one_whose_name_begins_alike(tmp_path):
    save_parquet(tmp_path / "test-00000-of-00001.parquet", records(3))
    save_parquet(tmp_path / "test_unique-00000-of-00001.parquet", records(4))
    assert open_source(str(tmp_path), settings(tmp_path, split="test")).count == 3


def test_files_without_splits_are_one_source_and_a_split_is_refused(tmp_path):
    for k in range(2):
        save_parquet(tmp_path / f"part-{k}.parquet", records(3))
    assert open_source(str(tmp_path), settings(tmp_path)).count == 6
    assert "leave out --split" in refusal(tmp_path, split="train")
    assert "is one file, which has no splits" in refusal(tmp_path / "part-0.parquet", split="train")


def test_splits_of_saved_datasets(tmp_path):
    from datasets import DatasetDict

    DatasetDict({"train": dataset_of(records(3)), "test": dataset_of(records(4))}).save_to_disk(str(tmp_path / "two"))
    source = open_source(str(tmp_path / "two"), settings(tmp_path, split="test"))
    assert source.count == 4 and next(source.rows(1))[0] == f"{tmp_path / 'two'} split test row 1"
    assert "has several splits (train, test)" in refusal(tmp_path / "two")
    assert "has no split 'dev' (it has train, test)" in refusal(tmp_path / "two", split="dev")
    dataset_of(records(3)).save_to_disk(str(tmp_path / "one"))
    assert "has no splits; leave out --split" in refusal(tmp_path / "one", split="train")


def test_splits_of_image_folders_and_of_tables(tmp_path):
    for k, split in enumerate(("train", "test")):
        save_imagefolder(tmp_path / "images" / split, records(3 + k))
        save_csv(tmp_path / f"{split}.csv", records(3 + k))
    assert open_source(str(tmp_path / "images"), settings(tmp_path, split="test")).count == 4
    assert "several splits (test, train)" in refusal(tmp_path / "images")
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").rename(tmp_path / "tables" / f"{split}.csv")
    source = open_source(str(tmp_path / "tables"), settings(tmp_path, split="test"))
    assert len([*source.rows()]) == 4
    assert "holds several tables (test.csv, train.csv); give one of them" in refusal(tmp_path / "tables")


# ---- text files


def test_text_files_tell_lines_and_json_tells_rows(tmp_path):
    (tmp_path / "t.csv").write_text('prompt,seed\n"two\nlines",1\n\nlast,2\n')
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    (tmp_path / "t.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    places = {
        name: [where.split(name, 1)[1] for where, _, _ in open_file(tmp_path / name).rows()] for name in ("t.csv", "t.jsonl", "t.json")
    }
    assert places == {"t.csv": [" line 2", " line 5"], "t.jsonl": [" line 1", " line 3"], "t.json": [" row 0", " row 1"]}


def test_a_key_that_only_later_rows_have_is_a_column(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "winner": 1}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("t.json", "t.jsonl"):
        source = open_file(tmp_path / name)
        assert source.columns == ("prompt", "winner") and source.count == 2
        assert [row for _, row, _ in source.rows()] == [{"prompt": "a", "winner": None}, {"prompt": "b", "winner": 1}]


def test_an_index_column_without_a_name_gets_one(tmp_path):
    (tmp_path / "t.csv").write_text(",prompt\n0,a\n")
    assert [row for _, row, _ in open_file(tmp_path / "t.csv").rows()] == [{"column_0": "0", "prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt,seed\na,1\nb\n", "a.csv line 3 has 1 values, and the header names 2 columns"),
        ("a.csv", b"prompt,seed\na,1,2\n", "a.csv line 2 has 3 values"),
        ("a.csv", b'prompt,seed\n"a"b,1\n', "a.csv line 2 cannot be read"),
        ("a.csv", b'prompt,seed\na,1\n"never closed,2\n', "a.csv line 3 cannot be read"),
        ("a.csv", b"prompt,prompt\na,1\n", "two columns named 'prompt'"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"prompt;seed\na;1\n", "semicolons between its columns, and needs commas"),
        ("a.tsv", b"prompt,seed\na,1\n", "commas between its columns, and needs tabs"),
        ("a.csv", "prompt,seed\nä,1\n".encode("latin-1"), "a.csv is not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "a.jsonl line 2 is list, and must be an object"),
        ("a.jsonl", "{}\n{\"prompt\": \"ä\"}\n".encode("latin-1"), "a.jsonl is not UTF-8 text"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "name it .jsonl if each line is an object"),
        ("a.json", b"[" * 100_000, "a.json is no JSON (maximum recursion depth exceeded"),
        ("a.jsonl", b'{"prompt": "\\ud83d\\ude00"}\n{"prompt": "\\ud83d"}', "a.jsonl line 2 holds half a character"),
        ("a.json", b'[{"prompt": "a"}, 3]', "a.json row 1 is int"),
        ("a.json", b'{"train": [], "test": []}', "an object with 2 lists (train, test)"),
        ("a.json", b'{"prompt": {"0": "a"}}', "an object with 0 lists (prompt)"),
        ("a.json", b'"text"', "holds str, and must hold a list of objects"),
        ("a.parquet", b"hello", "a.parquet cannot be read as parquet"),
        ("a.tar", b"hello", "a.tar cannot be read as a tar archive"),
        ("a.xlsx", b"hello", "an ending of no known kind; give a file named .parquet, .json"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_line_and_the_remedy(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert words in said and str(tmp_path / name) in said


def test_a_ragged_line_behind_the_start_is_found_and_one_before_it_is_not_read_again(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,seed\nbroken\nb,2\n")
    source = CsvSource("a", tmp_path / "a.csv", None)
    assert [row["seed"] for _, row, _ in source.rows(1)] == ["2"]


# ---- webdataset


def tar(path, files):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files:
            add_to_tar(archive, name, data)
    return path


def test_samples_are_grouped_by_name_up_to_the_first_dot(tmp_path):
    files = [("d/1.jpg_0.jpg", b"a"), ("d/1.label_0.txt", b"1"), ("d/2.jpg_0.jpg", b"b"), ("d/2.label_0.txt", b"0")]
    expected = [{"__key__": "d/1", "jpg_0.jpg": b"a", "label_0.txt": b"1"}, {"__key__": "d/2", "jpg_0.jpg": b"b", "label_0.txt": b"0"}]
    for name in ("t.tar", "t.tar.gz"):
        assert [row for _, row, _ in open_file(tar(tmp_path / name, files)).rows()] == expected


def test_folders_and_files_hidden_in_an_archive_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("./d/._1.txt", "./d/1.txt", "./d/.hidden/2.txt", "./d/1.jpg"):
            add_to_tar(archive, name, b"x")
    assert [row for _, row, _ in open_file(tmp_path / "t.tar").rows()] == [{"__key__": "d/1", "txt": b"x", "jpg": b"x"}]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("1.txt", b""), ("2.txt", b""), ("1.jpg", b"")], "the files of sample '1' do not stand side by side"),
        ([("1.txt", b""), ("1.txt", b"")], "sample '1' has two files 'txt'"),
        ([("1.txt", b""), ("README", b"")], "README belongs to no sample"),
        ([(".hidden.txt", b"")], "holds no sample"),
    ],
)
def test_an_archive_that_is_no_webdataset_is_refused(tmp_path, files, words):
    assert words in refusal(tar(tmp_path / "t.tar", files))


def test_links_and_cut_off_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert "1.txt is a link or a device" in refusal(tmp_path / "t.tar")
    whole = tar(tmp_path / "c.tar", [(f"{k}.txt", bytes(2000)) for k in range(9)])
    whole.write_bytes(whole.read_bytes()[:6000])
    assert "c.tar is damaged" in refusal(whole)


# ---- image folders


def test_an_image_folders_table_can_be_given_itself(tmp_path):
    folder = save_imagefolder(tmp_path / "f", records(3))
    given, own = (list(open_source(str(path), settings(path)).rows()) for path in (folder, folder / "metadata.jsonl"))
    assert given == own and "image_0" in given[0][1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "a.png", "prompt": "a"}, "a pair needs two images ('file_name' names one image only)"),
        ({"image_0_file_name": "a.png", "image_0": "b.png"}, "both a column 'image_0' and a column 'image_0_file_name'"),
    ],
)
def test_an_image_folder_of_single_images_is_refused(tmp_path, row, words):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert words in refusal(tmp_path)


def test_metadata_tables_with_different_columns_are_refused(tmp_path):
    save_imagefolder(tmp_path / "a", records(2))
    save_imagefolder(tmp_path / "b", [row | {"more": 1} for row in records(2)])
    assert "have different columns (more)" in refusal(tmp_path)
    save_imagefolder(tmp_path / "b", records(2), "csv")
    assert "are of different kinds" in refusal(tmp_path)


# ---- saved by datasets, and streamed from the hub


def test_saved_images_come_as_they_were_stored(tmp_path):
    rows = records(3)
    source = open_source(str(save_dataset_dict(tmp_path / "saved", rows)), settings(tmp_path))
    assert [row["image_0"] for _, row, _ in source.rows()] == [{"bytes": row["image_0"], "path": None} for row in rows]


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    save_dataset_dict(tmp_path / "saved", records(3))
    next((tmp_path / "saved" / "train").glob("*.arrow")).write_bytes(b"hello")
    assert "cannot be loaded by `datasets`" in refusal(tmp_path / "saved")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A dataset repository as the hub has it: two splits of parquet with images."""
    folder = tmp_path_factory.mktemp("repository")
    for split, count in (("train", COUNT), ("test", 5)):
        dataset_of(records(count)).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"), batch_size=8)
    return folder


def test_a_streamed_dataset_gives_its_rows_undecoded_and_from_any_row_on(repository):
    source = HubSource(str(repository), "train", None)
    rows = list(source.rows())
    assert [plain(row, folder) for _, row, folder in rows] == [plain(row, None) for row in records(COUNT)]
    assert rows[9][0] == f"{repository} split train row 9" and source.columns == tuple(records(1)[0])
    for start in (0, 1, 7, 8, 9, 31, 32, 33, COUNT - 1, COUNT, COUNT + 1):
        assert list(source.rows(start)) == rows[start:]
    assert source.fingerprint == HubSource(str(repository), "train", None).fingerprint
    assert source.fingerprint != HubSource(str(repository), "test", None).fingerprint


def test_a_streamed_dataset_of_several_splits_needs_a_choice(repository):
    with pytest.raises(UserError, match=r"has several splits \(train, test\); say which with --split"):
        HubSource(str(repository), None, None)
    with pytest.raises(UserError, match=r"has no split 'dev' \(it has train, test\)"):
        HubSource(str(repository), "dev", None)


def test_a_streamed_dataset_of_image_files_gives_them(tmp_path):
    save_imagefolder(tmp_path / "train", records(4))
    rows = list(HubSource(str(tmp_path), None, tmp_path).rows())
    assert [plain(row, folder)["image_1"] for _, row, folder in rows] == [row["image_1"] for row in records(4)]


def test_images_in_files_of_the_hub_are_fetched_and_other_addresses_are_not_followed(monkeypatch):
    import fsspec

    monkeypatch.setattr(hub, "FETCHED", "memory://")  # a store without a network
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(PICTURES[0])
    there, elsewhere = ({"bytes": None, "path": path} for path in ("memory://pictures/a.png", "http://example.invalid/a.png"))
    found = hub._fetched({"images": [there], "address": "memory://pictures/a.png", "other": elsewhere})
    assert found == {"images": [there | {"bytes": PICTURES[0]}], "address": "memory://pictures/a.png", "other": elsewhere}


def test_a_dataset_that_needs_a_program_is_refused_and_its_program_is_not_run(tmp_path):
    (tmp_path / "tricky").mkdir()
    (tmp_path / "tricky" / "tricky.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"needs a program of its own .* which is never run here; download it"):
        HubSource(str(tmp_path / "tricky"), None, None)
    assert not (tmp_path / "ran").exists()


def test_a_dataset_of_several_tables_is_refused(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: a.csv\n- config_name: second\n  data_files: b.csv\n---\n"
    )
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("prompt\nx\n")
    with pytest.raises(UserError, match=r"holds several tables .*first.*second.*give the folder of one of them"):
        HubSource(str(tmp_path), None, None)


def test_without_the_hub_an_id_is_refused_at_once(tmp_path):
    command = [sys.executable, "-c", "import sys; from dedpo_diffusion.pipelines import main; sys.exit(main())"]
    command += ["ingest", "auto", "owner/some-pairs", "--out", str(tmp_path / "pairs")]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "owner/some-pairs is no file or folder here, and as a hub dataset it cannot be reached" in done.stderr
    assert "hf download" in done.stderr and "Traceback" not in done.stderr


# ---- what is no source


def test_what_is_no_source_is_refused_without_asking_the_hub(tmp_path):
    assert refusal("pairs/train.csv") == "there is no file pairs/train.csv; give the location of the data"
    (tmp_path / "labelled.csv").write_text("prompt,chosen,rejected")
    assert refusal(tmp_path / "labeled.csv") == f"there is no file {tmp_path}/labeled.csv; did you mean {tmp_path}/labelled.csv?"
    (tmp_path / "labelled.csv").unlink()
    assert "is no file, no folder and no hub id" in refusal("./nowhere")
    assert "is no file, no folder and no hub id" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    assert "holds no table" in refusal(tmp_path)
    save_parquet(tmp_path / "a.parquet", records(2))
    tar(tmp_path / "a.tar", [("1.png", picture(0))])
    assert "holds parquet files (a.parquet, ...) and tar files (a.tar, ...); give one kind" in refusal(tmp_path)
