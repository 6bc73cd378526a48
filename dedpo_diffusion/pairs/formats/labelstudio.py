"""Label Studio's exports JSON and JSON-MIN, of tasks that `dedpo pairs export` wrote and of anybody's own pairs.

    JSON      [{"id", "data": {...}, "annotations": [{"result": [...], "completed_by", "was_cancelled", ...}], "drafts", ...}]
    JSON-MIN  [{the task's data, "id", the answers by name, "annotator", "annotation_id", "created_at", ...}], an annotation a row

Traps of the format:
* A skipped task is an annotation with was_cancelled, and no answer. JSON-MIN leaves it out: export JSON where that matters.
* The export of the page leaves out tasks that nobody annotated, unless all tasks are asked for (download_all_tasks=true).
* completed_by is a number, or an object with the address of the person; so is annotator. The address counts where it is there.
* Drafts and predictions of models are no answers. They are counted.
* A person may annotate a task several times, and a task may be imported twice. All answers are kept, and both are counted;
  an annotation with the same id twice is one answer.
* Images that were uploaded are /data/upload/PROJECT/HASH-NAME, those of local storage /data/local-files/?d=PATH. Give their
  folder with --images.
* The answer is of a Choices or a Pairwise control. Of several controls, --columns '{"answer": "name"}' chooses one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
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
from dedpo_diffusion.pairs.formats.table import WINNER
from dedpo_diffusion.settings import IngestSettings

__all__ = ["NEEDS", "OPTIONS", "OWN", "READ", "WINNER_FIRST", "entries", "recognise", "regroup"]

WINNER_FIRST = False
NEEDS = "data and annotations (JSON), or annotation_id and annotator (JSON-MIN)"
LISTS = ("annotations", "completions")  # the second is what old versions call them
OWN = (*(("data", name) for name in LISTS), ("annotation_id", "annotator"))
READ = (*WINNER, "chosen")
MINIMAL = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")  # what JSON-MIN adds
KINDS = ("choices", "pairwise")


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    found = next((own for own in OWN if set(own) <= set(columns)), None)
    return None if found is None else f"columns {', '.join(found)}"


def regroup(source: Source) -> Source:
    """The rows of one pair together: a task that was imported twice, and the annotations of JSON-MIN."""
    return grouped(source, _key)


def _key(row: Row) -> str | None:
    data = row.get("data", row)
    if isinstance(data, Mapping) and data.get(LEFT_IS) is not None and data.get(PAIR_ID) is not None:
        return f"pair {data[PAIR_ID]}"
    return f"task {row['id']}" if "annotator" in row and row.get("id") is not None else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a task, with one answer an annotation.

    Raises:
        UserError: values that cannot be told apart, an unknown answer, or two tasks of one name that differ.
    """
    check_options(settings.columns)
    tasks = [(place, _task(one, place, settings.columns)) for place, one in together(row, where)]
    noted: Counter[str] = Counter()
    first = tasks[0][1]
    data = first["data"]
    names = [name for name in data if name not in (ANSWERS, LEFT_IS, PAIR_ID)]
    roles = find_roles(names, settings.columns, where)
    left_is = which_is_left(data, where)
    answers = earlier_answers(data.get(ANSWERS), where)
    fresh = _fresh_answers(tasks, roles, settings.columns, noted)
    count_again(fresh, noted)
    shown = [find_image(data.get(name), folder, f"{where}, {name}", noted) for name in (roles.left, roles.right)]
    image_0, image_1 = shown if left_is == "image_0" else shown[::-1]
    again = len({one["id"] for _, one in tasks}) - 1 if first["minimal"] else len(tasks) - 1
    noted["tasks that came again, read together with the first"] += again
    yield Comparison(
        where,
        text(data.get(roles.prompt), f"{where}, {roles.prompt}"),
        (image_0, image_1),
        (*answers, *fresh),
        key=None if first["id"] is None else str(first["id"]),
        source={"task": str(first["id"])} | kept_values(data, (roles.prompt, roles.left, roles.right)),
        pair_id=str(data[PAIR_ID]) if data.get(LEFT_IS) is not None and data.get(PAIR_ID) is not None else None,
        noted={words: number for words, number in noted.items() if number},
    )


def _task(row: Mapping[str, Any], where: str, options: Mapping[str, str]) -> dict[str, Any]:
    """A row of either export in one shape: id, data, annotations, drafts, predictions."""
    if "data" not in row:
        return _minimal(row, where, options)
    data = row["data"]
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: data is {type(data).__name__}, and must be an object; export it again")
    lists = {name: as_list(row.get(name), f"{where}: {name}") for name in ("drafts", "predictions")}
    annotations = [one for name in LISTS for one in as_list(row.get(name), f"{where}: {name}")]
    return {"id": row.get("id"), "data": data, "annotations": annotations, "minimal": False, **lists}


