"""Preference formats: one module each, which makes comparisons of a source's rows.

A format module has

    WINNER_FIRST = False                          # True: the preferred image stands first, so sides get shuffled
    recognise(columns, row) -> str | None         # in words why rows with these columns, like `row`, are of this format
    entries(row, where, folder, settings)         # the comparisons of one row, as Comparison objects

A published format also has

    OWN = (("human_preference",),)                # sets of columns that no other table has; without one `auto` does not take it
    READ = ("label_0",)                           # which of the columns that any table may have for its answers it reads

and, where it needs more, `open(source, settings) -> Source` (rows that `sources.open_source` cannot find by itself) and
`NEEDS` (what a source must have, in words, for the message when it has not). Your own tables, whose columns settings may
name, have `bind(source, settings) -> (why, reader)` instead: a reader made for one source stands in for the module.

A format of which several rows may be about one pair has `regroup(source) -> Source`, which makes one row of them.

Formats of other packages (core.plugins) are used when they are named; `auto` does not try them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from dedpo_diffusion.core import plugins
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.sources import Source, open_source
from dedpo_diffusion.pairs.formats.table import answer_columns, has_two_images
from dedpo_diffusion.settings import IngestSettings

PUBLISHED = ("pickapic", "hpdv2", "hpdv3", "imagereward", "open_image_preferences", "rapidata", "exported", "labelstudio", "argilla")
OWN_FORMATS = {name: f"{__name__}.{name}" for name in ("table", "ranked", "imagefolder", "folders")}
FORMATS = {name: f"{__name__}.{name}" for name in PUBLISHED} | OWN_FORMATS | {"datasets": f"{__name__}.saved_datasets"}
AUTO = "auto"


@dataclass(frozen=True)
class Chosen:
    """What a source is: the format's name, how it was recognised, its module (or reader), and the opened rows."""

    name: str
    why: str
    module: Any
    source: Source


def load(name: str) -> Any:
    """The module of a format, imported now; of another package, what its entry point names.

    Raises:
        UserError: no such format, one that two packages offer, or one that cannot be imported.
    """
    entry = plugins.find(name, [plugins.IMPORTERS], [*FORMATS, AUTO])
    if entry is not None:
        return plugins.load(entry, _is_format, "a module with WINNER_FIRST, recognise and entries")
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}: {plugins.known(name, [*FORMATS, AUTO], plugins.IMPORTERS)}")
    return import_module(FORMATS[name])


def _is_format(module: Any) -> bool:
    return hasattr(module, "WINNER_FIRST") and all(callable(getattr(module, name, None)) for name in ("recognise", "entries"))


def choose(settings: IngestSettings) -> Chosen:
    """Open the settings' source in the settings' format, or in the one that it is recognised as.

    Raises:
        UserError: unknown format, a source that cannot be opened, or one that is not of the format.
    """
    name = settings.format
    own = ["table", "imagefolder", "datasets", AUTO]  # all others have columns of their own, or none
    foreign = set() if name in own else set(settings.columns) - set(getattr(load(name), "OPTIONS", ()))
    if foreign:
        raise UserError(f"--columns is for your own tables, and {name} has columns of its own; leave it out, or give the format table")
    if name == AUTO:
        return _regrouped(recognise(settings.source, settings))
    opener = getattr(load(name), "open", open_source)
    source = opener(settings.source, settings)
    if name == "datasets":
        return _regrouped(recognise_rows(source, settings))
    if name in ("table", "imagefolder") and not settings.columns and load("exported").recognise(source.columns, None):
        name = "exported"  # which knows more of such a table
    return _regrouped(_bound(name, source, settings))


def recognise(source: str, settings: IngestSettings) -> Chosen:
    """Find out which format a source is of.

    Raises:
        UserError: it cannot be opened, or no format or several fit; the message says what was seen.
    """
    try:
        opened = open_source(source, settings)
    except UserError as error:
        return _only(source, _by_own_ways(source, settings), error)
    return recognise_rows(opened, settings)


