"""Settings of the stage that looks at weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InspectSettings:
    """Say what a weight file or a folder is, for which base, and which programs read it.

    Args:
        path: a .safetensors file, or a folder: of diffusers, of a run or one of its checkpoints, of samples, of weight files.
        hash: tell the file's SHA-256; None tells that of files up to 1 GiB.
        json: print everything as JSON instead.
    """

    path: Path
    hash: bool | None = None
    json: bool = False
