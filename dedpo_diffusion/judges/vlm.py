"""A vision-language model on this machine as a judge: it is shown both images and answers with one token, 1 or 2.

Any model that transformers' AutoModelForImageTextToText loads and that takes two images in a chat will do. Take one that answers at
once: a model that thinks first gives the two answers too little probability, so its pairs have no answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.judges.judge import Answers, Judge, Question
from dedpo_diffusion.judges.question import FIRST, SECOND, TEMPERATURE, OrderAnswer, both_orders, fitted, read_template
from dedpo_diffusion.models.memory import BatchLimit
from dedpo_diffusion.models.pretrained import (
    check_options,
    folder_digest,
    in_one_line,
    load_whole,
    local_or_hub,
    model_type,
    usable,
)
from dedpo_diffusion.settings import VlmSettings

SETUP = ["*.json", "*.txt", "*.jinja", "*.model"]  # configuration, tokenizer, chat template
FILES = [*SETUP, "*.safetensors"]  # nothing that would have to be unpickled
DUPLICATES = ["consolidated*", "original/*"]  # the same weights in their makers' own format
UNREAD = {"generation_config.json", "model.safetensors.index.json"}  # files of SETUP that change no answer
DAY = "{%- macro strftime_now(format) -%}2026-01-01{%- endmacro -%}"  # some templates tell the model today's date: labels would change


class VisionLanguageJudge(Judge):
    """Log-odds of "the first image" in both orders of a pair's images; their mean cancels a lean to one place.

    The probability of an answer is pooled over all tokens that spell it ("1" and " 1" are often two).

    Args:
        location: a folder as transformers saves it, the processor beside the model, or a hub id.
        vlm: how the model is asked.
        device: torch device; None takes a GPU if there is one.
        batch: pairs asked about at once, each in both orders; halved where the GPU's memory is too small.
        dtype: precision of the model, one of DTYPES; the answer's probabilities are float32 always.
        temperature: in units of the log-odds; None takes 2, which gives their mean over the two orders.

    Raises:
        UserError: no such folder, no chat model for images in it, weights that are not all there, a missing package, or a
            setting out of range.
    """

    def __init__(
        self,
        location: str,
        vlm: VlmSettings,
        *,
        device: str | None = None,
        batch: int = 1,
        dtype: str = "float32",
        temperature: float | None = None,
    ) -> None:
        _check(vlm, batch, dtype)
        self.template = read_template(vlm.prompt)
        place = usable(device)
        folder = local_or_hub(location, FILES, name="vlm", ignored=DUPLICATES)
        _check_kind(folder)
        parts = [folder_digest(folder, name="vlm"), _setup_digest(folder), self.template.digest, dtype, vlm.max_side, vlm.min_validity]
        version = "-".join(["vlm", *map(str, parts)])
        super().__init__("vlm", version, TEMPERATURE if temperature is None else temperature)
        self.vlm, self.batch, self.parallel, self.dtype = vlm, batch, batch, dtype
        self.processor, self.chat = _load_processor(folder)
        self.model = _load_model(folder, dtype, place)
        self._prepare(folder)

    def _prepare(self, folder: Path) -> None:
        """What the tokenizer and the model need to be told, and a question to see that they fit together."""
        from transformers import GenerationConfig

        tokenizer = self.processor.tokenizer
        words = self.model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > words:
            raise UserError(f"vlm: {folder}: a tokenizer of {len(tokenizer)} tokens, and the model has {words}; copy the folder again")
        tokenizer.padding_side = "left"  # so that the answer's place is the last one in every row
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model.generation_config = GenerationConfig(
            max_new_tokens=1, do_sample=False, use_cache=False, output_logits=True, return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.controls = {*special, *tokenizer.all_special_tokens, getattr(self.processor, "image_token", None)} - {None, ""}
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        with in_one_line(f"vlm: {folder} cannot be asked about two images", "take another model"):
            inputs = self._inputs([Question("", "a grey square", grey, grey)])
            mark = getattr(self.processor, "image_token_id", None) or getattr(self.model.config, "image_token_id", None)
            if mark is not None and int((inputs["input_ids"] == mark).sum(-1).min()) < 2:  # not every release complains by itself
                raise ValueError("its chat template leaves the images out")
        self.first, self.second = (self._spellings(folder, answer) for answer in (FIRST, SECOND))

    def _spellings(self, folder: Path, answer: str) -> list[int]:
        """The tokens that spell an answer: which of them the model gives depends on how its chat template ends."""
        tokenizer = self.processor.tokenizer
        short = [token for text, token in tokenizer.get_vocab().items() if answer in text and len(text) <= len(answer) + 8]
        spellings = sorted(token for token in short if tokenizer.decode([token]).strip() == answer)
        if not spellings:
            raise UserError(f"vlm: the tokenizer in {folder} has no single token for the answer {answer!r}; take another model")
        return spellings

    def answer(self, questions: Sequence[Question]) -> Answers:
        """Both orders' log-odds of N pairs.

        A pair is missing where its prompt holds one of the model's control tokens, where it is longer than the model's context
        or its processor refuses it, and where the two answers have less than `min_validity` of the probability.

        Raises:
            UserError: the GPU's memory is too small.
        """
        found = [(OrderAnswer(missing=self._refusal(question.prompt)),) * 2 for question in questions]
        rows = [row for row, (answer, _) in enumerate(found) if not answer.missing]
        limit = BatchLimit(self.batch, name="vlm", what="pairs", remedy="lower --vlm.max_side")
        parts = limit.over(rows, lambda part: self._ask([questions[row] for row in part]))
        for row, pair in zip(rows, (pair for part in parts for pair in part), strict=True):
            found[row] = pair
        self.batch = limit.now
        return both_orders([shown for shown, _ in found], [swapped for _, swapped in found], min_validity=self.vlm.min_validity)

    def _refusal(self, prompt: str) -> str:
        held = sorted(token for token in self.controls if token in prompt)
        return f"the prompt holds the model's control token {held[0]}" if held else ""

    def _ask(self, questions: Sequence[Question]) -> list[tuple[OrderAnswer, OrderAnswer]]:
        """Answers to N questions with the images as they are and swapped."""
        try:
            inputs = self._inputs(questions)
        except ValueError as error:  # an image of impossible shape, a prompt without end: it must not take its neighbours along
            if len(questions) == 1:
                return [(OrderAnswer(missing=f"the model cannot be asked about it ({' '.join(str(error).split())})"),) * 2]
            return [answers for question in questions for answers in self._ask([question])]
        answers = self._answers(inputs)
        return list(zip(answers[: len(questions)], answers[len(questions) :], strict=True))

    def _inputs(self, questions: Sequence[Question]) -> Any:
        """What the model reads: N rows with the images as they are, then N with them swapped, padded on the left.

        Raises:
            ValueError: a question is not for this model.
        """
        pairs = [[fitted(image, self.vlm.max_side).convert("RGB") for image in (q.image_0, q.image_1)] for q in questions]
        texts = self._texts([question.prompt for question in questions])
        start = self.processor.tokenizer.bos_token  # some templates write it themselves
        inputs = self.processor(
            text=[*texts, *texts],
            images=[*pairs, *(pair[::-1] for pair in pairs)],
            padding=True,
            add_special_tokens=not (start and texts[0].startswith(start)),
            return_tensors="pt",
        )
        longest = int(inputs["attention_mask"].sum(-1).max())
        if self.context and longest > self.context:
            raise ValueError(f"{longest} tokens, and the model reads {self.context}")
        return inputs

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """The questions about N prompts, in the model's chat format, up to where its answer begins."""
        images = [{"type": "image"}, {"type": "image"}]
        chats = [[{"role": "user", "content": [*images, {"type": "text", "text": self.template.ask(prompt)}]}] for prompt in prompts]
        return self.processor.apply_chat_template(chats, chat_template=self.chat, add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def _answers(self, inputs: Any) -> list[OrderAnswer]:
        """The answer of each row; `generate` gives every architecture the positions that its padding asks for."""
        tokens = inputs["attention_mask"].sum(-1).tolist()
        logits = self.model.generate(**inputs.to(self.model.device, self.model.dtype)).logits[0].float()  # (rows, vocabulary)
        whole = logits.logsumexp(-1)
        first, second = (logits[:, spelling].logsumexp(-1) for spelling in (self.first, self.second))
        validity = (first - whole).exp() + (second - whole).exp()
        rows = zip((first - second).tolist(), validity.tolist(), tokens, strict=True)
        return [self._row(*row) for row in rows]

    def _row(self, logit: float, validity: float, tokens: int) -> OrderAnswer:
        missing = "" if math.isfinite(logit) else f"the model's answer is no number in {self.dtype}"
        return OrderAnswer(logit, min(validity, 1.0), missing, tokens, 1)  # rounding alone can carry validity above 1


def _check(vlm: VlmSettings, batch: int, dtype: str) -> None:
    check_options(batch, dtype)
    if not 0 <= vlm.min_validity <= 1:
        raise UserError(f"vlm.min_validity is {vlm.min_validity}; it must be a probability in [0, 1]")
    if vlm.max_side is not None and vlm.max_side < 1:
        raise UserError(f"vlm.max_side is {vlm.max_side}; it must be at least 1 pixel")


def _setup_digest(folder: Path) -> str:
    """Of the files that say how words and images reach the model."""
    paths = sorted({path for pattern in SETUP for path in folder.glob(pattern) if path.name not in UNREAD})
    return hashlib.sha256("".join(f"{path.name} {file_digest(path)}\n" for path in paths).encode()).hexdigest()[:8]


def _check_kind(folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = model_type(folder, name="vlm", owner="model's")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        text = f"vlm: {folder} holds a model of type {kind!r}, which this transformers does not know as one of images and text"
        raise UserError(f"{text}; take another model, or a newer transformers")


def _load_processor(folder: Path) -> tuple[Any, str]:
    """The processor and its chat template."""
    from transformers import AutoProcessor

    with in_one_line(f"vlm: the processor in {folder} cannot be loaded", "save the processor beside the model"):
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:
            text = f"vlm: the processor in {folder} needs a package that is missing ({' '.join(str(error).split())})"
            raise UserError(f"{text}; pip install -e '.[vlm]' where this project was cloned, or that package itself") from error
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise UserError(f"vlm: {folder} holds no processor of images and text; save the processor beside the model")
    chat = processor.chat_template
    chat = chat.get("default") if isinstance(chat, dict) else chat
    if not chat:
        raise UserError(f"vlm: {folder} has no chat template (chat_template.jinja); take a model that is made for chat")
    return processor, DAY + chat


def _load_model(folder: Path, dtype: str, device: torch.device) -> Any:
    from transformers import AutoModelForImageTextToText

    model = load_whole(AutoModelForImageTextToText, folder, dtype, name="vlm", remedy="copy it again, or take another model")
    with in_one_line(f"vlm: {folder} does not fit on device {device}", "give another --device, or a smaller --dtype"):
        return model.eval().requires_grad_(False).to(device)