def _minimal(row: Mapping[str, Any], where: str, options: Mapping[str, str]) -> dict[str, Any]:
    """A row of JSON-MIN: the name of the answer's column is found as that of a control is."""
    data = {name: value for name, value in row.items() if name not in MINIMAL and value is not None}
    told = [name for name in (options.get("answer"), "choice", *WINNER, "chosen") if name is not None and name in row]
    answer = told[0] if told else next((name for name, value in data.items() if _is_pairwise(value)), None)
    if answer is None and row.get("annotation_id") is not None:
        raise UserError(
            f"""{where}: which value is the answer cannot be told from {", ".join(data)}; say it with --columns '{{"answer": "..."}}'"""
        )
    value = data.pop(answer, None) if answer is not None else None
    annotations = []
    if row.get("annotation_id") is not None or value is not None:
        result = [] if value is None else [{"from_name": answer, "type": "choices", "value": _as_value(value)}]
        annotations = [{"id": row.get("annotation_id"), "completed_by": row.get("annotator"), "result": result}]
    return {"id": row.get("id"), "data": data, "annotations": annotations, "minimal": True, "drafts": [], "predictions": []}


def _is_pairwise(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "selected" in value[0]


def _as_value(value: Any) -> Mapping[str, Any]:
    """An answer of JSON-MIN as the value of a result: a word, a list of words, or what a Pairwise control selected."""
    if _is_pairwise(value):
        return value[0]
    return value if isinstance(value, Mapping) else {"choices": value if isinstance(value, list) else [value]}


# ---- what annotations say


def _fresh_answers(tasks: list[tuple[str, dict[str, Any]]], roles: Roles, options: Mapping[str, str], noted: Counter[str]) -> list[Answer]:
    """The answers given in the tool, about image_0."""
    found: list[Answer] = []
    seen: set[str] = set()
    prompt = tasks[0][1]["data"].get(roles.prompt)
    for where, task in tasks:
        if task["data"].get(roles.prompt) != prompt:
            raise UserError(f"{where} has the name of a pair in {tasks[0][0]}, and another prompt; export the pairs again")
        noted["drafts, which nobody submitted"] += len(task["drafts"])
        noted["predictions of models, which are no answers"] += len(task["predictions"])
        said = [_said(one, f"{where}, annotation {one.get('id')}", roles, options, noted) for one in _once(task, where, seen, noted)]
        found += about_image_0([one for one in said if one is not None], which_is_left(task["data"], where), noted)
    return found


def _once(task: Mapping[str, Any], where: str, seen: set[str], noted: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """A task's annotations, each id once."""
    for one in task["annotations"]:
        if not isinstance(one, Mapping):
            raise UserError(f"{where}: an annotation is {type(one).__name__}, and must be an object; export it with its annotations")
        name = one.get("id")
        if name is not None and str(name) in seen:
            noted["annotations that came twice, taken once"] += 1
            continue
        seen.add(str(name))
        yield one


def _said(one: Mapping[str, Any], where: str, roles: Roles, options: Mapping[str, str], noted: Counter[str]) -> Said | None:
    """What an annotation says; None where it says nothing, which is counted."""
    if one.get("was_cancelled") or one.get("skipped"):
        noted["skipped tasks, which have no answer"] += 1
        return None
    chosen: dict[str, list[Any]] = {}
    for result in as_list(one.get("result"), f"{where}: result"):
        value = result.get("value") if isinstance(result, Mapping) else None
        if not isinstance(value, Mapping) or result.get("type") not in KINDS:
            continue
        words = [value["selected"]] if "selected" in value else as_list(value.get("choices"), f"{where}: choices")
        chosen.setdefault(str(result.get("from_name")), []).extend(words)
    name = only(chosen, options, where)
    words = list(dict.fromkeys(chosen[name])) if name is not None else []
    if not words:
        noted["annotations without an answer"] += 1
        return None
    if len(words) > 1:
        raise UserError(f"{where} chooses {' and '.join(map(str, words))}; one answer is needed: mend it in Label Studio, or leave it out")
    return Said(read_choice(words[0], roles, options, where), _person(one.get("completed_by")))


def _person(who: Any) -> str | None:
    """The address of a person, else their number; None where nobody is named."""
    if isinstance(who, Mapping):
        who = who.get("email") or who.get("id")
    return None if who in (None, "", "None", "{}") else str(who)
