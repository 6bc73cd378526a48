"""Scorers that anyone can check by hand."""

from __future__ import annotations

import numpy as np


class Brightness:
    """The mean pixel."""

    name, version, temperature = "brightness", "brightness-1", 1.0

    def score(self, prompts, images):
        return np.array([np.asarray(image, dtype=np.float64).mean() for image in images])


class Watched(Brightness):
    """Counts the images it scores, and dies like a killed process after `last` of them."""

    scored = 0
    last: float = float("inf")

    def score(self, prompts, images):
        if Watched.scored + len(images) > Watched.last:
            raise KeyboardInterrupt
        Watched.scored += len(images)
        return super().score(prompts, images)


def register(monkeypatch) -> None:
    """Make `Watched` known as the scorer "brightness", with its counters at the start."""
    from dedpo_diffusion.judges import scorers

    for name, value in (("scored", 0), ("last", float("inf")), ("version", "brightness-1")):
        monkeypatch.setattr(Watched, name, value)
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Watched())
