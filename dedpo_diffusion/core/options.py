"""The options of a stage, read from its settings: one for every field, those of a nested dataclass as "optim.steps"."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

SHORT = {"lr": "learning_rate", "output": "out", "resolution": "size", "batch_size": "batch", "n": "limit"}  # names of other programs


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, or one argument without a name.

    Attributes:
        name: as it is typed, without the dashes: "optim.steps".
        path: the fields that lead to it: ("optim", "steps").
        hint: its type.
        text: what it does, of the settings' docstring.
        field: of the dataclass.
        positional: whether it is given without a name.
        group: whether it is a nested dataclass, whose fields are options themselves.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    text: str
    field: dataclasses.Field[Any]
    positional: bool = False
    group: bool = False

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return not self.group and self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def shown(self) -> str:
        """As a person types it."""
        return self.name.upper() if self.positional else f"--{self.name}"

    @property
    def many(self) -> bool:
        """Whether it takes several words."""
        return any(typing.get_origin(part) in (list, tuple) for part in alternatives(self.hint))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


@cache
def field_docs(settings: type) -> dict[str, str]:
    """What the docstring says of each field."""
    from docstring_parser import parse

    return {item.arg_name: " ".join((item.description or "").split()) for item in parse(settings.__doc__ or "").params}


def find_options(settings: type, positional: Sequence[str] = (), flags: Mapping[str, str] | None = None) -> dict[str, Option]:
    """All options by name, groups included; arguments without a name come first, in their order.

    Args:
        settings: the dataclass.
        positional: fields given without a name.
        flags: option names that differ from their field's.
    """
    names = {field: name for name, field in (flags or {}).items()}
    found = {option.name: option for option in _walk(settings, (), names, set(positional))}
    return {name: found.pop(name) for name in positional} | found


def _walk(settings: type, path: tuple[str, ...], names: Mapping[str, str], positional: set[str]) -> Iterator[Option]:
    hints, texts = typing.get_type_hints(settings), field_docs(settings)
    for field in dataclasses.fields(settings):
        inside, hint = (*path, field.name), hints[field.name]
        name, group = ".".join((*path, names.get(field.name, field.name))), dataclasses.is_dataclass(hint)
        yield Option(name, inside, hint, texts.get(field.name, ""), field, field.name in positional, group)
        if group:
            yield from _walk(typing.cast(type, hint), inside, {}, set())


def first_groups(settings: type) -> dict[str, list[str]]:
    """The names of the options that people use first, by what they are about: `FIRST` of the settings; without it, none."""
    return {title: names.split() for title, names in getattr(settings, "FIRST", {}).items()}


def near(name: str, options: Mapping[str, Option], settings: type) -> list[str]:
    """Which options somebody may have meant who typed `name`: at most two, the likeliest first."""
    known = [option.name for option in options.values() if not option.group and not option.positional]
    used_first = {name for names in first_groups(settings).values() for name in names}
    *before, last = name.replace("-", "_").split(".")
    last = SHORT.get(last, last)
    meant = ".".join((*before, last))
    if meant in known:
        return [meant]
    same = [other for other in known if other.rpartition(".")[2] == last]
    if same:
        return sorted(same, key=lambda other: other not in used_first)[: 1 if used_first & set(same) else 2]
    found = difflib.get_close_matches(meant, known, n=1, cutoff=0.6)
    if found:
        return found
    lasts = difflib.get_close_matches(last, [other.rpartition(".")[2] for other in known], n=1, cutoff=0.75)
    return sorted((other for other in known if other.rpartition(".")[2] in lasts), key=lambda other: other not in used_first)[:1]
