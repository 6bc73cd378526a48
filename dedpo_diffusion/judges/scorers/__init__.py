"""Scorers: one file each, from prompts and images to one number an image.

    scorer = load_scorer("pickscore=FOLDER", device=None, batch=64)
    scorer.score(prompts, images)  # (N,) float64

Some also say what their image tower saw: see `Embedder`.

A score never travels without the scorer's version: numbers of different versions do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dedpo_diffusion.core import plugins
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.pretrained import check_options

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Scorer(Protocol):
    """What every scorer offers.

    `name` is the registry's (a server's own, for http); `version` changes whenever the same image could get another number;
    `temperature` is the difference of two scores that makes a judge of this scorer sure to sigmoid(1) = 73 %.
    """

    name: str
    version: str
    temperature: float

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The score of each image for its prompt, higher is better.

        Args:
            prompts: N prompts.
            images: N images of any size and mode.

        Returns:
            (N,) float64.

        Raises:
            UserError: a prompt or image that this scorer cannot judge.
        """
        ...


@runtime_checkable
class Embedder(Scorer, Protocol):
    """A scorer that embeds images to score them, and gives the embeddings too."""

    def score_and_embed(self, prompts: Sequence[str], images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray]:
        """The scores (N,) as `score` gives them, and the images' embeddings (N, D) float32 of norm 1. Raises as `score`."""
        ...


def _late(module: str, name: str, **fixed: Any) -> Callable[..., Scorer]:
    """The class `name` of one of this package's modules, imported when it is called; `fixed` are options of it."""

    def make(location: str | None, **options: Any) -> Scorer:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{module}"), name)(location, **fixed, **options)

    return make


# each takes its location or None, and the keywords device, batch and dtype; so do those of other packages (core.plugins)
SCORERS: dict[str, Callable[..., Scorer]] = {
    "pickscore": _late("pickscore", "PickScore"),
    "clip": _late("clip", "ClipScore"),
    "hps": _late("hps", "HpsScore"),
    "aesthetic": _late("aesthetic", "AestheticScore"),
    "adapted": _late("adapted", "make_adapted"),
    "http": _late("http", "HttpScore"),
    "oracle_reward": _late("oracle", "OracleReward"),
    "oracle_accuracy": _late("oracle", "OracleAccuracy"),
    **{f"oracle_{name}": _late("oracle", "OracleAccuracy", attribute=name) for name in ("shape", "colour", "size", "background", "clean")},
}
TOYS = tuple(name for name in SCORERS if name.startswith("oracle_"))  # these know the images of Shapes and no others


def load_scorer(spec: str, *, device: str | None, batch: int, dtype: str = "float32") -> Scorer:
    """Load a scorer.

    Args:
        spec: "name", or "name=location" with the folder, file, hub id or address of what scores.
        device: torch device; None takes a GPU if there is one.
        batch: images scored at once.
        dtype: precision of the model's towers, one of DTYPES; norms, products and heads are float32 always.

    Raises:
        UserError: unknown name, one that two packages offer or that cannot be imported, a location without fitting weights, a batch
            below 1, or an unknown precision.
    """
    name, _, location = spec.partition("=")
    entry = plugins.find(name, [plugins.SCORERS], SCORERS)
    if entry is None and name not in SCORERS:
        known = plugins.known(name, SCORERS, plugins.SCORERS, toys=TOYS)
        raise UserError(f"there is no scorer {name!r} (give NAME or NAME=LOCATION); {known}")
    check_options(batch, dtype)
    make = SCORERS[name] if entry is None else plugins.load(entry, callable, "a function or class that makes a scorer")
    return make(location or None, device=device, batch=batch, dtype=dtype)
