"""Open Image Preferences v1 (data-is-better-together/open-image-preferences-v1-results and -binarized), and its like.

    results     id, images {image_1, image_2, prompt}, model_1, model_2, evolution, category, sub_category,
                preference.responses, preference.responses.users, preference.responses.status (lists, one item a person)
    binarised   id, prompt, chosen, rejected, chosen_model, rejected_model, evolution, category, sub_category

An export of Argilla; the columns are those of its data cards and of the notebooks in github.com/huggingface/
data-is-better-together, community-efforts/image_preferences. `images` may also be flat: images.image_1 and so on.

Traps of the format:
* In the results the images are addresses (.../open-image-preferences-v1/resolve/main/image_quality_dev/3368.jpg).
  Download that repository's image folders and give --images the folder around them; nothing is downloaded here.
* The results have a second column `prompt`, which is an embedding; the text is images.prompt.
* A person answers image_1, image_2, both_good, both_bad or toxic_content. Both of the `both_` are ties (how many of
  which is kept as source_both_good and source_both_bad); toxic_content is no answer (source_toxic).
* Only answers of status submitted count; drafts and discarded ones do not (source_not_submitted).
* `evolution` says whether both images were drawn for the simplified or the quality prompt; images.prompt is that one.
* The binarised set lists the winner first, so the import shuffles the sides; it was made with both_good as a vote for each
  image and without ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, ImageSource, image_source, text
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "images and preference.responses, or prompt, chosen, rejected, chosen_model, rejected_model and evolution"
OWN = (("preference.responses",), ("chosen_model", "rejected_model", "evolution"))
READ = ("chosen", "rejected")
RESPONSES = "preference.responses"
LABELS = {"image_1": 1.0, "image_2": 0.0, "both_good": 0.5, "both_bad": 0.5}
NO_LABEL = "toxic_content"
KEPT = ("id", "model_1", "model_2", "chosen_model", "rejected_model", "evolution", "category", "sub_category")


def winner_first(columns: Collection[str]) -> bool:
    """Whether this source lists the preferred image first, as the binarised set does."""
    return RESPONSES not in columns and "chosen" in columns


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    names = set(columns)
    if RESPONSES in names and names & {"images", "images.image_1"}:
        return f"columns images, {RESPONSES}"
    binarised = ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "evolution")
    return f"columns {', '.join(binarised)}" if set(binarised) <= names else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a record, with one answer a person.

    Raises:
        UserError: an unknown answer, lists of different lengths, or addresses without --images.
    """
    source: dict[str, Any] = {name: str(row[name]) for name in KEPT if row.get(name) is not None}
    key = source.pop("id", None)
    if RESPONSES in row:
        answers, counts = _answers(row, where)
        prompt, columns = _field(row, "prompt"), ("images.image_1", "images.image_2")
        values = (_field(row, "image_1"), _field(row, "image_2"))
        source |= counts
    else:
        answers, prompt, columns = (Answer(1.0),), row.get("prompt"), ("chosen", "rejected")
        values = (row.get("chosen"), row.get("rejected"))
    image_0, image_1 = (_image(value, folder, f"{where}, {column}") for value, column in zip(values, columns, strict=True))
    yield Comparison(where, text(prompt, f"{where}, prompt"), (image_0, image_1), answers, key=key, source=source)


def _field(row: Mapping[str, Any], name: str) -> Any:
    """A field of `images`, nested or flat. A column of that name beside it is used only if it is text (`prompt` is not)."""
    images = row.get("images")
    found = images.get(name) if isinstance(images, Mapping) else row.get(f"images.{name}")
    return row[name] if found is None and isinstance(row.get(name), str) else found


def _answers(row: Mapping[str, Any], where: str) -> tuple[tuple[Answer, ...], dict[str, int]]:
    """Submitted answers, and how many were ties of which kind, toxic or not submitted."""
    responses = list(row.get(RESPONSES) or [])
    users, status = (_beside(row, name, len(responses), where) for name in ("users", "status"))
    answers: list[Answer] = []
    counts = Counter({"both_good": 0, "both_bad": 0, "toxic": 0, "not_submitted": 0})
    for response, user, state in zip(responses, users, status, strict=True):
        if response is None or state not in (None, "submitted"):
            counts["not_submitted"] += 1
        elif response == NO_LABEL:
            counts["toxic"] += 1
        elif response not in LABELS:
            known = ", ".join([*LABELS, NO_LABEL])
            raise UserError(f"{where}: {RESPONSES} holds {response!r}, and must be one of {known}; mend the row or remove it")
        else:
            answers.append(Answer(LABELS[response], None if user is None else str(user)))
            counts[response] += LABELS[response] == 0.5
    return tuple(answers), {name: counts[name] for name in ("both_good", "both_bad", "toxic", "not_submitted")}


def _beside(row: Mapping[str, Any], name: str, count: int, where: str) -> list[Any]:
    """The list that goes with the responses; nothing for each of them where the file has no such column."""
    values = row.get(f"{RESPONSES}.{name}")
    if values is None:
        return [None] * count
    if len(values) != count:
        raise UserError(f"{where}: {RESPONSES} has {count} items and {RESPONSES}.{name} {len(values)}; mend the row or remove it")
    return list(values)


def _image(value: Any, folder: Path | None, where: str) -> ImageSource:
    """An image; of an address at the hub, the file that a download of its repository has below `folder`."""
    if isinstance(value, str) and value.startswith("https://") and "/resolve/" in value and folder is not None:
        tail = urlsplit(value).path.split("/resolve/", 1)[1].partition("/")[2]  # behind the revision
        value = unquote(tail).lstrip("/")
    return image_source(value, folder, where)
