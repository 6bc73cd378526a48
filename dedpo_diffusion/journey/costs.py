"""What the steps of a journey will take, in words: counts, and disk by rules of thumb; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.settings import AlignSettings

BYTES_A_PIXEL = 1.6  # of a PNG of a photograph-like image
SIDES = {"shapes": 64}  # pixels of a side, where nothing says so; else LARGE
LARGE = 1024


@dataclass(frozen=True)
class Known:
    """What is known of a journey's data: counted where it is there, told by the settings where it is not, None where nobody knows.

    `folder` is the pair dataset; `proposed` the pairs that will be proposed; `answers` how many answers of people are waited for,
    `share` the share of the pairs that simulated people label.
    """

    folder: Path
    proposed: int | None
    answers: int | None
    share: float | None

    def pairs(self) -> int | None:
        """How many pairs there are, or will be."""
        from dedpo_diffusion.pairs.dataset import PairReader

        return len(PairReader(self.folder)) if (self.folder / "pairs").is_dir() else self.proposed

    def labels(self) -> int | None:
        """How many pairs have a human label, or will have."""
        from dedpo_diffusion.labels.files import label_names, read_labels

        if "human" in label_names(self.folder):
            return len(read_labels(self.folder, "human", extras=()).pair_id)
        pairs = self.pairs()
        if self.share is not None:
            return None if pairs is None else round(self.share * pairs)
        return self.answers if pairs is None or self.answers is None else min(self.answers, pairs)

    def images(self) -> str:
        """The images of all pairs, in words."""
        pairs = self.pairs()
        return "the images of all pairs" if pairs is None else f"{2 * pairs} images"


def known_of(settings: AlignSettings, folder: Path) -> Known:
    """What is known before the first step."""
    prompts = prompt_count(settings.prompts, settings.limit)
    proposed = None if prompts is None else prompts * (settings.images_per_prompt // 2)
    return Known(folder, proposed, settings.votes or None, settings.human_share)


def prompt_count(source: str | None, limit: int | None) -> int | None:
    """How many prompts a source holds, within its limit; None where it is not here."""
    from dedpo_diffusion.sampling.prompts import read_prompts

    if source is None or source == "shapes":
        return None if source is None else limit
    try:
        return len(read_prompts(source, limit=limit))
    except UserError:
        return limit


def times(count: int | None, by: int) -> Any:
    """A product, or words for it."""
    return f"{by} x the evaluation's" if count is None else count * by


def evaluation_images(settings: AlignSettings, known: Known) -> int | None:
    """Images of the evaluation at one strength."""
    count = prompt_count(settings.eval_prompts, settings.eval_limit)
    return None if count is None else count * settings.eval_seeds


def side(settings: AlignSettings) -> int:
    """Pixels of a side, as far as the settings tell."""
    return settings.size or SIDES.get(settings.model, LARGE)


def disk_of_images(settings: AlignSettings, images: Any) -> str:
    """Disk that images of the settings' size take."""
    if not isinstance(images, int):
        return "disk: about 1.6 bytes a pixel"
    return f"about {size_words(images * side(settings) ** 2 * BYTES_A_PIXEL)} of disk"


def propose(settings: AlignSettings, known: Known) -> str:
    """Of proposing pairs."""
    if known.proposed is None:
        return "two images of every prompt"
    images = 2 * known.proposed
    steps = settings.sampler_steps or 50
    return f"{known.proposed} pairs: {images} images of {steps} steps; {disk_of_images(settings, 2 * images)} at most"


def train(settings: AlignSettings, recipe: Path, known: Known, *, first: bool) -> str:
    """Of training one LoRA: steps, visits, and the cache that all share."""
    import yaml

    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    optim = {"steps": 1000, "batch": 4, "accumulation": 1} | told.get("optim", {})
    steps, step = settings.steps or optim["steps"], optim["batch"] * optim["accumulation"]
    pairs = known.pairs()
    epochs = "" if pairs is None else f", {steps * step / pairs:.1f} times through {pairs} pairs"
    cached = ""
    if pairs is not None and first:
        cached = f"; cache: about {size_words(pairs * 8 * (side(settings) // 8) ** 2 * 4)} of disk for latents"
    return f"{steps} steps of {step} pairs{epochs}{cached}"
