"""Which arms of a comparison are strengths of one LoRA, and `loras` of results.json: what each LoRA is worth at its best strength.

Arms are strengths of one LoRA if they were sampled from one model with one and the same LoRA file, alike but for its strength. With two
strengths or more there is a best one; a LoRA that was sampled at one strength is an arm like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.arms import sampling_settings
from dedpo_diffusion.evaluation.comparison.preferences import NAME as PEOPLE

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import Arm
    from dedpo_diffusion.evaluation.comparison.numbers import Found
    from dedpo_diffusion.evaluation.comparison.preferences import Judged

ALIKE = (  # of arms of one LoRA
    "model_config", "model_prediction", "steps", "guidance", "negative", "scheduler", "dtype", "size", "height", "width",
)  # fmt: skip
DIGITS = 8  # of a digest that tells two LoRAs of one name apart


@dataclass(frozen=True)
class LoraArms:
    """The arms of one LoRA.

    Attributes:
        name: the folder that holds all its strengths, or else the LoRA file's name.
        file: the LoRA file's name.
        sha256: its digest; None where nothing tells it.
        strengths: two or more, rising.
        arms: one for each strength.
    """

    name: str
    file: str
    sha256: str | None
    strengths: tuple[float, ...]
    arms: tuple[Arm, ...]


# ---- which arms


def find_loras(arms: Sequence[Arm]) -> tuple[list[LoraArms], list[str]]:
    """The LoRAs that were sampled at several strengths, in the order of their first arms; and what there is to tell of it.

    Args:
        arms: the base first, which is of none.

    Raises:
        UserError: a settings.yaml or identity.json that cannot be read.
    """
    groups: dict[tuple[Any, ...], dict[float, Arm]] = {}
    files: dict[tuple[Any, ...], tuple[str, str | None]] = {}
    notes = []
    for arm in arms[1:]:
        told = _told(arm.folder)
        if told is None:
            continue
        key, strength, *files[key] = told  # type: ignore[misc]
        held = groups.setdefault(key, {})
        if strength in held:
            notes.append(
                f"{held[strength].name} and {arm.name} are both strength {strength:g} of one LoRA; its curve takes {held[strength].name}."
            )
        held.setdefault(strength, arm)
    found: list[LoraArms] = []
    members = {arm.name for held in groups.values() if len(held) > 1 for arm in held.values()}
    taken = {arm.name for arm in arms} - members
    for key, held in groups.items():
        if len(held) > 1:
            file, digest = files[key]
            name = _name(list(held.values()), file)
            if name in taken:
                name = f"{name}-{(digest or str(len(found)))[:DIGITS]}"
            taken.add(name)
            strengths = tuple(sorted(held))
            found.append(LoraArms(name, file, digest, strengths, tuple(held[strength] for strength in strengths)))
    return found, notes


def _told(folder: Path) -> tuple[tuple[Any, ...], float, str, str | None] | None:
    """What tells the LoRA of a sample folder, its strength, its file's name and digest; None where it has no LoRA, or several."""
    settings = sampling_settings(folder)
    loras, strengths = settings.get("lora"), settings.get("strength") or [1.0]
    if not (isinstance(loras, list) and isinstance(strengths, list) and len(loras) == len(strengths) == 1):
        return None
    if not isinstance(strengths[0], int | float) or not isinstance(loras[0], str):
        return None
    identity = _identity(folder)
    digest = identity.get("lora") or None
    key = (digest or loras[0], identity.get("model") or settings.get("model"), *(repr(settings.get(name)) for name in ALIKE))
    return key, float(strengths[0]), Path(loras[0]).name, digest


def _identity(folder: Path) -> dict[str, Any]:
    file = folder / "identity.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as JSON ({error}); restore it, or remove it, and the LoRA is known by its file's name"
        ) from error
    return found


def _name(arms: Sequence[Arm], file: str) -> str:
    from dedpo_diffusion.sampling.strength_folders import folder_strength

    parents = {arm.folder.resolve().parent if folder_strength(arm.folder) is not None else None for arm in arms}
    only = parents.pop() if len(parents) == 1 else None
    return Path(file).stem if only is None else only.name


# ---- what they are worth


@dataclass(frozen=True)
class _Best:
    """A LoRA at the strengths that were chosen for the two halves, or a plain arm: gains (N,) by scorer, NaN where not judged; and scores
    (N,) of the scorers that score."""

    gains: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]


