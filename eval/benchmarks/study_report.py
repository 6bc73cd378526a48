"""What the study found: every training as parquet, arms at their best strength, the regret of each method, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import say
from dedpo_diffusion.core.files import atomic_file, write_json, write_text
from dedpo_diffusion.evaluation.benchmarks.study_world import ARMS, METHODS, placed
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval
from dedpo_diffusion.evaluation.comparison.strengths import at_chosen, cross_choose, halves
from dedpo_diffusion.labels.judge_figure import STYLE

SIMPLE, MERGED = ("human_only", "naive"), ("tuned", "adapted", "dedpo")  # what needs no toolkit, and what it is compared with
TIE = 0.002  # worst regrets that differ by no more are alike
TEACHES = 0.025  # the least share of labels that teaches a judge: 20 of 800
COLOURS = dict(zip(ARMS, ("#626a77", "#191d24", "#ca8a04", "#0f766e", "#2f6fd0", "#be185d", "#c2410c", "#9333ea", "#4d7c0f"), strict=True))
Line = dict[str, Any]
Runs = dict[tuple[str, str, float, str], dict[int, list[Line]]]  # lines of a training, by arm, judge, share, people of `placed`, and seed


def group(lines: Sequence[Line], step: int | None = None) -> Runs:
    """The lines of each training after `step`, None for its last one, strengths rising; the base is there at every step."""
    runs: Runs = {}
    last = max((line.get("step") or 0 for line in lines), default=0)  # 0 where nothing but the end was looked at
    for line in sorted(lines, key=lambda line: line["strength"]):
        if line["arm"] != "base" and (line.get("step") or last) != (step or last):
            continue
        runs.setdefault((line["arm"], line["judge"], line["share"], line["people"]), {}).setdefault(line["seed"], []).append(line)
    return runs


def at_best(run: Sequence[Line]) -> float:
    """Mean reward at the best strength, chosen on one half of the prompts and judged on the other, both ways; all runs share the halves."""
    values = np.array([line["rewards"] for line in run])
    half = halves(np.arange(values.shape[1]), seed=0)
    return float(at_chosen(values, cross_choose(values, [line["strength"] for line in run], half), half).mean())


def interval(values: Sequence[float]) -> Line | None:
    """Mean and Student's 95 % interval over training seeds; without an interval for one seed, None for no seed."""
    if len(values) > 1:
        return seed_interval(values).as_dict()
    return {"mean": float(values[0]), "ci": None} if len(values) else None


def minus(a: dict[int, float], b: dict[int, float]) -> Line | None:
    """a - b, paired by seed."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def recovered(a: dict[int, float], whole: dict[int, float]) -> Line | None:
    """The share r = mean(a) / mean(whole) of a gain, paired by seed; its interval is the delta method's, from a - r whole."""
    seeds = sorted(a.keys() & whole.keys())
    x, y = (np.array([gains[seed] for seed in seeds]) for gains in (a, whole))
    if not seeds or y.mean() <= 0:
        return None
    ratio = x.mean() / y.mean()
    return interval(ratio + (x - ratio * y) / y.mean())


def summarise(lines: Sequence[Line]) -> Line:
    """Gains over the base, differences, regrets and the default that the rule of configs/study/main.yaml names.

    Regret in a cell (judge, share, people) is the gain of the method whose mean over seeds is largest there minus the method's own,
    paired by seed; None for cells that lack one of the methods. `worst_regret` is each method's cell of largest mean regret, with
    that cell's interval, over the judges and shares of one kind of people: all shares, those too small to teach a judge (few), the
    others (enough). `default` is what the rule names by each of them.
    """
    runs = group(lines)
    base = at_best(runs["base", "none", 0.0, "none"][0])
    gains = {key: {seed: at_best(run) - base for seed, run in seeds.items()} for key, seeds in runs.items()}
    rows = []
    for people, share, judge in dict.fromkeys((k[3], k[2], k[1]) for k in runs if k[1] != "none" and k[2] > 0):
        mine = {arm: gains.get(placed(arm, judge, share, people), {}) for arm in ARMS[1:]}
        row: Line = {"people": people, "share": share, "judge": judge, "seeds": {arm: len(found) for arm, found in mine.items()}}
        row["gain"] = {arm: interval(list(found.values())) for arm, found in mine.items()}
        row["minus"] = {method: {arm: minus(mine[method], mine[arm]) for arm in SIMPLE} for method in MERGED}
        row["recovered"] = {arm: recovered(mine[arm], mine["human_100"]) for arm in METHODS}
        rows.append(row | {"regret": regrets({method: mine[method] for method in METHODS})})
    of = {people: by_labels([row for row in rows if row["people"] == people]) for people in {row["people"]: 0 for row in rows}}
    worst = {people: {labels: worst_regrets(found) for labels, found in parts.items()} for people, parts in of.items()}
    mean = {people: {labels: mean_regrets(found) for labels, found in parts.items()} for people, parts in of.items()}
    ruled = worst.get("quickstart", {})
    default = {labels: choose_default({method: entry["mean"] for method, entry in found.items()}) for labels, found in ruled.items()}
    return {"base_reward": base, "cells": rows, "worst_regret": worst, "mean_regret": mean, "default": default}


