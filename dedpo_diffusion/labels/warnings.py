"""What should make a person doubt merged labels: pure functions of arrays, each warning a dict with its `kind` and its `text`.

Labels not taken at random, a judge that seems to have learned from the human labels, targets stretched too far.
A warning is a reason to look, no proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dedpo_diffusion.core.sample_size import effective_size
from dedpo_diffusion.core.tables import categories

LEVEL = 0.01  # of a test, after Holm's correction for all columns
FEW = 20  # different numbers; a column with no more is compared value by value
MOST = 50  # values of a column of texts; one with more tells nothing
SAMPLE = 100_000  # pairs; of more, so many are drawn: what matters shows in these
EXPECTED = 5.0  # labelled pairs; rarer values are counted together
WEIGHTED = 10.0  # the same where labelled pairs are weighted
STRETCH = 2.0  # overshoot beyond which a policy can run away by memorising single pairs


# ---- are labels taken at random?


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """P-values (T,) corrected for T tests: reject those at most the level, and the chance of any false one is at most the level."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def unlike(labelled: np.ndarray, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the labelled pairs with the others, column by column.

    Numbers of many values are compared by the two-sample Kolmogorov-Smirnov test, others value by value (chi-square; rare
    values together). The p-values are corrected for the number of columns (Holm). Pairs count as independent: where whole
    prompts are labelled together the tests are too strict. Of more than 100,000 pairs
    so many are compared, drawn at random with a fixed seed.

    Args:
        labelled: (N,) bool.
        columns: names and (N,) values, numbers (not finite or None: unknown) or texts.

    Returns:
        {column, test, p, labelled, others, value} for each column that can be compared, smallest p first: p corrected;
        `labelled` and `others` the means, or the shares of the `value` that differs most. Columns with one value, or with more
        than 50 texts, are left out.
    """
    rows = _sample(len(labelled))
    return _by_column(columns, lambda values: _compare(labelled[rows], values[rows]))


def _sample(pairs: int) -> np.ndarray:
    rows = np.arange(pairs)
    return rows if pairs <= SAMPLE else np.random.default_rng(0).choice(rows, SAMPLE, replace=False)


def _by_column(columns: Mapping[str, Any], test: Callable[[np.ndarray], dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The test of every column that can be compared, smallest p first, corrected for their number."""
    tested = {name: test(np.asarray(values)) for name, values in columns.items()}
    found = [{"column": name} | entry for name, entry in tested.items() if entry is not None]
    corrected = holm([entry["p"] for entry in found])
    return sorted(({**entry, "p": float(p)} for entry, p in zip(found, corrected, strict=True)), key=lambda entry: entry["p"])


def _compare(labelled: np.ndarray, values: np.ndarray) -> dict[str, Any] | None:
    if values.dtype.kind in "fiub":
        numbers = values.astype(np.float64)
        known = np.isfinite(numbers)
        if len(np.unique(numbers[known])) > FEW:
            return _kolmogorov(labelled[known], numbers[known])
    return _chi_square(labelled, values)


def _kolmogorov(labelled: np.ndarray, numbers: np.ndarray) -> dict[str, Any] | None:
    from scipy.stats import ks_2samp

    if not 0 < labelled.sum() < len(labelled):
        return None
    p = float(ks_2samp(numbers[labelled], numbers[~labelled], method="asymp").pvalue)
    here, there = float(numbers[labelled].mean()), float(numbers[~labelled].mean())
    return {"test": "kolmogorov-smirnov", "p": p, "labelled": here, "others": there, "value": None}


def _chi_square(labelled: np.ndarray, values: np.ndarray) -> dict[str, Any] | None:
    """Chi-square of value against labelled."""
    from scipy.stats import chi2

    names, code = categories(values)
    if not 2 <= len(names) <= MOST:
        return None
    counts = np.bincount(labelled * len(names) + code, minlength=2 * len(names)).reshape(2, -1)
    table = _without_rare(counts)
    if table.shape[1] < 2:
        return None
    expected = table.sum(axis=0) * table.sum(axis=1)[:, None] / table.sum()
    p = float(chi2.sf(float(np.sum((table - expected) ** 2 / expected)), table.shape[1] - 1))
    others, mine = (row / row.sum() for row in counts)
    place = int(np.argmax(np.abs(mine - others)))
    return {"test": "chi-square", "p": p, "labelled": float(mine[place]), "others": float(others[place]), "value": names[place]}


