"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP model whose logits are fitted to people's choices.

Any CLIPModel with a processor beside it can take PickScore's place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..console import UserError
from .embedding import EmbeddingScorer, in_one_line, weights_digest

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the published weights come without a processor
FILES = ["*.json", "*.txt", "*.safetensors"]  # nothing that would have to be unpickled
REMEDY = "give pickscore=FOLDER"


class PickScore(EmbeddingScorer):
    """score = exp(logit_scale) * cosine(image, prompt): the *logit*, so that P(0 over 1) = sigmoid(s_0 - s_1).

    Papers also report the cosine, or a logit / 26; those numbers do not compare with these. `location` is a folder in the file
    format of CLIPModel and its processor, or a hub id; None is the published PickScore.
    """

    name = "pickscore"
    temperature = 1.0  # it was fitted as a logit
    arithmetic = "logit"

    def load(self, location: str | None) -> str:
        """The folder's model and processor."""
        folder = _folder(location or MODEL)
        self.model = _load_model(folder)
        words = self.model.config.text_config.vocab_size
        self.processor = _load_processor(PROCESSOR if (location or MODEL) == MODEL else str(folder), words)
        self.scale = float(self.model.logit_scale.detach().float().exp())  # before the towers' precision rounds it
        return weights_digest(_weight_files(folder))

    def pixels(self, image: Image) -> Tensor:
        """As the model's own processor prepares it."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D), projected."""
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), projected; padded to the full context, so that no score depends on its neighbours' length."""
        tokenizer, context = self.processor.tokenizer, self.model.config.text_config.max_position_embeddings
        lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
        self.say_cut([prompt for prompt, length in zip(prompts, lengths, strict=True) if length > context], context)
        inputs = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=context, return_tensors="pt").to(self.device)
        return _tensor(self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))

    def combine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scaled cosine."""
        return self.scale * self.cosine(seen, prompts)


def _tensor(features: Any) -> Tensor:
    """transformers 5 gives an object whose pooler_output is projected already; earlier versions gave the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _folder(location: str) -> Path:
    """The folder itself, or a hub repository's local copy."""
    from huggingface_hub import snapshot_download

    if Path(location).is_dir():
        return Path(location)
    with in_one_line(f"pickscore: {location} is no folder here and cannot be had from the hub", REMEDY):
        return Path(snapshot_download(location, allow_patterns=FILES))


def _load_model(folder: Path) -> Any:
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading the weights: a second of noise
    with in_one_line(f"pickscore: {folder} holds no readable config.json, so it is no CLIP folder", REMEDY):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise UserError(f"pickscore: {folder} holds a model of type {kind!r}, not 'clip'; give the folder of a CLIPModel")
    with in_one_line(f"pickscore: {folder} cannot be loaded", "copy it again"):
        loaded: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:  # these would be left random
        raise UserError(f"pickscore: {folder}: the weights lack {sorted(info['missing_keys'])[0]}; copy the folder again")
    return model


def _load_processor(source: str, words: int) -> Any:
    """The processor, whose tokenizer must know the model's `words` (without its files transformers makes an empty one)."""
    from transformers import CLIPProcessor

    remedy = f"save the processor beside the model (published PickScore: that of {PROCESSOR})"
    with in_one_line(f"pickscore: {source} holds no CLIPProcessor", remedy):
        processor = CLIPProcessor.from_pretrained(source)
    if not 0.9 * words <= len(processor.tokenizer) <= words:  # some models pad their vocabulary
        known = f"a tokenizer of {len(processor.tokenizer)} tokens, and the model has {words}"
        raise UserError(f"pickscore: {source} holds no CLIPProcessor of this model ({known}); {remedy}")
    return processor


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))