def by_labels(rows: Sequence[Line]) -> dict[str, list[Line]]:
    """All cells, those with too few labels to teach a judge, and those with enough."""
    few, enough = ([row for row in rows if (row["share"] >= TEACHES) == teaches] for teaches in (False, True))
    return {"all": list(rows), "few": few, "enough": enough}


def by_step(lines: Sequence[Line]) -> list[Line]:
    """Gains over the base after each step that was looked at, each arm at the strength that is best there; [] where only the end was."""
    found: list[Line] = []
    for step in sorted({line["step"] for line in lines if line.get("step")}):
        runs = group(lines, step)
        base = at_best(runs["base", "none", 0.0, "none"][0])
        for (arm, judge, share, people), seeds in runs.items():
            if arm != "base":
                gain = interval([at_best(run) - base for run in seeds.values()])
                found.append(
                    {"step": step, "arm": arm, "judge": judge, "share": share, "people": people, "seeds": len(seeds), "gain": gain}
                )
    return found if len({entry["step"] for entry in found}) > 1 else []


def steps_table(found: Sequence[Line]) -> str:
    """`by_step` as Markdown: a row an arm, a column a step."""
    steps = sorted({entry["step"] for entry in found})
    rows = [["people", "judge", "human labels", "arm", "seeds", *(f"{step} steps" for step in steps)]]
    gains: dict[tuple[Any, ...], dict[int, str]] = {}
    for entry in found:
        key = (entry["people"], entry["judge"], f"{entry['share']:.0%}", entry["arm"], str(entry["seeds"]))
        gains.setdefault(key, {})[entry["step"]] = words(entry["gain"])
    rows += [[*key, *(at.get(step, "–") for step in steps)] for key, at in gains.items()]
    return markdown(rows)