def _without_rare(table: np.ndarray) -> np.ndarray:
    """(2, values) counts with all values together whose expected count in either row is small; empty ones are dropped."""
    if not table.any(axis=1).all():
        return np.zeros((2, 0))
    rows = table.sum(axis=1)
    rare = table.sum(axis=0) * rows.min() / rows.sum() < EXPECTED
    together = table[:, rare].sum(axis=1, keepdims=True)
    kept = np.concatenate([table[:, ~rare], together], axis=1)
    if together.sum() * rows.min() / rows.sum() < 1:  # too rare even together
        kept = table[:, ~rare]
    return kept[:, kept.sum(axis=0) > 0]


def unbalanced(labelled: np.ndarray, h: np.ndarray, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Do the labelled pairs, weighted by their inverse propensities, resemble all pairs? Compared column by column.

    Numbers of many values are cut into five groups of equal size. The weighted share of every value less its share of all
    pairs has the mean 0 if the propensities are right, and the variance of pairs labelled one by one with them: a Wald test.
    Where propensities were estimated from the column, the test is cautious. The rest is as in `unlike`.

    Args:
        labelled: (N,) bool.
        h: (N,) inverse propensities of mean 1, 0 where unlabelled.
        columns: as in `unlike`.

    Returns:
        As `unlike`; `labelled` is weighted, and `others` is of all pairs.
    """
    rows = _sample(len(labelled))
    return _by_column(columns, lambda values: _balance(labelled[rows], h[rows], values[rows]))


def _balance(labelled: np.ndarray, h: np.ndarray, values: np.ndarray) -> dict[str, Any] | None:
    from scipy.stats import f

    w = h[labelled] / h[labelled].sum()
    numbers = values.astype(np.float64) if values.dtype.kind in "fiub" else np.full(len(values), np.nan)
    known = np.isfinite(numbers)
    if len(np.unique(numbers[known])) > FEW:
        code = np.where(known, np.searchsorted(np.quantile(numbers[known], [0.2, 0.4, 0.6, 0.8]), numbers), 5)
        names: list[str] = []
    else:
        names, code = categories(values)
    share = np.bincount(code) / len(code)
    if not 2 <= np.count_nonzero(share) <= MOST:
        return None
    parts = w**2 * np.maximum(1 - 1 / h[labelled], 0.0)  # of the variance
    alike = 1 / float(w @ w)  # so many tell the shares as well
    common = np.flatnonzero(share * alike >= WEIGHTED)
    if len(common) and 1e-9 < (1 - share[common].sum()) * alike < WEIGHTED:  # too rare even together: with the next value
        common = np.delete(common, np.argmin(share[common]))
    left = (code[labelled][:, None] == common) - share[common]
    off, covariance = w @ left, (left * parts[:, None]).T @ left
    freedom = int(np.linalg.matrix_rank(covariance, hermitian=True, rtol=1e-9)) if len(common) else 0
    if freedom == 0:
        return None
    statistic = float(off @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ off)
    known_by = effective_size(parts)  # so many labels of equal weight know the variance as well: Satterthwaite
    spare = max(1.0, known_by - freedom)
    p = float(f.sf(statistic / freedom * spare / max(1.0, known_by - 1), freedom, spare))  # as Hotelling's, for few labels
    if not names:
        mine = known[labelled]
        here, there = float(np.average(numbers[labelled][mine], weights=w[mine])), float(numbers[known].mean())
        return {"test": "balance", "p": p, "labelled": here, "others": there, "value": None}
    place = int(np.argmax(np.abs(off)))
    every = float(share[common[place]])
    return {"test": "balance", "p": p, "labelled": every + float(off[place]), "others": every, "value": names[common[place]]}


def unlike_warnings(compared: Sequence[dict[str, Any]], *, remedy: str) -> list[dict[str, Any]]:
    """One warning for each column in which labelled pairs differ from the others beyond chance.

    Args:
        compared: of `unlike` or `unbalanced`.
        remedy: what to do about it.
    """
    return [
        {"kind": "not_at_random", **entry, "text": f"Warning: {_difference(entry)}; {remedy}."}
        for entry in compared if entry["p"] <= LEVEL
    ]  # fmt: skip


def _difference(entry: dict[str, Any]) -> str:
    chance = "p < 0.0001" if entry["p"] < 1e-4 else f"p = {entry['p']:.2g}"
    if entry["value"] is None:
        numbers = f"mean {entry['labelled']:.3g} against {entry['others']:.3g}"
    else:
        whom = "all pairs" if entry["test"] == "balance" else "the others"
        numbers = f"{entry['value']!r} is {entry['labelled']:.1%} of them and {entry['others']:.1%} of {whom}"
    told = f"{entry['column']} ({numbers}; {chance})"
    if entry["test"] == "balance":
        return f"pairs with a human label, weighted by their propensities, still differ from all pairs in {told}"
    return f"pairs with a human label differ from the others in {told}, so they do not look taken at random"


# ---- has the judge seen the answers?


def seen_human_labels(z: np.ndarray, g: np.ndarray, *, name: str = "the judge") -> dict[str, Any] | None:
    """Does a judge seem to have learned from these human labels?

    Two things must hold, each at the level 0.01 one-sided: it is surer (|g - 0.5|, Mann-Whitney) of labelled pairs than of others,
    and it agrees with people on them beyond what its confidence on the others promises (mean of max(g, 1 - g)). A judge that
    answers 0 or 1 alone cannot be told; people who were asked about easy pairs look the same.

    Args:
        z: (N,) human labels, NaN where there is none.
        g: (N,) the judge's, NaN where there is none.
        name: of the judge.

    Returns:
        The warning, with `agreement`, `promised`, `p_surer` and `p_agrees`; None if there is none, or nothing to compare.
    """
    from scipy.stats import mannwhitneyu, norm

    answered = ~np.isnan(g)
    labelled, others = answered & ~np.isnan(z), answered & np.isnan(z)
    decided = labelled & (z != 0.5) & (g != 0.5)
    n = int(decided.sum())
    if n < 2 or others.sum() < 2:
        return None
    sure = np.abs(g - 0.5)
    if np.ptp(sure[answered]) == 0:
        return None
    p_surer = float(mannwhitneyu(sure[labelled], sure[others], alternative="greater", method="asymptotic").pvalue)
    promises = 0.5 + sure[others]
    promised, agreed = float(promises.mean()), float(((z > 0.5) == (g > 0.5))[decided].mean())
    error = math.sqrt(max(promised * (1 - promised), 1e-6) / n + float(promises.var()) / len(promises))
    p_agrees = float(norm.sf((agreed - promised) / error))
    if max(p_surer, p_agrees) > LEVEL:
        return None
    text = (
        f"Warning: {name} agrees with people on {agreed:.1%} of the pairs that they labelled, where its confidence on the others "
        f"promises {promised:.1%}, and is surer of them: it seems to have learned from these human labels, and then merging is biased; "
        "use a judge that has not seen them (`dedpo calibrate` and judge self are cross-fitted), or --method human_only."
    )
    return {
        "kind": "seen",
        "judge": name,
        "agreement": agreed,
        "promised": promised,
        "p_surer": p_surer,
        "p_agrees": p_agrees,
        "text": text,
    }


# ---- targets


def overshoot_warnings(target: np.ndarray, weight: np.ndarray, overshoot: float | None) -> list[dict[str, Any]]:
    """A warning if labelled targets are stretched by more than 2 from the judge's label.

    Args:
        target: (N,) merged targets.
        weight: (N,) their weights; pairs of weight 0 do not count.
        overshoot: the largest stretch A; None where there is none.
    """
    if overshoot is None or overshoot <= STRETCH * (1 + 1e-9):
        return []
    counted = target[weight > 0]
    outside = float(((counted < -1e-9) | (counted > 1 + 1e-9)).mean())
    if outside == 0:
        return []
    low, high = float(counted.min()), float(counted.max())
    text = (
        f"Warning: targets are stretched by up to {overshoot:.2f}: {outside:.1%} lie outside [0, 1], from {low:.2f} to {high:.2f}; "
        "a policy that memorises single pairs can run away. Use method tuned, whose stretch is bounded by --max_overshoot, or a "
        "smaller --power."
    )
    return [{"kind": "overshoot", "overshoot": overshoot, "share_outside": outside, "lowest": low, "highest": high, "text": text}]


# ---- are there enough?

FAR_TOO_FEW, FEWER = 20, 100  # human labels: below the first a power is a guess, the second are a good start


def few_labels_warnings(n: int, *, judged: bool) -> list[dict[str, Any]]:
    """A warning if there are few human labels, with how well any share of them is known.

    Args:
        n: human labels, 1 or more.
        judged: whether a judge's labels are used on what these say of it.
    """
    if n >= FEWER:
        return []
    points = 98 / math.sqrt(n)  # half of the widest 95 % interval of a share, in percentage points
    few, rough = ("far too few", "little more than guesses") if n < FAR_TOO_FEW else ("few", "rough")
    what = f"the judge's agreement and the power are {rough}" if judged else "which image people prefer is known roughly"
    text = (
        f"Warning: {n} human label{'s are' if n > 1 else ' is'} {few}: a share of that many answers can be off by {points:.0f} percentage "
        f"points, so {what}. Label more pairs; {FEWER}, picked at random, are a good start."
    )
    return [{"kind": "few_labels", "n": n, "text": text}]
