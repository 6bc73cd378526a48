"""Which judges there are, and how one is loaded by its name.

    judge = load_judge("pickscore=FOLDER", LabelSettings(...))
    judge.prefer(prompts, images_0, images_1)  # (N,) probabilities

Every judge answers with two raw scores a pair, kept with the label, so that calibration never needs the model again:

    P(image 0 is preferred) = sigmoid((score_0 - score_1) / temperature)
"""

from __future__ import annotations

import io
from contextlib import suppress
from itertools import islice
from pathlib import Path

from dedpo_diffusion.core import plugins
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.judge import Judge
from dedpo_diffusion.models.memory import resolved
from dedpo_diffusion.settings import LabelSettings

LOOKED_AT = 64  # pairs whose images' sizes are looked at before the first contact with a server
MOST = 64  # pairs, or images, at once that `--batch auto` stands for
JUDGES = ("vlm", "openai", "self")  # every scorer is a judge too


def largest_side(pairs: Path, least: int) -> int:
    """The longer side, in pixels, of the largest of a dataset's first images; `least` where there are none, or smaller ones.

    A look at all of them would read the whole dataset.
    """
    from PIL import Image

    from dedpo_diffusion.pairs.dataset import PairReader

    sides = [least]
    if (pairs / "pairs").is_dir():
        for pair in islice(PairReader(pairs).iter_pairs(), LOOKED_AT):
            for data in (pair.image_0, pair.image_1):
                with suppress(OSError), Image.open(io.BytesIO(data)) as image:  # what cannot be read is told of when it is its turn
                    sides.append(max(image.size))
    return max(sides)


def load_judge(spec: str, settings: LabelSettings) -> Judge:
    """Load a judge.

    Args:
        spec: a scorer's "name" or "name=location"; "vlm=FOLDER OR HUB ID", "openai=URL", "self=RUN,RUN,..."; or a judge of another package,
            which is made from its location (None without one) and the settings.
        settings: of the stage; temperature, batch, device and what the judge's family takes.

    Raises:
        UserError: unknown name, one that two packages offer or that cannot be imported, or what the judge needs is not there.
    """
    from dedpo_diffusion.judges.scorers import SCORERS, TOYS, load_scorer

    settings = resolved(settings, most=MOST)
    name, _, location = spec.partition("=")
    entry = plugins.find(name, [plugins.JUDGES, plugins.SCORERS], [*JUDGES, *SCORERS])
    if entry is not None and entry.group == plugins.JUDGES:
        return plugins.load(entry, callable, "a function or class that makes a judge")(location or None, settings)
    if name in JUDGES and not location:
        needed = {"vlm": "vlm=FOLDER (or a hub id)", "openai": "openai=URL", "self": "self=RUN,RUN"}[name]
        raise UserError(f"judge {name} needs a location: {needed}")
    if name == "vlm":
        from dedpo_diffusion.judges.vlm import VisionLanguageJudge

        return VisionLanguageJudge(
            location, settings.vlm, device=settings.device, batch=settings.vlm.batch, dtype=settings.dtype, temperature=settings.temperature
        )
    if name == "openai":
        from dedpo_diffusion.judges.openai_client import PROBE, ServerJudge

        largest = largest_side(settings.pairs, PROBE)
        return ServerJudge(location, settings.vlm, settings.server, temperature=settings.temperature, largest=largest)
    if name == "self":
        from dedpo_diffusion.judges.self_training import SelfTrainedJudge

        return SelfTrainedJudge(
            location.split(","), settings.pairs, settings.self_training, device=settings.device, temperature=settings.temperature
        )
    if entry is None and name not in SCORERS:
        known = plugins.known(name, [*SCORERS, *JUDGES], plugins.JUDGES, plugins.SCORERS, toys=TOYS)
        raise UserError(f"there is no judge {name!r} (give NAME or NAME=LOCATION); {known}")
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry

    scorer = load_scorer(spec, device=settings.device, batch=2 * int(settings.batch), dtype=settings.dtype)
    return BradleyTerry(scorer, temperature=settings.temperature)
