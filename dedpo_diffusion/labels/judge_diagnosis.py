"""Where a judge errs: its labels held against people's, as numbers with intervals and as sentences.

A statistic is {"value", "ci", "n"}: the number or None where it does not exist, its 95 % interval or None, and the pairs it
rests on. Pairs of one prompt are no independent draws, so all intervals and tests go by prompts; Wilson's of a share are those of as
many independent pairs as tell it as well. Nothing depends on which image of a pair is called image 0, but for `side`, which asks that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logit
from scipy.stats import t as student

from dedpo_diffusion.debias import NORMAL_975, agreement, judge_bias, share_interval
from dedpo_diffusion.labels.agreement import share
from dedpo_diffusion.labels.calibration import (
    HELD,
    MIN_BIN,
    MIN_CLUSTERS,
    calibrate,
    calibration_error,
    equal_bins,
    log_losses,
    percentile_intervals,
    stated_confidence,
)
from dedpo_diffusion.labels.image_statistics import WORDS
from dedpo_diffusion.labels.warnings import holm

BINS = 10  # of the reliability diagram
MIN_CALIBRATED = 50  # pairs; fewer leave a fold too little to fit a temperature
MIN_WORD, MOST_WORD = 20, 0.8  # a word is looked at that stands in this many pairs, and in no larger share of them
MOST_VALUES = 12  # of a group column
LEVEL = 0.05
VISIBLE = 0.5  # of the root mean square difference: images that differ less are no fair question
ALIKE = 0.3  # correlation from which one statistic can go along with another
CHUNK = 1 << 20  # numbers drawn at once: bounds the memory
DULL = set("and are for from has have her his into its not one the that their this two was were with".split())  # noqa: SIM905


def diagnose(
    human: np.ndarray,
    judge: np.ndarray,
    *,
    scores: np.ndarray | None = None,
    prompts: Sequence[str],
    statistics: dict[str, np.ndarray],
    groups: dict[str, list[str]] | None = None,
    order_consistent: Sequence[bool | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Hold a judge's labels against people's.

    Args:
        human, judge: (N,) probabilities that image 0 is preferred; NaN where there is no answer, such pairs are left out.
        scores: (N, 2) the judge's raw scores, if it has any: what the temperature is fitted to, and what AUC ranks by.
        prompts: N.
        statistics: of each image, (N, 2), as of `image_statistics`.
        groups: further columns to split the pairs by, N each.
        order_consistent: N, whether the judge chose the same image in both orders; None where it was not asked.
        resamples, seed: of the bootstrap.

    Returns:
        JSON-ready: counts `n`, `prompts`, `ties` (either says 0.5); `agreement`; `auc` of a decided human answer by the judge's
        score, both orders of each pair taken; `log_loss` in nats (`held`: labels held within 1e-6 of 0 and 1);
        `calibration_error` (mean distance of confidence and agreement over bins of equal size; `by_chance`: what a calibrated
        judge would show), mean `confidence`, `right` (mean human agreement with it), `histogram` of confidence (ten equal
        parts of 0.5 to 1), `reliability` (the bins); `order_consistency`; `side` (`bias` to image 0, agreement where people
        chose `image_0`, `image_1`); agreement `by_margin` (fifths of |label - 0.5|), `by_word` and `by_length` of the prompt,
        `by_group`, and `by_statistic`, for each in which images differ (`by_difference`, fifths of the difference's size; where
        people `chose_higher`, `chose_lower`, over the pairs that differ visibly: a lean sets the two apart); `leans`, with
        `compared` (which labels they are of); and `sentences`.

    Raises:
        ValueError: no pair has both labels.
    """
    kept = ~(np.isnan(human) | np.isnan(judge))
    rows = np.flatnonzero(kept).tolist()
    if not rows:
        raise ValueError("no pair has both a human and a judge label")
    z, g = human[kept], judge[kept]
    said = [prompts[row] for row in rows]
    d = np.round(logit(np.clip(g, HELD, 1 - HELD)), 9)  # rounded so that p and 1 - (1 - p) are equal
    if scores is not None and np.isfinite(apart := scores[kept, 0] - scores[kept, 1]).all():
        d = apart
    sample = _Sample(np.unique(np.array(said), return_inverse=True)[1], resamples, seed)
    report: dict[str, Any] = {"n": len(z), "prompts": sample.units, "ties": int(((z == 0.5) | (g == 0.5)).sum())}
    report |= {"agreement": agreement(z, g, clusters=sample.unit), "auc": _auc(z, d, sample), "log_loss": _log_loss(z, g, sample)}
    report |= _confidence(z, g, sample) | {
        "order_consistency": _order(order_consistent, rows, sample.unit),
        "side": _side(z, g, sample.unit),
    }
    x = {name: values[kept, 0] - values[kept, 1] for name, values in statistics.items()}
    x = {name: apart for name, apart in x.items() if apart.any()}
    report["by_statistic"] = {name: _by_difference(z, g, apart, sample.unit) for name, apart in x.items()}
    report |= _by(z, g, said, {name: np.array(values, dtype=object)[kept] for name, values in (groups or {}).items()}, sample)
    fair, report["compared"] = _comparable(z, g, d, said, report["agreement"]["value"], seed)
    report["leans"] = _leans(z, fair, x, sample)
    return report | {"sentences": _sentences(report)}


