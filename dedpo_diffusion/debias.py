"""Human and judge labels of the same pairs, merged into one target and one weight per pair.

The pair loss `softplus(m) - label * m` is affine in its label. So DeDPO's debiased objective (arXiv 2602.06195),

    mean over all n pairs of loss(m, g)  +  mean over the n_l labelled of [ loss(m, z) - loss(m, g) ]

with human labels z and judge labels g, is an ordinary weighted loss, `weight * softplus(m) - weight * target * m`, whose
targets and weights depend on the labels alone: merging happens once, before training. A *power* lam in [0, 1] scales the
judge's part, as in PPI++ (arXiv 2311.01453): 0 recovers training on the human labels, 1 the objective above, and every
fixed power is unbiased whatever the judge, as long as the judge did not learn from these human labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("human_only", "naive", "dedpo", "tuned")
NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the standard normal
RESAMPLES = 2000
RESAMPLED_GROUPS = 2048  # beyond this many labelled pairs, equal random groups of pairs are resampled


@dataclass(frozen=True)
class Merged:
    """What training needs to know about the labels of N pairs.

    `target` and `weight` are (N,) float64; targets of labelled pairs may leave [0, 1] and must not be clipped: that would
    restore the judge's bias. `power` is the power used, NaN for naive merging, which has none. `report` is ready for JSON.
    """

    target: np.ndarray
    weight: np.ndarray
    power: float
    report: dict[str, Any]


@dataclass(frozen=True)
class _Power:
    """The power used; for a tuned one also the estimate before the cap, its standard error, and the cap."""

    used: float
    raw: float | None = None
    se: float | None = None
    cap: float | None = None


def merge_labels(
    human: Any,
    synthetic: Any,
    *,
    method: str = "tuned",
    power: float | None = None,
    propensity: Any = None,
    max_overshoot: float = 2.0,
    seed: int = 0,
) -> Merged:
    """Merge human and judge labels into a target and a weight per pair.

    Args:
        human: (N,) human probabilities that image 0 is preferred, in [0, 1]; NaN where nobody answered.
        synthetic: (N,) the judge's, in [0, 1]; None or NaN only for `human_only` (and for labelled pairs in `naive`).
        method: `tuned` fits the power to the labelled pairs, `dedpo` takes 1 as published (not capped), `human_only` is
            power 0, `naive` takes the human label where there is one and the judge's elsewhere, which is biased.
        power: a power in [0, 1] to use instead of the method's (`dedpo` and `tuned` only); not capped.
        propensity: probability in (0, 1] that a pair was labelled, a number or (N,); None is the labelled share. With
            an array the inverse propensities are normalised to mean 1 (Hajek).
        max_overshoot: bound A >= 1 of the tuned power: a labelled target is g + A (z - g) at most.
        seed: seed of the bootstrap of `effective_human_labels`.

    Returns:
        Merged, with (N,) float64 target and weight. The report holds counts (`n`, `n_human`, `n_ties`), `labelled_share`,
        `agreement`, `power`, `power_raw`, `power_se`, `power_cap`, `overshoot`, `share_outside`, `max_abs_offset` (the
        largest |target - 0.5|), `judge_bias` (mean of g - z), `effective_human_labels`, the same at power 1, and
        `sentences`; None stands where a number does not exist.

    Raises:
        ValueError: a label or option that cannot be used; the message names index and remedy.

    Reference: DeDPO, arXiv 2602.06195; PPI++, arXiv 2311.01453, for the power.
    """
    _check_options(method, power, propensity, max_overshoot)
    z = _checked_labels(human, "human", "leave NaN where nobody answered")
    g = np.full(len(z), np.nan) if synthetic is None else _checked_labels(synthetic, "synthetic", "pass probabilities, not scores")
    _check_present(z, g, method, synthetic is None)
    h = inverse_propensity(z, propensity)
    chosen = _choose_power(z, g, h, method, power, max_overshoot)
    if method == "naive":
        target, weight = np.where(np.isnan(z), g, z), np.ones(len(z))
    else:
        weight = pair_weights(h, chosen.used)
        target = pair_targets(z, g, h, weight)
    return Merged(target, weight, chosen.used, _report(z, g, h, target, weight, chosen, method, seed))


# ---- the estimator


def inverse_propensity(z: np.ndarray, propensity: Any = None) -> np.ndarray:
    """h = R / p, (N,), with R = 1 where z is a number; for an array p normalised to mean 1 (Hajek)."""
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
    h = labelled / p
    return h / h.mean() if p.ndim else h


def pair_weights(h: np.ndarray, power: float) -> np.ndarray:
    """weight = h + lam (1 - h), (N,)."""
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


def fit_power(z: np.ndarray, g: np.ndarray, h: np.ndarray) -> tuple[float, float | None]:
    """lam = clip(sum c / sum v, 0, 1) over labelled pairs, with c, v the first two of `judge_moments`, and its standard error.

    It minimises the variance of the gradient at margin 0, where training starts; labelled at random, h drops out. The
    error is the delta method's for a ratio of means, None where it does not exist.
    """
    if not (h > 1).any():  # every pair is labelled: no power changes the variance, and the formula is 0 / 0
        h = np.full(len(z), 2.0)
    c, v, _ = judge_moments(z, g, h).T
    below = float(np.sum(v))
    if below <= 0:  # a judge that always says 0.5 has nothing to add
        return 0.0, None
    ratio = float(np.sum(c)) / below
    n = len(z)
    se = math.sqrt(n / (n - 1) * float(np.sum((c - ratio * v) ** 2))) / below if n > 1 else None
    return min(max(ratio, 0.0), 1.0), se


def power_cap(h: np.ndarray, max_overshoot: float) -> float:
    """Largest power with A <= max_overshoot: (1 - 1 / A_max) / (1 - f), where 1 / f is the largest h."""
    rest = 1 - 1 / float(h.max())
    return min(1.0, (1 - 1 / max_overshoot) / rest) if rest > 0 else 1.0


def _choose_power(z: np.ndarray, g: np.ndarray, h: np.ndarray, method: str, power: float | None, max_overshoot: float) -> _Power:
    if method == "naive":
        return _Power(math.nan)
    if power is not None:
        return _Power(float(power))
    if method != "tuned":
        return _Power({"human_only": 0.0, "dedpo": 1.0}[method])
    labelled = ~np.isnan(z)
    raw, se = fit_power(z[labelled], g[labelled], h[labelled])
    cap = power_cap(h, max_overshoot)
    return _Power(min(raw, cap), raw, se, cap)


# ---- what the labels are worth


def wilson_interval(hits: int, n: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    share, q = hits / n, NORMAL_975**2 / n
    centre = (share + q / 2) / (1 + q)
    half = math.sqrt(q * share * (1 - share) + q**2 / 4) / (1 + q)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def agreement(z: np.ndarray, g: np.ndarray) -> dict[str, Any]:
    """Share of pairs on which two labels name the same image, over the pairs where neither is 0.5."""
    decided = (z != 0.5) & (g != 0.5)
    n = int(decided.sum())
    if n == 0:
        return {"value": None, "ci": None, "n": 0}
    hits = int(((z > 0.5) == (g > 0.5))[decided].sum())
    return {"value": hits / n, "ci": wilson_interval(hits, n), "n": n}


def judge_bias(z: np.ndarray, g: np.ndarray) -> dict[str, Any]:
    """Mean of g - z with its standard error and normal 95 % interval: a judge's lean towards image 0."""
    if len(z) == 0:
        return {"value": None, "se": None, "ci": None}
    value = float(np.mean(g - z))
    if len(z) == 1:
        return {"value": value, "se": None, "ci": None}
    se = float(np.std(g - z, ddof=1)) / math.sqrt(len(z))
    return {"value": value, "se": se, "ci": [value - NORMAL_975 * se, value + NORMAL_975 * se]}


