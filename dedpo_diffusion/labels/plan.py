"""What more human labels or a better judge would be worth, and how many labels, in which strata, reach a wanted worth.

All of it rests on the gradient's variance at margin 0, where training starts and the gradient of a pair is rho = 0.5 - label.
A stratum of N_s pairs with n_s human labels taken at random, f_s = n_s / N_s, merged at power lam_s, adds

    (N_s / N)^2 [ (s - gain) / n_s + gain / N_s ],    gain = 2 lam_s c - lam_s^2 v

with c, v, s the stratum's means of rho_z rho_g, rho_g^2 and rho_z^2. The *worth* is the number of human labels, taken at
random from all pairs, that alone have the same variance. It never exceeds N, where every pair is labelled. At the present
labels it is that of the report, of which labels, powers and resamples are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dedpo_diffusion.debias import Basis, bootstrap_sums, own_weights, reference_sentences

POINTS = 24  # of a curve
STEPS = 129  # at which the interval of a plan is looked up
FLOOR = 0.1  # least share of its own spread that a stratum's need of labels counts with: few labels may look perfect by chance


@dataclass(frozen=True)
class Pool:
    """What is known of S strata: `names`; `pairs` and `labels`, their counts (S,); `means` (S, 3) of rho_z rho_g, rho_g^2, rho_z^2.

    A tuned power is `free` (S,) less `back` (S,) times the root of the labels that there are over those that there will be, at
    most what `max_overshoot` allows; where `free` is None it is `fixed`. Where a stratum's pairs have different powers, `means` holds
    each pair's rho_g times its own power over the stratum's. `terms`, (n_s, 3) of each stratum, are what `means` are the means
    of; they are resampled in `groups` groups with `seed`.
    """

    names: list[str]
    pairs: np.ndarray
    labels: np.ndarray
    means: np.ndarray
    terms: list[np.ndarray]
    fixed: float = 0.0
    free: np.ndarray | None = None
    back: np.ndarray | None = None
    max_overshoot: float = 2.0
    groups: int = 2048
    seed: int = 0


def power_at(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """The power (..., S) that is used where the strata have `labels` (..., S) human labels each."""
    if pool.free is None or pool.back is None:
        return np.full(labels.shape, pool.fixed)
    return _capped(pool.free - pool.back * np.sqrt(pool.labels / np.maximum(labels, 1)), labels, pool.pairs, pool.max_overshoot)


def _capped(power: np.ndarray, labels: np.ndarray, pairs: np.ndarray, max_overshoot: float) -> np.ndarray:
    rest = 1 - labels / pairs
    cap = np.divide(1 - 1 / max_overshoot, rest, out=np.ones(rest.shape), where=rest > 0)  # as `debias.power_cap`
    return np.clip(power, 0, np.minimum(cap, 1))


def worth(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """Effective human labels, (...), where the strata have `labels` (..., S) human labels each."""
    share = pool.pairs / pool.pairs.sum()
    return np.sum(share * pool.means[:, 2], axis=-1) / np.sum(_coefficients(pool, labels) * pool.means, axis=(-2, -1))


def _coefficients(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """(..., S, 3): the variance is their sum of products with the means."""
    share, lam = pool.pairs / pool.pairs.sum(), power_at(pool, labels)
    rest = 1 / labels - 1 / pool.pairs
    return share[:, None] ** 2 * np.stack([-2 * lam * rest, lam**2 * rest, 1 / labels], axis=-1)


def resampled_worth(pool: Pool, labels: np.ndarray) -> np.ndarray:
    """The worth (R, G) that about 2000 resamples of the labels tell for `labels` (G, S); strata are summed up one by one."""
    share, coefficients, rng = pool.pairs / pool.pairs.sum(), _coefficients(pool, labels), np.random.default_rng(pool.seed)
    single: Any = 0.0
    variance: Any = 0.0
    for s, terms in enumerate(pool.terms):
        drawn = bootstrap_sums(terms, rng, groups=pool.groups) / len(terms) if len(terms) > 1 else terms
        single, variance = single + share[s] * drawn[:, 2], variance + drawn @ coefficients[:, s].T
    told = single > 0  # resamples of ties alone say nothing
    return single[told, None] / variance[told]


def describe(basis: Basis, seed: int = 0) -> Pool | None:
    """What the labels say of the pairs.

    Args:
        basis: of a merge.
        seed: of the bootstrap; that of the merge draws the report's resamples.

    Returns:
        None where the labels are too few or all ties, or were not taken at random within the strata: what further labels of
        unequal propensities would be worth is not known.
    """
    if len(basis.z) < 2 or (basis.z == 0.5).all() or basis.uneven or np.isnan(basis.power).any():
        return None
    order, pairs = basis.order(), basis.pairs.astype(float)
    labels = np.array([len(rows) for rows in order], dtype=float)
    common: dict[str, Any] = {"max_overshoot": basis.max_overshoot, "groups": basis.groups(), "seed": seed}
    if basis.free is None or basis.back is None:
        common["fixed"], own = float(basis.power[0]), np.ones(len(basis.z))
    else:
        free, back = (np.array([values[rows].mean() for rows in order]) for values in (basis.free, basis.back))
        common |= {"free": free, "back": back}
        now = _capped(free - back, labels, pairs, basis.max_overshoot)[basis.code]
        stratum = free[basis.code]
        asked = np.divide(basis.free, stratum, out=np.ones(len(basis.z)), where=stratum > 0)
        own = np.divide(basis.power, now, out=asked, where=now > 0)
    rho_z, rho_g = 0.5 - basis.z, own * (0.5 - basis.mixed)
    every = np.stack([rho_z * rho_g, rho_g**2, rho_z**2], axis=1)
    terms = [every[rows] for rows in order]
    return Pool(basis.names, pairs, labels, np.stack([part.mean(axis=0) for part in terms]), terms, **common)


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
    grown = _spread_evenly(pool, _parts(pool, POINTS))
    low, high = np.quantile(resampled_worth(pool, grown), [0.025, 0.975], axis=0)
    counts = np.round(grown.sum(axis=1), 6)
    return {"n": counts.tolist(), "value": worth(pool, grown).tolist(), "low": low.tolist(), "high": high.tolist()}


def _parts(pool: Pool, steps: int) -> np.ndarray:
    """Shares of the unlabelled pairs, from 0 to 1: whole numbers of labels in all, in geometric progression."""
    start, end = pool.labels.sum(), pool.pairs.sum()
    if start == end:
        return np.zeros(1)
    return (np.unique(np.round(np.geomspace(start, end, steps))) - start) / (end - start)


def judge_curve(
    labels: Any, pairs: Any, *, power: float | None = None, max_overshoot: float = 2.0, half: bool = False
) -> dict[str, list[float]]:
    """What a better judge would make the present labels worth: `agreement` (0.5 to 1) and `value`.

    The judge here answers 0 or 1 and people never tie, so that the variance ratio in a stratum is
    1 - (1 - f)(2 lam (2a - 1) - lam^2) at agreement a. A judge that knows when it is unsure is worth more than this at the same
    agreement. People who disagree with themselves keep any judge from agreeing with them everywhere.

    Args:
        labels, pairs: numbers of human labels and of pairs, of each stratum or of all.
        power: the power in use; None takes the best at each agreement.
        max_overshoot: bound of how far a labelled target is stretched by the best one.
        half: take half of the best one.
    """
    n, size = np.atleast_1d(labels).astype(float), np.atleast_1d(pairs).astype(float)
    agreement = np.linspace(0.5, 1, POINTS + 2)
    clear = (2 * agreement - 1)[:, None]
    asked = np.broadcast_to(clear / 2 if half else clear, (len(agreement), len(n)))
    lam = _capped(asked, n[None, :], size[None, :], max_overshoot) if power is None else power
    ratio = 1 - (1 - n / size) * (2 * lam * clear - lam**2)
    share = size / size.sum()
    return {"agreement": agreement.tolist(), "value": (1 / np.sum(share**2 * ratio / n, axis=1)).tolist()}


# ---- how many labels, and where


def _spread_evenly(pool: Pool, part: np.ndarray) -> np.ndarray:
    """Labels (..., S) where the share `part` (...,) of the unlabelled pairs is labelled too, at random."""
    return pool.labels + part[..., None] * (pool.pairs - pool.labels)


def _spread_by_need(pool: Pool, part: np.ndarray, need: np.ndarray) -> np.ndarray:
    """Labels (..., S) in proportion to the need (S,) where possible: no fewer than there are, no more than there are pairs."""
    least, most = (pool.labels / need).min(), (pool.pairs / need).max()
    scale = least * (most / least) ** part  # part 0 leaves all as it is, part 1 labels every pair
    return np.clip(scale[..., None] * need, pool.labels, pool.pairs)


def _need(pool: Pool) -> np.ndarray:
    """N_s sqrt(what the judge leaves over in the stratum), which labels are taken in proportion to (Neyman).

    What is left over, (rho_z - lam rho_g)^2, is drawn towards that of all strata, the more the fewer labels tell it; each
    counts with the common spread.
    """
    lam = power_at(pool, pool.labels)
    parts = [np.array([-2 * x, x**2, 1.0]) for x in lam]
    left = [terms @ part for terms, part in zip(pool.terms, parts, strict=True)]
    means, every = np.array([values.mean() for values in left]), np.concatenate(left)
    own = own_weights(means, every.var() / pool.labels)
    drawn = own * means + (1 - own) * float(pool.pairs @ means / pool.pairs.sum())
    return pool.pairs * np.sqrt(np.maximum(drawn, FLOOR**2 * np.maximum(pool.means[:, 2], 1e-12)))


def _reach(pool: Pool, wanted: float, spread: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Labels (S,) of the least part, in [0, 1], at which the worth is what is wanted."""
    if worth(pool, pool.labels) >= wanted:
        return pool.labels
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if worth(pool, spread(np.array(middle))) >= wanted else (middle, high)
    return spread(np.array(high))


