"""What merged labels are worth as one picture: now, with more human labels, with a better judge; by judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.labels.judge_figure import BLUE, DOTS, INK, PALE, PANEL, PAPER, RULE, SOFT, STYLE, plain, reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LOW, HIGH = 14.0, 5.6, 9.6  # inches at 100 dots: without and with the second row
LONG = 17  # letters of a name
DASHED = (0, (4, 3))
DOT: dict[str, Any] = {"fmt": "o", "color": BLUE, "ecolor": BLUE, "elinewidth": 1.5, "markersize": 7}  # where things stand now


def draw(report: dict[str, Any], path: Path, title: str) -> Path:
    """Draw a report of `dedpo merge` into a PNG 1400 pixels wide, written atomically.

    Args:
        report: with its `curve`.
        path: the picture; an older one is replaced.
        title: its headline; what the report says first stands below it.

    Returns:
        `path`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(report["judges"]) > 1
    height = HIGH if several else LOW
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DOTS, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        figure.text(0.03, 1 - 0.42 / height, plain(title), fontsize=17, fontweight="bold")
        figure.text(0.03, 1 - 0.74 / height, plain(report["sentences"][0]), fontsize=11, color=SOFT)
        top = figure.add_gridspec(1, 3, left=0.125, right=0.97, top=1 - 1.35 / height, bottom=1 - 4.85 / height, wspace=0.28)
        for place, draws in enumerate((_now, _more_labels, _better_judge)):
            draws(figure.add_subplot(top[0, place]), report)
        if several:
            low = figure.add_gridspec(1, 2, left=0.185, right=0.97, top=1 - 6.0 / height, bottom=0.75 / height, wspace=0.16)
            _judges([figure.add_subplot(low[0, k]) for k in (0, 1)], report["judges"])
        with atomic_file(path) as temporary:
            canvas.print_png(str(temporary))
    return path


def _short(text: str) -> str:
    return plain(text if len(text) <= LONG else text[: LONG - 1] + "…")


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5))


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


# ---- the worth, now and with more


def _now(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("What the labels are worth")
    here, published = report["effective_human_labels"], report["effective_human_labels_power_1"]
    alone = report["n_human"]
    lines = [("human labels\nalone", {"value": alone}), ("at power 1,\nas published", published)]
    lines += [(f"as merged\n(power {report['power']:.2f})", here)]
    lines = [line for line in lines if line[1]["value"] is not None]
    for row, (_, entry) in enumerate(lines):
        mine = row == len(lines) - 1
        style: dict[str, Any] = {"color": BLUE if mine else SOFT, "ecolor": PALE if mine else RULE, "elinewidth": 4, "markersize": 8}
        axes.errorbar(entry["value"], row, xerr=reach(entry["value"], entry.get("ci")), fmt="o", **style)
        words: dict[str, Any] = {"fontweight": "bold" if mine else "normal", "bbox": {"facecolor": PANEL, "edgecolor": "none", "pad": 1.5}}
        axes.text(entry["value"], row - 0.16, f"{entry['value']:.0f}", ha="center", va="bottom", color=INK, **words)
    _rows(axes, [name for name, _ in lines])
    axes.axvline(alone, color=SOFT, linewidth=1, linestyle=DASHED)
    axes.set_xlim(0, 1.12 * max(max(entry.get("ci") or [entry["value"]]) for _, entry in lines))
    axes.set_xlabel("effective human labels")
    _few_ticks(axes.xaxis)


def _more_labels(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("What more human labels would buy")
    curve, here = report["curve"]["human_labels"], report["effective_human_labels"]
    axes.fill_between(curve["n"], curve["low"], curve["high"], color=PALE, alpha=0.6, linewidth=0)
    axes.plot(curve["n"], curve["value"], color=BLUE, linewidth=2)
    axes.plot([0, report["n"]], [0, report["n"]], color=SOFT, linewidth=1, linestyle=DASHED)
    axes.errorbar(report["n_human"], here["value"], yerr=reach(here["value"], here.get("ci")), **DOT)
    axes.text(0.97, 0.05, "dashed: as many, people alone", transform=axes.transAxes, ha="right", color=SOFT)
    axes.set(xlim=(0, report["n"] * 1.02), ylim=(0, report["n"] * 1.04), xlabel="human labels, taken at random", ylabel="worth")
    _few_ticks(axes.xaxis)


def _better_judge(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("What a better judge would buy")
    curve, here, known = report["curve"]["judge"], report["effective_human_labels"], report["agreement"]
    axes.plot(curve["agreement"], curve["value"], color=BLUE, linewidth=2)
    axes.axhline(report["n_human"], color=SOFT, linewidth=1, linestyle=DASHED)
    if known["value"] is not None and here["value"] is not None:
        bars: dict[str, Any] = {"xerr": reach(known["value"], known.get("ci")), "yerr": reach(here["value"], here.get("ci"))}
        axes.errorbar(known["value"], here["value"], **DOT, **bars)
        axes.text(0.03, 0.95, "dot: this judge, now", transform=axes.transAxes, va="top", color=SOFT)
    low = min(0.5, (known["ci"] or [0.5])[0])
    axes.set(xlim=(low - 0.01, 1.01), xlabel="agreement of a judge that answers 0 or 1", ylabel="worth")
    axes.set_ylim(0, 1.06 * max(*curve["value"], max(here["ci"] or [here["value"] or 0])))
    _percent(axes.xaxis)


# ---- by judge


def _judges(both: list[Axes], entries: list[dict[str, Any]]) -> None:
    """Agreement and power, one line each."""
    left, right = both
    left.set_title("Judges: agreement")
    right.set_title("power")
    for row, entry in enumerate(entries):
        known = entry["agreement"]
        if known["value"] is not None:
            left.errorbar(
                known["value"],
                row,
                xerr=reach(known["value"], known.get("ci")),
                fmt="o",
                color=BLUE,
                ecolor=PALE,
                elinewidth=3,
                markersize=6.5,
            )
        if entry["power"] is not None:
            right.plot(entry["power"], row, "o", color=BLUE, markersize=6.5)
        raw, se = entry.get("power_raw"), entry.get("power_se")
        if raw is not None:
            bar = None if se is None else 1.96 * se
            right.errorbar(raw, row + 0.22, xerr=bar, fmt="o", color=SOFT, ecolor=RULE, elinewidth=2.5, markersize=4)
    _rows(left, [_short(entry["name"]) for entry in entries])
    _rows(right, [""] * len(entries))
    left.axvline(0.5, color=SOFT, linewidth=1, linestyle=DASHED)
    left.set_xlim(min([0.45, *((entry["agreement"]["ci"] or [1.0])[0] - 0.03 for entry in entries)]), 1.03)
    right.set(xlim=(-0.05, 1.05), xticks=[0, 0.5, 1], xlabel="blue: used; grey: asked for")
    _few_ticks(left.xaxis)
    _percent(left.xaxis)
