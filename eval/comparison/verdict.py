"""What the numbers of a comparison say, in words: who judges, the verdict, and what should make a reader doubt it.

**Roles.** A scorer that a targets' report (`--targets`) names as judge *made the labels*, as does one of whose version the judge's
labels say that they are. One in `--held_out`, or any other one where such a report is given, is *held out*; else it is *unknown*.
People are held out.

**Over-optimisation** ("rises": the 95 % interval of the gain lies above 0; "falls": below). An arm is warned of if

1. a scorer that is not held out rises, also after Holm's correction, while a held-out one, or people, fall;
2. one that made the labels rises so, no held-out one rises, and the diversity over seeds falls by some embedder and rises by none;
3. one that made the labels rises so, and of the held-out ones, of which there are some, none rises.

The first that holds is told. Where nothing has changed the three together are false alarms in at most 2.5 % of comparisons: each takes
a rise that is corrected for the number of scorers, also where scorers are opposed (tests/evaluation/test_verdict.py simulates it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.arms import Arm, sampling_settings
from dedpo_diffusion.evaluation.comparison.cautions import few_prompts
from dedpo_diffusion.evaluation.comparison.preferences import NAME as PEOPLE

Results = dict[str, Any]
# sampling settings that arms may differ in: what is compared, what pairing by prompt and seed has checked, what changes no image
FREE_SETTINGS = (
    "lora", "strength", "model", "model_config", "model_prediction", "prompts", "limit",
    "categories", "seeds", "seed", "size", "height", "width", "out",
    "batch", "device",
)  # fmt: skip
LEVEL = 0.05
NAMED = 5  # scorers or categories in one sentence
CAUTIONS = {
    "held_out": "",
    "made_labels": ", which made the training labels",
    "reward": ", which was the reward in training",
    "unknown": "",
}
OWN = {"made_labels": "which made its labels", "reward": "which it was trained to raise", "unknown": "which is not known to be held out"}


# ---- numbers in words


def gains_of(results: Results, scorer: str) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, name, entry) of the arms that have this scorer; the base is none of them."""
    others = [(k, name, arm) for k, (name, arm) in enumerate(results["arms"].items()) if name != results["base"]]
    return [(k, name, arm["by_scorer"][scorer]) for k, name, arm in others if scorer in arm["by_scorer"]]


def decimals(results: Results, scorer: str) -> int:
    """Of this scorer's numbers: enough for two digits of the narrowest interval, three at least and six at most."""
    return places(entry["gain_over_base"] for _, _, entry in gains_of(results, scorer))


def places(entries: Iterable[dict[str, Any]]) -> int:
    """Decimals as in `decimals`, of any numbers with intervals."""
    width = min((high - low for low, high in (entry["ci"] for entry in entries if entry["ci"]) if high > low), default=1.0)
    return min(max(3, 1 - math.floor(math.log10(width))), 6)


def signed(value: float, digits: int) -> str:
    """A gain or an end of its interval."""
    return f"{value:+.{digits}f}"


def _ends(entry: dict[str, Any], digits: int) -> str:
    low, high = entry["ci"]
    return f"{signed(entry['mean'], digits)}, {signed(low, digits)} to {signed(high, digits)}"


# ---- who judges


def judges_of(path: Path, report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, version) of each judge whose labels a targets' report was merged from; version "" where the labels are not beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in [entry["name"] for entry in report.get("judges") or []] or (report.get("judge") or "").split(", "):
        try:
            versions = pq.read_table(path.parent.parent / "labels" / f"{name}.parquet", columns=["judge_version"])["judge_version"]
            yield name, next((version for version in versions.to_pylist() if version), "")
        except (OSError, KeyError, pa.ArrowInvalid):  # moved, or of another source: the name alone tells
            yield name, ""


