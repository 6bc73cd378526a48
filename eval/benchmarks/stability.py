"""Does a long run at too high a learning rate run away? Shapes, many steps, the recipe's rate several times, one arm for each safeguard.

    python eval/benchmarks/stability.py --work WORK --out stability.json

All arms train on people's answers to all pairs: hard labels, which never stop pulling by themselves. The oracle judges each LoRA at
strength 1 at several steps, by the same images as the base.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.evaluation.benchmarks.study import ALIKE, CONFIG
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval

ARMS: dict[str, list[str]] = {  # what differs from the defaults
    "defaults": [],
    "linear": ["--objective.kind", "linear"],
    "balance": ["--objective.balance", "output"],
    "balance, stop 4": ["--objective.balance", "output", "--objective.options", '{"stop": 4}'],
    "linear, balance": ["--objective.kind", "linear", "--objective.balance", "output"],
}
TARGETS = "stability"


@dataclass(frozen=True)
class StabilitySettings:
    """Settings of the comparison.

    Args:
        work: folder of the study, whose pool is used; made if it is not there. Arms that are done are kept in it.
        out: file for the result (JSON).
        arms: which of them.
        pool: pairs proposed; all are trained on.
        steps, batch: of training.
        rate: how many times the learning rate of the recipe.
        looks: at how many steps, evenly spaced, a LoRA is judged.
        prompts: that a LoRA is judged by, one image each.
        seeds: the first and the last.
    """

    work: Path
    out: Path
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    pool: int = 1600
    steps: int = 2000
    batch: int = 8
    rate: float = 3.0
    looks: int = 4
    prompts: int = 72
    seeds: tuple[int, int] = (0, 0)


def train(settings: StabilitySettings, folder: Path, out: Path, arm: str, seed: int) -> None:
    """`dedpo train` of one arm; it goes on where it was stopped."""
    import yaml

    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.pipelines.align import call

    rate = settings.rate * float(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["optim"]["learning_rate"])
    argv = ["--config", CONFIG, "--data.pairs", folder, "--data.targets", TARGETS, "--data.cache", settings.work / "cache", "--out", out]
    argv += ["--optim.steps", settings.steps, "--optim.batch", settings.batch, "--optim.learning_rate", rate, "--seed", seed]
    argv += ["--checkpoint_every", settings.steps // settings.looks, "--keep_checkpoints", settings.looks, "--log_every", 100]
    call(train.main, "train", *argv, *ALIKE, *ARMS[arm])


def look(verdict: world.Verdict, out: Path) -> dict[str, list[float]]:
    """Rewards of each prompt at each checkpoint, by step."""
    from safetensors.torch import load_file

    from dedpo_diffusion.weights.run_folder import checkpoints

    found = {}
    for step, checkpoint in checkpoints(out):
        verdict.load(load_file(checkpoint / "parameters.safetensors"))
        found[str(step)] = verdict.rewards()
    return found


def run(settings: StabilitySettings) -> None:
    """Train and judge every arm and seed."""
    import json

    if unknown := [arm for arm in settings.arms if arm not in ARMS]:
        raise UserError(f"unknown arm {unknown[0]!r}; known: {', '.join(ARMS)}")
    pool = world.make_pool(settings.work, settings.pool)
    answers = world.draw_sample(pool, seed=0, pairs=settings.pool, people="quickstart")
    world.write_rows(pool, TARGETS, answers.rows, answers.answer)
    verdict = world.Verdict(settings.prompts, 1)
    verdict.load(None)
    base, rewards = np.array(verdict.rewards()), {}
    for seed in range(settings.seeds[0], settings.seeds[1] + 1):
        for arm in settings.arms:
            name = f"stability-{arm.replace(', ', '-').replace(' ', '-')}-{settings.steps}-{settings.batch}-{settings.rate:g}-{seed}"
            kept = settings.work / f"{name}.json"
            if not kept.is_file():
                train(settings, pool.folder, settings.work / "runs" / name, arm, seed)
                write_json(kept, look(verdict, settings.work / "runs" / name))
                shutil.rmtree(settings.work / "runs" / name)
            rewards[arm, seed] = json.loads(kept.read_text(encoding="utf-8"))
    write_record(
        settings, {"base": float(base.mean()), "arms": [summary(base, arm, seed, found) for (arm, seed), found in rewards.items()]}
    )


def summary(base: np.ndarray, arm: str, seed: int, found: dict[str, list[float]]) -> dict[str, Any]:
    """Gain over the base at each step, with an interval over prompts (P,)."""
    gains = {step: seed_interval(np.array(rewards) - base).as_dict() for step, rewards in found.items()}
    say(f"{arm}, seed {seed}: " + ", ".join(f"{gain['mean']:+.3f} at {step}" for step, gain in gains.items()))
    return {"arm": arm, "seed": seed, "gain": gains}


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(StabilitySettings, run, argv, prog="stability")


if __name__ == "__main__":
    raise SystemExit(main())
