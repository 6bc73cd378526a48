"""The whole journey on the embedded world: pairs, labels, three ways to merge them, three LoRAs, one verdict.

    dedpo quickstart --out quickstart

Calls the other stages with their ordinary command lines and prints each, so every line can be typed again. A stopped
quickstart goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, say_next, stage, track
from dedpo_diffusion.settings import QuickstartSettings

if TYPE_CHECKING:
    from dedpo_diffusion.pairs.dataset import PairReader

ARMS = ("human_only", "naive", "tuned")
SAMPLER = ["--steps", "12", "--guidance", "1.5", "--batch", "48", "--device", "cpu"]
EVALUATION_SEED = 1_000_000  # far from the seeds of the proposed pairs


class Clock:
    """Seconds spent in each stage, kept in a file so that a resumed journey counts all of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent within to stage `name`."""
        from dedpo_diffusion.core.files import write_json

        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)
            write_json(self.file, self.seconds)


def call(main: Callable[[list[str]], int], name: str, *arguments: object) -> None:
    """Run a stage with a command line, and show that line."""
    argv = [str(argument) for argument in arguments]
    say(f"\n$ dedpo {name} {shlex.join(argv)}")
    code = main(argv)
    if code:
        raise UserError(f"stage {name} ended with exit code {code}; its message is above")


def write_prompts(settings: QuickstartSettings) -> tuple[Path, Path]:
    """The prompts that pairs are proposed for (a random draw) and those of the evaluation."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.shapes.world import VOCABULARY

    rng = np.random.default_rng((settings.seed, 0))
    drawn = [VOCABULARY[i].prompt for i in rng.integers(len(VOCABULARY), size=settings.pairs)]
    training, evaluation = settings.out / "prompts-training.txt", settings.out / "prompts-evaluation.txt"
    write_text(training, "\n".join(drawn) + "\n")
    if not 2 <= settings.eval_prompts <= len(VOCABULARY):
        raise UserError(f"--eval_prompts is {settings.eval_prompts}; give a number from 2 to {len(VOCABULARY)}")
    chosen = [VOCABULARY[k * len(VOCABULARY) // settings.eval_prompts] for k in range(settings.eval_prompts)]
    write_text(evaluation, "\n".join(attributes.prompt for attributes in chosen) + "\n")
    return training, evaluation


def true_rewards(reader: PairReader, rows: np.ndarray) -> np.ndarray:
    """(n, 2) rewards of the oracle for both images of these pairs of Shapes."""
    from dedpo_diffusion.pairs.decoding import decode_image
    from dedpo_diffusion.shapes.oracle import reward

    found = []
    for row in track(rows.tolist(), "asking the oracle", len(rows)):
        pair, where = reader.pair(row), reader.location(row)
        found.append(reward([pair.prompt] * 2, [decode_image(pair.image_0, where), decode_image(pair.image_1, where)]))
    return np.array(found)


def ask_the_human(pairs: Path, settings: QuickstartSettings) -> None:
    """Let the simulated human label a random share of the pairs: Bradley-Terry answers on the oracle's reward."""
    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.labels.files import write_labels
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.shapes.oracle import answers

    reader = PairReader(pairs)
    rng = np.random.default_rng((settings.seed, 1))
    asked = np.sort(rng.choice(len(reader), round(settings.human_share * len(reader)), replace=False))
    reward_0, reward_1 = true_rewards(reader, asked).T
    ids = reader.ids()
    write_labels(pairs, "human", Labels([ids[row] for row in asked], answers(rng, reward_0, reward_1)))
    say(f"{len(asked)} of {len(reader)} pairs labelled by the simulated human")


def make_pairs(settings: QuickstartSettings, clock: Clock, prompts: Path) -> Path:
    """Stages 0 to 2: propose, ask, label, merge."""
    from dedpo_diffusion.pipelines import label, merge, propose

    pairs, judge = settings.out / "data", files("dedpo_diffusion.shapes") / "model" / "judge"
    if not (pairs / "pairs").exists():
        with clock.stage("propose"):
            call(propose.main, "propose", "--model", "shapes", "--prompts", prompts, "--out", pairs, "--seed", settings.seed, *SAMPLER)
    if not (pairs / "labels" / "human.parquet").exists():
        with clock.stage("human"):
            ask_the_human(pairs, settings)
    if not (pairs / "labels" / "pickscore.parquet").exists():
        with clock.stage("label"):
            call(label.main, "label", pairs, "--with", f"pickscore={judge}", "--device", "cpu")
    for arm in ARMS:
        if not (pairs / "targets" / f"{arm}.json").exists():
            with clock.stage("merge"):
                call(merge.main, "merge", pairs, "--method", arm)
    return pairs


def train_arms(settings: QuickstartSettings, clock: Clock, pairs: Path) -> dict[str, Path]:
    """Train and export one LoRA per way of merging; everything but the targets is the same."""
    from dedpo_diffusion.pipelines import export, train

    config, loras = files("dedpo_diffusion.configs") / "shapes_lora.yaml", {}
    for arm in ARMS:
        run, loras[arm] = settings.out / "runs" / arm, settings.out / f"{arm}.safetensors"
        if loras[arm].exists():
            continue
        with clock.stage("train"):
            call(
                train.main, "train", "--config", config, "--data.pairs", pairs, "--data.targets", arm, "--out", run,
                "--data.cache", settings.out / "cache", "--optim.steps", settings.steps, "--seed", settings.seed,
            )  # fmt: skip
        with clock.stage("export"):
            call(export.main, "export", run, "--out", loras[arm])
    return loras


def judge_arms(settings: QuickstartSettings, clock: Clock, prompts: Path, loras: dict[str, Path]) -> list[Path]:
    """Sample base and arms with the same prompts and seeds, and score every image."""
    from dedpo_diffusion.evaluation import score
    from dedpo_diffusion.pipelines import sample

    judge, folders = files("dedpo_diffusion.shapes") / "model" / "judge", []
    for arm in ("base", *ARMS):
        folder = settings.out / "samples" / arm
        adapter = ["--lora", loras[arm]] if arm in loras else []
        with clock.stage("sample"):
            call(
                sample.main, "sample", "--model", "shapes", *adapter, "--prompts", prompts, "--out", folder,
                "--seeds", settings.eval_seeds, "--seed", EVALUATION_SEED + settings.seed, *SAMPLER,
            )  # fmt: skip
        folders.append(folder)
    with clock.stage("score"):
        call(score.main, "score", *folders, "--with", "oracle_reward", f"pickscore={judge}", "--device", "cpu")
    return folders


def write_verdict(settings: QuickstartSettings, clock: Clock, pairs: Path, folders: list[Path]) -> dict[str, Any]:
    """Compare the arms; results.json gets the comparison, the label report's figures and the seconds of each stage."""
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.evaluation import compare

    report = settings.out / "report.html"
    runs = [settings.out / "runs" / arm for arm in ARMS]
    targets = [pairs / "targets" / f"{arm}.json" for arm in ARMS]
    with clock.stage("compare"):
        call(
            compare.main, "compare", *folders, "--out", report, "--primary", "oracle_reward", "--held_out", "oracle_reward",
            "--seed", settings.seed, "--runs", *runs, "--targets", *targets,
        )  # fmt: skip
    results_file = settings.out / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8"))
    merged = json.loads((pairs / "targets" / "tuned.json").read_text(encoding="utf-8"))
    results["labels"] = {name: merged[name] for name in ("n", "n_human", "agreement", "power", "effective_human_labels")}
    results["seconds"] = {**clock.seconds, "total": round(sum(clock.seconds.values()), 2)}
    write_json(results_file, results)
    return results


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """The whole journey on the embedded world, on a CPU, in minutes."""
    from dedpo_diffusion.weights.run_folder import open_run

    open_run(settings.out, settings, {})
    clock = Clock(settings.out / "seconds.json")
    training, evaluation = write_prompts(settings)
    pairs = make_pairs(settings, clock, training)
    loras = train_arms(settings, clock, pairs)
    folders = judge_arms(settings, clock, evaluation, loras)
    results = write_verdict(settings, clock, pairs, folders)
    out = settings.out
    say(f"\n{results['verdict']}\n")
    for file, what in (
        ("report.html", "the report: open it in a browser"), ("contact_sheet.png", "base against the three LoRAs"),
        ("results.json", "every figure of the report"), ("tuned.safetensors", "the debiased LoRA, for pipe.load_lora_weights"),
    ):  # fmt: skip
        say(f"  {out / file}  {what}")
    say(f"  {results['seconds']['total']:.0f} s in all")
    say_next("ingest", "auto", "my-pairs.csv", "--out", "PAIRS")
    return results


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(QuickstartSettings, run, argv, prog="dedpo quickstart")


if __name__ == "__main__":
    raise SystemExit(main())
