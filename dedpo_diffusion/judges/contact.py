"""The first contact with a server that speaks OpenAI's protocol: what it takes is learned by questions about two plain pictures.

This happens once, before any pair is asked about, so that all pairs are asked alike. The order is: parameters that the server
refuses; whether it tells token probabilities; whether the answer is the first token, stands inside a text, or comes after
thinking. Thinking is turned off where the server can do that; else the answer gets room for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.dialect import OFF, ROOM, UNFINISHED, Dialect, adapted, unusable
from dedpo_diffusion.judges.openai_answers import (
    Refused,
    answer_place,
    check_refusal,
    choice_of,
    read_logprobs,
    read_text,
    reported,
    thinks,
    was_cut,
)
from dedpo_diffusion.judges.scorers.http import ServerFailure, png_base64
from dedpo_diffusion.settings.labelling import ServerSettings

WORDY, THINKING = 256, 4096  # tokens of an answer with reasons, and of one after thinking
MOST_TRIES = 12  # of one question, each with one parameter changed


@dataclass
class Contact:
    """Learns how a server is asked.

    Args:
        place: "the server at ...", for messages.
        model: the model there.
        question: the text of a question.
        side: pixels of the pictures, as large as those of the run.
        server: what the user asks for.
        send: sends a request, and gives out the reply.
    """

    place: str
    model: str
    question: str
    side: int
    server: ServerSettings
    send: Callable[[dict[str, Any]], Any]
    notes: list[str] = field(default_factory=list)

    def learn(self) -> Dialect:
        """How the server is asked from now on; `notes` then hold what people should know, besides the dialect's own.

        Raises:
            UserError: it cannot be asked about pairs; the message says what to set.
            ServerFailure: it fails, or will not say what it refuses.
        """
        dialect = Dialect(top=None if self.server.logprobs == "no" else Dialect.top, room=self.server.answer_tokens or ROOM)
        choice = None
        if dialect.top:
            dialect, choice, why = self._with_probabilities(dialect)
            if not dialect.top:
                if self.server.logprobs == "yes":
                    raise UserError(f"{self.place} gives no token probabilities ({why}); give --server.logprobs auto or no")
                self.notes.append(f"it gives no token probabilities ({why}): each pair is asked {self.server.samples} times in each order")
        return dialect if dialect.top else self._with_texts(dialect, choice)

    def _with_probabilities(self, dialect: Dialect) -> tuple[Dialect, dict[str, Any] | None, str]:
        """The dialect that tells the answer's probabilities; without `top` where none does, with a text if there is one, and why."""
        dialect, choice, why = self._ask(dialect)
        if not dialect.top:
            return dialect, choice, why
        if reported(choice) is None and not thinks(choice):
            return replace(dialect, top=None), None, "it leaves them out"
        if _first_token_answers(choice):
            return dialect, None, ""
        if thinks(choice):
            quiet = self._silenced(dialect, _first_token_answers)
            return (quiet, None, "") if quiet else (replace(dialect, top=None), None, "it thinks before it answers")
        inside, choice, _ = self._ask(replace(dialect, within=True))
        if inside.top and answer_place(choice) is not None:
            return inside, None, ""
        if inside.top and not thinks(choice) and not _read(choice):
            return dialect, None, ""  # these pictures say nothing to it; pairs may
        return replace(inside, top=None, within=False), None, "its answer is not one token"

    def _with_texts(self, dialect: Dialect, choice: dict[str, Any] | None) -> Dialect:
        """The dialect in which the model's text holds an answer; `choice` is its answer where it was asked already."""
        fixed = self.server.answer_tokens is not None
        if choice is None:
            dialect, choice, _ = self._ask(dialect)
        if not _read(choice) and thinks(choice):
            quiet = self._silenced(dialect, lambda choice: bool(_read(choice)))
            if quiet:
                return quiet
            if not fixed:
                dialect, choice, _ = self._ask(replace(dialect, room=THINKING))
            if not _read(choice) and (thinks(choice) or was_cut(choice)):
                raise UserError(self._too_thoughtful(dialect.room))
            self.notes.append(f"it thinks before it answers, in up to {dialect.room} tokens each time (fewer answers: --server.samples 1)")
        elif not _read(choice) and was_cut(choice) and not fixed:
            wordy, choice, _ = self._ask(replace(dialect, room=WORDY))
            if _read(choice):
                self.notes.append(f"it answers in sentences: an answer gets {WORDY} tokens (others: --server.answer_tokens)")
                return wordy
        return dialect

    def _silenced(self, dialect: Dialect, answers: Callable[[dict[str, Any]], bool]) -> Dialect | None:
        """The dialect in which the model answers without thinking, if there is one."""
        for extra in OFF:
            quiet = replace(dialect, extra=tuple(extra.items()))
            try:
                tried, choice, _ = self._ask(quiet)
            except ServerFailure as failure:
                if failure.kind != "refused":
                    raise
                continue
            if tried.extra and tried.top == dialect.top and answers(choice):
                return tried
        return None

    def _ask(self, dialect: Dialect) -> tuple[Dialect, dict[str, Any], str]:
        """The dialect in which the question was taken, the answer, and why token probabilities were given up."""
        why, tried, side = "", [dialect], self.side
        while True:
            side = min(side, dialect.side or side)
            try:
                reply = self.send(dialect.body(self.model, _pictures(side), self.question))
                choice = choice_of(reply)
                check_refusal(choice)
                return dialect, choice, why
            except Refused as refused:
                text = f"{self.place} will not even compare two plain pictures ({refused})"
                raise UserError(f"{text}; take another model (--server.model) or another question (--vlm.prompt)") from refused
            except ServerFailure as failure:
                if remedy := unusable(failure):
                    raise UserError(f"{self.place}: {failure}; {remedy}") from failure
                if UNFINISHED.search(failure.said):  # as some say that all the room went into thinking
                    return dialect, {"message": {"content": None}, "finish_reason": "length"}, why
                other = adapted(dialect, failure, side)
                if other is None or other in tried or len(tried) > MOST_TRIES:
                    raise
                why = str(failure) if dialect.top and not other.top else why
                dialect = other
                tried.append(other)

    def _too_thoughtful(self, room: int) -> str:
        text = f"{self.place}: {self.model} thinks for longer than {room} tokens, and then has none left for its answer"
        return f"{text}; give --server.answer_tokens {4 * room}, turn its thinking off in the server, or take a model that answers at once"


def _first_token_answers(choice: dict[str, Any]) -> bool:
    return reported(choice) is not None and not np.isnan(read_logprobs(choice)[0])


def _read(choice: dict[str, Any]) -> str:
    """The answer in a text, "" where there is none."""
    try:
        return read_text(choice)
    except ServerFailure:
        return ""


def _pictures(side: int) -> list[str]:
    """A red and a blue picture in base64, with as much noise as a photograph has, so that their files are no smaller."""
    noise = np.random.default_rng(0).integers(0, 24, (side, side, 3), dtype=np.uint8)
    plain = [np.array(colour, dtype=np.uint8) for colour in ((220, 20, 20), (20, 20, 220))]
    return [png_base64(Image.fromarray(noise + colour)) for colour in plain]
