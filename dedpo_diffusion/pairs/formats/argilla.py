"""Argilla's records: the folder of `Dataset.to_disk`, `records.to_json`, and what `records.to_datasets` gives.

    to_disk, to_json   [{"id", "fields": {...}, "metadata": {...}, "responses": {question: [{"value", "user_id"}]}, ...}]
    to_datasets        fields and metadata as columns, QUESTION.responses, QUESTION.responses.users, QUESTION.responses.status

Save what `to_datasets` gives with its `save_to_disk`, `to_parquet` or `to_json`.

Traps of the format:
* Only a submitted response is an answer. Drafts and discarded ones are counted. The JSON of to_disk and to_json does not
  say which are submitted: all with a value count, and how many is said. Where people leave drafts, use to_datasets.
* People are named by the ids that the server gave them.
* Images are data URIs; to_datasets writes some of them again as files, and a JPEG loses a little each time.
* Suggestions are of models, and no answers. They are counted.
* Of several questions, --columns '{"answer": "name"}' chooses one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats import open_image_preferences
from dedpo_diffusion.pairs.formats.annotated import (
    ANSWERS,
    LEFT_IS,
    OPTIONS,
    PAIR_ID,
    Roles,
    Said,
    about_image_0,
    as_list,
    check_options,
    count_again,
    earlier_answers,
    find_image,
    find_roles,
    grouped,
    kept_values,
    only,
    read_choice,
    together,
    which_is_left,
)
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, text
from dedpo_diffusion.pairs.formats.sources import Row, Source
from dedpo_diffusion.pairs.formats.table import IMAGES
from dedpo_diffusion.settings import IngestSettings

__all__ = ["NEEDS", "OPTIONS", "OWN", "READ", "WINNER_FIRST", "entries", "recognise", "regroup"]

WINNER_FIRST = False
NEEDS = "fields and responses, or columns named QUESTION.responses and QUESTION.responses.users"
RESPONSES = ".responses"
OWN = (("fields", "responses"), ("choice.responses", "choice.responses.users"))
READ = ()
RECORDS = ("id", "status", "_server_id", "score", "vectors", "suggestions", "fields", "metadata", "responses")  # a record's own values
SUBMITTED = ("submitted", None)


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    if open_image_preferences.recognise(columns, row):
        return None
    if {"fields", "responses"} <= set(columns):
        return "columns fields, responses"
    flat = [name for name in columns if name.endswith(RESPONSES) and f"{name}.users" in columns]
    return f"columns {flat[0]}, {flat[0]}.users" if flat else None


def regroup(source: Source) -> Source:
    """The records of one pair together."""
    return grouped(source, _key)


def _key(row: Row) -> str | None:
    held = _held(row)
    return f"pair {held[PAIR_ID]}" if held.get(PAIR_ID) is not None and held.get(LEFT_IS) is not None else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a record, with one answer a submitted response.

    Raises:
        UserError: values that cannot be told apart, an unknown answer, or two records of one name that differ.
    """
    check_options(settings.columns)
    records = together(row, where)
    noted: Counter[str] = Counter()
    first = records[0][1]
    values = _held(first)
    names = [name for name, value in values.items() if name not in (ANSWERS, LEFT_IS, PAIR_ID) and value is not None]
    roles = find_roles(names, settings.columns, where)
    left_is = which_is_left(values, where)
    answers = earlier_answers(values.get(ANSWERS), where)
    fresh = _fresh_answers(records, roles, settings.columns, noted)
    count_again(fresh, noted)
    shown = [find_image(values.get(name), folder, f"{where}, {name}", noted) for name in (roles.left, roles.right)]
    image_0, image_1 = shown if left_is == "image_0" else shown[::-1]
    noted["records that came again, read together with the first"] += len(records) - 1
    ours = values.get(LEFT_IS) is not None and values.get(PAIR_ID) is not None
    yield Comparison(
        where,
        text(values.get(roles.prompt), f"{where}, {roles.prompt}"),
        (image_0, image_1),
        (*answers, *fresh),
        key=None if first.get("id") is None else str(first["id"]),
        source={"record": first.get("id")} | kept_values(values, (roles.prompt, roles.left, roles.right)),
        pair_id=str(values[PAIR_ID]) if ours else None,
        noted={words: number for words, number in noted.items() if number},
    )


