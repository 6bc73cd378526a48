"""A judge's diagnosis as one picture: is it as sure as it should be, what does it lean to, where does it disagree with people?"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.labels.image_statistics import WORDS
from dedpo_diffusion.labels.judge_diagnosis import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER, PANEL, INK, SOFT, RULE, BLUE, PALE = "#fbfbfa", "#ffffff", "#191d24", "#626a77", "#e3e4e6", "#2f6fd0", "#a9c4ee"
INCHES, DOTS = (14.0, 9.0), 100  # 1400 x 900 pixels
MOST = 10  # lines of one panel
LONG = 18  # letters of a label
LEGEND = "blue: beyond chance; hollow: it overlooks what people dislike, or errs at random"
STYLE: dict[Any, Any] = {
    "font.size": 10.5, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": RULE, "axes.facecolor": PANEL,
    "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 10, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": RULE, "grid.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(report: dict[str, Any], path: Path, title: str) -> Path:
    """Draw a diagnosis into a PNG of 1400 x 900 pixels, written atomically.

    Args:
        report: of `diagnosis.diagnose`.
        path: the picture; an older one is replaced.
        title: its headline; what the report says first stands below it.

    Returns:
        `path`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        figure.text(0.03, 0.955, plain(title), fontsize=17, fontweight="bold")
        figure.text(0.03, 0.922, plain(report["sentences"][0]), fontsize=11, color=SOFT)
        grid = {"left": 0.06, "right": 0.97}
        top = figure.add_gridspec(2, 2, top=0.86, bottom=0.50, height_ratios=[4, 1], width_ratios=[1, 1.75], hspace=0.1, **grid)
        low = figure.add_gridspec(1, 3, top=0.39, bottom=0.075, wspace=0.62, **grid)
        _reliability(figure.add_subplot(top[0, 0]), report)
        _histogram(figure.add_subplot(top[1, 0]), report)
        _leans(figure.add_axes((0.50, 0.545, 0.29, 0.315)), report["leans"])
        _margins(figure.add_subplot(low[0, 0]), report)
        words = [(entry["is"], entry) for entry in report["by_word"]]
        _parts(figure.add_subplot(low[0, 1]), report, words, "Agreement where the prompt says", "no word stands\nin 20 labelled pairs")
        _parts(figure.add_subplot(low[0, 2]), report, *_other_parts(report), "nothing else to split the pairs by")
        with atomic_file(path) as temporary:
            canvas.print_png(str(temporary))
    return path


def plain(text: str) -> str:
    """Dollar signs would start a formula."""
    return text.replace("$", r"\$")


def _short(text: str) -> str:
    """The end of a long name tells models apart."""
    return plain(text if len(text) <= LONG else "…" + text[1 - LONG :])


def reach(value: float, ci: list[float] | None) -> list[list[float]] | None:
    """Lengths of an error bar to both sides."""
    return None if ci is None else [[max(0.0, value - ci[0])], [max(0.0, ci[1] - value)]]


def _nothing(axes: Axes, why: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, why, ha="center", va="center", color=SOFT, transform=axes.transAxes)


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


# ---- is it as sure as it should be?


