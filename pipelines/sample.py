"""Sample images, seed-paired with every other model sampled with the same prompts and seed.

    dedpo sample --model shapes --lora mine.safetensors --prompts prompts.txt --out samples/mine
    dedpo sample --model shapes --lora mine.safetensors --strength 0.5 1 1.5 2 3 --prompts prompts.txt --out samples/mine
    accelerate launch --num_processes 4 pipelines/sample.py --model MODEL --prompts parti --out samples/base   # the GPUs of this machine
    dedpo sample --model MODEL --prompts parti --out samples/base --engine ray                                 # a Ray cluster

Writes PNG files, index.parquet (file, prompt, prompt_index, seed, category) and settings.yaml. Processes of one machine that run
the same command on the same folder share the images; several machines need `--engine ray`. Several strengths of one LoRA make a folder
each, samples/mine/strength-0.5 and so on, as if each had been sampled by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dedpo_diffusion.core.console import UserError, say_next, stage
from dedpo_diffusion.core.engine import Engine, open_engine
from dedpo_diffusion.pipelines.label import local_device
from dedpo_diffusion.settings import SampleSettings


def image_size(settings: SampleSettings) -> int | tuple[int, int] | None:
    """Pixels of a side, (height, width), or None for the model's own.

    Raises:
        UserError: settings that contradict each other.
    """
    if settings.height is None and settings.width is None:
        return settings.size
    if settings.height is None or settings.width is None or settings.size is not None:
        raise UserError("give height and width together, or size alone")
    return settings.height, settings.width


def of_shapes(prompts: Sequence[str]) -> bool:
    """Whether all are prompts of Shapes, which alone its oracle can judge."""
    from dedpo_diffusion.shapes.world import parse_prompt

    try:
        return [parse_prompt(prompt) for prompt in prompts] != []
    except ValueError:
        return False


def run(settings: SampleSettings) -> Path:
    """Sample images, seed-paired with every other model sampled with the same prompts and seed."""
    device = local_device(settings.device)
    with open_engine(settings.engine, settings.ray, folders=[settings.out.absolute().parent], device=device) as engine:
        return _sampled(settings, device, engine)


def _sampled(settings: SampleSettings, device: str | None, engine: Engine) -> Path:
    """The stage, by this engine."""
    from dedpo_diffusion.models.memory import resolved_by
    from dedpo_diffusion.sampling.prompts import read_prompts
    from dedpo_diffusion.sampling.recipe import MOST, Recipe
    from dedpo_diffusion.sampling.sampler import Target, jobs, sample_folders
    from dedpo_diffusion.sampling.strength_folders import check_sweep, is_sweep, strength_folder

    fit = settings.batch == "auto"
    settings = replace(resolved_by(engine, replace(settings, device=device), most=MOST), device=settings.device)
    recipe = Recipe(
        settings.model, settings.steps, settings.guidance, int(settings.batch), image_size(settings), settings.negative, settings.lora,
        settings.strength, settings.scheduler, settings.model_config, settings.dtype, fit,
        settings.model_prediction,
    )  # fmt: skip
    targets = [Target(settings.out, settings, recipe)]
    if is_sweep(settings.lora, settings.strength):
        check_sweep(settings.strength, settings.out)
        targets = []
        for strength in settings.strength:
            own = replace(settings, strength=[strength], out=settings.out / strength_folder(strength))
            targets.append(Target(own.out, own, replace(recipe, strength=own.strength)))
    prompts = read_prompts(settings.prompts, categories=settings.categories, limit=settings.limit)
    sample_folders(targets, jobs(prompts, settings.seeds, settings.seed), device=device, engine=engine)
    say_next("score", settings.out, "--with", "oracle_reward" if of_shapes([prompt.text for prompt in prompts]) else "pickscore")
    return settings.out


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    flags = {name: name for name in ("categories", "lora", "strength")}
    return stage(SampleSettings, run, argv, prog="dedpo sample", flags=flags)


if __name__ == "__main__":
    raise SystemExit(main())
