"""Labels and options that cannot be used, refused in the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dedpo_diffusion.debias.coefficients import METHODS, RULES, WITHOUT_POWER
from dedpo_diffusion.debias.powers import MAX_JUDGES


def check_options(method: str, power: Any, propensity: Any, max_overshoot: float, rule: str, folds: int) -> None:
    """Refuse unknown options and those that do not go together."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    if power is not None and method in ("human_only", *WITHOUT_POWER):
        raise ValueError(f"method {method!r} takes no power: leave it out, or use method='tuned'")
    if rule != "plug_in" and (method != "tuned" or power is not None):
        raise ValueError(f"rule {rule!r} chooses a tuned power: leave it out, or use method='tuned' without a power")
    if rule == "cross_fitted" and folds < 2:
        raise ValueError(f"folds is {folds}: cross-fitting needs at least 2, so that a pair's power can come from other pairs")
    if propensity is not None and method == "naive":
        raise ValueError("method 'naive' takes no propensity: leave it out, or use another method")
    if not max_overshoot >= 1:
        raise ValueError(f"max_overshoot is {max_overshoot}: it must be at least 1, where 1 switches the judge off")


def check_powers(power: Any, judges: int) -> np.ndarray | None:
    """(K,) powers from a number or a sequence, None from None."""
    if power is None:
        return None
    values = np.asarray(power, dtype=np.float64)
    if values.ndim > 1 or values.size != judges:
        raise ValueError(f"power has {values.size} numbers, but there are {judges} judges: give one power for each")
    values = values.reshape(-1)
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"power is {value}: it must lie in [0, 1], where 0 is human labels only and 1 is DeDPO as published")
    if values.sum() > 1 + 1e-9:
        raise ValueError(f"the powers sum to {values.sum():.6g}: their sum must lie in [0, 1], as that of a single judge does")
    return values


def checked_labels(values: Any, name: str, remedy: str) -> np.ndarray:
    """(N,) float64 labels in [0, 1] or NaN."""
    labels = np.asarray(values, dtype=np.float64)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{name} has shape {labels.shape}: it must be (N,), one label for each of N >= 1 pairs")
    _check_range(labels, name, remedy)
    return labels


def checked_judges(values: Any) -> np.ndarray:
    """(N, K) float64 labels in [0, 1] or NaN, of one judge (N,) or several (N, K)."""
    labels = np.asarray(values, dtype=np.float64)
    if labels.ndim not in (1, 2) or labels.size == 0:
        raise ValueError(f"synthetic has shape {labels.shape}: it must be (N,), or (N, K) for K judges")
    if labels.ndim == 2 and labels.shape[1] > MAX_JUDGES:
        raise ValueError(f"synthetic has {labels.shape[1]} judges: {MAX_JUDGES} at most; stack some into one with calibrate first")
    _check_range(labels, "synthetic", "pass probabilities, not scores")
    return labels[:, None] if labels.ndim == 1 else labels


def _check_range(labels: np.ndarray, name: str, remedy: str) -> None:
    bad = np.argwhere((labels < 0) | (labels > 1))
    if len(bad):
        value = labels[tuple(bad[0])]
        place = ", ".join(str(i) for i in bad[0])
        raise ValueError(f"{name}[{place}] is {value}: a label is the probability in [0, 1] that image 0 is preferred; {remedy}")


def checked_names(names: Sequence[str] | None, judges: int) -> list[str]:
    """Names of the judges: those given, or "judge", "judge 2", ..."""
    if names is None:
        return ["judge", *(f"judge {k}" for k in range(2, judges + 1))]
    if len(names) != judges or len(set(names)) != judges:
        raise ValueError(f"judges has {len(set(names))} different names, but there are {judges} judges: name each")
    return list(names)


def check_present(z: np.ndarray, g: np.ndarray, method: str, no_judge: bool, names: list[str]) -> None:
    """Refuse labels that are missing where the method needs them; z (N,), g (N, K)."""
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
    missing = np.argwhere(np.isnan(g) & (np.isnan(z)[:, None] if method == "naive" else True))
    if len(missing):
        row, judge = missing[0]
        place = f"synthetic[{row}]" if g.shape[1] == 1 else f"synthetic[{row}, {judge}] ({names[judge]})"
        raise ValueError(
            f"{place} is NaN, and method {method!r} needs a judge label for every pair: label that pair, or use method='human_only'"
        )
