"""What a reader of a verdict should know besides: few prompts, single images that collapsed, and when a judge pays for itself.

An image **collapsed** if it scores below every image of the base, and its loss against the base's image of the same prompt and seed lies
more than 6 robust standard deviations (1.4826 times the median absolute deviation) below the median of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.evaluation.comparison.arms import Arm, counted

if TYPE_CHECKING:
    import numpy as np

FEW_PROMPTS, GOOD_PROMPTS = 10, 50  # below the first a verdict is hardly more than chance; the second are a start
FAR, ROBUST = 6.0, 1.4826  # standard deviations; of a normal distribution by its median absolute deviation
PAYS = 1.25  # worth over the number of human labels from which a judge is called worth its while
SHOWN = 40  # letters of a prompt


def few_prompts(n: int) -> list[str]:
    """A sentence where a comparison has so few prompts that its numbers say next to nothing."""
    if not is_few(n):
        return []
    return [f"Only {counted(n, 'prompt')}: too few to conclude much; sample {GOOD_PROMPTS} or more."]


def is_few(n: int) -> bool:
    """Whether numbers from so many prompts should not be shown large."""
    return n < FEW_PROMPTS


def collapsed(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Rows of the images that collapsed by this module's rule, worst first; scores (N,) of an arm and of the base, image by image."""
    import numpy as np

    gain = scores - base
    off = gain - np.median(gain)
    spread = ROBUST * float(np.median(np.abs(off)))
    if spread == 0:  # most gains are equal: nothing says how far is far
        return np.zeros(0, dtype=np.int64)
    rows = np.flatnonzero((off < -FAR * spread) & (scores < base.min()))
    return rows[np.argsort(gain[rows], kind="stable")]


def collapse_sentences(arms: Sequence[Arm], scorer: str) -> Iterator[str]:
    """Of each arm with collapsed images how many, and which is the worst; the first arm is the base."""
    base = arms[0]
    for arm in arms[1:]:
        rows = collapsed(arm.scores[scorer], base.scores[scorer])
        if len(rows):
            worst = arm.rows[rows[0]]
            prompt = worst["prompt"] if len(worst["prompt"]) <= SHOWN else worst["prompt"][: SHOWN - 1] + "…"
            which = f"seed {worst['seed']}, {prompt!r}"
            yield (
                f"Single images of {arm.name} collapsed: {len(rows)} of {len(arm.rows)} fell far below its others on {scorer}, and below "
                f"every image of {base.name} ({'the worst' if len(rows) > 1 else 'it has'} {which})."
            )


def judge_pays(name: str, report: Mapping[str, Any]) -> list[str]:
    """From which agreement on a judge is worth its while beside these human labels; nothing where the report has no such curve.

    Args:
        name: of the targets.
        report: that `dedpo merge` wrote beside them.
    """
    curve, own, n = report.get("curve"), (report.get("agreement") or {}), report.get("n_human")
    if not curve or not n or own.get("value") is None:
        return []
    points = list(zip(*curve["judge"].values(), strict=True))
    enough = next((agreement for agreement, worth in points if worth >= PAYS * n), None)
    ends = "" if own.get("ci") is None else f" ({own['ci'][0]:.1%} to {own['ci'][1]:.1%})"
    mine = f"this one agrees with people on {own['value']:.1%}{ends}"
    if enough is None:
        return [f"Targets {name}: no judge, however good, adds a quarter to {n} human labels on {report['n']} pairs."]
    which = f"When a judge pays for itself (targets {name}): one that answers 0 or 1 adds a quarter to {n} human labels"
    return [f"{which} if it agrees with people on {enough:.0%} of the pairs or more; {mine}."]
