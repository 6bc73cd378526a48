"""What a server that speaks OpenAI's protocol takes, and how a request that it refused is put instead.

Servers and models of one protocol differ: some take max_completion_tokens and not max_tokens, no temperature, no or few token
probabilities, small images only. A `Dialect` holds what was learned at first contact; every later request is written in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dedpo_diffusion.judges.scorers.http import ServerFailure

TOP = 20  # the most token probabilities that OpenAI's protocol reports
FEWER = 5  # what most servers of fewer report
ROOM = 16  # tokens of a written answer: "Answer: 1."
SIDES = (1024, 768, 512, 384, 256, 128, 64)
OFF: tuple[dict[str, Any], ...] = (  # what turns thinking off: OpenAI's models, its earlier ones, vLLM with SGLang and llama.cpp
    {"reasoning_effort": "none"},
    {"reasoning_effort": "minimal"},
    {"chat_template_kwargs": {"enable_thinking": False}},
)
NAMES = re.compile(r"\b(max_completion_tokens|max_tokens|temperature|top_logprobs|logprobs)\b", re.I)
UNKNOWN = re.compile(
    r"unsupported param|not supported|not available|unknown|unrecogni[sz]ed|not permitted|extra|not allowed|unexpected|not enabled|"
    r"does not support (the )?(param\w* )?.?(top_)?log|forbidden",
    re.I,
)
LARGE = re.compile(
    r"context (length|size|window)|too large|too big|payload|request entity|"
    r"(image|picture).{0,60}(size|dimension|pixel|resolution|megabyte|\bmb\b)|exceed\w*.{0,60}(size|dimension|pixel|bytes)",
    re.I,
)
MANY = re.compile(
    r"(at most|only|maximum of|up to|limit\w*( of| is| to)?) ?(1|one|a single) image|(single|one) image (only|per|is|at)|multiple images|"
    r"more than (1|one) image|too many images",
    re.I,
)
BLIND = re.compile(
    r"not a (multi-?modal|vision)|(does not|doesn't|do not|cannot|can't) (support|accept|take|process|handle) .{0,20}(image|vision)|"
    r"images?(_url)?( input| content)?s? (is|are) not (supported|accepted)|support image input|mmproj|text[- ]only|"
    r"content.{0,30}(must be|should be|valid) a?.?(str|text)|image_url is only supported",
    re.I,
)
UNFINISHED = re.compile(r"max_tokens or model output limit was reached|could not finish the message", re.I)


@dataclass(frozen=True)
class Dialect:
    """How a server is asked.

    Attributes:
        limit: the name of the bound on an answer's tokens; None sends none.
        least: the fewest tokens that may be asked for.
        temperature: whether the server takes one.
        top: token probabilities reported; None samples texts.
        within: the probabilities are read where the answer stands in the text, not at its first token.
        room: tokens of a written answer, thinking included.
        extra: what turns thinking off.
        side: pixels of the longer side of an image, at most; None has no bound.
    """

    limit: str | None = "max_tokens"
    least: int = 1
    temperature: bool = True
    top: int | None = TOP
    within: bool = False
    room: int = ROOM
    extra: tuple[tuple[str, Any], ...] = ()
    side: int | None = None

    def body(self, model: str, images: Sequence[str], text: str) -> dict[str, Any]:
        """A request about images in base64. No response_format and the like: forced to 1 or 2, every answer would look valid."""
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}
        if self.limit:
            body[self.limit] = self.least if self.top and not self.within else max(self.room, self.least)
        if self.temperature:
            body["temperature"] = 0 if self.top else 1
        if self.top:
            body |= {"logprobs": True, "top_logprobs": self.top}
        return body | dict(self.extra)

    def words(self, samples: int) -> str:
        """What of it may change an answer, for the judge's version."""
        mode = ("logprobs" if not self.within else "logprobs-within") if self.top else f"samples{samples}"
        parts = [mode] + ([f"top{self.top}"] if self.top and self.top != TOP else [])
        parts += [f"room{self.room}"] if self.room != ROOM and (self.within or not self.top) else []
        parts += [] if self.temperature or (self.top and not self.within) else ["own-temperature"]
        parts += [f"{key}={_flat(value)}" for key, value in self.extra]
        return "-".join(parts)

    def notes(self) -> list[str]:
        """What people are told of it."""
        plain, told = Dialect(), []
        if self.limit != plain.limit:
            told.append(f"it takes {self.limit or 'no bound on tokens'} in place of max_tokens")
        if self.least != plain.least:
            told.append(f"an answer must be allowed {self.least} tokens")
        if not self.temperature:
            told.append("it takes no temperature, and its own is used")
        if self.top and self.top != TOP:
            told.append(f"it reports {self.top} token probabilities at most")
        if self.within and self.top:
            told.append("its answer stands inside a text, and is read there")
        if self.extra:
            told.append("it thinks before it answers, which is turned off by " + " ".join(f"{k} {_flat(v)}" for k, v in self.extra))
        return told


