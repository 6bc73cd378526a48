"""The help of a stage: the options that people use first, grouped; or all of them."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from dedpo_diffusion.core.options import Option, first_groups
from dedpo_diffusion.core.parser import Parser
from dedpo_diffusion.core.values import needed

MARGIN, WIDEST = 28, 120
LEFT_OUT = re.compile(r"\bNone ([a-z]+s)\b")  # None is Python's


def stage_help(parser: Parser, prog: str, what: str, *, every: bool) -> str:
    """The text of `dedpo STAGE --help`, or with `every` of `--help_all`."""
    options = {name: option for name, option in parser.options.items() if not option.group}
    first = first_groups(parser.settings)
    short = bool(first) and not every
    groups = first if short else _all_groups(options)
    width = min(shutil.get_terminal_size().columns, WIDEST)
    shown = [option.shown + (" ..." if option.many else "") for option in parser.positional]
    calls = [text if option.required else f"[{text}]" for text, option in zip(shown, parser.positional, strict=True)]
    calls += [f"{option.shown} {_place(option)}" for option in options.values() if option.required and not option.positional]
    lines = [*_wrapped(f"usage: {' '.join([prog, *calls])} [options]", width, " " * 7), "", *_wrapped(what, width)]
    for title, names in groups.items():
        lines += ["", title, *(line for name in names for line in _rows(options[name], width))]
    rest = len(options) - sum(map(len, groups.values()))
    lines += ["", *_wrapped("--config FILE takes options from a YAML file, or from a recipe by its name (`dedpo recipes`).", width)]
    if short and rest > 0:
        lines += _wrapped(f"`{prog} --help_all` shows {'the other option' if rest == 1 else f'{rest} more options'}.", width)
    return "\n".join(lines)


def _all_groups(options: dict[str, Option]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(options, key=lambda name: "." in name):
        found.setdefault(name.rpartition(".")[0] or "options", []).append(name)
    return found


def _rows(option: Option, width: int) -> Iterator[str]:
    head = f"  {option.shown}" if option.positional else f"  {option.shown} {_place(option)}"
    body = textwrap.wrap(about(option), max(width - MARGIN, 30), break_on_hyphens=False)
    if len(head) > MARGIN - 2:
        yield head
        head = ""
    yield f"{head:<{MARGIN}}{body[0]}"
    yield from (" " * MARGIN + line for line in body[1:])


def about(option: Option) -> str:
    """What an option does, which values it takes and which it has when it is left out."""
    from dedpo_diffusion.core import plugins

    added = plugins.names(*option.field.metadata.get("plugins", ()))
    text = LEFT_OUT.sub(r"left out, it \1", option.text).rstrip(".")
    parts = [text + "." if text else ""]
    parts += [f"Of other packages: {', '.join(added)}."] if added else []
    takes = needed(option.hint)
    chosen = "one of" in takes or "true or false" in takes or " or " in takes
    if chosen:
        parts.append(f"{takes[0].upper()}{takes[1:]}.")
    return " ".join(filter(None, parts)) + f" [{_default(option)}]"


def _default(option: Option) -> str:
    if option.required:
        return "required"
    field = option.field
    default: Any = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[operator]
    if default is None or default in ([], {}, ()):
        return "none"
    shown = {True: "true", False: "false"}[default] if isinstance(default, bool) else None
    if isinstance(default, list | tuple):
        shown = " ".join(map(str, default))
    return f"default {default if shown is None else shown}"


def _place(option: Option) -> str:
    return option.name.rpartition(".")[2].upper() + (" ..." if option.many else "")


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
