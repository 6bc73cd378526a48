"""What a file that leaves this machine must not tell of it: absolute paths, and the machine's name."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from dedpo_diffusion.core.errors import UserError

# an absolute path of two parts or more, of this system or Windows, or one of a home; not the tail of an address, tag or fraction. A
# backslash before a letter of it may be Markdown's.
PATH = re.compile(
    r"(?<![\w/:.<~*-])(?:~?(?:/(?:\\?[\w.@+~-])+){2,}/?|\\?~/(?:\\?[\w.@+-])+|[A-Za-z]:(?:\\+[\w.@+-]+)+\\*|[A-Za-z]:(?:/[\w.@+-]+)+/?)"
)


def without_paths(value: Any) -> Any:
    """A JSON value with every absolute path in its texts cut to its last name."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and PATH.match(value):  # one with blanks in it, too
        value = PureWindowsPath(value).name
    return cut(value) if isinstance(value, str) else value


def cut(text: str) -> str:
    """A text with every absolute path in it cut to its last name."""
    return PATH.sub(lambda match: PureWindowsPath(match[0]).name, text)


def check_private(where: str, text: str, remedy: str = "take that out, or export again from its own run") -> None:
    """See to it that a text tells nothing of this machine.

    Raises:
        UserError: there is an absolute path in it, or the machine's name.
    """
    host = platform.node()
    names = [] if len(host) < 4 or host == "localhost" else re.findall(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text)
    home = str(Path.home())
    homes = [home] if len(home) > 2 and re.search(rf"{re.escape(home)}(?![\w-])", text) else []
    found = [match[0] for match in PATH.finditer(text)] + names + homes
    if found:
        raise UserError(f"{where} tells of this machine ({found[0]!r}), so nothing is sent; {remedy}")
