"""The page of a comparison: one HTML file that needs no network, and a contact sheet as PNG.

    dedpo compare samples/base samples/tuned --out report.html

`compare` calls it; what it shows is in `results.json`, the sample folders, the run folders and the reports of the targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.charts import Curve, chart, contact_sheet
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.defaults import POWERED
from dedpo_diffusion.core.page import about, document, dot, page_file, section, shown, table
from dedpo_diffusion.evaluation.comparison.verdict import read_targets_report
from dedpo_diffusion.evaluation.report.frontier import draw_frontier, strengths_section
from dedpo_diffusion.evaluation.report.gallery import evenly_spaced, image_sections, ranking
from dedpo_diffusion.evaluation.report.sections import (
    WARNING,
    anchors,
    categories_section,
    differences,
    headline,
    people_section,
    scores_section,
    spread_section,
)
from dedpo_diffusion.settings import CompareSettings

if TYPE_CHECKING:
    from dedpo_diffusion.evaluation.comparison.arms import Arm

SHEET_PROMPTS = 8  # of contact_sheet.png
CURVES = {
    "loss": "loss", "margin": "margin towards the preferred image", "implicit_accuracy": "implicit accuracy",
    "winner_drift": "winner drift (policy − reference error)", "loser_drift": "loser drift (policy − reference error)",
    "reward": "reward of its own images", "kl": "KL divergence from the reference", "learning_rate": "learning rate",
}  # fmt: skip
HELD_OUT = {"loss": "held-out loss", "accuracy": "held-out accuracy"}
BUCKETS = {"margin": "margin by timestep", "ratio": "balance: winner over loser, by timestep"}
LABEL_LINES = {
    "method": "method", "n": "pairs", "n_human": "human labels", "agreement": "agreement of the judge", "judge_bias": "bias of the judge",
    "power": "power", "power_se": "standard error of the power", "effective_human_labels": "effective human labels",
    "effective_human_labels_power_1": "the same at power 1, as published",
}  # fmt: skip


# ---- training and labels


def read_metrics(run: Path, log: str = "metrics") -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, or of another log; [] if it has none. An unfinished last line is left out.

    Raises:
        UserError: no such folder, or a line that is no JSON object with a step.
    """
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}; leave it out of --runs")
    path = run / f"{log}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    records = []
    for row, line in enumerate(lines):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError) as error:
            if row == len(lines) - 1 and not line.endswith("\n"):
                break
            raise UserError(f"{path} line {row + 1} is not a record with a step ({error}); remove the line") from error
        records.append(record)
    return records


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def by_step(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of one metric, where it is a number."""
    return [(float(r["step"]), float(r[key])) for r in records if _finite(r.get(key))]


def by_timestep(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(middle of the bucket, mean over its pairs) of one bucket metric, over the last half of the records."""
    sums: dict[float, list[float]] = {}
    for record in records[len(records) // 2 :]:
        for bucket in record.get("buckets") or []:
            if _finite(bucket.get(key)) and all(name in bucket for name in ("first", "last", "count")):
                total = sums.setdefault((bucket["first"] + bucket["last"]) / 2, [0.0, 0.0])
                total[0] += bucket[key] * bucket["count"]
                total[1] += bucket["count"]
    return [(middle, total / count) for middle, (total, count) in sorted(sums.items()) if count]


def validation_curves(records: dict[str, list[dict[str, Any]]], series: dict[str, int]) -> dict[str, list[Curve]]:
    """By title, what the runs' validations say of held-out pairs and prompts, from before training on; the best step is marked."""
    found: dict[str, list[Curve]] = {}
    for name, lines in records.items():
        if not lines:
            continue
        from dedpo_diffusion.weights.run_folder import best_line

        best = (best_line(lines) or {}).get("step")
        told = [(float(line["step"]), _held_out(line)) for line in lines]
        for title in dict.fromkeys(title for _, values in told for title in values):
            points = [(step, values[title][0]) for step, values in told if title in values]
            start = next(values[title][1] for _, values in told if title in values)
            mark = next((point for point in points if point[0] == best), None)
            found.setdefault(title, []).append(Curve(name, ([(0.0, start)] if _finite(start) else []) + points, series[name], mark))
    return found


def _held_out(line: dict[str, Any]) -> dict[str, tuple[float, Any]]:
    """By title, a validation's number and the one before training, where it has them."""
    values = {title: (line.get(key), line.get(f"start_{key}")) for key, title in HELD_OUT.items()}
    values |= {f"{name} of held-out prompts": (scores["mean"], scores["start"]) for name, scores in line.get("scores", {}).items()}
    return {title: (float(value), start) for title, (value, start) in values.items() if value is not None and _finite(value)}


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Different paths by their names without ending, in order; where names are alike, as much of the folders before as tells them apart."""
    parts = [path.resolve().with_suffix("").parts if path.suffix == ".json" else path.resolve().parts for path in paths]
    found = {}
    for mine, path in zip(parts, paths, strict=True):
        others = {other for other in parts if other != mine}
        length = next(k for k in range(1, len(mine) + 1) if all(other[-k:] != mine[-k:] for other in others) or k == len(mine))
        found["/".join(mine[-length:])] = path
    return found


def training_section(runs: Sequence[Path], arms: Sequence[str]) -> str:
    """Small multiples of the training curves, one colour a run (the arm's own, where names agree)."""
    records = {name: read_metrics(run) for name, run in by_name(runs).items()}
    others = [name for name in records if name not in arms]
    series = {name: arms.index(name) if name in arms else len(arms) + others.index(name) for name in records}
    legend = " ".join(f"<span>{dot(series[name])}{escape(name)}</span>" for name in records)
    readers: list[tuple[str, str, Callable[..., Any], bool]] = [(key, title, by_step, True) for key, title in CURVES.items()]
    readers += [(key, title, by_timestep, False) for key, title in BUCKETS.items()]
    charts = []
    for key, title, read, smooth in readers:
        curves = [Curve(name, points, series[name]) for name, found in records.items() if (points := read(found, key))]
        if curves:
            charts.append(_figure(title, chart(curves, title, smooth=smooth and key != "learning_rate", zero=True)))
    validated = validation_curves({name: read_metrics(run, "validation") for name, run in by_name(runs).items()}, series)
    charts += [_figure(title, chart(curves, title)) for title, curves in validated.items()]
    if not charts:
        return ""
    how = "Over optimizer steps, faint: as logged, strong: moving average. By timestep: mean over the last half of training."
    how += " Held-out: as validated in the course of training, a ring at the best step." if validated else ""
    return section("Training", about(how), f'<p class="legend">{legend}</p><div class="charts">{"".join(charts)}</div>')


def _figure(title: str, drawn: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>"


def label_section(targets: Sequence[Path]) -> str:
    """What the labels were worth: sentences and figures of each targets' report."""
    paths = by_name(targets)
    reports = {name: read_targets_report(path) for name, path in paths.items()}
    if not reports:
        return ""
    lines = [
        [escape(words), *(escape(_label_figure(report, key)) for report in reports.values())]
        for key, words in LABEL_LINES.items() if any(key in report for report in reports.values())
    ]  # fmt: skip
    words = "".join(_label_words(name, report) for name, report in reports.items())
    details = ""
    for name, report in reports.items():
        try:
            details += label_details(name, report)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"its judges or curve are not as `dedpo merge` writes them ({error!r})"
            raise UserError(f"{paths[name]}: {what}; give the report that it wrote beside the targets") from error
    return section("Labels", table(["", *map(escape, reports)], lines), f'<div class="columns">{words}</div>', details)


def _label_words(name: str, report: dict[str, Any]) -> str:
    """Sentences and warnings of one report, the warnings last."""
    told = [*(report.get("sentences") or []), *(entry["text"] for entry in report.get("warnings") or [])]
    sentences = "".join(f"<li>{escape(text)}</li>" for text in told if not text.startswith(WARNING))
    warned = [text.removeprefix(WARNING) for text in told if text.startswith(WARNING)]
    notes = "".join(f'<p class="note">{escape(text[0].upper() + text[1:])}</p>' for text in warned)
    return f"<div><h3>{escape(name)}</h3><ul>{sentences}</ul>{notes}</div>"


def label_details(name: str, report: dict[str, Any]) -> str:
    """What more labels or a better judge would buy, and how each of several judges does; nothing where the report says neither."""
    body = _judges_table(report.get("judges")) + _worth_charts(report)
    return f"<section><h3>{escape(name)}: what the labels are worth, and what more would buy</h3>{body}</section>" if body else ""


def _worth_charts(report: dict[str, Any]) -> str:
    if not report.get("curve"):
        return ""
    more, judge, here = report["curve"]["human_labels"], report["curve"]["judge"], report["effective_human_labels"]
    start, end, value = float(report["n_human"]), float(report["n"]), here["value"]
    ends = [list(zip(more["n"], more[key], strict=True)) for key in ("low", "high")]
    alone = Curve("people alone", [(start, start), (end, end)], 0)
    labels = [*(Curve("95 %", points, 6) for points in ends), alone, Curve("merged", list(zip(more["n"], more["value"], strict=True)), 1)]
    better = [
        Curve("people alone", [(0.5, start), (1.0, start)], 0),
        Curve("judge", list(zip(*judge.values(), strict=True)), 1),
    ]
    if report["agreement"]["ci"] is not None and value is not None:
        better.append(Curve("this judge", [(edge, value) for edge in report["agreement"]["ci"]], 2))
    charts = (
        ("worth by the number of human labels", labels, ((1, "merged"), (6, "95 %"), (0, "people alone"))),
        ("worth by the agreement of a judge (0 or 1)", better, ((1, "a judge"), (2, "this one, 95 %"), (0, "people alone"))),
    )
    drawn = []
    for title, curves, key in charts:
        legend = " ".join(f"<span>{dot(series)}{escape(words)}</span>" for series, words in key)
        caption = f'<figcaption>{escape(title)}</figcaption><p class="legend">{legend}</p>'
        drawn.append(f"<figure>{caption}{chart(curves, title)}</figure>")
    return f'<div class="charts">{"".join(drawn)}</div>'


def _judges_table(entries: list[dict[str, Any]] | None) -> str:
    """A table with a line for each judge, where there are several."""
    if not entries or len(entries) < 2:
        return ""
    rows = []
    for entry in entries:
        words = [shown(entry["agreement"], ".1%"), shown(entry["judge_bias"]), shown(entry["power"], ".2f")]
        rows.append([escape(str(entry["name"])), *map(escape, words)])
    return f'<div class="panel">{table(["judge", "agreement", "bias", "power"], rows)}</div>'


def _label_figure(report: dict[str, Any], key: str) -> str:
    """A number of a report; a dash where it means nothing, as a power of labels that are merged with none."""
    if key == "effective_human_labels_power_1" and report.get("method", "dedpo") not in POWERED:
        return shown(None)
    return shown(report.get(key), ".0f" if "human_labels" in key else ".3f")


def settings_section(folders: Iterable[Path]) -> str:
    """The resolved settings of every run and sample folder that has them."""
    parts = []
    for folder in folders:
        file = folder / "settings.yaml"
        if file.is_file():
            parts.append(
                f"<details><summary>{escape(str(folder))}</summary><pre>{escape(file.read_text(encoding='utf-8'))}</pre></details>"
            )
    return section("Settings", *parts)


# ---- the page


def build_page(settings: CompareSettings, arms: Sequence[Arm], results: dict[str, Any]) -> str:
    """The whole page as HTML."""
    from dedpo_diffusion.evaluation.comparison.at_best import at_best, places, shown_arms
    from dedpo_diffusion.evaluation.comparison.verdict import best_arm

    whole, results, every, arms = results, at_best(results), arms, shown_arms(arms, results)
    best, names = best_arm(results), list(results["arms"])
    method = (
        f"Intervals: 95 %, paired, by prompts: Student's with the bootstrap's standard error ({results['resamples']} resamples, "
        f"seed {results['seed']}), win rates Wilson's. They cover prompts and seeds of images, not training seeds. "
        "Win rate: ties count half. Gains are means over all images of the arm's score minus the base's, same prompt and seed."
    )
    before = {
        "Strengths": strengths_section(whole),
        "Scores": scores_section(results),
        "Between the arms": section("Between the arms", differences(results)),
        "People": people_section(whole),
    }
    after = {
        "Categories": categories_section(results, best),
        "Diversity and drift": spread_section(whole),
        "Training": training_section(settings.runs, [lora or name for name, _, lora in places(whole)]),
        "Labels": label_section(settings.targets),
        "Settings": settings_section([*settings.runs, *(arm.folder for arm in every)]),
    }
    images, data = image_sections(
        arms, results, arms[names.index(best)].name
    )  # last: what else may be wrong is told before minutes of work
    parts = {**before, "Images": images, **after}
    links = anchors([title for title, part in parts.items() if part])
    body = f"{headline(results, best)}{links}{''.join(parts.values())}<footer>{about(method)}</footer>"
    return document(f"{', '.join(names[1:])} against {names[0]}", body, script=page_file("gallery.js", __package__), data=data)


def build_sheet(arms: Sequence[Arm], scorer: str) -> Any:
    """The contact sheet: fewer rows of the page's rule, for a README."""
    from dedpo_diffusion.evaluation.comparison.samples import load_images

    rows = evenly_spaced(arms[0], SHEET_PROMPTS)
    columns = []
    for arm in arms:
        captions = [f"{arm.scores[scorer][row]:.3f}" for row in rows]
        columns.append(
            (arm.name.replace(" at strength ", "\nat strength "), load_images(arm.folder, [arm.rows[row] for row in rows]), captions)
        )
    return contact_sheet([arms[0].rows[row]["prompt"] for row in rows], columns)


def write_report(settings: CompareSettings, arms: Sequence[Arm], results: dict[str, Any]) -> tuple[Path, ...]:
    """Write the page and, beside it, contact_sheet.png; both are made before either is written. With strengths of LoRAs frontier.png too.

    Args:
        settings: of the comparison.
        arms: loaded sample folders, base first.
        results: of `compare`.

    Returns:
        The paths of page, sheet and, if there is one, frontier.

    Raises:
        UserError: a run folder, metrics or an image that cannot be read.
    """
    from dedpo_diffusion.core.files import atomic_file, write_text
    from dedpo_diffusion.evaluation.comparison.at_best import shown_arms

    page, sheet = build_page(settings, arms, results), build_sheet(shown_arms(arms, results), ranking(arms, results))
    picture = settings.out.parent / "contact_sheet.png"
    write_text(settings.out, page)
    with atomic_file(picture) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    if results.get("loras"):
        return settings.out, picture, draw_frontier(results, settings.out.parent / "frontier.png")
    return settings.out, picture
