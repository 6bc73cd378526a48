"""Gains and win rates of arms over their base, by scorer and by category of prompts, with intervals and corrected p-values.

The p-values of one arm's gains are corrected for its scorers, people among them (Holm 1979): below 0.05, the chance of any false
alarm among them is 5 % at most. The verdict's own question, the gain on the primary scorer, is one that was planned; it goes
by its interval alone. What people say is a rate, from 0 (all prefer the base's image) to 1; its gain is 2 * rate - 1, from -1 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.evaluation.comparison.intervals import Interval, intervals, is_rate, wins
from dedpo_diffusion.evaluation.comparison.preferences import NAME as PEOPLE

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import Arm
    from dedpo_diffusion.evaluation.comparison.preferences import Judged

Found = dict[str, dict[str, "Measured"]]  # by arm and scorer


@dataclass(frozen=True)
class Measured:
    """An arm on a scorer: mean score (None for people, who compare and do not score), gain over the base, win rate, images, prompts."""

    mean: Interval | None
    gain: Interval
    win: Interval
    n: int
    prompts: int


def measure(
    arms: Sequence[Arm], shared: Sequence[str], judged: Mapping[str, Judged], *, rows: np.ndarray | None = None, **options: Any
) -> Found:
    """Every arm on every scorer, and on people where they judged it.

    Args:
        arms: the base first, rows in one order.
        shared: the scorers.
        judged: what people said, by arm.
        rows: (M,) the rows that count; None takes all.
        options: resamples and seed.
    """
    import numpy as np

    prompts, base = arms[0].prompts, arms[0]
    rows = np.arange(len(prompts)) if rows is None else rows
    columns, rates = [], {scorer: _rates(arms, scorer) for scorer in shared}
    for arm in arms:
        for scorer in shared:
            mine, other = arm.scores[scorer][rows], base.scores[scorer][rows]
            columns += [(mine, rates[scorer]), (mine - other, False), (wins(mine, other), True)]
    held = iter(intervals(columns, prompts[rows], **options))
    n, kinds = len(rows), len(np.unique(prompts[rows]))
    found: Found = {}
    for arm in arms:
        found[arm.name] = {}
        for scorer in shared:
            mean, gain, win = next(held), next(held), next(held)
            found[arm.name][scorer] = Measured(mean, within(gain, 1) if rates[scorer] else gain, win, n, kinds)
    for name, said in judged.items():
        of = np.flatnonzero(np.isin(said.rows, rows))
        if len(of):
            asked = prompts[said.rows[of]]
            share, win = intervals([(said.preferred[of], True), (said.wins[of], True)], asked, **options)
            gain = Interval(2 * share.mean - 1, 2 * share.low - 1, 2 * share.high - 1, share.p)
            found[name][PEOPLE] = Measured(None, gain, win, len(of), len(np.unique(asked)))
    return found


def within(found: Interval, most: float) -> Interval:
    """An interval without what is impossible: beyond -most and most. Ends of NaN stay."""
    import numpy as np

    return replace(found, low=float(np.clip(found.low, -most, most)), high=float(np.clip(found.high, -most, most)))


def _rates(arms: Sequence[Arm], scorer: str) -> bool:
    """Whether all scores of a scorer are outcomes, whose means are rates and differ by 1 at most."""
    import numpy as np

    return is_rate(np.concatenate([arm.scores[scorer] for arm in arms]))


def by_scorer(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """`arms.ARM.by_scorer` of results.json, p-values corrected for the arm's scorers.

    Args:
        measured: of one arm, by scorer, over two prompts or more each.
    """
    from dedpo_diffusion.labels.warnings import holm

    corrected = holm([entry.gain.p for entry in measured.values() if entry.gain.p is not None])
    return {
        scorer: {
            "gain_over_base": entry.gain.as_dict() | {"p": entry.gain.p, "p_holm": float(p)},
            "win_rate_vs_base": entry.win.as_dict(),
            "n": entry.n,
        }
        for (scorer, entry), p in zip(measured.items(), corrected, strict=True)
    }


def by_category(
    arms: Sequence[Arm], shared: Sequence[str], judged: Mapping[str, Judged], names: Sequence[str | None], advance: Any, **options: Any
) -> dict[str, dict[str, Any]]:
    """`arms.ARM.categories` of results.json, by arm: gains (with their p, not corrected) and win rates on the prompts of each category.

    Args:
        names: (N,) the category of each row; rows of None belong to none.
        advance: called after each category.
        arms, shared, judged, options: as in `measure`.
    """
    import numpy as np

    found: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms}
    for category in dict.fromkeys(name for name in names if name is not None):
        rows = np.array([k for k, name in enumerate(names) if name == category])
        for arm, measured in measure(arms, shared, judged, rows=rows, **options).items():
            found[arm][category] = {
                scorer: {
                    "n_prompts": entry.prompts, "n_images": entry.n,
                    "gain_over_base": entry.gain.as_dict() | {"p": entry.gain.p}, "win_rate_vs_base": entry.win.as_dict(),
                }
                for scorer, entry in measured.items()
            }  # fmt: skip
        advance()
    return found


def differences(arms: Sequence[Arm], primary: str, judged: Mapping[str, Judged], **options: Any) -> dict[str, Any]:
    """`differences` of results.json: paired, on the primary scorer, between the arms that are not the base.

    With people as the scorer: on the pairs that they judged of both arms, where these are of two prompts or more.
    """
    import numpy as np

    found, columns = {}, {}
    for earlier, later in combinations(arms[1:], 2):
        name = f"{later.name}_minus_{earlier.name}"
        if primary != PEOPLE:
            columns[name] = (later.scores[primary] - earlier.scores[primary], False)
        elif later.name in judged and earlier.name in judged:
            mine, other = judged[later.name], judged[earlier.name]
            common, a, b = np.intersect1d(mine.rows, other.rows, return_indices=True)
            if len(np.unique(prompts := arms[0].prompts[common])) > 1:
                found[name] = within(intervals([(mine.gain[a] - other.gain[b], False)], prompts, **options)[0], 2).as_dict()
    if columns:
        gaps = intervals(list(columns.values()), arms[0].prompts, **options)
        most = 1 if _rates(arms, primary) else np.inf
        found = {name: within(gap, most).as_dict() for name, gap in zip(columns, gaps, strict=True)}
    return found
