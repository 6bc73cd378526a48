"""What training on a reward wins, and whether it games a judge: LOOP on Shapes with rewards that differ, judged by the true preference.

    python eval/benchmarks/reward_training.py --work WORK --out eval/results/loop.json

`dedpo train --config shapes_loop.yaml` with the oracle's reward (a ceiling), with the carried judge as it is (`raw`), with that judge as
the answers of a seed's people taught it (`adapted`), and with the oracle's rewards shuffled among the images of a rollout, which tell
nothing (`shuffled`). After every look's steps the LoRA is sampled at several strengths, scored and compared with the base by `dedpo
sample`, `score` and `compare`, as a user would; the page's words of over-optimisation are kept. The same seed gives every arm the same
first weights, prompts and noise. Every training is kept in WORK when it is done; start the command once for each core, and the same one
again to go on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.core.files import write_text
from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.evaluation.benchmarks import study_world as world
from dedpo_diffusion.evaluation.benchmarks.record import call, check_arms, take_arms, write_record
from dedpo_diffusion.evaluation.benchmarks.study_report import interval, minus
from dedpo_diffusion.evaluation.benchmarks.throughput import hardware

ARMS = ("oracle", "adapted", "raw", "shuffled")
TRUTH = "oracle_reward"
JUDGE = files("dedpo_diffusion.shapes") / "model" / "judge"


@dataclass(frozen=True)
class RewardSettings:
    """Settings of the measurement.

    Args:
        work: folder for the pool, the runs and what is done.
        out: file for the result (JSON).
        arms: rewards that are compared.
        seeds: the first and the last, of people's answers and of training.
        looks: optimizer steps after which a LoRA is judged, rising; a rollout is every second one.
        strengths: at which each is sampled; the best is chosen on one half of the prompts and judged on the other, both ways.
        pool, pairs: pairs proposed once for all seeds, and pairs of a seed.
        share: of these that people label, for `adapted`.
        prompts: of the verdict, an image each; at most the grammar's 144.
    """

    work: Path
    out: Path
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: tuple[int, int] = (50, 55)
    looks: list[int] = field(default_factory=lambda: [40, 80, 120])
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    pool: int = 1600
    pairs: int = 800
    share: float = 0.05
    prompts: int = 144


@contextlib.contextmanager
def shuffled() -> Iterator[None]:
    """Rewards of images that are scored together change places among them; by their first seed, so that a resumed run does the same."""
    from dedpo_diffusion.training.rewards import Reward

    score = Reward.score

    def mixed(reward: Reward, prompts: Any, images: Any, seeds: Any) -> np.ndarray:
        return np.random.default_rng(seeds[0]).permutation(score(reward, prompts, images, seeds))

    with mock.patch.object(Reward, "score", mixed):
        yield


class Rewards:
    """The world of the measurement: what is there already is kept."""

    def __init__(self, settings: RewardSettings) -> None:
        from dedpo_diffusion.labels.files import label_names
        from dedpo_diffusion.pipelines import label
        from dedpo_diffusion.shapes.people import spread_prompts
        from dedpo_diffusion.shapes.world import VOCABULARY

        self.settings, work = settings, settings.work
        self.pool = world.make_pool(work, settings.pool)
        self.folder = self.pool.folder
        if "pickscore" not in label_names(self.folder):  # by the name that the taught judge looks for it by
            call(label.main, self.folder, "--with", f"pickscore={JUDGE}", "--device", "cpu", "--summary", "false")
        self.trained, self.judged = work / "prompts-trained.txt", work / "prompts-judged.txt"
        write_text(self.trained, "\n".join(attributes.prompt for attributes in VOCABULARY) + "\n")
        write_text(self.judged, "\n".join(spread_prompts(settings.prompts)) + "\n")
        if not (work / "base" / "index.parquet").is_file():
            self.sample(work / "base")

    def sample(self, out: Path, *options: object) -> None:
        """Images of the verdict, by the quickstart's sampler, which is not that of training."""
        from dedpo_diffusion.pipelines import sample

        drawn: list[object] = ["--model", "shapes", "--prompts", self.judged, "--seed", 1000, "--device", "cpu", "--dtype", "bfloat16"]
        drawn += ["--steps", world.SAMPLER["steps"], "--guidance", world.SAMPLER["guidance"], "--batch", 48]
        call(sample.main, *drawn, "--out", out, *options)

    def taught(self, seed: int) -> str:
        """The judge that a seed's people taught, as a scorer; the judge as it is where they taught it nothing, as its labels are then."""
        from dedpo_diffusion.labels.files import write_labels
        from dedpo_diffusion.pipelines import calibrate

        at, name = self.settings, f"adapt-{seed}"
        drawn = world.draw_sample(self.pool, seed=seed, pairs=at.pairs, people="quickstart")
        human = drawn.human(at.share)
        asked = np.flatnonzero(~np.isnan(human))
        write_labels(self.folder, f"human-{seed}", Labels([self.pool.ids[row] for row in drawn.rows[asked]], human[asked]))
        report = self.folder / "labels" / f"{name}.json"
        call(calibrate.main, self.folder, "--judges", "pickscore", "--human", f"human-{seed}", "--method", "adapt", "--name", name)
        taught = json.loads(report.read_text(encoding="utf-8"))["calibration"]["adapted"]
        return f"adapted={report},pickscore={JUDGE}" if taught else f"pickscore={JUDGE}"

    def do(self, arm: str, seed: int, folder: Path) -> list[dict[str, Any]]:
        """Train an arm, and judge it after each look's steps."""
        from dedpo_diffusion.evaluation import compare, score
        from dedpo_diffusion.pipelines import export, train

        at = self.settings
        reward = {"adapted": lambda: self.taught(seed), "raw": lambda: f"pickscore={JUDGE}"}.get(arm, lambda: TRUTH)()
        shutil.copytree(at.work / "base", folder / "base", dirs_exist_ok=True)
        for step in at.looks:
            lora = folder / f"look-{step}.safetensors"
            if not lora.is_file():  # or it was stopped after it
                with shuffled() if arm == "shuffled" else contextlib.nullcontext():
                    call(
                        train.main, "--config", "shapes_loop.yaml", "--data.pairs", self.trained, "--out", folder / "run", "--seed", seed,
                        "--loop.reward", json.dumps([reward]), "--optim.steps", step, "--checkpoint_every", at.looks[0],
                    )  # fmt: skip
                call(export.main, folder / "run", "--out", lora)
            self.sample(folder / f"look-{step}", "--lora", lora, "--strength", *at.strengths)
        looks = [folder / f"look-{step}" for step in at.looks]
        scorers = [TRUTH, f"pickscore={JUDGE}", *([reward] if reward.startswith("adapted") else [])]
        call(score.main, folder / "base", *looks, "--with", *scorers, "--embeddings", "false", "--device", "cpu")
        held_out = [] if arm == "oracle" else ["--held_out", TRUTH]
        call(compare.main, folder / "base", *looks, "--out", folder / "report.html", "--primary", TRUTH, *held_out)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rollouts = _rollouts(folder / "run")
        found = [{"step": step, "reward": reward.partition("=")[0], **_look(results, f"look-{step}"), "rollouts": rollouts[: step // 2]}
                 for step in at.looks]  # fmt: skip
        shutil.rmtree(folder)
        return found


def _look(results: dict[str, Any], lora: str) -> dict[str, Any]:
    """What is kept of a LoRA's comparison: its gains at the strength that is best for the truth, and those at every strength."""
    entry = results["loras"][lora]
    by_strength = {
        f"{at['strength']:g}": {
            "gain": {scorer: gain["mean"] for scorer, gain in at["gain"].items()},
            "over_optimised": any("over-optimised" in text for text in results["arms"][at["arm"]]["warnings"]),
        }
        for at in entry["strengths"]
    }
    gains = {scorer: told["gain_over_base"]["mean"] for scorer, told in entry["by_scorer"].items()}
    return {"best_strength": entry["best_strength"], "gain": gains, "by_strength": by_strength, "warnings": entry.get("warnings", [])}


def _rollouts(run: Path) -> list[float]:
    """The mean reward of each rollout, as training saw it."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [round(line["reward"], 4) for line in lines if line["step"] % 2 == 0]


def summarise(read: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """By arm and look, over seeds: the true gain and the reward's own, at the strength that is best for the truth, at each strength, and at
    the one that the reward itself would choose; and how often `compare` said that a strength looks over-optimised."""
    found: dict[str, Any] = {}
    for arm, seeds in read.items():
        looks = []
        for k, first in enumerate(next(iter(seeds.values()))):
            mine = {seed: lines[k] for seed, lines in seeds.items()}
            gains = {seed: line["gain"][TRUTH] for seed, line in mine.items()}
            told = {"step": first["step"], "gain": interval(list(gains.values()))}
            told["gain_of_reward"] = interval([line["gain"][line["reward"]] for line in mine.values()])
            told["by_strength"] = {
                strength: {
                    "gain": interval([line["by_strength"][strength]["gain"][TRUTH] for line in mine.values()]),
                    "gain_of_reward": interval([line["by_strength"][strength]["gain"][line["reward"]] for line in mine.values()]),
                    "over_optimised": sum(line["by_strength"][strength]["over_optimised"] for line in mine.values()),
                }
                for strength in first["by_strength"]
            }
            told["gain_where_reward_is_highest"] = interval([_highest(line) for line in mine.values()])
            told["minus"] = {
                other: minus(gains, {seed: lines[k]["gain"][TRUTH] for seed, lines in read[other].items()})
                for other in read if other != arm and read[other].keys() & gains.keys()
            }  # fmt: skip
            looks.append(told)
        found[arm] = {"seeds": sorted(seeds), "looks": looks}
    return found


def _highest(line: dict[str, Any]) -> float:
    """The true gain at the strength that the reward likes best: what one gets who has no truth."""
    return float(max((at["gain"] for at in line["by_strength"].values()), key=lambda gain: gain[line["reward"]])[TRUTH])


def check(settings: RewardSettings) -> None:
    """Raises UserError for settings that do not go together."""
    check_arms(settings, ARMS)
    looks = settings.looks
    if looks != sorted(set(looks)) or not looks or any(step % 2 or step <= 0 for step in looks):
        raise UserError(f"looks {looks}: give rising even numbers, as a rollout is every second step")


def run(settings: RewardSettings) -> None:
    """Train and judge what is missing, and write the table of what is done."""
    check(settings)
    read = take_arms(settings, lambda: Rewards(settings))
    found = summarise(read)
    for arm, entry in found.items():
        last = entry["looks"][-1]
        seen = {strength: told["over_optimised"] for strength, told in last["by_strength"].items()}
        say(f"{arm}, {len(entry['seeds'])} seeds: gain {last['gain']} after {last['step']} steps, over-optimised by strength {seen}")
    write_record(settings, {"hardware": hardware("cpu"), "arms": found, "trainings": read})


if __name__ == "__main__":
    raise SystemExit(stage(RewardSettings, run, None, prog="reward_training"))
