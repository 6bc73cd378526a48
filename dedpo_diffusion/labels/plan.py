"""What more human labels or a better judge would be worth, and how many labels reach a wanted worth.

All of it rests on the gradient's variance at margin 0, where training starts and the gradient of a pair is rho = 0.5 - label.
N pairs with n human labels taken at random, f = n / N, merged at power lam, have the variance

    (s - gain) / n + gain / N,    gain = 2 lam c - lam^2 v

with c, v, s the means of rho_z rho_g, rho_g^2 and rho_z^2. The *worth* is the number of human labels, taken at random, that
alone have the same variance. It never exceeds N, where every pair is labelled. At the present labels it is that of the report, of
which labels, powers and resamples are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dedpo_diffusion.debias import Basis, bootstrap_sums, cluster_sums

POINTS = 24  # of a curve
STEPS = 129  # at which the interval of a plan is looked up


@dataclass(frozen=True)
class Pool:
    """What is known of `pairs` pairs with `labels` human labels: `terms` (n, 3), rho_z rho_g, rho_g^2, rho_z^2 of the labelled pairs.

    A tuned power is `free` less `back` times the root of the labels that there are over those that there will be, at most what
    `max_overshoot` allows; where `free` is None it is `fixed`. Where pairs have different powers, `terms` hold each pair's rho_g
    times its own power over the common one. They are resampled with `seed`, in `clusters` (n,) where labels depend on each other.
    """

    pairs: int
    labels: int
    terms: np.ndarray
    fixed: float = 0.0
    free: float | None = None
    back: float | None = None
    max_overshoot: float = 2.0
    seed: int = 0
    clusters: np.ndarray | None = None


def power_at(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """The power (...,) that is used where there are `labels` (...,) human labels."""
    if pool.free is None or pool.back is None:
        return np.full(labels.shape, pool.fixed)
    return _capped(pool.free - pool.back * np.sqrt(pool.labels / labels), labels, pool.pairs, pool.max_overshoot)


def _capped(power: Any, labels: np.ndarray, pairs: float, max_overshoot: float) -> np.ndarray:
    rest = 1 - labels / pairs
    cap = np.divide(1 - 1 / max_overshoot, rest, out=np.ones(rest.shape), where=rest > 0)  # as `debias.power_cap`
    return np.clip(power, 0, np.minimum(cap, 1))


def worth(pool: Pool, labels: Any) -> np.ndarray:
    """Effective human labels, (...), where there are `labels` (...) human labels."""
    means = pool.terms.mean(axis=0)
    return means[2] / (_coefficients(pool, np.asarray(labels, dtype=float)) @ means)


def _coefficients(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """(..., 3): the variance is their sum of products with the means."""
    lam = power_at(pool, labels)
    rest = 1 / labels - 1 / pool.pairs
    return np.stack([-2 * lam * rest, lam**2 * rest, 1 / labels], axis=-1)


def resampled_worth(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """The worth (R, G) that about 2000 resamples of the labels tell for `labels` (G,)."""
    drawn = bootstrap_sums(cluster_sums(pool.terms, pool.clusters), np.random.default_rng(pool.seed)) / len(pool.terms)
    drawn = drawn[drawn[:, 2] > 0]  # resamples of ties alone say nothing
    return drawn[:, 2:] / (drawn @ _coefficients(pool, labels).T)


def describe(basis: Basis, seed: int = 0) -> Pool | None:
    """What the labels say of the pairs.

    Args:
        basis: of a merge.
        seed: of the bootstrap; that of the merge draws the report's resamples.

    Returns:
        None where the labels are too few or all ties, or were not taken at random: what further labels of unequal propensities would
        be worth is not known.
    """
    if len(basis.z) < 2 or (basis.z == 0.5).all() or basis.uneven or np.isnan(basis.power).any():
        return None
    labels = len(basis.z)
    common: dict[str, Any] = {"max_overshoot": basis.max_overshoot, "seed": seed, "clusters": basis.clusters}
    if basis.free is None or basis.back is None:
        common["fixed"], own = float(basis.power[0]), np.ones(labels)
    else:
        free, back = float(basis.free.mean()), float(basis.back.mean())
        common |= {"free": free, "back": back}
        now = float(_capped(free - back, np.array(labels), basis.pairs, basis.max_overshoot))
        own = basis.power / now if now > 0 else basis.free / free if free > 0 else np.ones(labels)
    rho_z, rho_g = 0.5 - basis.z, own * (0.5 - basis.mixed)
    return Pool(basis.pairs, labels, np.stack([rho_z * rho_g, rho_g**2, rho_z**2], axis=1), **common)


# ---- the curves


def worth_curve(pool: Pool | None) -> dict[str, list[float]] | None:
    """What more human labels would make the labels worth, at this judge.

    Args:
        pool: of `describe`.

    Returns:
        {"n", "value", "low", "high"}: numbers of human labels, from the present to all pairs, further ones taken at random from
        the pairs without one; their worth and its 95 % interval. None where nothing is known.
    """
    if pool is None:
        return None
    grown = _counts(pool, POINTS)
    low, high = np.quantile(resampled_worth(pool, grown), [0.025, 0.975], axis=0)
    return {"n": grown.tolist(), "value": worth(pool, grown).tolist(), "low": low.tolist(), "high": high.tolist()}


def _counts(pool: Pool, steps: int) -> np.ndarray:
    """Whole numbers of labels from the present to all pairs, in geometric progression."""
    return np.unique(np.round(np.geomspace(pool.labels, pool.pairs, steps)))


def judge_curve(
    labels: int, pairs: int, *, power: float | None = None, max_overshoot: float = 2.0, half: bool = False
) -> dict[str, list[float]]:
    """What a better judge would make the present labels worth: `agreement` (0.5 to 1) and `value`.

    The judge here answers 0 or 1 and people never tie, so that the variance ratio is
    1 - (1 - f)(2 lam (2a - 1) - lam^2) at agreement a. A judge that knows when it is unsure is worth more than this at the same
    agreement. People who disagree with themselves keep any judge from agreeing with them everywhere.

    Args:
        labels, pairs: numbers of human labels and of pairs.
        power: the power in use; None takes the best at each agreement.
        max_overshoot: bound of how far a labelled target is stretched by the best one.
        half: take half of the best one.
    """
    agreement = np.linspace(0.5, 1, POINTS + 2)
    clear = 2 * agreement - 1
    lam = _capped(clear / 2 if half else clear, np.full(len(clear), labels), pairs, max_overshoot) if power is None else power
    ratio = 1 - (1 - labels / pairs) * (2 * lam * clear - lam**2)
    return {"agreement": agreement.tolist(), "value": (labels / ratio).tolist()}


# ---- how many labels


def _needed(pool: Pool, wanted: float) -> int:
    """The least number of labels, from the present on, at which the worth is what is wanted; it is at most N."""
    low, high = pool.labels, pool.pairs
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if worth(pool, middle) >= wanted else (middle + 1, high)
    return low


def _crossing(counts: np.ndarray, values: np.ndarray, wanted: float) -> float:
    """The least count at which the curve reaches what is wanted."""
    rising = np.maximum.accumulate(values)
    k = int(np.argmax(rising >= wanted)) if rising[-1] >= wanted else len(counts) - 1
    if k == 0 or rising[k] == rising[k - 1]:
        return float(counts[k])
    part = min(1.0, (wanted - rising[k - 1]) / (rising[k] - rising[k - 1]))
    return float(counts[k - 1] + part * (counts[k] - counts[k - 1]))


def plan(pool: Pool, wanted: float) -> dict[str, Any]:
    """How many more human labels, taken at random from the pairs without one, make the labels worth `wanted`.

    Args:
        pool: of `describe`.
        wanted: effective human labels.

    Returns:
        {wanted, n, n_human, worth_now, reachable, more, ci, without_judge, sentences}: `more` labels and their 95 % interval `ci`,
        where that of the worth meets what is wanted; None where all pairs together are not worth that much. `without_judge` is how
        many more it would take from people alone.
    """
    counts, reachable = _counts(pool, STEPS), wanted <= pool.pairs
    drawn = resampled_worth(pool, counts)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found: dict[str, Any] = {"wanted": float(wanted), "n": pool.pairs, "n_human": pool.labels, "reachable": reachable}
    found["worth_now"] = {"value": float(worth(pool, pool.labels)), "ci": [float(low[0]), float(high[0])]}
    found |= {"more": None, "ci": None, "without_judge": None}
    if reachable:
        ends = [_crossing(counts, edge, wanted) - pool.labels for edge in (high, low)]
        alone = replace(pool, free=None, fixed=0.0)
        found["more"], found["without_judge"] = (_needed(case, wanted) - pool.labels for case in (pool, alone))
        found["ci"] = [math.floor(ends[0]), math.ceil(ends[1] - 1e-6)]
    return found | {"sentences": _plan_sentences(found)}


def _plan_sentences(found: dict[str, Any]) -> list[str]:
    now, wanted, n = found["worth_now"], found["wanted"], found["n"]
    text = (
        f"The {found['n_human']} human labels and the judge's are worth about {now['value']:.0f} human labels "
        f"(95 %: {now['ci'][0]:.0f} to {now['ci'][1]:.0f})."
    )
    if not found["reachable"]:
        return [text, f"No number of labels makes them worth {wanted:g}: with a human label for each of the {n} pairs they are worth {n}."]
    if now["value"] >= wanted:
        return [text, f"That is at least {wanted:g} already; no further label is needed."]
    return [
        text,
        f"To be worth {wanted:g}, they need {found['more']} more human labels, taken at random (95 %: {found['ci'][0]} to "
        f"{found['ci'][1]}); people alone would have to give {found['without_judge']} more. "
        f"The judge saves you {found['without_judge'] - found['more']} labels.",
    ]
