"""Several strengths of one LoRA: a sample folder each, `OUT/strength-0.5` and so on, sampled in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dedpo_diffusion.core.console import UserError

PREFIX = "strength-"


def strength_folder(strength: float) -> str:
    """The name of the folder for one strength of a LoRA: "strength-0.5"."""
    short = f"{strength:g}"
    return f"{PREFIX}{short if float(short) == strength else repr(strength)}"


def is_sweep(lora: Sequence[Path], strength: Sequence[float]) -> bool:
    """Whether several strengths of one LoRA are asked for; with several LoRAs there is one strength for each."""
    return len(lora) == 1 and len(strength) > 1


def check_sweep(strength: Sequence[float], out: Path) -> None:
    """See to it that a folder for each strength can be made within `out`.

    Raises:
        UserError: a strength that is negative, not finite or given twice, or an `out` that is a sample folder itself.
    """
    for value in strength:
        if not math.isfinite(value):
            raise UserError(f"--strength {value}: not a finite number; 1 is what was trained")
        if value < 0:
            raise UserError(
                f"--strength {value:g}: several strengths of one LoRA go from 0 upwards; sample a negative one by itself, "
                f"with --strength {value:g} alone and another --out"
            )
        if list(strength).count(value) > 1:
            raise UserError(f"--strength {value:g} is given twice; give each strength once")
    if (out / "settings.yaml").is_file() or (out / "index.parquet").is_file():
        raise UserError(f"{out}: it is a sample folder itself, and several strengths make a folder each within --out; choose another --out")


def folder_strength(folder: Path) -> float | None:
    """The strength that a folder's name tells; None where it is named otherwise."""
    name = folder.resolve().name
    try:
        strength = float(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else math.nan
    except ValueError:
        return None
    return strength if math.isfinite(strength) and strength_folder(strength) == name else None


def expanded(folders: Sequence[Path]) -> list[Path]:
    """The folders, and in place of one that holds strengths of a LoRA those strengths, the smallest first.

    Raises:
        UserError: a strength that is not sampled to its end.
    """
    found: list[Path] = []
    for folder in folders:
        strengths = {} if (folder / "index.parquet").is_file() else _strengths_in(folder)
        for place in strengths.values():
            if not (place / "index.parquet").is_file():
                raise UserError(f"{place} is not sampled to its end; give the same `dedpo sample` again, or remove this folder")
        found += [strengths[strength] for strength in sorted(strengths)] or [folder]
    return found


def _strengths_in(folder: Path) -> dict[float, Path]:
    if not folder.is_dir():
        return {}
    return {strength: place for place in folder.iterdir() if place.is_dir() and (strength := folder_strength(place)) is not None}
