"""Scorers, judges, objectives and importers that other installed packages add through entry points.

A package says in its pyproject.toml

    [project.entry-points."dedpo_diffusion.scorers"]
    brightness = "their_package.brightness:Brightness"

and `brightness` is then a name like those of this package. Only metadata are read until a name is asked for: nothing of another
package is imported before.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dedpo_diffusion.core.errors import UserError

SCORERS, JUDGES = "dedpo_diffusion.scorers", "dedpo_diffusion.judges"
OBJECTIVES, IMPORTERS = "dedpo_diffusion.objectives", "dedpo_diffusion.importers"


@cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group; they do not change while a program runs."""
    return tuple(entry_points(group=group))


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "a package without a name"


def find(name: str, groups: Collection[str], built_in: Collection[str]) -> EntryPoint | None:
    """The entry point of that name in any of the groups, not imported yet; None where no package has one.

    Raises:
        UserError: the name is built in, or another package has it too; both packages are named.
    """
    found = [entry for group in groups for entry in _entries(group) if entry.name == name]
    owners = (["dedpo_diffusion"] if name in built_in else []) + [_owner(entry) for entry in found]
    if len(owners) > 1:
        raise UserError(f"{name!r} is offered by {owners[0]} and by {owners[1]}; uninstall one of them, or rename it there")
    return found[0] if found else None


def load(entry: EntryPoint, fits: Callable[[Any], bool], needed: str) -> Any:
    """What an entry point names, imported now.

    Args:
        entry: of `find`.
        fits: whether it can be used.
        needed: what it must be, in words.

    Raises:
        UserError: it cannot be imported, or is something else.
    """
    what = f"{entry.name!r} ({entry.value}) of the package {_owner(entry)}"
    try:
        found = entry.load()
    except Exception as error:  # whatever a foreign module does when it is imported
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"{what} cannot be imported: {type(error).__name__}: {said}; mend that package, or uninstall it") from error
    if not fits(found):
        raise UserError(f"{what} must be {needed}; mend that package, or uninstall it")
    return found


def names(*groups: str) -> list[str]:
    """The names that other packages add, sorted."""
    return sorted({entry.name for group in groups for entry in _entries(group)})


def known(name: str, built_in: Collection[str], *groups: str, toys: Collection[str] = ()) -> str:
    """For a message about an unknown name: all names, `toys` (for Shapes only) last, and the one that was probably meant."""
    every = list(dict.fromkeys([*built_in, *names(*groups)]))
    near = difflib.get_close_matches(name, every, n=1)
    for_shapes = [one for one in every if one in toys]
    text = f"known: {', '.join(one for one in every if one not in toys)}"
    text += f"; for Shapes only: {', '.join(for_shapes)}" if for_shapes else ""
    return text + (f"; did you mean {near[0]!r}?" if near else "")