def roles(
    versions: dict[str, str], held_out: Sequence[str], targets: Sequence[Path], rewards: Mapping[str, Collection[str]], complete: bool
) -> tuple[dict[str, str], list[str]]:
    """The role of each scorer, by this module's rule; and the notes on those called held out that made labels, or were a reward.

    A judge that was calibrated, stacked or taught made labels, too: their version names its own.

    Args:
        versions: of the scorers.
        held_out: those that are said to be.
        targets: reports of targets that were trained on.
        rewards: by arm, the scorers that it was trained to raise, as far as that is known.
        complete: nothing else trained the arms, so every other scorer is held out.
    """
    found, notes = {}, []
    reports = [(path, read_targets_report(path)) for path in targets]
    judges = [(path, *judge) for path, report in reports for judge in judges_of(path, report)]
    known = any("judge" in report or "judges" in report for _, report in reports) or complete
    for scorer, version in versions.items():
        made = [path for path, name, said in judges if name == scorer or (version and version in said.split())]
        raised = [arm for arm, names in rewards.items() if scorer in names]
        found[scorer] = "made_labels" if made else "reward" if raised else "held_out" if known or scorer in held_out else "unknown"
        if made and scorer in held_out:
            notes += [f"{scorer} is called held out, yet it is a judge of the targets {path.stem}." for path in made]
        if raised and scorer in held_out:
            notes += [f"{scorer} is called held out, yet {arm} was trained to raise it." for arm in raised]
    return found, notes


def sampling_notes(arms: Sequence[Arm]) -> list[str]:
    """Which arms were sampled with other settings than the base.

    Raises:
        UserError: a settings.yaml that holds no settings.
    """
    held = {arm.name: found for arm in arms if (found := sampling_settings(arm.folder))}
    base = held.pop(arms[0].name, {})
    return [
        f"{name} was sampled with {key} {mine[key]}, {arms[0].name} with {base[key]}."
        for name, mine in held.items() for key in base if key not in FREE_SETTINGS and key in mine and mine[key] != base[key]
    ]  # fmt: skip


# ---- what should make a reader doubt


def rises(entry: dict[str, Any] | None) -> bool:
    """Whether an interval lies above 0."""
    return entry is not None and entry["ci"] is not None and entry["ci"][0] > 0


def falls(entry: dict[str, Any] | None) -> bool:
    """Whether an interval lies below 0."""
    return entry is not None and entry["ci"] is not None and entry["ci"][1] < 0


def warnings(results: Results, name: str) -> list[str]:
    """Signs that an arm pleases what it was trained to please, and no more: this module's rules, as sentences without its name."""
    arm = results["arms"][name]
    gains = {scorer: entry["gain_over_base"] for scorer, entry in arm["by_scorer"].items()}
    role = {scorer: results["scorers"][scorer]["role"] for scorer in gains}
    held = [scorer for scorer in gains if role[scorer] == "held_out"]
    pleased = [scorer for scorer in gains if scorer not in held and rises(gains[scorer]) and gains[scorer]["p_holm"] < LEVEL]
    hurt = [scorer for scorer in held if falls(gains[scorer])]
    made = [scorer for scorer in pleased if role[scorer] in ("made_labels", "reward")]

    def change(scorer: str) -> str:
        return _ends(gains[scorer], decimals(results, scorer))

    def rising(scorers: Sequence[str]) -> str:
        words = [f"{scorer} ({signed(gains[scorer]['mean'], decimals(results, scorer))}), {OWN[role[scorer]]}" for scorer in scorers]
        return f"it rises on {_list(words)}"

    if pleased and hurt:
        losses = [f"{'people' if scorer == PEOPLE else scorer} ({change(scorer)})" for scorer in hurt]
        return [f"Looks over-optimised: {rising(pleased)}, and falls on {_list(losses)}, which had no part in its training."]
    if not made or any(rises(gains[scorer]) for scorer in held):
        return []
    changes = {embedder: entry["diversity_minus_base"] for embedder, entry in arm["spread"].items()}
    narrowed = [embedder for embedder, entry in changes.items() if falls(entry)]
    if narrowed and not any(map(rises, changes.values())):
        fewer = _list([f"{embedder} ({_ends(changes[embedder], places([changes[embedder]]))})" for embedder in narrowed])
        rest = "on no scorer that is held out" if held else "and no scorer here is held out"
        return [f"Looks over-optimised: {rising(made)}, {rest}, and its images of one prompt are less diverse by {fewer}."]
    if held:
        others = _list([f"{scorer} {change(scorer)}" for scorer in held])
        return [f"Better only on what it was trained by: {rising(made)}, and on no scorer that is held out ({others})."]
    return []


