"""Do two judges stacked, calibrated on human labels, predict people better than either judge alone? On Shapes.

    python eval/benchmarks/stacking.py --out stacking.json

Every seed has pairs of its own. The first judge is the embedded CLIP model, which sees colours and backgrounds and overlooks
clutter. The second is a planted program that likes bright images and sees either other things than the first (shape and
cleanliness) or the same (colour and background). The simulated human answers a part of the pairs, from which the
calibration learns as `dedpo calibrate` does; on the other pairs, what counts is the log loss on answers that nobody has
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage, track
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.evaluation.comparison.intervals import seed_interval

if TYPE_CHECKING:
    from PIL.Image import Image

Triple = tuple[list[str], list["Image"], list["Image"]]
JUDGES = ("pickscore", "planted")
SEES = {"other things": ("shape", "clean"), "the same things": ("colour", "background")}  # of the oracle's terms
ATTRIBUTES = ("size", "colour", "shape", "background")


@dataclass(frozen=True)
class StackingSettings:
    """Settings of the comparison.

    Args:
        out: file for the result (JSON).
        pairs: pairs of a seed.
        share: share of the pairs that have a human label to learn from; the log loss is that of the others.
        seeds: how many.
        mistakes: chance of each attribute of a rendered image to be another than its prompt's.
        brightness: weight of the mean pixel, in [0, 1], in the planted judge's score, beside the two terms that it sees.
        folds: of the calibration.
    """

    out: Path
    pairs: int = 240
    share: float = 0.4
    seeds: int = 12
    mistakes: float = 0.15
    brightness: float = 1.0
    folds: int = 5


def rendered_pairs(settings: StackingSettings, seed: int) -> Triple:
    """Scenes with wrong attributes and clutter."""
    from dedpo_diffusion.shapes.world import VOCABULARY, Attributes, render, sample_scene

    rng = np.random.default_rng((seed, 0))

    def draw(asked: Attributes) -> Image:
        other = VOCABULARY[rng.integers(len(VOCABULARY))]
        words = [getattr(other if rng.random() < settings.mistakes else asked, name) for name in ATTRIBUTES]
        return render(sample_scene(rng, Attributes(*words), clutter=0.5))

    asked = [VOCABULARY[i] for i in rng.integers(len(VOCABULARY), size=settings.pairs)]
    return [attributes.prompt for attributes in asked], [draw(a) for a in asked], [draw(a) for a in asked]


def planted_score(prompts: Sequence[str], images: Sequence[Image], sees: Sequence[str], brightness: float) -> np.ndarray:
    """(N,) scores of a judge that sees two terms of the oracle's, and likes bright images."""
    from dedpo_diffusion.shapes.oracle import read, terms

    found = []
    for prompt, image in zip(prompts, images, strict=True):
        seen = terms(prompt, read(image))
        found.append(sum(seen[term] for term in sees) + brightness * float(np.asarray(image.convert("L")).mean()) / 255)
    return np.array(found)


def held_out(settings: StackingSettings, seed: int, prompts: list[str], d: np.ndarray, human: np.ndarray, z: np.ndarray) -> dict[str, Any]:
    """Of judges with differences (N, 2): log loss, agreement and weights on the pairs where `human` is NaN, with answers z."""
    from dedpo_diffusion.labels.calibration import calibrate, log_losses

    fresh = np.isnan(human)
    arms: dict[str, Any] = {"stack": ("stack", d)} | {name: ("temperature", d[:, [j]]) for j, name in enumerate(JUDGES)}
    made = {arm: calibrate(x, human, method=how, folds=settings.folds, groups=prompts, seed=seed) for arm, (how, x) in arms.items()}
    return {
        "log_loss": {arm: float(log_losses(done.probability[fresh], z[fresh]).mean()) for arm, done in made.items()},
        "agreement": {name: float(np.mean((d[fresh, j] > 0) == (z[fresh] > 0.5))) for j, name in enumerate(JUDGES)},
        "weights": dict(zip(JUDGES, made["stack"].report["map"]["weights"], strict=True)),
        "correlation": float(np.corrcoef(d.T)[0, 1]),
    }


def one_seed(settings: StackingSettings, scorer: Any, seed: int) -> dict[str, Any]:
    """Both second judges beside the first: held-out figures of each alone, with its temperature, and of the stack."""
    from dedpo_diffusion.shapes.oracle import answers, reward

    prompts, *sides = rendered_pairs(settings, seed)

    def difference(score: Any, *options: Any) -> np.ndarray:
        return score(prompts, sides[0], *options) - score(prompts, sides[1], *options)

    rng = np.random.default_rng((seed, 1))
    z = answers(rng, reward(prompts, sides[0]), reward(prompts, sides[1]))
    human = np.full(len(z), np.nan)
    asked = rng.permutation(len(z))[: round(settings.share * len(z))]
    human[asked] = z[asked]
    first = difference(scorer.score)
    found: dict[str, Any] = {"seed": seed, "labelled": len(asked), "held_out": len(z) - len(asked)}
    for kind, sees in SEES.items():
        d = np.stack([first, difference(planted_score, sees, settings.brightness)], axis=1)
        found[kind] = held_out(settings, seed, prompts, d, human, z)
    return found


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one value a seed, with Student's 95 % interval."""
    found = seed_interval(values)
    return {"value": found.mean, "ci": [found.low, found.high], "n": len(values)}


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Log loss of the stack less that of a judge, paired by seed: of each judge, and of each seed's better one in hindsight."""
    losses = {arm: [part["log_loss"][arm] for part in parts] for arm in ("stack", *JUDGES)}
    mean = {arm: float(np.mean(values)) for arm, values in losses.items()}
    return {
        "mean_log_loss": mean,
        "better_judge": min(JUDGES, key=mean.__getitem__),
        "stack_less_judge": {name: over_seeds(np.subtract(losses["stack"], losses[name])) for name in JUDGES},
        "stack_less_better_of_each_seed": over_seeds(np.subtract(losses["stack"], np.minimum(*(losses[name] for name in JUDGES)))),
    }


def run(settings: StackingSettings) -> None:
    """Compare a calibrated stack of two judges with each of them alone."""
    from importlib.resources import files

    from dedpo_diffusion.judges.scorers import load_scorer

    if settings.seeds < 2:
        raise UserError(f"seeds is {settings.seeds}; an interval needs at least 2")
    scorer = load_scorer(f"pickscore={files('dedpo_diffusion.shapes') / 'model' / 'judge'}", device="cpu", batch=64)
    seeds = [one_seed(settings, scorer, seed) for seed in track(range(settings.seeds), "seeds", settings.seeds)]
    result = {kind: summary([entry[kind] for entry in seeds]) for kind in SEES}
    for kind, part in result.items():
        for name, entry in part["stack_less_judge"].items():
            low, high = entry["ci"]
            say(f"a second judge that sees {kind}: stack less {name} {entry['value']:+.4f} ({low:+.4f} to {high:+.4f}), {entry['n']} seeds")
    write_record(settings, {"second_judge_sees": result, "seeds": seeds})


if __name__ == "__main__":
    raise SystemExit(stage(StackingSettings, run, None, prog="stacking"))
