"""HPSv2.1 (Wu et al. 2023, arXiv 2306.09341): an open_clip ViT-H-14 tuned on people's choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.scorers.clip import OpenClipScorer, Source, folder_source, only, weight_files
from dedpo_diffusion.models.pretrained import fetching

MODEL = "ViT-H-14"
REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


class HpsScore(OpenClipScorer):
    """score = cosine(image, prompt); tables often show 100 times that. Versions 2.0 and 2.1 do not compare.

    `location` is a checkpoint file of a ViT-H-14, or a folder with open_clip_config.json (another architecture) and exactly one
    checkpoint; None fetches the published HPSv2.1.
    """

    name = "hps"
    temperature = 0.01  # it was trained with logits of 100 cosines
    arithmetic = "cos"

    def load(self, location: str | None) -> str:
        """The model at `location`."""
        return self.open(_source(location))

    def pixels(self, image: Image) -> Tensor:
        """The whole image, its longer side as long as the model's, on a black square."""
        return padded_square(image, self.model.visual.image_size[0])

    def combine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine."""
        return self.cosine(seen, prompts)


def _source(location: str | None) -> Source:
    if location is None:
        from huggingface_hub import hf_hub_download

        with fetching("hps", f"{FILE} of {REPOSITORY}", f"give hps=FILE, your copy of {FILE}"):
            return Source(MODEL, Path(hf_hub_download(REPOSITORY, FILE)))
    path = Path(location)
    if path.is_dir():  # a base model's file may lie there too, so none is preferred
        return folder_source("hps", path, weights=only("hps", path, weight_files(path)))
    if not path.is_file():
        raise UserError(f"hps: {location} is neither a file nor a folder here; give hps=FILE, your copy of {FILE}")
    return Source(MODEL, path)


def padded_square(image: Image, size: int) -> Tensor:
    """HPSv2's view of an image: scaled as numbers in [0, 1], padded with black, and normalised last, the padding too.

    Args:
        image: RGB.
        size: side of the square.

    Returns:
        (3, size, size) float32.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transform

    pixels = transform.to_tensor(image)
    scale = size / max(image.size)
    height, width = (max(1, round(side * scale)) for side in (image.height, image.width))
    if (width, height) != image.size:  # with antialias, torchvision's default since 0.17
        pixels = transform.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = torch.nn.functional.pad(pixels, (left, size - width - left, top, size - height - top))
    return transform.normalize(pixels, MEAN, STD)
