"""Make pairs from a model's own images: where users without pairs start.

    dedpo propose --model shapes --prompts prompts.txt --out PAIRS

The images are sampled into PAIRS/proposals, so a stopped run goes on; once the pairs are written that folder is removed.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError, say, say_next, stage
from dedpo_diffusion.core.engine import open_engine
from dedpo_diffusion.settings import ProposeSettings

if TYPE_CHECKING:
    from dedpo_diffusion.sampling.sampler import Job


def pairings(group: Sequence[Job], pairing: str) -> Iterator[tuple[Job, Job]]:
    """The pairs among the K images of one prompt line: K / 2 disjoint ones, or all K (K - 1) / 2."""
    if pairing == "all":
        return itertools.combinations(group, 2)
    return zip(group[0::2], group[1::2], strict=True)


def run(settings: ProposeSettings) -> Path:
    """Make pairs from a model's own images."""
    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.models.memory import resolved_by
    from dedpo_diffusion.pairs.dataset import PairWriter
    from dedpo_diffusion.sampling.prompts import read_prompts
    from dedpo_diffusion.sampling.recipe import MOST, Recipe
    from dedpo_diffusion.sampling.sampler import jobs, sample_folder

    if settings.images_per_prompt < 2 or (settings.pairing == "disjoint" and settings.images_per_prompt % 2):
        raise UserError(f"images_per_prompt {settings.images_per_prompt}: give an even number, or any from 2 on with --pairing all")
    if (settings.out / "pairs").exists():
        raise UserError(f"{settings.out}: holds pairs already; choose another --out")
    prompts = read_prompts(settings.prompts, categories=settings.categories, limit=settings.limit)
    work = jobs(prompts, settings.images_per_prompt, settings.seed)
    images = settings.out / "proposals"
    with open_engine(settings.engine, settings.ray, folders=[settings.out.absolute().parent], device=settings.device) as engine:
        fit, settings = settings.batch == "auto", resolved_by(engine, settings, most=MOST)
        recipe = Recipe(
            settings.model, settings.steps, settings.guidance, int(settings.batch), settings.size, config=settings.model_config,
            dtype=settings.dtype, fit=fit, prediction=settings.model_prediction,
        )  # fmt: skip
        sample_folder(images, work, settings, recipe, device=settings.device, engine=engine)
    source = {"model": settings.model, "steps": settings.steps, "guidance": settings.guidance}
    with PairWriter(settings.out, shard_pairs=settings.shard_pairs) as writer:
        for _, group in itertools.groupby(work, key=lambda job: job.prompt_index):
            for a, b in pairings(list(group), settings.pairing):
                told = {**source, "seed_0": a.seed, "seed_1": b.seed}
                if a.category is not None:
                    told["category"] = a.category
                name = f"{a.prompt_index:05d}-{a.seed}-{b.seed}"
                writer.add(Pair(name, a.prompt, (images / a.file).read_bytes(), (images / b.file).read_bytes(), told))
    shutil.rmtree(images)
    say(f"{settings.out}: {len(work)} images of {len(prompts)} prompts, paired {settings.pairing}")
    say_next("validate", settings.out)
    return settings.out


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ProposeSettings, run, argv, prog="dedpo propose", flags={"categories": "categories"})


if __name__ == "__main__":
    raise SystemExit(main())
