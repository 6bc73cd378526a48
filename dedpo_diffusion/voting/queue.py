"""Where the voting stands, and what each rater is asked next: a replay of events, in memory, without files.

What a rater is asked is a function of the plan, of the events so far and of the leases. A lease is a pair on somebody's
screen: for ten minutes nobody else is asked about it, unless it is one of those that every rater is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dedpo_diffusion.voting.plan import Plan

GAP = 10  # a hidden repetition comes this many answers after the first time, or later
LEASE_SECONDS = 600.0
SKIP = "skip"


@dataclass(frozen=True)
class Event:
    """One line of the store: a vote, or the undoing of one. An undo has neither answer, side nor seconds."""

    number: int
    rater: str
    pair_id: str
    again: bool  # a hidden repetition
    kind: str  # vote, undo
    answer: str | None  # left, right, tie, skip
    swapped: bool | None  # image 1 stood on the left
    seconds: float | None
    time: str  # ISO, UTC
    undoes: int | None = None  # number of the vote that this undoes


class Asked(NamedTuple):
    """A question: pair number, and whether it is a hidden repetition."""

    pair: int
    again: bool


@dataclass
class _Person:
    """One rater. `answers` stand, in the order given; `undone` may be asked once more, the last first."""

    answers: list[Event] = field(default_factory=list)
    standing: dict[Asked, Event] = field(default_factory=dict)
    undone: list[Asked] = field(default_factory=list)
    skips: set[int] = field(default_factory=set)  # unshared pairs skipped
    own: int = 0  # unshared pairs answered
    skipped: int = 0
    repeated: int = 0
    cursor: int = 0  # every earlier place of the order is settled for this rater, until an undo


class VoteQueue:
    """The state of the voting.

    Args:
        plan: order, sides and draws.
        clock: seconds that only grow, for the leases.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        self.plan, self.clock = plan, clock
        self.number = {pair_id: i for i, pair_id in enumerate(plan.ids)}
        self.labels: dict[int, int] = {}  # standing answers per pair, by anyone, without skips and repetitions
        self.undone = 0
        self._taken = 0  # unshared pairs with an answer
        self._people: dict[str, _Person] = {}
        self._leases: dict[int, tuple[str, float]] = {}  # pair -> who sees it, until when

    # ---- replay

    def apply(self, event: Event) -> Asked:
        """Take the next event in; ValueError if it cannot follow those before it."""
        person, asked = self._person(event.rater), Asked(self.number[event.pair_id], event.again)
        if event.kind == "undo":
            if not person.answers or person.answers[-1].number != event.undoes:
                raise ValueError(f"event {event.number} undoes {event.undoes}, which is not the last answer of {event.rater!r}")
            vote, step = person.answers.pop(), -1
            del person.standing[asked]
            person.undone.append(asked)
            self.undone += 1
            for other in self._people.values():
                other.cursor = min(other.cursor, self.plan.place[asked.pair])
        else:
            if asked in person.standing:
                raise ValueError(f"event {event.number} answers pair {event.pair_id!r} twice for {event.rater!r}")
            vote, step = event, 1
            person.answers.append(event)
            person.standing[asked] = event
            person.undone = [other for other in person.undone if other != asked]
            if self._leases.get(asked.pair, ("",))[0] == event.rater:
                del self._leases[asked.pair]
        self._count(person, asked, vote, step)
        return asked

    def _count(self, person: _Person, asked: Asked, vote: Event, step: int) -> None:
        """Keep the counts that `progress` needs without looking at every pair; step is 1 for a vote, -1 for its undoing."""
        unshared = not self.plan.shared[asked.pair]
        person.skipped += step * (vote.answer == SKIP)
        if asked.again:
            person.repeated += step
        elif vote.answer == SKIP:
            if unshared:
                (person.skips.add if step > 0 else person.skips.discard)(asked.pair)
        else:
            count = self.labels.get(asked.pair, 0) + step
            self.labels[asked.pair] = count
            if count == 0:
                del self.labels[asked.pair]
            if unshared:
                person.own += step
                self._taken += (count == 1) if step > 0 else -(count == 0)

    def _person(self, rater: str) -> _Person:
        return self._people.setdefault(rater, _Person())

    # ---- what is asked

    def upcoming(self, rater: str) -> list[Asked]:
        """This rater's item and the one that follows an ordinary answer to it, both leased; fewer where nothing is left."""
        person, coming = self._person(rater), list[Asked]()
        redo = (asked for asked in reversed(person.undone) if self._askable(rater, person, asked))
        for _ in range(2):
            asked = next(redo, None) or self._repetition(rater, person, coming) or self._fresh(rater, person, coming)
            if asked is None:
                break
            coming.append(asked)
            if not asked.again and not self.plan.shared[asked.pair]:
                self._leases[asked.pair] = (rater, self.clock() + LEASE_SECONDS)
        return coming

    def _repetition(self, rater: str, person: _Person, coming: list[Asked]) -> Asked | None:
        given = len(person.answers) + len(coming)
        if not self.plan.repeat_is_due(rater, given):
            return None
        early = max(0, given - GAP + 1)
        start = self.plan.choose(rater, given, early)
        for k in range(early):  # the first that will do, from a random answer on
            event = person.answers[(start + k) % early]
            asked = Asked(self.number[event.pair_id], True)
            if asked not in coming and self._askable(rater, person, asked):
                return asked
        return None

    def _fresh(self, rater: str, person: _Person, coming: list[Asked]) -> Asked | None:
        """The first pair of the order that this rater can be asked about."""
        while person.cursor < len(self.plan.order) and self._settled(person, self.plan.order[person.cursor]):
            person.cursor += 1
        for place in range(person.cursor, len(self.plan.order)):
            asked = Asked(self.plan.order[place], False)
            if asked not in coming and self._askable(rater, person, asked):
                return asked
        return None

    def _settled(self, person: _Person, pair: int) -> bool:
        """Whether this rater is not asked about the pair, unless something is undone."""
        return Asked(pair, False) in person.standing or (pair in self.labels and not self.plan.shared[pair])

    def _askable(self, rater: str, person: _Person, asked: Asked) -> bool:
        if asked.again:
            first = person.standing.get(Asked(asked.pair, False))
            return asked not in person.standing and first is not None and first.answer != SKIP
        holder, until = self._leases.get(asked.pair, (rater, 0.0))
        return not self._settled(person, asked.pair) and (holder == rater or until <= self.clock())

    def near(self, rater: str, places: int) -> Iterator[Asked]:
        """What this rater may have been asked before a restart forgot the leases: `upcoming`, and the next open places."""
        yield from self.upcoming(rater)
        person = self._person(rater)
        for pair in self.plan.order[person.cursor : person.cursor + places]:
            if not self._settled(person, pair):
                yield Asked(pair, False)

    # ---- what is known

    def standing(self, rater: str, asked: Asked) -> Event | None:
        """This rater's answer to a question, if it stands."""
        return self._person(rater).standing.get(asked)

    def may_answer(self, rater: str, asked: Asked) -> bool:
        """Whether an answer makes sense: a repetition needs the first time, which may have been undone since."""
        return not asked.again or self._askable(rater, self._person(rater), asked)

    def last(self, rater: str) -> Event | None:
        """This rater's latest answer that stands."""
        answers = self._person(rater).answers
        return answers[-1] if answers else None

    def raters(self) -> list[str]:
        """Everybody who ever voted, sorted."""
        return sorted(name for name, person in self._people.items() if person.answers or person.undone)

    def votes(self) -> list[Event]:
        """Every answer that stands, skips included, in the order given."""
        return sorted((event for person in self._people.values() for event in person.answers), key=lambda event: event.number)

    def count(self) -> int:
        """Number of answers that stand, repetitions included, skips not."""
        return sum(len(person.answers) - person.skipped for person in self._people.values())

    def progress(self, rater: str) -> dict[str, int]:
        """Counts for one rater; `total` is what is answered and skipped, and what this rater can still be asked about."""
        person = self._person(rater)
        others = self._taken - person.own - sum(pair in self.labels for pair in person.skips)
        return {
            "answered": len(person.answers) - person.skipped,
            "skipped": person.skipped,
            "total": len(self.plan.ids) - others + person.repeated,
            "labelled": len(self.labels),
            "pairs": len(self.plan.ids),
        }
