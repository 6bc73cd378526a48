"""A dataset folder for Argilla's client: `rg.Dataset.from_disk(OUT, workspace=..., client=...)` makes the dataset on a server.

    OUT/records.json             what `Dataset.records.from_json` reads, one record a pair
    OUT/.argilla/settings.json   fields prompt, left and right (or one field of HTML), one question with left, right, tie and skip
    OUT/.argilla/dataset.json    its name

A record's metadata are pair_id, left_is and, where people had answered before, answers (pairs.formats.annotated). Images are
data URIs, as the server keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dedpo_diffusion.pairs.exporting.rows import Item, other
from dedpo_diffusion.pairs.formats.annotated import ANSWERS, CHOICES, LEFT, LEFT_IS, PAIR_ID, QUESTION, RIGHT, written_answers
from dedpo_diffusion.settings import PairsSettings

LARGEST = 5 << 20  # bytes of an image, of which Argilla's guide says that they should be fewer
HTML = "pair"  # the field of HTML
IMAGE = '<img style="width: 100%" src="{{{{record.fields.{0}.{1}}}}}">'
SHOWN = '  <figure style="flex: 1; margin: 0">' + IMAGE + "<figcaption>{1}</figcaption></figure>"
TEMPLATE = "\n".join(['<div style="display: flex; gap: 1em">', *(SHOWN.format(HTML, place) for place in (LEFT, RIGHT)), "</div>"])


def write(items: Iterable[Item], settings: PairsSettings, folder: Path) -> list[str]:
    """Write the export into `folder`.

    Returns:
        What to do with it, in sentences.
    """
    (folder / ".argilla").mkdir()
    for name, value in (("settings", dataset_settings(settings)), ("dataset", _dataset(settings))):
        (folder / ".argilla" / f"{name}.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
    large = 0
    with open(folder / "records.json", "w", encoding="utf-8") as text:
        text.write("[")
        for item in items:
            large += max(len(item.pair.image_0), len(item.pair.image_1)) > LARGEST
            text.write((",\n" if item.number else "\n") + json.dumps(_record(item, settings), ensure_ascii=True))
        text.write("\n]\n")
    done = [f'in Python: rg.Dataset.from_disk("{settings.folder}", workspace="...", client=rg.Argilla(api_url="...", api_key="..."))']
    if large:
        done.append(f"pairs with an image of more than 5 MB, which Argilla advises against: {large}")
    return [*done, 'when people are done: dataset.records.to_datasets().save_to_disk("answers")']


def dataset_settings(settings: PairsSettings) -> dict[str, Any]:
    """The settings of the dataset, as `Settings.from_json` reads them."""
    images = [_field(HTML, "Images", {"type": "custom", "template": TEMPLATE, "advanced_mode": False})]
    if settings.fields == "image":
        images = [_field(name, name.capitalize(), {"type": "image"}) for name in (LEFT, RIGHT)]
    options = [{"value": choice, "text": choice.capitalize()} for choice in CHOICES]
    question = {
        "name": QUESTION,
        "title": "Which image is better?",
        "required": True,
        "settings": {"type": "label_selection", "options": options, "visible_options": len(options)},
    }
    hidden = {"name": PAIR_ID, "title": "Pair", "visible_for_annotators": False, "settings": {"type": "terms", "values": None}}
    return {
        "guidelines": "Choose the image that you like better for the prompt. Skip where you cannot say anything.",
        "fields": [_field("prompt", "Prompt", {"type": "text", "use_markdown": False}), *images],
        "questions": [question],
        "metadata": [hidden],
        "vectors": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def _field(name: str, title: str, kind: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "title": title, "required": True, "settings": kind}


def _dataset(settings: PairsSettings) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", settings.folder.resolve().name).strip("-_") or "pairs"
    return {"name": name, "status": "draft", "allow_extra_metadata": True}


def _record(item: Item, settings: PairsSettings) -> dict[str, Any]:
    left_is = item.left_is(settings.seed)
    images: dict[str, Any] = {LEFT: item.uri(left_is), RIGHT: item.uri(other(left_is))}
    metadata = {PAIR_ID: item.pair.pair_id, LEFT_IS: left_is}
    if item.answers:
        metadata[ANSWERS] = json.dumps(written_answers(item.answers))
    return {
        "id": item.pair.pair_id,
        "fields": {"prompt": item.pair.prompt, **(images if settings.fields == "image" else {HTML: images})},
        "metadata": metadata,
        "suggestions": {},
        "responses": {},
        "vectors": {},
        "status": "pending",
    }
