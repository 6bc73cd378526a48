"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import NoSpace, UserError, is_full

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
HOST = platform.node()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    """Flush a finished file; some writers make theirs private, so give it the mode of any new file too."""
    os.chmod(path, 0o666 & ~UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def temporary_name(path: Path) -> Path:
    """A name beside `path` that is this process's own; machines that share a folder may give out the same process number."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` where a write within finds the disk full.

    Raises:
        NoSpace: it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NoSpace) or is_full(error):
            raise NoSpace(path) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error it is removed.

    Raises:
        NoSpace: the disk is full.
    """
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync_file(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the name `path`, replacing an older folder.

    Raises:
        FileExistsError: `path` is a file.
        NoSpace: the disk is full.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file, not a folder")
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder such that one killed meanwhile leaves nothing that looks whole."""
    temporary = temporary_name(path)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file or folder that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left behind in this folder, not below it."""
    for path in folder.glob(".*.tmp"):
        owner, _, process = path.name.removesuffix(".tmp").rpartition(".")
        if owner.endswith(f".{HOST}") and process.isdigit() and not _is_running(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is no such file, or no object in it; `remedy` tells what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: enough against accidents, and several times as fast as a digest."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
