"""Counting the tokens of prompts by a model's own tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.loading import resolve_model
from dedpo_diffusion.models.text_encoders import BORROWED
from dedpo_diffusion.pairs.prompt_tokens import TokenCounter, clip_counter

FOLDERS = ("tokenizer", "tokenizer_2")  # as diffusers calls them
MARKS = 2  # tokens that say where a prompt begins and ends


def counter_of(tokenizers: Sequence[Any], name: str) -> TokenCounter:
    """By one or several tokenizers of a model: a prompt is as long as it is for the one that needs most.

    Args:
        tokenizers: of transformers.
        name: the model's, for messages.
    """

    def count(prompts: Sequence[str]) -> list[int]:
        with BORROWED:
            found = [tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids for tokenizer in tokenizers]
        return [max(map(len, ids)) for ids in zip(*found, strict=True)]

    return TokenCounter(name, min(tokenizer.model_max_length for tokenizer in tokenizers) - MARKS, count)


def model_counter(model: str) -> TokenCounter:
    """By the tokenizers of a diffusers folder, a hub id or "shapes"; of a single file, which holds none, by CLIP's.

    Raises:
        UserError: there is no such model, or its tokenizers cannot be read.
    """
    from transformers import CLIPTokenizer

    location = resolve_model(model)
    if Path(location).is_file():
        return clip_counter()
    folders = [name for name in FOLDERS if not Path(location).is_dir() or (Path(location) / name).is_dir()]
    found = []
    for name in folders:
        try:
            found.append(CLIPTokenizer.from_pretrained(location, subfolder=name))
        except Exception as error:
            if name == FOLDERS[0] or Path(location).is_dir():  # of the hub's models only some have two
                said = (str(error).splitlines() or ["?"])[0]
                raise UserError(f"{model}: its {name} cannot be read ({said}); copy the model again, or leave --model out") from error
    if not found:
        raise UserError(f"{model}: it has no tokenizer; copy the model again, or leave --model out")
    return counter_of(found, model)
