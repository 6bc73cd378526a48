"""Pick-a-Pic v1 and v2 (arXiv 2305.01569): parquet, hub rows, or the webdataset mirror of them.

    parquet, hub    caption, jpg_0, jpg_1, label_0, label_1, has_label, are_different, ranking_id, user_id, ...
    webdataset      jpg_0.jpg, jpg_1.jpg, label_0.txt, label_1.txt, original_prompt.txt (or caption.txt)

Traps of the format:
* label_0 = 0.5 is a tie, not a win of image 0.
* has_label = False means that nobody answered, whatever label_0 says.
* are_different = False is one image twice, and some files lack that column.
* The mirror's labels are text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.formats.comparison import Answer, Comparison, image_source, number, text
from dedpo_diffusion.settings import IngestSettings

WINNER_FIRST = False
NEEDS = "caption, jpg_0, jpg_1 (the images themselves) and label_0"
OWN = (("has_label",), ("are_different",), ("ranking_id",), ("best_image_uid",), ("image_0_uid",), ("original_prompt.txt",))
READ = ("label_0", "label_1")
PROMPTS = ("caption", "original_prompt.txt", "caption.txt")
IMAGES = ("jpg_0", "jpg_1")
SOURCE = (  # kept with each pair, as source_*
    "ranking_id",
    "user_id",
    "image_0_uid",
    "image_1_uid",
    "best_image_uid",
    "model_0",
    "model_1",
    "num_example_per_prompt",
    "created_at",
)
YES_NO = {"true": True, "1": True, "false": False, "0": False}


def recognise(columns: Collection[str], row: Mapping[str, Any] | None) -> str | None:
    """The columns that tell this format, None where they do not."""
    prompt = next((name for name in PROMPTS if name in columns), None)
    if prompt is None:
        return None
    end, told = (".jpg", ".txt") if prompt.endswith(".txt") else ("", "")
    names = [prompt, *(name + end for name in IMAGES), f"label_0{told}"]
    return f"columns {', '.join(names)}" if set(names) <= set(columns) else None


def entries(row: dict[str, Any], where: str, folder: Path | None, settings: IngestSettings) -> Iterator[Comparison]:
    """The one comparison of a row.

    Raises:
        UserError: no caption, or labels that are none.
    """
    plain = {_plain(name): value for name, value in row.items()}
    prompt = next((plain[name] for name in ("original_prompt", "caption") if plain.get(name) is not None), None)
    image_0, image_1 = (image_source(plain.get(name), folder, f"{where}, {name}") for name in IMAGES)
    label, rater = _label(plain, where), _name(plain.get("user_id"))
    yield Comparison(
        where,
        text(prompt, f"{where}: caption"),
        (image_0, image_1),
        () if label is None else (Answer(label, rater),),
        key=_name(plain.get("ranking_id")) or _name(plain.get("__key__")),
        same=_flag(plain.get("are_different"), f"{where}: are_different") is False,
        source={name: _decoded(plain[name]) for name in SOURCE if name in plain},
    )


def _plain(name: str) -> str:
    """A column's name without the mirror's file ending."""
    return name.removesuffix(".txt").removesuffix(".jpg")


def _label(row: Mapping[str, Any], where: str) -> float | None:
    """P(image 0 is preferred), None where nobody answered."""
    label_0 = number(row.get("label_0"), f"{where}: label_0")
    label_1 = number(row.get("label_1"), f"{where}: label_1") if "label_1" in row else None if label_0 is None else 1 - label_0
    answered = _flag(row.get("has_label"), f"{where}: has_label")
    if answered is False or (answered is None and (label_0 is None or label_1 is None)):
        return None
    if label_0 is None or label_1 is None or not (0 <= label_0 <= 1 and abs(label_0 + label_1 - 1) < 1e-6):
        shown = f"label_0 is {label_0} and label_1 is {label_1}"
        raise UserError(f"{where}: {shown}; both must lie in [0, 1] and add up to 1. Mend the row, or set has_label to False")
    return label_0


def _flag(value: Any, where: str) -> bool | None:
    """A yes or no, or one as text or number; None for nothing."""
    value = _decoded(value)
    if value is None or value == "":
        return None
    found = YES_NO.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{where} is {value!r}, and must be true or false; mend the row")
    return found


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _name(value: Any) -> str | None:
    """A person's or a comparison's name as text, None where there is none."""
    value = _decoded(value)
    return None if value is None or value == "" else str(value).strip()
