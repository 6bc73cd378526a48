"""The frame of the project's pages: one HTML file with its style and script, no network; and the parts that they share."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from dedpo_diffusion.core.charts import colour


def document(title: str, body: str, *, script: str = "", data: str = "") -> str:
    """A whole HTML page, which its policy forbids to fetch anything and to run any script but this one.

    Args:
        title: text.
        body: HTML.
        script: JavaScript; it runs when the body is there, before the data is.
        data: HTML at the very end, which the first view of the page does not wait for.
    """
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{page_file('page.css')}</style>"
    )
    run = f"<script>{script}</script>" if script else ""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}</main>{run}{data}</body></html>\n'


def page_file(name: str, room: str = "dedpo_diffusion.core") -> str:
    """A file of the folder page_files of a room."""
    return (files(room) / "page_files" / name).read_text(encoding="utf-8")


def shown(value: Any, form: str = ".3f") -> str:
    """A number with a true minus sign; texts as they are, nothing as a dash, a value with its interval."""
    if isinstance(value, dict):
        interval = value.get("ci")
        tail = f" ({shown(float(interval[0]), form)} to {shown(float(interval[1]), form)})" if interval else ""
        return shown(value.get("value", value.get("mean")), form) + tail
    if isinstance(value, float):
        return format(value, form).replace("-", "\N{MINUS SIGN}")
    return "–" if value is None else str(value)


def section(title: str, *parts: str) -> str:
    """A titled part of the page, which links find by the title's first word, or nothing if it holds nothing."""
    body = "".join(parts)
    return f'<section><h2 id="{escape(title.split()[0].lower())}">{escape(title)}</h2>{body}</section>' if body else ""


def about(text: str) -> str:
    """A paragraph that explains; nothing without text."""
    return f'<p class="about">{escape(text)}</p>' if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """A table that scrolls sideways on a narrow screen; cells are HTML, the first column names the row; `titles` explain headings."""
    top = "".join(f'<th title="{escape(titles[cell])}">{cell}</th>' if cell in titles else f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr><th>" + row[0] + "</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def dot(series: int) -> str:
    """The coloured mark of an arm."""
    return f'<i class="dot" style="background:{colour(series)}"></i>'
