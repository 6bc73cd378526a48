"""What votes on two models' images become: answers about the arm, and words that do not tell people who vote which model is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.voting.export import to_votes
from dedpo_diffusion.voting.queue import SKIP, Event
from dedpo_diffusion.voting.samples import Row, SamplePairs
from dedpo_diffusion.voting.service import VoteService

NOBODY = ""  # in place of a rater, where nobody was asked; no person can have this name


def to_answers(service: VoteService, reader: SamplePairs) -> list[Row]:
    """The rows of a vote file, in the order given: the answers that stand, skips left out, then a tie for each identical pair so far.

    Pairs of identical pictures are not asked. Each counts as a tie from when its place in the order has come: at any time the pairs with
    an answer and these are together what an order that knows nothing of the pictures brought up first, so their mean leans to neither
    side, however early people stop.

    Returns:
        Each with file_base, file, prompt, prompt_index, seed, rater, preferred (1 the arm, 0 the base, 0.5 a tie), repeat, swapped
        (the arm stood on the left), seconds, time; the last three None for identical pairs, the rater NOBODY.
    """
    events = service.snapshot()[0]
    votes = to_votes(events)
    rows = [
        _row(reader.asked[service.queue.number[pair_id]], rater, 1 - label_0) for pair_id, rater, label_0
        in zip(votes.pair_id, votes.rater, votes.label_0.tolist(), strict=True)
    ]  # fmt: skip
    for number, row in enumerate(rows):
        row |= {name: values[number] for name, values in votes.extra.items()}
    nothing = {"repeat": False, "swapped": None, "seconds": None, "time": None}
    return rows + [_row(pair, NOBODY, 0.5) | nothing for pair in passed(service, reader, events)]


def _row(pair: tuple[Row, Row], rater: str | None, preferred: float) -> Row:
    base, arm = pair
    about = {name: arm[name] for name in ("file", "prompt", "prompt_index", "seed")}
    return {"file_base": base["file"], **about, "rater": rater, "preferred": preferred}


def passed(service: VoteService, reader: SamplePairs, events: Sequence[Event]) -> list[tuple[Row, Row]]:
    """The identical pairs whose place in the order comes before the first pair beyond the last that anyone answered or skipped."""
    plan = service.plan
    if not events:
        return []
    end = max(plan.place[service.queue.number[event.pair_id]] + 1 for event in events)
    bound = np.inf if end == len(plan.order) else plan.keys[plan.order[end]]
    _, keys = reader.keys(plan.seed)
    return [reader.identical[k] for k in np.flatnonzero(keys < bound)]


def summary(service: VoteService, reader: SamplePairs) -> dict[str, Any]:
    """What the votes so far are worth, as export.summary tells it: progress, consistency and agreement, and nothing of who is ahead."""
    from dedpo_diffusion.labels.agreement import vote_summary

    events, undone = service.snapshot()
    votes = to_votes(events)
    if not votes.pair_id:
        return {"votes": 0, "sentences": ["There is no vote yet."], "raters": [], "between": {}, "judges": []}
    found = vote_summary(votes)
    sentences = [_counts(service, reader, votes, events, undone), *found.pop("sentences")]
    same = len(passed(service, reader, events))
    if same:
        sentences.insert(1, f"Pairs of identical images so far, which nobody is asked about and which count as ties: {same}.")
    return {"votes": len(votes.pair_id), "sentences": sentences, **found, "judges": []}


def _counts(service: VoteService, reader: SamplePairs, votes: Votes, events: Sequence[Event], undone: int) -> str:
    raters, repeats, ties = len(set(votes.rater)), sum(votes.extra["repeat"]), int((votes.label_0 == 0.5).sum())
    pairs = set(votes.pair_id)
    prompts = {service.prompts[service.queue.number[pair_id]] for pair_id in pairs}
    skips = sum(event.answer == SKIP for event in events)
    return (
        f"{len(votes.pair_id)} answers by {raters} {'person' if raters == 1 else 'people'} "
        f"on {len(pairs)} of {len(service.plan.ids)} pairs, "
        f"of {len(prompts)} of {len(set(service.prompts))} prompts ({ties} ties, {repeats} hidden repetitions, which only measure people); "
        f"left out: {skips} skips, {undone} undone."
    )
