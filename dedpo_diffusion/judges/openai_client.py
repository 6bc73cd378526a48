"""A judge from a vision-language model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, OpenAI.

Each pair is asked in both orders. Where the server tells token probabilities, one token is enough:

    logit = log P("1") - log P("2"),   validity = P("1") + P("2")

each P a sum over the tokens that read "1" or "2" without blanks. Of an answer that is not among the reported tokens only a
bound is known: it is no likelier than the least reported token, nor than all unreported ones together; the bound takes its
place in the logit and adds nothing to the validity. Without token probabilities the answer is sampled k times, and

    logit = log((c_1 + 1/2) / (c_2 + 1/2)),   validity = (c_1 + c_2) / k                  (Jeffreys' estimate)

What the server fails to answer is asked again or recorded as missing, with the reason; no number is invented. What the server
takes and how the model answers is learned at first contact (contact.py).
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.judges.contact import Contact
from dedpo_diffusion.judges.dialect import Dialect
from dedpo_diffusion.judges.journal import Journal, Key, Reading
from dedpo_diffusion.judges.judge import Answers, Judge, Question
from dedpo_diffusion.judges.openai_answers import (
    Refused,
    answer_place,
    check_refusal,
    choice_of,
    excerpt,
    from_counts,
    is_policy,
    read_logprobs,
    read_text,
    text_of,
    was_cut,
)
from dedpo_diffusion.judges.question import FIRST, SECOND, TEMPERATURE, OrderAnswer, both_orders, fitted, read_template
from dedpo_diffusion.judges.scorers.http import Connection, ServerFailure, png_base64
from dedpo_diffusion.settings.labelling import ServerSettings, VlmSettings

Pair = tuple[OrderAnswer, OrderAnswer, bool]  # the answers in both orders, and whether the server failed
PATIENCE = 10.0  # seconds that a stopped run waits for answers under way, which are paid for
PROBE = 64  # pixels of the pictures of the first contact, where nothing is known of the run's
STOPS = {  # statuses that every further request would get too, and what to do
    401: "put a valid key into the environment variable {key_variable}",
    402: "the account behind the key must be paid up",
    403: "put a key that may use this model into the environment variable {key_variable}",
    404: "check the address (most end in /v1) and the model's name (--server.model)",
}


class Stopped(Exception):
    """The run has stopped, and nothing more is asked."""


class Pace:
    """Lets requests begin at most `per_minute` times in any minute, evenly spread: a bucket of one token. Threads share it."""

    def __init__(
        self, per_minute: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.interval, self.clock, self.sleep = 60.0 / per_minute, clock, sleep
        self.lock, self.free = threading.Lock(), -math.inf

    def wait(self) -> None:
        """Return when the next request may begin."""
        with self.lock:
            now = self.clock()
            start = max(now, self.free)
            self.free = start + self.interval
        if start > now:
            self.sleep(start - now)


@dataclass
class _Bill:
    """The tokens of some requests, repeated ones too."""

    prompt: int = 0
    answer: int = 0

    def add(self, reply: Any) -> None:
        usage = reply.get("usage") if isinstance(reply, dict) else None
        counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
        prompt, answer = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
        self.prompt += prompt
        self.answer += answer


class ServerJudge(Judge):
    """P(image 0 is preferred) from the answers of a server's model.

    Args:
        url: where the protocol's paths begin, usually ending in /v1.
        vlm: the question and how much of an image is shown.
        server: the model, and how the server is treated.
        temperature: in units of log-odds; None takes the mean of the two orders.
        largest: longer side, in pixels, of the largest images that the run will show; the first contact shows as large ones.
        clock, sleep: the time in seconds, and what waits that many; None waits until the run stops, at most.

    Raises:
        UserError: nothing answers there, the key or model is wrong, or the server cannot be asked about pairs.
    """

    keeps_answers = True

    def __init__(
        self,
        url: str,
        vlm: VlmSettings,
        server: ServerSettings,
        *,
        temperature: float | None = None,
        largest: int = PROBE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        _check(server)
        self.url, self.vlm, self.server = url.rstrip("/"), vlm, server
        self.template = read_template(vlm.prompt)
        self.stopping, self.lock, self.spent = threading.Event(), threading.Lock(), 0.0
        sleep = self.stopping.wait if sleep is None else sleep
        self.pace = Pace(server.per_minute, clock=clock, sleep=sleep) if server.per_minute else None
        self.connection = Connection(
            self.url,
            timeout=server.timeout,
            retries=server.retries,
            at_once=server.concurrency,
            key=_key(server.key_variable),
            before=self._before,
            sleep=sleep,
        )
        self.parallel = 4 * server.concurrency  # few requests are left alone at the end of a batch
        self.streak = 0  # pairs that failed one after the other for the server's sake
        self.unread, self.answered = 0, False  # answers that said neither, and whether any pair was ever answered
        try:
            self.model = server.model or self._only_model()
            self.dialect = self._first_contact(largest)
        except ServerFailure as failure:
            raise self._stop(failure) from failure
        self.max_side = vlm.max_side if self.dialect.side is None else self.dialect.side
        shown = f"side {self.max_side} validity {vlm.min_validity:g}"
        version = f"openai-{self.model}-{self.template.digest}-{self.dialect.words(server.samples)} {shown}"
        super().__init__("openai", version, TEMPERATURE if temperature is None else temperature)

    def answer(self, questions: Sequence[Question]) -> Answers:
        """See `answer_with`; nothing is kept beyond what is given out."""
        return self.answer_with(questions, None)

    def answer_with(self, questions: Sequence[Question], journal: Journal | None) -> Answers:
        """The log-odds of "the first image" in both orders of N pairs, `concurrency` pairs under way at once.

        What the journal holds is not asked again, and every answer is put there as it comes, whatever stops the run.

        Raises:
            UserError: a wrong key, model or address, the budget is spent, `failures` consecutive pairs that the server did not
                answer, or as many whose answers say neither image from the start.
        """
        shown, swapped = [], []
        self.stopping.clear()
        with closing(self._spread(questions, journal)) as pairs:
            for first, second, failed in pairs:
                shown.append(first)
                swapped.append(second)
                self._count(first, second, failed)
        found = both_orders(shown, swapped, min_validity=self.vlm.min_validity)
        failures = [a.failed or b.failed for a, b in zip(shown, swapped, strict=True)]
        return Answers(found.scores, found.missing, found.extra | {"failed": failures})

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """The price of so many tokens, in the currency of the settings' prices."""
        return (prompt_tokens * self.server.price_in + answer_tokens * self.server.price_out) / 1e6

    def _count(self, first: OrderAnswer, second: OrderAnswer, failed: bool) -> None:
        """Stop a run that gets nowhere. A refusal is an answer of a server that works."""
        missing, most = first.missing or second.missing, self.server.failures
        self.streak = self.streak + 1 if failed else 0
        self.answered |= not missing
        self.unread += first.unread or second.unread
        if self.streak >= most:
            text = f"{self._place()} failed {self.streak} pairs in a row (last: {missing})"
            raise UserError(f"{text}; when the server works again, give the same command to resume")
        if self.unread >= most and not self.answered:
            text = f"{self._place()} answered none of the first pairs with {FIRST} or {SECOND} (last: {missing})"
            raise UserError(f"{text}; take another question (--vlm.prompt) or model, or go on with --server.failures {10 * most}")

    # ---- the first contact

    def _only_model(self) -> str:
        listed = self.connection.ask("/models", first=True)
        models = listed.get("data") if isinstance(listed, dict) else None
        names = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        if len(names) == 1 and isinstance(names[0], str) and names[0]:
            return names[0]
        shown = f"lists {len(names)} models ({self.connection.excerpt(', '.join(map(str, names)))})" if names else "lists no model"
        raise UserError(f"{self._place()} {shown}; give --server.model NAME")

    def _first_contact(self, largest: int) -> Dialect:
        """How every pair is asked, since labels of two ways do not compare; what is not ordinary about it is said in one line."""
        side = largest if self.vlm.max_side is None else min(largest, self.vlm.max_side)

        def send(body: dict[str, Any]) -> Any:
            return self.connection.ask("/chat/completions", body, first=True)

        contact = Contact(self._place(), self.model, self.template.ask("a red square"), side, self.server, send)
        dialect = contact.learn()
        notes = contact.notes + dialect.notes()
        if dialect.side is not None:
            notes.append(f"it takes no larger images than {dialect.side} pixels, and larger ones are shrunk to that")
        if notes:
            say(f"{self._place()}: {'; '.join(notes)}")
        return dialect

    # ---- one pair

    def _spread(self, questions: Sequence[Question], journal: Journal | None) -> Generator[Pair]:
        """The pairs' answers in order, asked in `concurrency` threads. Stopped early, answers under way are waited for a while."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: list[Future[Pair]] = [Future() for _ in questions]
        failed: list[BaseException] = []

        def work() -> None:
            while not self.stopping.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done[place].set_result(self._ask_pair(questions[place], journal))
                except BaseException as error:
                    if not isinstance(error, Stopped):
                        failed.append(error)
                    self.stopping.set()  # earlier pairs are under way already, and later ones in vain
                    done[place].set_exception(error)

        for place in range(len(questions)):
            waiting.put(place)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.server.concurrency, len(questions)))]
        for thread in threads:
            thread.start()  # daemons: a second Ctrl-C does not wait for a slow server
        try:
            for future in done:
                try:
                    yield future.result()
                except Stopped:  # by a later pair, which knows why
                    raise failed[0] if failed else Stopped from None
        finally:
            self.stopping.set()
            until = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))

    def _before(self) -> None:
        """Called before each attempt."""
        if self.stopping.is_set():
            raise Stopped
        if self.pace is not None:
            self.pace.wait()
            if self.stopping.is_set():
                raise Stopped

    def _ask_pair(self, question: Question, journal: Journal | None) -> Pair:
        """A pair without an answer in one order is missing: the other order is then not bought."""
        images = [png_base64(fitted(image, self.max_side)) for image in (question.image_0, question.image_1)]
        text = self.template.ask(question.prompt)
        shown = self._ask_order((question.pair_id, 0), images, text, journal)
        if shown.missing:
            return shown, OrderAnswer(missing="not asked"), shown.failed
        swapped = self._ask_order((question.pair_id, 1), images[::-1], text, journal)
        return shown, swapped, swapped.failed

    def _ask_order(self, key: tuple[str, int], images: Sequence[str], text: str, journal: Journal | None) -> OrderAnswer:
        bill, readings = _Bill(), []
        body = self.dialect.body(self.model, images, text)
        try:
            for sample in range(1 if self.dialect.top else self.server.samples):
                readings.append(self._ask((*key, sample), body, journal, bill))
                if readings[-1].refused:
                    break
        except ServerFailure as failure:
            if _hopeless(failure):
                raise self._stop(failure) from failure
            return OrderAnswer(missing=str(failure), prompt_tokens=bill.prompt, answer_tokens=bill.answer, failed=failure.kind != "refused")
        logit, validity, missing = self._joined(readings)
        unread = bool(missing) and not readings[-1].refused
        return OrderAnswer(logit, validity, missing, bill.prompt, bill.answer, unread=unread)

    def _joined(self, readings: Sequence[Reading]) -> tuple[float, float, str]:
        """The logit, the validity, and why there is no answer, of one order's replies."""
        last = readings[-1]
        told = f" (it said {last.said!r})" if last.said else ""
        if last.refused:
            return math.nan, math.nan, last.refused
        if self.dialect.top:
            none = f"neither {FIRST} nor {SECOND} is among the reported tokens{told}"
            return last.logit, last.validity, none if math.isnan(last.logit) else ""
        words = [reading.word for reading in readings]
        logit, validity = from_counts(words.count(FIRST), words.count(SECOND), len(words))
        return logit, validity, f"none of {len(words)} answers was {FIRST} or {SECOND}{told}" if math.isnan(logit) else ""

    def _ask(self, key: Key, body: dict[str, Any], journal: Journal | None, bill: _Bill) -> Reading:
        """The reading of an answer, from the journal where it stands there; nonsense is asked about once more."""
        held, spent = journal.get(key) if journal else None, _Bill()
        if held is not None:
            bill.prompt += held.prompt_tokens
            bill.answer += held.answer_tokens
            return held
        for last in (False, True):
            self._check_budget()
            one = _Bill()
            try:
                reply = self.connection.ask("/chat/completions", body)
                one.add(reply)
                reading = self._read(reply)
            except ServerFailure as failure:
                if is_policy(failure):
                    reading = Reading(refused=str(failure))
                elif failure.kind != "nonsense" or last:
                    raise
                else:
                    continue
            finally:
                for part in (bill, spent):
                    part.prompt += one.prompt
                    part.answer += one.answer
                with self.lock:
                    self.spent += self.cost(one.prompt, one.answer)
            if journal is not None:
                journal.put(key, replace(reading, prompt_tokens=spent.prompt, answer_tokens=spent.answer))
            return reading
        raise AssertionError("unreachable")

    def _read(self, reply: Any) -> Reading:
        try:
            choice = choice_of(reply)
            check_refusal(choice)
        except Refused as refused:
            return Reading(refused=str(refused))
        if not self.dialect.top:
            word = read_text(choice)
            return Reading(word=word, said="" if word else _said(choice))
        place = answer_place(choice) if self.dialect.within else 0
        logit, validity = (math.nan, 0.0) if place is None else read_logprobs(choice, place)
        return Reading(logit, validity, said=_said(choice) if math.isnan(logit) else "")

    def _check_budget(self) -> None:
        budget = self.server.budget
        if budget is not None and self.spent >= budget:
            text = f"{self._place()}: the answers cost {self.spent:.2f}, and server.budget is {budget:g}"
            raise UserError(f"{text}; all answers are kept: give the same command to go on for as much again, or a larger --server.budget")

    # ---- words for people

    def _place(self) -> str:
        return f"judge openai: the server at {self.url}"

    def _stop(self, failure: ServerFailure) -> UserError:
        remedy = "check the address (most end in /v1); the server's own log may say more"
        if failure.kind in ("absent", "busy"):
            remedy = "start it (or wait until it has loaded its model), or give openai=URL with another address"
        elif _hopeless(failure):
            remedy = STOPS.get(failure.status or 0, "give the address that it moved to").format(key_variable=self.server.key_variable)
        return UserError(f"{self._place()}: {failure}; {remedy}")


