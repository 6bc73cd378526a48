"""LAION's improved aesthetic predictor, version 2: a small head on OpenAI's CLIP ViT-L/14, from 1 (poor) to 10; reads no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.judges.scorers.clip import OpenClipScorer, find_source, folder_source, only, weight_files
from dedpo_diffusion.judges.scorers.embedding import normalised
from dedpo_diffusion.models.pretrained import in_one_line

MODEL = "ViT-L-14:openai"
FILE = "sac+logos+ava1-l14-linearMSE.pth"
LAYERS = (0, 2, 4, 6, 7)  # dropout, which does nothing here, has the other numbers
REMEDY = f"give aesthetic=FILE, your copy of {FILE} (GitHub: christophschuhmann/improved-aesthetic-predictor)"


class AestheticScore(OpenClipScorer):
    """score = head(embedding / |embedding|), where the head is five linear layers with nothing in between.

    `location` is the head's file, on OpenAI's ViT-L-14 from the hub; or a folder with open_clip_config.json, the weights of that
    CLIP model, and the head in a file whose name begins with "head" or "aesthetic" or contains "linearMSE".
    """

    name = "aesthetic"
    temperature = 1.0  # nothing says how surely a point more is preferred: arbitrary until calibrated
    arithmetic = "linear"

    def load(self, location: str | None) -> str:
        """The head and its CLIP model; the head first, since it is small."""
        if location is None:
            raise UserError(f"aesthetic needs the weights of its head; {REMEDY}")
        path = Path(location)
        if path.is_dir():
            heads = [file for file in weight_files(path) if _is_head(file)]
            head = only(self.name, path, heads, "head (head*, aesthetic* or *linearMSE*)")
            source = folder_source(self.name, path, besides=heads)
        elif path.is_file():
            head, source = path, None
        else:
            raise UserError(f"aesthetic: {location} is neither a file nor a folder here; {REMEDY}")
        layers = _read_head(head)
        digests = self.open(source or find_source(self.name, MODEL))
        given, taken = self.model.visual.output_dim, layers[0][0].shape[1]
        if given != taken:
            fact = f"{head} takes {taken} numbers an image, and the CLIP model gives {given}"
            raise UserError(f"aesthetic: {fact}; use the head of that model")
        self.head = [(weight.to(self.device), bias.to(self.device)) for weight, bias in layers]
        return f"{digests}-{file_digest(head)[:12]}"

    def combine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """The head's number; the prompts do not matter."""
        x = normalised(seen)
        for weight, bias in self.head:
            x = torch.nn.functional.linear(x, weight, bias)
        return x[:, 0]


def _is_head(file: Path) -> bool:
    return file.name.startswith(("head", "aesthetic")) or "linearMSE" in file.name


def _read_head(path: Path) -> list[tuple[Tensor, Tensor]]:
    """The weight (out, in) and bias (out) of each layer, float32."""
    from safetensors.torch import load_file

    with in_one_line(f"aesthetic: {path} cannot be read", REMEDY):
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    names = [f"layers.{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")]
    held = held if isinstance(held, dict) else {}
    wrong = [f"it lacks {key}" for key in names if key not in held] + [f"it also holds {key}" for key in held if key not in names]
    if wrong:
        raise UserError(f"aesthetic: {path} is not the head ({wrong[0]}); {REMEDY}")
    head = [(held[f"layers.{layer}.weight"].float(), held[f"layers.{layer}.bias"].float()) for layer in LAYERS]
    sides = [weight.shape[1] for weight, _ in head] + [1]
    if [weight.shape[0] for weight, _ in head] != sides[1:] or [bias.shape for _, bias in head] != [(side,) for side in sides[1:]]:
        raise UserError(f"aesthetic: {path} is not the head (its layers do not fit together); {REMEDY}")
    return head
