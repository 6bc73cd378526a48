"""Is a model better than its base, by how much, and how sure is that?

    dedpo compare samples/base samples/tuned --out report.html
    dedpo compare samples/base samples/human samples/tuned --out report.html      where these hold strengths of LoRAs: each at its best

Sample folders that share prompts and seeds and hold scores (`dedpo score`); the first is the base. Writes the page, and
beside it `results.json` and `contact_sheet.png`. How folders are paired: `arms`; the statistics: `intervals`, `numbers`, `spread`,
`preferences` (people's votes), `strengths` and `loras` (the best strength of a LoRA); the words: `verdict`, `at_best`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import Progress, UserError, held_already, say, say_next, say_replaced, stage
from dedpo_diffusion.evaluation.comparison.arms import Arm, counted, load_arm, load_arms
from dedpo_diffusion.evaluation.comparison.verdict import best_arm
from dedpo_diffusion.settings import CompareSettings

__all__ = ["Arm", "best_arm", "compare", "load_arm", "main", "run"]

SCHEMA = 3


def choose_primary(settings: CompareSettings, scorers: dict[str, dict[str, Any]], *, people: bool) -> str:
    """The scorer of the verdict: the one that is asked for; or the first that is held out; or people, if they judged every arm; or the
    first."""
    for name, option in ((settings.primary, "--primary"), *((held, "--held_out") for held in settings.held_out)):
        if name is not None and name not in scorers:
            if name == "people":
                raise UserError(f"{option} people: no votes on these images of two prompts or more; run `dedpo vote BASE ARM` first")
            raise UserError(f"{option} {name}: no scorer that all folders share (those are: {', '.join(scorers)})")
    held_out = [name for name, facts in scorers.items() if facts["role"] == "held_out" and facts["kind"] == "scorer"]
    return settings.primary or (held_out or (["people"] if people else list(scorers)))[0]


def describe_scorers(
    settings: CompareSettings, arms: Sequence[Arm], shared: Sequence[str], people: bool
) -> tuple[dict[str, Any], list[str]]:
    """`scorers` of the results, and what there is to tell of their roles."""
    from dedpo_diffusion.evaluation.comparison.rewards import rewards_of
    from dedpo_diffusion.evaluation.comparison.verdict import roles

    versions = {scorer: arms[0].versions[scorer] for scorer in shared}
    role, notes = roles(versions, settings.held_out, settings.targets, *rewards_of(arms[1:]))
    found: dict[str, Any] = {
        scorer: {"version": version, "kind": "scorer", "role": role[scorer], "held_out": role[scorer] == "held_out"}
        for scorer, version in versions.items()
    }
    if people:
        found["people"] = {"version": "votes", "kind": "people", "role": "held_out", "held_out": True}
    return found, notes


def analyse(settings: CompareSettings, arms: Sequence[Arm], told: Sequence[str] = ()) -> dict[str, Any]:
    """The results of loaded arms: what `results.json` holds. `told` are the notes of loading them."""
    from dedpo_diffusion.evaluation.comparison import at_best, cautions, numbers, verdict
    from dedpo_diffusion.evaluation.comparison.arms import categories, shared_scorers
    from dedpo_diffusion.evaluation.comparison.loras import find_loras
    from dedpo_diffusion.evaluation.comparison.preferences import NAME, read_judged, summary, votes_notes
    from dedpo_diffusion.evaluation.comparison.spread import spread

    if settings.resamples < 100:
        raise UserError(f"resamples is {settings.resamples}; a standard error takes at least 100")
    if settings.seed < 0:
        raise UserError(f"seed is {settings.seed}; give 0 or a larger whole number")
    options: dict[str, Any] = {"resamples": settings.resamples, "seed": settings.seed}
    base, shared, judged, notes = arms[0], shared_scorers(arms), read_judged(arms), [*told, *votes_notes(arms)]
    names, disagreements = categories(arms)
    loras, lora_notes = find_loras(arms)
    with Progress("intervals", 2 + len(set(names) - {None})) as progress:
        measured = numbers.measure(arms, shared, judged, **options)
        progress.advance()
        for name, entry in measured.items():
            if NAME in entry and entry[NAME].prompts < 2:
                notes.append(f"People judged images of one prompt only of {name}, which says nothing about other prompts.")
                del entry[NAME]
        by_category = numbers.by_category(arms, shared, judged, names, progress.advance, **options)
        spreads, left_out = spread(arms, **options)
        progress.advance()
    scorers, role_notes = describe_scorers(settings, arms, shared, any(NAME in entry for entry in measured.values()))
    primary = choose_primary(settings, scorers, people=all(NAME in measured[arm.name] for arm in arms[1:]))
    found: dict[str, Any] = {}
    for arm in arms:
        entry, said = measured[arm.name], judged.get(arm.name)
        scores = {s: m.mean.as_dict() | {"n": m.n, "version": arm.versions[s]} for s, m in entry.items() if m.mean is not None}
        listed = numbers.by_scorer(entry)
        found[arm.name] = {
            **scores, "by_scorer": listed,
            **{key: value for key, value in listed.get(primary, {}).items() if key != "n"},
            "categories": by_category[arm.name], "spread": spreads[arm.name],
            "people": None if said is None else summary(arm, base, said, shared, **options),
            "warnings": [],
        }  # fmt: skip
    results = {
        "schema": SCHEMA, "verdict": "", "notes": notes, "primary": primary, "base": base.name,
        "n_images": len(base.rows), "n_prompts": len(set(base.prompts.tolist())), **options,
        "scorers": scorers, "arms": found, "differences": numbers.differences(arms, primary, judged, **options), "loras": {},
    }  # fmt: skip
    if settings.choose_by is not None and not loras:
        raise UserError("--choose_by chooses among strengths of a LoRA, and no LoRA here was sampled at several; leave it out")
    if loras:
        results["loras"], choices = best_strengths(settings, loras, arms, measured, spreads, judged, scorers, primary)
        lora_notes += choices
        for name in results["loras"].keys() & found.keys():  # the arm of strength 1 bears the LoRA's name
            found[name] |= {key: results["loras"][name][key] for key in ("best_strength", "gain_at_best_strength")}
    for name in list(found)[1:]:
        found[name]["warnings"] = verdict.warnings(results, name)
    for name, warned in at_best.warnings(results).items():
        results["loras"][name]["warnings"] = warned
    results["notes"] += [*verdict.sampling_notes(arms), *role_notes, *disagreements, *left_out]
    results["notes"] += [*lora_notes, *verdict.category_notes(at_best.at_best(results))]
    results["notes"] += [text for path in settings.targets for text in cautions.judge_pays(path.stem, verdict.read_targets_report(path))]
    seen = primary if primary in shared else shared[0]
    results["verdict"] = " ".join([at_best.sentence(results), *cautions.collapse_sentences(arms, seen)])
    return results


def best_strengths(
    settings: CompareSettings, loras: Sequence[Any], arms: Sequence[Arm], measured: Any, spreads: Any, judged: Any,
    scorers: dict[str, Any], primary: str,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """`loras` of the results, and notes on how the strengths were chosen."""
    from dedpo_diffusion.evaluation.comparison.loras import choose_scorer, lora_results
    from dedpo_diffusion.evaluation.comparison.strengths import halves

    half = halves(arms[0].prompts, settings.seed)
    shared = [name for name, facts in scorers.items() if facts["kind"] == "scorer"]
    choose_by, notes = choose_scorer(settings.choose_by, primary, list(scorers), loras, judged, half)
    found, more = lora_results(
        loras, arms, measured, spreads, judged, shared=shared, primary=primary, choose_by=choose_by, half=half,
        resamples=settings.resamples, seed=settings.seed,
    )  # fmt: skip
    return found, notes + more


def compare(settings: CompareSettings) -> dict[str, Any]:
    """The results of the settings' folders; nothing is written.

    Returns:
        schema (3), verdict, notes, primary, base, n_images, n_prompts, resamples, seed; `scorers.NAME.{version, kind, role, held_out}`;
        of each arm, under `arms.ARM`: `SCORER.{mean, ci, n, version}`; `by_scorer.SCORER.gain_over_base.{mean, ci, p, p_holm}`,
        `.win_rate_vs_base.{mean, ci}` and `.n`, with people as a scorer where they voted; `gain_over_base` and `win_rate_vs_base`
        on the primary scorer; `categories.CATEGORY.SCORER`, `spread.EMBEDDER.{version, diversity, diversity_minus_base, drift}`,
        `people`, `warnings`; `differences.LATER_minus_EARLIER.{mean, ci}` on the primary scorer; and of each LoRA that was sampled at
        several strengths, under `loras.NAME`: `file`, `sha256`; `strengths`, a list of `strength`, `arm`, `gain.SCORER.{mean, ci}` and
        `drift.EMBEDDER.{mean, ci}`; `choose_by`; `best_strength` on all prompts and its `best_arm`; `chosen`, at which strength the first
        and the second half of the prompts are judged; by these `by_scorer` (as an arm's), `gain_at_best_strength.{mean, ci}`,
        `win_rate_at_best_strength`, `best_minus.OTHER.{mean, ci}` and `best_wins.OTHER.{mean, ci}` (OTHER is a LoRA at its own, or an
        arm), `best_minus_by_scorer.LORA.SCORER.{mean, ci}`, `warnings`. The arm that bears the LoRA's name, that of strength 1, has
        `best_strength` and `gain_at_best_strength` too.

    Raises:
        UserError: folders that cannot be compared.
    """
    arms, notes = load_arms(settings.folders)
    return analyse(settings, arms, notes)


# ---- printed


def print_tables(results: dict[str, Any]) -> None:
    """One table a scorer, then categories on the primary scorer, then diversity, drift and people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dedpo_diffusion.evaluation.comparison import verdict

    words = {
        "held_out": "held out",
        "made_labels": "made the labels",
        "reward": "the reward in training",
        "unknown": "not known to be held out",
    }
    for scorer, facts in results["scorers"].items():
        title = f"{scorer} ({facts['version']}), {words[facts['role']]}"
        table = Table(
            "arm", "mean", "gain over base (95 %)", "p, Holm", "win rate (95 %)", title=title, box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        for name, arm in results["arms"].items():
            if scorer in arm["by_scorer"]:
                digits, is_people = verdict.decimals(results, scorer), facts["kind"] == "people"
                table.add_row(name, *_cells(arm, scorer, digits, is_base=name == results["base"], is_people=is_people))
        Console().print(table)
    others = list(results["arms"])[1:]
    categories = list(dict.fromkeys(category for name in others for category in results["arms"][name]["categories"]))
    if categories:
        digits = verdict.decimals(results, results["primary"])
        table = Table("category", *others, title=f"gain on {results['primary']} by category", box=box.SIMPLE)
        for category in categories:
            held = [results["arms"][name]["categories"].get(category, {}).get(results["primary"]) for name in others]
            table.add_row(category, *("-" if entry is None else _signed(entry["gain_over_base"], digits) for entry in held))
        Console().print(table)
    for line in _lora_lines(results):
        say(line)
    for name in results["arms"]:
        for line in [*_spread_lines(results, name), *_people_lines(results, name)]:
            say(line)


def _lora_lines(results: dict[str, Any]) -> Iterator[str]:
    """Of each LoRA the gains at all its strengths, and what it is worth at its best."""
    from dedpo_diffusion.evaluation.comparison import verdict

    primary = results["primary"]
    digits = verdict.decimals(results, primary)
    for name, entry in results["loras"].items():
        tried = [f"{at['strength']:g}: {_signed(at['gain'].get(primary), digits)}" for at in entry["strengths"]]
        yield f"{name}, gain on {primary} by strength: {'; '.join(tried)}"
        chosen = " and ".join(f"{strength:g}" for strength in dict.fromkeys(entry["chosen"]))
        worth = _signed(entry["gain_at_best_strength"], digits)
        yield (
            f"{name} is best at strength {entry['best_strength']:g} by {entry['choose_by']}; with each half of the prompts judged at the "
            f"strength that the other half chose ({chosen}), gain {worth}"
        )


def _signed(entry: dict[str, Any] | None, digits: int) -> str:
    if entry is None:
        return "-"
    ends = "" if entry["ci"] is None else f" ({entry['ci'][0]:+.{digits}f} to {entry['ci'][1]:+.{digits}f})"
    return f"{entry['mean']:+.{digits}f}{ends}"


def _cells(arm: dict[str, Any], scorer: str, digits: int, *, is_base: bool, is_people: bool) -> list[str]:
    entry = arm["by_scorer"][scorer]
    gain, wins = entry["gain_over_base"], entry["win_rate_vs_base"]
    low, high = wins["ci"]
    p = "<0.001" if gain["p_holm"] < 0.001 else f"{gain['p_holm']:.3f}"
    changes = ["-", "-", "-"] if is_base else [_signed(gain, digits), p, f"{wins['mean']:.1%} ({low:.1%} to {high:.1%})"]
    return ["-" if is_people else f"{arm[scorer]['mean']:.{digits}f}", *changes]


def _spread_lines(results: dict[str, Any], name: str) -> list[str]:
    lines = []
    for embedder, entry in results["arms"][name]["spread"].items():
        seen, moved = entry["diversity"], entry["drift"]
        parts = [] if seen is None else [f"diversity over seeds {seen['mean']:.4f}"]
        if name != results["base"]:
            parts[:1] = [f"{part}, {_signed(entry['diversity_minus_base'], 4)} against {results['base']}" for part in parts]
            parts.append(f"drift from {results['base']} {moved['mean']:.4f} ({moved['ci'][0]:.4f} to {moved['ci'][1]:.4f})")
        if parts:
            lines.append(f"{name}, by {embedder}: {'; '.join(parts)}")
    return lines


def _people_lines(results: dict[str, Any], name: str) -> list[str]:
    said = results["arms"][name]["people"]
    if said is None:
        return []
    raters = f"{len(said['raters'])} {'person' if len(said['raters']) == 1 else 'people'}"
    line = f"{name}, people: {counted(said['answers'], 'answer')} to {counted(said['pairs'], 'pair')} by {raters}"
    if said["agreement"] is not None:
        line += f"; two people's answers to one pair are equal in {said['agreement']['raw']['value']:.0%} of cases"
    alike = [
        f"{scorer} in {entry['mean']:.0%} of {counted(entry['n'], 'pair')}" for scorer, entry in said["with_scorers"].items() if entry["n"]
    ]
    return [line + (f"; they agree with {' and '.join(alike)}" if alike else "")]


def run(settings: CompareSettings) -> dict[str, Any]:
    """Compare sample folders that share prompts and seeds; the first is the base."""
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.evaluation.report.page import write_report

    if settings.out.is_dir():
        raise UserError(f"--out {settings.out} is a folder; name the page to write, such as {settings.out / 'report.html'}")
    arms, notes = load_arms(settings.folders)
    results = analyse(settings, arms, notes)
    results_file = settings.out.parent / "results.json"
    beside = (settings.out.parent / name for name in ("contact_sheet.png", "frontier.png"))
    before = held_already(settings.out, *beside, results_file)
    made = write_report(settings, arms, results)
    write_json(results_file, results)
    print_tables(results)
    for note in results["notes"]:
        say(note)
    for name, arm in results["arms"].items():
        for warning in arm["warnings"]:
            say(f"{name}: {warning}")
    say(results["verdict"])
    say(f"wrote {', '.join(map(str, (*made, results_file)))}")
    say_replaced([path for path in before if path in (*made, results_file)])
    if any(facts["kind"] == "people" for facts in results["scorers"].values()):
        run = settings.runs[0] if settings.runs else "RUN"
        say_next("export", run, "--out", f"{Path(run).name}.safetensors", "--results", results_file)
    else:
        best = best_arm(results)
        say_next("vote", arms[0].folder, next((arm for arm in arms[1:] if arm.name == best), arms[1]).folder)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(CompareSettings, run, argv, prog="dedpo compare", positional=("folders",))


if __name__ == "__main__":
    raise SystemExit(main())
