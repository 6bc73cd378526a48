"""A folder that the `datasets` library saved (save_to_disk): its columns tell which format its rows are of.

The format `datasets` opens it and leaves the rows to the format they are recognised as; pair_ids begin with that one's name.
"""

from __future__ import annotations

from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources import Source, is_saved, open_source
from dedpo_diffusion.settings import IngestSettings


def open(source: str, settings: IngestSettings) -> Source:  # the name that formats share
    """The saved rows.

    Raises:
        UserError: the folder was not written by save_to_disk, or has several splits and none is chosen.
    """
    if not is_saved(Path(source)):
        raise UserError(f"{source} is no folder that save_to_disk of `datasets` wrote; save it so, or give another format than datasets")
    return open_source(source, settings)
