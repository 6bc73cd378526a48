"""The powers that make the gradient's variance at margin 0 least, with their standard errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from dedpo_diffusion.debias.clusters import cluster_sums

MAX_JUDGES = 8  # every subset of the judges is tried
ALIKE = 1e-10  # judges that differ by less, relatively, are one


@dataclass(frozen=True)
class Fit:
    """Powers of K judges, fitted to the labelled pairs.

    `free` (K,) minimises the variance without constraint; `raw` (K,) under raw >= 0 and sum(raw) <= 1. `se` (K,) is the delta
    method's standard error of a power, in the fit of the judges in use and this one; `total_se` that of the sum over the
    judges in use. NaN where they do not exist. `cross` (K,) and `square` (K, K) are the sums c and V of the quadratic
    lam' V lam - 2 c' lam.
    """

    free: np.ndarray
    raw: np.ndarray
    se: np.ndarray
    total_se: float
    cross: np.ndarray
    square: np.ndarray


def judge_moments(z: np.ndarray, g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Per labelled pair, what decides the gradient's variance at margin 0, where the loss's gradient is rho = 0.5 - label.

    The pair's gradient is h (rho_z - lam rho_g) + lam rho_g with h = R / p; its mean square over R is
    rho_z^2 / p - (1/p - 1)(2 lam rho_z rho_g - lam^2 rho_g^2).

    Returns:
        (n, 3): (1/p - 1) rho_z rho_g, (1/p - 1) rho_g^2 and rho_z^2 / p, each times h, which makes their sums estimate
        sums over the pool. 1 / p is h itself.
    """
    rho_z, rho_g = 0.5 - z, 0.5 - g
    rest = np.maximum(h - 1, 0.0)  # normalised propensities may exceed 1 a little
    return h[:, None] * np.stack([rest * rho_z * rho_g, rest * rho_g**2, h * rho_z**2], axis=1)


def best_powers(cross: np.ndarray, square: np.ndarray, bound: float = 1.0) -> np.ndarray:
    """lam minimising lam' V lam - 2 c' lam under lam >= 0 and sum(lam) <= bound, exactly.

    The minimum solves the equations of some set of judges in use, with the bound met or slack: all sets are tried.

    Args:
        cross: c, (K,), K <= 8.
        square: V, (K, K), symmetric and positive semidefinite.
        bound: of the sum, at least 0.

    Returns:
        (K,). Of equally good ones, one that uses fewer judges.
    """
    best, least = np.zeros(len(cross)), 0.0
    heard = np.flatnonzero(np.diag(square) > 0).tolist()  # a judge that always says 0.5 changes nothing
    for size in range(1, len(heard) + 1):
        for used in itertools.combinations(heard, size):
            for lam in _stationary(cross, square, list(used), bound):
                value = float(lam @ square @ lam - 2 * cross @ lam)
                if value < least - 1e-12 * abs(least):
                    best, least = lam, value
    return best


def _stationary(cross: np.ndarray, square: np.ndarray, used: list[int], bound: float) -> list[np.ndarray]:
    """Feasible points at which the quadratic in the powers `used` is stationary, or is so on the bound."""
    c, v = cross[used], square[np.ix_(used, used)]
    if len(used) == 1:  # plain division: to the bit what one judge alone gets
        points = [np.clip(c / v[0], 0.0, bound)]
    else:
        free = np.linalg.lstsq(v, c, rcond=ALIKE)[0]
        edge = np.ones((len(used) + 1, len(used) + 1))
        edge[:-1, :-1], edge[-1, -1] = v / v.max(), 0.0
        on_edge = np.linalg.lstsq(edge, np.append(c / v.max(), bound), rcond=ALIKE)[0][:-1]
        points = [x for x in (free, on_edge) if (x >= 0).all() and x.sum() <= bound * (1 + 1e-12)]
    found = []
    for x in points:
        lam = np.zeros(len(cross))
        lam[used] = x
        found.append(lam)
    return found


