"""Tasks and a labelling configuration for Label Studio: two images side by side, and the choices left, right, tie and skip.

    OUT/config.xml     the labelling configuration, for the project's settings
    OUT/tasks.json     the tasks, to be imported
    OUT/images/        with `--images files`: what Label Studio serves from the disk as local files

A task's data are prompt, left, right, pair_id, left_is and, where people had answered before, answers (pairs.formats.annotated).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.exporting.rows import Item, other, write_image
from dedpo_diffusion.pairs.formats.annotated import ANSWERS, CHOICES, LEFT, LEFT_IS, PAIR_ID, QUESTION, RIGHT, written_answers
from dedpo_diffusion.settings import PairsSettings

SERVED = "/data/local-files/?d="
KEYS = {"left": "1", "tie": "2", "right": "3", "skip": "4"}
CONFIG = """<View>
  <Style>.pair {{ display: flex; gap: 1em; }} .pair > div {{ flex: 1; }}</Style>
  <Header value="Which image is better?"/>
  <Text name="prompt" value="$prompt"/>
  <View className="pair">
    <View><Header size="4" value="left"/><Image name="{left}" value="${left}"/></View>
    <View><Header size="4" value="right"/><Image name="{right}" value="${right}"/></View>
  </View>
  <Choices name="{question}" toName="prompt" choice="single-radio" showInline="true" required="true">
{choices}
  </Choices>
</View>
"""


def config() -> str:
    """The labelling configuration."""
    choices = "\n".join(f'    <Choice value="{choice}" hotkey="{KEYS[choice]}"/>' for choice in sorted(CHOICES, key=KEYS.__getitem__))
    return CONFIG.format(left=LEFT, right=RIGHT, question=QUESTION, choices=choices)


def prefix(settings: PairsSettings) -> str:
    """What stands before an image's name in the path under which Label Studio serves it.

    Raises:
        UserError: the export lies outside the folder that it serves.
    """
    root = (settings.root or settings.folder).resolve()
    out = settings.folder.resolve()
    if not out.is_relative_to(root):
        raise UserError(f"--root {root} does not hold {out}; give the folder that Label Studio serves files from, and an --out below it")
    inside = os.path.relpath(out, root)
    return "" if inside == "." else f"{Path(inside).as_posix()}/"


def write(items: Iterable[Item], settings: PairsSettings, folder: Path) -> list[str]:
    """Write the export into `folder`.

    Returns:
        What to do with it, in sentences.
    """
    before = prefix(settings)
    (folder / "config.xml").write_text(config(), encoding="utf-8")
    with open(folder / "tasks.json", "w", encoding="utf-8") as text:
        text.write("[")
        for item in items:
            text.write(",\n" if item.number else "\n")
            text.write(json.dumps({"data": _data(item, settings, folder, before)}, ensure_ascii=False))
        text.write("\n]\n")
    done = [
        f"in Label Studio: a new project with {settings.folder}/config.xml as its labelling code, then import {settings.folder}/tasks.json"
    ]
    if settings.images != "data":
        root = (settings.root or settings.folder).resolve()
        done.append(
            f"start it with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root}, and add the "
            f"source storage Local files with the path {settings.folder.resolve() / 'images'}, without syncing it"
        )
    return [*done, "when people are done, export the project as JSON"]


def _data(item: Item, settings: PairsSettings, folder: Path, before: str) -> dict[str, object]:
    left_is = item.left_is(settings.seed)
    data: dict[str, object] = {"prompt": item.pair.prompt}
    for place, side in ((LEFT, left_is), (RIGHT, other(left_is))):
        if settings.images == "data":
            data[place] = item.uri(side)
        else:
            name = write_image(folder, f"images/{item.number:06d}-{place}{item.suffix(side)}", item.image(side))
            data[place] = SERVED + quote(before + name)
    data |= {PAIR_ID: item.pair.pair_id, LEFT_IS: left_is}
    return data | ({ANSWERS: written_answers(item.answers)} if item.answers else {})
