"""Your own pairs as folders of images without a table: chosen/ and rejected/, NAME_w and NAME_l, ranks. See sources/image_tree.py.

Where a word tells which image is preferred, it comes first here, and the sides get shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, text
from dedpo_diffusion.pairs.formats.ranked import pairs_of
from dedpo_diffusion.pairs.formats.sources import Source
from dedpo_diffusion.pairs.formats.sources.image_tree import IMAGES, ImageTreeSource
from dedpo_diffusion.settings import IngestSettings


class Reader:
    """Reads the rows of one folder, in place of the module."""

    def __init__(self, source: ImageTreeSource) -> None:
        self.ranked, self.WINNER_FIRST = source.ranked, source.judged

    def entries(self, row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
        """The comparisons of the images of one name: one, or one for each two that are ranked."""
        images = [None if path is None else Path(path) for path in row["images"]]
        prompt, name = text(row["prompt"], f"{where}: prompt"), row["name"].replace("/", "-") or None
        if self.ranked:
            yield from pairs_of(where, prompt, images, row["ranks"], name=name)
        else:
            yield Comparison(where, prompt, (images[0], images[1]), (Answer(1.0),) if self.WINNER_FIRST else (), key=name)


def open(source: str, settings: IngestSettings) -> Source:  # the name that formats share
    """The images of a folder, by name.

    Raises:
        UserError: no such folder, or names that do not tell what belongs together.
    """
    if not Path(source).is_dir():
        raise UserError(f"{source} is no folder; give the one that holds the images ({', '.join(IMAGES)})")
    if settings.split is not None:
        raise UserError(f"{source} is a folder of images, which has no splits; leave out --split, or give the folder of one split")
    return ImageTreeSource(source, Path(source))


def bind(source: Source, settings: IngestSettings) -> tuple[str, Reader]:
    """A reader of this folder, and how it is read."""
    if not isinstance(source, ImageTreeSource):
        raise UserError(f"{source.path} is no folder of images alone; give the format auto")
    return source.assumed, Reader(source)