def _moments(z: np.ndarray, g: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums c (K,) and V (K, K) of `judge_moments` for K judges, and the factor h (h - 1), (n,), of every pair."""
    if not (h > 1).any():  # every pair is labelled: no power changes the variance, and the formula is 0 / 0
        h = np.full(len(z), 2.0)
    rho_z, rho_g = 0.5 - z, 0.5 - g
    rest = np.maximum(h - 1, 0.0)
    judges = range(g.shape[1])
    cross = np.array([np.sum(h * (rest * rho_z * rho_g[:, k])) for k in judges])
    square = np.array([[np.sum(h * (rest * (rho_g[:, j] * rho_g[:, k]))) for k in judges] for j in judges])
    return cross, square, h * rest


def _solve(square: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """V^-1 c; of judges that repeat each other, the least solution."""
    return cross / square[0] if len(cross) == 1 else np.linalg.lstsq(square, cross, rcond=ALIKE)[0]


def _covariance(
    z: np.ndarray, g: np.ndarray, factor: np.ndarray, cross: np.ndarray, square: np.ndarray, clusters: np.ndarray | None
) -> np.ndarray:
    """Covariance (K, K) of the unconstrained powers by the delta method, NaN for fewer than 2 labels, or clusters of them."""
    rho_g = 0.5 - g
    score = rho_g * (factor * (0.5 - z - rho_g @ _solve(square, cross)))[:, None]
    score = cluster_sums(score, clusters)
    n = len(score)
    if n < 2:
        return np.full(square.shape, np.nan)
    inverse = 1 / square if len(cross) == 1 else np.linalg.pinv(square, rcond=ALIKE, hermitian=True)
    return n / (n - 1) * inverse @ (score.T @ score) @ inverse


def fit_powers(z: np.ndarray, g: np.ndarray, h: np.ndarray, clusters: np.ndarray | None = None) -> Fit:
    """Powers of K judges from n labelled pairs.

    Args:
        z: (n,) human labels.
        g: (n, K) judge labels.
        h: (n,) inverse propensities; equal ones drop out.
        clusters: (n,) of labels that depend on each other, which standard errors count; None where they do not.
    """
    k = g.shape[1]
    if len(z) == 0:
        none = np.zeros(k)
        return Fit(none, none, np.full(k, np.nan), math.nan, none, np.zeros((k, k)))
    cross, square, factor = _moments(z, g, h)
    heard = np.flatnonzero(np.diag(square) > 0)
    raw, free, se, total_se = best_powers(cross, square), np.zeros(k), np.full(k, np.nan), math.nan
    if len(heard):
        free[heard] = _solve(square[np.ix_(heard, heard)], cross[heard])

        def covariance(among: np.ndarray) -> np.ndarray:
            return _covariance(z, g[:, among], factor, cross[among], square[np.ix_(among, among)], clusters)

        used = np.flatnonzero(raw > 0)
        for j in heard:
            among = np.union1d(used, [j])
            place = int(np.searchsorted(among, j))
            se[j] = np.sqrt(np.maximum(0.0, covariance(among)[place, place]))
        total_se = float(np.sqrt(np.maximum(0.0, covariance(used if len(used) else heard).sum())))
    return Fit(free, raw, se, total_se, cross, square)


def fit_power(z: np.ndarray, g: np.ndarray, h: np.ndarray) -> tuple[float, float | None]:
    """lam = clip(sum c / sum v, 0, 1) over labelled pairs, with c, v the first two of `judge_moments`, and its standard error.

    It minimises the variance of the gradient at margin 0, where training starts; labelled at random, h drops out. The
    error is the delta method's for a ratio of means, None where it does not exist.
    """
    fit = fit_powers(z, g[:, None], h)
    return float(fit.raw[0]), None if math.isnan(fit.total_se) else fit.total_se


def power_cap(h: np.ndarray, max_overshoot: float) -> float:
    """Largest power with A <= max_overshoot: (1 - 1 / A_max) / (1 - f), where 1 / f is the largest h; 1 where nothing binds."""
    largest = float(h.max())
    rest = 1 - 1 / largest if largest > 0 else 0.0
    return min(1.0, (1 - 1 / max_overshoot) / rest) if rest > 0 else 1.0
