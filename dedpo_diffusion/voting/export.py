"""What the votes become: `PAIRS/votes/NAME.parquet`, `PAIRS/labels/NAME.parquet`, and words on what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels, Votes
from dedpo_diffusion.labels.files import aggregate, align, label_names, label_origin, read_labels, row_of, write_labels, write_votes
from dedpo_diffusion.pairs.clusters import label_clusters
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.voting.queue import SKIP, Event
from dedpo_diffusion.voting.rankings import RankService
from dedpo_diffusion.voting.service import VoteService

LEFT_WINS = {"left": 1.0, "tie": 0.5, "right": 0.0}


@dataclass(frozen=True)
class Export:
    """A written label file: its path, its number of labels, and what there is to say of it."""

    path: Path
    labels: int
    sentences: list[str]


def check_name(folder: Path, name: str, session: str | None = None) -> None:
    """The label file of this name is made by this voting, or is not there.

    Args:
        session: the voting's id; None where the voting is still to begin.

    Raises:
        UserError: something else made the label or vote file.
    """
    made = label_origin(folder, name)
    if session is not None and made == _origin(session):
        return
    for kind in ("labels", "votes") if session is None else ("labels",):
        path = folder / kind / f"{name}.parquet"
        if path.is_file():
            raise UserError(f"{path} is there already, made by {made or 'something else'}; give another --name, which keeps both")


def _origin(session: str) -> str:
    return f"dedpo vote {session}"


def to_votes(events: Sequence[Event]) -> Votes:
    """Answers as a vote file holds them, about image 0 whichever side it stood on; skips are left out."""
    events = [event for event in events if event.answer != SKIP]
    left = [LEFT_WINS[str(event.answer)] for event in events]
    return Votes(
        [event.pair_id for event in events],
        np.array([1 - wins if event.swapped else wins for wins, event in zip(left, events, strict=True)]),
        np.ones(len(events), dtype=np.int64),
        [event.rater for event in events],
        {
            "swapped": [event.swapped for event in events],
            "repeat": [event.again for event in events],
            "seconds": [event.seconds for event in events],
            "time": [event.time for event in events],
        },
    )


def votes_of(service: VoteService, events: Sequence[Event]) -> Votes:
    """`to_votes`, or the comparisons of rankings."""
    return service.rankings_to_votes(events) if isinstance(service, RankService) else to_votes(events)


def to_labels(service: VoteService, events: Sequence[Event], votes: Votes) -> tuple[Labels, list[str]]:
    """One label per pair with its propensity, and what to say of pairs asked in vain.

    Args:
        service: of pairs or of rankings.
        events: the answers that stand, skips included.
        votes: the same as `votes_of` gives them.
    """
    plan, labels, what = service.plan, aggregate(votes), "Pairs"
    asked_as = labels.pair_id  # what each label was asked as
    if isinstance(service, RankService):
        asked_as, what = service.cluster_of(labels.pair_id), "Prompts"
        labels.extra["cluster"] = asked_as
    number = {name: i for i, name in enumerate(plan.ids)}
    end = max(plan.place[number[event.pair_id]] + 1 for event in events)
    propensity = plan.propensity([number[name] for name in asked_as], end)
    skipped = {event.pair_id for event in events} - set(asked_as)
    sentences = [f"{what} skipped by everyone they were shown to, which stay without a label: {len(skipped)}."] if skipped else []
    if propensity is not None:
        labels.extra["propensity"] = propensity.tolist()
        sentences.append(
            f"{what} came by disagreement of the judges: propensities {propensity.min():.2g} to {propensity.max():.2g} are stored; "
            f"{end - len(set(asked_as))} of the first {end} {what.lower()} have no label."
        )
    return labels, sentences


def _counts(votes: Votes, labels: Labels, events: Sequence[Event], undone: int) -> str:
    repeats, raters = sum(votes.extra["repeat"]), len(set(votes.rater))
    ties = int((votes.label_0 == 0.5).sum())
    skips = sum(event.answer == SKIP for event in events)
    rankings = len(set(votes.extra.get("ranking", [])))
    what = f"{rankings} rankings ({len(votes.pair_id)} comparisons)" if rankings else f"{len(votes.pair_id)} answers"
    return (
        f"{what} by {raters} {'person' if raters == 1 else 'people'} give {len(labels.pair_id)} labels "
        f"({ties} ties, {repeats} hidden repetitions that make no label); left out: {skips} skips, {undone} undone."
    )


def _votes_so_far(service: VoteService) -> tuple[list[Event], int, Votes]:
    events, undone = service.snapshot()
    return events, undone, votes_of(service, events)


def export(service: VoteService, name: str) -> Export:
    """Write the vote file and the label file, each atomically.

    Raises:
        UserError: there is no vote yet, or a label file of that name was made by something else.
    """
    from dedpo_diffusion.labels.agreement import vote_summary

    folder, (events, undone, votes) = service.reader.folder, _votes_so_far(service)
    if not votes.pair_id:
        raise UserError("there is no vote yet, so there are no labels to write")
    check_name(folder, name, service.store.session)
    labels, sentences = to_labels(service, events, votes)
    write_votes(folder, name, votes)
    if isinstance(service, RankService):
        service.write_rankings(folder / "votes" / f"{name}.rankings.jsonl", events)
    path = write_labels(folder, name, labels, origin=_origin(service.store.session))
    return Export(path, len(labels.pair_id), [_counts(votes, labels, events, undone), *sentences, *vote_summary(votes)["sentences"]])


def summary(service: VoteService, name: str) -> dict[str, Any]:
    """What the votes so far are worth: each rater's consistency, agreement between raters, and with the judges."""
    from dedpo_diffusion.labels.agreement import vote_summary

    events, undone, votes = _votes_so_far(service)
    if not votes.pair_id:
        return {"votes": 0, "sentences": ["There is no vote yet."], "raters": [], "between": {}, "judges": []}
    found, labels = vote_summary(votes), aggregate(votes)
    if isinstance(service, RankService):
        labels.extra["cluster"] = service.cluster_of(labels.pair_id)
    judges, sentences = _judges(service, name, labels)
    sentences = [_counts(votes, labels, events, undone), *found.pop("sentences"), *sentences]
    return {"votes": len(votes.pair_id), "sentences": sentences, **found, "judges": judges}


def _judges(service: VoteService, name: str, labels: Labels) -> tuple[list[dict[str, Any]], list[str]]:
    """Agreement of every other label file with people; a file that cannot be used is told, and stops nobody."""
    from dedpo_diffusion.labels.agreement import judge_agreement

    folder, ids, judges, sentences = service.reader.folder, service.pair_ids, [], []
    rows, given = row_of(labels.pair_id, ids), labels.extra.get("cluster")
    ranked = None if given is None else np.unique(given, return_inverse=True)[1]
    people, tied = np.full(len(ids), np.nan), None if ranked is None else np.full(len(ids), -1)
    people[rows] = labels.label_0
    if tied is not None:
        tied[rows] = ranked
    every = label_clusters(service.reader, people, tied) if isinstance(service.reader, PairReader) else tied
    clusters = None if every is None else every[rows]
    for judge in label_names(folder):
        if judge == name:
            continue
        try:
            known = align(read_labels(folder, judge), ids, folder=folder, name=judge)[rows]
            judges.append({"name": judge, **judge_agreement(labels.label_0, known, clusters)})
        except UserError as error:
            sentences.append(f"{error}.")
    if judges and service.plan.weights is not None:
        sentences.append("Judges look worse here than on all pairs: those they disagree on were asked first.")
    return judges, sentences