def _check(server: ServerSettings) -> None:
    least = {"samples": 1, "concurrency": 1, "retries": 0, "failures": 1, "price_in": 0, "price_out": 0}
    if server.answer_tokens is not None:
        least["answer_tokens"] = 1
    for name, bound in least.items():
        if not getattr(server, name) >= bound:
            raise UserError(f"server.{name} is {getattr(server, name)}; it must be at least {bound}")
    for name in ("timeout", "per_minute", "budget"):
        value = getattr(server, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"server.{name} is {value}; it must be a positive number")

    if server.budget is not None and not server.price_in and not server.price_out:
        raise UserError("server.budget needs the prices of tokens: give --server.price_in and --server.price_out")


def _key(variable: str) -> str:
    """The key in the environment, "" without one."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds no key: a key has no blanks and no letters beyond ASCII")
    return key


def _hopeless(failure: ServerFailure) -> bool:
    """Whether every further request would fail alike: a wrong key, model or address, which may have moved."""
    return failure.kind == "refused" and (failure.status in STOPS or 300 <= (failure.status or 0) < 400)


def _said(choice: dict[str, Any]) -> str:
    """What an answer that could not be read was."""
    if not text_of(choice):
        return "nothing: its room was used up" if was_cut(choice) else ""
    return excerpt(text_of(choice))