def variance_ratio(sums: np.ndarray, power: float) -> np.ndarray:
    """1 - (2 lam c - lam^2 v) / s: the gradient's variance at margin 0, relative to human labels alone.

    Args:
        sums: (..., 3) sums of `judge_moments` over labelled pairs. Labelled at random this is
            1 - (1 - f)(2 lam c - lam^2 v) / s of plain moments.
        power: lam. By Cauchy-Schwarz the ratio is never below the least p.

    Returns:
        (...), NaN where every human label is a tie (s = 0).
    """
    c, v, s = np.moveaxis(sums, -1, 0)
    gain = 2 * power * c - power**2 * v
    return 1 - np.divide(gain, s, out=np.full_like(s, np.nan), where=s > 0)


def bootstrap_sums(terms: np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES, chunk: int = 100) -> np.ndarray:
    """Column sums of `resamples` bootstrap resamples of the rows of `terms` (n, k), as (resamples, k).

    Many rows are first summed in equal random groups, which are resampled instead: the same variance in bounded time.
    """
    if len(terms) > RESAMPLED_GROUPS:
        group = rng.permutation(len(terms)) % RESAMPLED_GROUPS
        terms = np.stack([np.bincount(group, weights=column, minlength=RESAMPLED_GROUPS) for column in terms.T], axis=1)
    n = len(terms)
    even = np.full(n, 1 / n)
    chunks = [rng.multinomial(n, even, size=min(chunk, resamples - done)) @ terms for done in range(0, resamples, chunk)]
    return np.concatenate(chunks)


