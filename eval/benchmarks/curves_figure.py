"""The curves of five runs on Shapes, one that goes well and four that go wrong, drawn for docs/curves.md.

    python eval/benchmarks/curves_figure.py --work WORK --out eval/results/curves

320 proposed pairs (seed 0) with the simulated human's answers to all of them, and 96 held-out pairs of other seeds; everything that is not
named in RUNS is as in configs/shapes_lora.yaml. What is there already in WORK is kept.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import say, stage
from dedpo_diffusion.evaluation.benchmarks.study import ALIKE, CONFIG

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS, HELD_OUT, FEW, PROMPTS = 320, 96, 24, 48
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "healthy": ("A healthy run", {"data.targets": "people", "optim.learning_rate": 5e-4}),
    "by_heart": (f"{FEW} pairs, learned by heart", {"data.targets": "few", "optim.learning_rate": 2e-3}),
    "judge": ("The judge's taste", {"data.targets": "judge", "optim.learning_rate": 2e-3}),
    "rate": ("Learning rate too high", {"data.targets": "people", "optim.learning_rate": 2e-2}),
    "drift": ("Beta too small: both errors rise", {"data.targets": "people", "optim.learning_rate": 5e-3, "objective.beta": 20}),
}
KEPT = ("step", "loss", "margin", "margin_abs_mean", "implicit_accuracy", "saturation", "winner_drift", "loser_drift", "reference_error")
HELD = ("step", "loss", "loss_ci", "start_loss", "accuracy", "accuracy_ci", "margin", "scores")
SHOWN = (0, 1, 22)  # prompts whose images are shown
BLUE, ORANGE, GREEN = "#2f6fd0", "#d9730d", "#2b8a57"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class CurvesFigure:
    """Settings of the figures.

    Args:
        work: folder for pairs and runs.
        out: folder for NAME.json and NAME.png of each run.
        steps: optimizer steps of each run.
        every: steps between validations.
        seed: seed of pairs, answers and training.
    """

    work: Path
    out: Path
    steps: int = 200
    every: int = 20
    seed: int = 0


def make_pairs(settings: CurvesFigure, name: str, count: int, seed: int) -> Path:
    """Pairs of the base model's images, all of them answered by the simulated human."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.pipelines import propose
    from dedpo_diffusion.pipelines.align import call
    from dedpo_diffusion.shapes.people import answer_share, drawn_prompts

    pairs, prompts = settings.work / name / "data", settings.work / name / "prompts-training.txt"
    pairs.parent.mkdir(parents=True, exist_ok=True)
    options = ["--steps", "12", "--guidance", "1.5", "--batch", "48", "--device", "cpu"]
    if not (pairs / "pairs").exists():
        write_text(prompts, "\n".join(drawn_prompts(count, seed)) + "\n")
        call(propose.main, "propose", "--model", "shapes", "--prompts", prompts, "--out", pairs, "--seed", 10_000 * seed, *options)
    if not (pairs / "labels" / "human.parquet").exists():
        answer_share(pairs, 1.0, seed)
    return pairs


def make_targets(pairs: Path, seed: int) -> None:
    """Targets people (all answers), few (the answers to FEW pairs drawn at random), and judge (the carried judge's labels of all pairs)."""
    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.labels.files import label_names, read_labels, write_labels
    from dedpo_diffusion.pipelines import label, merge
    from dedpo_diffusion.pipelines.align import call

    if "pickscore" not in label_names(pairs):
        judge = files("dedpo_diffusion.shapes") / "model" / "judge"
        call(label.main, "label", pairs, "--with", f"pickscore={judge}", "--device", "cpu", "--summary", "false")
    people = read_labels(pairs, "human")
    some = np.sort(np.random.default_rng((seed, 2)).choice(len(people.pair_id), FEW, replace=False))
    if "few" not in label_names(pairs):
        write_labels(pairs, "few", Labels([people.pair_id[row] for row in some], people.label_0[some]))
        machine = read_labels(pairs, "pickscore")
        write_labels(pairs, "machine", Labels(list(machine.pair_id), machine.label_0))
    for name, labels in {"people": "human", "few": "few", "judge": "machine"}.items():
        if not (pairs / "targets" / f"{name}.json").is_file():
            call(merge.main, "merge", pairs, "--method", "human_only", "--human", labels, "--name", name, "--picture", "false")


