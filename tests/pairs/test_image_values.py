"""An image as tables hold it: every certain form gives the same file, and of all else it is said what it is and where it stands."""

from __future__ import annotations

import base64
import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.image_values import Unreadable, image_source
from dedpo_diffusion.pipelines.ingest import main
from support.pictures import picture


def encoded(format):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(data, format)
    return data.getvalue()


def as_base64(data):
    return base64.b64encode(data).decode()


FORMS = {
    "bytes": lambda data: data,
    "struct": lambda data: {"bytes": data, "path": None},
    "data URI": lambda data: "data:image/png;base64," + as_base64(data),
    "data URI in bytes": lambda data: b"data:image/png;base64," + base64.b64encode(data),
    "data URI with blanks around it": lambda data: " data:image/jpeg;base64," + as_base64(data) + "\n",
    "data URI, percents": lambda data: "data:image/png," + "".join(f"%{byte:02X}" for byte in data),
    "base64": as_base64,
    "base64 in bytes": base64.b64encode,
    "base64 in lines": lambda data: base64.encodebytes(data).decode(),
    "base64 for addresses, without its end": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "datasets.to_csv": lambda data: str({"bytes": data, "path": None}),
    "datasets.to_csv, with a name": lambda data: str({"bytes": data, "path": "a.png"}),
    "JSON of a struct": lambda data: json.dumps({"bytes": as_base64(data), "path": None}),
    "pandas.to_csv of bytes": str,
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_files_own_bytes(form, format, tmp_path):
    data = encoded(format)
    assert image_source(FORMS[form](data), tmp_path, "row 0, image_0") == data


@trials(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=300).filter(lambda data: data[:5] != b"data:"))  # no image begins so, and a data URI does
def test_a_data_uri_and_the_words_of_datasets_give_any_bytes_back(tmp_path_factory, data):
    for form in ("data URI", "data URI, percents", "datasets.to_csv"):
        assert image_source(FORMS[form](data), None, "row 0") == data


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("a.png", "a.png"),
        ("sub/a.png", "sub/a.png"),
        ("sub\\a.png", "sub/a.png"),
        (".\\sub\\deeper\\a.png", "sub/deeper/a.png"),
        (str({"bytes": None, "path": "sub/a.png"}), "sub/a.png"),
        ('{"path": "sub/a.png", "bytes": null}', "sub/a.png"),
        ("iVBORw0KGgo", "iVBORw0KGgo"),  # a short name that base64 could be
        ("A" * 90, "A" * 90),  # base64 of no image
        ("{a}.png", "{a}.png"),
    ],
)
def test_paths_of_this_and_other_systems_lie_below_the_folder(value, path, tmp_path):
    assert image_source(value, tmp_path, "row 0") == tmp_path / path


def test_absolute_paths_come_from_addresses_of_files_and_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (f"{tmp_path}/a b.png", f"file://{tmp_path}/a%20b.png", f"file://localhost{tmp_path}/a%20b.png", "~/a b.png"):
        assert image_source(value, tmp_path / "elsewhere", "row 0") == tmp_path / "a b.png"


def test_a_name_with_a_backslash_is_left_alone_where_there_is_such_a_file(tmp_path):
    (tmp_path / "a\\b.png").write_bytes(picture(0))
    assert image_source("a\\b.png", tmp_path, "row 0") == tmp_path / "a\\b.png"


@pytest.mark.parametrize("value", ["..\\secret.png", "a\\..\\..\\secret.png", "../secret.png"])
def test_no_path_leaves_the_folder(value, tmp_path):
    with pytest.raises(UserError, match=r"row 0: .* leaves .*; give --images the folder"):
        image_source(value, tmp_path, "row 0")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a\0.png", "holds a NUL character"),
        ("a\ud83d.png", "holds half a character"),
        ("C:\\Users\\ann\\a.png", "is a path of Windows"),
        ("d:/pictures/a.png", "is a path of Windows"),
        ("\\\\server\\share\\a.png", "is a path of Windows"),
        ("file:///C:/pictures/a.png", "is a path of Windows"),
        ("file://server/share/a.png", "is on another machine"),
        ("data:image/png;base64", "is a data URI without data"),
        ("data:image/png;base64,iVBO*", "base64 is damaged or cut off"),
        ("{'bytes': b'\\x89PNG", "is cut off"),
        ("b'\\x89PNG", "is cut off"),
        ("<PIL.PngImagePlugin.PngImageFile image mode=RGB size=64x64 at 0x7F51>", "is what Python prints of a picture"),
        ("x" * 5000, "neither a path nor an image"),
    ],
)
def test_what_is_no_image_is_said_in_a_short_line(value, words, tmp_path):
    found = image_source(value, tmp_path, "row 0")
    assert isinstance(found, Unreadable) and words in found.why and len(found.why) < 300


def rows_of(folder, value, name):
    """A table of two pairs, of which the second's image_1 is this value."""
    for k in range(2):
        (folder / f"{k}.png").write_bytes(picture(k))
    rows = [["prompt", "image_0", "image_1", "label_0"], ["a fox", "0.png", "1.png", "1"], ["an owl", "1.png", value, "0"]]
    if name.endswith(".jsonl"):
        (folder / name).write_text("\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]))
    else:
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder / name


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
@pytest.mark.parametrize(
    "value", ["a\0.png", "C:\\a.png", "data:image/png;base64,iVBO", "Zm94" * 3000], ids=["NUL", "drive", "cut off", "long"]
)
def test_an_image_that_is_none_names_row_and_column_and_can_be_skipped(tmp_path, capsys, value, name):
    table = rows_of(tmp_path, value, name)
    where = f"{table} line {3 if name == 't.csv' else 2}, image 1"
    assert main(["table", str(table), "--out", str(tmp_path / "P")]) == 2
    said = capsys.readouterr().err
    assert where in said and "or leave its pair out with --unreadable skip" in said and len(said) < 600
    assert not (tmp_path / "P").exists()
    assert main(["table", str(table), "--out", str(tmp_path / "P"), "--unreadable", "skip"]) == 0
    said = capsys.readouterr().out
    assert "comparisons with an unreadable image: 1 dropped" in said and f"  {where}" in said and "pairs kept: 1" in said


@pytest.mark.parametrize("form", ["data URI", "base64", "datasets.to_csv", "pandas.to_csv of bytes"])
def test_a_csv_of_large_pictures_arrives_as_they_are(tmp_path, form):
    import numpy as np

    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(data, "PNG")
    table = rows_of(tmp_path, FORMS[form](data.getvalue()), "t.csv")
    assert main(["auto", str(table), "--out", str(tmp_path / "P")]) == 0
    assert pq.read_table(tmp_path / "P" / "pairs").to_pylist()[1]["image_1"] == data.getvalue()
