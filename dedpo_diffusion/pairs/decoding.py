"""Image files' bytes -> RGB pictures, by rules that are the same for training, judges and people.

| file | what becomes of it |
|---|---|
| grey, palette, CMYK, YCbCr, Lab | converted to RGB as Pillow does; embedded colour profiles are not applied |
| 16 bits a channel | scaled to 8 bits |
| transparent (RGBA, LA, palette with a transparent entry) | laid on white, as on the vote page |
| EXIF orientation | turned upright, as browsers show it |
| animated (GIF, WebP, APNG), several pages (TIFF) | refused: nobody can say which frame was preferred |
| 32-bit integers or floats | refused: their range is not stated in the file |
| more than MAX_PIXELS | refused before a pixel is decoded |
| truncated, damaged, empty, no image | refused |
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dedpo_diffusion.core.console import UserError

MAX_PIXELS = 1 << 26  # 8192 x 8192: four times what the largest models draw; a decompression bomb claims more
UNREADABLE = (  # what Pillow's readers raise on bad bytes
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
REMEDY = "replace it, or leave its pair out"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's own conversion of these clips everything above 255 to white

_strict_lock = threading.Lock()


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself: its format (PNG, JPEG, ...), upright size in pixels, Pillow mode."""

    format: str
    width: int
    height: int
    mode: str


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Make Pillow refuse truncated files even where another library told it to pad them with grey."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:  # the ordinary case, in which threads need not wait for each other
        yield
        return
    with _strict_lock:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _opened(data: bytes | Path, where: str, remedy: str) -> Iterator[Image.Image]:
    """The file with its header read and its rules checked; whatever goes wrong inside becomes a UserError."""
    try:
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            _check_header(image)
            yield image
    except UNREADABLE as error:
        why = "it is no image file" if isinstance(error, UnidentifiedImageError) else error  # Pillow's words hold a memory address
        raise UserError(f"{where}: the image cannot be decoded ({why}); {remedy}") from error


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} allowed")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG with a preview behind the picture
        raise ValueError("it is animated, or has several pages")
    if image.mode in ("I", "F"):
        raise ValueError(f"it holds 32-bit values (mode {image.mode}) of no stated range")


def read_header(data: bytes | Path, where: str, *, remedy: str = REMEDY) -> ImageHeader:
    """Read an image file's header; no pixel is decoded.

    Args:
        data: the file's bytes; or its path, and then no more of it is read than that takes.
        where: file, row and column, for the message.
        remedy: what the message ends with.

    Raises:
        UserError: no image, or one that `decode_image` refuses by its header.
    """
    with _opened(data, where, remedy) as image:
        width, height = image.size
        # Pillow's own method of a PNG decodes the whole picture, since its EXIF may stand behind the pixels
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        if exif.get(0x0112, 1) in (5, 6, 7, 8):  # turned by a quarter
            width, height = height, width
        return ImageHeader(image.format or "?", width, height, image.mode)


def decode_image(data: bytes, where: str, *, remedy: str = REMEDY) -> Image.Image:
    """Decode an image file's bytes entirely, upright and to RGB, by the rules of this module.

    Args:
        data: bytes of a PNG, JPEG, WebP or other file that Pillow reads.
        where: file, row and column, for the message.
        remedy: what the message ends with.

    Raises:
        UserError: the bytes are truncated, damaged or no image, or a kind of image that is refused.
    """
    with _strict_decoding(), _opened(data, where, remedy) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in DEEP:
            return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return upright.convert("RGB")
