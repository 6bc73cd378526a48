"""Further rounds: the latest LoRA proposes pairs, judges and people label them, and it is trained further on these and all earlier ones.

Each round's LoRA is compared with the base and all earlier ones on the same prompts and noise, each at its best strength. `why_last` says
after which round they end: one that gains nothing over the one before, or that looks over-optimised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import say
from dedpo_diffusion.journey import costs
from dedpo_diffusion.journey.journal import Step
from dedpo_diffusion.journey.plan import Route, compare_steps, existing, label_steps, merge_steps, train_steps, verdict_steps

PROPOSAL_SEED = 100_000  # times the round's number: no image is proposed twice, and none is of the evaluation


def further_steps(route: Route, known: costs.Known) -> Iterator[Step]:
    """Every step of the rounds from the second on, up to the verdict; fewer rounds where `why_last` ends them."""
    s, [method] = route.settings, route.settings.methods
    loras = [(route, method)]
    for number in range(2, s.rounds + 1):
        here = replace(route, number=number)
        yield from _pair_steps(here, loras[-1][0], known, method)
        yield from merge_steps(here, known, method)
        yield from train_steps(here, known, method, start=loras[-1][0].lora(method))
        loras.append((here, method))
        if number < s.rounds:
            yield from compare_steps(loras, known, here.folder, f", round {number}")
            if best_round(route, here.folder / "results.json") < number:
                say(f"\n{curve_words(route, curve(route, read_results(here.folder / 'results.json')))[-1]}")
                break
    yield from verdict_steps(loras, known, lambda: best_round(route, s.out / "results.json") - 1)


def best_round(route: Route, results: Path) -> int:
    """The last round before the one that ended them; the last of all where none did, or nobody has compared them yet."""
    return last_gain(curve(route, read_results(results))) if results.is_file() else route.settings.rounds


def read_results(file: Path) -> dict[str, Any]:
    """What `dedpo compare` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def last_gain(rounds: list[dict[str, Any]]) -> int:
    """The last round of a `curve` before one that ended them."""
    return next((entry["round"] - 1 for entry in rounds if entry["ended"]), len(rounds))


