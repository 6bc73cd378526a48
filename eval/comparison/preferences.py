"""What people preferred, as a scorer: their votes on an arm's images against the base's (`dedpo vote BASE ARM`).

The score of a pair is the share of raters who prefer the arm's image, ties as half; hidden repetitions, and further answers of one
person to the same pair, are left out. Where both pictures are the same nobody was asked, and the pair is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import Arm
    from dedpo_diffusion.evaluation.comparison.people import Votes

NAME = "people"


@dataclass(frozen=True)
class Judged:
    """What people said of M pairs: `rows` (M,) of the arm in rising order, `preferred` (M,) in [0, 1] for the arm; and the answers."""

    rows: np.ndarray
    preferred: np.ndarray
    votes: Votes

    @property
    def gain(self) -> np.ndarray:
        """(M,) from -1, all prefer the base's image, to 1."""
        return 2 * self.preferred - 1

    @property
    def wins(self) -> np.ndarray:
        """(M,) 1 where the majority prefers the arm's image, 0 the base's, 0.5 where neither."""
        return (self.preferred > 0.5) + 0.5 * (self.preferred == 0.5)


def as_judged(gains: np.ndarray) -> Judged:
    """Gains (N,) from -1 to 1, NaN where nobody was asked, as what people said; without the single answers."""
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.people import Votes

    rows = np.flatnonzero(~np.isnan(gains))
    return Judged(rows, (gains[rows] + 1) / 2, Votes(rows[:0], [], gains[:0], np.zeros(0, dtype=bool)))


def read_judged(arms: Sequence[Arm]) -> dict[str, Judged]:
    """By arm, what people said of it against the base; arms without votes are left out.

    Raises:
        UserError: votes that cannot be read, or a scorer of the name that stands for people.
    """
    from dedpo_diffusion.evaluation.comparison.people import read_votes

    base, found = arms[0], {}
    for arm in arms[1:]:
        votes = read_votes(base.folder, base.rows, arm.folder, arm.rows)
        judged = None if votes is None else judge(votes)
        if judged is not None:
            found[arm.name] = judged
    if found and NAME in base.scores:
        raise UserError(f"{base.folder} holds scores of a scorer named {NAME!r}, which stands for people's votes here; rename that scorer")
    return found


def votes_notes(arms: Sequence[Arm]) -> list[str]:
    """Notes on votes against the base that do not count."""
    from dedpo_diffusion.evaluation.comparison.people import votes_left_out

    base = arms[0]
    return [note for arm in arms[1:] for note in votes_left_out(base.folder, base.rows, arm.folder, arm.rows)]


def judge(votes: Votes) -> Judged | None:
    """The mean answer to each pair; None where nobody was asked, or all answers are repetitions."""
    import numpy as np

    first = _first(votes)
    if not (first & _asked(votes)).any():
        return None
    rows, index = np.unique(votes.row[first], return_inverse=True)
    return Judged(rows, np.bincount(index, votes.preferred[first]) / np.bincount(index), votes)


def _first(votes: Votes) -> np.ndarray:
    """(V,) which answers count: not a repetition, and the first of its rater to its pair."""
    import numpy as np

    seen: set[tuple[int, str]] = set()
    counts = np.zeros(len(votes.row), dtype=bool)
    for k, (row, rater, repeat) in enumerate(zip(votes.row.tolist(), votes.rater, votes.repeat.tolist(), strict=True)):
        counts[k] = not repeat and (row, rater) not in seen
        if counts[k]:
            seen.add((row, rater))
    return counts


def _asked(votes: Votes) -> np.ndarray:
    """(V,) which answers somebody gave: the others are pairs of two same pictures."""
    import numpy as np

    return np.array([rater != "" for rater in votes.rater], dtype=bool)


def summary(arm: Arm, base: Arm, judged: Judged, shared: Sequence[str], **options: Any) -> dict[str, Any]:
    """`arms.ARM.people` of results.json: how many answers, by whom, how far people agree with each other and with each scorer.

    With a scorer: the share of the pairs that the majority and the scorer both decide, in which they decide alike, with its
    interval by prompts (None where these are of one prompt).

    Args:
        arm, base: rows in one order.
        judged: of the arm.
        shared: the scorers.
        options: resamples and seed of the intervals.
    """
    import numpy as np

    from dedpo_diffusion.core.records import Votes as Answers
    from dedpo_diffusion.evaluation.comparison.intervals import intervals
    from dedpo_diffusion.labels.agreement import vote_summary

    votes, given = judged.votes, np.flatnonzero(_asked(judged.votes))
    first, raters = np.intersect1d(given, np.flatnonzero(_first(votes))), [votes.rater[k] for k in given]
    answers = Answers(
        [str(row) for row in votes.row[given]], votes.preferred[given], np.ones(len(given), dtype=np.int64), list(raters),
        {"repeat": votes.repeat[given].tolist()},
    )  # fmt: skip
    between, alike = vote_summary(answers)["between"], {}
    for scorer in shared:
        apart = (arm.scores[scorer] - base.scores[scorer])[judged.rows]
        both = (apart != 0) & (judged.gain != 0)
        same = (np.sign(apart) == np.sign(judged.gain))[both].astype(np.float64)
        if not len(same):
            alike[scorer] = {"mean": None, "ci": None, "n": 0}
            continue
        (found,) = intervals([(same, True)], arm.prompts[judged.rows[both]], **options)
        alike[scorer] = found.as_dict() | {"n": len(same)}
    return {
        "answers": len(first), "pairs": len(np.unique(votes.row[first])), "raters": sorted(set(raters)),
        "agreement": between if between["pairs"] else None, "with_scorers": alike,
    }  # fmt: skip
