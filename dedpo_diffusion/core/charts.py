"""The report's drawings: interval plots and curves as inline SVG, the contact sheet with Pillow.

An SVG takes its text colour from the page and its series' colours from the CSS variables --s0, --s1, ...
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SERIES = 7  # colours of the page, base first
POINTS = 240  # of a curve; more are averaged
PAPER, INK, SOFT = (255, 255, 255), (24, 28, 36), (96, 104, 118)


def colour(number: int) -> str:
    """The CSS colour of a series."""
    return f"var(--s{number if number < SERIES else 1 + (number - 1) % (SERIES - 1)})"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers within [low, high], about `wanted` of them."""
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.8)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label: four digits, no trailing zeros."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+").replace("-", "\N{MINUS SIGN}")


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "soft") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Gain:
    """One line of an interval plot; `low` and `high` are None where there is no interval, `series` picks the colour."""

    name: str
    mean: float
    low: float | None
    high: float | None
    series: int


def forest(gains: Sequence[Gain], title: str, *, line: float = 0.0, form: str = "+.3f") -> str:
    """An interval plot: a dot and its interval for each gain, filled where the interval leaves out the line. Returns an SVG.

    Args:
        gains: at least one.
        title: for screen readers.
        line: the value that says nothing: no gain.
        form: of the values that are written.
    """
    left = min(max(7.2 * max(len(gain.name) for gain in gains) + 18, 56), 168)
    width, right, row = 380.0, 18.0, 36.0
    height = row * len(gains) + 30
    ends = [end for gain in gains for end in (gain.low, gain.mean, gain.high) if end is not None]
    low, high = min(line, *ends), max(line, *ends)
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = []
    for tick in ticks(low, high):
        label = f"{100 * tick:.4g} %" if "%" in form else number(tick)
        parts += [_line(x(tick), 6, x(tick), height - 22, "grid"), _text(x(tick), height - 6, label, "middle")]
    parts.append(_line(x(line), 2, x(line), height - 22, "zero"))
    for place, gain in enumerate(gains):
        y, paint = 8 + row * (place + 0.5), colour(gain.series)
        letters = int((left - 18) / 7)
        name = gain.name if len(gain.name) <= letters else gain.name[: letters - 1] + "…"
        parts.append(f"<g><title>{escape(gain.name)}</title>{_text(left - 10, y + 4, name, 'end', 'ink')}</g>")
        sure = False
        if gain.low is not None and gain.high is not None:
            sure = not gain.low <= line <= gain.high
            ends_at = f'x1="{x(gain.low):.1f}" y1="{y}" x2="{x(gain.high):.1f}" y2="{y}"'
            parts.append(f'<line {ends_at} stroke="{paint}" stroke-width="3" stroke-linecap="round"/>')
        fill = paint if sure else "var(--panel)"
        parts.append(f'<circle cx="{x(gain.mean):.1f}" cy="{y}" r="5" fill="{fill}" stroke="{paint}" stroke-width="2"/>')
        value = format(gain.mean, form).replace("-", "\N{MINUS SIGN}")
        parts.append(_text(min(max(x(gain.mean), left + 18), width - 22), y - 9, value, "middle", "ink value"))
    return _svg(width, height, title, parts)


@dataclass(frozen=True)
class Curve:
    """One line of a chart: points (x, y), x rising; `series` picks the colour, `mark` is a point to be seen.

    `band` holds (x, low, high) of a shaded band around it, and `labels` what stands beside each point, which then has a dot; a point
    whose label is None has neither.
    """

    name: str
    points: list[tuple[float, float]]
    series: int
    mark: tuple[float, float] | None = None
    band: list[tuple[float, float, float]] | None = None
    labels: list[str | None] | None = None


def cut_below(curve: Curve, floor: float) -> Curve:
    """The curve up to where it falls below the floor, with the point where it crosses; the same curve if it never does.

    Args:
        curve: its first point must not lie below the floor; a band has one entry a point.
        floor: in the units of y.
    """
    over = next((k for k, (_, y) in enumerate(curve.points) if y < floor), None)
    if over is None:
        return curve
    (x0, y0), (x1, y1) = curve.points[over - 1 : over + 1]
    share = (y0 - floor) / (y0 - y1)
    x = x0 + share * (x1 - x0)
    band = curve.band
    if band is not None:
        (_, *before), (_, *after) = band[over - 1 : over + 1]
        low, high = (a + share * (b - a) for a, b in zip(before, after, strict=True))
        band = [(at, max(one, floor), two) for at, one, two in [*band[:over], (x, low, high)]]
    labels = None if curve.labels is None else [*curve.labels[:over], None]
    return replace(curve, points=[*curve.points[:over], (x, floor)], band=band, labels=labels)


def apart(boxes: Sequence[tuple[float, float, float, float]]) -> list[bool]:
    """Which boxes (left, top, right, bottom) can be drawn, those that come first before the others, so that none overlaps another."""
    drawn: list[tuple[float, float, float, float]] = []
    kept = []
    for box in boxes:
        left, top, right, bottom = box
        kept.append(all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in drawn))
        if kept[-1]:
            drawn.append(box)
    return kept


def by_importance(curves: Sequence[Curve]) -> list[tuple[Curve, tuple[float, float], str]]:
    """All labels that say something, with curve and point: those of marked points first, then the last of each curve, then the others."""
    found = [
        (0 if point == curve.mark else 1 + (k < len(curve.points) - 1), curve, point, label)
        for curve in curves for k, (point, label) in enumerate(zip(curve.points, curve.labels or (), strict=False)) if label
    ]  # fmt: skip
    return [entry[1:] for entry in sorted(found, key=lambda entry: entry[0])]


