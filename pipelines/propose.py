"""Make pairs from a model's own images: where users without pairs start.

    dedpo propose --model shapes --prompts prompts.txt --out PAIRS

The images are sampled into PAIRS/proposals, so a stopped run goes on; once the pairs are written that folder is removed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say, say_next, stage
from dedpo_diffusion.core.engine import open_engine
from dedpo_diffusion.settings import ProposeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.sampling.sampler import Job


def check(settings: ProposeSettings) -> None:
    """Refuse what no pairs can be made by, before anything is sampled.

    Raises:
        UserError: images, a reward or numbers that do not go together.
    """
    from dedpo_diffusion.pairs.pairing import REWARDED

    count, pairing = settings.images_per_prompt, settings.pairing
    if count < 2 or (pairing == "disjoint" and count % 2):
        raise UserError(f"images_per_prompt {count}: give an even number, or any from 2 on with --pairing all")
    if (settings.out / "pairs").exists():
        raise UserError(f"{settings.out}: holds pairs already; choose another --out")
    if pairing in REWARDED and settings.reward is None:
        raise UserError(f"--pairing {pairing} needs --reward SCORER, which says what an image is worth")
    if pairing not in REWARDED and settings.reward is not None:
        raise UserError(f"--pairing {pairing} asks no --reward; leave it out, or take {', '.join(REWARDED)}")
    if settings.temperature is not None and not 0 < settings.temperature < math.inf:
        raise UserError(f"temperature is {settings.temperature}; it must be a positive number")
    if not 0.5 <= settings.threshold < 1:
        raise UserError(f"threshold is {settings.threshold}; it is the better image's probability: give a number from 0.5 to below 1")
    wanted = accepted_images(settings)
    if pairing == "rso" and (wanted % 2 or not 2 <= wanted <= count):
        raise UserError(f"accepted is {wanted}; give an even number from 2 to images_per_prompt, which is {count}")


def accepted_images(settings: ProposeSettings) -> int:
    """How many images of each prompt rso accepts."""
    return max(2, settings.images_per_prompt // 4 * 2) if settings.accepted is None else settings.accepted


def rewards_of(settings: ProposeSettings, work: Sequence[Job], images: Path) -> tuple[np.ndarray, float]:
    """(N,) rewards of the sampled images, and the temperature that goes with them.

    Raises:
        UserError: a scorer that cannot be loaded, or a score that is not finite.
    """
    import numpy as np

    from dedpo_diffusion.core.console import track
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry
    from dedpo_diffusion.judges.scorers import load_scorer
    from dedpo_diffusion.pairs.decoding import decode_image

    batch = int(settings.batch)
    judge = BradleyTerry(load_scorer(str(settings.reward), device=settings.device, batch=batch), temperature=settings.temperature)
    found = []
    for first in track(range(0, len(work), batch), "rewards", -(-len(work) // batch)):
        part = work[first : first + batch]
        pictures = [decode_image((images / job.file).read_bytes(), str(images / job.file)) for job in part]
        found.append(judge.score([job.prompt for job in part], pictures))
    return np.concatenate(found), judge.temperature


def run(settings: ProposeSettings) -> Path:
    """Make pairs from a model's own images."""
    import numpy as np

    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.models.memory import resolved_by
    from dedpo_diffusion.pairs.dataset import PairWriter
    from dedpo_diffusion.pairs.pairing import paired, told
    from dedpo_diffusion.sampling.prompts import read_prompts
    from dedpo_diffusion.sampling.recipe import MOST, Recipe
    from dedpo_diffusion.sampling.sampler import jobs, sample_folder

    check(settings)
    prompts = read_prompts(settings.prompts, categories=settings.categories, limit=settings.limit)
    work = jobs(prompts, settings.images_per_prompt, settings.seed)
    images = settings.out / "proposals"
    with open_engine(settings.engine, settings.ray, folders=[settings.out.absolute().parent], device=settings.device) as engine:
        fit, settings = settings.batch == "auto", resolved_by(engine, settings, most=MOST)
        recipe = Recipe(
            settings.model, settings.steps, settings.guidance, int(settings.batch), settings.size, lora=settings.lora,
            strength=settings.strength, config=settings.model_config, dtype=settings.dtype, fit=fit, prediction=settings.model_prediction,
        )  # fmt: skip
        sample_folder(images, work, settings, recipe, device=settings.device, engine=engine)
    rewards, temperature = (None, 1.0) if settings.reward is None else rewards_of(settings, work, images)
    source: dict[str, object] = {"model": settings.model, "steps": settings.steps, "guidance": settings.guidance}
    if settings.lora:
        strengths = settings.strength or [1.0] * len(settings.lora)
        source["lora"] = " + ".join(f"{file.name} x {strength:g}" for file, strength in zip(settings.lora, strengths, strict=True))
    options: dict[str, Any] = {"temperature": temperature, "threshold": settings.threshold, "wanted": accepted_images(settings)}
    made = []
    with PairWriter(settings.out, shard_pairs=settings.shard_pairs) as writer:
        for first in range(0, len(work), settings.images_per_prompt):
            group = work[first : first + settings.images_per_prompt]
            own = None if rewards is None else rewards[first : first + len(group)]
            rng = np.random.default_rng((settings.seed, group[0].prompt_index))
            made.append(paired(len(group), settings.pairing, own, rng=rng, **options))
            for a, b in made[-1]:
                one, other = group[a], group[b]
                about = {**source, "seed_0": one.seed, "seed_1": other.seed}
                if one.category is not None:
                    about["category"] = one.category
                if own is not None:
                    about |= {"reward_0": float(own[a]), "reward_1": float(own[b])}
                name = f"{one.prompt_index:05d}-{one.seed}-{other.seed}"
                writer.add(Pair(name, one.prompt, (images / one.file).read_bytes(), (images / other.file).read_bytes(), about))
        if not len(writer):
            raise UserError(f"{settings.out}: {told(settings.pairing, made, len(work))}; take another --pairing, --threshold or --reward")
    shutil.rmtree(images)
    say(f"{settings.out}: {len(work)} images of {len(prompts)} prompts, {told(settings.pairing, made, len(work))}")
    say_next("validate", settings.out)
    return settings.out


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ProposeSettings, run, argv, prog="dedpo propose", flags={name: name for name in ("categories", "lora", "strength")})


if __name__ == "__main__":
    raise SystemExit(main())
