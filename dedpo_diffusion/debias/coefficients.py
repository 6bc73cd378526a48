"""Labels, inverse propensities and powers to the weight and the target of every pair."""

from __future__ import annotations

from typing import Any

import numpy as np

METHODS = ("human_only", "naive", "dedpo", "tuned", "adapted")
WITHOUT_POWER = ("naive", "adapted")  # their targets and weights know none
RULES = ("plug_in", "half", "minus_se", "cross_fitted")


def inverse_propensity(z: np.ndarray, propensity: Any = None, cells: np.ndarray | None = None) -> np.ndarray:
    """h = R / p, (N,), with R = 1 where z is a number; an array of p is normalised so that h has mean 1 (Hajek).

    Args:
        z: (N,) human labels, NaN where there is none.
        propensity: probability in (0, 1] of being labelled, a number or (N,); None is the labelled share.
        cells: (N,) integers from 0 or None; a labelled share is taken in each cell by itself.

    Raises:
        ValueError: a propensity of another shape or outside (0, 1].
    """
    labelled = ~np.isnan(z)
    p = labelled.mean() if propensity is None else np.asarray(propensity, dtype=np.float64)
    if not labelled.any():
        return np.zeros(len(z))
    if p.shape not in ((), z.shape):
        raise ValueError(f"propensity has shape {p.shape}, but there are {len(z)} pairs: give one number, or one per pair")
    bad = np.flatnonzero(~((p > 0) & (p <= 1)))
    if bad.size:
        name = f"propensity[{bad[0]}]" if p.ndim else "propensity"
        raise ValueError(f"{name} is {p.flat[bad[0]]}: the probability of being labelled must lie in (0, 1]; clip small estimates yourself")
    if cells is not None and propensity is None:
        return labelled * (np.bincount(cells) / np.bincount(cells, weights=labelled))[cells]
    h = labelled / p
    return h / h.mean() if p.ndim else h


def pair_weights(h: np.ndarray, power: float | np.ndarray) -> np.ndarray:
    """weight = h + lam (1 - h), (N,), for one power or (N,)."""
    return (1 - power) * h + power


def pair_targets(z: np.ndarray, g: np.ndarray, h: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """target = (h z + lam (1 - h) g) / weight, (N,): g where unlabelled, z + (A - 1)(z - g) with A = h / weight where labelled.

    0.5 where the weight is 0, whatever judge lies there. The second form is exact for A = 1 and for z = g, so that rounding
    puts no target outside [0, 1].
    """
    unlabelled = np.where(np.isnan(g) | (weight == 0), 0.5, g)  # a judge is missing only where the power has no use for it
    known_g = np.where(np.isnan(g), z, g)
    stretch = np.divide(h, weight, out=np.zeros_like(h), where=weight > 0)
    return np.where(np.isnan(z), unlabelled, z + (stretch - 1) * (z - known_g))


def mix_judges(g: np.ndarray, table: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """One label per pair from K judges: sum_k lam_k g_k / sum_k lam_k, their plain mean where every power is 0.

    Args:
        g: (N, K) judge labels; the mix is NaN where one of them is.
        table: (C, K) powers of a cell.
        cell: (N,) integers in [0, C).

    Returns:
        (N,). With one judge, his labels to the bit.
    """
    total = table.sum(axis=1, keepdims=True)
    even = np.full_like(table, 1 / table.shape[1])
    share = np.divide(table, total, out=even, where=total > 0)
    mixed = share[cell, 0] * g[:, 0]
    for k in range(1, g.shape[1]):
        mixed += share[cell, k] * g[:, k]
    return np.clip(mixed, 0.0, 1.0)  # shares may sum to 1 + 1e-16