def draw_steps(found: Sequence[Line], path: Path) -> None:
    """Gain at the best strength against steps, one curve an arm and judge, with intervals over seeds where there are some."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    curves: dict[tuple[str, str, float, str], list[Line]] = {}
    for entry in found:
        curves.setdefault((entry["arm"], entry["judge"], entry["share"], entry["people"]), []).append(entry)
    for (arm, judge, share, people), entries in curves.items():
        name = (
            f"{arm}, {share:.0%} human"
            + ("" if judge == "none" else f", judge {judge}")
            + ("" if people == "quickstart" else f", {people}")
        )
        x, mean = [entry["step"] for entry in entries], [entry["gain"]["mean"] for entry in entries]
        ends = np.array([entry["gain"]["ci"] or [at, at] for entry, at in zip(entries, mean, strict=True)])
        axes.errorbar(x, mean, yerr=np.abs(ends.T - mean), marker="o", capsize=3, color=COLOURS[arm], label=name)
    axes.set(xlabel="steps of training", ylabel="gain in true reward at the best strength", xscale="log")
    axes.set_xticks(ticks := sorted({entry["step"] for entry in found}), [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def regrets(gains: dict[str, dict[int, float]]) -> dict[str, Line] | None:
    """Regret of each method on the seeds that all have; None where there are none."""
    seeds = sorted(set.intersection(*(set(found) for found in gains.values())))
    if not seeds:
        return None
    best = max(gains, key=lambda method: np.mean([gains[method][seed] for seed in seeds]))
    return {method: interval([gains[best][seed] - found[seed] for seed in seeds]) or {} for method, found in gains.items()}


def worst_regrets(rows: Sequence[Line]) -> dict[str, Line]:
    """For each method the cell of largest mean regret; {} where no cell has all methods."""
    whole = [row for row in rows if row["regret"]]
    found = {method: max(whole, key=lambda row: row["regret"][method]["mean"]) for method in METHODS if whole}
    return {method: row["regret"][method] | {"judge": row["judge"], "share": row["share"]} for method, row in found.items()}


def mean_regrets(rows: Sequence[Line]) -> dict[str, float]:
    """For each method the mean over the cells that have all methods; {} where none has."""
    whole = [row["regret"] for row in rows if row["regret"]]
    return {method: float(np.mean([regret[method]["mean"] for regret in whole])) for method in METHODS if whole}


def choose_default(worst: dict[str, float]) -> str | None:
    """The method of least worst regret; the simplest of those within .002 of it, in the order of METHODS. None of none."""
    return next((method for method in METHODS if worst[method] <= min(worst.values()) + TIE), None) if worst else None


def words(entry: Line | None, form: str = "+.3f") -> str:
    """A mean with its interval."""
    if entry is None:
        return "–"
    return f"{entry['mean']:{form}}" + (f" ({entry['ci'][0]:{form}} to {entry['ci'][1]:{form}})" if entry["ci"] else "")


def tables(found: Line) -> str:
    """The summary as Markdown: gains, differences, then regrets."""
    heads = ["people", "judge", "human labels"]
    gains, regret = [[*heads, *ARMS[1:]]], [[*heads, *METHODS]]
    less = [[*heads, "method", "seeds", *(f"minus {arm}" for arm in SIMPLE), "share of human_100's gain"]]
    for row in found["cells"]:
        start = [row["people"], row["judge"], f"{row['share']:.0%}"]
        gains.append([*start, *(f"{words(row['gain'][arm])}, n = {row['seeds'][arm]}" if row["seeds"][arm] else "–" for arm in ARMS[1:])])
        for method in MERGED if row["seeds"]["human_only"] else ():
            differences = [words(row["minus"][method][arm]) for arm in SIMPLE]
            less.append([*start, method, str(row["seeds"][method]), *differences, words(row["recovered"][method], ".0%")])
        regret += [[*start, *(words(row["regret"][m], ".3f") for m in METHODS)]] if row["regret"] else []
    for people, parts in found["worst_regret"].items():
        for labels, worst in parts.items():
            regret += [[people, "worst", labels, *(f"{words(worst[m], '.3f')}, {worst[m]['judge']}" for m in METHODS)]] if worst else []
    for people, parts in found["mean_regret"].items():
        for labels, mean in parts.items():
            regret += [[people, "mean", labels, *(f"{mean[m]:.3f}" for m in METHODS)]] if mean else []
    title = f"Gain in true reward over the base ({found['base_reward']:.3f}), each arm at its best strength, with intervals over n seeds:"
    whole = sum(row["regret"] is not None for row in found["cells"])
    told = f"Regret where every method was trained ({whole} of these cells); few and enough are labels to teach a judge by."
    told += f" The rule names {', '.join(f'{method} by {labels}' for labels, method in found['default'].items())}:"
    return f"{title}\n\n{markdown(gains)}\nDifferences:\n\n{markdown(less)}\n{told}\n\n{markdown(regret)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown, the first its head."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def draw(lines: Sequence[Line], path: Path, main: tuple[str, float, str]) -> None:
    """Reward against strength, one curve an arm, with 95 % intervals over seeds, in the cell `main` (judge, share, people)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs, (judge, share, people) = group(lines), main
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
        for arm in ARMS:
            seeds = list(runs.get(placed(arm, judge, share, people), {}).values())
            points = [interval([line["reward"] for line in at]) or {} for at in zip(*seeds, strict=True)]
            if arm == "base" and points:
                axes.axhline(points[0]["mean"], color=COLOURS[arm], linestyle="--", label=arm)
            elif points:
                x, ends = [line["strength"] for line in seeds[0]], [point["ci"] or [point["mean"]] * 2 for point in points]
                axes.plot(x, [point["mean"] for point in points], "o-", color=COLOURS[arm], label=f"{arm} ({len(seeds)} seeds)")
                if len(seeds) > 2:  # of two, Student's interval is wider than the picture
                    axes.fill_between(x, *np.transpose(ends), color=COLOURS[arm], alpha=0.12, linewidth=0)
        axes.set(xlabel="strength of the LoRA", ylabel="true reward", title=f"judge {judge}, {share:.0%} human labels, {people} people")
        axes.legend(frameon=False)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
        plt.close(figure)


def write_report(folder: Path, lines: Sequence[Line], main: tuple[str, float, str]) -> None:
    """Write results.parquet, summary.json, tables.md and figure.png (of the cell `main`) into the report's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(key for line in lines for key in line)
    with atomic_file(folder / "results.parquet") as temporary:
        pq.write_table(pa.table({key: [line.get(key) for line in lines] for key in columns}), temporary)
    found, steps = summarise(lines), by_step(lines)
    write_json(folder / "summary.json", found | ({"by_step": steps} if steps else {}))
    write_text(folder / "tables.md", tables(found) + (f"\nAfter so many steps:\n\n{steps_table(steps)}" if steps else ""))
    if steps:
        draw_steps(steps, folder / "steps.png")
    draw(lines, folder / "figure.png", main)
    say(f"wrote results.parquet, summary.json, tables.md and figure.png into {folder}")