def _flat(value: Any) -> str:
    """`{"enable_thinking": False}` as enable_thinking:false."""
    if isinstance(value, dict):
        return ",".join(f"{key}:{_flat(held)}" for key, held in value.items())
    return str(value).lower()


def adapted(dialect: Dialect, failure: ServerFailure, shown: int) -> Dialect | None:
    """How to put a refused request instead; None where the refusal names nothing that can be changed.

    Args:
        dialect: in which it was refused.
        failure: the refusal.
        shown: longer side of the images in it, in pixels.
    """
    said = failure.said
    if failure.kind != "refused":
        return None
    if failure.status == 413 or (LARGE.search(said) and not MANY.search(said)):
        smaller = [side for side in SIDES if side < shown]
        return replace(dialect, side=smaller[0]) if smaller else None
    found = NAMES.search(said)
    name = found[1].lower() if found else "logprobs" if "logprob" in said.lower() else ""
    if name in ("max_tokens", "max_completion_tokens"):
        return _other_limit(dialect, said)
    if name == "temperature" and dialect.temperature:
        return replace(dialect, temperature=False)
    if name in ("logprobs", "top_logprobs") and dialect.top:
        return _fewer(dialect, said)
    unknown = {key for key, _ in dialect.extra if key in said}
    return replace(dialect, extra=()) if unknown else None


def _other_limit(dialect: Dialect, said: str) -> Dialect | None:
    if dialect.limit is None:
        return None
    small = re.search(r"at least|minimum|greater than|more than|>=?|too (small|low)|below", said, re.I)
    if small and not UNKNOWN.search(said) and dialect.least == 1:
        numbers = [int(number) for number in re.findall(r"\d+", said[small.start() :])]
        return replace(dialect, least=next((number for number in numbers if 1 < number <= 256), ROOM))
    return replace(dialect, limit="max_completion_tokens" if dialect.limit == "max_tokens" else None)


def _fewer(dialect: Dialect, said: str) -> Dialect:
    top = dialect.top or 0
    if UNKNOWN.search(said):
        return replace(dialect, top=None)
    bounds = [int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w]|\.\d)", said) if 1 <= int(number) < top]
    fewer = max(bounds, default=FEWER if top > FEWER else 0)
    return replace(dialect, top=fewer or None)


def unusable(failure: ServerFailure) -> str:
    """What to do about a server that cannot be asked about two images at all; "" where that is not what it says."""
    if failure.kind != "refused":
        return ""
    if MANY.search(failure.said):
        return (
            "it takes one image in a request, and a pair has two: start it with room for two "
            """(vLLM: --limit-mm-per-prompt '{"image": 2}'), or take another model"""
        )
    if BLIND.search(failure.said):
        return "this model sees no images: take one that does (--server.model), or start the server with its vision part"
    return ""
