"""The strength at which a LoRA is best, as `dedpo compare` found it: for `dedpo export --strength best --results results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.weights.card import read_results
from dedpo_diffusion.weights.run_folder import read_settings

HOW = "sample it at several (`dedpo sample --lora FILE --strength 0.5 1 1.5 2 3 ...`), score and compare, and give those results"


@dataclass(frozen=True)
class BestStrength:
    """What a LoRA's best strength is: the number, the arm that was sampled at it, and what a file of it says of the choice."""

    strength: float
    arm: str
    told: dict[str, Any]


def best_strength(results: Path, source: Path, named: str | None = None) -> BestStrength:
    """The best strength of what is exported.

    Args:
        results: the results.json of a comparison of several strengths.
        source: a LoRA file, which is known by its digest, or else by its name; or a run folder, which is known by its name.
        named: the LoRA, or an arm of it, where that does not tell.

    Raises:
        UserError: no results, no several strengths in them, none of this LoRA, or a best strength that leaves nothing to export.
    """
    loras = read_results(results).get("loras") or {}
    if not isinstance(loras, dict) or not loras:
        raise UserError(f"{results}: it knows no LoRA at several strengths; {HOW}")
    name = _named(loras, results, named) if named is not None else _known(loras, results, source)
    entry = loras[name]
    try:
        strength, tried = float(entry["best_strength"]), [float(at["strength"]) for at in entry["strengths"]]
        told = {"lora": name, "by": str(entry["choose_by"]), "tried": tried, "results": file_digest(results)}
        found = BestStrength(strength, str(entry["best_arm"]), told)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{results}: its strengths of {name} are not as `dedpo compare` writes them ({error!r}); run it again") from error
    if strength == 0:
        raise UserError(f"{results}: the best strength of {name} is 0, which is the base itself; there is nothing to export")
    listed = ", ".join(f"{value:g}" for value in tried)
    say(f"{results}: of {listed} the best strength of {name} is {strength:g}, by {told['by']}; that is what is written")
    return found


def _named(loras: Mapping[str, Any], results: Path, named: str) -> str:
    of = {at["arm"]: name for name, entry in loras.items() for at in entry["strengths"]}
    if named in loras or named in of:
        return named if named in loras else of[named]
    raise UserError(f"--arm {named}: no LoRA of {results} that was compared at several strengths (those are: {', '.join(loras)})")


def _known(loras: Mapping[str, Any], results: Path, source: Path) -> str:
    """The LoRA of a file's digest, or of the name of a file or a run."""
    digest = file_digest(source) if source.is_file() else None
    same = [name for name, entry in loras.items() if digest is not None and entry.get("sha256") == digest]
    if same:
        return same[0]
    title = source.stem if source.is_file() else Path(read_settings(source).get("out", source)).name
    alike = [name for name, entry in loras.items() if title in (name, Path(entry["file"]).stem)]
    if len(alike) == 1:
        if digest is not None:
            say(f"Warning: {results} compared another file than {source}, by its digest; by its name it is read as {alike[0]}")
        return alike[0]
    why = f"it could be {' or '.join(alike)}" if alike else f"those are: {', '.join(loras)}"
    raise UserError(f"{results}: which of its LoRAs {source} is remains unclear ({why}); name it with --arm, or {HOW}")
