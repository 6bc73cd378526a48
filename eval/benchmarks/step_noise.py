"""How noisy is a step's gradient for the same forward passes: plain, with strata of timesteps, measured timesteps, groups, side by side?

    python eval/benchmarks/step_noise.py --work step_noise --out step_noise.json

On Shapes: rankings of K images a prompt, labelled by simulated people, at the start of training (a fresh adapter, all margins 0). Every arm
estimates the same gradient, from as many images through the model in each step. Traces of the covariances of many steps' gradients are
compared; the arms' mean gradients are too, for they must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.gradient_noise import noise
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, TrainSettings

PLAIN: dict[str, Any] = {"timestep_strata": False}
ARMS: dict[str, tuple[dict[str, Any], bool]] = {  # options of the objective, and whether images of a prompt go together
    "plain": (PLAIN, False),
    "strata": ({}, False),
    "measured": ({**PLAIN, "timestep_sampling": "measured"}, False),
    "groups": (PLAIN, True),
    "strata and measured": ({"timestep_sampling": "measured"}, False),
    "all three": ({"timestep_sampling": "measured"}, True),
}
SAMPLER = ("--steps", 12, "--guidance", 1.5)  # the quickstart's
RESAMPLES = 4000


@dataclass(frozen=True)
class StepNoiseSettings:
    """Settings of the comparison.

    Args:
        work: folder of the pairs and their cache; what is there already is kept.
        out: file for the result (JSON).
        prompts: prompts of the pairs.
        images: images of each prompt, K; all their pairs are labelled.
        batch: pairs of a step; with groups as many images are in 2 batch / K of them.
        draws: steps drawn for each arm.
        pairs_measured: pairs that measured timesteps are measured on.
        beta: of the loss; it scales all alike.
        seed: seed of every draw.
    """

    work: Path
    out: Path
    prompts: int = 120
    images: int = 4
    batch: int = 32
    draws: int = 200
    pairs_measured: int = 32
    beta: float = 500.0
    seed: int = 0


def make_rankings(settings: StepNoiseSettings) -> Path:
    """All pairs of K images of each prompt, with answers of simulated people as targets "people"."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.core.records import Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.decoding import decode_image
    from dedpo_diffusion.pipelines import propose
    from dedpo_diffusion.pipelines.align import call
    from dedpo_diffusion.shapes import oracle
    from dedpo_diffusion.shapes.world import VOCABULARY

    folder, listed = settings.work / f"pairs-{settings.prompts}-{settings.images}", settings.work / "prompts.txt"
    settings.work.mkdir(parents=True, exist_ok=True)
    if not (folder / "targets" / "people.parquet").is_file():
        drawn = np.random.default_rng(0).choice(len(VOCABULARY), size=settings.prompts, replace=False)
        write_text(listed, "\n".join(VOCABULARY[i].prompt for i in drawn) + "\n")
        ways = ["--images_per_prompt", settings.images, "--pairing", "all", "--batch", 48, "--device", "cpu", *SAMPLER]
        call(propose.main, "propose", "--model", "shapes", "--prompts", listed, "--out", folder, *ways)
        pairs = list(PairReader(folder).iter_pairs())
        reward = np.array(
            [oracle.reward([p.prompt] * 2, [decode_image(image, p.pair_id) for image in (p.image_0, p.image_1)]) for p in pairs]
        )
        answers = np.random.default_rng(1).random(len(pairs)) < oracle.preference(reward[:, 0], reward[:, 1])
        write_targets(folder, "people", Targets([p.pair_id for p in pairs], answers.astype(float), np.ones(len(pairs))), {})
    return folder


def arm_settings(settings: StepNoiseSettings, folder: Path, name: str) -> TrainSettings:
    """The training run whose first step an arm draws."""
    options, grouped = ARMS[name]
    together = settings.images if grouped else None
    visits = 2 * settings.batch // settings.images if grouped else settings.batch
    data = DataSettings(folder, "people", cache=settings.work / "cache", groups=together)
    given = TrainSettings(
        "shapes", settings.work / "run", data,
        objective=ObjectiveSettings(beta=settings.beta, timestep_pairs=settings.pairs_measured, **options), seed=settings.seed,
        device="cpu",
    )  # fmt: skip
    return replace(given, optim=replace(given.optim, batch=visits))


