"""What a reply in OpenAI's protocol says: an answer, a refusal, thinking, or nonsense.

A model may put its answer into a sentence, markdown or JSON. What is read is strict: a text that names both images, without
saying which of them is the answer, is no answer.
"""

from __future__ import annotations

import json
import math
import re
import string
from typing import Any

from dedpo_diffusion.judges.question import FIRST, SECOND
from dedpo_diffusion.judges.scorers.http import ServerFailure, finite

ROUNDING = 1e-6  # of reported probabilities, which are float32: less than this is not known to be left over
LEAST = -700.0  # below it stands some servers' word for a probability of 0, such as -9999
BLANKS = string.whitespace + "\u2581\u0120"  # and vocabularies' own, which some servers do not decode
MARKS = "*_`#>\"'.:;!()[]{}<>$ \t"  # markdown around an answer
STANDALONE = re.compile(r"(?<![\w.,/%-])[12](?![\w/%]|[.,:]\d)")  # not in 10, 1.5, 2nd, 1/2, -1
WORD = r"(?:answer|choice|choose|pick|verdict|winner|preferred|preference|decision|selection)"
IMAGE = r"(?:(?:the|image|picture|option|number|no\.?)\s*)*"
STATED = re.compile(
    rf"\b(?:better|best|{WORD})\b(?:\s+(?:image|picture|option))?[\s*_`\"']*(?:is\b|:|=)[\s*_`\"']*{IMAGE}[*_`\"'(\[]*([12])"
    r"(?![\w/%]|[.,:]\d|[*_`\"']*\s*(?:or|and|nor)\b)",
    re.I,
)
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{\s*)?(?:image\s*)?([12])\s*\}", re.I)
KEY = re.compile(r"answer|choice|better|best|winner|prefer|verdict|decision|select|pick|image|result", re.I)
NAMED = re.compile(r"(?:image|picture|option)?[\s_#-]*([12])", re.I)
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>|^.*?</(?:think|thinking|thought|reasoning)>", re.S | re.I)
THINKING = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.I)
POLICY = re.compile(
    r"content[ _-]?(filter|polic|management|moderation|violation|safety)|moderation|responsible ?ai|safety (system|check|filter|policy)|"
    r"safety_|inappropriate|usage (guideline|polic)|data_inspection|prohibited.?content|sensitive.?content|blocked.{0,20}(safety|reason)|"
    r"violat\w* .{0,40}(polic|guideline|terms)|not allowed by our|\bflagged\b",
    re.I,
)
FILTERED = ("content_filter", "safety", "prohibited_content", "blocklist", "recitation", "spii", "image_safety", "refusal")


class Refused(Exception):
    """The model, or what watches over it, will not answer this question; the text says why, in one line."""


def nonsense(what: str) -> ServerFailure:
    """A failure of a server that answered, but not what was agreed."""
    return ServerFailure(f"the server answered nonsense: {what}", "nonsense")


def excerpt(text: str, most: int = 120) -> str:
    """The text in one line of printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def is_policy(failure: ServerFailure) -> bool:
    """Whether a failure is about what the question shows, not about the server."""
    return failure.kind in ("refused", "busy") and bool(POLICY.search(failure.said))


def choice_of(reply: Any) -> dict[str, Any]:
    """The reply's only answer.

    Raises:
        Refused: the question was blocked.
        ServerFailure: there is none.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    held = reply if isinstance(reply, dict) else {}
    words, error = json.dumps({key: held[key] for key in ("error", "prompt_feedback", "promptFeedback") if key in held}), _error_words(held)
    if POLICY.search(words) or "blockreason" in words.lower().replace("_", ""):
        raise Refused(f"refused: {excerpt(error or words)}")
    raise nonsense(f"no choices ({excerpt(error)})" if error else "no choices")


def _error_words(reply: dict[str, Any]) -> str:
    error = reply.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def check_refusal(choice: dict[str, Any]) -> None:
    """Raise `Refused` where the model will not answer."""
    message, finish = choice.get("message"), str(choice.get("finish_reason") or "").lower()
    said = message.get("refusal") if isinstance(message, dict) else None
    if isinstance(said, str) and said.strip():
        raise Refused(f"refused: {excerpt(said)}")
    error = choice.get("error")
    if isinstance(error, dict) and POLICY.search(json.dumps(error)):
        raise Refused(f"refused: {excerpt(str(error.get('message') or error))}")
    if finish in FILTERED:
        raise Refused(f"refused: the answer was filtered (finish_reason {finish})")


