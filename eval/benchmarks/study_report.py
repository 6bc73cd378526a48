"""What the study found: every cell as parquet, arms against each other as a table, and the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import say
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval
from dedpo_diffusion.labels.judge_figure import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REGIME = ("pairs", "temperature", "steps", "timesteps")
KEYS = ("arm", "judge", "share", "balance", "sampling", "learning_rate", *REGIME)
MEASURES = ("reward", "accuracy")
COLOURS = {"naive": "#c2410c", "dedpo": "#9333ea", "tuned": "#2f6fd0", "human": "#626a77", "human_100": "#191d24"}
OTHER = "#0f766e"
Line = dict[str, Any]
Key = tuple[Any, ...]


def read_cells(files: Sequence[Path]) -> list[Line]:
    """The results of cells."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def by_arm(lines: Sequence[Line]) -> dict[Key, dict[int, Line]]:
    """Trained cells by everything but their seed, then by seed; of each only one."""
    found: dict[Key, dict[int, Line]] = {}
    for line in lines:
        if line["arm"] != "base":
            found.setdefault(tuple(tuple(line[key]) if key == "timesteps" else line[key] for key in KEYS), {})[line["seed"]] = line
    return found


def reference_of(key: Key, arms: dict[Key, dict[int, Line]]) -> dict[int, Line]:
    """The plain run on the human labels alone, of the same share and regime; {} if there is none, or several of other learning rates."""
    named = dict(zip(KEYS, key, strict=True))
    wanted = {"arm": "human", "judge": "none", "balance": "none", "sampling": "uniform"}
    wanted |= {name: named[name] for name in ("share", *REGIME)}
    same = [
        lines for other, lines in arms.items() if all(dict(zip(KEYS, other, strict=True))[name] == value for name, value in wanted.items())
    ]
    return same[0] if len(same) == 1 else {}


def summarise(lines: Sequence[Line]) -> list[Line]:
    """One line an arm: its gain over the base, and its paired difference from the human labels alone, with intervals over seeds."""
    base = next(line["reward"] for line in lines if line["arm"] == "base")
    arms, rows = by_arm(lines), []
    for key, seeds in arms.items():
        row: Line = dict(zip(KEYS, key, strict=True)) | {"seeds": len(seeds)}
        row["gain"] = _interval([line["reward"] - base for line in seeds.values()])
        row["accuracy"] = _interval([line["accuracy"] for line in seeds.values()])
        human = reference_of(key, arms)
        shared = [] if human is seeds else sorted(set(seeds) & set(human))  # nothing is compared with itself
        for measure in MEASURES:
            row[f"{measure}_minus_human"] = _interval([seeds[s][measure] - human[s][measure] for s in shared])
        for name in ("power", "effective_human_labels", "judge_agreement", "last_margin_abs_mean", "last_power"):
            values = [line[name] for line in seeds.values() if line.get(name) is not None]
            row[name] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def _interval(values: Sequence[float]) -> Line | None:
    """Mean and interval; without an interval for one seed, None for no seed."""
    if not values:
        return None
    return seed_interval(values).as_dict() if len(values) > 1 else {"mean": float(values[0]), "ci": None}


# ---- the table


def words(entry: Line | None, digits: int = 3, *, sign: bool = True) -> str:
    """A mean with its interval."""
    if entry is None:
        return "–"
    form = f"{'+' if sign else ''}.{digits}f"
    tail = "" if entry["ci"] is None else f" ({entry['ci'][0]:{form}} to {entry['ci'][1]:{form}})"
    return f"{entry['mean']:{form}}{tail}"


