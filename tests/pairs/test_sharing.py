"""What of a pair others may get: the picture but not its metadata, numbers for people, no path, no machine."""

from __future__ import annotations

import io
import platform
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pairs.exporting.bare_images import ORIENTATION, without_metadata
from dedpo_diffusion.pairs.exporting.rows import Item
from dedpo_diffusion.pairs.exporting.sharing import Sharing, card, left_out, told_of_people
from dedpo_diffusion.pairs.formats.comparison import Answer
from dedpo_diffusion.settings import PairsSettings
from support.pictures import picture

SETTINGS = PairsSettings("push", Path("pairs"), "ann/pairs")
SECRET = "C:\\Users\\ann\\cats"
PRIVATE = {0x010F: f"camera of {SECRET}", 0x013C: "anns-laptop", 0x8298: "Ann A."}  # maker, host computer, copyright
KINDS = ("PNG", "JPEG", "WEBP")


def told(
    kind: str, orientation: int, *, size: tuple[int, int] = (24, 16), exif: bool = True, text: bool = True, **options: object
) -> bytes:
    """A random picture of which much is told."""
    pixels = np.random.default_rng(size[0] + orientation).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    held, buffer = Image.Exif(), io.BytesIO()
    held.update({**PRIVATE, ORIENTATION: orientation})
    held[0x8825] = {1: "N"}  # a place
    if exif:
        options["exif"] = held
    if text and kind == "PNG":
        notes = PngInfo()
        notes.add_text("parameters", SECRET)
        notes.add_itxt("XML:com.adobe.xmp", SECRET, zip=True)
        options["pnginfo"] = notes
    elif text:
        options |= {"xmp": SECRET.encode()} | ({"comment": SECRET.encode()} if kind == "JPEG" else {})
    Image.fromarray(pixels).save(buffer, kind, icc_profile=b"profile" * 9, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"exif": False}, {"text": False}], ids=["all", "no exif", "no text"])
def test_metadata_go_and_the_picture_stays(kind, orientation, options):
    data = told(kind, orientation if options.get("exif", True) else 1, **options)
    bare = without_metadata(data)
    assert bare != data
    for word in (SECRET, "anns-laptop", "Ann A."):
        assert word.encode() not in bare
    assert np.array_equal(np.asarray(decode_image(bare, "bare")), np.asarray(decode_image(data, "told")))
    with Image.open(io.BytesIO(bare)) as image:
        image.load()
        assert image.info["icc_profile"] == b"profile" * 9
        assert set(image.getexif()) <= {ORIENTATION} and not image.getexif().get_ifd(0x8825)
    assert without_metadata(bare) == bare


@pytest.mark.parametrize("options", [{"progressive": True, "quality": 95}, {"optimize": True, "quality": 20}, {"restart_marker_blocks": 1}])
def test_every_kind_of_jpeg(options):
    data = told("JPEG", 6, size=(67, 45), **options)
    bare = without_metadata(data)
    assert np.array_equal(np.asarray(decode_image(bare, "bare")), np.asarray(decode_image(data, "told"))) and SECRET.encode() not in bare


@pytest.mark.parametrize("kind", KINDS)
def test_what_hangs_behind_a_picture_is_left_out(kind):
    """As a phone's preview or a program's archive does; of a WebP the size says where it ends."""
    data = told(kind, 1)
    bare = without_metadata(data + SECRET.encode())
    assert SECRET.encode() not in bare and np.array_equal(np.asarray(decode_image(bare, "")), np.asarray(decode_image(data, "")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_picture_of_which_nothing_is_told_keeps_its_bytes(kind):
    data = picture(3, format=kind)
    assert without_metadata(data) == data


# ---- pairs


def item(number: int, *answers: Answer, prompt: str = "a cat", source: dict | None = None, image: bytes | None = None) -> Item:
    data = image or picture(number)
    return Item(number, Pair(f"p-{number}", prompt, data, picture(number + 1000), source or {}), answers)


NAMES = st.sampled_from(["ann", "bob", "Ünal", "rater-2", None])


@trials(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), NAMES, st.integers(1, 3)), max_size=4), max_size=6))
def test_people_become_numbers_one_to_one(said):
    """Equal names give equal numbers, different names different ones; labels, votes and sides are as they were."""
    given_ = [item(k, *(Answer(*one) for one in answers)) for k, answers in enumerate(said)]
    found = list(Sharing(SETTINGS, []).items(given_))
    pairs = [(a.rater, b.rater) for one, other in zip(given_, found, strict=True) for a, b in zip(one.answers, other.answers, strict=True)]
    names = dict.fromkeys(name for name, _ in pairs if name is not None)
    assert dict(pairs) | {None: None} == {name: f"rater-{k}" for k, name in enumerate(names, 1)} | {None: None}
    for one, other in zip(given_, found, strict=True):
        assert [(a.label_0, a.votes) for a in one.answers] == [(a.label_0, a.votes) for a in other.answers]
        assert other.label_0 == one.label_0 and other.pair == one.pair


