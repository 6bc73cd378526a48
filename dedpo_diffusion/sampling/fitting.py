"""How many images a device samples at once, and on a CPU how long all of them are going to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dedpo_diffusion.core.pace import Forecast
from dedpo_diffusion.models.memory import BatchLimit, Meter, meter_of, slow_on_cpu, tell_cpu
from dedpo_diffusion.sampling.recipe import Recipe

STEPS = 2  # of the sampler while memory is measured; every step takes the same


def batch_limit(pipe: Any, recipe: Recipe, prompt: str, size: tuple[int, int], *, meter: Meter | None = None) -> BatchLimit:
    """How many images of a batch go through the UNet at once; measured where the recipe asks for it and the device is a GPU.

    Args:
        pipe: of `load_sampler`.
        recipe: how images are sampled.
        prompt: one to measure with.
        size: (height, width) in pixels.
        meter: of the device's memory; None takes its own.
    """
    limit = BatchLimit(recipe.batch, name="sampling", what="images", remedy="give --dtype bfloat16, or a smaller --size")
    if recipe.fit:
        limit.fit(lambda count: probe(pipe, recipe, prompt, size, count), meter or meter_of(pipe.device))
    return limit


def probe(pipe: Any, recipe: Recipe, prompt: str, size: tuple[int, int], count: int) -> None:
    """Put `count` images through the UNet as sampling does, which holds most; the VAE of a GPU takes them one by one."""
    pipe(
        [prompt] * count, negative_prompt=None if recipe.negative is None else [recipe.negative] * count,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)], num_inference_steps=STEPS,
        guidance_scale=recipe.guidance, height=size[0], width=size[1], output_type="latent",
    )  # fmt: skip


@contextmanager
def forecast(pipe: Any, model: str, calls: int) -> Iterator[None]:
    """Say that a large model runs on the CPU, and soon how long all `calls` of its UNet take: a batch alone may take hours."""
    if not slow_on_cpu(pipe.unet):
        yield
        return
    tell_cpu(model)
    whole = Forecast(calls, after=2)
    hook = pipe.unet.register_forward_hook(lambda *_: whole.advance())
    try:
        yield
    finally:
        hook.remove()


def changes_text(pipe: Any) -> bool:
    """Whether a LoRA that is loaded changes a text encoder."""
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return any(".lora_A." in name for encoder in encoders if encoder is not None for name, _ in encoder.named_parameters())


def encode_once(pipe: Any) -> None:
    """Keep what a pipeline's text encoders gave for the last prompts, and give it again while the same prompts are asked for."""
    encode, last = pipe.encode_prompt, []  # type: tuple[Any, list[Any]]

    def kept(*given: Any, **more: Any) -> Any:
        if not last or last[0] != (given, more):
            last[:] = [(given, more), encode(*given, **more)]
        return last[1]

    pipe.encode_prompt = kept