def text_of(choice: dict[str, Any]) -> str:
    """What was said behind any thinking, "" where nothing was; text in parts is joined."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        return ""
    text = THOUGHT.sub("", content)
    return THINKING.split(text)[0].strip()  # a thought that was cut off is no answer


def thinks(choice: dict[str, Any]) -> bool:
    """Whether the model thought before it answered, or in place of that."""
    message = choice.get("message")
    parts = message if isinstance(message, dict) else {}
    if any(isinstance(parts.get(key), str) and parts[key].strip() for key in ("reasoning_content", "reasoning")):
        return True
    content = parts.get("content")
    if isinstance(content, str) and THINKING.match(content.strip()):
        return True
    return not text_of(choice) and was_cut(choice)


def was_cut(choice: dict[str, Any]) -> bool:
    """Whether the answer ended because it had no more room."""
    return choice.get("finish_reason") in ("length", "max_tokens", "MAX_TOKENS")


# ---- token probabilities


def reported(choice: dict[str, Any], place: int = 0) -> list[Any] | None:
    """The likeliest tokens at one place of the answer as the server lists them; None where it lists none."""
    content = _tokens(choice)
    here = content[place] if len(content) > place else None
    top = here.get("top_logprobs") if isinstance(here, dict) else None
    return top if isinstance(top, list) and top else None


def _tokens(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return content if isinstance(content, list) else []


def read_logprobs(choice: dict[str, Any], place: int = 0) -> tuple[float, float]:
    """The logit and the validity; a logit of NaN where neither answer is among the reported tokens.

    Raises:
        ServerFailure: no token probabilities, or such as cannot be.
    """
    top = reported(choice, place)
    if top is None:
        raise nonsense("no token probabilities this time")
    mass: dict[str, float] = {}
    least, total = math.inf, 0.0
    for entry in top:
        token, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not finite(value) or value > ROUNDING:
            raise nonsense(f"a token {token!r} of log-probability {value!r}"[:100])
        if value < LEAST:
            continue
        bare = token.strip(BLANKS)
        mass[bare] = mass.get(bare, 0.0) + math.exp(value)
        least, total = min(least, value), total + math.exp(value)
    if total > 1 + 1e-3:
        raise nonsense(f"token probabilities that add up to {total:.3f}")
    first, second = mass.get(FIRST, 0.0), mass.get(SECOND, 0.0)
    if first == second == 0.0:
        return math.nan, 0.0
    bound = min(least, math.log(max(1 - total, ROUNDING)))
    logs = [math.log(p) if p > 0 else bound for p in (first, second)]
    return logs[0] - logs[1], min(1.0, first + second)


def answer_place(choice: dict[str, Any]) -> int | None:
    """The place of the token that is the answer which the text gives; None where the text gives none or no token stands for it alone."""
    answer = read_text(choice)
    tokens = [entry.get("token") if isinstance(entry, dict) else None for entry in _tokens(choice)]
    places = [k for k, token in enumerate(tokens) if isinstance(token, str) and token.strip(BLANKS) == answer]
    return places[0] if answer and len(places) == 1 else None


# ---- texts


def read_text(choice: dict[str, Any]) -> str:
    """The answer, FIRST or SECOND, or "" where the text holds both or neither, or was cut off.

    Raises:
        ServerFailure: there is no text at all, though there was room for one.
    """
    text = text_of(choice)
    if not text:
        if was_cut(choice) or thinks(choice):
            return ""
        raise nonsense("no text")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if was_cut(choice):
        return _bare(lines[0]) if len(lines) > 1 else ""  # "1" and then reasons, which are not needed
    for read in (_from_json, _from_statement):
        if stated := read(text):
            return stated if len(stated) == 1 else ""
    alone = {_bare(lines[0]), _bare(lines[-1])} - {""}
    found = alone or set(STANDALONE.findall(text))
    return found.pop() if len(found) == 1 else ""


def _bare(line: str) -> str:
    """The answer that is all of a line but for marks and "image" or "answer"."""
    found = re.fullmatch(rf"(?:{WORD}\W+)?(?:the\s+)?(?:image|picture|option)?\s*[*_`\"'(\[]*([12])", line.strip(MARKS), re.I)
    return found[1] if found and not re.search(r"[-.]\s*[12]", line.strip("*_`\"' ")) else ""


def _from_statement(text: str) -> str:
    """All answers that are stated as such, once each: "Answer: 1"."""
    return "".join(sorted(set(STATED.findall(text)) | set(BOXED.findall(text))))


def _from_json(text: str) -> str:
    """The answers that a JSON object in the text gives, once each."""
    start, end = text.find("{"), text.rfind("}")
    try:
        held = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(held, dict):
        return ""
    told = {key: _named(value) for key, value in held.items()}
    chosen = {told[key] for key in held if told[key] and (len(held) == 1 or KEY.search(key)) and not re.search(r"\d", key)}
    return "".join(sorted(chosen))


def _named(value: Any) -> str:
    """1, "1", "Image 1", "image_1" as FIRST; the like for SECOND; "" for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return ""
    found = NAMED.fullmatch(str(value).strip(MARKS))
    return found[1] if found else ""


def from_counts(first: int, second: int, samples: int) -> tuple[float, float]:
    """The logit and the validity; a logit of NaN where no sample is valid."""
    if first + second == 0:
        return math.nan, 0.0
    return math.log((first + 0.5) / (second + 0.5)), (first + second) / samples