def _by_own_ways(source: str, settings: IngestSettings) -> dict[str, Chosen]:
    """The formats that find rows in a source which cannot be opened otherwise."""
    found: dict[str, Chosen] = {}
    for name in () if settings.columns else (*PUBLISHED, "folders"):
        module = load(name)
        if hasattr(module, "open"):
            try:
                opened = module.open(source, settings)
            except UserError:
                continue  # the general message stands
            if hasattr(module, "bind"):
                return found or {name: _bound(name, opened, settings)}
            if not unread(module, opened.columns) and (why := module.recognise(opened.columns, opened.first())):
                found[name] = Chosen(name, _why(why, opened), module, opened)
    return found


def unread(module: Any, columns: Collection[str]) -> list[str]:
    """The columns whose names tell of answers, and which a published format does not read."""
    return [] if not hasattr(module, "OWN") else [name for name in answer_columns(columns) if name not in module.READ]


def _is_sure(module: Any, columns: Collection[str]) -> bool:
    """Whether a source has columns that are a format's own, and no answers that it would leave unread."""
    return any(set(own) <= set(columns) for own in module.OWN) and not unread(module, columns)


def recognise_rows(source: Source, settings: IngestSettings) -> Chosen:
    """Find out which format an opened source's rows are of: a published one, else the user's own table.

    Raises:
        UserError: no format or several fit.
    """
    row = source.first()
    fits = {} if settings.columns else {name: why for name in PUBLISHED if (why := load(name).recognise(source.columns, row))}
    found = {
        name: Chosen(name, _why(why, source), load(name), source) for name, why in fits.items() if _is_sure(load(name), source.columns)
    }
    if found:
        chosen = _only(source.path, found)
        own = hasattr(chosen.module, "open") and source.kind == "parquet"  # that format may group rows
        return _bound(chosen.name, chosen.module.open(source.path, settings), settings) if own else chosen
    name = "imagefolder" if source.kind == "imagefolder" else "table"
    if not settings.columns and not has_two_images(source.columns) and load("ranked").recognise(source.columns, row):
        return _bound("ranked", load("ranked").gather(source), settings)
    try:
        chosen = _bound(name, source, settings)
        unsure = [name for name in fits if not unread(load(name), source.columns)]  # their columns, and none of their own
        hint = f"; if it is {' or '.join(unsure)}, give that name instead of {AUTO}" if unsure else ""
        return replace(chosen, why=chosen.why + hint)
    except UserError as error:
        added = plugins.names(plugins.IMPORTERS)
        others = f"; formats of other packages must be named: {', '.join(added)}" if added else ""
        raise UserError(f"{error} (and no published format has these columns: {', '.join(PUBLISHED)}{others})") from error


def _only(source: str, found: dict[str, Chosen], trouble: UserError | None = None) -> Chosen:
    if not found and trouble is not None:
        raise trouble
    if len(found) > 1:
        fits = "; ".join(f"{name}: {chosen.why}" for name, chosen in found.items())
        raise UserError(f"{source} could be of several formats ({fits}); give one of these names instead of {AUTO}")
    return next(iter(found.values()))


def _why(why: str, source: Source) -> str:
    return f"{why} ({source.kind})"


def _bound(name: str, source: Source, settings: IngestSettings) -> Chosen:
    module = load(name)
    if hasattr(module, "bind"):
        why, reader = module.bind(source, settings)
        return Chosen(name, _why(why, source), reader, source)
    why = module.recognise(source.columns, source.first())
    if why is None:
        needs = f", and {name} needs {module.NEEDS}" if hasattr(module, "NEEDS") else ""
        raise UserError(f"{source.path} is not {name}: it has the columns {', '.join(source.columns) or '(none)'}{needs}")
    if unread(module, source.columns):
        answers = " and ".join(unread(module, source.columns))
        raise UserError(
            f"{source.path} has answers in {answers}, which {name} does not read; give the format table, or leave these columns out"
        )
    return Chosen(name, _why(why, source), module, source)


def _regrouped(chosen: Chosen) -> Chosen:
    """The same, with rows that are about one pair as one row, where the format says which those are."""
    regroup = getattr(chosen.module, "regroup", None)
    return chosen if regroup is None else Chosen(chosen.name, chosen.why, chosen.module, regroup(chosen.source))
