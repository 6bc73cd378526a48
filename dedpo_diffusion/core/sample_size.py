"""How much a weighted sample tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def effective_size(weights: np.ndarray) -> float:
    """Kish's effective sample size of weights (n,), (sum w)^2 / sum w^2: how many draws of equal weight tell a mean as well."""
    return float(weights.sum() ** 2 / (weights @ weights))
