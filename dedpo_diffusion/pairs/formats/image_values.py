"""An image as tables hold it: what is certain is read, and of anything else it is said where it stands.

| value | what becomes of it |
|---|---|
| an image file's bytes | as they are |
| `{"bytes": ..., "path": ...}` of `datasets`, also as the text that its `to_csv` and `to_json` write | its bytes, else its path |
| a data URI (`data:image/png;base64,...`) | its bytes |
| base64 of an image file | its bytes |
| `b'...'`, as pandas writes bytes to a CSV | its bytes |
| a path | below the folder of the table or `--images`, unless it is absolute |
| a path with `\\` between its parts | with `/`, unless a file has the name as it stands |
| `file://` and `~/` | the path that they mean |
| a drive (`C:\\...`) or a share of Windows, a NUL, other text too long for a path | nothing: the pair is unreadable |
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import misfit, shown

LONGEST_PATH = 4096  # bytes, of any system
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # of PNG, JPEG, GIF and TIFF files
DRIVE = re.compile(r"/?[A-Za-z]:[\\/]|\\\\")  # C:\, /C:/ of a file URL, \\server\share
PRINTED = re.compile(r"<[\w.]*(Image|ImageFile)\b.* at 0x[0-9A-Fa-f]+>|array\(|tensor\(|\[\[\[")  # what Python shows of a picture
STRUCT = {"bytes", "path"}  # the fields of an image of `datasets`
MEND = "mend it"


@dataclass(frozen=True)
class Unreadable:
    """An image that the row does not give: why not and what to do, in words that follow where it stands."""

    why: str


ImageSource = bytes | Path | Unreadable | None  # an encoded file's bytes, where the file lies, why there is neither, or nothing


def image_source(value: Any, folder: Path | None, where: str) -> ImageSource:
    """An image as tables hold it, by the rules of this module.

    Args:
        value: what the row holds.
        folder: what relative paths are relative to; None where the source has no files beside it.
        where: file, row and column, for messages.

    Raises:
        UserError: a path without a folder, a path that leaves the folder, an address, or a value of another kind.
    """
    if isinstance(value, Mapping) and STRUCT & set(value):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, Path):
        return None if value is None else _path(str(value), folder, where)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(bytes(value), folder, where)
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, and must hold an image file's bytes or its path; convert it")
    return _text(value, folder, where)


def _bytes(value: bytes, folder: Path | None, where: str) -> ImageSource:
    """Bytes are a file's own, unless they are the text of a data URI or base64."""
    if value[:5] == b"data:" or ((value[:1].isalnum() or value[:1] == b"/") and _of_base64(value[:200].decode("latin-1")) is not None):
        return _text(value.decode("latin-1"), folder, where)
    return value


def _text(value: str, folder: Path | None, where: str) -> ImageSource:
    bare = value.strip()
    if bare[:5].lower() == "data:":
        return _data_uri(bare)
    if bare[:1] == "{":
        return _struct(bare, value, folder, where)
    if bare[:2] in ("b'", 'b"'):
        held = _literal(bare)
        return held if isinstance(held, bytes) else Unreadable(f"begins as bytes do ({shown(value)}) and is cut off; write the table again")
    if PRINTED.match(bare):
        return Unreadable(f"is what Python prints of a picture ({shown(value)}), not the picture; write its file's bytes or its path there")
    return _of_base64(value) or _path(value, folder, where)


def _data_uri(value: str) -> ImageSource:
    head, comma, body = value.partition(",")
    if not comma:
        return Unreadable(f"is a data URI without data ({shown(value)}); {MEND}")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    data = _decoded(unquote(body))
    return data if data else Unreadable(f"is a data URI whose base64 is damaged or cut off ({shown(value)}); {MEND}")


def _of_base64(value: str) -> bytes | None:
    """The image file that a text is the base64 of; None where it is not that of an image, as no path is."""
    if not BASE64.fullmatch(value):
        return None
    head = _decoded(re.sub(r"\s", "", value[:80])[:32]) or b""
    webp, bmp = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[:2] == b"BM" and head[6:10] == b"\0\0\0\0"
    known = head.startswith(HEADS) or webp or bmp or head[4:8] == b"ftyp"
    return _decoded(value) if known else None


def _decoded(text: str) -> bytes | None:
    plain = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _struct(bare: str, value: str, folder: Path | None, where: str) -> ImageSource:
    """What `datasets` writes of an image into CSV (Python's words) and JSON; `bare` is the value without the blanks at its ends."""
    held = _literal(bare)
    if isinstance(held, Mapping) and STRUCT & set(held):
        return image_source(held, folder, where)
    if isinstance(held, Mapping) or not re.match(r"\{\s*['\"](bytes|path)['\"]", bare):
        return _path(value, folder, where)
    return Unreadable(f"begins as an image of `datasets` does ({shown(value)}) and is cut off; write the table again")


def _literal(value: str) -> Any:
    """A value as JSON or Python writes it; None where it is none."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _path(value: str, folder: Path | None, where: str) -> ImageSource:
    if value.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        raise UserError(f"{where} is an address ({shown(value)}); download the images and give their paths")
    wrong = misfit(value)
    if wrong is not None:
        return Unreadable(f"({shown(value)}) {wrong}, which no path can; {MEND}")
    if len(os.fsencode(value)) > LONGEST_PATH:
        return Unreadable(f"holds {shown(value)}, which is neither a path nor an image; write an image file's bytes, base64 or path there")
    if value.lower().startswith("file:"):
        parts = urlsplit(value)
        if parts.netloc not in ("", "localhost"):
            return Unreadable(f"({shown(value)}) is on another machine; copy the images here, and give --images their folder")
        value = unquote(parts.path)
    if DRIVE.match(value) and os.name != "nt":
        return Unreadable(f"({shown(value)}) is a path of Windows; make it relative to a folder here, and give that with --images")
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    if folder is None:
        raise UserError(f"{where} is a path ({shown(value)}), and the source has no folder of images; give it with --images")
    return _inside(_with_slashes(value, folder), folder, where)


def _with_slashes(value: str, folder: Path) -> Path:
    """The path; where Windows wrote it, with the separators of this system. A name that holds a backslash here is left alone."""
    if "\\" not in value or os.name == "nt":
        return Path(value)
    turned = Path(value.replace("\\", "/"))
    return Path(value) if ".." not in turned.parts and (folder / value).is_file() else turned


def _inside(path: Path, folder: Path, where: str) -> Path:
    """The path, below `folder` unless it is absolute: a table from elsewhere must not reach into other folders by `..`."""
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise UserError(f"{where}: {path} leaves {folder}; give --images the folder that all paths are relative to")
    return folder / path
