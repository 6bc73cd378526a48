"""The text encoders of a Stable Diffusion: from prompts to tokens to what the UNet is conditioned on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from dedpo_diffusion.core.records import Conditioning

AT_ONCE = 4  # prompts
ABSENT = -1  # in place of the tokens of a prompt whose embedding is zeros
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # the encoders' attention projections
BORROWED = Lock()  # tokenizers work for one thread at a time, and pairs are loaded in another
NAMES = ("text_encoder", "text_encoder_2")  # what diffusers calls them


class TextEncoders(nn.Module):
    """One encoder (SD1.x, SD2.x), or SDXL's two.

    Args:
        pipe: a pipeline of diffusers.
        two: SDXL's arithmetic: the last but one layer of both encoders side by side, and the second's embedding of the whole prompt.

    Attributes:
        absent_is_zero: whether the absent prompt is zeros, as SDXL's pipeline has it, rather than the empty prompt.
        adapted: whether `add_lora` was called.
    """

    def __init__(self, pipe: Any, *, two: bool) -> None:
        super().__init__()
        self.two = two
        self.absent_is_zero = two and bool(pipe.config.get("force_zeros_for_empty_prompt", True))
        found = [pipe.text_encoder, *([pipe.text_encoder_2] if two else [])]
        self.tokenizers = [pipe.tokenizer, *([pipe.tokenizer_2] if two else [])]
        self.encoders: Any = nn.ModuleList(part.requires_grad_(False).eval() for part in found)
        self.adapted = False

    def tokens(self, prompts: Sequence[str | None]) -> Tensor:
        """Tokens (N, encoders, L) int64 of N prompts, None for the absent one; longer prompts are cut, as everywhere in this family."""
        words = ["" if prompt is None else prompt for prompt in prompts]
        whole = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        with BORROWED:
            ids = [tokenizer(words, max_length=tokenizer.model_max_length, **whole).input_ids for tokenizer in self.tokenizers]
        found = torch.stack(ids, dim=1)
        if self.absent_is_zero:
            found[[row for row, prompt in enumerate(prompts) if prompt is None]] = ABSENT
        return found

    def forward(self, tokens: Tensor) -> Conditioning:
        """Embeddings of tokens (N, encoders, L): float32, without sizes; the same to the bit whatever they are encoded with."""
        with torch.autocast(tokens.device.type, enabled=False):  # a prompt is cheap, and what a cache holds is float32
            return Conditioning.cat([self._encode(part).at(slice(count)) for part, count in chunks(tokens, AT_ONCE)])

    def _encode(self, tokens: Tensor) -> Conditioning:
        ids = tokens.clamp(min=0).unbind(dim=1)
        if not self.two:
            return Conditioning(self.encoders[0](ids[0])[0].float())
        found = [encoder(part, output_hidden_states=True) for encoder, part in zip(self.encoders, ids, strict=True)]
        text = torch.cat([part.hidden_states[-2].float() for part in found], dim=-1)  # without the final norm
        pooled = found[1][0].float()
        if self.absent_is_zero:
            said = (tokens[:, 0, 0] != ABSENT).to(text.dtype)
            text, pooled = text * said[:, None, None], pooled * said[:, None]
        return Conditioning(text, pooled)

    def add_lora(self, options: dict[str, Any]) -> None:
        """Give every encoder an adapter on its attention projections, in float32.

        The last layer of SDXL's first encoder is left out: nothing is made of what it gives.

        Args:
            options: of peft's LoraConfig.
        """
        from peft import LoraConfig, inject_adapter_in_model

        for number, encoder in enumerate(self.encoders):
            left_out = last_layer(encoder) if self.two and number == 0 else None
            config = LoraConfig(target_modules=list(ATTENTION), exclude_modules=left_out, **options)
            inject_adapter_in_model(config, encoder)  # the encoder's own add_adapter asks for a peft that may not be out yet
        self.adapted = True

    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters, as "text_encoder.encoder.layers..."; some versions of transformers say text_model in between."""
        return {
            f"{name}.{key.removeprefix('text_model.')}": parameter
            for name, encoder in zip(NAMES, self.encoders, strict=False)
            for key, parameter in encoder.named_parameters()
            if "lora_" in key
        }

    def switch(self, on: bool) -> None:
        """Put the adapters on or off."""
        if not self.adapted:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.encoders.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)


def chunks(values: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Chunks of `size` rows of a tensor (N, ...), each with the number of rows that count: the last is filled up with its last row.

    Chunks of one size make an encoding the same to the bit, whatever it is encoded with: what a cache holds and what a step encodes.
    """
    for start in range(0, len(values), size):
        part = values[start : start + size]
        count = len(part)
        yield (torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])]) if count < size else part), count


def last_layer(encoder: Any) -> str:
    """A pattern of the names in an encoder's last layer."""
    return rf".*layers\.{encoder.config.num_hidden_layers - 1}\..*"