def _reliability(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("Is it as sure as it should be?")
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    for point in report["reliability"]:
        ends = reach(point["observed"], point["ci"])
        axes.errorbar(point["confidence"], point["observed"], yerr=ends, fmt="o", color=BLUE, ecolor=PALE, elinewidth=2.5, markersize=5.5)
    error = report["calibration_error"]
    axes.text(0.02, 0.96, f"calibration error {error['value']:.3f}", transform=axes.transAxes, va="top", color=SOFT)
    axes.text(0.02, 0.88, f"({error['by_chance']:.3f} by chance)", transform=axes.transAxes, va="top", color=SOFT)
    lowest = min([0.45, *(point["ci"][0] - 0.03 for point in report["reliability"])])
    axes.set(xlim=(0.49, 1.015), ylim=(lowest, 1.03), ylabel="people agree")
    axes.tick_params(labelbottom=False)
    _percent_axis(axes.yaxis)


def _histogram(axes: Axes, report: dict[str, Any]) -> None:
    counts = report["histogram"]
    width = 0.5 / len(counts)
    axes.bar([0.5 + width * (k + 0.5) for k in range(len(counts))], counts, width=width * 0.86, color=PALE)
    axes.set(xlim=(0.49, 1.015), xlabel="the judge's confidence", yticks=[0, max(counts)], ylabel="pairs")
    _percent_axis(axes.xaxis)


# ---- what does it lean to?


def _leans(axes: Axes, leans: list[dict[str, Any]]) -> None:
    """Left of the middle the judge over-rates the image on the left, compared with people."""
    axes.set_title("What does it lean to, relative to people?")
    if not leans:
        _nothing(axes, "the images of a pair do not differ in anything measured")
        return
    for row, lean in enumerate(leans):
        _line(axes, row, lean, (BLUE, PALE) if lean["named"] else (SOFT, RULE), filled=lean["kind"] != "overlooks")
        high, low = poles(lean["statistic"])
        up, named = lean["value"] > 0, "bold" if lean["named"] else "normal"
        ends = ((-0.015, "right", low, not up), (1.015, "left", high, up))
        for x, side, words, bold in ends:
            weight = named if bold else "normal"
            axes.text(x, row, words, transform=axes.get_yaxis_transform(), ha=side, va="center", fontweight=weight)
        for x, label in ((1.46, lean["people"]), (1.62, lean["judge"])):
            colour = INK if lean["named"] else SOFT
            axes.text(x, row, f"{label:.2f}", transform=axes.get_yaxis_transform(), ha="right", va="center", color=colour)
    for x, who in ((1.46, "people"), (1.62, "judge")):
        axes.text(x, 1.03, who, transform=axes.transAxes, ha="right", color=SOFT)
    _name_rows(axes, [""] * len(leans))
    far = 1.1 * max(0.05, *(abs(end) for lean in leans for end in lean["ci"] or [lean["value"]]))
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set(xlim=(-far, far), xlabel="mean label of the judge less that of people, for the image on the right\n" + LEGEND)


def poles(name: str) -> tuple[str, str]:
    """Words for the higher and the lower value of a statistic.

    "the image with more contrast" -> "more contrast"; "the busier image (more detail)" -> "busier".
    """
    high, low = (re.sub(r"^the |image (with|of) | image| \(.*\)", "", words) for words in WORDS.get(name, (f"more {name}", f"less {name}")))
    return high, low


def _line(axes: Axes, row: int, stat: dict[str, Any], colours: tuple[str, str], *, filled: bool = True) -> None:
    style: dict[str, Any] = {"fmt": "o", "color": colours[0], "ecolor": colours[1]}
    style |= {"elinewidth": 3, "markersize": 6.5, "markeredgewidth": 1.8}
    ends = reach(stat["value"], stat["ci"])
    axes.errorbar(stat["value"], row, xerr=ends, markerfacecolor=colours[0] if filled else PANEL, **style)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.grid(axis="y", visible=False)


# ---- where does it disagree?


def _overall(axes: Axes, report: dict[str, Any], *, across: bool = False) -> None:
    value = report["agreement"]["value"]
    if value is not None:
        (axes.axhline if across else axes.axvline)(value, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))


def _margins(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("Agreement, from least to most sure")
    known = [part for part in report["by_margin"] if part["value"] is not None]
    if not known:
        _nothing(axes, "no pair with a winner")
        return
    for place, part in enumerate(known):
        ends = reach(part["value"], part["ci"])
        axes.errorbar(place, part["value"], yerr=ends, fmt="o", color=BLUE, ecolor=PALE, elinewidth=3, markersize=6.5)
    axes.set_xticks(range(len(known)), [textwrap.fill(_range(50 + 100 * part["low"], 50 + 100 * part["high"], "%"), 6) for part in known])
    axes.set(xlim=(-0.6, len(known) - 0.4), ylim=(min(0.45, *(part["ci"][0] - 0.03 for part in known)), 1.03))
    axes.grid(axis="x", visible=False)
    _overall(axes, report, across=True)
    _percent_axis(axes.yaxis)


def _range(low: float, high: float, unit: str) -> str:
    """ "8 words", "8 to 12 words"."""
    ends = dict.fromkeys((f"{low:.0f}", f"{high:.0f}"))
    return f"{' to '.join(ends)} {unit}"


def _other_parts(report: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """The parts of the last panel: by the side that people chose, and by source columns or else by the image that they chose."""
    sides = [(f"image {k}", report["side"][f"image_{k}"]) for k in (0, 1)]
    if report["by_group"]:
        parts = [(f"{column}: {entry['is']}", entry) for column, entries in report["by_group"].items() for entry in entries]
        sides = [(f"chose {name}", entry) for name, entry in sides]
        others, title = sorted(parts, key=lambda part: part[1]["value"]), "Agreement by people's side and what made the pair"
    else:
        told = [lean["statistic"] for lean in report["leans"][: (MOST - len(sides)) // 2]]
        both = [zip(poles(name), ("chose_higher", "chose_lower"), strict=True) for name in told]
        others = [(words, report["by_statistic"][name][key]) for name, poles in zip(told, both, strict=True) for words, key in poles]
        title = "Agreement where people chose"
    return [part for part in [*sides, *others] if part[1]["value"] is not None], title


def _parts(axes: Axes, report: dict[str, Any], parts: list[tuple[str, dict[str, Any]]], title: str, why: str) -> None:
    """The parts with the least agreement, worst first; those that stand out are blue."""
    axes.set_title(title)
    if not parts:
        _nothing(axes, why)
        return
    shown = parts[:MOST]
    for row, (_, entry) in enumerate(shown):
        _line(axes, row, entry, (BLUE, PALE) if entry.get("p", 1.0) < LEVEL else (SOFT, RULE))
    _name_rows(axes, [f"{_short(name)} ({entry['n']})" for name, entry in shown])
    _overall(axes, report)
    axes.set_xlim(min(0.45, *(entry["ci"][0] - 0.03 for _, entry in shown)), 1.03)
    axes.set_xlabel(f"the {MOST} lowest of {len(parts)}" if len(parts) > MOST else "")
    _percent_axis(axes.xaxis)