def gradients(settings: StepNoiseSettings, folder: Path, name: str, progress: Progress) -> np.ndarray:
    """(draws, parameters) gradients of independent steps of an arm."""
    import torch

    from dedpo_diffusion.dpo.gradient_noise import loss_gradient
    from dedpo_diffusion.dpo.noising import draw
    from dedpo_diffusion.training.measured_timesteps import timestep_moments
    from dedpo_diffusion.training.setup import check_options, prepare, timestep_draw
    from dedpo_diffusion.training.sharding import build_accelerator
    from dedpo_diffusion.training.visit_gradients import weigh

    run = arm_settings(settings, folder, name)
    check_options(run)
    accelerator = build_accelerator(run)
    model, loader, _, _ = prepare(run, accelerator)
    timesteps = timestep_draw(run.objective, len(model.process))
    moments, _ = timestep_moments(run, model, loader, timesteps, accelerator, None) or (None, None)
    parameters, found = list(model.trainable().values()), []
    for step in range(settings.draws):
        images = {"timesteps": timesteps, "caption_dropout": 0.0, "images": loader.images(0)}
        drawn = draw(settings.seed, step, run.optim.batch, loader.shape(0), **images)
        # epochs apart, so that steps are independent draws of pairs
        batch, draws = loader.batch(loader.load(step * len(loader.visits.probability), drawn), model)
        draws, factor = weigh(draws, timesteps, model, moments)
        options = {"timesteps": draws.timesteps, "noise": draws.noise, "timestep_weight": factor, **run.objective.step_options()}
        found.append(torch.cat([g.flatten() for g in loss_gradient(model, batch, parameters, **options)]).double().numpy())
        progress.advance()
    return np.stack(found)


def compare(arms: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Of each arm: its noise over the plain one's with a 95 % bootstrap interval over steps (each arm's resampled by themselves), and
    how far its mean gradient is from the plain one, squared, over what noise alone gives (about 1 where the two agree)."""
    spread, rng = {name: noise(found) for name, found in arms.items()}, np.random.default_rng(seed)
    means = {name: spread[name][rng.integers(len(found), size=(RESAMPLES, len(found)))].mean(axis=1) for name, found in arms.items()}
    plain, result = arms["plain"], {}
    for name, found in arms.items():
        low, high = np.quantile(means[name] / means["plain"], [0.025, 0.975])
        gap = np.square(found.mean(axis=0) - plain.mean(axis=0)).sum()
        expected = (spread[name].mean() + spread["plain"].mean()) / len(found)
        result[name] = {"noise": float(spread[name].mean())} | (
            {
                "ratio": float(spread[name].mean() / spread["plain"].mean()),
                "ci": [float(low), float(high)],
                "mean_gap": float(gap / expected),
            }
            if name != "plain"
            else {}
        )
    return result


def run(settings: StepNoiseSettings) -> None:
    """Compare the noise of a step's gradient under ways to draw its timesteps and its pairs."""
    if 2 * settings.batch % settings.images or settings.draws < 2:
        raise UserError(f"2 x batch must be a multiple of images ({settings.images}), and draws at least 2")
    folder, found = make_rankings(settings), {}
    for name in ARMS:
        with Progress(name, settings.draws) as progress:
            found[name] = gradients(settings, folder, name, progress)
    results = compare(found, settings.seed)
    for name, told in results.items():
        if name != "plain":
            low, high = told["ci"]
            say(f"{name}: noise {told['ratio']:.3f} of plain (95 %: {low:.3f} to {high:.3f}); means {told['mean_gap']:.2f} of chance apart")
    write_record(settings, results)


if __name__ == "__main__":
    raise SystemExit(stage(StepNoiseSettings, run, None, prog="step_noise"))
