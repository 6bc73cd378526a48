"""Values of options, read by their type from what was typed or stands in a YAML file; what does not fit is said in English."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dedpo_diffusion.core.options import alternatives, field_docs
from dedpo_diffusion.core.texts import misfit, shown

TRUE, FALSE, NONE = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")
OTHER_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # what no byte of a file name becomes
YAML_FLOATS = {".nan": "nan", ".inf": "inf", "+.inf": "inf", "-.inf": "-inf"}  # stages say what is wrong with them where they do not fit


class Misfit(Exception):
    """A value that does not fit; its text goes behind the option's name. `line` is that of a YAML file, from 1."""

    def __init__(self, words: str, line: int | None = None, key: str = "") -> None:
        super().__init__(words)
        self.words, self.line, self.key = words, line, key


def scalar(text: str) -> yaml.ScalarNode:
    """A word of a command line as YAML has it; none is empty there."""
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=None if text else "'")


def composed(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, each with its line.

    Raises:
        Misfit: it is none.
    """
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        row = "" if mark is None else (text.splitlines() or [""])[min(mark.line, max(len(text.splitlines()) - 1, 0))]
        if "\t" in row:
            raise Misfit("a tab; use spaces", line) from error
        raise Misfit(f"this is not valid YAML: {error.problem or error.context}", line) from error
    except yaml.YAMLError as error:
        raise Misfit(f"this is not valid YAML: {' '.join(str(error).split())}") from error


def words_value(words: Sequence[str], hint: Any) -> Any:
    """The value of an option that takes several words: `A B`, or one JSON list, or null.

    Raises:
        Misfit: it does not fit.
    """
    first = words[0] if len(words) == 1 else ""
    if first.startswith("[") and first.endswith("]"):
        return value(_whole(first), hint)
    if len(words) == 1:
        others = [part for part in alternatives(hint) if typing.get_origin(part) not in (list, tuple) and part is not str]
        try:
            return value(scalar(first), typing.Union[tuple(others)]) if others else _listed([scalar(first)], hint)  # noqa: UP007
        except Misfit:
            pass
    return _listed([scalar(word) for word in words], hint)


def word_value(word: str, hint: Any) -> Any:
    """The value of an option that takes one word; JSON where it is a table.

    Raises:
        Misfit: it does not fit.
    """
    kinds = [typing.get_origin(part) or part for part in alternatives(hint)]
    if dict in kinds or any(dataclasses.is_dataclass(kind) for kind in kinds):
        return value(_whole(word), hint)
    return value(scalar(word), hint)


def _whole(text: str) -> yaml.Node:
    return composed(text) or scalar("null")


def _listed(nodes: list[Any], hint: Any) -> Any:
    kinds = [part for part in alternatives(hint) if typing.get_origin(part) in (list, tuple)]
    return value(yaml.SequenceNode("tag:yaml.org,2002:seq", nodes), kinds[0])


def value(node: yaml.Node, hint: Any) -> Any:
    """What a node holds, as a type asks for it.

    Raises:
        Misfit: it does not fit.
    """
    parts = alternatives(hint)
    if type(None) in parts and isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in NONE:
        return None
    parts = tuple(part for part in parts if part is not type(None))
    if not parts:
        raise Misfit("it takes null")
    for part in parts:
        try:
            return _one(node, part)
        except Misfit:
            if len(parts) == 1:
                raise
    raise _misfit(node, f"it takes {needed(hint)}{_meant(node, hint)}")


def _one(node: yaml.Node, hint: Any) -> Any:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(node, typing.cast(type, hint))
    if origin in (list, tuple):
        return _several(node, hint, origin, inside)
    if origin is dict or hint is dict:
        return _table(node, inside)
    if hint is Any:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    if not isinstance(node, yaml.ScalarNode):
        raise _misfit(node, f"it takes {needed(hint)}")
    text = node.value
    if origin is typing.Literal:
        for part in inside:
            if str(part) == text:
                return part
        raise _misfit(node, f"it takes {needed(hint)}{_meant(node, hint)}")
    return _plain(node, text, hint)


def _plain(node: yaml.ScalarNode, text: str, hint: Any) -> Any:
    if hint is bool and text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    if hint in (int, float):
        try:
            return hint(YAML_FLOATS.get(text.lower(), text))
        except ValueError:
            pass
    elif hint is not bool and (text or (node.style is not None and hint is str)):
        return hint(_holdable(node, text, hint))
    raise _misfit(node, f"it takes {needed(hint)}")


def _holdable(node: yaml.ScalarNode, text: str, hint: Any) -> str:
    """A text that files can hold; file names that are no UTF-8 stay as Python has them."""
    wrong = misfit(text)
    if wrong is None or ("\0" not in text and not OTHER_HALF.search(text) and (hint is Path or os.path.exists(text))):
        return text
    raise Misfit(f"{shown(text)} {wrong}; mend it", None if node.start_mark is None else node.start_mark.line + 1)


def _several(node: yaml.Node, hint: Any, origin: Any, inside: tuple[Any, ...]) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        raise _misfit(node, f"it takes {needed(hint)}")
    every = [inside[0]] * len(node.value) if origin is list or inside[-1] is Ellipsis else list(inside)
    if len(every) != len(node.value):
        raise _misfit(node, f"it takes {needed(hint)}, and {len(node.value)} {'is' if len(node.value) == 1 else 'are'} given")
    return origin(value(part, kind) for part, kind in zip(node.value, every, strict=True))


def _table(node: yaml.Node, inside: tuple[Any, ...]) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _misfit(node, 'it takes a table such as {"name": "value"}')
    key, held = inside or (Any, Any)
    return {value(name, key): value(part, held) for name, part in node.value}


def _dataclass(node: yaml.Node, kind: type) -> Any:
    """One of a list of dataclasses."""
    if not isinstance(node, yaml.MappingNode):
        raise _misfit(node, "it takes a table of settings")
    hints, given = typing.get_type_hints(kind), {}
    for name, part in node.value:
        if name.value not in field_docs(kind) and name.value not in hints:
            raise Misfit(f"there is no {name.value!r} in it; it takes {either(list(hints))}", name.start_mark and name.start_mark.line + 1)
        given[name.value] = value(part, hints[name.value])
    return kind(**given)


def needed(hint: Any) -> str:
    """What a type takes, in English."""
    parts = [part for part in alternatives(hint) if part is not type(None)]
    if len(parts) > 1:
        named = str in parts and any(typing.get_origin(part) is typing.Literal for part in parts)  # or of a plugin
        return needed(parts[0]) if named else " or ".join(map(needed, parts))
    (part,) = parts
    inside = typing.get_args(part)
    if typing.get_origin(part) is typing.Literal:
        return (f"one of {either([str(one) for one in inside])}") if len(inside) > 1 else str(inside[0])
    if typing.get_origin(part) is tuple:
        return f"{len(inside)} {'whole numbers' if inside[0] is int else 'numbers'}, separated by a blank"
    if typing.get_origin(part) is list:
        several = {int: "whole numbers", float: "numbers", Path: "paths", str: "words"}.get(inside[0], "values")
        return f"{several}, separated by blanks"
    return {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a text"}.get(part, "a table")


def either(names: Sequence[str]) -> str:
    """Names as "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _meant(node: yaml.Node, hint: Any) -> str:
    known = [str(one) for part in alternatives(hint) if typing.get_origin(part) is typing.Literal for one in typing.get_args(part)]
    found = difflib.get_close_matches(str(node.value), known, n=1) if isinstance(node, yaml.ScalarNode) else []
    return f"; did you mean {found[0]}?" if found else ""


def _misfit(node: yaml.Node, words: str) -> Misfit:
    mark = node.start_mark
    line = None if mark is None else mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Misfit(f"{node.value!r} does not fit; {words}" if node.value else f"nothing is given; {words}", line)
    what = "a list" if isinstance(node, yaml.SequenceNode) else "a table"
    return Misfit(f"{what} does not fit; {words}" if "are given" not in words and "is given" not in words else words, line)
