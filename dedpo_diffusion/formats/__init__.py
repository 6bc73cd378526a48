"""Importers of public preference formats, one module each.

An importer has two functions: `read(source, settings, counts)` yields (Pair, human label or None) and counts what it saw;
`rows(source)` tells how many rows it will look at.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..console import UserError

IMPORTERS = {
    "pickapic": "dedpo_diffusion.formats.pickapic",
}


def importer(name: str) -> ModuleType:
    """The importer of a format, imported now.

    Raises:
        UserError: no such format.
    """
    if name not in IMPORTERS:
        raise UserError(f"unknown format {name!r}: use one of {', '.join(sorted(IMPORTERS))}")
    return import_module(IMPORTERS[name])
