"""What the report says in numbers: verdict, warnings, scores of all arms by all scorers, people, categories, diversity and drift."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dedpo_diffusion.core.charts import Gain, forest
from dedpo_diffusion.core.page import about, dot, section, shown, table
from dedpo_diffusion.evaluation.comparison.arms import counted
from dedpo_diffusion.evaluation.comparison.cautions import is_few
from dedpo_diffusion.evaluation.comparison.verdict import decimals, gains_of

Results = dict[str, Any]
WARNING = "Warning: "  # how a sentence of a report begins that is one
MANY = 14  # categories; more are folded away
ROLES = {
    "held_out": "held out",
    "made_labels": "made the labels",
    "reward": "the reward in training",
    "unknown": "not known to be held out",
}
CAUTIONS = {
    "made_labels": "made the training labels: a model can please it without being better.",
    "reward": "was the reward in training: a model can please it without being better.",
    "unknown": "may have made the training labels; a model can please it without being better.",
}


# ---- what the results hold


def role(results: Results, scorer: str) -> str:
    """What a scorer is to the arms: one of ROLES."""
    facts = results["scorers"][scorer]
    return str(facts["role"])


def is_people(results: Results, scorer: str) -> bool:
    """Whether these scores are answers of people."""
    return results["scorers"][scorer].get("kind") == "people"


def ordered(results: Results) -> list[str]:
    """All scorers: the primary one, people, the others."""
    return sorted(results["scorers"], key=lambda name: (name != results["primary"], not is_people(results, name)))


def plots(drawn: Sequence[str]) -> str:
    """Panels in two or three columns, on a wide screen."""
    return f'<div class="plots" style="--columns:{2 if len(drawn) in (1, 2, 4) else 3}">{"".join(drawn)}</div>'


def as_gain(name: str, entry: dict[str, Any], series: int) -> Gain:
    """A line of an interval plot."""
    low, high = entry["ci"] or (None, None)
    return Gain(name, entry["mean"], low, high, series)


def interval(entry: dict[str, Any] | None, form: str) -> str:
    """A value, and its interval small beside it."""
    if entry is None:
        return "–"
    tail = "" if entry["ci"] is None else " to ".join(shown(float(end), form) for end in entry["ci"])
    return f"<b>{shown(float(entry['mean']), form)}</b> <small>{tail}</small>"


def mark(results: Results, scorer: str) -> str:
    """The scorer's role."""
    what = role(results, scorer)
    return f'<mark class="{what}">{ROLES[what]}</mark>'


# ---- the top


def headline(results: Results, best: str) -> str:
    """The verdict, what warns of it, and its numbers as cards."""
    arm, base, primary = results["arms"][best], results["base"], results["primary"]
    gain, wins, form = arm["gain_over_base"], arm["win_rate_vs_base"], f"+.{decimals(results, primary)}f"
    few = is_few(results["n_prompts"])  # their numbers are in the verdict, and in no large type
    boxes = (
        []
        if few
        else [
            _card(f"gain of {best} on {primary}", shown(gain["mean"], form), _ends(gain, form)),
            _card(f"win rate of {best} against {base}", shown(wins["mean"], ".1%"), _ends(wins, ".1%")),
        ]
    )
    for scorer in results["scorers"] if not few else ():
        if is_people(results, scorer) and scorer != primary and scorer in arm["by_scorer"]:
            asked = arm["by_scorer"][scorer]["win_rate_vs_base"]
            boxes.append(_card(f"pairs whose majority prefers {best}", shown(asked["mean"], ".1%"), _ends(asked, ".1%")))
    what = f"{results['n_prompts']} prompts; same prompt, seed and noise in every arm"
    boxes.append(_card("images per arm", str(results["n_images"]), what))
    arms = "".join(f"<li>{dot(k)}{escape(name)}</li>" for k, name in enumerate(results["arms"]))
    lead, _, rest = results["verdict"].partition(": ")
    words = f"{escape(lead.rstrip('.'))}. <span>{escape(rest[:1].upper() + rest[1:])}</span>"
    noted = "".join(f'<p class="note">{escape(note)}</p>' for note in results["notes"])
    return (
        f'<header><ul class="arms">{arms}</ul><h1>{words}</h1>{warnings(results)}{noted}<div class="cards">{"".join(boxes)}</div></header>'
    )


def _card(what: str, value: str, below: str) -> str:
    return f'<div class="card"><span>{escape(what)}</span><strong>{value}</strong><span>{escape(below)}</span></div>'


