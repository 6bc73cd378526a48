"""What held-out pairs and held-out prompts say of a policy: the numbers of one validation, and which validation was best.

Timesteps and noises of a held-out pair are the same in every validation, so that two validations are compared pair by pair. The
reference is the policy as it was before its first step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.debias import cluster_sums, share_interval
from dedpo_diffusion.dpo.losses import implicit_rewards, margin
from dedpo_diffusion.dpo.noising import Draws, TimestepDraw, step_generator
from dedpo_diffusion.dpo.objectives import find_objective, objective_loss
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.training.metrics import BUCKETS

STREAM = 1003  # of `step_generator`: no draw of training uses it
LEVEL = 0.95  # of intervals


def held_out_draws(seed: int, pair: int, draws: int, shape: tuple[int, int, int], timesteps: TimestepDraw) -> Draws:
    """The K draws of a held-out pair, a function of (seed, pair) alone; one timestep in each K-th of the distribution of timesteps.

    Args:
        seed: of the validation.
        pair: its number among the held-out pairs.
        draws: K.
        shape: (C, h, w) of a latent.
        timesteps: how training draws them.
    """
    generator = step_generator(seed, pair, STREAM)
    share = (torch.arange(draws) + torch.rand(draws, generator=generator, dtype=torch.float64)) / draws
    return Draws(
        timesteps=timesteps.quantile(share),
        noise=torch.randn(draws, *shape, generator=generator),
        posterior=torch.randn(draws, 2, *shape, generator=generator),
        drop_caption=torch.zeros(draws, dtype=torch.bool),
    )


def held_out_kind(kind: str) -> str:
    """The objective that held-out pairs are measured by: the run's own, where the loss of a pair needs no other pairs; else "sigmoid",
    with its defaults."""
    return "sigmoid" if "batch" in find_objective(kind).needs else kind


def shared_images(trained: PairReader, rows: Iterable[int], held_out: PairReader, held_rows: Sequence[int]) -> list[int]:
    """Which of the held-out rows have an image file, byte for byte, that one of the trained rows also has. Reads the images of both."""
    images: dict[bytes, set[int]] = {}
    for row in held_rows:
        pair = held_out.pair(row)
        for image in (pair.image_0, pair.image_1):
            images.setdefault(_digest(image), set()).add(row)
    wanted, found = set(rows), set[int]()
    for row, pair in enumerate(trained.iter_pairs()):
        if row in wanted:
            found |= images.get(_digest(pair.image_0), set()) | images.get(_digest(pair.image_1), set())
    return sorted(found)


def _digest(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def pair_losses(
    errors: Tensor, start: Tensor, label: Tensor, weight: Tensor, *, kind: str, beta: float, options: Mapping[str, float],
    margin_cap: float | None,
) -> Tensor:  # fmt: skip
    """The loss of each held-out pair, its mean over the draws: (P,) float64.

    Args:
        errors: of the policy (P, K, 2).
        start: of the policy before training, its reference (P, K, 2).
        label: of people (P,), P(image 0 preferred).
        weight: of the draws' timesteps (P, K), outside the loss.
        kind, beta, options, margin_cap: of the run's objective; see `held_out_kind`.
    """
    used = held_out_kind(kind)
    pairs, draws = weight.shape
    target = label.double()[:, None].expand(pairs, draws).flatten()
    e, r = errors.double().flatten(0, 1), start.double().flatten(0, 1)
    given = options if used == kind else {}
    loss = objective_loss(e, r, target, weight.double().flatten(), kind=used, beta=beta, options=given, margin_cap=margin_cap)
    return loss.view(pairs, draws).mean(dim=1)


def summarise_held_out(
    errors: Tensor, start: Tensor, label: Tensor, timesteps: Tensor, weight: Tensor, *, schedule: int, objective: Mapping[str, Any],
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of one validation.

    Args:
        errors, start, label, weight: see `pair_losses`.
        timesteps: (P, K).
        schedule: number of timesteps of the training schedule.
        objective: kind, beta, options and margin_cap.
        clusters: (P,) of pairs that hang together, as those of one prompt; None where none do. Intervals count them.

    Returns:
        objective, pairs, draws, loss with Student's interval loss_ci, start_loss (before training), accuracy (share of pairs
        whose margin, its mean over the draws, has the label's sign; labels of 0.5 are left out) with Wilson's interval
        accuracy_ci, margin (towards the preferred image), `buckets` as in `metrics.summarise` with first, last, count and margin, and
        `pair_loss` (P,).
        Whatever is not finite, or cannot be said of so few pairs, is None.
    """
    losses = pair_losses(errors, start, label, weight, **objective)
    before = pair_losses(start, start, label, weight, **objective)
    pairs, draws = weight.shape
    rewards = implicit_rewards(errors.double().flatten(0, 1), start.double().flatten(0, 1), beta=objective["beta"])
    towards = margin(rewards).view(pairs, draws) * torch.where(label > 0.5, 1.0, -1.0)[:, None]
    decided = label != 0.5
    hits = 0.5 * (1 + towards.mean(dim=1)[decided].sign())
    known = len(hits) > 0 and bool(towards[decided].isfinite().all())
    bucket, buckets = (timesteps * BUCKETS // schedule)[decided], []
    for number in range(BUCKETS):
        inside = towards[decided][bucket == number]
        if len(inside):
            span = {"first": number * schedule // BUCKETS, "last": (number + 1) * schedule // BUCKETS - 1, "count": len(inside)}
            buckets.append({**span, "margin": finite(inside.mean())})
    return {
        "objective": held_out_kind(objective["kind"]),
        "pairs": pairs,
        "draws": draws,
        "loss": finite(losses.mean()),
        "loss_ci": mean_interval(losses.numpy(), clusters),
        "start_loss": finite(before.mean()),
        "accuracy": finite(hits.mean()) if known else None,
        "accuracy_ci": share_interval(hits.numpy(), None if clusters is None else clusters[decided.numpy()]) if known else None,
        "margin": finite(towards[decided].mean()) if known else None,
        "buckets": buckets,
        "pair_loss": [finite(value) for value in losses],
    }


def summarise_scores(scores: np.ndarray, start: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """Mean score of the images, of those before training, and the mean gain with Student's interval over prompts.

    Args:
        scores, start: (N,) of the images now and before training, from the same prompts and noise.
        prompts: N prompts; images of one prompt count as one.
    """
    gain = np.asarray(scores) - np.asarray(start)
    _, of = np.unique(np.asarray(prompts), return_inverse=True)
    by_prompt = np.bincount(of, gain) / np.bincount(of)
    return {
        "mean": float(np.mean(scores)),
        "start": float(np.mean(start)),
        "gain": float(by_prompt.mean()),
        "gain_ci": mean_interval(by_prompt),
    }


def mean_interval(values: np.ndarray, clusters: np.ndarray | None = None) -> list[float] | None:
    """Student's interval of the mean of values (N,), of which those of a cluster (N,) depend on each other.

    None for fewer than two clusters, or where a value is not finite.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all() or (count := len(x if clusters is None else np.unique(clusters))) < 2:
        return None
    off = cluster_sums(x - x.mean(), clusters)
    error = math.sqrt(count / (count - 1) * float(off @ off)) / len(x)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return [float(x.mean()) - half, float(x.mean()) + half]


def finite(value: Tensor) -> float | None:
    """A number, or None for NaN and infinity, which JSON has not."""
    return float(value) if bool(value.isfinite()) else None
