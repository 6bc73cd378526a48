"""What mkdocs does beside rendering pages: it takes along the files outside docs/ that pages link to, and writes the reference.

Nothing here knows a stage, an option or a public name; all of it is read from the code.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import dedpo_diffusion
from dedpo_diffusion import pipelines as cli
from dedpo_diffusion import weights
from dedpo_diffusion.core.options import field_docs

ROOT = Path(__file__).resolve().parents[1]
WHOLE = re.compile(r"^<!-- the file (\S+) -->$", re.M)
OUTSIDE = re.compile(r"\]\((\.\./[^)#\s]+)")
STAGES, NAMES = "<!-- every stage -->", "<!-- every public name -->"


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to outside docs/, as the same link finds it on the repository's own pages."""
    from mkdocs.structure.files import File, InclusionLevel

    for page in list(files.documentation_pages()):
        for link in OUTSIDE.findall(page.content_string):
            name = os.path.normpath(PurePosixPath(page.src_uri).parent / link)
            source = (ROOT / "docs" / name).resolve()
            if name.startswith("..") and source.is_file() and name not in files.src_uris:
                inside = f"files/{source.relative_to(ROOT).as_posix()}"
                file = File(name, str(ROOT / "docs"), config.site_dir, config.use_directory_urls, dest_uri=inside)
                file.inclusion = InclusionLevel.INCLUDED  # two dots in front would leave it out
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the reference, or the text of a file of the repository, where a page asks for it."""
    markdown = WHOLE.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), markdown)
    if STAGES in markdown:
        markdown = markdown.replace(STAGES, "\n".join(stages()))
    return markdown.replace(NAMES, "\n\n".join(f"::: {name}" for name in public_names()))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would fetch something from the network when it is looked at."""
    from mkdocs.exceptions import PluginError

    found = fetched(output)
    if found:
        raise PluginError(f"{page.file.src_uri} would fetch {found[0]}; carry it along")
    return output


def fetched(html: str) -> list[str]:
    """What a page loads from other machines; links that a reader may follow are no part of it."""
    tags = re.findall(r"<(?:script|img|iframe|source|video|link)\b[^>]*>", html)
    places = [place for tag in tags for place in re.findall(r'\b(?:src|href)="([^"]+)"', tag)]
    return [place for place in places if re.match(r"(?:https?:)?//", place)]


# ---- the reference


@dataclasses.dataclass(frozen=True)
class Stage:
    """How a stage reads its command line."""

    name: str
    what: str
    settings: type
    positional: tuple[str, ...]
    flags: dict[str, str]


def read_stage(name: str) -> Stage:
    """What a stage tells `console.stage`, which is not run."""
    module, what = cli.STAGES[name]
    told: dict[str, Any] = {}

    def note(settings: type, body: Any, argv: Any, **options: Any) -> int:
        told.update(options, settings=settings)
        return 0

    found = import_module(f"dedpo_diffusion.{module}")
    real, found.stage = found.stage, note  # type: ignore[attr-defined]
    try:
        found.main([])
    finally:
        found.stage = real  # type: ignore[attr-defined]
    return Stage(name, what, told["settings"], tuple(told.get("positional", ())), dict(told.get("flags") or {}))


def stages() -> Iterator[str]:
    """A section for each stage: its call and a table of its options."""
    for name in cli.STAGES:
        stage = read_stage(name)
        fields = {field.name: field for field in dataclasses.fields(stage.settings)}
        given = [place.upper() + (" ..." if _is_list(stage.settings, place) else "") for place in stage.positional]
        options = {field: option for option, field in stage.flags.items()}
        needed = [f"--{options.get(key, key)} {key.upper()}" for key in fields if _needed(fields[key]) and key not in stage.positional]
        yield f"## dedpo {name}\n\n{stage.what[0].upper()}{stage.what[1:]}.\n"
        yield "```text\n" + " ".join(["dedpo", name, *given, *needed, "[options]"]) + "\n```\n"
        rows = list(options_of(stage.settings))
        for group in dict.fromkeys(key.rpartition(".")[0] for key, *_ in sorted(rows, key=lambda row: "." in row[0])):
            yield f"### {name}: {group}\n" if group else ""
            yield "| option | values | default | what it does |\n|---|---|---|---|"
            for key, hint, default, text in rows:
                if key.rpartition(".")[0] == group:
                    shown = f"`{key.upper()}`" if key in stage.positional else f"`--{options.get(key, key)}`"
                    yield f"| {shown} | {_cell(hint)} | {_cell(default)} | {_cell(text)} |"
            yield ""


def options_of(settings: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, values, default, text) of every option; those of a nested dataclass as "data.pairs"."""
    hints, texts = typing.get_type_hints(settings), field_docs(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        yield f"{prefix}{field.name}", type_words(hint), default_words(field), texts[field.name]


def type_words(hint: Any) -> str:
    """What an option takes, in a user's words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(dict.fromkeys(type_words(part) for part in parts if part is not type(None)))
    if origin is list:
        return f"list of {type_words(parts[0])}s"
    if origin is tuple:
        return f"[{', '.join(type_words(part) for part in parts)}]"
    if origin is dict:
        return f"{{{type_words(parts[0])}: {type_words(parts[1])}}}"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Path: "path"}
    return words[hint]


def default_words(field: dataclasses.Field[Any]) -> str:
    """An option's default; "needed" where it has none."""
    if _needed(field):
        return "needed"
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_list(settings: type, name: str) -> bool:
    return typing.get_origin(typing.get_type_hints(settings)[name]) is list


def _cell(text: str) -> str:
    """Inside a table: one line, and no bar that would end the cell."""
    return " ".join(text.split()).replace("|", r"\|")


def public_names() -> Iterator[str]:
    """Full names of what the package and its `weights` offer."""
    homes = dedpo_diffusion._HOME
    for name in sorted(dedpo_diffusion.__all__, key=lambda name: name in homes):  # the stages first
        yield f"dedpo_diffusion.{homes[name]}.{name}" if name in homes else f"dedpo_diffusion.{name}"
    for name in weights.__all__:
        yield f"{getattr(weights, name).__module__}.{name}"
