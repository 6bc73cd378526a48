"""Are several rounds worth their price? Three rounds of `dedpo align` on Shapes against one of as many steps, images and answers.

    python eval/benchmarks/rounds_study.py --work WORK --out eval/results/rounds.json

`one` proposes all pairs from the base and trains once. `three` proposes a third of them in each round, from the latest LoRA, trains a third
of the steps on all pairs so far, and asks people in every round; `three_asked_once` asks them all in the first. The judge is the carried
one, taught by all answers so far. `one_human` trains on the answers of `one` alone. Each round's LoRA is judged by the true preference at
its best strength, chosen on one half of the prompts and judged on the other, both ways, on images that no round was compared by. Every
journey is kept in WORK when it is done; start the command once for each core, and the same one again to go on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import call, check_arms, take_arms, write_record
from dedpo_diffusion.evaluation.benchmarks.reward_training import JUDGE, TRUTH
from dedpo_diffusion.evaluation.benchmarks.study_report import at_best, interval, minus
from dedpo_diffusion.evaluation.benchmarks.throughput import hardware

ARMS = ("one", "three", "three_asked_once", "one_human")
ROUNDS = 3
WARMUP = 20  # steps, of all rounds together


@dataclass(frozen=True)
class RoundsSettings:
    """Settings of the measurement.

    Args:
        work: folder for the journeys and what is done.
        out: file for the result (JSON).
        arms: journeys that are compared.
        seeds: the first and the last, of all draws of a journey.
        pairs, steps, answers: of a journey in all; multiples of three.
        train: further options of `dedpo train`.
        strengths: at which each round's LoRA is judged.
        prompts: that it is judged by, an image each; at most the grammar's 144.
        compared: prompts that `dedpo align` itself compares the rounds by, two images each.
    """

    work: Path
    out: Path
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: tuple[int, int] = (60, 65)
    pairs: int = 600
    steps: int = 150
    answers: int = 48
    train: dict[str, str] = field(default_factory=lambda: {"objective.timestep_weighting": "equal_noise", "objective.timestep_pairs": "8"})
    strengths: tuple[float, ...] = (0.35, 0.6, 1.0, 1.7)
    prompts: int = 144
    compared: int = 36


def journey_of(settings: RoundsSettings, arm: str, seed: int, out: Path) -> dict[str, Any]:
    """The settings of an arm's `dedpo align`."""
    rounds = 1 if arm.startswith("one") else ROUNDS
    first = settings.answers if arm != "three" else settings.answers // ROUNDS
    pairs = settings.pairs // rounds
    given: dict[str, Any] = {
        "model": "shapes", "out": str(out), "prompts": "shapes", "limit": pairs, "sampler_steps": world.SAMPLER["steps"],
        "guidance": world.SAMPLER["guidance"], "batch": 48, "dtype": "bfloat16", "judges": [f"pickscore={JUDGE}"], "people": "simulated",
        "human_share": first / pairs, "methods": ["human_only" if arm == "one_human" else "adapted"], "recipe": "shapes_lora.yaml",
        "training": settings.train | {"optim.warmup": str(round(WARMUP / rounds))}, "steps": settings.steps // rounds, "rounds": rounds,
        "strengths": [0.5, 1.0], "eval_prompts": "shapes", "eval_limit": settings.compared, "eval_seeds": 2,
        "scorers": [TRUTH, f"pickscore={JUDGE}"], "held_out": [TRUTH], "device": "cpu", "seed": seed,
    }  # fmt: skip
    return given | ({"round_votes": settings.answers // ROUNDS} if arm == "three" else {})


class Journeys:
    """Takes journeys, one after the other, in one process."""

    def __init__(self, settings: RoundsSettings) -> None:
        self.settings = settings
        self.verdict = world.Verdict(settings.prompts, 1)
        self.verdict.load(None)
        self.base = float(np.mean(self.verdict.rewards()))

    def do(self, arm: str, seed: int, folder: Path) -> dict[str, Any]:
        """Take one journey: the true gain of each round's LoRA, and which of them `dedpo align` would give, and why."""
        import yaml
        from safetensors.torch import load_file

        from dedpo_diffusion.pipelines import align
        from dedpo_diffusion.weights.run_folder import checkpoints

        folder.mkdir(parents=True, exist_ok=True)
        given, out = folder / "align.yaml", folder / "out"
        told = journey_of(self.settings, arm, seed, out)
        given.write_text(yaml.safe_dump(told), encoding="utf-8")
        call(align.main, "--config", given)
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        [method] = told["methods"]
        names, gains = [method, *(f"{method}-round-{number}" for number in range(2, ROUNDS + 1))], []
        for name in names:
            if (out / "runs" / name).is_dir():
                _, last = checkpoints(out / "runs" / name)[-1]
                lines = self.verdict.at_strengths(load_file(last / "parameters.safetensors"), self.settings.strengths)
                gains.append(at_best(lines) - self.base)
        ended = next((entry["ended"] for entry in results.get("rounds", []) if entry["ended"]), None)
        found = {"gains": gains, "given": names.index(results["default"]) + 1, "ended": ended, "seconds": results["seconds"]["total"]}
        shutil.rmtree(folder)
        return found


def summarise(read: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """By arm, over seeds: the gain of what `dedpo align` gives, of each round and of the last; differences paired by seed.

    The last round's, too, are from what `dedpo align` gives of the other arms.
    """
    given = {arm: {seed: entry["gains"][entry["given"] - 1] for seed, entry in seeds.items()} for arm, seeds in read.items()}
    last = {arm: {seed: entry["gains"][-1] for seed, entry in seeds.items()} for arm, seeds in read.items()}
    found: dict[str, Any] = {}
    for arm, seeds in read.items():
        longest = max(len(entry["gains"]) for entry in seeds.values())
        by_round = [{seed: entry["gains"][k] for seed, entry in seeds.items() if len(entry["gains"]) > k} for k in range(longest)]
        found[arm] = {
            "seeds": sorted(seeds), "gain": interval(list(given[arm].values())),
            "rounds": [{"seeds": len(gains), "gain": interval(list(gains.values())),
                        "minus_last": minus(gains, by_round[k - 1]) if k else None} for k, gains in enumerate(by_round)],
            "given": [entry["given"] for entry in seeds.values()], "ended": [entry["ended"] for entry in seeds.values()],
        }  # fmt: skip
        others = [other for other in read if other != arm and given[other].keys() & given[arm].keys()]
        found[arm]["minus"] = {other: minus(given[arm], given[other]) for other in others}
        found[arm]["last"] = {
            "gain": interval(list(last[arm].values())),
            "minus": {other: minus(last[arm], given[other]) for other in others},
        }
    return found


def check(settings: RoundsSettings) -> None:
    """Raises UserError for settings that do not go together."""
    check_arms(settings, ARMS)
    if settings.pairs % ROUNDS or settings.steps % ROUNDS or settings.answers % ROUNDS:
        raise UserError(f"pairs, steps and answers must be multiples of {ROUNDS}, the rounds that share them")


def run(settings: RoundsSettings) -> None:
    """Take the journeys that are missing, and write the table of what is done."""
    check(settings)
    read = take_arms(settings, lambda: Journeys(settings))
    found = summarise(read)
    for arm, entry in found.items():
        say(f"{arm}, {len(entry['seeds'])} seeds: gain {entry['gain']}, by round {[told['gain'] for told in entry['rounds']]}")
    write_record(settings, {"hardware": hardware("cpu"), "arms": found, "journeys": read})


if __name__ == "__main__":
    raise SystemExit(stage(RoundsSettings, run, None, prog="rounds_study"))
