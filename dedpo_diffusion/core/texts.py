"""Words and characters in messages: sizes, values, and characters that no text file, file name or tokenizer takes."""

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


def size_words(size: float) -> str:
    """Bytes in decimal units, as shops and file managers give them: 12 bytes, 3.4 kB, 5.6 MB, 7.8 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
