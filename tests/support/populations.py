"""Pairs of two populations of Shapes images: people labelled brighter ones than those that are trained on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageEnhance
from scipy.special import expit

from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.labels.files import write_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from support.scenes import scenes


def write_population(
    folder: Path, light: Sequence[float], seed: int, *, labelled: bool, judge: bool = True, source: dict[str, Any] | None = None,
    start: int = 0,
) -> Path:  # fmt: skip
    """One pair for each factor of brightness, and a judge "clip" that knows what people like, but for dark images, where it is wrong.

    Args:
        folder: of the dataset.
        light: factors in (0, 1] by which the images are darkened.
        seed: of scenes and answers.
        labelled: whether people labelled all pairs.
        judge: whether the judge did.
        source: of every pair.
        start: number of the first pair's id.
    """
    prompts, images = scenes(len(light), seed)
    rng = np.random.default_rng((seed, 1))
    with PairWriter(folder) as writer:
        for k, (prompt, both, factor) in enumerate(zip(prompts, images, light, strict=True)):
            one, other = (_png(ImageEnhance.Brightness(image).enhance(float(factor))) for image in both)
            writer.add(Pair(f"p{start + k}", prompt, one, other, source or {}))
    ids, d = [f"p{start + k}" for k in range(len(light))], rng.normal(size=len(light))
    likely = expit(3 * d * np.where(np.asarray(light) > 0.55, 1, -1))
    if labelled:
        write_labels(folder, "human", Labels(ids, (rng.random(len(light)) < likely).astype(float)))
    if judge:
        extra = {"score_0": (d / 2).tolist(), "score_1": (-d / 2).tolist(), "judge_version": ["clip-1"] * len(ids)}
        write_labels(folder, "clip", Labels(ids, expit(2 * d), extra))
    return folder


def lights(count: int, a: float, b: float, seed: int) -> np.ndarray:
    """Factors of brightness from 0.2 to 1, beta(a, b) distributed between these."""
    return 0.2 + 0.8 * np.random.default_rng(seed).beta(a, b, count)


def _png(image: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()
