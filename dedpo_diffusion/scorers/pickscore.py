"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP model whose logits are fitted to people's choices.

Any CLIPModel with a processor beside it can take PickScore's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor

from ..console import UserError, say
from ..files import file_digest

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the published weights come without a processor
FILES = ["*.json", "*.txt", "*.safetensors"]  # nothing that would have to be unpickled


class PickScore:
    """score = exp(logit_scale) * cosine(image, prompt): the *logit*, so that P(0 over 1) = sigmoid(s_0 - s_1).

    Papers also report the cosine, or a logit / 26; those numbers do not compare with these.

    Args:
        location: a folder in the file format of CLIPModel and its processor, or a hub id; None is the published PickScore.
        device: torch device; None takes a GPU if there is one.
        batch: images scored at once.

    Raises:
        UserError: no such folder, or no CLIP model in it.
    """

    name = "pickscore"

    def __init__(self, location: str | None = None, *, device: str | None = None, batch: int = 64) -> None:
        folder = _folder(location or MODEL)
        self.model = _load_model(folder)
        words = self.model.config.text_config.vocab_size
        self.processor = _load_processor(PROCESSOR if (location or MODEL) == MODEL else str(folder), words)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.batch = batch
        self.version = f"pickscore-{weights_digest(folder)[:12]}-logit"

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """PickScore's logit of each image for its prompt.

        Args:
            prompts: N prompts; what a prompt has beyond the model's context is not read, which is said.
            images: N images.

        Returns:
            (N,) float64, computed in float32.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts, but {len(images)} images")
        parts = [slice(start, start + self.batch) for start in range(0, len(images), self.batch)]
        return np.concatenate([np.empty(0), *(self._score_batch(prompts[part], images[part]) for part in parts)])

    @torch.inference_mode()
    def _score_batch(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        cosine = (self._image_features(images) * self._text_features(prompts)).sum(-1)
        return (self.model.logit_scale.float().exp() * cosine).double().cpu().numpy()

    def _image_features(self, images: Sequence[Image]) -> Tensor:
        """(B, D) float32, of norm 1."""
        inputs = self.processor.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _normalised(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)))

    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) float32, of norm 1; padded to the full context, so that no score depends on its neighbours' length."""
        tokenizer, context = self.processor.tokenizer, self.model.config.text_config.max_position_embeddings
        different = list(dict.fromkeys(prompts))
        cut = [prompt for prompt, ids in zip(different, tokenizer(different)["input_ids"], strict=True) if len(ids) > context]
        if cut:
            say(f"pickscore reads {context} tokens and not the end of {len(cut)} longer prompts (first: {cut[0]!r})")
        inputs = tokenizer(different, padding="max_length", truncation=True, max_length=context, return_tensors="pt").to(self.device)
        features = _normalised(self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))
        return features[[different.index(prompt) for prompt in prompts]]


def _normalised(features: Any) -> Tensor:
    """transformers 5 gives an object whose pooler_output is projected already; earlier versions gave the tensor."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


def _folder(location: str) -> Path:
    """The folder itself, or a hub repository's local copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(location).is_dir():
        return Path(location)
    try:
        return Path(snapshot_download(location, allow_patterns=FILES))
    except (OSError, ValueError, HFValidationError) as error:  # no network, no such repository, no repository's name
        reason = str(error).strip().splitlines()[0]
        text = f"pickscore: {location} is no folder here and cannot be had from the hub ({reason}); give pickscore=FOLDER"
        raise UserError(text) from error


def _load_model(folder: Path) -> Any:
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading the weights: a second of noise
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"pickscore: {folder} holds no readable config.json, so it is no CLIP folder; give pickscore=FOLDER") from error
    if kind != "clip":
        raise UserError(f"pickscore: {folder} holds a model of type {kind!r}, not 'clip'; give the folder of a CLIPModel")
    try:
        loaded: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"pickscore: {folder} cannot be loaded ({str(error).strip().splitlines()[0]}); copy it again") from error
    model, info = loaded
    if info["missing_keys"]:  # these would be left random
        raise UserError(f"pickscore: {folder}: the weights lack {sorted(info['missing_keys'])[0]}; copy the folder again")
    return model.eval().requires_grad_(False)


def _load_processor(source: str, words: int) -> Any:
    """The processor, whose tokenizer must know the model's `words` (without its files transformers makes an empty one)."""
    from transformers import CLIPProcessor

    remedy = f"save the processor beside the model (published PickScore: that of {PROCESSOR})"
    try:
        processor = CLIPProcessor.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"pickscore: {source} holds no CLIPProcessor ({reason}); {remedy}") from error
    if not 0.9 * words <= len(processor.tokenizer) <= words:  # some models pad their vocabulary
        known = f"a tokenizer of {len(processor.tokenizer)} tokens, and the model has {words}"
        raise UserError(f"pickscore: {source} holds no CLIPProcessor of this model ({known}); {remedy}")
    return processor


def weights_digest(folder: Path) -> str:
    """SHA-256 of the folder's weight files (of their digests, where there are several), as hexadecimal digits.

    Raises:
        UserError: there are none.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no weights in it (model.safetensors)")
    digests = [file_digest(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
