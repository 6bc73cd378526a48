"""Texts of unknown content in Markdown: prompts, names and sentences that must not become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$&]|(?<![^\W_])_|_(?![^\W_]))")
_START = re.compile(r"^(?:([-+=])(?=[-=\s]|$)|(\d+)([.)])(?=\s|$))")


def plain(text: str) -> str:
    """A text in one line that shows as it is."""
    line = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return _START.sub(lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}", line)


def code(text: str, *, cell: bool = False) -> str:
    """A text in one line as inline code; in the cell of a table its bars are escaped."""
    line = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|') if cell else line}{pad}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose cells are Markdown already; [] without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines, ""] if lines else []


def items(texts: Iterable[str]) -> list[str]:
    """The lines of a list of Markdown texts; [] for none."""
    lines = [f"- {text}" for text in texts]
    return [*lines, ""] if lines else []