def _ends(entry: dict[str, Any], form: str) -> str:
    low, high = (shown(float(end), form) for end in entry["ci"])
    return f"95 %: {low} to {high}"


def warnings(results: Results) -> str:
    """What warns of the arms, impossible to miss; nothing where nothing does."""
    lines = [
        f"<li>{dot(k)}<b>{escape(name)}</b> {escape(text.removeprefix(WARNING))}</li>"
        for k, (name, arm) in enumerate(results["arms"].items()) for text in arm.get("warnings", ())
    ]  # fmt: skip
    return f'<div class="alarm" role="alert"><h2>Warning</h2><ul>{"".join(lines)}</ul></div>' if lines else ""


# ---- scores


def scores_section(results: Results) -> str:
    """Interval plots of all scorers, one table of all numbers, and which scorers to trust."""
    drawn = [_plot(results, scorer) for scorer in ordered(results)]
    told = [
        f'<p class="about">{mark(results, scorer)} {escape(scorer)} {CAUTIONS[role(results, scorer)]}</p>'
        for scorer in ordered(results) if role(results, scorer) in CAUTIONS
    ]  # fmt: skip
    how = (
        "An arm is one model, or one strength of a LoRA, with all its images. Gain over the base with its 95 % interval; a filled dot: the "
        "interval leaves out 0. Each scorer has its own scale."
    )
    return section("Scores", about(how), plots(list(filter(None, drawn))), combined(results), *told)


def _plot(results: Results, scorer: str) -> str:
    gains = [as_gain(name, entry["gain_over_base"], k) for k, name, entry in gains_of(results, scorer)]
    if not gains:
        return ""
    plot = forest(gains, f"gain over base on {scorer}", form=f"+.{decimals(results, scorer)}f")
    return f'<figure class="panel"><h3>{escape(scorer)} {mark(results, scorer)}</h3>{plot}</figure>'


def combined(results: Results) -> str:
    """One table: every arm by every scorer."""
    base, bodies = results["base"], []
    for scorer in ordered(results):
        facts = results["scorers"][scorer]
        version = "" if is_people(results, scorer) else f"<small>{escape(facts['version'])}</small>"
        digits = decimals(results, scorer)
        means = {} if is_people(results, scorer) else {name: arm[scorer] for name, arm in results["arms"].items()}
        lines = [f'<tr class="group"><th colspan="6">{escape(scorer)} {mark(results, scorer)} {version}</th></tr>']
        if base in means:
            lines.append(_line(0, base, interval(means[base], f".{digits}f"), "", "", "", str(means[base]["n"])))
        for k, name, entry in gains_of(results, scorer):
            mine, gain = means.get(name), entry["gain_over_base"]
            count = entry["n"] if mine is None else mine["n"]
            chance = _chance(gain.get("p_holm"))
            values = (
                interval(mine, f".{digits}f") if means else "",
                interval(gain, f"+.{digits}f"),
                interval(entry["win_rate_vs_base"], ".1%"),
            )
            lines.append(_line(k, name, *values, chance, shown(count)))
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    head = "".join(f'<th title="{TERMS.get(words, "")}">{words}</th>' for words in ("arm", *COLUMNS))
    note = about(f"p (Holm): {TERMS['p (Holm)']} n: images.")
    return (
        f'<div class="scroll panel" tabindex="0"><table class="scores"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>{note}'
    )


TERMS = {  # what a heading means; quotes would end its tooltip
    "arm": "One model, or one strength of a LoRA.",
    "p (Holm)": "how often chance alone makes a difference this large either way; Holm's correction allows for looking at several scorers.",
    "win rate": "Share of images that score higher than the base's of the same prompt and seed; ties count half.",
    "drift": "How far images moved from the base's of the same prompt and seed.",
    "diversity": "How much the images of one prompt differ over its seeds.",
}
COLUMNS = ("mean", "gain over base", "win rate", "p (Holm)", "n")


def _line(series: int, name: str, *cells: str) -> str:
    inside = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(COLUMNS, cells, strict=True))
    return f"<tr><th>{dot(series)}{escape(name)}</th>{inside}</tr>"


def _chance(p: float | None) -> str:
    if p is None:
        return "–"
    return "&lt;0.001" if p < 0.001 else f"{p:.3f}"


def differences(results: Results) -> str:
    """The paired differences between the arms that are not the base."""
    rows, form = [], f"+.{decimals(results, results['primary'])}f"
    for name, entry in results["differences"].items():
        low, high = entry["ci"]
        told = "yes" if not low <= 0 <= high else "no"
        rows.append([escape(name.replace("_minus_", " − ")), interval(entry, form), told])
    return table(["difference", f"on {escape(results['primary'])}", "interval excludes 0"], rows) if rows else ""


