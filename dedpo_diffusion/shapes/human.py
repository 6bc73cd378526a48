"""The simulated human of Shapes: noisy Bradley-Terry answers on the oracle's reward."""

from __future__ import annotations

import numpy as np

TEMPERATURE = 0.05  # reward difference at which the human is 73 % sure


def preference(reward_0: np.ndarray, reward_1: np.ndarray, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """P(image 0 preferred) (N,) of rewards (N,): sigmoid of their difference over the temperature."""
    return 1 / (1 + np.exp(-(np.asarray(reward_0) - np.asarray(reward_1)) / temperature))


def answers(rng: np.random.Generator, reward_0: np.ndarray, reward_1: np.ndarray, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """One hard answer per pair: `label_0` (N,) of 1.0 or 0.0, drawn from `preference`."""
    likely = preference(reward_0, reward_1, temperature=temperature)
    return (rng.random(likely.shape) < likely).astype(np.float64)
