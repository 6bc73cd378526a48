"""Prompts to sample: bundled sets, the published lists of HPSv2, and your own files.

| source | what it is |
|---|---|
| parti | PartiPrompts, 1632 prompts of 12 categories (bundled, Apache-2.0) |
| geneval | GenEval, 553 prompts of 6 categories (bundled, MIT) |
| hpsv2 | HPSv2's benchmark, 4 styles of 800 prompts, from the hub or its cache |
| a folder | one that holds the four lists of HPSv2 |
| .json, .jsonl, .csv, .tsv, .parquet | a list of prompts, or rows with a prompt and, if they say so, a category |
| any other file | text, one prompt a line |

Blanks at the ends of a prompt and empty lines are left out. A prompt's place in the whole set is its index, whatever is picked from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import misfit
from dedpo_diffusion.sampling.sampler import Prompt

CARRIED = {"parti": "parti.tsv", "geneval": "geneval.jsonl"}
HPSV2, HPSV2_HUB = "hpsv2", "zhwang/HPDv2"
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2, in the order of its own table
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COLUMNS = {"prompt": ("prompt", "Prompt", "caption"), "category": ("category", "Category", "tag")}


def read_prompts(source: str | Path, *, categories: Sequence[str] = (), limit: int | None = None) -> list[Prompt]:
    """The prompts of a set, a folder or a file, in its order.

    Args:
        source: as in this module's table.
        categories: keep these alone; empty keeps all.
        limit: keep this many, spread over the categories by `spread_evenly`; None keeps all.

    Raises:
        UserError: a source that is not there or cannot be read, a row without a prompt, a category that no prompt has, or fewer
            prompts than `limit`.
    """
    found = _read(str(source))
    if not found:
        raise UserError(f"{source}: no prompt in it; write one prompt per line")
    if categories:
        known = list(dict.fromkeys(prompt.category for prompt in found if prompt.category is not None))
        for name in categories:
            if name not in known:
                has = f"its categories are {', '.join(known)}" if known else "its prompts have no categories"
                raise UserError(f"{source}: no prompt of category {name!r}; {has}")
        found = [prompt for prompt in found if prompt.category in categories]
    return found if limit is None else spread_evenly(found, limit, str(source))


def spread_evenly(prompts: Sequence[Prompt], limit: int, source: str) -> list[Prompt]:
    """`limit` prompts, as many of each category as of any other, in their order.

    Rule: every category gives the same number; where one has fewer, it gives all, and the others share the rest. What does not
    divide evenly goes to the categories that come first. A category of n prompts gives k of them from places
    floor(i n / k), i = 0 ... k - 1. Prompts without a category are one more.

    Raises:
        UserError: a limit below 1, or above the number of prompts.
    """
    if not 1 <= limit <= len(prompts):
        raise UserError(f"limit {limit}: {source} has {len(prompts)} prompts to choose from; give a number from 1 to {len(prompts)}")
    groups: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    shares, left = dict.fromkeys(groups, 0), limit
    while left:
        for name in [name for name, group in groups.items() if shares[name] < len(group)][:left]:
            shares[name] += 1
            left -= 1
    picked = [group[i * len(group) // shares[name]] for name, group in groups.items() for i in range(shares[name])]
    return sorted(picked, key=lambda prompt: prompt.index)


def _read(source: str) -> list[Prompt]:
    if source in CARRIED:
        return _rows(Path(str(files(__name__) / CARRIED[source])))
    if source == HPSV2:
        return _hpsv2({style: _from_hub(f"benchmark/{style}.json") for style in STYLES})
    path = Path(source)
    if path.is_dir():
        lists = {style: path / f"{style}.json" for style in STYLES}
        missing = [file.name for file in lists.values() if not file.is_file()]
        if missing:
            raise UserError(
                f"{path}: a folder of prompts holds HPSv2's {', '.join(f'{s}.json' for s in STYLES)}, and {missing[0]} is missing"
            )
        return _hpsv2(lists)
    if path.suffix.lower() in TABLES and path.is_file():
        listed = _strings(path) if path.suffix.lower() == ".json" else None
        return _rows(path) if listed is None else [Prompt(place, text, None) for place, text in enumerate(listed)]
    return [Prompt(place, text, None) for place, text in enumerate(_lines(path))]


def _lines(path: Path) -> list[str]:
    """The prompts of a text file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits at form feeds, U+2028 and more
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        named = f"a file, a folder, or one of the sets {', '.join((*CARRIED, HPSV2))}"
        raise UserError(f"{path}: cannot be read ({error.strerror}); give {named}") from error
    return [_text(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _strings(path: Path) -> list[str] | None:
    """The prompts of a JSON file that is a list of texts; None where its first entry is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):  # said, with its place, by the reader of rows
        return None
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        return None
    return [_text(value, f"{path} row {row}") for row, value in enumerate(values)]


def _rows(path: Path) -> list[Prompt]:
    """The prompts of a table; columns other than prompt and category are left aside."""
    from dedpo_diffusion.pairs.formats.sources import open_file

    table = open_file(path)
    if not table.columns:
        return []
    names = {}
    for what, known in COLUMNS.items():
        held = [name for name in known if name in table.columns]
        if len(held) > 1:
            raise UserError(f"{path}: columns {' and '.join(held)} could both be the {what}; rename one")
        names[what] = held[0] if held else None
    if names["prompt"] is None:
        has = ", ".join(table.columns)
        raise UserError(f"{path} has no column {' or '.join(COLUMNS['prompt'])} (it has {has}); rename the column of the prompts")
    found = []
    for place, (where, row, _) in enumerate(table.rows()):
        kind = row[names["category"]] if names["category"] else None
        if kind is not None and not isinstance(kind, str):
            raise UserError(f"{where}: {names['category']} is {type(kind).__name__}, and must be text")
        found.append(Prompt(place, _text(row[names["prompt"]], where), (kind or "").strip() or None))
    return found


def _text(value: object, where: str) -> str:
    """A prompt, with the blanks at its ends left out."""
    if not isinstance(value, str):
        raise UserError(f"{where}: a prompt is text, and this is {type(value).__name__}; mend it")
    if not value.strip():
        raise UserError(f"{where}: the prompt is empty; fill it in, or remove the row")
    wrong = misfit(value)
    if wrong is not None:
        raise UserError(f"{where}: the prompt {wrong}; mend it, and save the file as UTF-8")
    return value.strip()


def _hpsv2(lists: dict[str, Path]) -> list[Prompt]:
    found: list[Prompt] = []
    for style, path in lists.items():
        texts = _strings(path)
        if texts is None:
            raise UserError(f"{path}: no JSON list of prompts; take the file of this name from benchmark/ of the dataset {HPSV2_HUB}")
        found += [Prompt(len(found) + place, text, style) for place, text in enumerate(texts)]
    return found


def _from_hub(file: str) -> Path:
    from huggingface_hub import hf_hub_download

    from dedpo_diffusion.models.pretrained import fetching

    remedy = f"take benchmark/{{{','.join(STYLES)}}}.json of the dataset {HPSV2_HUB} elsewhere, and give --prompts FOLDER"
    with fetching("prompts hpsv2", f"{file} of {HPSV2_HUB}", remedy):
        return Path(hf_hub_download(HPSV2_HUB, file, repo_type="dataset"))