# ---- people


def people_section(results: Results) -> str:
    """Who was asked, how far people agree with each other, and scorers with them."""
    panels = [_people(name, k, arm["people"]) for k, (name, arm) in enumerate(results["arms"].items()) if arm.get("people")]
    how = "Blind answers to base and arm side by side. A scorer agrees with people on a pair that it ranks as they do; ties are left out."
    return section("People", about(how), plots(panels)) if panels else ""


def _people(name: str, series: int, found: dict[str, Any]) -> str:
    raters = len(found["raters"])
    counts = (
        f"{counted(found['answers'], 'answer')} on {counted(found['pairs'], 'pair')} by {raters} {'person' if raters == 1 else 'people'}"
    )
    between = "".join(f"<li>{escape(line)}</li>" for line in _agreement(found["agreement"]))
    shares = [as_gain(f"{scorer} ({entry['n']})", entry, series) for scorer, entry in found["with_scorers"].items() if entry["n"]]
    plot = forest(shares, f"share of pairs on which scorers agree with people about {name}", line=0.5, form=".0%") if shares else ""
    told = f"<ul><li>{escape(counts)}</li>{between}</ul>"
    return f'<figure class="panel"><h3>{dot(series)}{escape(name)}</h3>{told}{plot}</figure>'


AGREEMENT = {"raw": "equal answers", "alpha": "Krippendorff's alpha"}


def _agreement(found: dict[str, Any] | None) -> list[str]:
    """The statistics between raters that exist, in words."""
    lines = []
    for key, entry in (found or {}).items():
        if isinstance(entry, dict) and entry.get("value", entry.get("mean")) is not None:
            words = AGREEMENT.get(key, key.replace("_", " "))
            lines.append(f"between people: {words} {shown(entry, '.0%' if key == 'raw' else '.2f')}")
    return lines


# ---- categories, diversity and drift


def categories_section(results: Results, best: str) -> str:
    """Gains of the best arm by the prompts' category, a plot for each scorer; folded away where there are many."""
    by_category = results["arms"][best].get("categories", {})
    if not by_category:
        return ""
    series = list(results["arms"]).index(best)
    drawn = []
    for scorer in ordered(results):
        gains = [
            as_gain(f"{category} ({found[scorer]['n_prompts']})", found[scorer]["gain_over_base"], series)
            for category, found in by_category.items() if scorer in found
        ]  # fmt: skip
        if gains:
            plot = forest(gains, f"gain of {best} on {scorer} by category", form=f"+.{decimals(results, scorer)}f")
            drawn.append(f'<figure class="panel"><h3>{escape(scorer)} {mark(results, scorer)}</h3>{plot}</figure>')
    how = f"Gain of {best} over {results['base']} by category; in brackets, its prompts. Of many categories some rise or fall by chance."
    folded = f"<details><summary>{len(by_category)} categories</summary>{plots(drawn)}</details>"
    return section("Categories", about(how), folded if len(by_category) > MANY else plots(drawn))


def spread_section(results: Results) -> str:
    """How much the images of one prompt differ, and how far they moved from the base's."""
    kinds = list(dict.fromkeys(kind for arm in results["arms"].values() for kind in arm.get("spread", {})))
    rows = []
    for kind in kinds:
        for k, (name, arm) in enumerate(results["arms"].items()):
            found = arm.get("spread", {}).get(kind)
            if found:
                nothing = ("diversity_minus_base", "drift") if name == results["base"] else ()  # the base from itself
                values = [interval(None if key in nothing else found.get(key), form) for key, form in SPREAD.values()]
                rows.append([dot(k) + escape(name), escape(kind), *values])
    how = (
        "Cosine distances of image embeddings. Diversity: between the images of one prompt over its seeds; a fall says that images of a "
        "prompt become alike. Drift: from the base's image of the same prompt and seed."
    )
    return (
        section("Diversity and drift", about(how), f'<div class="panel">{table(["arm", "embedder", *SPREAD], rows, titles=TERMS)}</div>')
        if rows
        else ""
    )


SPREAD = {"diversity": ("diversity", ".4f"), "minus base": ("diversity_minus_base", "+.4f"), "drift": ("drift", ".4f")}


def anchors(titles: Sequence[str]) -> str:
    """Links to the sections of these titles."""
    links = "".join(f'<a href="#{escape(title.split()[0].lower())}">{escape(title)}</a>' for title in titles)
    return f"<nav>{links}</nav>"