def curve(route: Route, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each round that was done its arm, its gain over the base at its best strength, that over the round before, and why it ended
    the rounds, None where it did not."""
    found: list[dict[str, Any]] = []
    [method] = route.settings.methods
    for number in range(1, route.settings.rounds + 1):
        arm, last = (replace(route, number=k).arm(method) for k in (number, max(number - 1, 1)))
        entry = results["loras"].get(arm)
        if entry is None:
            break
        told = {"round": number, "arm": arm, "gain": entry["gain_at_best_strength"], "strength": entry["best_strength"]}
        told |= {"minus_last": entry["best_minus"].get(last) if number > 1 else None}
        ended = why_last(results, arm, last, drift=route.settings.round_drift) if number > 1 else None
        found.append(told | {"ended": ended})
    return found


# ---- when they end


def why_last(results: dict[str, Any], arm: str, last: str, *, drift: float) -> str | None:
    """Why a round ends the rounds, as the rest of a sentence about it; None where it does not. The first that holds of:

    1. on the verdict's scorer it gained nothing over the round before, on average;
    2. a rule of over-optimisation holds against the base (`evaluation.comparison.verdict`);
    3. over the round before, a scorer that made the labels rises, while a held-out one, or people, fall (95 % intervals);
    4. its images lie further from the base's than `drift` times what the base's images of one prompt lie apart (95 % interval of the
       former), by some embedder.

    Args:
        results: of a comparison of the rounds so far.
        arm, last: names of its LoRA and of the one before.
        drift: bound of rule 4; without embeddings, or with one image a prompt, there is nothing to compare and the rule is silent.
    """
    entry = results["loras"][arm]
    gap = entry["best_minus"].get(last)  # absent where people give the verdict and did not judge both
    if gap is not None and gap["mean"] <= 0:
        return f"it gained nothing over the round before on {results['primary']} ({_ends(gap)})"
    if entry.get("warnings"):  # absent where an earlier version compared, and so are the differences by scorer
        words = " ".join(entry["warnings"]).rstrip(".")
        return words[:1].lower() + words[1:]
    return _turned(results, entry.get("best_minus_by_scorer", {}).get(last, {})) or _strayed(results, entry, drift)


def _turned(results: dict[str, Any], gaps: dict[str, Any]) -> str | None:
    """Rule 3 of `why_last`."""
    role = {scorer: results["scorers"][scorer]["role"] for scorer in gaps}
    clear = {scorer: gap for scorer, gap in gaps.items() if gap["ci"] is not None}
    rising = [scorer for scorer, gap in clear.items() if role[scorer] == "made_labels" and gap["ci"][0] > 0]
    falling = [scorer for scorer, gap in clear.items() if role[scorer] == "held_out" and gap["ci"][1] < 0]
    if not (rising and falling):
        return None
    up, down = (" and ".join(f"{scorer} ({_ends(clear[scorer])})" for scorer in names) for names in (rising, falling))
    return f"against the round before it rises on {up}, which made its labels, and falls on {down}, which had no part in them"


def _strayed(results: dict[str, Any], entry: dict[str, Any], bound: float) -> str | None:
    """Rule 4 of `why_last`."""
    own = next(at["drift"] for at in entry["strengths"] if at["strength"] == entry["best_strength"])
    base = results["arms"][results["base"]]["spread"]
    for embedder, found in own.items():
        apart = (base.get(embedder) or {}).get("diversity")
        if apart is None or apart["mean"] <= 0 or found["ci"] is None or found["ci"][0] <= bound * apart["mean"]:
            continue
        return (
            f"its images lie {found['mean'] / apart['mean']:.1f} times as far from the base's, by {embedder}, as the base's images of one "
            f"prompt lie apart; round_drift allows {bound:g}"
        )
    return None


def _ends(entry: dict[str, Any]) -> str:
    if entry["ci"] is None:
        return f"{entry['mean']:+.3f}"
    return f"{entry['mean']:+.3f}, {entry['ci'][0]:+.3f} to {entry['ci'][1]:+.3f}"


# ---- what is told


def curve_words(route: Route, found: list[dict[str, Any]]) -> list[str]:
    """What became of the rounds, a line each."""
    lines = []
    for entry in found:
        low, high = entry["gain"]["ci"] or (float("nan"), float("nan"))
        lines.append(
            f"round {entry['round']}: gain {entry['gain']['mean']:+.3f} ({low:+.3f} to {high:+.3f}) at strength {entry['strength']:g}"
        )
    best = last_gain(found)
    if best < len(found):
        lines.append(f"round {best + 1} ended the rounds: {found[best]['ended']}; round {best} is taken")
    return lines


def draw_curve(found: list[dict[str, Any]], file: Path) -> None:
    """The gain over the base by round, with intervals, as a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    from dedpo_diffusion.core.files import atomic_file

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    mean, rounds = np.array([entry["gain"]["mean"] for entry in found]), [entry["round"] for entry in found]
    ends = np.array([entry["gain"]["ci"] or [np.nan, np.nan] for entry in found])
    axes.errorbar(rounds, mean, yerr=np.abs(ends.T - mean), marker="o", capsize=4)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel="round", ylabel="gain over the base at the best strength", xticks=rounds)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _pair_steps(here: Route, last: Route, known: costs.Known, method: str) -> Iterator[Step]:
    """New pairs of the latest LoRA, labelled, and joined with all earlier ones."""
    s, new = here.settings, here.folder / f"round-{here.number}"
    source, limit = here.prompts("proposed")
    options = ["--prompts", source, "--out", str(new), "--seed", str(s.seed + PROPOSAL_SEED * here.number)]
    options += ["--images_per_prompt", str(s.images_per_prompt), "--lora", str(last.lora(method))]
    options += [] if limit is None else ["--limit", str(limit)]
    yield Step(
        here.step("propose"), "propose", (*here.model(), *options, *here.sampler()), (*existing(source), last.lora(method)),
        (new / "pairs",), (new,), redo="replace" if not s.round_votes or s.people == "simulated" else "refuse", resumes=True,
        whole=True, free=("--batch", "--device"), cost=costs.propose(s, known),
    )  # fmt: skip
    yield from label_steps(here, known, new)
    yield from _people_steps(here, new)
    judged = [new / "labels" / f"{name}.parquet" for name in here.judges()]
    asked = [new / "labels" / "human.parquet"] if s.round_votes else []
    earlier = (last.pairs / "pairs", last.label("human"), *map(last.label, here.judges()))
    yield Step(
        here.step("join"), "pairs", ("join", str(last.pairs), "--others", str(new), "--out", str(here.pairs)),
        (*earlier, new / "pairs", *judged, *asked), (here.pairs / "pairs",), (here.pairs,), cost="copies every image once",
    )  # fmt: skip


def _people_steps(here: Route, new: Path) -> Iterator[Step]:
    """People's answers about new pairs: those that judges are least sure of, or the simulated people's about a random share."""
    s, human = here.settings, new / "labels" / "human.parquet"
    if not s.round_votes:
        return
    if s.people == "simulated":
        simulated = (str(new), "--answers", str(s.round_votes), "--seed", str(s.seed + here.number))
        yield Step(
            here.step("human"), "human", simulated, (new / "pairs",), (human,), (human,), cost=f"{s.round_votes} answers, in seconds"
        )
        return
    votes = (new / "votes" / "human.sqlite",)
    argv = (str(new), "--until", str(s.round_votes), "--open", "true", "--order", "disagreement")
    yield Step(
        here.step("vote"), "vote", argv, (new / "pairs",), (human,), votes, redo="stage", resumes=True, free=("--until", "--open"),
        cost=f"{s.round_votes} answers of people, about 5 seconds each",
    )  # fmt: skip