def _whole(pool: Pool, wanted: float, labels: np.ndarray) -> np.ndarray:
    """Whole numbers of labels (S,), as few as reach what is wanted: those nearest to the next number are rounded up first."""
    down = np.floor(labels + 1e-6)
    rest = np.maximum(labels - down, 0.0)
    order = [int(s) for s in np.argsort(-rest, kind="stable") if rest[s] > 1e-6]
    up = min(len(order), max(0, math.ceil(rest.sum() - 1e-6)))
    while True:
        found = down.copy()
        found[order[:up]] += 1
        if up == len(order) or worth(pool, found) >= wanted:
            return found
        up += 1


def _crossing(counts: np.ndarray, values: np.ndarray, wanted: float) -> float:
    """The least count at which the curve reaches what is wanted."""
    rising = np.maximum.accumulate(values)
    k = int(np.argmax(rising >= wanted)) if rising[-1] >= wanted else len(counts) - 1
    if k == 0 or rising[k] == rising[k - 1]:
        return float(counts[k])
    part = min(1.0, (wanted - rising[k - 1]) / (rising[k] - rising[k - 1]))
    return float(counts[k - 1] + part * (counts[k] - counts[k - 1]))


def _way(pool: Pool, wanted: float, spread: Callable[[np.ndarray], np.ndarray], grid: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """More labels in all and in each stratum; the interval is where that of the worth at `grid` (G, S) labels meets what is wanted."""
    more = _whole(pool, wanted, _reach(pool, wanted, spread)) - pool.labels
    counts = grid.sum(axis=1) - pool.labels.sum()
    low, high = (_crossing(counts, np.quantile(drawn, q, axis=0), wanted) for q in (0.975, 0.025))
    return {"more": int(more.sum()), "ci": [math.floor(low), math.ceil(high - 1e-6)], "by_stratum": [int(count) for count in more]}


def plan(pool: Pool, wanted: float) -> dict[str, Any]:
    """How many more human labels make the labels worth `wanted`.

    Args:
        pool: of `describe`.
        wanted: effective human labels.

    Returns:
        {wanted, n, n_human, worth_now, human_labels_alone, reachable, at_random, by_need, without_judge, strata, sentences}.
        `at_random` and `by_need` hold `more` labels, their 95 % interval `ci` and, for each stratum, `by_stratum`; None where
        all pairs together are not worth that much. At random: from the pairs without a label. By need: in proportion to
        N_s sqrt(what the judge leaves over there), at least the labels that there are, at most all pairs. `without_judge` is
        how many more it would take at random from people alone (None: more than pairs).
    """
    n, n_human, need = int(pool.pairs.sum()), int(pool.labels.sum()), _need(pool)
    ways: dict[str, Any] = {"at_random": lambda part: _spread_evenly(pool, part), "by_need": lambda part: _spread_by_need(pool, part, need)}
    grids = {"at_random": ways["at_random"](_parts(pool, STEPS)), "by_need": ways["by_need"](np.linspace(0, 1, STEPS))}
    drawn = resampled_worth(pool, np.concatenate([pool.labels[None, :], *grids.values()]))
    low, high = np.quantile(drawn[:, 0], [0.025, 0.975])
    drawn_of = dict(zip(grids, np.split(drawn[:, 1:], [len(grids["at_random"])], axis=1), strict=True))
    alone, reachable = replace(pool, free=None, fixed=0.0), wanted <= n
    found: dict[str, Any] = {"wanted": float(wanted), "n": n, "n_human": n_human, "reachable": reachable}
    found["worth_now"] = {"value": float(worth(pool, pool.labels)), "ci": [float(low), float(high)]}
    found |= {"human_labels_alone": {"value": float(worth(alone, pool.labels))}, "worth_reference": "at_random"}
    for name, spread in ways.items():
        found[name] = _way(pool, wanted, spread, grids[name], drawn_of[name]) if reachable else None
    lacking = _whole(alone, wanted, _reach(alone, wanted, ways["at_random"])) - pool.labels if reachable else None
    found["without_judge"] = None if lacking is None else int(lacking.sum())
    counts = zip(pool.names, pool.pairs, pool.labels, strict=True)
    found["strata"] = [{"name": name, "n": int(pairs), "n_human": int(labels)} for name, pairs, labels in counts]
    return found | {"sentences": _plan_sentences(found)}


def _plan_sentences(found: dict[str, Any]) -> list[str]:
    now, wanted, n = found["worth_now"], found["wanted"], found["n"]
    texts = [
        f"The {found['n_human']} human labels and the judge's are worth about {now['value']:.0f} human labels "
        f"(95 %: {now['ci'][0]:.0f} to {now['ci'][1]:.0f}).",
        *reference_sentences(found),
    ]
    if not found["reachable"]:
        return [
            *texts,
            f"No number of labels makes them worth {wanted:g}: with a human label for each of the {n} pairs they are worth {n}.",
        ]
    if now["value"] >= wanted:
        return [*texts, f"That is at least {wanted:g} already; no further label is needed."]
    random, by_need = found["at_random"], found["by_need"]
    texts.append(
        f"To be worth {wanted:g}, they need {random['more']} more human labels, taken at random (95 %: {random['ci'][0]} to "
        f"{random['ci'][1]}); people alone would have to give {found['without_judge']} more."
    )
    if len(found["strata"]) > 1:
        hardly = "" if by_need["more"] < 0.97 * random["more"] else ", which is hardly better"
        texts.append(
            f"Taken where the judge leaves most to be told, {by_need['more']} labels suffice (95 %: {by_need['ci'][0]} to "
            f"{by_need['ci'][1]}){hardly}."
        )
    return texts
