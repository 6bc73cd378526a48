"""Image files without what they tell beside the picture: no text, no EXIF (places, cameras, people), no thumbnails. No pixel changes.

What a viewer needs stays: the orientation, and colour profiles. Of PNG, JPEG and WebP, parts of the file are left out; files of other
formats are returned as they are.

Reference: PNG (W3C), section 11; JPEG (ITU-T T.81), annex B; WebP container (RFC 9649), section 2.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

PNG, JPEG, WEBP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"RIFF", b"WEBP")
PNG_KEPT = {  # what is drawn, and in which colours; all else is told
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"cICP", b"mDCV", b"cLLI", b"bKGD", b"pHYs",
}  # fmt: skip
WEBP_KEPT = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP"}
JPEG_KEPT = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}  # application segments by what they begin with
ORIENTATION = 0x0112


def without_metadata(data: bytes) -> bytes:
    """The same picture, without metadata; the bytes as they are where there is none, or where the format is another.

    Args:
        data: a whole image file that `decode_image` reads.
    """
    if data.startswith(PNG):
        kept = b"".join(part for kind, part in _png_chunks(data) if kind in PNG_KEPT)
        bare = PNG + kept
        return data if bare == data else _png_turned(bare, _orientation(data))
    if data.startswith(JPEG):
        kept = b"".join(_jpeg_kept(data))
        return data if kept == data else _jpeg_turned(kept, _orientation(data))
    if data[:4] == WEBP[0] and data[8:12] == WEBP[1]:
        return _webp(data)
    return data


def _orientation(data: bytes) -> int:
    """The EXIF orientation; 1 is upright."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return Image.Image.getexif(image).get(ORIENTATION, 1)


def _exif(orientation: int) -> bytes:
    """An EXIF block that tells the orientation alone, in TIFF's little-endian layout."""
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, ORIENTATION, 3, 1, orientation, 0, 0)


# ---- PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, whole chunk) of each chunk up to the end; what lies behind it is no part of the picture."""
    place = len(PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        yield kind, data[place : place + 12 + length]
        if kind == b"IEND":
            return
        place += 12 + length


def _png_turned(data: bytes, orientation: int) -> bytes:
    import zlib

    if orientation == 1:
        return data
    body = b"eXIf" + _exif(orientation)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    behind_header = len(PNG) + 25
    return data[:behind_header] + chunk + data[behind_header:]


# ---- JPEG


def _jpeg_kept(data: bytes) -> Iterator[bytes]:
    """The parts of a JPEG that make the picture."""
    place = 2
    yield data[:2]
    while place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xFF:  # a filler
            place += 1
            continue
        if marker == 0xD9:
            yield data[place : place + 2]
            return
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        end = place + 2 + length
        if marker == 0xDA:  # the entropy-coded data follow up to the next marker
            end = _end_of_scan(data, end)
        body = data[place + 4 : end]
        is_told = marker == 0xFE or (0xE0 <= marker <= 0xEF and not body.startswith(JPEG_KEPT.get(marker, b"\0none")))
        if not is_told:
            yield data[place:end]
        place = end
    yield data[place:]


def _end_of_scan(data: bytes, place: int) -> int:
    """Where the entropy-coded data end: at a marker that is no stuffed byte and no restart."""
    while True:
        place = data.find(b"\xff", place)
        if place < 0 or place + 1 >= len(data):
            return len(data)
        if data[place + 1] != 0 and not 0xD0 <= data[place + 1] <= 0xD7:
            return place
        place += 2


def _jpeg_turned(data: bytes, orientation: int) -> bytes:
    if orientation == 1:
        return data
    body = b"Exif\0\0" + _exif(orientation)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment + data[2:]


# ---- WebP


def _webp(data: bytes) -> bytes:
    """The chunks that make the picture; the header of the extended format says what is left."""
    orientation = _orientation(data)
    whole = 8 + struct.unpack("<I", data[4:8])[0]
    place, parts, found = 12, [], len(data) > whole + whole % 2
    while place + 8 <= min(len(data), whole):
        kind = data[place : place + 4]
        (length,) = struct.unpack("<I", data[place + 4 : place + 8])
        end = place + 8 + length + length % 2
        found |= kind not in WEBP_KEPT
        if kind in WEBP_KEPT:
            parts.append(data[place:end])
        place = end
    if not found:
        return data
    turned = orientation != 1
    if turned:
        body = _exif(orientation)
        parts.append(b"EXIF" + struct.pack("<I", len(body)) + body)
    parts = [part[:8] + bytes([(part[8] & ~0x0C) | (0x08 if turned else 0)]) + part[9:] if part[:4] == b"VP8X" else part for part in parts]
    body = WEBP[1] + b"".join(parts)
    return WEBP[0] + struct.pack("<I", len(body)) + body
