"""Image bytes to RGB, by stated rules: every hostile kind is converted or refused, with its row named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from dedpo_diffusion.console import UserError
from dedpo_diffusion.decoding import decode_image


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
