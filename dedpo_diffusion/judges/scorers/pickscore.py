"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP model whose logits are fitted to people's choices.

Any CLIPModel with a processor beside it can take PickScore's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.scorers.embedding import EmbeddingScorer
from dedpo_diffusion.models.pretrained import folder_digest, in_one_line, load_whole, local_or_hub, model_type

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the published weights come without a processor
FILES = ["*.json", "*.txt", "*.safetensors"]  # nothing that would have to be unpickled


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
        folder = local_or_hub(location or MODEL, FILES, name=self.name)
        self.model = _load_model(folder)
        words = self.model.config.text_config.vocab_size
        self.processor = _load_processor(PROCESSOR if (location or MODEL) == MODEL else str(folder), words)
        self.scale = float(self.model.logit_scale.detach().float().exp())  # before the towers' precision rounds it
        return folder_digest(folder, name=self.name)

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


def _load_model(folder: Path) -> Any:
    from transformers import CLIPModel

    kind = model_type(folder, name="pickscore", owner="CLIP")
    if kind != "clip":
        raise UserError(f"pickscore: {folder} holds a model of type {kind!r}, not 'clip'; give the folder of a CLIPModel")
    return load_whole(CLIPModel, folder, "float32", name="pickscore")


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
