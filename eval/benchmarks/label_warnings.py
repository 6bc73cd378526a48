"""How often the warnings of `dedpo merge` are false, and how often they find what they are for: a simulation.

    python eval/benchmarks/label_warnings.py --out eval/results/label_warnings.json

Two warnings, data sets drawn afresh for every seed. *Not at random*: pairs have three columns, and people are asked at random, or
more often where one column is large: a step at its median, or a smooth rise, which alone a logistic estimate can follow. Labels
are compared with the other pairs, or, weighted by true or estimated propensities, with all. *Seen*: a judge of calibrated
confidence, or too sure or too modest a one, that knows the answers of some share of the human labels by heart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say, stage


@dataclass(frozen=True)
class WarningSettings:
    """Settings of the simulation.

    Args:
        out: file for the result (JSON).
        seeds: data sets of each case.
        pairs: pairs of a data set.
        human: how many of them are labelled, on average.
    """

    out: Path
    seeds: int = 1000
    pairs: int = 1000
    human: int = 250


def asked(rng: np.random.Generator, settings: WarningSettings, odds: float, smooth: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Who was asked (N,), with which probability (N,), and the columns: `odds` times likelier where the first is above its median.

    A smooth rise multiplies the odds of being asked by so much per standard deviation.
    """
    x, level = rng.normal(size=settings.pairs), rng.integers(0, 4, settings.pairs).astype(float)
    colour = np.array(["blue", "green", "red"], dtype=object)[rng.integers(0, 3, settings.pairs)]
    share = settings.human / settings.pairs
    p = 1 / (1 + (1 - share) / share * odds**-x) if smooth else np.where(x > 0, odds, 1.0) * 2 * share / (1 + odds)
    return rng.random(settings.pairs) < p, p, {"x": x, "level": level, "colour": colour}


def not_at_random(settings: WarningSettings, odds: float, smooth: bool, propensities: str, seed: int) -> bool:
    """Whether labels are doubted: taken as at random (`none`), with their `true` propensities, or with `estimated` ones."""
    from dedpo_diffusion.debias import estimate_propensity, inverse_propensity
    from dedpo_diffusion.labels.warnings import unbalanced, unlike, unlike_warnings

    labelled, p, columns = asked(np.random.default_rng(seed), settings, odds, smooth)
    if propensities == "none":
        return bool(unlike_warnings(unlike(labelled, columns), remedy=""))
    if propensities == "estimated":
        texts = [columns["colour"] == value for value in ("blue", "green", "red")]
        p = estimate_propensity(labelled, np.stack([columns["x"], columns["level"], *texts], axis=1).astype(float), seed=seed).p
    h = inverse_propensity(np.where(labelled, 1.0, np.nan), p)
    return bool(unlike_warnings(unbalanced(labelled, h, columns), remedy=""))


def seen(settings: WarningSettings, memory: float, temperature: float, seed: int) -> bool:
    """Whether a judge is said to have seen the human labels, of which it knows the share `memory` by heart."""
    from dedpo_diffusion.labels.warnings import seen_human_labels

    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.2, settings.pairs)
    truth = (rng.random(settings.pairs) < 1 / (1 + np.exp(-logit))).astype(float)
    labelled = np.arange(settings.pairs) < settings.human  # the pairs are in no order
    known = labelled & (rng.random(settings.pairs) < memory)
    judge = np.where(known, 0.03 + 0.94 * truth, 1 / (1 + np.exp(-logit / temperature)))
    return seen_human_labels(np.where(labelled, truth, np.nan), judge) is not None


def share(hits: int, n: int) -> dict[str, Any]:
    """A share of n data sets with Wilson's 95 % interval."""
    from dedpo_diffusion.debias import wilson_interval

    return {"value": hits / n, "ci": wilson_interval(hits, n), "n": n}


def simulate(settings: WarningSettings) -> list[dict[str, Any]]:
    """How often each case is warned of, and whether it should be."""
    from dedpo_diffusion.core.console import track

    seeds, found = range(settings.seeds), []
    cases = [("none", odds, False) for odds in (1.0, 1.5, 2.0, 3.0)] + [("true", 3.0, False), ("true", 3.0, True)]
    cases += [("estimated", 1.0, False), ("estimated", 3.0, True), ("estimated", 3.0, False)]
    for propensities, odds, smooth in track(cases, "not at random", len(cases)):
        hits = sum(not_at_random(settings, odds, smooth, propensities, seed) for seed in seeds)
        right = odds > 1 and (propensities == "none" or (propensities == "estimated" and not smooth))
        case = {"warning": "not_at_random", "propensities": propensities, "odds": odds, "smooth": smooth, "should": right}
        found.append(case | {"warned": share(hits, settings.seeds)})
    for memory, temperature in [(0.0, 0.4), (0.0, 1.0), (0.0, 3.0), (0.1, 1.0), (0.25, 1.0), (0.5, 1.0)]:
        hits = sum(seen(settings, memory, temperature, seed) for seed in seeds)
        case = {"warning": "seen", "memory": memory, "temperature": temperature, "should": memory > 0}
        found.append(case | {"warned": share(hits, settings.seeds)})
    return found


def run(settings: WarningSettings) -> None:
    """Simulate how often labels are warned of."""
    from rich.console import Console
    from rich.table import Table

    from dedpo_diffusion.core.files import write_json

    if settings.seeds < 1 or not 20 <= settings.human < settings.pairs / 2:
        raise UserError("give at least 1 seed, and from 20 human labels to less than half of the pairs")
    cases = simulate(settings)
    table = Table("warning", "case", "should be warned of", "warned of (95 %)", title=f"{settings.seeds} data sets of each")
    for case in cases:
        words = ", ".join(f"{key} {value}" for key, value in case.items() if key not in ("warning", "should", "warned"))
        low, high = case["warned"]["ci"]
        told = f"{case['warned']['value']:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(case["warning"], words, "yes" if case["should"] else "no", told)
    Console(width=140).print(table)
    kept = {key: value for key, value in asdict(settings).items() if key != "out"}
    write_json(settings.out, {"settings": kept, "cases": cases})
    say(f"wrote {settings.out}")


if __name__ == "__main__":
    raise SystemExit(stage(WarningSettings, run, None, prog="label_warnings"))