def train_run(settings: CurvesFigure, name: str, pairs: Path, held_out: Path) -> Path:
    """One of RUNS, with its validations."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.pipelines.align import call
    from dedpo_diffusion.shapes.world import VOCABULARY

    prompts, run = settings.work / "prompts.txt", settings.work / "runs" / name
    every = max(1, len(VOCABULARY) // PROMPTS)
    write_text(prompts, "\n".join(attributes.prompt for attributes in VOCABULARY[::every]) + "\n")
    judge = files("dedpo_diffusion.shapes") / "model" / "judge"
    changes = [part for key, value in RUNS[name][1].items() for part in (f"--{key}", value)]
    call(
        train.main, "train", "--config", CONFIG, "--data.pairs", pairs, "--out", run,
        "--data.cache", settings.work / "cache", "--optim.steps", settings.steps, "--optim.batch", 16, "--seed", settings.seed,
        "--objective.balance", "none", *ALIKE, "--log_every", 5, "--validation.every", settings.every, "--validation.pairs", held_out,
        "--validation.prompts", prompts, "--validation.steps", 12, "--validation.guidance", 1.5, *changes,
        "--validation.scorers", f'["oracle_reward", "pickscore={judge}"]',
    )  # fmt: skip
    return run


def read_run(settings: CurvesFigure, name: str, run: Path) -> dict[str, Any]:
    """The curves of a run, and what `health` said of them."""
    from dedpo_diffusion.training.health import Watch, held_out_symptom
    from dedpo_diffusion.weights.run_folder import read_metrics

    lines, held = read_metrics(run, settings.steps), read_metrics(run, settings.steps, "validation")
    watch, told = Watch(), []
    for line in lines:
        told += [{"step": line["step"], "text": text} for text in watch.look(line)]
    start = [held[0]["start_loss"]] * len(held[0]["pair_loss"])  # before training every pair's loss is the same
    for count, line in enumerate(held, 1):
        text = held_out_symptom(held[:count], start)
        if text:
            told.append({"step": line["step"], "text": text})
            break
    return {
        "title": RUNS[name][0],
        "settings": dict(RUNS[name][1]),
        "steps": settings.steps,
        "seed": settings.seed,
        "warnings": sorted(told, key=lambda warning: warning["step"]),
        "metrics": [{key: line[key] for key in KEPT} for line in lines],
        "validation": [{key: line[key] for key in HELD} for line in held],
    }


# ---- the figures


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Mean over the last `width` values: batches are noisy."""
    x = np.asarray(values, dtype=np.float64)
    return np.array([x[max(0, k + 1 - width) : k + 1].mean() for k in range(len(x))])