# ---- intervals and tests that go by prompts


@dataclass(frozen=True)
class _Sample:
    """Which prompt each pair belongs to, (N,), and how to resample the prompts."""

    unit: np.ndarray
    resamples: int
    seed: int

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def draws(self) -> Iterator[np.ndarray]:
        """How often each of N pairs is drawn, (R, N) at a time; the same draws every time."""
        rng, size = np.random.default_rng(self.seed), max(1, CHUNK // len(self.unit))
        even = np.full(self.units, 1 / self.units)
        for done in range(0, self.resamples, size):
            yield rng.multinomial(self.units, even, size=min(size, self.resamples - done)).astype(np.float64)[:, self.unit]

    def ratio_intervals(self, above: np.ndarray, below: np.ndarray) -> list[list[float] | None]:
        """Percentile intervals of K ratios of sums; `above`, `below` (N, K)."""
        if self.units < MIN_CLUSTERS:
            return [None] * above.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return percentile_intervals(np.concatenate([(drawn @ above) / (drawn @ below) for drawn in self.draws()]))

    def errors(self, influence: np.ndarray) -> np.ndarray:
        """Standard errors, (K,), of K sums of influences (N, K), prompts being independent."""
        sums = np.stack([np.bincount(self.unit, column) for column in influence.T], axis=1)
        return np.sqrt(self.units / max(self.units - 1, 1) * (sums**2).sum(axis=0))

    def prompts(self, rows: np.ndarray) -> np.ndarray:
        """How many prompts the rows of each column of (N, K) come from, (K,)."""
        return np.array([len(np.unique(self.unit[column])) for column in rows.T])

    def p_values(self, values: np.ndarray, influence: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Two-sided p, (K,), that values are 0, by Student's t on so many prompts (K,); 1 where they are too few."""
        with np.errstate(invalid="ignore", divide="ignore"):
            p = 2 * student.sf(np.abs(values) / self.errors(influence), np.maximum(prompts - 1, 1))
        return np.where((prompts < MIN_CLUSTERS) | np.isnan(p), 1.0, p)


# ---- how good the labels are


def _auc(z: np.ndarray, d: np.ndarray, sample: _Sample) -> dict[str, Any]:
    """Area under the ROC curve of the data (d, y) and their mirror image (-d, 1 - y), over pairs where people decided.

    With e = d for y = 1 and -d for y = 0, positives are e and negatives -e, so the area is the share of e_i + e_j > 0.
    """
    decided = z != 0.5
    e = np.where(z > 0.5, d, -d)[decided]
    if not len(e):
        return {"value": None, "ci": None, "n": 0}
    order = np.argsort(e)
    low, high = (np.searchsorted(e[order], -e[order], side=side) for side in ("left", "right"))

    def area(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, decided][:, order]
        below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1)], axis=1)
        beaten = below[:, -1:] - (below[:, low] + below[:, high]) / 2
        with np.errstate(invalid="ignore"):
            return (weights * beaten).sum(axis=1) / below[:, -1] ** 2

    ci = None
    if sample.units >= MIN_CLUSTERS:
        ci = percentile_intervals(np.concatenate([area(drawn) for drawn in sample.draws()])[:, None])[0]
    return {"value": float(area(np.ones((1, len(z))))[0]), "ci": ci, "n": len(e)}


def _log_loss(z: np.ndarray, g: np.ndarray, sample: _Sample) -> dict[str, Any]:
    loss = log_losses(g, z)[:, None]
    ci = sample.ratio_intervals(loss, np.ones_like(loss))[0]
    return {"value": float(loss.mean()), "ci": ci, "n": len(z), "held": int(((g < HELD) | (g > 1 - HELD)).sum())}


