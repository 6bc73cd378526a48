"""What people taught a judge as one picture: the weights with their intervals, and how sure and how right it is before and after."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.labels.judge_figure import BLUE, DOTS, INK, PALE, PAPER, RULE, SOFT, STYLE, plain, poles, reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (14.0, 6.4)
MOST = 16  # weights shown, the largest


def draw_adapted(report: dict[str, Any], path: Path, title: str) -> Path:
    """Draw an `adapt` report, with its `sentences` and `reliability`, into a PNG of 1400 x 640 pixels, written atomically."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        figure.text(0.03, 0.935, plain(title), fontsize=17, fontweight="bold")
        first = textwrap.fill(plain(report["sentences"][0]), 165)
        figure.text(0.03, 0.905, first, fontsize=11, color=SOFT, va="top", linespacing=1.4)
        grid = figure.add_gridspec(1, 3, left=0.17, right=0.975, top=0.77, bottom=0.11, width_ratios=[1.25, 1, 0.8], wspace=0.28)
        _weights(figure.add_subplot(grid[0, 0]), report)
        _reliability(figure.add_subplot(grid[0, 1]), report)
        _losses(figure.add_subplot(grid[0, 2]), report)
        with atomic_file(path) as temporary:
            canvas.print_png(str(temporary))
    return path


def _weights(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("What people taught it" if report["adapted"] else "What was tried, and is not used")
    shown = sorted(report["features"], key=lambda entry: -abs(entry["weight"]))[:MOST]
    for row, entry in enumerate(shown):
        ci = entry["ci"]
        sure = report["adapted"] and ci is not None and not ci[0] <= 0 <= ci[1]
        style: dict[str, Any] = {"color": BLUE if sure else SOFT, "ecolor": PALE if sure else RULE, "elinewidth": 3, "markersize": 6.5}
        axes.errorbar(entry["weight"], row, xerr=reach(entry["weight"], ci), fmt="o", **style)
    names = [plain(poles(entry["name"])[0] if entry["group"] == "statistics" else f"score of {entry['name']}" if entry["group"] == "scores"
                   else entry["name"]) for entry in shown]  # fmt: skip
    axes.set_yticks(range(len(shown)), [name if len(name) <= 24 else "…" + name[-23:] for name in names])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_xlabel("weight: log-odds of a typical difference; blue: surely not 0")


def _reliability(axes: Axes, report: dict[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title("Is it as sure as it should be?")
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    for key, colour, pale in (("temperature", SOFT, RULE), ("adapt", BLUE, PALE)):
        for point in report["reliability"][key]:
            ends = reach(point["observed"], point["ci"])
            axes.errorbar(
                point["confidence"], point["observed"], yerr=ends, fmt="o", color=colour, ecolor=pale, elinewidth=2.5, markersize=5.5
            )
    axes.set(xlim=(0.49, 1.015), xlabel="confidence, held out; grey: temperature, blue: adapted", ylabel="people agree")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _losses(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("Log loss, held out")
    for place, key in enumerate(("temperature", "adapt")):
        stat, mine = report["log_loss"][key], key == "adapt"
        style: dict[str, Any] = {"color": BLUE if mine else SOFT, "ecolor": PALE if mine else RULE, "elinewidth": 4, "markersize": 8}
        axes.errorbar(place, stat["value"], yerr=reach(stat["value"], stat["ci"]), fmt="o", **style)
        axes.text(place + 0.12, stat["value"], f"{stat['value']:.3f}", va="center", color=INK)
    axes.axhline(0.6931, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1.55, 0.6931, "a coin", ha="right", va="bottom", color=SOFT)
    axes.set_xticks([0, 1], [plain(f"{report['temperature_of']}\ntemperature"), "adapted"])
    axes.set_xlim(-0.5, 1.6)
    axes.grid(axis="x", visible=False)