def draw(report: Line, path: Path, run: Path) -> Path:
    """Four panels: loss, margins, the drift of both errors, and the scores of sampled images; below, images of three prompts in the
    course of the run. Warnings are numbered lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    from dedpo_diffusion.core.files import atomic_file
    from dedpo_diffusion.labels.judge_figure import PAPER, SOFT, STYLE

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.6, 10.4), layout="constrained", facecolor=PAPER)
        upper, lower = figure.subfigures(2, 1, height_ratios=(6.4, 4.0))
        grid = upper.subplots(2, 2)
        for axes, panel in zip(grid.flat, (_loss, _margins, _drift, _scores), strict=True):
            panel(axes, report)
            axes.set_xlim(0, report["steps"])
            for number, step in enumerate(dict.fromkeys(warning["step"] for warning in report["warnings"]), 1):
                axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
                place = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
                paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.text(step, 0.02, str(number), color=SOFT, fontsize=9, bbox=paper, **place)
            axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")
        for axes in grid[1]:
            axes.set_xlabel("step")
        _images(lower, [0, *(line["step"] for line in report["validation"] if line["step"] % (2 * report["steps"] // 10) == 0)], run)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        plt.close(figure)
    with atomic_file(path) as temporary:
        Image.open(drawn).convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)  # a third of the size
    return path


def _images(figure: Any, steps: Sequence[int], run: Path) -> None:
    """One row a prompt, one column a step, from the same noise."""
    from PIL import Image

    for row, cells in zip(SHOWN, figure.subplots(len(SHOWN), len(steps)), strict=True):
        for step, axes in zip(steps, cells, strict=True):
            axes.imshow(Image.open(run / "samples" / f"step-{step:08d}" / f"{row:05d}-{row}.png"))
            axes.set_axis_off()
            if row == SHOWN[0]:
                axes.set_title("before" if step == 0 else f"step {step}", fontsize=10)


def _held(report: Line, *keys: str) -> tuple[list[int], np.ndarray]:
    found = []
    for line in report["validation"]:
        value: Any = line
        for key in keys:
            value = value[key]
        found.append(value)
    return [line["step"] for line in report["validation"]], np.array(found, dtype=np.float64)


def _train(report: Line, key: str) -> tuple[list[int], np.ndarray]:
    lines = report["metrics"]
    return [line["step"] for line in lines], smooth([line[key] for line in lines])


def _loss(axes: Axes, report: Line) -> None:
    axes.set_title("Loss")
    axes.plot(*_train(report, "loss"), color=BLUE, label="training pairs")
    steps, loss = _held(report, "loss")
    ends = _held(report, "loss_ci")[1]
    axes.fill_between(steps, ends[:, 0], ends[:, 1], color=ORANGE, alpha=0.18, linewidth=0)
    axes.plot(steps, loss, "o-", markersize=4, color=ORANGE, label="held-out pairs, 95 %")
    axes.axhline(np.log(2), color=GREEN, linewidth=1, label="log 2: before training")


def _margins(axes: Axes, report: Line) -> None:
    axes.set_title("Margins")
    axes.plot(*_train(report, "margin_abs_mean"), color=BLUE, label="mean size, training pairs")
    axes.plot(*_held(report, "margin"), "o-", markersize=4, color=ORANGE, label="towards the better image, held-out")
    axes.axhline(0, color=GREEN, linewidth=1)


def _drift(axes: Axes, report: Line) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title("Errors against the reference's")
    reference = float(np.mean([line["reference_error"] for line in report["metrics"]]))
    for key, colour, words in (("loser_drift", ORANGE, "rejected image"), ("winner_drift", BLUE, "preferred image")):
        steps, drift = _train(report, key)
        axes.plot(steps, drift / reference, color=colour, label=words)
    axes.axhline(0, color=GREEN, linewidth=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))


def _scores(axes: Axes, report: Line) -> None:
    axes.set_title("Sampled images, gain over the base")
    for key, colour, words in (("oracle_reward", BLUE, "true reward"), ("pickscore", ORANGE, "the judge's score / 10")):
        steps, gain = _held(report, "scores", key, "gain")
        ends = _held(report, "scores", key, "gain_ci")[1]
        unit = 10.0 if key == "pickscore" else 1.0
        axes.fill_between(steps, ends[:, 0] / unit, ends[:, 1] / unit, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, gain / unit, "o-", markersize=4, color=colour, label=words)
    axes.axhline(0, color=GREEN, linewidth=1)


# ---- all of it


def run(settings: CurvesFigure) -> Path:
    """Curves of runs that go well and wrong, as JSON and pictures."""
    from dedpo_diffusion.core.files import write_json

    pairs = make_pairs(settings, "training", PAIRS, settings.seed)
    held_out = make_pairs(settings, "held-out", HELD_OUT, settings.seed + 1)
    make_targets(pairs, settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        trained = train_run(settings, name, pairs, held_out)
        report = read_run(settings, name, trained)
        write_json(settings.out / f"{name}.json", report)
        say(f"drew {draw(report, settings.out / f'{name}.png', trained)}")
        for number, warning in enumerate(report["warnings"], 1):
            say(f"  {number}. step {warning['step']}: {warning['text']}")
    return settings.out


if __name__ == "__main__":
    raise SystemExit(stage(CurvesFigure, run, None, prog="curves_figure"))
