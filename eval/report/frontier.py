"""Reward against drift from the base, one curve a LoRA over its strengths: for the page as SVG, and as frontier.png."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.charts import Curve, apart, by_importance, chart, cut_below, number
from dedpo_diffusion.core.page import about, dot, section, table
from dedpo_diffusion.evaluation.comparison.at_best import places
from dedpo_diffusion.evaluation.comparison.verdict import decimals
from dedpo_diffusion.evaluation.report.sections import Results, interval, mark, ordered, plots

COLOURS = ("#8b929d", "#2f6fd0", "#d9822b", "#12916a", "#a44fb0", "#c2404e", "#2a9fb0")  # of the page's series, in the light
INCHES, DOTS = (8.0, 5.0), 120
DEPTH = 0.5  # how far below 0 the pictures go, in largest gains: deeper, the strengths that matter would be a speck


def axis(results: Results) -> tuple[str | None, str]:
    """The embedder whose drift is drawn across, and words for the axis; without embeddings of all arms it is the strength itself."""
    held = [set(at["drift"]) for entry in results["loras"].values() for at in entry["strengths"]]
    shared = [name for name in next(iter(results["arms"].values()))["spread"] if all(name in names for names in held)]
    return (shared[0], f"drift from {results['base']} (by {shared[0]})") if shared else (None, "strength of the LoRA")


def series_of(results: Results) -> dict[str, int]:
    """By LoRA, the number of its colour: the one that it has at its best strength elsewhere on the page."""
    listed = list(places(results))
    found = {lora: k for k, (_, _, lora) in enumerate(listed) if lora is not None}
    rest = [lora for lora in results["loras"] if lora not in found]
    return found | {lora: len(listed) + k for k, lora in enumerate(rest)}


def curves(results: Results, scorer: str) -> list[Curve]:
    """Of every LoRA the gains on a scorer, from the base on, with their intervals as a band; the best strength is marked."""
    embedder, _ = axis(results)
    series, found = series_of(results), []
    for name, entry in results["loras"].items():
        points, band, labels, best = [(0.0, 0.0)], [(0.0, 0.0, 0.0)], [""], None
        for at in entry["strengths"]:
            gain = at["gain"].get(scorer)
            if gain is None:
                continue
            x = at["strength"] if embedder is None else at["drift"][embedder]["mean"]
            low, high = gain["ci"] or (gain["mean"], gain["mean"])
            points.append((x, gain["mean"]))
            band.append((x, low, high))
            labels.append(f"{at['strength']:g}")
            best = points[-1] if at["strength"] == entry["best_strength"] else best
        if len(points) > 1:
            found.append(Curve(name, points, series[name], best, band, labels))
    return found


def framed(lines: list[Curve]) -> tuple[list[Curve], str]:
    """The curves down to about half the largest gain below 0, and a sentence about those that go on; all of them where nothing gains."""
    floor = float(f"{-DEPTH * max(y for curve in lines for _, y in curve.points):.2g}")
    cut = [cut_below(curve, floor) for curve in lines] if floor < 0 else lines
    on = [curve.name for curve, whole in zip(cut, lines, strict=True) if curve is not whole]
    if not on:
        return cut, ""
    goes = "goes" if len(on) == 1 else "go"
    return cut, f"The picture ends at {number(floor)}; {' and '.join(on)} {goes} on below it: see the table of all strengths."


def strengths_section(results: Results) -> str:
    """Pictures of all scorers, what each LoRA is worth at its best, and all gains by strength; nothing without several strengths."""
    if not results.get("loras"):
        return ""
    _, across = axis(results)
    drawn = []
    for scorer in ordered(results):
        lines = curves(results, scorer)
        if lines:
            title = f"gain over {results['base']} on {scorer} against {across}"
            lines, cut = framed(lines)
            caption = f'<p class="about">{escape(across)} →{f"<br>{escape(cut)}" if cut else ""}</p>'
            picture = chart(lines, title, zero=True)
            drawn.append(f'<figure class="panel"><h3>{escape(scorer)} {mark(results, scorer)}</h3>{picture}{caption}</figure>')
    series = series_of(results)
    legend = "".join(f"<span>{dot(series[lora])}{escape(lora)}</span>" for lora in results["loras"])
    chooser = next(iter(results["loras"].values()))["choose_by"]
    how = (
        f"One curve a LoRA, from {results['base']} over the strengths that were sampled. Shaded: 95 % intervals. Ring: the best strength, "
        f"chosen by {chooser}. A curve that lies above another gains more for the same change of the images."
    )
    fair = (
        "The largest of several gains is flattered by chance. So each half of the prompts is judged at the strength that the other half "
        f"chose: the verdict and the scores below are these. An arm that bears a LoRA's name is strength 1. {_picked(results)}"
    )
    key = f'<p class="legend">{legend}</p>'
    return section("Strengths", about(how), key, plots(drawn), about(fair), *_tables(results, series))


def _picked(results: Results) -> str:
    """How well the halves agree, in a sentence."""
    split = [name for name, entry in results["loras"].items() if len(set(entry["chosen"])) > 1]
    if not split:
        return "Here both halves chose alike for every LoRA."
    return f"Here they disagreed about {' and '.join(split)}: the strengths between cannot be told apart with these prompts."


def _tables(results: Results, series: dict[str, int]) -> Iterator[str]:
    """Each LoRA at its best, and every strength on every scorer."""
    scorers, embedder = ordered(results), axis(results)[0]
    forms = {scorer: f"+.{decimals(results, scorer)}f" for scorer in scorers}
    primary, rows = results["primary"], []
    for lora, entry in results["loras"].items():
        against = "<br>".join(
            f"{escape(other)}: {interval(gap, forms[primary])}<br>wins {interval(entry['best_wins'][other], '.1%')}"
            for other, gap in entry["best_minus"].items()
        )
        chosen = " and ".join(f"{strength:g}" for strength in entry["chosen"])
        worth = [interval(entry["gain_at_best_strength"], forms[primary]), interval(entry["win_rate_at_best_strength"], ".1%")]
        rows.append([dot(series[lora]) + escape(lora), f"<b>{entry['best_strength']:g}</b>", chosen, *worth, against or "–"])
    head = ["at its best", "strength", "chosen by the halves", f"gain on {escape(primary)}", "win rate", "minus another at its best"]
    yield f'<div class="panel">{table(head, rows)}</div>'
    rows = []
    for lora, entry in results["loras"].items():
        for at in entry["strengths"]:
            shown = f"{at['strength']:g}" + (" (best)" if at["strength"] == entry["best_strength"] else "")
            drift = [interval(at["drift"].get(embedder), ".4f")] if embedder else []
            gains = [interval(at["gain"].get(scorer), forms[scorer]) for scorer in scorers]
            rows.append([dot(series[lora]) + escape(lora), shown, *gains, *drift])
    head = ["LoRA", "strength", *(f"gain on {escape(scorer)}" for scorer in scorers), *(["drift"] if embedder else [])]
    yield f'<details class="panel"><summary>All strengths</summary>{table(head, rows)}</details>'


def draw_frontier(results: Results, path: Path) -> Path:
    """The picture of the verdict's scorer as PNG, written atomically; returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dedpo_diffusion.core.files import atomic_file

    figure = Figure(figsize=INCHES, dpi=DOTS, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    fill_frontier(figure.add_subplot(), results)
    with atomic_file(path) as temporary:
        canvas.print_png(str(temporary))
    return path


def fill_frontier(axes: Any, results: Results) -> None:
    """The curves of the verdict's scorer in matplotlib's axes, of a figure whose canvas can be drawn."""
    scorer, (embedder, across) = results["primary"], axis(results)
    axes.axhline(0, color="#626a77", linewidth=0.8, linestyle=(0, (3, 3)))
    whole = curves(results, scorer)
    drawn, cut = framed(whole) if whole else ([], "")
    for curve in drawn:
        _draw(axes, curve)
    axes.set_xlabel(_plain("\n".join(filter(None, (across, cut)))))
    axes.set_ylabel(_plain(f"gain over {results['base']} on {scorer}"))
    axes.set_title(f"Gain against {'drift' if embedder else 'strength'}; ring: best strength; shaded: 95 %", loc="left", fontsize=11)
    if drawn:
        axes.legend(frameon=False)
    axes.grid(color="#e3e4e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _write(axes, drawn)


def _draw(axes: Any, curve: Curve) -> None:
    """One LoRA: its band, line, strengths and best strength."""
    paint = _paint(curve)
    x, low, high = zip(*(curve.band or ()), strict=True)
    axes.fill_between(x, low, high, color=paint, alpha=0.15, linewidth=0)
    axes.plot(*zip(*curve.points, strict=True), color=paint, label=_plain(curve.name))
    dots = [point for point, label in zip(curve.points, curve.labels or (), strict=True) if label is not None]
    axes.plot(*zip(*dots, strict=True), color=paint, marker="o", markersize=4, linewidth=0)
    if curve.mark is not None:
        axes.plot(*curve.mark, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=paint, markeredgewidth=2)


def _paint(curve: Curve) -> str:
    return COLOURS[curve.series if curve.series < len(COLOURS) else 1 + (curve.series - 1) % (len(COLOURS) - 1)]


def _write(axes: Any, lines: list[Curve]) -> None:
    """The strengths beside their points, as far as there is room."""
    figure, told = axes.get_figure(root=True), by_importance(lines)
    figure.draw_without_rendering()  # the layout decides where points lie
    dot = figure.dpi / 72
    places = [axes.transData.transform(point) for _, point, _ in told]
    boxes = [
        (x - 3 * len(label) * dot, y + 6 * dot, x + 3 * len(label) * dot, y + 16 * dot)
        for (x, y), (*_, label) in zip(places, told, strict=True)
    ]
    for (curve, point, label), room in zip(told, apart(boxes), strict=True):
        if room:
            axes.annotate(label, point, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9, color=_paint(curve))


def _plain(text: str) -> str:
    """Dollar signs would start a formula."""
    return text.replace("$", r"\$")
