"""What `dedpo compare` measured, as a section of a model card; its numbers are those of `results.json`, rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from dedpo_diffusion.weights.markdown import code, items, plain, table

ROLES = {"held_out": "held out", "made_labels": "**made the labels**", "unknown": "not known to be held out"}


def interval(entry: Mapping[str, Any], *, sign: bool = False, percent: bool = False) -> str:
    """A mean with its 95 % interval, to the second digit of the interval's half-width."""
    factor = 100 if percent else 1
    mean, ci = factor * entry["mean"], [factor * end for end in entry.get("ci") or []]
    half = (ci[1] - ci[0]) / 2 if ci else 0.0
    places = min(max(1 - math.floor(math.log10(half)), 0), 8) if half > 0 else 1 if percent else 4
    form, unit = f"{'+' if sign else ''}.{places}f", " %" if percent else ""
    if not ci:
        return format(mean, form) + unit
    return f"{format(mean, form)}{unit} ({format(ci[0], form)} to {format(ci[1], form)})"


def role_of(scorer: Mapping[str, Any]) -> str:
    """held_out, made_labels or unknown; older results say only whether a scorer was held out."""
    return scorer.get("role") or ("held_out" if scorer.get("held_out") else "unknown")


def results_section(results: Mapping[str, Any], arm: str, sheet: str | None) -> list[str]:
    """The lines of the section.

    Args:
        results: as `dedpo compare` writes them.
        arm: this model's.
        sheet: name of a picture with samples, None for none.

    Raises:
        KeyError: the results lack something.
    """
    own = results["arms"][arm]
    lines = [
        "## Results", "", f"> {plain(results['verdict'])}", "",
        f"Here this model is {code(arm)}, its base {code(results['base'])}: {results['n_images']} images each, of {results['n_prompts']} "
        "prompts, with the same prompt, seed and noise. Intervals are 95 %, "
        f"from {results['resamples']} bootstrap resamples over prompts.", "",
        *table(["scorer", "role", "gain over the base", "win rate", "images"], _scorers(results, own)),
        *items(plain(text) for text in (*own.get("warnings", []), *results.get("notes", []))),
        *_best_strength(results, arm), *_categories(results, own), *_spread(own), *_people(own),
    ]  # fmt: skip
    return lines if sheet is None else [*lines, f"![samples of the base and of this model]({quote(sheet)})", ""]


def _scorers(results: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, about in results["scorers"].items():
        if name not in own["by_scorer"]:
            continue
        entry = own["by_scorer"][name]
        gain = interval(entry["gain_over_base"], sign=True)
        p = entry["gain_over_base"].get("p_holm")
        words = gain if p is None else f"{gain}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
        count = entry.get("n", results["n_images"])
        shown = code(name, cell=True) + (" (verdict)" if name == results["primary"] else "")
        yield [shown, ROLES[role_of(about)], words, interval(entry["win_rate_vs_base"], percent=True), str(count)]


def _best_strength(results: Mapping[str, Any], arm: str) -> list[str]:
    """What the LoRA that this arm is a strength of is worth at its best strength, without the luck of the choice."""
    for name, entry in (results.get("loras") or {}).items():
        if arm in [at["arm"] for at in entry["strengths"]] and entry["gain_at_best_strength"] is not None:
            tried = ", ".join(f"{at['strength']:g}" for at in entry["strengths"])
            chosen = " and ".join(dict.fromkeys(f"{value:g}" for value in entry["chosen"]))
            worth = interval(entry["gain_at_best_strength"], sign=True)
            return [
                f"Of the strengths {tried} of {code(name)} the best is {entry['best_strength']:g}, by {code(entry['choose_by'])}. "
                f"With each half of the prompts judged at the strength that the other half chose ({chosen}), the gain on "
                f"{code(results['primary'])} is {worth}; the table's is of one strength on all prompts.", "",
            ]  # fmt: skip
    return []


def _categories(results: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    primary, rows = results["primary"], []
    for category, scorers in (own.get("categories") or {}).items():
        if primary in scorers:
            entry = scorers[primary]
            gain, wins = interval(entry["gain_over_base"], sign=True), interval(entry["win_rate_vs_base"], percent=True)
            rows.append([plain(category), str(entry["n_prompts"]), gain, wins])
    return (
        [f"By category of the prompt, on {code(primary)}:", "", *table(["category", "prompts", "gain", "win rate"], rows)] if rows else []
    )


def _spread(own: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, entry in (own.get("spread") or {}).items():
        diversity, change = entry.get("diversity"), entry.get("diversity_minus_base")
        shown = [interval(diversity) if diversity else "one seed a prompt", interval(change, sign=True) if change else "one seed a prompt"]
        rows.append([code(name, cell=True), *shown, interval(entry["drift"])])
    if not rows:
        return []
    words = "Cosine distances between embeddings: of images of one prompt (diversity), and from the base's image (drift)."
    return [words, "", *table(["embedding", "diversity", "diversity minus the base's", "drift"], rows)]


def _people(own: Mapping[str, Any]) -> list[str]:
    people = own.get("people")
    if not people:
        return []
    texts = [f"{people['answers']} answers on {people['pairs']} pairs, given blind by {len(people['raters'])} people."]
    equal = (people.get("agreement") or {}).get("raw") or {}
    if equal.get("value") is not None:
        texts.append(f"Two people's answers to one pair are equal in {equal['value']:.0%} of cases.")
    texts += [
        f"{code(name)} sides with them in {interval(entry, percent=True)} of {entry['n']} decided pairs."
        for name, entry in (people.get("with_scorers") or {}).items()
        if entry and entry.get("mean") is not None
    ]
    return ["People's judgement:", "", *items(texts)]