@pytest.mark.parametrize(("raters", "expected"), [("numbers", "rater-1"), ("names", "ann"), ("none", None)])
def test_what_becomes_of_people(raters, expected):
    settings = replace(SETTINGS, raters=raters)
    (found,) = Sharing(settings, []).items([item(0, Answer(1.0, "ann"))])
    assert found.answers == (Answer(1.0, expected),)


def test_columns_about_people_stay_here():
    columns = ["category", "user_id", "Annotator", "seed_0", "worker-email", "operator", "model"]
    assert told_of_people(columns) == ["user_id", "Annotator", "worker-email"]
    assert left_out(SETTINGS, columns) == ["user_id", "Annotator", "worker-email"]
    assert left_out(replace(SETTINGS, raters="names", without=["source_seed_0", "model"]), columns) == ["seed_0", "model"]
    with pytest.raises(UserError, match=r"--without nothing: pairs has no such source column \(it has category"):
        left_out(replace(SETTINGS, without=["nothing"]), columns)
    (found,) = Sharing(SETTINGS, ["user_id"]).items([item(0, source={"user_id": "ann", "category": "x"})])
    assert found.pair.source == {"category": "x"}


def test_paths_in_columns_are_cut_and_counted():
    sharing = Sharing(SETTINGS, [])
    (found,) = sharing.items([item(0, source={"model": "/home/ann/models/base", "notes": [1, "see D:\\x\\y.png"], "n": 3})])
    assert found.pair.source["model"] == "base" and found.pair.source["n"] == 3
    assert "D:" not in str(found.pair.source["notes"]) and "y.png" in str(found.pair.source["notes"])
    assert sharing.counts["values with paths cut"] == 2


@pytest.mark.parametrize("prompt", ["as in /home/ann/cats", "made on bench-17", "from D:\\ann\\cats"])
def test_a_prompt_that_tells_of_this_machine_is_refused_by_its_pair(prompt, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "bench-17")
    with pytest.raises(UserError, match=r"pairs: the prompt of pair 'p-5' tells of this machine .*nothing is sent; make the pairs again"):
        list(Sharing(SETTINGS, []).items([item(5, prompt=prompt)]))


def test_a_comment_in_another_format_is_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "GIF", comment=b"/home/ann/cats.gif")
    with pytest.raises(UserError, match=r"image_0 of pair 'p-0', its comment tells of this machine"):
        list(Sharing(SETTINGS, []).items([item(0, image=buffer.getvalue())]))


def test_a_place_in_another_format_is_refused():
    held, buffer = Image.Exif(), io.BytesIO()
    held.get_ifd(0x8825)[1] = "N"
    held[0x8825] = held.get_ifd(0x8825)
    Image.new("RGB", (4, 4)).save(buffer, "TIFF", exif=held)
    with pytest.raises(UserError, match=r"image_0 of pair 'p-0' tells where it was taken .*nothing is sent"):
        list(Sharing(SETTINGS, []).items([item(0, image=buffer.getvalue())]))


def test_chunks_that_nobody_knows_are_left_out_of_a_png():
    """As programs and makers of certificates add them."""
    data = picture(1)
    body = b"caBX" + SECRET.encode()
    told_ = data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    assert without_metadata(told_) == data


def test_the_card_tells_licence_columns_and_counts():
    import yaml

    sharing = Sharing(replace(SETTINGS, license="cc-by-4.0"), [])
    said = [item(0, Answer(1.0, "ann"), Answer(0.0, "bob")), item(1, Answer(0.5, "ann", 2)), item(2, prompt="an owl")]
    assert len(list(sharing.items(said))) == 3
    text = card(sharing.settings, sharing, ["category"])
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-4.0" and head["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    for line in ("| pairs | 3 |", "| different prompts | 2 |", "| pairs with an answer | 2 |", "| single answers | 4 by 2 people |"):
        assert line in text
    assert "`source_category`" in text and "ann " not in text.replace("ann/pairs", "") and "license: unknown" in card(SETTINGS, sharing, [])
