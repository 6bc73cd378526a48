"""What a run's curves say in plain words: whether what was meant to happen is happening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dedpo_diffusion.debias import cluster_sums

WINDOW = 10  # lines of metrics that a symptom is read from
SURE = 3.0  # standard errors by which a mean must lie beyond its bound
RISE = 0.05  # of the reference's error: runs that end well reach a few hundredths
WIDE = 8.0  # mean |margin|: the sigmoid's slope is then below a thousandth of what it was
STILL = 1e-3  # largest |margin| of a policy that does not move
STEPS = 100  # after which one that does not move is a symptom
AGAIN = 2  # validations in a row that must show a rise of the held-out loss: the best one was picked for its low value
FEW = 10  # held-out pairs below which their mean says too little

NAMES = ("reference_error", "winner_drift", "loser_drift", "margin_abs_mean", "margin_abs_max", "implicit_accuracy")


def symptoms(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Symptoms in the last lines of metrics, as name -> what is seen and what to do; {} for none, or too few lines.

    A symptom is a mean over the last WINDOW lines that lies beyond its bound by SURE standard errors, so that a few odd batches make
    none.

    Args:
        lines: of `metrics.jsonl`, oldest first.
    """
    last = lines[-WINDOW:]
    found: dict[str, str] = {}
    if len(last) < WINDOW:
        return found
    values = {name: np.array([np.nan if line.get(name) is None else line[name] for line in last], dtype=np.float64) for name in NAMES}
    reference = values["reference_error"].mean()
    if _beyond(values["winner_drift"], RISE * reference) and _beyond(values["loser_drift"], RISE * reference):
        winner, loser = (values[name].mean() / reference for name in ("winner_drift", "loser_drift"))
        found["both errors rise"] = (
            f"both errors rise above the reference's, the winner's by {winner:.1%} and the loser's by {loser:.1%}: the model forgets "
            "rather than prefers. Lower optim.learning_rate, raise objective.beta, or take objective.balance=none where it is relative"
        )
    if _beyond(values["margin_abs_mean"], WIDE):
        found["margins are wide"] = (
            f"margins are wide (mean |m| {values['margin_abs_mean'].mean():.1f}): most pairs no longer pull, and a power fitted to labels "
            "alone is too high. Stop earlier, lower optim.learning_rate, or merge with --rule half"
        )
    if _beyond(0.5 - values["implicit_accuracy"], 0.05):
        share = values["implicit_accuracy"].mean()
        found["preferences are reversed"] = (
            f"the policy prefers the preferred image in only {share:.0%} of the pairs that it is trained on: look at the "
            "targets (`dedpo validate`), or lower optim.learning_rate"
        )
    if last[-1]["step"] >= STEPS and values["margin_abs_max"].max() < STILL:
        found["nothing moves"] = (
            f"after {last[-1]['step']} steps no margin is larger than {values['margin_abs_max'].max():.1g}: nothing is learned. "
            "Raise optim.learning_rate or objective.beta"
        )
    return found


def held_out_symptom(lines: Sequence[Mapping[str, Any]], start: Sequence[float], clusters: np.ndarray | None = None) -> str | None:
    """In words, that the held-out loss surely rises; None where it does not, or too little is known.

    Validations have their pairs and draws in common, so they are compared pair by pair: the mean rise above the best of the earlier
    ones, or of the loss before training, must lie SURE standard errors beyond 0 in each of the last AGAIN.

    Args:
        lines: of `validation.jsonl`, oldest first, with `step`, `loss` and `pair_loss`.
        start: the loss of each held-out pair before training.
        clusters: (P,) of pairs that hang together, as those of one prompt; None where none do. The standard errors go by them.
    """
    known = [line for line in lines if line.get("loss") is not None]
    if len(known) < AGAIN or len(start) < FEW:
        return None
    earlier = [{"step": 0, "loss": float(np.mean(start)), "pair_loss": list(start)}, *known[:-AGAIN]]
    best = min(earlier, key=lambda line: line["loss"])
    if not all(_beyond(np.subtract(line["pair_loss"], best["pair_loss"]), 0.0, clusters) for line in known[-AGAIN:]):
        return None
    seen = f"held-out loss rises: {known[-1]['loss']:.4f} on the pairs and draws that gave {best['loss']:.4f} "
    if best["step"] == 0:
        return seen + "before training: what is learned does not carry over to them. Lower optim.learning_rate, or look at the targets"
    return seen + (
        f"after step {best['step']}: the model is now memorising the training pairs. Stop earlier; "
        "`dedpo export RUN --checkpoint best` takes the best step"
    )


def score_symptom(lines: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> str | None:
    """In words, that a scorer which is no reward of the run surely fell below what it was before training, in each of the last AGAIN
    validations; None where none did.

    Args:
        lines: of `validation.jsonl`, oldest first, with `scores`.
        rewards: names of the scorers that are rewards.
    """
    last = [line["scores"] for line in lines if line.get("scores")][-AGAIN:]
    for name in last[-1] if len(last) == AGAIN and rewards else ():
        ends = [found[name]["gain_ci"] for found in last if name in found]
        if name not in rewards and len(ends) == AGAIN and all(end is not None and end[1] < 0 for end in ends):
            return (
                f"{name}, which is no reward of this run, fell by {-last[-1][name]['gain']:.4g} since before training: the policy has "
                f"found what {', '.join(rewards)} overrates. Stop earlier, raise loop.kl (of apa, loop.temperature) or loop.uncertainty, "
                "or teach the judge with new answers"
            )
    return None


def _beyond(values: np.ndarray, bound: float, clusters: np.ndarray | None = None) -> bool:
    """Whether the mean of values (n,), all of them known, is surely beyond a bound; those of a cluster (n,) depend on each other."""
    off = cluster_sums(values - values.mean(), clusters)
    count = len(off)
    return count > 1 and bool(values.mean() - SURE * np.sqrt(count / (count - 1) * (off @ off)) / len(values) > bound)


class Watch:
    """Looks at every new line of a run, and tells each symptom once.

    Args:
        lines: those of the run so far, if it was resumed.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        self.lines, self.told = list(lines)[-WINDOW:], set[str]()

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """What is new, in words."""
        self.lines = [*self.lines, line][-WINDOW:]
        found = symptoms(self.lines)
        new = [words for name, words in found.items() if name not in self.told]
        self.told |= set(found)
        return new
