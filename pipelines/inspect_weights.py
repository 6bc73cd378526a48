"""Say what a weight file or a folder is, for which base, and which programs read it.

    dedpo inspect lora.safetensors
    dedpo inspect checkpoint.safetensors --hash true
    dedpo inspect runs/mine --json true

Of a model only names and shapes are read, so that gigabytes take a second; of an adapter its weights too. Pickles are never opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dedpo_diffusion.core.console import say, stage
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.settings import InspectSettings

LONGEST = 200  # characters of somebody else's metadata in the table


def _numbers(values: Sequence[float | None], missing: str) -> str:
    """Different numbers: all of a few, the ends of many."""
    known = [value for value in values if value is not None]
    shown = [f"{value:g}" for value in known] if len(known) <= 4 else [f"{known[0]:g} to {known[-1]:g}"]
    return ", ".join([*shown, *([missing] if None in values else [])])


def _part(entry: Mapping[str, Any]) -> str:
    """A part of an adapter or of a model."""
    words = [str(entry["class"])] if "class" in entry else []
    if "layers" in entry:
        words.append(f"{entry['layers']} layers" + (f", {entry['convolutions']} of them convolutions" if entry["convolutions"] else ""))
    words.append(f"{entry['parameters']:,} parameters")
    return ", ".join(words + ([", ".join(entry["dtypes"])] if "dtypes" in entry else []))


def _stored(value: Any) -> str:
    """Something that was stored with the weights; of digests the beginning."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_stored(part)}" for key, part in value.items())
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64,}", text) else text


def table_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The report in two columns."""
    from dedpo_diffusion.weights.base_model import fits_nothing_published
    from dedpo_diffusion.weights.inspection import part_words, settings_in_short

    yield from report["facts"].items()
    for name, entry in (report.get("parts") or {}).items():
        yield part_words(name), _part(entry)
    if report.get("ranks"):
        yield "rank", _numbers(report["ranks"], "")
        yield "alpha", _numbers(report["alphas"], "none stored")
        yield "scale of the change", _numbers(report["scales"], "")
    for name, entry in (report.get("norms") or {}).items():
        largest = ", ".join(f"{item['layer']} {item['norm']:.3g}" for item in entry["largest"][:3])
        yield f"norm of the change, {part_words(name)}", f"{entry['norm']:.4g}; largest: {largest}"
    if "dtypes" in report:
        yield "stored as", ", ".join(report["dtypes"]) or "nothing"
    if "parameters" in report:
        yield "parameters", f"{report['parameters']:,}"
    if "bytes" in report:
        yield "size", size_words(report["bytes"])
    if fits_nothing_published(report):
        yield "fits", "no published model has this shape; use it with the base model that it was trained on"
    else:
        yield from ((f"read by {name}", words) for name, words in (report.get("readers") or {}).items())
    trained = settings_in_short(report)
    if trained:
        yield "trained with", ", ".join(f"{name} {words}" for name, words in trained.items())
    for name, value in (report.get("own") or {}).items():
        yield name, _stored(value)
    for name, text in (report.get("metadata") or {}).items():
        yield name, text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    if "sha256" in report:
        yield "SHA-256", report["sha256"]


def _shown(text: str) -> str:
    """A text of unknown origin for a terminal: without what would steer it."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def print_report(report: Mapping[str, Any]) -> None:
    """The report as a table, files of a folder as another, and what to look out for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "found", title=Text(_shown(report["path"])), box=box.SIMPLE)
    for words, value in table_rows(report):
        table.add_row(Text(_shown(words)), Text(_shown(value), overflow="fold"))
    Console().print(table)
    if "files" in report:
        listed = Table("file", "what", "size", box=box.SIMPLE)
        for entry in report["files"]:
            listed.add_row(Text(_shown(entry["path"]), overflow="fold"), Text(_shown(entry["what"])), size_words(entry["bytes"]))
        Console().print(listed)
    for text in report["warnings"]:
        say(f"Warning: {_shown(text)}")


def _plain(value: Any) -> Any:
    """A value of unknown origin as JSON can hold it: numbers that are not finite, dates and the like as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    fits = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else str(value)


def run(settings: InspectSettings) -> dict[str, Any]:
    """Say what a weight file or a folder is, for which base, and which programs read it."""
    import json
    import sys
    from contextlib import nullcontext, redirect_stdout

    from dedpo_diffusion.weights.inspection import inspect_path

    with redirect_stdout(sys.stderr) if settings.json else nullcontext():  # progress is no part of the JSON
        report = inspect_path(settings.path, hash=settings.hash)
    if settings.json:
        say(json.dumps(_plain(report), indent=2, allow_nan=False))
    else:
        print_report(report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(InspectSettings, run, argv, prog="dedpo inspect", positional=("path",))


if __name__ == "__main__":
    raise SystemExit(main())