def category_notes(results: Results) -> list[str]:
    """Arms that are better on some categories of prompts and worse on others, on the primary scorer, after Holm's correction."""
    from dedpo_diffusion.labels.warnings import holm

    primary, found = results["primary"], []
    for name, arm in results["arms"].items():
        gains = {category: entry[primary]["gain_over_base"] for category, entry in arm["categories"].items() if primary in entry}
        gains = {category: gain for category, gain in gains.items() if gain["ci"] is not None}
        told = [category for category, p in zip(gains, holm([gain["p"] for gain in gains.values()]), strict=True) if p < LEVEL]
        better, worse = (
            [f"{c} ({signed(gains[c]['mean'], places([gains[c]]))})" for c in told if gains[c]["mean"] * sign > 0] for sign in (1, -1)
        )
        whole = arm.get("gain_over_base")
        if better and worse:
            halves = f"better on {_list(better)} and worse on {_list(worse)}"
        elif better and falls(whole):
            halves = f"worse on the whole, and better on {_list(better)}"
        elif worse and rises(whole):
            halves = f"better on the whole, and worse on {_list(worse)}"
        else:
            continue
        found.append(f"On {primary}, {name} is {halves} (after Holm's correction for {len(gains)} categories).")
    return found


# ---- the verdict


def best_arm(results: Results) -> str:
    """The arm of the largest gain on the primary scorer; the base is no candidate, nor are arms that people did not judge."""
    candidates = [name for name in list(results["arms"])[1:] if "gain_over_base" in results["arms"][name]]
    return max(candidates, key=lambda name: results["arms"][name]["gain_over_base"]["mean"])


def verdict(results: Results) -> str:
    """The results in a few sentences, the first of which says what was asked: is it better, on the primary scorer?"""
    best, primary = best_arm(results), results["primary"]
    caution = CAUTIONS[results["scorers"][primary]["role"]]
    first = f"On {primary}{caution}, {_gain_words(results, best)}{_choice_words(results, best)}{_rival_words(results, best)}."
    parts = [first, *few_prompts(results["n_prompts"]), *_unknown(results, primary), *_others(results, best)]
    return " ".join([*parts, *results["arms"][best]["warnings"]])


def _unknown(results: Results, scorer: str) -> list[str]:
    """That nobody knows whether this scorer made the training labels, and how to let it be known."""
    if results["scorers"][scorer]["role"] != "unknown":
        return []
    return [f"Unknown whether {scorer} made the training labels: give --targets or --held_out."]


def _gain_words(results: Results, name: str) -> str:
    base, arm = results["base"], results["arms"][name]
    gain, wins = arm["gain_over_base"], arm["win_rate_vs_base"]
    digits = decimals(results, results["primary"])
    mean, low, high = (signed(value, digits) for value in (gain["mean"], *gain["ci"]))
    numbers = f"{mean} (95 % interval {low} to {high})"
    rate = f"win rate {wins['mean']:.1%} ({wins['ci'][0]:.1%} to {wins['ci'][1]:.1%})"
    if not (rises(gain) or falls(gain)):
        return f"{name} and {base} cannot be told apart: gain {numbers}, {rate}"
    return f"{name} is {'better' if rises(gain) else 'worse'} than {base}: gain {numbers}, {rate}"