def table(rows: Sequence[Line]) -> str:
    """The summary as Markdown, judges together, then shares, then arms."""
    titles = (
        "judge", "human labels", "noise", "arm", "rate", "seeds", "gain in true reward over the base", "minus human labels alone",
        "held-out accuracy", "power", "claimed worth",
    )  # fmt: skip
    head = f"| {' | '.join(titles)} |"
    lines = [head, "|" + "---|" * 11]
    for row in sorted(rows, key=lambda row: (row["judge"] != "none", row["judge"], row["share"], row["arm"])):
        power = "–" if row["power"] is None or row["judge"] == "none" else f"{row['power']:.2f}"
        worth = "–" if row["effective_human_labels"] is None else f"{row['effective_human_labels']:.0f}"
        agreement = "" if row["judge_agreement"] is None else f" ({row['judge_agreement']:.0%})"
        cells = (
            f"{row['judge']}{agreement}", f"{row['share']:.0%} of {row['pairs']}", f"{row['temperature']:g}", arm_name(row),
            f"{row['learning_rate']:g}", str(row["seeds"]), words(row["gain"]), words(row["reward_minus_human"]),
            words(row["accuracy"], sign=False), power, worth,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def regimes(lines: Sequence[Line]) -> str:
    """In each regime, what all human labels gain over 25 % of them, paired by seed, both at the better of their learning rates."""
    best: dict[Key, dict[str, dict[int, Line]]] = {}
    for key, seeds in by_arm(lines).items():
        named = dict(zip(KEYS, key, strict=True))
        if named["arm"] not in ("human", "human_100") or named["share"] not in (0.25, 1.0):
            continue
        if (named["balance"], named["sampling"]) != ("none", "uniform"):
            continue
        found = best.setdefault(tuple(named[name] for name in REGIME), {})
        found[named["arm"]] = max(found.get(named["arm"], {}), seeds, key=_mean_reward)
    rows = [
        "",
        "100 % human labels minus 25 %:",
        "",
        "| pairs | noise | steps | timesteps | seeds | difference in true reward |",
        "|---|---|---|---|---|---|",
    ]
    for (pairs, temperature, steps, timesteps), found in sorted(best.items()):
        shared = sorted(set(found.get("human", {})) & set(found.get("human_100", {})))
        if shared:
            gain = _interval([found["human_100"][seed]["reward"] - found["human"][seed]["reward"] for seed in shared])
            rows.append(f"| {pairs} | {temperature:g} | {steps} | {timesteps[0]} to {timesteps[1]} | {len(shared)} | {words(gain)} |")
    return "\n".join(rows) + "\n" if len(rows) > 5 else ""


def _mean_reward(seeds: dict[int, Line]) -> float:
    return float(np.mean([line["reward"] for line in seeds.values()])) if seeds else -np.inf


def arm_name(row: Line) -> str:
    """The arm, and how it differs from plain uniform training."""
    extras = [row["balance"]] * (row["balance"] != "none") + [row["sampling"]] * (row["sampling"] != "uniform")
    return " + ".join([row["arm"], *extras])


# ---- the figure


def draw(rows: Sequence[Line], path: Path, title: str) -> Path:
    """Left: each judge's arms minus the human labels alone. Right: gain over the share of human labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from dedpo_diffusion.core.files import atomic_file

    share = _commonest([row["share"] for row in rows if row["judge"] != "none"])
    names = list(dict.fromkeys(arm_name(row) for row in rows))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(15, 11), width_ratios=(1.25, 1), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=15)
        _by_judge(left, [row for row in rows if row["share"] == share and row["judge"] != "none"], names, share)
        _by_share(right, rows)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
        plt.close(figure)
    return path


def _commonest(values: Sequence[float]) -> float:
    return max(set(values), key=values.count)


def _by_judge(axes: Axes, rows: Sequence[Line], names: Sequence[str], share: float) -> None:
    judges = sorted({row["judge"] for row in rows}, key=lambda judge: -np.mean([r["judge_agreement"] for r in rows if r["judge"] == judge]))
    place, ticks = 0, []
    for judge in judges:
        mine = sorted((row for row in rows if row["judge"] == judge), key=lambda row: names.index(arm_name(row)))
        right = np.mean([row["judge_agreement"] for row in mine])
        axes.text(-0.02, place, f"{judge}, {right:.0%} right", transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold")
        for row in mine:
            place += 1
            _point(axes, row["reward_minus_human"], place, COLOURS.get(row["arm"], OTHER))
            ticks.append((place, arm_name(row)))
        place += 2
    axes.axvline(0, color=COLOURS["human"], linewidth=1.2)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(place - 1, -1)
    axes.set_title(f"true reward minus training on the human labels alone ({share:.0%} of the pairs)")


def _point(axes: Axes, entry: Line | None, at: float, shade: str) -> None:
    if entry is None:
        return
    if entry["ci"] is not None:
        axes.plot(entry["ci"], [at, at], color=shade, linewidth=2, solid_capstyle="round")
    axes.plot([entry["mean"]], [at], "o", color=shade, markersize=6)


def _by_share(axes: Axes, rows: Sequence[Line]) -> None:
    plain = [row for row in rows if row["balance"] == "none" and row["sampling"] == "uniform"]
    shown = [name for name in ("human", "naive", "dedpo", "tuned", "human_100") if any(row["arm"] == name for row in plain)]
    judge = (
        "clip" if any(row["judge"] == "clip" for row in plain) else _commonest([row["judge"] for row in plain if row["judge"] != "none"])
    )
    for offset, name in enumerate(shown):
        mine = sorted((row for row in plain if row["arm"] == name and row["judge"] in (judge, "none")), key=lambda row: row["share"])
        at = [100 * row["share"] * 1.03 ** (offset - len(shown) / 2) for row in mine]
        axes.plot(at, [row["gain"]["mean"] for row in mine], "o-", color=COLOURS[name], label=name)
        for x, row in zip(at, mine, strict=True):
            if row["gain"]["ci"] is not None:
                axes.plot([x, x], row["gain"]["ci"], color=COLOURS[name], linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 25, 50, 100], ["5 %", "10 %", "25 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel("share of the pairs with a human label")
    axes.set_title(f"gain in true reward over the base (judge: {judge})")
    axes.legend(frameon=False, loc="lower right")


# ---- all of it


def write_report(settings: Any, files: Sequence[Path]) -> None:
    """Write results.parquet, summary.json, table.md and figure.png into the report's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.core.files import atomic_file, write_json, write_text

    folder: Path = settings.report
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_cells(files)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with atomic_file(folder / "results.parquet") as temporary:
        pq.write_table(pa.table({key: [line.get(key) for line in lines] for key in columns}), temporary)
    if not any(line["arm"] == "base" for line in lines):
        say(f"wrote {folder / 'results.parquet'}; table and figure need the cell of the base")
        return
    base = next(line["reward"] for line in lines if line["arm"] == "base")
    rows = [row for row in summarise(lines) if row["seeds"] >= settings.least_seeds]
    write_json(folder / "summary.json", {"base_reward": base, "arms": rows})
    write_text(folder / "table.md", table(rows) + regimes(lines))
    if not any(row["judge"] != "none" for row in rows):
        say(f"wrote results.parquet, summary.json and table.md into {folder}; the figure needs arms with a judge")
        return
    seeds = max(row["seeds"] for row in rows)
    regime = f"{settings.pairs} pairs of Shapes, {settings.steps} steps of {settings.batch}"
    title = f"What the labels are worth: {regime}, {seeds} training seeds, 95 % intervals"
    draw(rows, folder / "figure.png", title)
    say(f"wrote results.parquet, summary.json, table.md and figure.png into {folder}")