def choose_scorer(asked: str | None, primary: str, scorers: Sequence[str], loras: Sequence[LoraArms], judged: Mapping[str, Judged],
                  half: np.ndarray) -> tuple[str, list[str]]:  # fmt: skip
    """The scorer that chooses strengths: the one that is asked for, or that of the verdict; and what there is to tell of it.

    Where people are the verdict's scorer, and have not judged every strength in both halves of the prompts, the first scorer chooses.

    Raises:
        UserError: a scorer that is asked for and does not judge every strength.
    """
    name = asked or primary
    if name not in scorers:
        raise UserError(f"--choose_by {name}: no scorer that all folders share (those are: {', '.join(scorers)})")
    if name != PEOPLE:
        return name, []
    lacking = [lora.name for lora in loras if not _people_judged(lora, judged, half)]
    if not lacking:
        return name, []
    what = f"people have not judged every strength of {' and '.join(lacking)} in both halves of the prompts"
    if asked:
        raise UserError(f"--choose_by people: {what}; run `dedpo vote BASE ARM` for each strength, or choose by another scorer")
    other = next(scorer for scorer in scorers if scorer != PEOPLE)
    return other, [f"{other} chooses the best strengths, since {what}."]


def _people_judged(lora: LoraArms, judged: Mapping[str, Judged], half: np.ndarray) -> bool:
    from dedpo_diffusion.evaluation.comparison.strengths import is_judged

    prompts = lora.arms[0].prompts
    return is_judged(_people_gains(lora.arms, judged), half, prompts)


def _people_gains(arms: Sequence[Arm], judged: Mapping[str, Judged]) -> np.ndarray:
    """(S, N) what people said of each arm, from -1 to 1; NaN where they were not asked."""
    import numpy as np

    found = np.full((len(arms), len(arms[0].rows)), np.nan)
    for row, arm in zip(found, arms, strict=True):
        if arm.name in judged:
            row[judged[arm.name].rows] = judged[arm.name].gain
    return found


