"""A folder of samples is taken once an image is in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.locks import hold_lock
from dedpo_diffusion.weights.run_folder import open_run, starting

LOCKS = ".locks.tmp"  # in a sample folder, as long as it is not finished; by its name no content of it


def open_samples(folder: Path, settings: Any, identity: Mapping[str, str]) -> None:
    """Claim a sample folder, one process after the other; arguments and errors as of `open_run`."""
    with hold_lock(lock_folder(folder) / "open.lock", wait=True):  # not held: another process has just finished the folder
        try:
            open_run(folder, settings, identity, free=("out",))
        except UserError:
            if not (folder / "settings.yaml").is_file():  # somebody's own folder
                shutil.rmtree(folder / LOCKS, ignore_errors=True)
            raise


def lock_folder(folder: Path) -> Path:
    """The folder of a sample folder's locks."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    return folder / LOCKS


@contextmanager
def claimed(folders: Sequence[Path]) -> Iterator[None]:
    """Within the block folders are sampled into: an error before an image is there leaves none that refuses another command."""
    try:
        with starting(*folders):
            yield
    except BaseException:
        for folder in folders:
            if not (folder / "settings.yaml").is_file():  # else another process is at it, or images are there
                shutil.rmtree(folder / LOCKS, ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()
        raise
