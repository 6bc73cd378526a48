"""CLIP score (Hessel et al. 2021, arXiv 2104.08718) with any open_clip model, and how such a model is found and loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.scorers.embedding import EmbeddingScorer
from dedpo_diffusion.models.pretrained import fetching, in_one_line, weights_digest

DEFAULT = "ViT-B-32:openai"  # the model of the CLIP score paper
CONFIG = "open_clip_config.json"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
PREFERRED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")  # what open_clip writes
HUB = "hf-hub:"


@dataclass(frozen=True)
class Source:
    """An open_clip model: the name of its architecture, its weight file, and what else these weights need."""

    architecture: str  # "ViT-B-32", "local-dir:FOLDER" or "hf-hub:OWNER/NAME"
    weights: Path
    options: dict[str, Any] = field(default_factory=dict)


class OpenClipScorer(EmbeddingScorer):
    """The towers of an open_clip model, with its own transform and tokenizer."""

    def open(self, source: Source) -> str:
        """Load the model; return the digests of its weights and of its settings.

        Raises:
            UserError: the weights are not those of the architecture.
        """
        open_clip = import_open_clip(self.name)
        what = f"{self.name}: {source.weights} cannot be loaded as a model {source.architecture}"
        with quiet(), in_one_line(what, f"give {self.name} the weights of that model"):
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                source.architecture, load_weights=False, pretrained_text=False, **source.options
            )
            open_clip.load_checkpoint(self.model, str(source.weights), strict=True, weights_only=True)
            self.tokenizer = open_clip.get_tokenizer(source.architecture)
            settings = [open_clip.get_model_config(source.architecture), self.model.visual.preprocess_cfg, source.options]
        written = json.dumps(settings, sort_keys=True).encode()
        return f"{weights_digest([source.weights])}-{hashlib.sha256(written).hexdigest()[:8]}"

    def pixels(self, image: Image) -> Tensor:
        """As open_clip prepares images for this model."""
        return self.transform(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D), projected."""
        return self.model.encode_image(pixels)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), projected."""
        context = self.tokenizer.context_length
        ends = self.tokenizer(["", *prompts], context_length=context + 1)[:, -1]  # of a prompt that fits: padding, as of ""
        self.say_cut([prompt for prompt, end in zip(prompts, ends[1:], strict=True) if end != ends[0]], context)
        return self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))


class ClipScore(OpenClipScorer):
    """score = 100 * cosine(image, prompt).

    `location` is one of

    * MODEL:TAG, a pair of `open_clip.list_pretrained()`; None is ViT-B-32:openai. Tags whose weights were trained with
      quick-gelu get it, under either name of the model.
    * MODEL:FILE, a checkpoint (.pt, .bin, .safetensors). A file does not tell its activation: weights in OpenAI's manner need a
      model whose name ends in -quickgelu.
    * FOLDER with open_clip_config.json and the weights.
    * hf-hub:OWNER/NAME, the same on the hub.
    """

    name = "clip"
    temperature = 1.0  # these models are trained with logits of 100 cosines; as judges of taste they need a fitted one
    arithmetic = "100cos"

    def load(self, location: str | None) -> str:
        """The model at `location`."""
        return self.open(find_source(self.name, location or DEFAULT))

    def combine(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 cosines."""
        return 100 * self.cosine(seen, prompts)


def import_open_clip(name: str) -> Any:
    """The package open_clip, for scorer `name`.

    Raises:
        UserError: it is not installed, or broken.
    """
    with in_one_line(f"{name} needs the package open_clip", "pip install open_clip_torch"):
        import open_clip
    return open_clip


def find_source(name: str, location: str) -> Source:
    """The open_clip model that a location names, for scorer `name`; weights of the hub are fetched.

    Raises:
        UserError: there is none.
    """
    open_clip = import_open_clip(name)
    if Path(location).is_dir():
        return folder_source(name, Path(location))
    remedy = f"give {name}=FOLDER"
    if location.startswith(HUB):
        with quiet(), fetching(name, location, remedy):
            return Source(location, Path(open_clip.pretrained.download_pretrained_from_hf(location.removeprefix(HUB))))
    written, _, weights = location.partition(":")
    model = written.replace("/", "-")
    if model not in open_clip.list_models():
        what = f"{name}: {location} is no folder here, and {written} is no model of open_clip"
        raise UserError(f"{what}; give MODEL:TAG, MODEL:FILE, FOLDER or {HUB}OWNER/NAME")
    settings = open_clip.get_pretrained_cfg(model, weights)
    if settings:
        with quiet(), fetching(name, location, remedy):
            path = Path(open_clip.download_pretrained(settings))
        kept = {f"image_{key}": settings.get(key) for key in ("mean", "std", "interpolation", "resize_mode")}
        return Source(model, path, {**kept, "force_quick_gelu": bool(settings.get("quick_gelu"))})
    if Path(weights).is_file():
        return Source(model, Path(weights))
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
    what = f"{name}: {weights or 'nothing'} is neither a file here nor a tag of {model} (tags: {tags})"
    raise UserError(f"{what}; give MODEL:TAG or MODEL:FILE")


def folder_source(name: str, folder: Path, *, weights: Path | None = None, besides: Sequence[Path] = ()) -> Source:
    """A folder with open_clip_config.json and `weights` (None finds them, `besides` the files that are something else).

    Raises:
        UserError: no such file in it, or several.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: {folder} holds no {CONFIG}; give a folder that open_clip saved")
    if weights is None:
        files = [path for path in weight_files(folder) if path not in besides]
        ours = [folder / preferred for preferred in PREFERRED if folder / preferred in files]
        weights = only(name, folder, ours[:1] or files)
    return Source(f"local-dir:{folder}", weights)


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that may hold weights."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def only(name: str, folder: Path, files: Sequence[Path], what: str = f"weights ({', '.join(SUFFIXES)})") -> Path:
    """The one file there should be.

    Raises:
        UserError: there is none, or several.
    """
    if len(files) == 1:
        return files[0]
    held = "no" if not files else f"{len(files)} files ({', '.join(path.name for path in files)}) that may be its"
    raise UserError(f"{name}: {folder} holds {held} {what}; keep exactly one there")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's notices, which go to the root logger and to warnings, off the screen; its errors are raised as well."""
    before, guard = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(guard)  # without any, logging.warning() sets up one for the whole program
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(guard)
