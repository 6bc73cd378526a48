"""The command line of a stage, and the YAML files that it names, as the stage's settings.

| typed | meaning |
|---|---|
| `--targets A B` | a list: all words up to the next option; given again it adds |
| `--targets+ A` | adds to the list of the YAML file |
| `--targets '["A"]'`, `--optim '{"steps": 3}'` | JSON |
| `--card` | as `--card true` |
| `--config FILE` | a YAML file, or a recipe by name; later options override it |
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dedpo_diffusion.core.errors import UserError
from dedpo_diffusion.core.options import Option, alternatives, find_options, near
from dedpo_diffusion.core.recipes import find_config
from dedpo_diffusion.core.texts import shown
from dedpo_diffusion.core.values import Misfit, composed, needed, value, word_value, words_value

S = TypeVar("S")
NUMBER = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$|-inf$", re.I)
LARGEST_SEED = 2**62 - 1  # what all generators take, with room to count up from it
HELP = {"-h": False, "--help": False, "--help_all": True, "--help-all": True}


class Parser:
    """The options of one stage.

    Args:
        settings: its dataclass.
        positional: fields given without a name, in this order.
        flags: option names that differ from their field's, {"with": "scorers"}.
    """

    def __init__(self, settings: type, positional: Sequence[str] = (), flags: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self.options = find_options(settings, positional, flags)
        self.positional = [self.options[name] for name in positional]
        self.fields = {".".join(option.path): option.name for option in self.options.values()}

    def parse(self, arguments: Sequence[str]) -> Any:
        """The settings that a command line asks for.

        Raises:
            UserError: a mistake in it, or in a file that it names.
        """
        given: dict[tuple[str, ...], Any] = {}
        repeated: set[str] = set()
        loose: list[str] = []
        greedy: Option | None = None
        words = list(arguments)
        while words:
            word = words.pop(0)
            if not _is_option(word):
                loose.append(word)
                continue
            name, equals, inline = word[2:].partition("=") if word.startswith("--") else (word, "", "")
            if name == "config":
                self._file(_needs(inline if equals else _next(words), "--config", "a YAML file"), given)
                continue
            option, add = self._find(name)
            taken = [inline] if equals else _taken(option, words)
            if len(taken) > 1:
                greedy = option
            self._set(option, taken, given, add=add or option.name in repeated)
            if option.many:
                repeated.add(option.name)
        self._place(loose, given)
        self._require(given, greedy)
        return self._built(self.settings, (), given)

    def keywords(self, given: Mapping[str, Any]) -> Any:
        """The settings that keyword arguments ask for: values of Python, nested settings as tables or objects, `config` a YAML file.

        Raises:
            UserError: a mistake in them, or in the file.
        """
        options = {name: self._of_python(name, part) for name, part in given.items()}
        found: dict[tuple[str, ...], Any] = {}
        config = options.pop("config", None)
        try:
            for name in [config] if isinstance(config, str) else config or []:
                self._file(name, found)
            self._mapping(_mapping_of(yaml.safe_dump(options, sort_keys=False)), (), found)
        except Misfit as error:
            raise UserError(f"{error.key}: {error.words}" if error.key else error.words) from error
        except yaml.representer.RepresenterError as error:
            raise UserError(f"{type(error.args[1]).__name__} is no value of a setting; give text, numbers, lists or tables") from error
        missing = [".".join(option.path) for option in self.options.values() if option.required and option.path not in found]
        if missing:
            raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        return self._built(self.settings, (), found)

    def _of_python(self, name: str, given: Any) -> Any:
        """A keyword argument as YAML holds it; one text stands for a list of it where only a list will do."""
        option, found = self._known(name), _plain(given)
        kinds = [] if option is None else [typing.get_origin(part) for part in alternatives(option.hint) if part is not type(None)]
        return [found] if isinstance(found, str) and kinds and all(kind is list for kind in kinds) else found

    # ---- options

    def _known(self, name: str) -> Option | None:
        """An option by its name or its field's, or an entry of one that is a table."""
        return self.options.get(name) or self.options.get(self.fields.get(name, "")) or self._of_table(name)

    def _find(self, name: str) -> tuple[Option, bool]:
        option = self._known(name)
        if option is None and name.endswith("+"):
            option = self._find(name[:-1])[0]
            if not option.many:
                raise UserError(f"{option.shown} takes one value, so nothing can be added to it; leave the + out")
            return option, True
        if option is None:
            shown = name if name.startswith("-") else f"--{name}"
            meant = [f"--{other}" for other in near(name.lstrip("-"), self.options, self.settings)]
            tail = f"; did you mean {' or '.join(meant)}?" if meant else ""
            raise UserError(f"there is no option {shown}{tail}")
        if option.positional:
            raise UserError(f"there is no option --{name}; {option.shown} is given without a name")
        return option, False

    def _of_table(self, name: str) -> Option | None:
        """An entry of an option that is a table, as "columns.prompt"."""
        table, _, key = name.rpartition(".")
        option = self.options.get(table)
        if option is None or typing.get_origin(option.hint) is not dict:
            return None
        return dataclasses.replace(option, name=name, path=(*option.path, key), hint=typing.get_args(option.hint)[1])

    def _set(self, option: Option, taken: list[str], given: dict[tuple[str, ...], Any], *, add: bool) -> None:
        try:
            if option.group:
                self._mapping(_mapping_of(taken[0]), option.path, given)
                return
            found = _admitted(option, words_value(taken, option.hint) if option.many else word_value(taken[0], option.hint))
        except Misfit as error:
            key = f" ({error.key})" if error.key else ""
            raise UserError(f"{option.shown}{key}: {error.words}") from error
        if add and isinstance(found, list) and isinstance(given.get(option.path), list):
            found = given[option.path] + found
        given[option.path] = found

    def _place(self, loose: list[str], given: dict[tuple[str, ...], Any]) -> None:
        """Give the words without a name to the arguments without one."""
        for place, option in enumerate(self.positional):
            after = len(self.positional) - place - 1
            count = max(len(loose) - after, 0) if option.many else min(len(loose), 1)
            if count:
                self._set(option, [loose.pop(0) for _ in range(count)], given, add=False)
        if loose:
            meant = near(loose[0], self.options, self.settings)
            wanted = ", ".join(option.shown for option in self.positional)
            usual = "out" if "out" in self.options else next(iter(self.options))
            tail = f"did you mean --{meant[0]}?" if meant else f"the options of this stage have names, such as --{usual}"
            tail = f"it takes {wanted}, then options" if wanted and not meant else tail
            raise UserError(f"nothing takes {loose[0]!r}; {tail}")

    def _require(self, given: Mapping[tuple[str, ...], Any], greedy: Option | None) -> None:
        missing = [option for option in self.options.values() if option.required and option.path not in given]
        if not missing:
            return
        first = missing[0]
        if len(missing) > 1:
            shown = [option.shown for option in missing]
            raise UserError(f"{', '.join(shown[:-1])} and {shown[-1]} are missing")
        eaten = first.positional and greedy is not None
        tail = f"; give it before {greedy.shown}, which takes all words that follow" if eaten and greedy is not None else ""
        raise UserError(f"{first.shown} is missing: {first.text.rstrip('.')}{tail}")

    # ---- files

    def _file(self, name: str, given: dict[tuple[str, ...], Any]) -> None:
        path: Any = "--config" if name.lstrip().startswith("{") else find_config(name)
        try:
            text = name if path == "--config" else Path(path).read_text(encoding="utf-8")
            node = composed(text)
            if node is not None:
                self._mapping(node, (), given)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: this is not a text file in UTF-8; give a YAML file") from error
        except Misfit as error:
            line = "" if error.line is None or path == "--config" else f" line {error.line}"
            key = f" {error.key}:" if error.key else ""
            raise UserError(f"{path}{line}:{key} {error.words}") from error

    def _mapping(self, node: yaml.Node, path: tuple[str, ...], given: dict[tuple[str, ...], Any]) -> None:
        """Take the options of a table, below `path`."""
        where = ".".join(path)
        if not isinstance(node, yaml.MappingNode):
            raise Misfit("this must be a table of settings, such as `seed: 0`", _line(node), where)
        for key, part in node.value:
            name = ".".join(filter(None, (where, str(key.value))))
            option = self._known(name)
            if option is None:
                meant = near(name, self.options, self.settings)
                shown = [other.removeprefix(f"{where}.") if where else other for other in meant]
                tail = f"; did you mean {' or '.join(shown)}?" if shown else ""
                raise Misfit(f"there is no option {name}{tail}", _line(key))
            if option.group:
                self._mapping(part, option.path, given)
                continue
            try:
                given[option.path] = _admitted(option, value(part, option.hint))
            except Misfit as error:
                raise Misfit(error.words, error.line or _line(key), ".".join(filter(None, (name, error.key)))) from error

    # ---- the settings

    def _built(self, kind: type, path: tuple[str, ...], given: Mapping[tuple[str, ...], Any]) -> Any:
        hints, values = typing.get_type_hints(kind), {}
        for field in dataclasses.fields(kind):
            inside = (*path, field.name)
            if dataclasses.is_dataclass(hints[field.name]):
                if any(other[: len(inside)] == inside for other in given) or not _has_default(field):
                    values[field.name] = self._built(typing.cast(type, hints[field.name]), inside, given)
                continue
            entries = {other[-1]: part for other, part in given.items() if len(other) == len(inside) + 1 and other[:-1] == inside}
            if inside in given or entries:
                values[field.name] = {**given.get(inside, {}), **entries} if entries else given[inside]
        return kind(**values)


