"""One voting, on a pair dataset or on two models' images: plan, votes and images behind tickets, ready to be served.

A ticket is a keyed hash of rater, pair and repetition. It tells nothing, nobody can make one up, and a ticket handed out
before a restart is known again after it.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image, read_header
from dedpo_diffusion.voting.plan import Plan
from dedpo_diffusion.voting.queue import Asked, Event, VoteQueue
from dedpo_diffusion.voting.samples import SamplePairs
from dedpo_diffusion.voting.store import Store

SHOWN = {  # what every browser shows as it is
    "PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "AVIF": "image/avif",
    "BMP": "image/bmp",
}  # fmt: skip
ANSWERS = ("left", "right", "tie", "skip")
NEAR = 1000  # places searched for a ticket that was handed out before a restart


class Refusal(Exception):
    """A request that is not granted: an HTTP status, and why in plain words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class VoteService:
    """Votes and images of one voting. Every method may be called from any thread.

    Three locks, so that nothing waits for what it does not need: the queue's is held for microseconds, the writer's while a
    vote reaches the disk, the images' while a file is read.

    Args:
        reader: the pairs; nobody else may use this reader.
        plan: order, sides and draws, for `reader.ids()`.
        store: the votes.
        clock: seconds that only grow.
    """

    def __init__(self, reader: PairReader | SamplePairs, plan: Plan, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.reader, self.plan, self.store = reader, plan, store
        self.prompts, self.pair_ids = reader.prompts(), plan.ids
        self.queue = VoteQueue(plan, clock)
        self.queue_lock, self.writing, self.image_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._tickets: dict[str, tuple[str, Asked]] = {}
        self._formats: dict[tuple[int, int], str] = {}
        try:
            for event in store.events():
                self._ticket(event.rater, self.queue.apply(event))
        except (ValueError, KeyError, sqlite3.DatabaseError) as error:
            raise UserError(
                f"{store.path} holds events that do not follow each other ({error}); restore it, or give another --name"
            ) from error

    # ---- tickets

    def _ticket(self, rater: str, asked: Asked) -> str:
        text = f"{rater}\0{asked.again}\0{self.plan.ids[asked.pair]}"
        ticket = hashlib.blake2b(text.encode(), key=self.store.secret, digest_size=10).hexdigest()
        self._tickets[ticket] = (rater, asked)
        return ticket

    def _find(self, ticket: str, rater: str | None = None) -> tuple[str, Asked]:
        """The question behind a ticket; one unknown since a restart is looked for among what this rater, or any, may have seen."""
        if ticket not in self._tickets:
            for name in self.queue.raters() if rater is None else [rater]:
                if any(self._ticket(name, asked) == ticket for asked in self.queue.near(name, NEAR)):
                    break
        holder, asked = self._tickets.get(ticket, (None, None))
        if holder is None or asked is None or rater not in (None, holder):
            raise Refusal(404, "this ticket is unknown; load the next pair")
        return holder, asked

    # ---- answers

    def session(self) -> dict[str, Any]:
        """What the page shows before anyone has said who they are, all but the voting's name and order."""
        with self.queue_lock:
            return {"pairs": len(self.plan.ids), "raters": self.queue.raters(), "votes": self.queue.count()}

    def state(self, rater: str) -> dict[str, Any]:
        """Where this rater stands: progress, the item and the one that follows."""
        with self.queue_lock:
            item, following = [*(self._item(rater, asked) for asked in self.queue.upcoming(rater)), None, None][:2]
            can_undo = self.queue.last(rater) is not None
            return {"rater": rater, "progress": self.queue.progress(rater), "item": item, "following": following, "can_undo": can_undo}

    def _item(self, rater: str, asked: Asked) -> dict[str, Any]:
        ticket = self._ticket(rater, asked)
        left, right = f"/image/{ticket}/left", f"/image/{ticket}/right"
        return {"ticket": ticket, "prompt": self.prompts[asked.pair], "left": left, "right": right}

    def check_answer(self, answer: Any) -> None:
        """Refusal unless this may be an answer, whatever it is to."""
        if answer not in ANSWERS:
            raise Refusal(400, f"answer must be one of {', '.join(ANSWERS)}")

    def _stored(self, rater: str, asked: Asked, answer: Any) -> str:
        """An answer as the store keeps it."""
        return str(answer)

    def _side(self, rater: str, asked: Asked) -> bool | None:
        """Whether image 1 stands on the left."""
        return self.plan.swapped(rater, asked.pair, again=asked.again)

    def vote(self, rater: str, ticket: str, answer: Any, seconds: float) -> dict[str, Any]:
        """Store an answer and return the state; the same answer to the same ticket again changes nothing.

        Raises:
            Refusal: an unknown ticket, one that was answered otherwise, or something that is no answer.
        """
        self.check_answer(answer)
        with self.writing:
            with self.queue_lock:
                asked = self._find(ticket, rater)[1]
                answer = self._stored(rater, asked, answer)
                held, fits = self.queue.standing(rater, asked), self.queue.may_answer(rater, asked)
            if held is not None and held.answer != answer:
                raise Refusal(409, f"this pair was answered already, with {held.answer}; undo that first")
            if held is None:
                if not fits:
                    raise Refusal(409, "this pair is not asked any more; load the next one")
                self._append(rater, asked, kind="vote", answer=answer, swapped=self._side(rater, asked), seconds=seconds)
        return self.state(rater)

    def undo(self, rater: str) -> dict[str, Any]:
        """Take this rater's latest answer back and return the state, with `undone` telling whether there was one."""
        with self.writing:
            with self.queue_lock:
                last = self.queue.last(rater)
            if last is not None:
                self._append(rater, Asked(self.queue.number[last.pair_id], last.again), kind="undo", undoes=last.number)
        return self.state(rater) | {"undone": last is not None}

    def _append(self, rater: str, asked: Asked, **values: Any) -> None:
        """First on disk, without the queue's lock, then in memory."""
        event = self.store.append(rater=rater, pair_id=self.plan.ids[asked.pair], again=asked.again, **values)
        with self.queue_lock:
            self.queue.apply(event)

    def snapshot(self) -> tuple[list[Event], int]:
        """The answers that stand, skips included, and how many were undone."""
        with self.queue_lock:
            return self.queue.votes(), self.queue.undone

    # ---- images

    def has_place(self, place: str) -> bool:
        """Whether an image of a ticket may be asked for by this name."""
        return place in ("left", "right")

    def _shown(self, rater: str, asked: Asked, place: str) -> tuple[int, int]:
        """The pair and the number in it, 0 or 1, of the image that stands at a place."""
        return asked.pair, int((place == "right") != self.plan.swapped(rater, asked.pair, again=asked.again))

    def image(self, ticket: str, place: str) -> tuple[bytes, str]:
        """Bytes and content type of the image at a place, left or right, of a handed-out ticket.

        Files that browsers cannot show (TIFF, for one) become PNG, by the rules of decoding.py.

        Raises:
            Refusal: an unknown ticket, or a file that is no image.
        """
        with self.queue_lock:
            rater, asked = self._find(ticket)
        pair, k = self._shown(rater, asked, place)
        where = f"{self.reader.location(pair)} image_{k}"
        try:
            with self.image_lock:
                found = self.reader.pair(pair)
            data = found.image_1 if k else found.image_0
            if (pair, k) not in self._formats:
                self._formats[pair, k] = read_header(data, where).format
            if self._formats[pair, k] in SHOWN:
                return data, SHOWN[self._formats[pair, k]]
            buffer = io.BytesIO()
            decode_image(data, where).save(buffer, "PNG")
            return buffer.getvalue(), "image/png"
        except UserError as error:
            raise Refusal(404, str(error)) from error