def _worth_function(z: np.ndarray, g: np.ndarray, h: np.ndarray, seed: int) -> Callable[[float], dict[str, Any]]:
    """Effective human labels, n_l / variance ratio, as a function of the power; every power sees the same resamples."""
    terms = judge_moments(z, g, h)
    n = len(z)
    resampled = bootstrap_sums(terms, np.random.default_rng(seed)) if n > 1 else None

    def worth(power: float) -> dict[str, Any]:
        ratio = float(variance_ratio(terms.sum(axis=0), power))
        if not (math.isfinite(ratio) and ratio > 0):
            return _no_worth(n)
        ci = None
        if resampled is not None:
            ratios = variance_ratio(resampled, power)
            ci = [float(x) for x in np.quantile(n / ratios[np.isfinite(ratios)], [0.025, 0.975])]
        return {"value": n / ratio, "ci": ci, "n_human": n}

    return worth


def _no_worth(n_human: int) -> dict[str, Any]:
    return {"value": None, "ci": None, "n_human": n_human}


def _worths(z: np.ndarray, g: np.ndarray, h: np.ndarray, power: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Effective human labels at `power` (NaN: naive merging, none) and at power 1, for (N,) labels of all pairs."""
    labelled = ~np.isnan(z)
    n = int(labelled.sum())
    at_one = _no_worth(n)
    here = {"value": float(n), "ci": [float(n), float(n)], "n_human": n} if power == 0 else _no_worth(n)
    if n > 0 and not np.isnan(g).any():
        worth = _worth_function(z[labelled], g[labelled], h[labelled], seed)
        at_one = worth(1.0)
        here = worth(power) if power > 0 else here
    return here, at_one


# ---- the report


def _report(
    z: np.ndarray, g: np.ndarray, h: np.ndarray, target: np.ndarray, weight: np.ndarray, power: _Power, method: str, seed: int
) -> dict[str, Any]:
    labelled, naive = ~np.isnan(z), method == "naive"
    both = labelled & ~np.isnan(g)
    counted = weight > 0
    outside = counted & ((target < -1e-9) | (target > 1 + 1e-9))
    worth, worth_1 = _worths(z, g, h, power.used, seed)
    report: dict[str, Any] = {
        "method": method,
        "n": len(z),
        "n_human": int(labelled.sum()),
        "n_ties": int((z == 0.5).sum()),
        "labelled_share": float(labelled.mean()),
        "agreement": agreement(z[both], g[both]),
        "power": None if naive else power.used,
        "power_raw": power.raw,
        "power_se": power.se,
        "power_cap": power.cap,
        "overshoot": None if naive else float((h[labelled] / weight[labelled]).max()),
        "share_outside": float(outside.mean()),
        "max_abs_offset": float(np.abs(target - 0.5)[counted].max()),
        "judge_bias": judge_bias(z[both], g[both]),
        "effective_human_labels": worth,
        "effective_human_labels_power_1": worth_1,
    }
    return {**report, "sentences": [*_worth_sentences(report), *_judge_sentences(report), *_target_sentences(report)]}


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _worth_sentences(report: dict[str, Any]) -> list[str]:
    n, n_human, worth = report["n"], report["n_human"], report["effective_human_labels"]
    labels = f"{n_human} human and {n - n_human} judge labels"
    if report["method"] == "naive":
        return [
            f"The {labels} are trained on as if people had given them all: naive merging keeps the judge's bias, "
            "so no number of human labels is equal to it."
        ]
    if report["method"] == "human_only":
        return [f"Only the {n_human} human labels are used; {n - n_human} pairs have weight 0."]
    if worth["value"] is None:
        return [f"What these {labels} are worth cannot be told: every human label is a tie."]
    interval = f" (95 %: {_count(worth['ci'][0])} to {_count(worth['ci'][1])})" if worth["ci"] else ""
    text = f"These {labels} are worth about {_count(worth['value'])} human labels{interval}."
    published = report["effective_human_labels_power_1"]["value"]
    if report["power"] < 1 and published is not None:
        text += f" At power 1, as published, they would be worth {_count(published)}."
    if worth["value"] >= n_human * (1 - 1e-12):
        return [text]
    return [text, f"Warning: that is less than the {n_human} human labels alone; use method tuned."]


def _judge_sentences(report: dict[str, Any]) -> list[str]:
    known, bias = report["agreement"], report["judge_bias"]
    texts = []
    if known["value"] is not None:
        low, high = known["ci"]
        texts.append(f"The judge agrees with people on {known['value']:.1%} of {known['n']} pairs (95 %: {low:.1%} to {high:.1%}).")
        if known["value"] < 0.5:
            used = "its power is 0 and its labels are not used" if report["power"] == 0 else "yet its labels are used"
            texts.append(f"Warning: the judge agrees with people less often than a coin would, {used}; consider inverting it.")
    if bias["ci"] is not None and not bias["ci"][0] <= 0 <= bias["ci"][1]:
        side = 0 if bias["value"] > 0 else 1
        texts.append(f"The judge leans towards image {side}, by {abs(bias['value']):.3f} on average: does it see both orders of a pair?")
    return texts


def _target_sentences(report: dict[str, Any]) -> list[str]:
    texts = []
    if report["power_raw"] is not None:
        error = "" if report["power_se"] is None else f" (standard error {report['power_se']:.2f})"
        texts.append(f"The labels ask for a power of {report['power_raw']:.2f}{error}; {report['power']:.2f} is used.")
        if report["power"] < report["power_raw"]:
            texts.append(f"Warning: the power was capped so that no target is stretched by more than {report['overshoot']:.2f}.")
        elif report["power"] == 0:
            texts.append("The judge's labels are not used: at power 0 this is training on the human labels alone.")
    if report["share_outside"] > 0:
        furthest = report["max_abs_offset"]
        texts.append(f"{report['share_outside']:.1%} of the targets lie outside [0, 1], up to {furthest:.2f} from 0.5: do not clip them.")
    return texts


# ---- errors in the user's words


def _check_options(method: str, power: float | None, propensity: Any, max_overshoot: float) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if power is not None and method in ("human_only", "naive"):
        raise ValueError(f"method {method!r} takes no power: leave it out, or use method='tuned'")
    if power is not None and not 0 <= power <= 1:
        raise ValueError(f"power is {power}: it must lie in [0, 1], where 0 is human labels only and 1 is DeDPO as published")
    if propensity is not None and method == "naive":
        raise ValueError("method 'naive' takes no propensity: leave it out, or use another method")
    if not max_overshoot >= 1:
        raise ValueError(f"max_overshoot is {max_overshoot}: it must be at least 1, where 1 switches the judge off")


def _checked_labels(values: Any, name: str, remedy: str) -> np.ndarray:
    labels = np.asarray(values, dtype=np.float64)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{name} has shape {labels.shape}: it must be (N,), one label for each of N >= 1 pairs")
    bad = np.flatnonzero((labels < 0) | (labels > 1))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {labels[bad[0]]}: a label is the probability in [0, 1] that image 0 is preferred; {remedy}")
    return labels


def _check_present(z: np.ndarray, g: np.ndarray, method: str, no_judge: bool) -> None:
    if len(z) != len(g):
        raise ValueError(f"human has {len(z)} labels, synthetic {len(g)}: give both for the same pairs in the same order")
    if method != "naive" and np.isnan(z).all():
        raise ValueError(
            f"none of the {len(z)} pairs has a human label, and method {method!r} needs some: label pairs, or use method='naive'"
        )
    if method == "human_only":
        return
    if no_judge:
        raise ValueError(f"method {method!r} needs judge labels: pass synthetic, or use method='human_only'")
    missing = np.flatnonzero(np.isnan(g) & (np.isnan(z) if method == "naive" else True))
    if missing.size:
        raise ValueError(
            f"synthetic[{missing[0]}] is NaN, and method {method!r} needs a judge label for every pair: "
            "label that pair, or use method='human_only'"
        )
