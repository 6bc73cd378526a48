"""Characters that no text file, file name or tokenizer takes: NUL, and half a character (a lone surrogate, as JSON can write it)."""

from __future__ import annotations

import re

HALF = re.compile("[\ud800-\udfff]")
SHORT = 80  # characters of a value that a message shows


def misfit(text: str) -> str | None:
    """What in a text no file can hold, in words; None where all of it can be held."""
    if "\0" in text:
        return "holds a NUL character"
    half = HALF.search(text)
    return None if half is None else f"holds half a character (\\u{ord(half[0]):04x} without its other half)"


def shown(value: object) -> str:
    """A value as a message shows it: on one line, of bearable length."""
    said = repr(value)
    return said if len(said) <= SHORT else f"{said[:SHORT]}... ({len(said)} characters)"
