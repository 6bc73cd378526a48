"""How noisy is a step's gradient under uniform and under importance sampling of the pairs, side by side?

    python eval/benchmarks/gradient_noise.py --pairs PAIRS --targets tuned --cache CACHE --out gradient_noise.json

Both samplings estimate the same gradient. At the start of training (a fresh adapter, all margins 0), many steps'
gradients are drawn under each, with the same noise and timesteps, and the traces of their covariances are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import Progress, say, stage
from dedpo_diffusion.evaluation.benchmarks.record import write_record


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of the comparison.

    Args:
        pairs: the pair dataset.
        out: file for the result (JSON).
        cache: folder of encoded pairs.
        targets: names of the merged targets to look at.
        model: the base model.
        batch: pairs of a step.
        draws: steps drawn under each sampling.
        beta: of the loss; it scales both alike.
        seed: seed of every draw.
    """

    pairs: Path
    out: Path
    cache: Path
    targets: list[str]
    model: str = "shapes"
    batch: int = 32
    draws: int = 60
    beta: float = 500.0
    seed: int = 0


def gradients(settings: NoiseSettings, model: Any, loader: Any, shape: tuple[int, int, int], progress: Progress) -> np.ndarray:
    """(draws, parameters) gradients of independent steps."""
    import torch

    from dedpo_diffusion.dpo.gradient_noise import loss_gradient
    from dedpo_diffusion.dpo.noising import TimestepDraw, draw

    found, everywhere = [], TimestepDraw(0, len(model.process))
    for step in range(settings.draws):
        draws = draw(settings.seed, step, settings.batch, shape, timesteps=everywhere, caption_dropout=0.0)
        # epochs far apart, so that steps are independent draws of pairs
        batch, draws = loader.batch(loader.load(step * len(loader.rows), draws), model)
        parameters = list(model.trainable().values())
        grads = loss_gradient(model, batch, parameters, timesteps=draws.timesteps, noise=draws.noise, beta=settings.beta)
        found.append(torch.cat([g.flatten() for g in grads]).double().numpy())
        progress.advance()
    return np.stack(found)


def noise(found: np.ndarray) -> np.ndarray:
    """Squared distance of each gradient to the mean, (draws,), scaled so that its mean is the covariance's trace."""
    return np.square(found - found.mean(axis=0)).sum(axis=1) * len(found) / (len(found) - 1)


def ratio_interval(importance: np.ndarray, uniform: np.ndarray, seed: int) -> dict[str, Any]:
    """Ratio of the mean noises with its 95 % percentile bootstrap interval over draws."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(uniform), size=(4000, len(uniform)))
    ratios = importance[picks].mean(axis=1) / uniform[picks].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(importance.mean() / uniform.mean()), "ci": [float(low), float(high)]}


def run(settings: NoiseSettings) -> None:
    """Compare the noise of a step's gradient under both samplings."""
    import torch

    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.settings import DataSettings
    from dedpo_diffusion.training.data import PairLoader
    from dedpo_diffusion.training.sources import CachedSource, open_cache

    model, reader = Backbone(settings.model, device=torch.device("cpu")), PairReader(settings.pairs)
    cache = open_cache(reader, model, DataSettings(settings.pairs), root=settings.cache, fingerprint=reader.fingerprint(), size=model.size)
    source = CachedSource(cache, model.channels)
    torch.manual_seed(settings.seed)
    model.add_lora(rank=8, alpha=8)
    results: dict[str, Any] = {"torch": torch.__version__}
    with Progress("drawing gradients", 2 * settings.draws * len(settings.targets)) as progress:
        for name in settings.targets:
            noises = {}
            for sampling in ("uniform", "importance"):
                loader = PairLoader(reader, source, targets=name, seed=settings.seed, sampling=sampling, together=settings.batch)
                noises[sampling] = noise(gradients(settings, model, loader, model.latent_shape(model.size), progress))
            results[name] = ratio_interval(noises["importance"], noises["uniform"], settings.seed)
            low, high = results[name]["ci"]
            say(f"{name}: noise under importance / under uniform sampling {results[name]['ratio']:.3f} (95 %: {low:.3f} to {high:.3f})")
    write_record(settings, results)


if __name__ == "__main__":
    raise SystemExit(stage(NoiseSettings, run, None, prog="gradient_noise", flags={"targets": "targets"}))
