"""How much of a run the pairs get that people labelled, with targets of method adapted.

A judge's label of a pair is worth r <= 1 of a person's. A run that gives the share f of its visits to the a labelled pairs, and the rest
to b others, learns f + (1 - f) r a visit, against the noise of the visits and that of the pairs themselves, which are few:

    J(f) = (f + (1 - f) r)^2 / (1 + rho (f^2 / a + (1 - f)^2 / b)),       rho = visits / NOISE

is largest at

    f = a (1 - tau) / (a (1 - tau) + b max(0, r - tau)),       tau = (a + b r) / (rho + a + b)

So a short run goes to the people's pairs alone where a judge's label is worth less than tau, and the longer it is, the more it wants
the others too: its visits wear few pairs out. An endless one takes a / (a + b r), which is about what the merge weighs them by.

What r is, answers cannot tell. A judge that is wrong where people are of two minds is as good as they are; one that is wrong at random
is much worse, and both agree with single answers alike. r is taken to be the judge's confidence over the people's, and no more than
TRUST, unless the confidence itself is more. The numbers below were chosen on Shapes (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE = 300.0  # visits in which the visits' own noise is that of one pair's choice
PEOPLE = 0.6  # how sure an answer is of the next person's: 2 A - 1 where two people agree on A = 80 % of the pairs
TRUST = 0.85


@dataclass(frozen=True)
class Shares:
    """`share` f of the visits that `labelled` pairs get, `merged` that of their merge, `worth` r of each of the `judged` others."""

    share: float
    merged: float
    worth: float
    labelled: int
    judged: int


def judge_worth(confidence: float) -> float:
    """r, what a judge's label is worth of a person's, from the confidence |2 p - 1| of the labels that a run sees."""
    return min(1.0, max(confidence, min(TRUST, confidence / PEOPLE)))


def best_share(labelled: float, judged: float, worth: float, visits: float) -> float:
    """f that makes J largest: a labelled pairs, b judged ones whose labels are worth r, a run of so many visits."""
    tau = (labelled + judged * worth) / (visits / NOISE + labelled + judged)
    people, judge = labelled * (1 - tau), judged * max(0.0, worth - tau)
    return people / (people + judge)


def effective(weight: np.ndarray) -> float:
    """As `core.sample_size.effective_size`, with squares summed in another order: so a run's share stays what it was, to the last bit."""
    return float(weight.sum() ** 2 / np.sum(weight**2))


def share_labels(
    weight: np.ndarray, human: np.ndarray, judge: np.ndarray, *, visits: float, share: float | None = None
) -> tuple[np.ndarray, Shares] | None:
    """Weights of method adapted (N,), with the share of them that suits a run; None where all or none of the pairs are labelled.

    Args:
        weight: of the merge, in proportion to the confidence |2 t - 1| of each pair.
        human: labels, NaN where nobody answered.
        judge: the taught judge's labels p.
        visits: optimizer steps times pairs of a step.
        share: f in [0, 1]; None takes the best, and no less than the merge's.

    Returns:
        Weights of the same sum, and the shares.
    """
    seen = weight > 0
    people = seen & ~np.isnan(human)
    others = seen & np.isnan(human)
    if not people.any() or not others.any():
        return None
    confidence = weight[others] * (np.abs(2 * judge[others] - 1).sum() / weight[others].sum())
    worth = judge_worth(float(np.sum(confidence**2) / confidence.sum()))
    merged = float(weight[people].sum() / weight[seen].sum())
    if share is None:
        share = max(merged, best_share(effective(weight[people]), effective(weight[others]), worth, visits))
    made = np.where(people, weight * share / weight[people].sum(), weight * (1 - share) / weight[others].sum()) * weight.sum()
    return made, Shares(share, merged, worth, int(people.sum()), int(others.sum()))