def _held(row: Row) -> dict[str, Any]:
    """A record's fields and metadata by their names; two images in one field of HTML are taken out of it."""
    if isinstance(row.get("fields"), Mapping):
        values = {**row["fields"], **(row.get("metadata") or {})}
    else:
        values = {name: value for name, value in row.items() if name not in RECORDS and RESPONSES not in name and ".suggestion" not in name}
    for name, value in list(values.items()):
        if isinstance(value, Mapping) and any(set(pair) <= set(value) for pair in IMAGES):
            values |= values.pop(name)
    return values


# ---- responses


def _fresh_answers(records: list[tuple[str, Row]], roles: Roles, options: Mapping[str, str], noted: Counter[str]) -> list[Answer]:
    """The answers given in the tool, about image_0."""
    found: list[Answer] = []
    prompt = _held(records[0][1]).get(roles.prompt)
    for where, record in records:
        values = _held(record)
        if values.get(roles.prompt) != prompt:
            raise UserError(f"{where} has the name of a pair in {records[0][0]}, and another prompt; export the pairs again")
        noted["suggestions of models, which are no answers"] += _suggestions(record)
        responses = _responses(record, where)
        name = only(responses, options, where)
        said = [one for one in _said(responses.get(name or "", []), where, roles, options, noted) if one is not None]
        found += about_image_0(said, which_is_left(values, where), noted)
    return found


def _suggestions(record: Row) -> int:
    nested = record.get("suggestions")
    flat = [name for name, value in record.items() if name.endswith(".suggestion") and value is not None]
    return len(nested) if isinstance(nested, Mapping) else len(flat)


def _responses(record: Row, where: str) -> dict[str, list[tuple[Any, Any, Any]]]:
    """By question, each response as (value, user, status); status "unknown" where the export does not tell it."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        return {name: _nested(as_list(all_, f"{where}: responses of {name}"), f"{where}: {name}") for name, all_ in nested.items() if all_}
    found = {}
    for name in record:
        if name.endswith(RESPONSES) and record[name] is not None:
            values = as_list(record[name], f"{where}: {name}")
            users, statuses = (_beside(record, f"{name}.{part}", len(values), where) for part in ("users", "status"))
            found[name.removesuffix(RESPONSES)] = list(zip(values, users, statuses, strict=True))
    return found


def _nested(responses: list[Any], where: str) -> list[tuple[Any, Any, Any]]:
    if not all(isinstance(one, Mapping) for one in responses):
        raise UserError(f"{where}: a response is no object with value and user_id; export it again")
    return [(one.get("value"), one.get("user_id"), one.get("status", "unknown")) for one in responses]


def _beside(record: Row, name: str, count: int, where: str) -> list[Any]:
    """The list that goes with the responses; of a missing one nothing is known."""
    if record.get(name) is None:
        return ["unknown" if name.endswith("status") else None] * count
    found = as_list(record[name], f"{where}: {name}")
    if len(found) != count:
        raise UserError(f"{where}: there are {count} responses, and {name} has {len(found)} items; export it again")
    return found


def _said(
    responses: list[tuple[Any, Any, Any]], where: str, roles: Roles, options: Mapping[str, str], noted: Counter[str]
) -> Iterator[Said | None]:
    for value, user, status in responses:
        if status == "draft":
            noted["drafts, which nobody submitted"] += 1
        elif status == "discarded":
            noted["discarded responses, which have no answer"] += 1
        elif value is None:
            noted["responses without an answer"] += 1
        elif status in (*SUBMITTED, "unknown"):
            noted["responses of which the export does not tell whether they were submitted, taken as answers"] += status != "submitted"
            yield Said(read_choice(value, roles, options, where), None if user in (None, "None", "") else str(user))
        else:
            raise UserError(f"{where}: a response has the status {status!r}, and must be submitted, draft or discarded; export it again")