def _choice_words(results: Results, best: str) -> str:
    """A gain that is clear by itself, and not if it is counted as the largest of several (Bonferroni)."""
    asked = [arm for arm in list(results["arms"].values())[1:] if "gain_over_base" in arm]
    p = results["arms"][best]["gain_over_base"]["p"]
    if len(asked) < 2 or not p < LEVEL <= p * len(asked):
        return ""
    return f" (the largest gain of {len(asked)} arms reaches that by chance with a probability of {min(1.0, p * len(asked)):.2f})"


def _rival_words(results: Results, best: str) -> str:
    """Which other arms the best arm can be told from, by the paired intervals between them."""
    told: list[str] = []
    untold: list[str] = []
    unknown: list[str] = []
    arms = list(results["arms"])[1:]
    rivals = [name for name in arms if name != best and "gain_over_base" in results["arms"][name]]
    absent = [name for name in arms if name != best and name not in rivals]
    for other in rivals:
        forward = results["differences"].get(f"{best}_minus_{other}")
        backward = results["differences"].get(f"{other}_minus_{best}")
        if not (forward or backward):
            unknown.append(other)
            continue
        mean, low, high = (forward["mean"], *forward["ci"]) if forward else (-backward["mean"], *(-end for end in backward["ci"][::-1]))
        digits = decimals(results, results["primary"])
        words = f"{other} ({signed(mean, digits)}, {signed(low, digits)} to {signed(high, digits)})"
        (told if low > 0 or high < 0 else untold).append(words)
    parts = [f"ahead of {' and '.join(told)}"] if told else []
    parts += [f"not distinguishable from {' or '.join(untold)}"] if untold else []
    parts += [f"not compared with {' and '.join(unknown)}"] if unknown else []
    words = f"; of {len(rivals) + 1} arms {best} has the largest gain, " + ", but ".join(parts) if parts else ""
    return words + (f"; {_list(absent)} cannot be ranked, for want of votes" if absent else "")


def _others(results: Results, best: str) -> list[str]:
    """What the best arm's other scorers say after Holm's correction."""
    others = {s: e["gain_over_base"] for s, e in results["arms"][best]["by_scorer"].items() if s != results["primary"]}
    if not others:
        return []
    kept = [f"{scorer} ({signed(gain['mean'], decimals(results, scorer))})" for scorer, gain in others.items() if gain["p_holm"] < LEVEL]
    if not kept:
        return [f"On {_list(list(others), 'or')} no difference survives Holm's correction."]
    rest = [scorer for scorer, gain in others.items() if not gain["p_holm"] < LEVEL]
    tail = f", that on {_list(rest)} does not" if rest else ""
    return [f"After Holm's correction for {len(others) + 1} scorers the difference on {_list(kept)} remains{tail}."]


def _list(parts: Sequence[str], word: str = "and") -> str:
    """ "a, b and c"; of very many the first few, and how many more."""
    shown = [*parts[:NAMED], f"{len(parts) - NAMED} more"] if len(parts) > NAMED else list(parts)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


def read_targets_report(path: Path) -> dict[str, Any]:
    """The report that `dedpo merge` wrote beside targets.

    Raises:
        UserError: no such file, no JSON object in it, or one whose judges, sentences or warnings are not as `dedpo merge` writes them.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); give the report that `dedpo merge` wrote beside the targets") from error
    if not isinstance(report, dict):
        raise UserError(f"{path} holds no report; give the JSON file that `dedpo merge` wrote beside the targets")
    parts: dict[str, Callable[[Any], bool]] = {
        "judge": lambda value: isinstance(value, str),
        "judges": lambda value: _all(value, lambda entry: isinstance(entry, dict) and isinstance(entry.get("name"), str)),
        "sentences": lambda value: _all(value, lambda entry: isinstance(entry, str)),
        "warnings": lambda value: _all(value, lambda entry: isinstance(entry, dict) and isinstance(entry.get("text"), str)),
    }
    for name, fits in parts.items():
        if report.get(name) is not None and not fits(report[name]):
            raise UserError(f"{path}: {name!r} is not as `dedpo merge` writes it; give the report that it wrote beside the targets")
    return report


def _all(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(fits, values))
