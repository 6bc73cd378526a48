"""What becomes of the correction when a policy labels the very pairs that it trained on, and when it does not.

    python eval/benchmarks/self_training.py --work WORK --out self_training.json

On Shapes, where the probability of every human answer is known. Per seed: pairs are proposed and some labelled as in the
quickstart; one policy trains on all human labels and labels every pair (in-sample); two policies train on one fold each
and label the pairs of the other (cross-fitted, `dedpo label --with self=RUN,RUN`); both label files are merged with the human
labels by `dedpo merge`. What is there already in WORK is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import say, stage, track
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval

JUDGES = {"in_sample": "self-in-sample", "cross_fitted": "self"}


@dataclass(frozen=True)
class SelfTrainingBenchmark:
    """Settings of the comparison.

    Args:
        work: folder for pairs and runs, one folder a seed.
        out: file for the result (JSON).
        seeds: seeds of pairs, answers and training.
        pairs: pairs proposed.
        human_share: share of them that the simulated human labels.
        steps: training steps of each of the three policies.
        device: torch device of the judge.
    """

    work: Path
    out: Path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    pairs: int = 400
    human_share: float = 0.5
    steps: int = 250
    device: str = "cpu"


def make_pairs(settings: SelfTrainingBenchmark, seed: int, folder: Path) -> Path:
    """Pairs, human labels, and the human-only targets: of all labels, and by fold."""
    from dedpo_diffusion.pipelines import merge, propose
    from dedpo_diffusion.pipelines.quickstart import SAMPLER, ask_the_human, call, write_prompts
    from dedpo_diffusion.settings import QuickstartSettings

    quickstart = QuickstartSettings(out=folder, seed=seed, pairs=settings.pairs, human_share=settings.human_share)
    pairs = folder / "data"
    if not (pairs / "pairs").exists():
        prompts, _ = write_prompts(quickstart)
        call(propose.main, "propose", "--model", "shapes", "--prompts", prompts, "--out", pairs, "--seed", seed, *SAMPLER)
    if not (pairs / "labels" / "human.parquet").exists():
        ask_the_human(pairs, quickstart)
    call(merge.main, "merge", pairs, "--method", "human_only", "--folds", 2, "--seed", seed)
    return pairs


def train_policies(settings: SelfTrainingBenchmark, seed: int, folder: Path, pairs: Path) -> list[Path]:
    """The run on all human labels, then those on all but one fold."""
    from dedpo_diffusion.pipelines import train
    from dedpo_diffusion.pipelines.quickstart import call

    config, runs = files("dedpo_diffusion.configs") / "shapes_lora.yaml", []
    for targets in ("human_only", "human_only-fold-0", "human_only-fold-1"):
        runs.append(folder / "runs" / targets)
        call(
            train.main, "train", "--config", config, "--data.pairs", pairs, "--data.targets", targets, "--out", runs[-1],
            "--data.cache", folder / "cache", "--optim.steps", settings.steps, "--seed", seed,
        )  # fmt: skip
    return runs


def label_in_sample(settings: SelfTrainingBenchmark, run: Path, pairs: Path, name: str) -> None:
    """Let one policy label all pairs, those that it trained on too, which `dedpo label` refuses."""
    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.judges.judge import Question, probability
    from dedpo_diffusion.judges.self_training import PolicyRewards, read_policy
    from dedpo_diffusion.labels.files import label_names, write_labels
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.decoding import decode_image
    from dedpo_diffusion.settings import SelfTrainingSettings

    if name in label_names(pairs):
        return
    reader = PairReader(pairs)
    policy = PolicyRewards([read_policy(run, reader, reader.fingerprint())], SelfTrainingSettings(), device=settings.device)
    scores = []
    for start in track(range(0, len(reader), 32), "labelling in-sample", -(-len(reader) // 32)):
        asked = [reader.pair(row) for row in range(start, min(start + 32, len(reader)))]
        questions = [Question(p.pair_id, p.prompt, *(decode_image(data, p.pair_id) for data in (p.image_0, p.image_1))) for p in asked]
        scores.append(policy.rewards(questions)[0])
    both = np.concatenate(scores)
    write_labels(
        pairs, name, Labels(reader.ids(), probability(both, 1.0), {"score_0": both[:, 0].tolist(), "score_1": both[:, 1].tolist()})
    )


def figures(pairs: Path, judge: str, z: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """What one judge's labels look like against people's: `z` the answers trained on, `p` the probability of a fresh answer."""
    from dedpo_diffusion.labels.files import align, read_labels
    from dedpo_diffusion.pairs.dataset import PairReader

    g = align(read_labels(pairs, judge), PairReader(pairs).ids(), folder=pairs, name=judge, complete=True)
    report = json.loads((pairs / "targets" / f"{judge}.json").read_text(encoding="utf-8"))
    labelled = ~np.isnan(z)
    fresh = np.where(g > 0.5, p, 1 - p)
    return {
        "correction": float(np.abs(z - g)[labelled].mean()),
        "agreement_with_the_answers_trained_on": report["agreement"]["value"],
        "agreement_with_fresh_answers_labelled": float(fresh[labelled].mean()),
        "agreement_with_fresh_answers_unlabelled": float(fresh[~labelled].mean()),
        "power": report["power"],
        "effective_human_labels": report["effective_human_labels"]["value"],
    }


def one_seed(settings: SelfTrainingBenchmark, seed: int) -> dict[str, Any]:
    """All stages of a seed, and its figures."""
    from dedpo_diffusion.evaluation.benchmarks.vote_order import true_preferences
    from dedpo_diffusion.labels.files import align, read_labels
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pipelines import label, merge
    from dedpo_diffusion.pipelines.quickstart import call

    folder = settings.work / f"seed-{seed}"
    pairs = make_pairs(settings, seed, folder)
    whole, *folds = train_policies(settings, seed, folder, pairs)
    label_in_sample(settings, whole, pairs, JUDGES["in_sample"])
    runs = ",".join(str(run) for run in folds)
    call(label.main, "label", pairs, "--with", f"self={runs}", "--device", settings.device, "--batch", 32, "--summary", "false")
    for judge in JUDGES.values():
        call(merge.main, "merge", pairs, "--method", "tuned", "--judge", judge, "--name", judge)
    z = align(read_labels(pairs, "human"), PairReader(pairs).ids(), folder=pairs, name="human")
    p = true_preferences(pairs)
    labelled = ~np.isnan(z)
    line: dict[str, Any] = {"seed": seed, "n": len(z), "n_human": int(labelled.sum())}
    line["agreement_of_a_second_person"] = float((p**2 + (1 - p) ** 2).mean())
    return line | {arm: figures(pairs, judge, z, p) for arm, judge in JUDGES.items()}


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval over seeds; one seed has none."""
    return seed_interval(values).as_dict() if len(values) > 1 else {"mean": values[0], "ci": None}


def run(settings: SelfTrainingBenchmark) -> None:
    """Compare in-sample with cross-fitted self-training."""
    from dedpo_diffusion.core.files import write_json

    lines = [one_seed(settings, seed) for seed in settings.seeds]
    names = list(lines[0]["in_sample"])
    summary: dict[str, Any] = {arm: {name: over_seeds([line[arm][name] for line in lines]) for name in names} for arm in JUDGES}
    for name in names:
        say(name + ": " + ", ".join(f"{arm} {_words(summary[arm][name])}" for arm in JUDGES))
    used = {"pairs": settings.pairs, "human_share": settings.human_share, "steps": settings.steps, "seeds": settings.seeds}
    write_json(settings.out, used | {"over_seeds": summary, "by_seed": lines})


def _words(entry: dict[str, Any]) -> str:
    interval = "" if entry["ci"] is None else f" ({entry['ci'][0]:.3f} to {entry['ci'][1]:.3f})"
    return f"{entry['mean']:.3f}{interval}"


if __name__ == "__main__":
    raise SystemExit(stage(SelfTrainingBenchmark, run, None, prog="self_training"))
