"""The power for a run of finite length: labels are noisy, and so are the visits by which a run sees them.

A target far from 1/2 is a large gradient, drawn at another timestep with other noise at every visit. With P the mean squared
gradient of a pair (timesteps and noise averaged out) and T = kappa P that of one visit, the variance of what a run has summed up,
in units of P, is

    J(lam) = R(lam) + (kappa - 1) / (S B) (mean |a_i(lam)|)^2        a_i = weight_i (target_i - 1/2)

for S steps of B pairs. R is the variance over labellings at margin 0. The second term is the visits' own, pairs being visited
in proportion to |a_i|; kappa - 1 and not kappa, since the sampler goes through the pairs by turns, so that which pairs are
visited adds nothing. The power of endless training minimises R alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedpo_diffusion.debias.clusters import cluster_sums
from dedpo_diffusion.debias.powers import judge_moments
from dedpo_diffusion.debias.worth import bootstrap_sums


@dataclass(frozen=True)
class Run:
    """`visits` = steps x pairs of a step; `noise_ratio` kappa = T / P, at least 1."""

    visits: float
    noise_ratio: float

    @property
    def noise(self) -> float:
        """(kappa - 1) / (S B)."""
        return (self.noise_ratio - 1) / self.visits


def check_run(method: str, power: Any, rule: str, visits: Any, noise_ratio: Any) -> Run | None:
    """The run that targets are made for, or None.

    Raises:
        ValueError: one of the two numbers without the other, one out of range, or a method without a power.
    """
    if visits is None and noise_ratio is None:
        return None
    if visits is None or noise_ratio is None:
        raise ValueError("visits and noise_ratio go together: give both, or neither")
    if not (visits >= 1 and math.isfinite(visits)):
        raise ValueError(f"visits is {visits}: it is optimizer steps times pairs of a step, at least 1")
    if not (noise_ratio >= 1 and math.isfinite(noise_ratio)):
        raise ValueError(f"noise_ratio is {noise_ratio}: one visit is at least as noisy as its pair, so it is 1 or more")
    if method not in ("tuned", "dedpo"):
        raise ValueError(f"visits and noise_ratio choose a power, and method {method!r} has none to choose: leave them out")
    if method == "tuned" and rule != "plug_in" and power is None:
        raise ValueError(f"visits and noise_ratio choose the power, and so does rule {rule!r}: leave one of them out")
    return Run(float(visits), float(noise_ratio))


@dataclass(frozen=True)
class Terms:
    """What J needs of N pairs at powers lam_i: sums over the n labelled ones, and what the others add to mean |a|.

    `moments` (n, 4): those of `judge_moments` times lam_i, lam_i^2 and 1, and h rho_z^2; `own` and `judge` (n,): the parts
    h (z - 1/2) and lam (1 - h) (g - 1/2) of a_i; `others`: sum of lam |g - 1/2| over the unlabelled.
    """

    moments: np.ndarray
    own: np.ndarray
    judge: np.ndarray
    others: float
    pairs: int

    def variance(self, scale: float, run: Run) -> float:
        """J with every power times `scale`."""
        cross, square, single, _ = self.moments.sum(axis=0)
        size = float(np.abs(self.own + scale * self.judge).sum() + scale * self.others) / self.pairs
        return float(single - 2 * scale * cross + scale**2 * square) / self.pairs**2 + run.noise * size**2


def run_terms(z: np.ndarray, g: np.ndarray, h: np.ndarray, power: np.ndarray) -> Terms:
    """Terms of N pairs: z, g, h and lam (N,); a missing judge counts as undecided."""
    g, rows = np.where(np.isnan(g), 0.5, g), ~np.isnan(z)
    zl, gl, hl, lam = z[rows], g[rows], h[rows], power[rows]
    moments = judge_moments(zl, gl, hl) * np.stack([lam, lam**2, np.ones(len(lam))], axis=1)
    single = hl * (0.5 - zl) ** 2
    others = float(np.sum(power[~rows] * np.abs(g[~rows] - 0.5)))
    return Terms(np.column_stack([moments, single]), hl * (zl - 0.5), lam * (1 - hl) * (gl - 0.5), others, len(z))


def best_scale(terms: Terms, run: Run) -> float:
    """The factor in [0, 1] on every power that makes J least: J is convex in it. For one judge it is the best power itself,
    since the visits' noise only ever asks for less than endless training does."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(terms.variance, bounds=(0.0, 1.0), args=(run,), method="bounded", options={"xatol": 1e-7})
    return min((1.0, 0.0, float(found.x)), key=lambda scale: terms.variance(scale, run))


def hard_power(accuracy: float, share: float, labels: int, run: Run) -> float:
    """lam_c in closed form, for hard labels of a judge that is right with probability a on a share f of labels taken at random:

    max(0, (2a - 1) - 2 rho (1 - a)) / (1 + 4 rho (1 - f) (1 - a)^2),   rho = n_l (kappa - 1) / (S B)
    """
    rho, wrong = labels * run.noise, 1 - accuracy
    return max(0.0, (2 * accuracy - 1) - 2 * rho * wrong) / (1 + 4 * rho * (1 - share) * wrong**2)


def run_worth(terms: Terms, scale: float, run: Run, seed: int, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """How many human labels, taken at random and trained on alone in the same run, have the same variance: {value, ci, n_human}.

    n labels alone have J = s / n + (kappa - 1) / (S B) m^2, with s the mean of rho_z^2 and m that of |z - 1/2|.
    """
    n = len(terms.own)
    mine = np.abs(terms.own + scale * terms.judge)
    columns = np.column_stack([terms.moments, mine, np.abs(terms.own)])

    def worth(sums: np.ndarray) -> np.ndarray:
        cross, square, variance, single, size, alone = np.moveaxis(sums, -1, 0)
        labels = (variance - 2 * scale * cross + scale**2 * square) / terms.pairs**2
        more = run.noise * (((size + scale * terms.others) / terms.pairs) ** 2 - (alone / terms.pairs) ** 2)
        return np.divide(single / terms.pairs, labels + more, out=np.full_like(labels, np.nan), where=labels + more > 0)

    value = float(worth(columns.sum(axis=0)))
    if not (math.isfinite(value) and value > 0):
        return {"value": None, "ci": None, "n_human": n}
    resampled = cluster_sums(columns, clusters)
    drawn = worth(bootstrap_sums(resampled, np.random.default_rng((seed, 3)))) if len(resampled) > 1 else np.empty(0)
    known = drawn[np.isfinite(drawn)]
    return {"value": value, "ci": np.quantile(known, [0.025, 0.975]).tolist() if len(known) else None, "n_human": n}


def run_report(
    terms: Terms, scale: float, run: Run, endless_power: float, seed: int, clusters: np.ndarray | None = None
) -> dict[str, Any]:  # fmt: skip
    """What the report says of the run: its numbers, the power of endless training, and what the labels are worth in both."""
    return {
        "visits": run.visits, "noise_ratio": run.noise_ratio, "endless_power": endless_power, "scale": scale,
        "effective_human_labels": run_worth(terms, scale, run, seed, clusters),
        "endless": run_worth(terms, 1.0, Run(run.visits, 1.0), seed, clusters),
    }  # fmt: skip