def _plain(given: Any) -> Any:
    """A value of Python as YAML holds it."""
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: _plain(getattr(given, field.name)) for field in dataclasses.fields(given)}
    if isinstance(given, Path):
        return str(given)
    if isinstance(given, Mapping):
        return {key: _plain(part) for key, part in given.items()}
    if isinstance(given, list | tuple):
        return [_plain(part) for part in given]
    return given.item() if hasattr(given, "item") and hasattr(given, "dtype") and not getattr(given, "shape", ()) else given


def _admitted(option: Option, found: Any) -> Any:
    """The value, unless it is a seed that no generator takes: other programs have -1 stand for a random one.

    Raises:
        Misfit: it is.
    """
    if option.path[-1] == "seed" and isinstance(found, int) and not 0 <= found <= LARGEST_SEED:
        random = " (-1 is no random seed here: a run can be made again)" if found < 0 else ""
        raise Misfit(f"{shown(found)} does not fit; it takes a whole number from 0 to {LARGEST_SEED}{random}")
    return found


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _line(node: yaml.Node) -> int | None:
    return None if node.start_mark is None else node.start_mark.line + 1


def _mapping_of(text: str) -> yaml.Node:
    return composed(text) or yaml.MappingNode("tag:yaml.org,2002:map", [])


def _is_option(word: str) -> bool:
    """Whether a word names an option; a negative number does not, nor a lone dash."""
    return word.startswith("-") and word != "-" and not NUMBER.match(word)


def _next(words: list[str]) -> str | None:
    return words.pop(0) if words and not _is_option(words[0]) else None


def _needs(word: str | None, shown: str, what: str) -> str:
    if word is None or word == "":
        raise UserError(f"{shown} needs {what} behind it")
    return word


def _taken(option: Option, words: list[str]) -> list[str]:
    """The words behind an option that belong to it."""
    if option.many:
        found = []
        while (word := _next(words)) is not None:
            found.append(word)
        if found:
            return found
    else:
        word = _next(words)
        if word is not None:
            return [word]
        if bool in alternatives(option.hint):
            return ["true"]
    what = "a table of settings" if option.group else needed(option.hint)
    raise UserError(f"{option.shown} needs a value: {what}")
