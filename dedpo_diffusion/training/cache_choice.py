"""data.cache and data.reference_draws of auto: what is worth keeping in a run of this length."""

from __future__ import annotations

from dataclasses import replace

from dedpo_diffusion.core.caches import user_root
from dedpo_diffusion.core.console import say
from dedpo_diffusion.settings import DataSettings, TrainSettings

DRAWS = 8  # stored for each pair
VISITS, SAVED = 2, 1000  # of each pair at least, and encodings saved at least, for a cache


def needs_cache(data: DataSettings) -> bool:
    """Whether another option works with a cache alone."""
    return data.buckets or data.groups is not None or data.reference_draws is not None


def decide(settings: TrainSettings, pairs: int, processes: int) -> TrainSettings:
    """The settings with what auto stands for.

    Stored reference errors pay once a pair is visited more often than it has draws. A cache pays once pairs are visited again and again;
    mirrored or cropped pairs are drawn anew at every visit instead, unless data.views says how many of them to keep.

    Args:
        settings: of a run.
        pairs: that it visits.
        processes: that train.
    """
    data, optim = settings.data, settings.optim
    visits = optim.steps * optim.batch * optim.accumulation * processes
    if data.reference_draws == "auto":
        stored = visits > DRAWS * pairs or data.noise in ("own", "inverted")
        data = replace(data, reference_draws=DRAWS if stored else None)
        often = f"{visits / pairs:.1f} visits of each pair"
        say(f"{often}: the reference's errors are " + (f"stored at {DRAWS} draws of each" if stored else "computed at every visit"))
    if data.cache == "auto":
        varied = (data.flip or data.crop != "centre") and data.views == 1
        pays = visits >= VISITS * pairs * data.views and visits - pairs * data.views >= SAVED and not varied
        data = replace(data, cache=user_root() if pays or needs_cache(data) else None)
    return replace(settings, data=data)
