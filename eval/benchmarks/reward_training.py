"""Does training on a reward raise it? On Shapes, with the true preference as the reward: before and after, same prompts and noise.

    python eval/benchmarks/reward_training.py --work WORK --out eval/results/loop.json

Trains by configs/shapes_loop.yaml, samples the base and what was trained by the quickstart's sampler, which is not that of training, and
compares the oracle's reward image by image. What is there already in WORK is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.evaluation.benchmarks.study_world import SAMPLER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WINDOW = 10  # rollouts at each end of training, whose own rewards are told


@dataclass(frozen=True)
class RewardSettings:
    """Settings of the measurement.

    Args:
        work: folder for prompts, run and samples.
        out: file for the result (JSON).
        config: recipe of the run.
        steps: optimizer steps; None takes the recipe's.
        seeds: images of each of the grammar's 144 prompts.
        seed: of training.
        strengths: of the LoRA, each told.
    """

    work: Path
    out: Path
    config: str = "shapes_loop.yaml"
    steps: int | None = None
    seeds: int = 2
    seed: int = 0
    strengths: tuple[float, ...] = (1.0, 2.0)


def done(main: Callable[[list[str]], int], arguments: Sequence[object]) -> None:
    """Run a stage.

    Raises:
        UserError: it failed.
    """
    words = [str(word) for word in arguments]
    if main(words) != 0:
        raise UserError(f"a stage failed: {' '.join(words)}")


def rewards(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The oracle's reward (N,) of the images of a folder, and their prompts."""
    import pyarrow.parquet as pq
    from PIL import Image

    from dedpo_diffusion.shapes import oracle

    rows = pq.read_table(folder / "index.parquet").to_pylist()
    images = [Image.open(folder / row["file"]) for row in rows]
    prompts = [row["prompt"] for row in rows]
    return oracle.reward(prompts, images), prompts


def curve(run: Path) -> dict[str, Any]:
    """What training saw of its own images, by its first and last rollouts."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = list(dict.fromkeys((line["reward"]) for line in lines))
    ends = {"first": found[:WINDOW], "last": found[-WINDOW:]}
    told = {name: {"mean": float(np.mean(part)), "rollouts": len(part)} for name, part in ends.items()}
    return told | {"steps": lines[-1]["step"], "rewards": [round(value, 4) for value in found]}


def run(settings: RewardSettings) -> None:
    """Train, sample, compare."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.pipelines import export, sample, train
    from dedpo_diffusion.shapes.world import VOCABULARY
    from dedpo_diffusion.training.held_out import summarise_scores

    work = settings.work
    work.mkdir(parents=True, exist_ok=True)
    prompts, lora = work / "prompts.txt", work / "loop.safetensors"
    write_text(prompts, "\n".join(attributes.prompt for attributes in VOCABULARY))
    steps = [] if settings.steps is None else ["--optim.steps", settings.steps]
    given = ["--config", settings.config, "--data.pairs", prompts, "--out", work / "run", "--seed", settings.seed, *steps]
    done(train.main, given)
    done(export.main, [work / "run", "--out", lora])
    drawn: list[object] = ["--model", "shapes", "--prompts", prompts, "--seeds", settings.seeds, "--seed", 1000, "--device", "cpu"]
    drawn += ["--steps", SAMPLER["steps"], "--guidance", SAMPLER["guidance"], "--batch", 48]
    done(sample.main, [*drawn, "--out", work / "base"])
    before, of = rewards(work / "base")
    result: dict[str, Any] = {"training": curve(work / "run"), "images": len(before), "base": float(before.mean()), "strengths": {}}
    for strength in settings.strengths:
        folder = work / f"trained-{strength:g}"
        done(sample.main, [*drawn, "--out", folder, "--lora", lora, "--strength", strength])
        after, _ = rewards(folder)
        found = summarise_scores(after, before, of)
        result["strengths"][f"{strength:g}"] = found
        low, high = found["gain_ci"]
        means = f"{found['mean']:.3f}, base {found['start']:.3f}"
        say(f"strength {strength:g}: {means}, gain {found['gain']:+.4f} (95 %: {low:+.4f} to {high:+.4f})")
    write_record(settings, result)


if __name__ == "__main__":
    raise SystemExit(stage(RewardSettings, run, None, prog="reward_training"))