def lora_results(
    loras: Sequence[LoraArms], arms: Sequence[Arm], measured: Found, spreads: Mapping[str, Any], judged: Mapping[str, Judged], *,
    shared: Sequence[str], primary: str, choose_by: str, half: np.ndarray, **options: Any,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """`loras` of results.json, and notes on the choices.

    Args:
        loras: of `find_loras`.
        arms: all arms, the base first, rows in one order.
        measured, spreads: of every arm, as `numbers.measure` and `spread.spread` give them.
        judged: what people said, by arm.
        shared: the scorers that all arms hold.
        primary: the scorer of the verdict.
        choose_by: the scorer that chooses.
        half: (N,) of `strengths.halves`.
        options: resamples and seed of the intervals.
    """
    from dedpo_diffusion.evaluation.comparison.strengths import choose, cross_choose

    best: dict[str, _Best] = {}
    found, notes = {}, []
    for lora in loras:
        gains = _gains(lora.arms, arms[0], shared, judged)
        chosen = cross_choose(gains[choose_by], lora.strengths, half)
        over_all = choose(gains[choose_by], lora.strengths)
        best[lora.name] = _at(lora.arms, gains, shared, chosen, half)
        found[lora.name] = {
            "file": lora.file, "sha256": lora.sha256,
            "strengths": [
                {
                    "strength": strength, "arm": arm.name,
                    "gain": {scorer: entry.gain.as_dict() for scorer, entry in measured[arm.name].items()},
                    "drift": {embedder: entry["drift"] for embedder, entry in spreads[arm.name].items()},
                }
                for strength, arm in zip(lora.strengths, lora.arms, strict=True)
            ],
            "choose_by": choose_by, "best_strength": lora.strengths[over_all], "best_arm": lora.arms[over_all].name,
            "chosen": [lora.strengths[k] for k in chosen],
        }  # fmt: skip
        notes += _notes(found[lora.name], lora.name)
    plain = [arm for arm in arms[1:] if all(arm is not member for lora in loras for member in lora.arms)]
    best |= {arm.name: _at((arm,), _gains((arm,), arms[0], shared, judged), shared, (0, 0), half) for arm in plain}
    for name, entry in found.items():
        entry |= _worth(best[name], arms[0], shared, primary, **options)
        others = {other: _apart(best[name], best[other], arms, primary, **options) for other in best if other != name}
        for key, place in (("best_minus", 0), ("best_wins", 1)):
            entry[key] = {other: both[place] for other, both in others.items() if both is not None}
        entry["best_minus_by_scorer"] = {
            other: _apart_by_scorer(best[name], best[other], arms, **options) for other in found if other != name
        }
    return found, notes


def _gains(arms: Sequence[Arm], base: Arm, shared: Sequence[str], judged: Mapping[str, Judged]) -> dict[str, np.ndarray]:
    """By scorer, people among them where they judged any of these arms: (S, N) gains over the base."""
    import numpy as np

    found = {scorer: np.stack([arm.scores[scorer] - base.scores[scorer] for arm in arms]) for scorer in shared}
    people = _people_gains(arms, judged)
    return found if np.isnan(people).all() else {**found, PEOPLE: people}


def _at(arms: Sequence[Arm], gains: Mapping[str, np.ndarray], shared: Sequence[str], chosen: tuple[int, int], half: np.ndarray) -> _Best:
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.strengths import at_chosen

    scores = {scorer: at_chosen(np.stack([arm.scores[scorer] for arm in arms]), chosen, half) for scorer in shared}
    return _Best({scorer: at_chosen(values, chosen, half) for scorer, values in gains.items()}, scores)


def _worth(best: _Best, base: Arm, shared: Sequence[str], primary: str, **options: Any) -> dict[str, Any]:
    """What a LoRA at its best strength is worth by each scorer, and on the primary one."""
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import Arm
    from dedpo_diffusion.evaluation.comparison.numbers import by_scorer, measure
    from dedpo_diffusion.evaluation.comparison.preferences import as_judged

    arm = Arm("best", base.folder, base.rows, dict(best.scores), base.versions, base.keys)
    people = best.gains.get(PEOPLE)
    judged = {} if people is None or np.isnan(people).all() else {"best": as_judged(people)}
    measured = {s: entry for s, entry in measure([base, arm], shared, judged, **options)["best"].items() if entry.prompts > 1}
    listed = by_scorer(measured)
    own = listed.get(primary)
    return {
        "by_scorer": listed,
        "scores": {s: entry.mean.as_dict() | {"n": entry.n} for s, entry in measured.items() if entry.mean is not None},
        "gain_at_best_strength": None if own is None else {key: own["gain_over_base"][key] for key in ("mean", "ci")},
        "win_rate_at_best_strength": None if own is None else own["win_rate_vs_base"],
    }


def _apart(mine: _Best, other: _Best, arms: Sequence[Arm], scorer: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The paired difference between two on a scorer, and the rate at which the first wins; None where people judged no two prompts of
    both."""
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.intervals import intervals, is_rate, wins
    from dedpo_diffusion.evaluation.comparison.numbers import within

    if scorer not in mine.gains or scorer not in other.gains:
        return None
    there = ~np.isnan(mine.gains[scorer]) & ~np.isnan(other.gains[scorer])
    prompts = arms[0].prompts[there]
    if len(np.unique(prompts)) < 2:
        return None
    a, b = ((one.gains if scorer == PEOPLE else one.scores)[scorer][there] for one in (mine, other))
    gap, won = intervals([(a - b, False), (wins(a, b), True)], prompts, **options)
    rate = scorer != PEOPLE and is_rate(np.concatenate([arm.scores[scorer] for arm in arms]))
    return within(gap, 2 if scorer == PEOPLE else 1 if rate else np.inf).as_dict(), won.as_dict()


def _apart_by_scorer(mine: _Best, other: _Best, arms: Sequence[Arm], **options: Any) -> dict[str, Any]:
    """The paired difference between two LoRAs on each scorer that judged both."""
    found = {scorer: _apart(mine, other, arms, scorer, **options) for scorer in mine.gains}
    return {scorer: both[0] for scorer, both in found.items() if both is not None}


def _notes(entry: Mapping[str, Any], name: str) -> list[str]:
    """Choices that a reader should know of."""
    strengths, (first, second) = [at["strength"] for at in entry["strengths"]], entry["chosen"]
    notes = []
    if first != second:
        low, high = sorted((first, second))
        notes.append(
            f"The two halves of the prompts disagree on the best strength of {name}: {low:g} and {high:g}, by {entry['choose_by']}."
        )
    elif entry["best_strength"] == strengths[-1]:
        notes.append(f"{name} is best at {strengths[-1]:g}, the largest strength that was sampled; a larger one may be better still.")
    elif entry["best_strength"] == strengths[0] and strengths[0] > 0:
        notes.append(f"{name} is best at {strengths[0]:g}, the smallest strength that was sampled; a smaller one may be better still.")
    return notes
