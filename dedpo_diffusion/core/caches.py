"""Folders of what was computed once: where a user's own lie, what each is of, who is using it, and how one is removed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import HOST, is_leftover, remove_folder, write_json
from dedpo_diffusion.core.locks import hold_lock

ABOUT, INDEX, USERS, GUARD = "about.json", "index.json", "in_use", ".caches.lock"
_used = ExitStack()  # locks of this process, which end with it at the latest


def user_root() -> Path:
    """The folder of a user's caches: DEDPO_CACHE, or dedpo_diffusion in XDG_CACHE_HOME or ~/.cache, where the model hub's lies too."""
    named = os.environ.get("DEDPO_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dedpo_diffusion"


def bytes_in(folder: Path) -> int:
    """What the files below a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Cache:
    """A cache there is: `about` it what `describe` wrote (empty for one that says nothing), `size` in bytes, `used` last in seconds since
    1970, `whole` unless it was given up half made."""

    folder: Path
    about: dict[str, Any]
    size: int
    used: float
    whole: bool


def read_about(folder: Path) -> dict[str, Any]:
    """What a cache says of itself; empty where it says nothing that can be read."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def list_caches(root: Path) -> list[Cache]:
    """The caches in a folder, by name."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        marks = [folder / name for name in (ABOUT, INDEX) if (folder / name).is_file()]
        if folder.is_dir() and marks and not is_leftover(folder):
            used = max(mark.stat().st_mtime for mark in marks)
            found.append(Cache(folder, read_about(folder), bytes_in(folder), used, (folder / INDEX).is_file()))
    return found


def describe(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what a cache is of."""
    write_json(folder / ABOUT, dict(about))


@contextmanager
def _guard(root: Path) -> Iterator[None]:
    """Nobody takes up or removes a cache of this folder meanwhile; where nothing can be written, nothing can be removed either."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(hold_lock(root / GUARD, wait=True))
        yield


def take_up(folder: Path) -> None:
    """Mark a cache as used now, and as in use until `release` or this process's end. A folder that cannot be written is used unmarked."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with _guard(folder.parent), suppress(OSError):
        (folder / USERS).mkdir(parents=True, exist_ok=True)
        _used.enter_context(hold_lock(folder / USERS / f"{HOST}.{os.getpid()}.lock"))
        if (folder / ABOUT).is_file():
            os.utime(folder / ABOUT)


def release() -> None:
    """No cache is used by this process any more."""
    _used.close()


@contextmanager
def released() -> Iterator[None]:
    """What is taken up within the block is released after it."""
    try:
        yield
    finally:
        release()


def in_use(folder: Path) -> bool:
    """Whether a process is using a cache."""
    for lock in sorted((folder / USERS).glob("*.lock")):
        with hold_lock(lock) as free:
            if not free:
                return True
            lock.unlink(missing_ok=True)
    return False


def remove(folder: Path) -> int:
    """Remove a cache, and say how many bytes that freed.

    Raises:
        UserError: it is in use, or cannot be removed.
    """
    size = bytes_in(folder)
    with _guard(folder.parent) if folder.parent.is_dir() else nullcontext():
        if in_use(folder):
            raise UserError(f"{folder.name} is in use by a run; remove it when that has ended")
        try:
            remove_folder(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be removed ({error.strerror or error})") from error
    return size
