"""Where is the best strength of a LoRA when its targets are sharper, by their logits or by beta? Drawn for docs/objectives.md.

    python eval/benchmarks/sharpness_figure.py --work WORK --out eval/results/sharpness

Pairs, people and the judge that they taught are those of the study (`study_world`); every run has the same targets, first weights, visits
and noises, so that runs differ in sharpness alone. What is there already in WORK is kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import say, stage
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.study import ALIKE, CONFIG
from dedpo_diffusion.shapes import oracle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BETA = 500.0  # of configs/shapes_lora.yaml
RUNS: dict[str, tuple[str, float, float]] = {  # what it is called, what beta is divided by, what the logits are multiplied by
    "as_they_are": ("taught judge", 1, 1),
    "beta_4": ("taught judge, beta / 4", 4, 1),
    "beta_8": ("taught judge, beta / 8", 8, 1),
    "beta_16": ("taught judge, beta / 16", 16, 1),
    "logit_4": ("taught judge, logits x 4", 1, 4),
    "hard": ("taught judge, made hard", 1, np.inf),
    "truth": ("true probabilities", 1, 1),  # sharper as they are: do they behave as others of their sharpness?
    "truth_2": ("true probabilities, beta / 2", 2, 1),
}
BLUE, ORANGE, GREEN, SOFT = "#2f6fd0", "#d9730d", "#2b8a57", "#606876"
LINES = {  # colour and marks of a run
    "as_they_are": (BLUE, "o-"), "beta_4": (ORANGE, "o-"), "beta_8": ("#b5480a", "o-"), "beta_16": ("#7a2e05", "o-"),
    "logit_4": (GREEN, "s--"), "hard": ("#9aa2ae", "s--"), "truth": ("#7b52c4", "^-"), "truth_2": ("#b79be6", "^-"),
}  # fmt: skip
LAST = 5  # lines of metrics that a run's margins are the mean of


@dataclass(frozen=True)
class SharpnessFigure:
    """Settings of the measurement and its figure.

    Args:
        work: folder for the pool and the runs.
        out: folder for sharpness.json and sharpness.png.
        pool, pairs, share: pairs proposed, those trained on, and the share of them with a human label.
        steps: optimizer steps of each run.
        draws: pre-drawn noises of each pair.
        strengths: of each LoRA.
        image_seeds: images of each of the grammar's 144 prompts.
        seed: of pairs, answers and training.
    """

    work: Path
    out: Path
    pool: int = 1600
    pairs: int = 800
    share: float = 0.05
    steps: int = 150
    draws: int = 16
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    image_seeds: int = 1
    seed: int = 100


def sharpened(target: np.ndarray, factor: float) -> np.ndarray:
    """Targets (n,) in [0, 1] with their logits times a factor; infinity makes them hard."""
    from scipy.special import expit, logit

    if np.isinf(factor):
        return np.where(target == 0.5, 0.5, (target > 0.5).astype(np.float64))
    return expit(factor * logit(target)) if factor != 1 else target


def train_run(settings: SharpnessFigure, name: str, pool: world.Pool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One of RUNS: the LoRA that it ends with, and its metrics."""
    from safetensors.torch import load_file

    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.pipelines.align import call
    from dedpo_diffusion.weights.run_folder import checkpoints, read_metrics

    drawn = world.draw_sample(pool, seed=settings.seed, pairs=settings.pairs, people="quickstart")
    merged = world.merged_targets(pool, drawn, "adapted", "clip", settings.share, settings.seed).target
    plain = oracle.preference(*pool.reward[drawn.rows].T) if name.startswith("truth") else merged
    _, divided, factor = RUNS[name]
    world.write_rows(pool, name, drawn.rows, sharpened(plain, factor))
    run = settings.work / "runs" / name
    call(
        train.main, "train", "--config", CONFIG, "--data.pairs", pool.folder,
        "--data.targets", name, "--data.cache", settings.work / "cache", "--data.reference_draws", settings.draws, "--out", run,
        "--optim.steps", settings.steps, "--seed", settings.seed, "--objective.beta", BETA / divided, "--checkpoint_every", settings.steps,
        *ALIKE,
    )  # fmt: skip
    return load_file(checkpoints(run)[-1][1] / "parameters.safetensors"), read_metrics(run, settings.steps)


def measure(settings: SharpnessFigure, name: str, pool: world.Pool, verdict: world.Verdict) -> list[dict[str, Any]]:
    """A line for each strength of a run: its mean reward, those of the prompts, and the margins that training reached."""
    parameters, metrics = train_run(settings, name, pool)
    lines = []
    for strength in settings.strengths:
        verdict.load(parameters, strength)
        rewards = verdict.rewards()
        reached = float(np.mean([line["margin_abs_mean"] for line in metrics[-LAST:]]))
        lines.append({"run": name, "strength": strength, "reward": float(np.mean(rewards)), "rewards": rewards, "margin_reached": reached})
    shutil.rmtree(settings.work / "runs" / name)
    return lines


def measure_all(settings: SharpnessFigure) -> list[dict[str, Any]]:
    """The lines of the base and of all runs, those in the work folder as they are."""
    from dedpo_diffusion.core.files import write_json

    (settings.work / "lines").mkdir(parents=True, exist_ok=True)
    pool, verdict = world.make_pool(settings.work, settings.pool), world.Verdict(144, settings.image_seeds)
    found: list[dict[str, Any]] = []
    for name in ("base", *RUNS):
        file = settings.work / "lines" / f"{name}.json"
        if not file.is_file() and name == "base":
            verdict.load(None)
            rewards = verdict.rewards()
            write_json(file, [{"run": name, "strength": 0.0, "reward": float(np.mean(rewards)), "rewards": rewards}])
        elif not file.is_file():
            write_json(file, measure(settings, name, pool, verdict))
        found += json.loads(file.read_text(encoding="utf-8"))
        say(f"{name}: " + ", ".join(f"{line['strength']:g} {line['reward']:.3f}" for line in found if line["run"] == name))
    return found


