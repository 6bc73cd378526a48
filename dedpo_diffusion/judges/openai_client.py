"""A judge from a vision-language model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, OpenAI.

Each pair is asked in both orders. Where the server tells token probabilities, one token is enough:

    logit = log P("1") - log P("2"),   validity = P("1") + P("2")

each P a sum over the tokens that read "1" or "2" without blanks. Of an answer that is not among the reported tokens only a
bound is known: it is no likelier than the least reported token, nor than all unreported ones together; the bound takes its
place in the logit and adds nothing to the validity. Without token probabilities the answer is sampled k times, and

    logit = log((c_1 + 1/2) / (c_2 + 1/2)),   validity = (c_1 + c_2) / k                  (Jeffreys' estimate)

What the server fails to answer is asked again or recorded as missing, with the reason; no number is invented.
"""

from __future__ import annotations

import math
import os
import queue
import re
import string
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.judges.judge import Answers, Judge, Question
from dedpo_diffusion.judges.question import FIRST, SECOND, TEMPERATURE, OrderAnswer, both_orders, fitted, read_template
from dedpo_diffusion.judges.scorers.http import Connection, ServerFailure, finite, png_base64
from dedpo_diffusion.settings.labelling import ServerSettings, VlmSettings

T = TypeVar("T")
Pair = tuple[OrderAnswer, OrderAnswer, bool]  # the answers in both orders, and whether the server failed
TOP = 20  # the most that OpenAI's protocol reports
ROUNDING = 1e-6  # of reported probabilities, which are float32: less than this is not known to be left over
LEAST = -700.0  # below it stands some servers' word for a probability of 0, such as -9999
ANSWER_TOKENS = 16  # room for "Answer: 1."
BLANKS = string.whitespace + "\u2581\u0120"  # and vocabularies' own, which some servers do not decode
STANDALONE = re.compile(r"(?<![\w.,/%-])[12](?![\w/%]|[.,:]\d)")  # not in 10, 1.5, 2nd, 1/2, -1
STOPS = {  # statuses that every further request would get too, and what to do
    401: "put a valid key into the environment variable {key_variable}",
    402: "the account behind the key must be paid up",
    403: "put a key that may use this model into the environment variable {key_variable}",
    404: "check the address (most end in /v1) and the model's name (--server.model)",
}


