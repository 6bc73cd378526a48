"""Results with each LoRA at its best strength in place of its arms: what the verdict and the head of the page speak of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.evaluation.comparison import verdict

if TYPE_CHECKING:
    from dedpo_diffusion.evaluation.comparison.arms import Arm

Results = dict[str, Any]
CHOSEN = " (chosen on other prompts)"


def shown_name(name: str, entry: dict[str, Any]) -> str:
    """A LoRA at its best strength in words: "tuned at strength 2", or "at strength 2 or 3" where the halves of the prompts disagree."""
    return f"{name} at strength {' or '.join(f'{strength:g}' for strength in sorted(set(entry['chosen'])))}"


def places(results: Results) -> Iterator[tuple[str, str, str | None]]:
    """(name shown, arm, LoRA or None) of the base, every arm that is no strength of a LoRA, and each LoRA, by its first arm.

    A LoRA that the verdict's scorer did not judge at its best strength, as people may not have, stays in its arms.
    """
    loras = {name: entry for name, entry in (results.get("loras") or {}).items() if results["primary"] in entry["by_scorer"]}
    of = {at["arm"]: name for name, entry in loras.items() for at in entry["strengths"]}
    seen = set()
    for arm in results["arms"]:
        if arm not in of:
            yield arm, arm, None
        elif of[arm] not in seen:
            seen.add(of[arm])
            yield shown_name(of[arm], loras[of[arm]]), loras[of[arm]]["best_arm"], of[arm]


def at_best(results: Results) -> Results:
    """Results in which a LoRA is one arm: its gains are those of the strength that was chosen on the other half of the prompts; categories,
    diversity, drift and people are those of its best strength on all. Results without LoRAs are returned as they are."""
    if not results.get("loras"):
        return results
    listed = list(places(results))
    arms = {name: results["arms"][arm] if lora is None else _as_arm(results, arm, lora) for name, arm, lora in listed}
    view = {**results, "arms": arms, "differences": _differences(results, listed)}
    for name, _, lora in listed:
        if lora is not None:
            arms[name]["warnings"] = verdict.warnings(view, name)
    return view


def warnings(results: Results) -> dict[str, list[str]]:
    """Of each LoRA at its best strength what `verdict.warnings` says; none of one that the verdict's scorer did not judge there."""
    arms = at_best(results)["arms"]
    shown = {lora: name for name, _, lora in places(results) if lora is not None}
    return {lora: arms[shown[lora]]["warnings"] if lora in shown else [] for lora in results.get("loras") or {}}


def _as_arm(results: Results, arm: str, lora: str) -> dict[str, Any]:
    entry, own = results["loras"][lora], results["arms"][arm]
    primary = entry["by_scorer"].get(results["primary"], {})
    kept = {key: own[key] for key in ("categories", "spread", "people")}
    return {
        **entry["scores"], "by_scorer": entry["by_scorer"], **{key: value for key, value in primary.items() if key != "n"}, **kept,
        "warnings": [],
    }  # fmt: skip


def _differences(results: Results, listed: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    found, loras = {}, results["loras"]
    for k, (later, later_arm, later_lora) in enumerate(listed[1:]):
        for earlier, earlier_arm, earlier_lora in listed[1 : k + 1]:
            gap: dict[str, Any] | None
            if later_lora is not None:
                gap = loras[later_lora]["best_minus"].get(earlier_lora or earlier_arm)
            elif earlier_lora is not None:
                gap = _mirrored(loras[earlier_lora]["best_minus"].get(later_arm))
            else:
                gap = results["differences"].get(f"{later_arm}_minus_{earlier_arm}")
            if gap is not None:
                found[f"{later}_minus_{earlier}"] = gap
    return found


def _mirrored(gap: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if gap is None else {"mean": -gap["mean"], "ci": gap["ci"] and [-end for end in gap["ci"][::-1]]}


def sentence(results: Results) -> str:
    """The verdict, of LoRAs at their best strength."""
    view = at_best(results)
    text, best = verdict.verdict(view), verdict.best_arm(view)
    if best in results["arms"]:
        return text
    return text.replace(best, best + CHOSEN, 1)


def shown_arms(arms: Sequence[Arm], results: Results) -> list[Arm]:
    """The arms of `at_best`, in its order: of a LoRA the one of its best strength on all prompts, named by it ("tuned at strength 2")."""
    by_name, loras, found = {arm.name: arm for arm in arms}, results.get("loras") or {}, []
    for _, arm, lora in places(results):
        name = arm if lora is None else f"{lora} at strength {loras[lora]['best_strength']:g}"
        found.append(replace(by_name[arm], name=name))
    return found