def _confidence(z: np.ndarray, g: np.ndarray, sample: _Sample) -> dict[str, Any]:
    """Stated confidence against people's answers; a human tie counts half.

    The calibration error is enlarged by chance, and resampling enlarges it once more. So its interval is the spread of its
    resamples about their median, moved to its value: how far this figure might differ on other such prompts, chance included
    (`by_chance` is what to hold it against), not where the error lies that endless pairs would show.
    """
    confidence, right = stated_confidence(g, z)
    bins = equal_bins(confidence, min(BINS, len(z) // MIN_BIN))
    inside = np.stack([np.bincount(rows, minlength=len(z)) for rows in bins], axis=1).astype(np.float64)
    error = calibration_error(g, z, bins=BINS) | {"ci": None}
    if sample.units >= MIN_CLUSTERS:
        drawn = [np.abs(drawn * (confidence - right) @ inside).sum(axis=1) / drawn.sum(axis=1) for drawn in sample.draws()]
        low, middle, high = np.quantile(np.concatenate(drawn), [0.025, 0.5, 0.975])
        error["ci"] = [max(0.0, error["value"] - float(middle - low)), error["value"] + float(high - middle)]
    reliability = [
        {"confidence": float(confidence[rows].mean()), "observed": float(right[rows].mean()),
         "ci": share_interval(right[rows], sample.unit[rows]), "n": len(rows)} for rows in bins
    ]  # fmt: skip
    return {
        "calibration_error": error,
        "confidence": float(confidence.mean()),
        "right": float(right.mean()),
        "histogram": np.histogram(confidence, bins=BINS, range=(0.5, 1))[0].tolist(),
        "reliability": reliability,
    }


def _order(consistent: Sequence[bool | None] | None, rows: list[int], unit: np.ndarray) -> dict[str, Any]:
    said = [None if consistent is None else consistent[row] for row in rows]
    asked = [k for k, same in enumerate(said) if same is not None]
    return share(np.array([said[k] for k in asked], dtype=bool), unit[asked])


def _agreement(z: np.ndarray, g: np.ndarray, rows: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    return agreement(z[rows], g[rows], clusters=unit[rows])


def _side(z: np.ndarray, g: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    chose = {"image_0": z > 0.5, "image_1": z < 0.5}
    return {"bias": judge_bias(z, g, clusters=unit), **{name: _agreement(z, g, rows, unit) for name, rows in chose.items()}}


# ---- agreement by what the pairs are


def _by(z: np.ndarray, g: np.ndarray, prompts: list[str], groups: dict[str, np.ndarray], sample: _Sample) -> dict[str, Any]:
    margin, length = np.abs(g - 0.5), np.array([len(prompt.split()) for prompt in prompts], dtype=np.float64)
    words = [set(re.findall(r"[^\W\d_]{3,}", prompt.lower())) - DULL for prompt in prompts]
    counts = Counter(word for found in words for word in found)
    asked = sorted(word for word, n in counts.items() if MIN_WORD <= n <= MOST_WORD * len(z))
    parts = {
        name: {value: values == value for value, _ in Counter(values.tolist()).most_common(MOST_VALUES)} for name, values in groups.items()
    }
    return {
        "by_margin": _ranges(z, g, margin, equal_bins(margin, 5), sample.unit),
        "by_length": _ranges(z, g, length, equal_bins(length, 4), sample.unit),
        "by_word": _split(z, g, {word: np.array([word in found for found in words]) for word in asked}, sample),
        "by_group": {name: _split(z, g, of_name, sample) for name, of_name in parts.items()},
    }


def _ranges(z: np.ndarray, g: np.ndarray, values: np.ndarray, bins: list[np.ndarray], unit: np.ndarray) -> list[dict[str, Any]]:
    ends = [{"low": float(values[rows].min()), "high": float(values[rows].max())} for rows in bins]
    return [end | _agreement(z, g, rows, unit) for end, rows in zip(ends, bins, strict=True)]


def _by_difference(z: np.ndarray, g: np.ndarray, apart: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    """Agreement by a statistic's difference s_0 - s_1, (N,)."""
    towards = (z - 0.5) * _visible(apart)
    return {
        "by_difference": _ranges(z, g, np.abs(apart), equal_bins(np.abs(apart), 5), unit),
        "chose_higher": _agreement(z, g, towards > 0, unit),
        "chose_lower": _agreement(z, g, towards < 0, unit),
    }


def _visible(apart: np.ndarray) -> np.ndarray:
    """Signs of differences (N,) or (N, K), 0 where they are too small to be seen."""
    return np.where(np.abs(apart) >= VISIBLE * np.sqrt((apart**2).mean(axis=0)), np.sign(apart), 0.0)


def _split(z: np.ndarray, g: np.ndarray, parts: dict[str, np.ndarray], sample: _Sample) -> list[dict[str, Any]]:
    """Agreement within each part (N,) of the pairs, worst first; `others` is that elsewhere, `p` of a chance is Holm-corrected."""
    if not parts:
        return []
    decided = ((z != 0.5) & (g != 0.5))[:, None]
    inside = np.stack(list(parts.values()), axis=1) & decided
    outside = ~inside & decided
    hit = ((z > 0.5) == (g > 0.5)).astype(np.float64)[:, None]
    n_in, n_out = (np.maximum(rows.sum(axis=0), 1) for rows in (inside, outside))
    mean_in, mean_out = (hit * inside).sum(axis=0) / n_in, (hit * outside).sum(axis=0) / n_out
    influence = inside * (hit - mean_in) / n_in - outside * (hit - mean_out) / n_out
    p = holm(sample.p_values(mean_in - mean_out, influence, np.minimum(sample.prompts(inside), sample.prompts(outside))))
    found = [
        {"is": name}
        | _agreement(z, g, rows, sample.unit)
        | {"others": float(mean_out[k]) if outside[:, k].any() else None, "p": float(p[k])}
        for k, (name, rows) in enumerate(parts.items())
    ]
    return sorted((entry for entry in found if entry["n"]), key=lambda entry: entry["value"])


# ---- leans


def _comparable(z: np.ndarray, g: np.ndarray, d: np.ndarray, prompts: list[str], agrees: float | None, seed: int) -> tuple[np.ndarray, str]:
    """The judge's labels with the confidence that they deserve, so that mere over-confidence is no lean; and how that was done."""
    if np.isin(g, (0.0, 0.5, 1.0)).all():
        return g, "its choices as they are, since hard answers state no confidence"
    if agrees is None or agrees <= 0.5:
        return g, "its labels as they are, since it agrees with people no more often than a coin"
    if len(z) < MIN_CALIBRATED or len(set(prompts)) < MIN_CLUSTERS:
        return g, "its labels as they are, since there are too few pairs to calibrate them"
    fitted = calibrate(d[:, None], z, method="temperature", folds=5, groups=prompts, invert=False, seed=seed)
    return np.asarray(fitted.probability), "its labels after calibration by one temperature, fitted on other pairs"


def _leans(z: np.ndarray, g: np.ndarray, differences: dict[str, np.ndarray], sample: _Sample) -> list[dict[str, Any]]:
    """The judge's lean to the image with the higher value of each statistic, relative to people.

    Args:
        z, g: (N,) human and judge labels.
        differences: s_0 - s_1 of each statistic in which images differ, (N,).

    Returns:
        For each statistic: `value`, the mean of (g - z) * sign(s_0 - s_1) over the `n` pairs that differ
        visibly in it, with `ci`; `people` and `judge`, the mean label for the image with the higher value; `p`, corrected for
        all statistics; `joint`, the coefficient (per standard deviation) in a regression on all of them; `named`, whether p
        is below 0.05; `kind` of a named one: likes (the judge prefers that image itself), else overlooks (people dislike it
        more); `follows`, the named one that it goes along with, if its own coefficient adds nothing. Most telling first.
    """
    if not differences:
        return []
    x = np.stack(list(differences.values()), axis=1)
    sign = _visible(x)
    differ = np.abs(sign)
    n = differ.sum(axis=0)
    error, preferred = (g - z)[:, None] * sign, (g - 0.5)[:, None] * sign
    value, judge = error.sum(axis=0) / n, preferred.sum(axis=0) / n
    intervals = sample.ratio_intervals(error, differ)
    prompts = sample.prompts(differ > 0)
    raw_p = sample.p_values(value, (error - value * differ) / n, prompts)
    p, tested = np.ones(len(n)), prompts >= MIN_CLUSTERS
    p[tested] = holm(raw_p[tested])
    likes = (judge * value > 0) & (sample.p_values(judge, (preferred - judge * differ) / n, prompts) < LEVEL)
    joint, own, alike = _joint(g - z, x, sample)
    follows = _followers(p < LEVEL, likes, own, joint, raw_p, alike * np.outer(np.sign(value), np.sign(value)))
    leans = []
    for k, name in enumerate(differences):
        lean = {"statistic": name, "value": float(value[k]), "ci": intervals[k] if tested[k] else None, "n": int(n[k])}
        lean |= {"people": float(0.5 + judge[k] - value[k]), "judge": float(0.5 + judge[k]), "p": float(p[k]), "joint": joint[k]}
        lean |= {"named": bool(p[k] < LEVEL), "kind": ("likes" if likes[k] else "overlooks") if p[k] < LEVEL else None}
        leans.append(lean | {"follows": list(differences)[follows[k]] if k in follows else None})
    return sorted(leans, key=_telling)


def _telling(lean: dict[str, Any]) -> tuple[bool, bool, bool, float]:
    """What to say first: what random errors cannot look like, then what is strongest by itself."""
    return not lean["named"], lean["follows"] is not None, lean["kind"] != "likes", -abs(lean["joint"]["value"])


def _joint(error: np.ndarray, x: np.ndarray, sample: _Sample) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Least squares of the error (N,) on all differences (N, K) at once, without intercept since sides mean nothing.

    Returns:
        Statistics of the K coefficients; whether each differs from 0, (K,); and the correlations of the differences (K, K).
    """
    x = x / np.sqrt((x**2).mean(axis=0))
    inverse = np.linalg.pinv(x.T @ x, hermitian=True)
    slope = inverse @ (x.T @ error)
    influence = x * (error - x @ slope)[:, None] @ inverse
    half = NORMAL_975 * sample.errors(influence)
    ends = np.stack([slope - half, slope + half], axis=1).tolist() if sample.units >= MIN_CLUSTERS else [None] * len(slope)
    found = [{"value": float(b), "ci": ci, "n": len(x)} for b, ci in zip(slope, ends, strict=True)]
    return found, sample.p_values(slope, influence, np.full(len(slope), sample.units)) < LEVEL, x.T @ x / len(x)


def _followers(
    named: np.ndarray, likes: np.ndarray, own: np.ndarray, joint: list[dict[str, Any]], p: np.ndarray, alike: np.ndarray
) -> dict[int, int]:
    """Which named statistics (rows) go along with which other: alike, and without a coefficient of their own beside it."""
    rank = sorted(np.flatnonzero(named).tolist(), key=lambda k: (not likes[k], not own[k], -abs(joint[k]["value"]) if own[k] else p[k]))
    leaders: list[int] = []
    follows = {}
    for k in rank:
        nearest = max(leaders, key=lambda j: alike[k, j], default=k)
        if nearest != k and alike[k, nearest] >= ALIKE and not own[k]:
            follows[k] = nearest
        else:
            leaders.append(k)
    return follows


# ---- in words


def _interval(stat: dict[str, Any], form: str) -> str:
    return "" if stat["ci"] is None else f" (95 %: {format(stat['ci'][0], form)} to {format(stat['ci'][1], form)})"


def _sentences(report: dict[str, Any]) -> list[str]:
    """Four to eight plain lines, what matters most first."""
    known = report["agreement"]
    if known["value"] is None:
        return ["On no pair do both the judge and people name an image, so nothing can be said of the judge."]
    first = f"The judge agrees with people on {known['value']:.1%} of {known['n']} pairs{_interval(known, '.1%')}."
    if known["value"] < 0.5 and known["ci"] is not None and known["ci"][1] >= 0.5:
        first = f"{first} That is no better than a coin, as far as so few answers tell."
    elif known["value"] < 0.5:
        first = f"Warning: it agrees less often than a coin would; `dedpo calibrate --invert true` can turn it round. {first}"
    return [first, *_lean_sentences(report), *_part_sentences(report), *_confidence_sentences(report), *_side_sentences(report)]


def lean_phrase(lean: dict[str, Any]) -> str:
    """The image that a lean of `diagnose` is to, in words."""
    name = lean["statistic"]
    high, low = WORDS.get(name, (f"the image with the higher {name}", f"the image with the lower {name}"))
    return high if lean["value"] > 0 else low


def _lean_sentences(report: dict[str, Any]) -> list[str]:
    tested, named = ([lean for lean in report["leans"] if lean[key]] for key in ("ci", "named"))
    if not tested:
        return [f"Whether the judge leans to a kind of image is unknown: too few pairs differ visibly, or of under {MIN_CLUSTERS} prompts."]
    if not named:
        reach = np.median([(lean["ci"][1] - lean["ci"][0]) / 2 for lean in tested])
        found = f"No lean to a kind of image was found, relative to people ({len(tested)} statistics looked at)"
        return [f"{found}; on so many pairs a lean below about {1.5 * reach:.2f} may go unseen."]
    leaders = [lean for lean in named if lean["follows"] is None]
    texts = [_lean_sentence(lean, [other for other in named if other["follows"] == lean["statistic"]], report) for lean in leaders[:2]]
    also = f"It leans to {', '.join(lean_phrase(lean) for lean in leaders[2:])} too. " if leaders[2:] else ""
    reading = "A lean means that it over-rates that image compared with people, by liking it or by overlooking what they dislike in it"
    return [*texts, f"{also}{reading}. Compared: {report['compared']}."]


def _lean_sentence(lean: dict[str, Any], followers: list[dict[str, Any]], report: dict[str, Any]) -> str:
    up = lean["value"] > 0
    people, judge = ((lean[who] if up else 1 - lean[who]) for who in ("people", "judge"))
    size = {"ci": lean["ci"] if up or lean["ci"] is None else [-lean["ci"][1], -lean["ci"][0]]}
    by = f"by {abs(lean['value']):.2f}{_interval(size, '.2f')} of a probability"
    why = "it likes it" if lean["kind"] == "likes" else "it overlooks what they dislike in it, or errs at random"
    along = ", ".join(f"{other['statistic']} ({other['value']:+.2f})" for other in followers)
    why += f". Along with it go {along}" if along else ""
    text = f"The judge leans to {lean_phrase(lean)}, relative to people: {by}. People give it {people:.2f}, the judge {judge:.2f}: {why}."
    split = report["by_statistic"][lean["statistic"]]
    chosen, other = (split[f"chose_{which}"]["value"] for which in (("higher", "lower") if up else ("lower", "higher")))
    if chosen is None or other is None:
        return text
    return f"{text} Where people chose that image it agrees with them on {chosen:.0%}, where they chose the other on {other:.0%}."


def _part_sentences(report: dict[str, Any]) -> list[str]:
    """The part of the pairs with the least agreement, if that is not chance."""
    parts = [(f"the prompt says {entry['is']!r}", entry, len(report["by_word"])) for entry in report["by_word"]]
    for column, entries in report["by_group"].items():
        parts += [(f"{column} is {entry['is']}", entry, len(entries)) for entry in entries]
    worst = [part for part in parts if part[1]["p"] < LEVEL and part[1]["value"] < part[1]["others"]]
    if not worst:
        return []
    where, entry, among = min(worst, key=lambda part: part[1]["value"])
    found = f"{entry['value']:.0%} of {entry['n']} pairs{_interval(entry, '.0%')}, elsewhere on {entry['others']:.0%}"
    return [f"It agrees least where {where}: on {found} (the worst of {among} looked at, which the test allows for)."]


def _confidence_sentences(report: dict[str, Any]) -> list[str]:
    error, stated, right, margins = report["calibration_error"], report["confidence"], report["right"], report["by_margin"]
    off = bool(error["ci"]) and error["ci"][0] > error["by_chance"]
    sure = "" if not off else ": it is over-confident" if stated > right else ": it is too cautious"
    error_words = f"calibration error {error['value']:.3f}; {error['by_chance']:.3f} would be chance"
    texts = [f"On average it states {stated:.0%} confidence and people agree with {right:.0%}{sure} ({error_words})."]
    least, most = margins[0]["value"], margins[-1]["value"]
    if len(margins) > 1 and least is not None and most is not None:
        texts.append(f"Where it is least sure it agrees with people on {least:.0%}, where it is surest on {most:.0%}.")
    return texts


def _side_sentences(report: dict[str, Any]) -> list[str]:
    order, bias, texts = report["order_consistency"], report["side"]["bias"], []
    if order["value"] is not None:
        texts.append(f"It chose the same image in both orders in {order['value']:.0%} of {order['n']} pairs{_interval(order, '.0%')}.")
    if bias["ci"] is not None and not bias["ci"][0] <= 0 <= bias["ci"][1]:
        side = 0 if bias["value"] > 0 else 1
        texts.append(f"It leans to image {side} by {abs(bias['value']):.3f} on average: does it see both orders of a pair?")
    return texts