def _thinned(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Means of equal runs of points, at most `most` of them."""
    size = math.ceil(len(points) / most) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smoothed(points: list[tuple[float, float]], share: float = 0.08) -> list[tuple[float, float]]:
    """A centred moving average over `share` of the points, narrower at the ends."""
    half = int(len(points) * share / 2)
    out = []
    for place, (x, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)
        window = points[place - reach : place + reach + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def chart(curves: Sequence[Curve], title: str, *, smooth: bool = False, zero: bool = False) -> str:
    """Lines in one frame; with `smooth` the raw line stays behind, faintly. Returns an SVG.

    Args:
        curves: at least one, with at least one point each.
        title: for screen readers.
        smooth: draw the moving average.
        zero: mark the line y = 0, where it is in the frame.
    """
    width, height, left, bottom, top, right = 320.0, 176.0, 54.0, 22.0, 8.0, 8.0
    xs, ys = ([point[axis] for curve in curves for point in curve.points] for axis in (0, 1))
    ys += [end for curve in curves for _, *ends in curve.band or () for end in ends]
    (x_low, x_high), (y_low, y_high) = (_span(values) for values in (xs, ys))

    def place(point: tuple[float, float]) -> str:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = height - bottom - (point[1] - y_low) / (y_high - y_low) * (height - bottom - top)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks(y_low, y_high):
        y = float(place((x_low, tick)).split(",")[1])
        parts += [_line(left, y, width - right, y, "zero" if zero and tick == 0 else "grid"), _text(left - 6, y + 4, number(tick), "end")]
    for tick in ticks(x_low, x_high, 5):
        x = float(place((tick, y_low)).split(",")[0])
        parts.append(_text(min(x, width - 14), height - 6, number(tick), "middle"))
    for curve in curves:
        if curve.band:
            edge = [place((x, high)) for x, _, high in curve.band] + [place((x, low)) for x, low, _ in curve.band[::-1]]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour(curve.series)}" opacity="0.16"/>')
    for curve in curves:
        points = _thinned(curve.points)
        lines = [(points, 0.25, 1.0), (smoothed(points), 1.0, 2.0)] if smooth and len(points) > 8 else [(points, 1.0, 2.0)]
        for line, opacity, stroke in lines:
            path = " ".join(map(place, line if len(line) > 1 else line * 2))
            style = f'fill="none" stroke="{colour(curve.series)}" stroke-width="{stroke}" opacity="{opacity}"'
            parts.append(f'<polyline points="{path}" {style} stroke-linejoin="round" stroke-linecap="round"/>')
        if curve.mark is not None:
            across, down = place(curve.mark).split(",")
            parts.append(
                f'<circle cx="{across}" cy="{down}" r="5" fill="var(--panel)" stroke="{colour(curve.series)}" stroke-width="2.5"/>'
            )
        for point, label in zip(curve.points, curve.labels or (), strict=False):
            if label is not None:
                across, down = place(point).split(",")
                parts.append(f'<circle cx="{across}" cy="{down}" r="2.6" fill="{colour(curve.series)}"/>')
    written = []
    for _, point, label in by_importance(curves):
        x, y = (float(part) for part in place(point).split(","))
        written.append((min(x, width - 14), max(y - 7, 10), label))
    boxes = [(x - 3.5 * len(label) - 2, y - 10, x + 3.5 * len(label) + 2, y + 1) for x, y, label in written]
    parts += [_text(x, y, label, "middle", "soft value") for (x, y, label), room in zip(written, apart(boxes), strict=True) if room]
    return _svg(width, height, title, parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def contact_sheet(prompts: Sequence[str], columns: Sequence[tuple[str, Sequence[Image], Sequence[str]]]) -> Image:
    """A picture of all arms: one row a prompt, one column an arm.

    Args:
        prompts: R prompts.
        columns: for each arm its name, of one or several lines, its R images, and R captions (scores), of one or several lines.

    Returns:
        An RGB image.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell = 128 if all(image.width <= 128 for _, images, _ in columns for image in images) else 256
    lines = max((caption.count("\n") + 1 for _, _, captions in columns for caption in captions), default=1)
    gap, head, label, foot = 12, 40 + 20 * max(name.count("\n") for name, _, _ in columns), 190, 4 + 20 * lines
    row = cell + foot + gap
    sheet = Image.new("RGB", (label + len(columns) * (cell + gap) + gap, head + len(prompts) * row + gap), PAPER)
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(17), ImageFont.load_default(15)
    for k, (name, images, captions) in enumerate(columns):
        x = label + gap + k * (cell + gap)
        draw.multiline_text((x, 11), name, fill=INK, font=large)
        for r, (image, caption) in enumerate(zip(images, captions, strict=True)):
            y = head + r * row
            sheet.paste(_fitted(image, cell), (x, y))
            draw.multiline_text((x, y + cell + 4), caption, fill=SOFT, font=small, spacing=5)
    for r, prompt in enumerate(prompts):
        wrapped = textwrap.wrap(prompt, 22)[: cell // 21]
        draw.multiline_text((gap, head + r * row), "\n".join(wrapped), fill=INK, font=small, spacing=5)
    return sheet


def _fitted(image: Image, cell: int) -> Image:
    """A square picture; small ones keep their hard pixels."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    method = Pillow.Resampling.NEAREST if image.width < cell else Pillow.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (cell, cell), method=method, color=PAPER)
