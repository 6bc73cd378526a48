"""Rows of a webdataset: tar files in which the files of one sample stand side by side.

    000017.jpg_0.jpg  000017.jpg_1.jpg  000017.label_0.txt  ->  {"__key__": "000017", "jpg_0.jpg": ..., "label_0.txt": ...}

A sample's key is its files' name up to the first dot, a column the rest of it; every value but the key is bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources.base import Located, Row, Source, fingerprint

KEY = "__key__"
Member = tuple[str, str, tarfile.TarInfo]  # sample, column, where its bytes lie


class WebdatasetSource(Source):
    """One or more tar files, streamed in order.

    Args:
        path: the source as the user gave it.
        files: the tar files, in order.
        root: what they lie below.
        folder: what relative paths are relative to.

    Raises:
        UserError: a file that is no tar, or no sample in all of them.
    """

    kind = "webdataset"

    def __init__(self, path: str, files: Sequence[Path], root: Path, folder: Path | None) -> None:
        self.files, self.folder = list(files), folder
        super().__init__(path, (), None, fingerprint(self.files, root))
        first = self.first()
        if first is None:
            raise UserError(f"{path} holds no sample; give the folder of the tar files")
        self.columns = tuple(first)

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The samples from number `start` on; of those before it only the names are read."""
        for file in self.files:
            for number, (key, members, archive) in enumerate(_samples(file)):
                if start:
                    start -= 1
                else:
                    yield f"{file} row {number}", _read(file, key, members, archive), self.folder


def _read(file: Path, key: str, members: list[Member], archive: tarfile.TarFile) -> Row:
    row: Row = {KEY: key}
    for _, column, info in members:
        if column in row:
            raise UserError(f"{file}: sample {key!r} has two files {column!r}; write the archive again")
        opened = archive.extractfile(info)
        try:
            row[column] = opened.read() if opened else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged at {info.name} ({error}); download it again") from error
    return row


def _samples(file: Path) -> Iterator[tuple[str, list[Member], tarfile.TarFile]]:
    """Each sample's key and files; a sample that comes again later has been torn apart."""
    done: set[str] = set()
    sample: list[Member] = []
    try:
        archive = tarfile.open(file)  # noqa: SIM115, closed below
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read as a tar archive ({error}); download it again") from error
    with archive:
        for member in _members(file, archive):
            if sample and member[0] != sample[0][0]:
                yield sample[0][0], sample, archive
                done.add(sample[0][0])
                sample = []
            if member[0] in done:
                raise UserError(f"{file}: the files of sample {member[0]!r} do not stand side by side; write the archive sorted by name")
            sample.append(member)
        if sample:
            yield sample[0][0], sample, archive


def _members(file: Path, archive: tarfile.TarFile) -> Iterator[Member]:
    while True:
        try:
            info = archive.next()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}); download it again") from error
        if info is None:
            return
        archive.members.clear()  # type: ignore[attr-defined]  # it would collect the headers of all files
        name = PurePosixPath(info.name)
        if info.isdir() or any(part.startswith(".") and part != "." for part in name.parts):
            continue  # folders, and what other systems hide in archives
        if not info.isreg():
            raise UserError(f"{file}: {info.name} is a link or a device, not a file; write the archive with the files themselves")
        stem, dot, column = name.name.partition(".")
        if not dot:
            raise UserError(f"{file}: {info.name} belongs to no sample, since its name has no dot; write the archive without it")
        yield str(name.with_name(stem)), column, info