class Pace:
    """Lets requests begin at most `per_minute` times in any minute, evenly spread: a bucket of one token. Threads share it."""

    def __init__(
        self, per_minute: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
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
    """The tokens of all requests about one pair in one order, repeated and sampled ones too."""

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
        clock, sleep: the time in seconds, and what waits that many.

    Raises:
        UserError: nothing answers there, the key or model is wrong, or the server lacks the token probabilities asked for.
    """

    def __init__(
        self,
        url: str,
        vlm: VlmSettings,
        server: ServerSettings,
        *,
        temperature: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _check(server)
        self.url, self.vlm, self.server = url.rstrip("/"), vlm, server
        self.template = read_template(vlm.prompt)
        self.connection = Connection(
            self.url,
            timeout=server.timeout,
            retries=server.retries,
            at_once=server.concurrency,
            key=_key(server.key_variable),
            before=Pace(server.per_minute, clock=clock, sleep=sleep).wait if server.per_minute else lambda: None,
            sleep=sleep,
        )
        self.parallel = 4 * server.concurrency  # few requests are left alone at the end of a batch
        self.streak = 0  # pairs that failed one after the other for the server's sake
        try:
            self.model = server.model or self._only_model()
            self.logprobs = self._tells_logprobs()
        except ServerFailure as failure:
            raise self._stop(failure) from failure
        mode = "logprobs" if self.logprobs else f"samples{server.samples}"
        shown = f"side {vlm.max_side} validity {vlm.min_validity:g}"
        version = f"openai-{self.model}-{self.template.digest}-{mode} {shown}"
        super().__init__("openai", version, TEMPERATURE if temperature is None else temperature)

    def answer(self, questions: Sequence[Question]) -> Answers:
        """The log-odds of "the first image" in both orders of N pairs, `concurrency` pairs under way at once.

        Raises:
            UserError: a wrong key, model or address, or `failures` consecutive pairs that the server did not answer.
        """
        shown, swapped = [], []
        with closing(self._spread(questions)) as pairs:
            for first, second, failed in pairs:
                shown.append(first)
                swapped.append(second)
                self.streak = self.streak + 1 if failed else 0
                if self.streak >= self.server.failures:
                    last = first.missing or second.missing
                    text = f"{self._place()} failed {self.streak} pairs in a row (last: {last})"
                    raise UserError(f"{text}; when the server works again, give the same command to resume")
        return both_orders(shown, swapped, min_validity=self.vlm.min_validity)

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """The price of so many tokens, in the currency of the settings' prices."""
        return (prompt_tokens * self.server.price_in + answer_tokens * self.server.price_out) / 1e6

    # ---- the first contact

    def _only_model(self) -> str:
        listed = self.connection.ask("/models", first=True)
        models = listed.get("data") if isinstance(listed, dict) else None
        names = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        if len(names) == 1 and isinstance(names[0], str) and names[0]:
            return names[0]
        shown = f"lists {len(names)} models ({self.connection.excerpt(', '.join(map(str, names)))})" if names else "lists no model"
        raise UserError(f"{self._place()} {shown}; give --server.model NAME")

    def _tells_logprobs(self) -> bool:
        """Settle by a request about two small pictures how pairs are asked, since labels of two ways do not compare."""
        images = [png_base64(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")]
        question, wanted = self.template.ask("a red square"), self.server.logprobs
        if wanted != "no":
            why = "it leaves them out"
            try:
                reply = self.connection.ask("/chat/completions", self._body(images, question, logprobs=True), first=True)
                if _reported(_choice(reply)) is not None:
                    return True
            except ServerFailure as failure:
                if failure.kind != "refused" or "logprob" not in str(failure).lower():
                    raise
                why = str(failure)
            if wanted == "yes":
                raise UserError(f"{self._place()} gives no token probabilities ({why}); give --server.logprobs auto or no")
            say(f"{self._place()} gives no token probabilities ({why}): each pair is asked {self.server.samples} times in each order")
        _choice(self.connection.ask("/chat/completions", self._body(images, question, logprobs=False), first=True))
        return False

    # ---- one pair

    def _spread(self, questions: Sequence[Question]) -> Generator[Pair]:
        """The pairs' answers in order, asked in `concurrency` threads."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: list[Future[Pair]] = [Future() for _ in questions]
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done[place].set_result(self._ask_pair(questions[place]))
                except BaseException as error:
                    stop.set()  # earlier pairs are under way already, and later ones in vain
                    done[place].set_exception(error)

        for place in range(len(questions)):
            waiting.put(place)
        for _ in range(min(self.server.concurrency, len(questions))):
            threading.Thread(target=work, daemon=True).start()  # daemons: an interrupted command does not wait for a slow server
        try:
            for future in done:
                yield future.result()
        finally:
            stop.set()

    def _ask_pair(self, question: Question) -> Pair:
        """A pair without an answer in one order is missing: the other order is then not bought."""
        images = [png_base64(fitted(image, self.vlm.max_side)) for image in (question.image_0, question.image_1)]
        text = self.template.ask(question.prompt)
        shown, failed = self._ask_order(images, text)
        if shown.missing:
            return shown, OrderAnswer(missing="not asked"), failed
        swapped, failed = self._ask_order(images[::-1], text)
        return shown, swapped, failed

    def _ask_order(self, images: Sequence[str], text: str) -> tuple[OrderAnswer, bool]:
        bill = _Bill()
        logit = validity = math.nan
        missing, failed = "", False
        try:
            if self.logprobs:
                logit, validity = self._ask(self._body(images, text, logprobs=True), _read_logprobs, bill)
                if math.isnan(logit):
                    missing = f"neither {FIRST} nor {SECOND} is among the reported tokens"
            else:
                body = self._body(images, text, logprobs=False)
                choices = [self._ask(body, _read_text, bill) for _ in range(self.server.samples)]
                logit, validity = _from_counts(choices.count(FIRST), choices.count(SECOND), len(choices))
                if math.isnan(logit):
                    missing = f"none of {len(choices)} answers was {FIRST} or {SECOND}"
        except ServerFailure as failure:
            if _hopeless(failure):
                raise self._stop(failure) from failure
            missing, failed = str(failure), failure.kind != "refused"
        return OrderAnswer(logit, validity, missing, bill.prompt, bill.answer), failed

    def _ask(self, body: dict[str, Any], read: Callable[[dict[str, Any]], T], bill: _Bill) -> T:
        """What `read` makes of the answer; nonsense is asked about once more."""
        for last in (False, True):
            try:
                reply = self.connection.ask("/chat/completions", body)
                bill.add(reply)
                return read(_choice(reply))
            except ServerFailure as failure:
                if failure.kind != "nonsense" or last:
                    raise
        raise AssertionError("unreachable")

    def _body(self, images: Sequence[str], text: str, *, logprobs: bool) -> dict[str, Any]:
        """A request. No structured_outputs and the like: forced to 1 or 2, every answer would look valid."""
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        body = {"model": self.model, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}
        if logprobs:
            return body | {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP}
        return body | {"max_tokens": ANSWER_TOKENS, "temperature": 1}

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
    for name, bound in least.items():
        if not getattr(server, name) >= bound:
            raise UserError(f"server.{name} is {getattr(server, name)}; it must be at least {bound}")
    for name in ("timeout", "per_minute"):
        value = getattr(server, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"server.{name} is {value}; it must be a positive number")


def _key(variable: str) -> str:
    """The key in the environment, "" without one."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds no key: a key has no blanks and no letters beyond ASCII")
    return key


def _hopeless(failure: ServerFailure) -> bool:
    """Whether every further request would fail alike: a wrong key, model or address, which may have moved."""
    return failure.kind == "refused" and (failure.status in STOPS or 300 <= (failure.status or 0) < 400)


def _nonsense(what: str) -> ServerFailure:
    return ServerFailure(f"the server answered nonsense: {what}", "nonsense")


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _nonsense("no choices")
    return choices[0]


def _reported(choice: dict[str, Any]) -> list[Any] | None:
    """The likeliest first tokens as the server lists them; None where it lists none."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    return top if isinstance(top, list) and top else None


def _read_logprobs(choice: dict[str, Any]) -> tuple[float, float]:
    """The logit and the validity; a logit of NaN where neither answer is among the reported tokens."""
    reported = _reported(choice)
    if reported is None:
        raise _nonsense("no token probabilities this time")
    mass: dict[str, float] = {}
    least, total = math.inf, 0.0
    for entry in reported:
        token, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not finite(value) or value > ROUNDING:
            raise _nonsense(f"a token {token!r} of log-probability {value!r}"[:100])
        if value < LEAST:
            continue
        bare = token.strip(BLANKS)
        mass[bare] = mass.get(bare, 0.0) + math.exp(value)
        least, total = min(least, value), total + math.exp(value)
    if total > 1 + 1e-3:
        raise _nonsense(f"token probabilities that add up to {total:.3f}")
    first, second = mass.get(FIRST, 0.0), mass.get(SECOND, 0.0)
    if first == second == 0.0:
        return math.nan, 0.0
    bound = min(least, math.log(max(1 - total, ROUNDING)))
    logs = [math.log(p) if p > 0 else bound for p in (first, second)]
    return logs[0] - logs[1], min(1.0, first + second)


def _read_text(choice: dict[str, Any]) -> str:
    """The answer, FIRST or SECOND, or "" where the text holds both or neither or was cut off."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise _nonsense("no text")
    found = set(STANDALONE.findall(text))
    return found.pop() if len(found) == 1 and choice.get("finish_reason") != "length" else ""


def _from_counts(first: int, second: int, samples: int) -> tuple[float, float]:
    """The logit and the validity; a logit of NaN where no sample is valid."""
    if first + second == 0:
        return math.nan, 0.0
    return math.log((first + 0.5) / (second + 0.5)), (first + second) / samples