def in_short(settings: SharpnessFigure, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the lines: of each run its sharpness, the margins that it reached, and its mean reward at every strength."""
    import torch

    from dedpo_diffusion.dpo.sharpness import sharpness
    from dedpo_diffusion.labels.files import read_targets

    base = np.array(lines[0]["rewards"])
    kept: dict[str, Any] = {"base": float(base.mean()), "prompts": len(base), "beta": BETA, "runs": {}}
    for name, (title, divided, factor) in RUNS.items():
        merged, own = read_targets(settings.work / "pool", name), [line for line in lines if line["run"] == name]
        found = sharpness(torch.tensor(merged.target), torch.tensor(merged.weight))
        assert found is not None
        sharp = {"median_margin_at_beta": found.typical * divided if np.isfinite(found.typical) else None, "never_stops": found.hard}
        gains = [np.array(line["rewards"]) - base for line in own]
        at = [
            {"strength": line["strength"], "reward": line["reward"], "gain_se": float(gain.std(ddof=1) / np.sqrt(len(gain)))}
            for line, gain in zip(own, gains, strict=True)
        ]
        reached = own[0]["margin_reached"]
        kept["runs"][name] = {
            "title": title, "beta_divided_by": divided, "logits_times": factor if np.isfinite(factor) else None, **sharp,
            "mean_abs_margin_reached": reached, "mean_abs_margin_reached_at_beta": reached * divided, "at": at,
        }  # fmt: skip
    return kept


# ---- the figure


def draw(kept: dict[str, Any], path: Path) -> Path:
    """Three panels: where a pair stops, how hard it pulls before the first step, and the rewards measured at every strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from dedpo_diffusion.core.files import atomic_file
    from dedpo_diffusion.labels.judge_figure import PAPER, STYLE

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.4, 8.0), layout="constrained", facecolor=PAPER)
        axes = figure.subplot_mosaic([["stop", "pull"], ["reward", "reward"]])
        _stops(axes["stop"])
        _pulls(axes["pull"])
        _rewards(axes["reward"], kept)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
        plt.close(figure)
    return path


def _stops(axes: Axes) -> None:
    from scipy.special import logit

    target = np.linspace(0.5, 0.98, 200)
    gap = 2 * logit(target) / BETA
    axes.plot(target, gap, color=BLUE, label=f"beta {BETA:g}, targets as they are")
    axes.plot(target, 4 * gap, color=ORANGE, label="beta divided by 4")
    axes.plot(target, 4 * gap, color=GREEN, linestyle=(0, (2, 3)), linewidth=2.5, label="logits times 4: the same")
    axes.set_title("Where a pair stops")
    axes.set_xlabel("target")
    axes.set_ylabel("change of the error difference")
    axes.set_ylim(0, 0.065)
    axes.legend(fontsize=9, framealpha=0.9, edgecolor="none", loc="upper left")


def _pulls(axes: Axes) -> None:
    from scipy.special import expit, logit

    target = np.linspace(0.5, 1 - 1e-9, 400)
    axes.plot(target, 2 * target - 1, color=BLUE, label="as they are")
    axes.plot(target, (2 * target - 1) / 4, color=ORANGE, label="beta divided by 4")
    axes.plot(target, 2 * expit(4 * logit(target)) - 1, color=GREEN, linestyle=(0, (2, 3)), linewidth=2.5, label="logits times 4")
    axes.set_title("Its gradient before the first step")
    axes.set_xlabel("target")
    axes.set_ylabel(f"as part of a hard label's at beta {BETA:g}")
    axes.legend(fontsize=9, framealpha=0.9, edgecolor="none", loc="lower right")


def _rewards(axes: Axes, kept: dict[str, Any]) -> None:
    for name, entry in kept["runs"].items():
        colour, style = LINES[name]
        margin = entry["median_margin_at_beta"]
        words = entry["title"] + (", which never stops" if margin is None else f": {margin:.2g}")
        axes.plot(
            *zip(*[(at["strength"], at["reward"]) for at in entry["at"]], strict=True), style, color=colour, markersize=4, label=words
        )
    axes.axhline(kept["base"], color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axes.text(0.5, kept["base"], "base", color=SOFT, fontsize=9, va="top")
    axes.set_ylim(0.7, None)
    axes.set_title("True reward, by targets and their median margin")
    axes.set_xlabel("strength of the LoRA")
    axes.legend(fontsize=9, edgecolor="none", loc="center left", bbox_to_anchor=(1.0, 0.5))


# ---- all of it


def run(settings: SharpnessFigure) -> Path:
    """Rewards over strengths of runs that differ in sharpness, as JSON and a picture."""
    from dedpo_diffusion.evaluation.benchmarks.record import write_record

    kept = in_short(settings, measure_all(settings))
    settings.out.mkdir(parents=True, exist_ok=True)
    write_record(replace(settings, out=settings.out / "sharpness.json"), kept)
    say(f"drew {draw(kept, settings.out / 'sharpness.png')}")
    return settings.out


if __name__ == "__main__":
    raise SystemExit(stage(SharpnessFigure, run, None, prog="sharpness_figure"))
