"""ImageRewardDB (arXiv 2304.05977, data card THUDM/ImageRewardDB), and the test list of github.com/THUDM/ImageReward.

    metadata-train.parquet    a row an image: image_path, prompt_id, prompt, classification, image_amount_in_total, rank,
    -validation, -test        overall_rating, image_text_alignment_rating, fidelity_rating
    images/train/train_1.zip  the images of image_path images/train/train_1/NAME.webp, in no folder inside the archive
    test.json                 a row a prompt: id, prompt, generations [N], ranking [N]; images below test_images

N images of a prompt make N(N-1)/2 pairs. The layout is that of the data card, of its script ImageRewardDB.py, and of
data/test.json in that repository.

Traps of the format:
* Rank 1 is the best (that repository's test.py counts a higher score at a lower rank as right). Equal ranks are common
  and are ties: 831 of the 7230 pairs in test.json.
* Give the download's folder, since rows must be grouped by prompt; with several metadata files say --split. Archives are
  read as they are, and an image that is extracted already is read from its folder.
* metadata-train.parquet lists all prompts, also those whose archives were not downloaded (the card's smaller subsets are
  the first archives): --unreadable skip leaves them out and counts them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path, PurePosixPath
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.tables import open_parquet
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, better, image_source, is_folder, is_list, number, text
from dedpo_diffusion.pairs.formats.sources import Located, Row, Source, fingerprint, open_source, split_file
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "prompt_id, prompt, image_path and rank, or prompt, generations and ranking"
OWN = (("generations", "ranking"), ("image_amount_in_total",), ("overall_rating",), ("prompt_id", "classification"))
READ = ()
LISTED = ("prompt", "generations", "ranking")
METADATA = ("prompt_id", "prompt", "image_path", "rank")
PROMPTS_OWN = ("prompt_id", "prompt", "classification")  # the same for all images of a prompt
RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
OPEN_ARCHIVES = 8
LARGEST_IMAGE = 1 << 28  # bytes an archive may claim for one image


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    return next((f"columns {', '.join(known)}" for known in (LISTED, METADATA) if set(known) <= set(columns)), None)


def open(source: str, settings: IngestSettings) -> Source:  # the name that importers share
    """The prompts of a download: of its folder, of one metadata file, or of a list like test.json.

    Raises:
        UserError: several metadata files and no split, a split that is not there, or a missing column.
    """
    path = Path(source)
    if path.is_dir():
        found = {file.stem.removeprefix("metadata-"): file for file in sorted(path.glob("metadata-*.parquet"))}
        if found:
            return Prompts(split_file(found, settings.split, path)[1], path, settings)
    if path.name.startswith("metadata-") and path.suffix == ".parquet" and path.is_file():
        return Prompts(split_file({path.stem.removeprefix("metadata-"): path}, settings.split, path)[1], path.parent, settings)
    return open_source(source, settings)


class Prompts(Source):
    """The rows of a metadata file, grouped by prompt: every column a list but those that are the prompt's own.

    Args:
        metadata: the parquet file.
        folder: what image_path is relative to, unless the settings name a folder.
        settings: where the images are.
    """

    kind = "parquet"

    def __init__(self, metadata: Path, folder: Path, settings: IngestSettings) -> None:
        self.place, self.folder = str(metadata), settings.images or folder
        with open_parquet(metadata) as file:
            names = file.schema_arrow.names
            missing = [name for name in METADATA if name not in names]
            if missing:
                raise UserError(f"{metadata} has no column {missing[0]!r} (it has {', '.join(names)}); is it ImageRewardDB's?")
            rows = file.read(use_threads=False).to_pylist()
        self.groups: dict[str, list[Row]] = {}
        for row in rows:
            self.groups.setdefault(str(row["prompt_id"]), []).append(row)
        archives = sorted(self.folder.glob("images/*/*.zip"))
        digest = fingerprint([metadata], metadata.parent) + fingerprint(archives, self.folder)
        super().__init__(settings.source, names, len(self.groups), digest)

    def rows(self, start: int = 0) -> Iterator[Located]:
        """From prompt `start` on: FILE prompt ID, its images and columns, and the folder."""
        archives = Archives()
        try:
            for prompt_id, rows in islice(self.groups.items(), start, None):
                where = f"{self.place} prompt {prompt_id}"
                yield where, self._grouped(rows, archives, where), self.folder
        finally:
            archives.close()

    def _grouped(self, rows: list[Row], archives: Archives, where: str) -> Row:
        total = rows[0].get("image_amount_in_total")
        if total is not None and len(rows) > total:
            raise UserError(f"{where} has {len(rows)} images, and image_amount_in_total is {total}; remove what comes twice")
        if any(row["prompt"] != rows[0]["prompt"] for row in rows):
            raise UserError(f"{where} has several prompts; give each its own prompt_id")
        grouped: Row = {name: [row[name] for row in rows] for name in self.columns}
        grouped |= {name: rows[0][name] for name in PROMPTS_OWN if name in rows[0]}
        paths = enumerate(grouped["image_path"])
        return grouped | {"image": [archives.image(path, self.folder, f"{where}, image_path {k}") for k, path in paths]}


class Archives:
    """Images by their path, from files or out of zip archives; nothing is written. Some archives stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] = OrderedDict()

    def image(self, path: Any, folder: Path, where: str) -> bytes | str:
        """FOLDER/NAME, or the bytes of NAME in FOLDER.zip; a path that cannot be read where neither is, so that the import decides.

        Args:
            path: as the metadata names it.
            folder: what it is relative to.
            where: file, prompt and number, for messages.

        Raises:
            UserError: a path that leaves the folder, or an archive that is none.
        """
        file = image_source(text(path, where), folder, where)
        if not isinstance(file, Path) or file.is_file():
            return str(path)
        archive = file.parent.with_name(f"{file.parent.name}.zip")
        if not archive.is_file():
            return str(path)
        handle, members = self._archive(archive)
        member = members.get(file.name)
        try:
            if member is not None and member.file_size <= LARGEST_IMAGE:
                return handle.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError):
            pass  # damaged or encrypted
        return str(archive.absolute() / file.name)

    def close(self) -> None:
        """Close what is still open."""
        while self._open:
            self._open.popitem()[1][0].close()

    def _archive(self, path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """An open archive and its files by bare name: what folders it claims does not matter, so it cannot reach out."""
        if path not in self._open:
            try:
                handle = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{path} cannot be read as a zip archive ({error}); download it again") from error
            self._open[path] = handle, {PurePosixPath(info.filename).name: info for info in handle.infolist() if not info.is_dir()}
            if len(self._open) > OPEN_ARCHIVES:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(path)
        return self._open[path]


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """A comparison of each two images of a prompt.

    Raises:
        UserError: a row of one image, or lists of different lengths.
    """
    if "generations" in row:
        values, ranks, prompt_id = row.get("generations"), row.get("ranking"), row.get("id")
        folder = folder / "test_images" if folder is not None and is_folder(folder / "test_images") else folder
    else:
        values, ranks, prompt_id = row.get("image") or row.get("image_path"), row.get("rank"), row.get("prompt_id")
        if not is_list(ranks):
            told = "give the folder of the download, whose rows are then grouped by prompt (and --split, if it has several)"
            raise UserError(f"{where} is a row of one image; {told}")
    if not is_list(values) or not is_list(ranks) or len(values) != len(ranks):
        raise UserError(f"{where}: images and ranks must be lists of one length; mend the row or remove it")
    prompt = text(row.get("prompt"), f"{where}, prompt")
    images = [image_source(value, folder, f"{where}, image {k}") for k, value in enumerate(values)]
    found = [_rank(rank, f"{where}, rank {k}") for k, rank in enumerate(ranks)]
    for i, j in combinations(range(len(images)), 2):
        key = None if prompt_id is None else f"{prompt_id}-{i}-{j}"
        answers = (Answer(better(found[i], found[j])),)
        yield Comparison(where, prompt, (images[i], images[j]), answers, key=key, source=_source(row, found, i, j, prompt_id))


def _source(row: Mapping[str, Any], ranks: list[float], i: int, j: int, prompt_id: Any) -> dict[str, Any]:
    """What else is known of images i and j: ranks and ratings, and the prompt's id and class."""
    kept: dict[str, Any] = {} if prompt_id is None else {"prompt_id": str(prompt_id)}
    if row.get("classification") is not None:
        kept["classification"] = str(row["classification"])
    columns = {"rank": ranks} | {name: row[name] for name in RATINGS if is_list(row.get(name))}
    return kept | {f"{name}_{side}": values[k] for name, values in columns.items() for side, k in enumerate((i, j))}


def _rank(value: Any, where: str) -> float:
    found = number(value, where)
    if found is None:
        raise UserError(f"{where} is missing; fill it in or remove the image")
    return found
