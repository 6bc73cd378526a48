"""What every vision-language judge shares: the question, and what two answers in both orders of the images say.

A model's lean to the first or second place adds the same number to its log-odds in both orders, so it cancels:

    score_0 = log-odds of "the first image" with image 0 first,   score_1 = the same with image 1 first
    logit of P(image 0 is preferred) = (score_0 - score_1) / 2
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.judge import Answers

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPERATURE = 2.0  # the mean of the two orders' log-odds is their difference over 2
FIRST, SECOND = "1", "2"
MARK = "{prompt}"


@dataclass(frozen=True)
class Template:
    """The question's text; `digest` tells questions apart in a judge's version."""

    text: str
    digest: str

    def ask(self, prompt: str) -> str:
        """The question about a pair of this prompt."""
        return self.text.replace(MARK, prompt)


def read_template(path: Path | None) -> Template:
    """The question in a text file; None is the package's own.

    Raises:
        UserError: no such file, or it does not say where the prompt goes.
    """
    source = files("dedpo_diffusion.judges") / "prompts" / "pairwise.txt" if path is None else path
    try:
        text = source.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vlm.prompt {source} cannot be read as a text file ({error}); give another file") from error
    if MARK not in text:
        raise UserError(f"vlm.prompt {source} does not hold {MARK}, where the pair's prompt goes; add it")
    return Template(text, hashlib.sha256(text.encode()).hexdigest()[:8])


def fitted(image: Image, max_side: int | None) -> Image:
    """The image, shrunk so that its longer side has at most `max_side` pixels."""
    if max_side is None or max(image.size) <= max_side:
        return image
    from PIL import Image as Pillow

    scale = max_side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Pillow.Resampling.LANCZOS)


@dataclass(frozen=True)
class OrderAnswer:
    """A model's answer to one pair in one order.

    `logit` is its log-odds of "the first image"; `validity` the probability of both allowed answers together; `missing` says
    why there is no answer ("" where there is one), `failed` whether that is a server's fault, `unread` whether an answer came
    that says neither; tokens are counted where the model tells.
    """

    logit: float = np.nan
    validity: float = np.nan
    missing: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    failed: bool = False
    unread: bool = False


def both_orders(shown: list[OrderAnswer], swapped: list[OrderAnswer], *, min_validity: float) -> Answers:
    """Answers of N pairs from those with image 0 first (`shown`) and with image 1 first (`swapped`), N each.

    A pair is missing where either order is, or where the allowed answers are less probable than `min_validity`.
    `order_consistent` is whether both orders name the same image, `validity` the lesser of the two.
    """
    scores = np.array([[a.logit, b.logit] for a, b in zip(shown, swapped, strict=True)], dtype=np.float64).reshape(-1, 2)
    validity = [float(np.minimum(a.validity, b.validity)) for a, b in zip(shown, swapped, strict=True)]  # NaN where either is
    missing = [a.missing or b.missing or _improbable(v, min_validity) for a, b, v in zip(shown, swapped, validity, strict=True)]
    gone = np.array([bool(why) for why in missing], dtype=bool)
    scores[gone] = np.nan
    consistent: list[Any] = [None if why else bool(np.sign(a) == -np.sign(b)) for why, (a, b) in zip(missing, scores, strict=True)]
    extra = {
        "order_consistent": consistent,
        "validity": [None if np.isnan(v) else v for v in validity],
        "prompt_tokens": [a.prompt_tokens + b.prompt_tokens for a, b in zip(shown, swapped, strict=True)],
        "answer_tokens": [a.answer_tokens + b.answer_tokens for a, b in zip(shown, swapped, strict=True)],
    }
    return Answers(scores, missing, extra)


def _improbable(validity: float, least: float) -> str:
    if not validity < least:
        return ""
    return f"the model gave the two allowed answers a probability of {validity:.2f} together, less than {least:g}"
