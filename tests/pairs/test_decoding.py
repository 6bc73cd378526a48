"""Image bytes to RGB, by stated rules: every hostile kind is converted or refused, with its row named."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs import decoding
from dedpo_diffusion.pairs.decoding import decode_image, read_header


def picture(colour, fmt="JPEG", size=16, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, fmt)
    return buffer.getvalue()


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_images_decode_to_rgb(fmt):
    image = decode_image(picture("red", fmt), "here")
    assert image.mode == "RGB" and image.size == (16, 16)
    assert np.abs(np.asarray(image)[8, 8].astype(int) - [255, 0, 0]).max() <= 4


def test_grey_images_become_rgb():
    assert decode_image(picture(128, "PNG", mode="L"), "here").mode == "RGB"


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("padding", [False, True])
def test_truncated_images_are_refused_even_if_pillow_is_told_to_pad_them(fmt, padding, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, fmt)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", padding)
    for share in (0.0, 0.02, 0.5, 0.9):
        with pytest.raises(UserError, match=r"^pairs-00003.parquet row 7, image_1: the image cannot be decoded.*leave its pair out"):
            decode_image(buffer.getvalue()[: int(len(buffer.getvalue()) * share)], "pairs-00003.parquet row 7, image_1")
    assert padding is ImageFile.LOAD_TRUNCATED_IMAGES
    assert np.asarray(decode_image(buffer.getvalue(), "whole")).shape == (64, 64, 3)


# ---- hostile and odd files


def saved(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that claims 20000 x 20000 pixels."""
    data = bytearray(picture("red", "PNG"))
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def animated(fmt):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return saved(frames[0], fmt, save_all=True, append_images=frames[1:], duration=100)


REFUSED = {
    "bomb": (bomb(), "400000000 pixels"),
    "zero bytes": (b"", "the file is empty"),
    "text": (b"<html>not found</html>", "it is no image file"),
    "animated gif": (animated("GIF"), "animated"),
    "animated webp": (animated("WEBP"), "animated"),
    "animated png": (animated("PNG"), "animated"),
    "pages": (animated("TIFF"), "several pages"),
    "floats": (saved(Image.new("F", (16, 16), 0.5), "TIFF"), "32-bit values"),
    "integers": (saved(Image.new("I", (16, 16), 5), "TIFF"), "32-bit values"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("read", [decode_image, read_header])
def test_what_is_refused_is_refused_by_its_header_and_named(kind, read):
    data, words = REFUSED[kind]
    with pytest.raises(UserError, match=words) as error:
        read(data, "pairs-00000.parquet row 3, image_1")
    assert str(error.value).startswith("pairs-00000.parquet row 3, image_1: the image cannot be decoded")


def test_a_bomb_is_refused_whatever_pillow_was_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match="20000 x 20000"):
        decode_image(bomb(), "here")


def test_the_limit_on_pixels_is_exact(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 256)
    assert decode_image(picture("red", "PNG"), "here").size == (16, 16)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 255)
    with pytest.raises(UserError, match="16 x 16 pixels are more than the 255 allowed"):
        decode_image(picture("red", "PNG"), "here")


def colour(data):
    """The middle pixel."""
    return np.asarray(decode_image(data, "here"))[8, 8].tolist()


def test_cmyk_becomes_rgb():
    assert colour(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF")) == [255, 0, 0]
    assert np.abs(np.subtract(colour(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)), [255, 0, 0])).max() <= 6


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16))
    assert colour(saved(ramp, "PNG")) == [128] * 3 and colour(saved(ramp, "TIFF")) == [128] * 3
    assert colour(saved(Image.fromarray(np.full((16, 16), 0xFFFF, dtype=np.uint16)), "PNG")) == [255] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_what_is_transparent_lies_on_white(mode):
    if mode == "P":  # one entry of the palette is transparent
        image = Image.new("P", (16, 16), 1)
        image.putpalette([0, 0, 0, 200, 30, 30])
        data = saved(image, "PNG", transparency=1)
    elif mode in ("L", "RGB"):  # one colour is transparent
        image = Image.new(mode, (16, 16), 7 if mode == "L" else (7, 7, 7))
        data = saved(image, "PNG", transparency=7 if mode == "L" else (7, 7, 7))
    else:
        image = Image.new("RGBA", (16, 16), (200, 30, 30, 0))
        data = saved(image.convert("P") if mode == "PA" else image.convert(mode), "PNG")
    assert colour(data) == [255] * 3


def test_half_transparent_is_half_white():
    assert np.abs(np.subtract(colour(saved(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG")), 127)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_and_the_header_says_so(orientation):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 8, 8))  # the upper left corner is red
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the stored picture of the upright one
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, "PNG", exif=exif)
    found = decode_image(data, "here")
    assert found.size == (24, 16) and found.getpixel((2, 2)) == (255, 0, 0) and found.getpixel((20, 12)) == (255, 255, 255)
    header = read_header(data, "here")
    assert (header.format, header.width, header.height, header.mode) == ("PNG", 24, 16, "RGB")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF"])
def test_a_header_is_read_without_a_pixel_and_from_a_file_too(fmt, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(saved(Image.new("RGB", (24, 16), "red"), fmt))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
    headers = [read_header(source, "here") for source in ((tmp_path / "x").read_bytes(), tmp_path / "x")]
    assert headers[0] == headers[1] and (headers[0].format, headers[0].width, headers[0].height) == (fmt, 24, 16)


def test_a_phones_jpeg_with_a_preview_behind_it_is_its_first_picture():
    first, preview = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 8), "blue")
    data = saved(first, "MPO", save_all=True, append_images=[preview])
    found = decode_image(data, "here")
    assert found.size == (16, 16) and np.abs(np.subtract(found.getpixel((8, 8)), (254, 0, 0))).max() <= 4


@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.integers(0, 2**32 - 1), st.sampled_from([decode_image, read_header])
)
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_decoded_or_refused_and_never_crash(fmt, seed, read):
    rng = np.random.default_rng(seed)
    data = bytearray(picture("red", fmt))
    for place in rng.integers(0, len(data), 4):
        data[place] = rng.integers(256)
    with suppress(UserError):
        read(bytes(data), "here")
