"""Your own pairs as an image folder: images, and a metadata table whose columns image_0_file_name and image_1_file_name name them.

Everything else is as in `table`: the columns are what they are called there, without the ending _file_name.
"""

from __future__ import annotations

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources import METADATA, Source, open_source
from dedpo_diffusion.pairs.formats.table import bind
from dedpo_diffusion.settings import IngestSettings

__all__ = ["bind", "open"]


def open(source: str, settings: IngestSettings) -> Source:  # the name that formats share
    """The rows of the metadata tables.

    Raises:
        UserError: no metadata table there.
    """
    opened = open_source(source, settings)
    if opened.kind != "imagefolder":
        raise UserError(
            f"{source} is no image folder, since it has no table named {', '.join(METADATA)} with columns image_0_file_name and "
            "image_1_file_name; add one, or give the format table"
        )
    return opened
