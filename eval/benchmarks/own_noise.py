"""How noisy is a visit's gradient with each image's own noise, against noise that a pair shares and noise drawn for each image?

    python eval/benchmarks/own_noise.py --pairs quickstart/data --work own_noise --out own_noise.json

On Shapes, at the start of training (a fresh adapter, all margins 0), with the answers that the true preference would give. Gradients of
several draws of each of some pairs give, for each kind of noise, T (the squared gradient of a draw), P (that of a pair, draws averaged
out), and their ratio kappa. Other noise is another objective, so that a smaller ratio does not yet say that its gradient leads to a better
model. Both images of a pair are sampled by `dedpo propose`, so that `own` is the noise they were sampled from, and `inverted` that found
by inverting DDIM.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress, UserError, say, stage
from dedpo_diffusion.evaluation.benchmarks.record import write_record
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, OptimSettings, TrainSettings

KINDS = ("shared", "independent", "own", "inverted")
RESAMPLES = 2000


@dataclass(frozen=True)
class OwnNoiseSettings:
    """Settings of the comparison.

    Args:
        pairs: pairs that the Shapes model proposed, as those of `dedpo quickstart`.
        work: folder of the first of them and their cache; what is there already is kept.
        out: file for the result (JSON).
        count: how many of them are measured.
        draws: stored timesteps and noises of each pair.
        levels: steps of the inversion.
        beta: of the loss; it scales all alike.
        seed: seed of every draw.
    """

    pairs: Path
    work: Path
    out: Path
    count: int = 48
    draws: int = 4
    levels: int = 12
    beta: float = 500.0
    seed: int = 0


def take_pairs(settings: OwnNoiseSettings) -> Path:
    """The first pairs of a dataset, with the answers of the true preference as targets "truth"."""
    from dedpo_diffusion.core.records import Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
    from dedpo_diffusion.pairs.decoding import decode_image
    from dedpo_diffusion.shapes import oracle

    folder = settings.work / f"pairs-{settings.count}"
    if not (folder / "targets" / "truth.parquet").is_file():
        pairs = list(itertools.islice(PairReader(settings.pairs).iter_pairs(), settings.count))
        with PairWriter(folder) as writer:
            for pair in pairs:
                writer.add(pair)
        images = [[decode_image(image, pair.pair_id) for image in (pair.image_0, pair.image_1)] for pair in pairs]
        reward = np.array([oracle.reward([pair.prompt] * 2, both) for pair, both in zip(pairs, images, strict=True)])
        answers = (reward[:, 0] > reward[:, 1]).astype(float)
        write_targets(folder, "truth", Targets([pair.pair_id for pair in pairs], answers, np.ones(len(pairs))), {})
    return folder


def gradients(settings: OwnNoiseSettings, folder: Path, kind: str) -> np.ndarray:
    """Gradients (pairs, draws, parameters) of every pair at each of its stored draws."""
    import torch

    from dedpo_diffusion.dpo.gradient_noise import loss_gradient
    from dedpo_diffusion.training.setup import check_options, prepare
    from dedpo_diffusion.training.sharding import build_accelerator

    data = DataSettings(
        folder, "truth", cache=settings.work / "cache", reference_draws=settings.draws, noise=kind,  # type: ignore[arg-type]
        inversion_steps=settings.levels, sampling="uniform",
    )  # fmt: skip
    run = TrainSettings(
        "shapes", settings.work / "run", data, objective=ObjectiveSettings(beta=settings.beta), optim=OptimSettings(batch=8),
        seed=settings.seed, device="cpu",
    )  # fmt: skip
    check_options(run)
    model, loader, _, _ = prepare(run, build_accelerator(run))
    # the other factors' gradients are 0 while these are
    parameters, found = [value for name, value in model.trainable().items() if "lora_B" in name], []
    assert loader.grid is not None
    with Progress(kind, len(loader.rows)) as progress:
        for place, row in enumerate(loader.rows.tolist()):
            of_pair = []
            for number in range(settings.draws):
                draws, known = loader.grid.at([row], [number])
                batch, draws = loader.batch(loader.at([place], [number], draws, known), model)
                options = {"timesteps": draws.timesteps, "noise": draws.noise, **run.objective.step_options()}
                grads = loss_gradient(model, batch, parameters, **options)
                of_pair.append(torch.cat([g.flatten() for g in grads]))
            found.append(torch.stack(of_pair).numpy())
            progress.advance()
    return np.stack(found)


def moments(found: np.ndarray) -> np.ndarray:
    """Of each pair: the mean inner product of two of its draws, and the mean square of one, (pairs, 2)."""
    count = found.shape[1]
    squares = np.square(found).sum(axis=-1).sum(axis=1)
    together = np.square(found.sum(axis=1)).sum(axis=-1)
    return np.stack([(together - squares) / (count * (count - 1)), squares / count], axis=1)


def measure(found: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """T, P, and kappa with a 95 % bootstrap interval over pairs."""
    each, pairs = moments(found), len(found)
    picks = rng.integers(pairs, size=(RESAMPLES, pairs))
    ratios = each[picks, 1].mean(axis=1) / each[picks, 0].mean(axis=1)
    return {
        "visit": float(each[:, 1].mean()), "pair": float(each[:, 0].mean()), "kappa": float(each[:, 1].mean() / each[:, 0].mean()),
        "kappa_ci": [float(end) for end in np.quantile(ratios, [0.025, 0.975])],
    }  # fmt: skip


def run(settings: OwnNoiseSettings) -> None:
    """Compare the noise of visits by what noise their images have."""
    if settings.draws < 2 or settings.count < 4:
        raise UserError(f"draws is {settings.draws} and count {settings.count}; give at least 2 and 4")
    folder = take_pairs(settings)
    found = {kind: gradients(settings, folder, kind) for kind in KINDS}
    rng, results = np.random.default_rng(settings.seed), {}  # type: ignore[var-annotated]
    for kind, values in found.items():
        results[kind] = told = measure(values, rng)
        low, high = told["kappa_ci"]
        say(f"{kind}: T {told['visit']:.3g}, P {told['pair']:.3g}, kappa {told['kappa']:.2f} (95 %: {low:.2f} to {high:.2f})")
    write_record(settings, results)


if __name__ == "__main__":
    raise SystemExit(stage(OwnNoiseSettings, run, None, prog="own_noise"))
