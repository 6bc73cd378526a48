"""Images from a model, each with a seed of its own, so that two models can share prompt, seed and noise.

An image starts from noise that is a function of its seed and the latent's shape alone (`initial_noise`): the same for every
model of that shape, every LoRA, sampler, precision, device, batch size and number of processes. What a batch holds may change
how sums are rounded, and so the last bits of an image; so batches are cut from the whole list of images, the same way by
however many processes, and an image is always sampled in the same company (a GPU that has no room for it takes it in halves).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.core.engine import Crew, Engine, LocalEngine
from dedpo_diffusion.core.files import atomic_file, file_digest
from dedpo_diffusion.core.locks import share_tasks
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.models.backbone import Backbone, fingerprint
from dedpo_diffusion.models.loading import LEFT_OUT, load_pipeline
from dedpo_diffusion.models.marks import settle
from dedpo_diffusion.models.memory import BatchLimit
from dedpo_diffusion.models.pretrained import in_one_line
from dedpo_diffusion.sampling.claims import LOCKS, claimed, lock_folder, open_samples
from dedpo_diffusion.sampling.decoding import guard_decoding, is_tiled
from dedpo_diffusion.sampling.fitting import batch_limit, changes_text, encode_once, forecast
from dedpo_diffusion.sampling.loras import add_loras, set_strengths
from dedpo_diffusion.sampling.png import Whole, parameters, tensor_hash, write_png
from dedpo_diffusion.sampling.recipe import SCHEDULERS, Recipe
from dedpo_diffusion.weights.run_folder import began, has_begun, open_run, read_identity

# ---- one batch


def load_sampler(
    model: str, *, config: str | None = None, lora: Path | Sequence[Path] | None = None, strength: Sequence[float] = (),
    scheduler: str | None = None, device: str | None = None, dtype: str = "float32", prediction: str | None = None,
) -> Any:  # fmt: skip
    """A Stable Diffusion pipeline ready to sample; arguments as in `Recipe`, and the device, None for a GPU if there is one.

    The pipeline bears the fingerprint of the model without LoRAs and `scheduler` as `base_fingerprint`.

    Raises:
        UserError: model or adapter cannot be loaded, or the adapter is another model's.
    """
    import diffusers

    pipe = load_pipeline(model, config=config, dtype=getattr(torch, dtype), prediction=prediction)
    encoders = [part for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if part is not None]
    pipe.base_fingerprint = fingerprint(pipe.unet, pipe.vae, *encoders, facts=_schedule(pipe))
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
        settle(pipe, model)
    add_loras(pipe, model, [lora] if isinstance(lora, Path) else lora or (), strength)
    pipe.set_progress_bar_config(disable=True)
    with in_one_line(f"{model} does not fit on the device in {dtype}", "give --dtype bfloat16, or --device cpu"):
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return guard_decoding(pipe)


def _schedule(pipe: Any) -> dict[str, Any]:
    """The scheduler's class and its own settings, those aside that it was given for another class and those that JSON cannot say."""
    own = inspect.signature(type(pipe.scheduler)).parameters
    config = {name: value for name, value in pipe.scheduler.config.items() if name in own and value not in (math.inf, -math.inf)}
    return {"class": type(pipe.scheduler).__name__, "config": config}


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The noise that images start from, (N, C, h, w) float32 on the CPU, and the generators from which samplers draw on.

    Args:
        seeds: N seeds; an image's noise depends on its own alone.
        shape: (C, h, w) of a latent.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]), generators


def image_size(pipe: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels; `size` as in `Recipe`.

    Raises:
        UserError: the model cannot draw such images.
    """
    if size is None:
        own = pipe.unet.config.sample_size
        height, width = (side * pipe.vae_scale_factor for side in (own if isinstance(own, list | tuple) else (own, own)))
        return height, width
    height, width = (size, size) if isinstance(size, int) else size
    step = max(8, pipe.vae_scale_factor)
    if min(height, width) < step or height % step or width % step:
        raise UserError(f"{height} x {width} pixels cannot be sampled; height and width must be multiples of {step}")
    return height, width


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, size: int | tuple[int, int] | None = None,
    negative: str | None = None,
) -> list[Image.Image]:  # fmt: skip
    """One image per (prompt, seed), sampled as one batch from `initial_noise`; a batch of another size may round differently.

    Args:
        pipe: of `load_sampler`.
        prompts: N prompts.
        seeds: N seeds.
        steps, guidance, size, negative: as in `Recipe`.

    Returns:
        N RGB images.

    Raises:
        UserError: an image with numbers that are not finite.
    """
    height, width = image_size(pipe, size)
    noise, generators = initial_noise(
        seeds, (pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    )
    result = pipe(
        list(prompts), negative_prompt=None if negative is None else [negative] * len(prompts), generator=generators,
        latents=noise.to(pipe.unet.dtype), num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
        output_type="np",
    )  # fmt: skip
    remedy = "give --dtype float32 or bfloat16, a smaller --strength, or another LoRA or model"
    return _finite(pipe, result.images, [f"{seed} of {prompt!r}" for seed, prompt in zip(seeds, prompts, strict=True)], remedy)


def _finite(pipe: Any, pixels: np.ndarray, names: Sequence[str], remedy: str) -> list[Image.Image]:
    """Images of pixels (N, H, W, 3) from 0 to 1; what is not finite would become black."""
    for name, image in zip(names, pixels, strict=True):
        if not np.isfinite(image).all():
            raise UserError(f"the image of seed {name} is not finite; {remedy}")
    return pipe.image_processor.numpy_to_pil(pixels)


def sampler_around(model: Backbone, vae: Any) -> Any:
    """A pipeline around a model that is being trained, as it is, without text encoders; `vae` decodes, and needs no encoder."""
    tokenizers = {name: None for name in ("tokenizer", "tokenizer_2", "text_encoder_2") if name == "tokenizer" or model.told_sizes}
    pipe = model.pipeline(
        vae=vae, unet=model.unet, scheduler=model.scheduler, text_encoder=None, **tokenizers, **LEFT_OUT[model.pipeline.__name__]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample_encoded(
    pipe: Any, prompts: Conditioning, absent: Conditioning, seeds: Sequence[int], *, steps: int, guidance: float,
    shape: tuple[int, int, int],
) -> list[Image.Image]:  # fmt: skip
    """As `sample`, for encoded prompts, within the autocast of the caller; the sampler and the VAE compute in float32.

    Args:
        pipe: of `sampler_around`.
        prompts: N prompts, as `Backbone.encode_prompts` gives them.
        absent: the absent prompt, one entry.
        seeds: N seeds.
        steps, guidance: as in `sample`.
        shape: (C, h, w) of a latent.

    Raises:
        UserError: an image with numbers that are not finite.
    """
    device, count = pipe.unet.device, len(seeds)
    noise, generators = initial_noise(seeds, shape)
    side = shape[1] * pipe.vae_scale_factor
    words: dict[str, Any] = {"prompt_embeds": prompts.text.to(device)}
    words["negative_prompt_embeds"] = absent.text.to(device).expand(count, -1, -1)
    if prompts.pooled is not None and absent.pooled is not None:
        words["pooled_prompt_embeds"] = prompts.pooled.to(device)
        words["negative_pooled_prompt_embeds"] = absent.pooled.to(device).expand(count, -1)
    # guidance and sampler compute in the precision of what the UNet gives
    widened = pipe.unet.register_forward_hook(lambda module, given, out: tuple(value.float() for value in out))
    try:
        found = pipe(
            **words, latents=noise.to(device), generator=generators, num_inference_steps=steps, guidance_scale=guidance, height=side,
            width=side, output_type="latent",
        )  # fmt: skip
    finally:
        widened.remove()
    return decode_latents(pipe, found.images, [str(seed) for seed in seeds])


@torch.no_grad()
def decode_latents(pipe: Any, latents: torch.Tensor, names: Sequence[str]) -> list[Image.Image]:
    """N RGB images of scaled latents (N, C, h, w) of a model in training; `names` tell their seeds.

    Raises:
        UserError: an image with numbers that are not finite.
    """
    with torch.autocast(latents.device.type, enabled=False):  # half precision overflows in some VAEs
        pixels = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample
    remedy = "the training has diverged; begin anew with a lower optim.lr"
    return _finite(pipe, pipe.image_processor.postprocess(pixels, output_type="np"), names, remedy)


# ---- a folder of images


@dataclass(frozen=True)
class Prompt:
    """A prompt, its place in the set that it is of, and its category, if it has one."""

    index: int
    text: str
    category: str | None = None


@dataclass(frozen=True)
class Job:
    """One image to sample; `file` is its name in the sample folder."""

    file: str
    prompt: str
    prompt_index: int
    seed: int
    category: str | None = None


def jobs(prompts: Sequence[Prompt], per_prompt: int, first_seed: int) -> list[Job]:
    """`per_prompt` images for each prompt, every image of the whole set with a seed of its own, counted up from `first_seed`.

    Raises:
        UserError: fewer than one image a prompt, or seeds that no generator takes.
    """
    if per_prompt < 1:
        raise UserError(f"{per_prompt} images of each prompt; give at least 1")
    if not 0 <= first_seed < 2**62:
        raise UserError(f"seed is {first_seed}; give a number from 0 to {2**62 - 1}")
    numbers = [(prompt, first_seed + prompt.index * per_prompt + k) for prompt in prompts for k in range(per_prompt)]
    return [Job(f"{prompt.index:05d}-{seed}.png", prompt.text, prompt.index, seed, prompt.category) for prompt, seed in numbers]


@dataclass(frozen=True)
class Target:
    """A sample folder to fill: where, the settings of the stage that its `settings.yaml` tells, and how its images are sampled."""

    folder: Path
    settings: Any
    recipe: Recipe


def sample_folder(
    folder: Path, work: Sequence[Job], settings: Any, recipe: Recipe, *, device: str | None, engine: Engine | None = None
) -> None:
    """Sample every job into one folder; as `sample_folders`."""
    sample_folders([Target(folder, settings, recipe)], work, device=device, engine=engine)


def sample_folders(targets: Sequence[Target], work: Sequence[Job], *, device: str | None, engine: Engine | None = None) -> None:
    """Sample every job into each folder as PNG, then write `index.parquet`; a killed run goes on at its last batch.

    Processes of this machine that do the same at the same time share the batches, and need not know of each other. An image that
    is missing or damaged is sampled again, in the company that it had. A worker loads the model once. Every batch goes through all
    folders, so that its prompts are encoded once, unless a LoRA changes the text encoders.

    Args:
        targets: the sample folders, whose recipes differ in the LoRAs' strengths alone; another run of a folder must have the same
            settings.
        work: the images, in the order in which batches are cut from them.
        device: torch device; None takes a GPU if there is one.
        engine: samples; None is this process.

    Raises:
        UserError: a folder holds samples of other settings or prompts, or the model cannot be loaded.
    """
    with claimed([target.folder for target in targets]):
        _fill(targets, work, device, engine or LocalEngine())


def _fill(targets: Sequence[Target], work: Sequence[Job], device: str | None, engine: Engine) -> None:
    for target in targets:
        target.recipe.check()
    recipe = targets[0].recipe
    listed = hashlib.sha256(json.dumps([asdict(job) for job in work]).encode()).hexdigest()
    loras = [{"name": file.stem, "sha256": file_digest(file), "hash": tensor_hash(file)} for file in recipe.lora]
    identity = {"lora": ",".join(lora["sha256"] for lora in loras), "images": listed}
    whole = {target.folder: Whole(target.folder) for target in targets}
    begun = [target for target in targets if (target.folder / "identity.json").is_file() and has_begun(target.folder)]
    for target in begun:  # say before a model is loaded what can be said
        held = read_identity(target.folder, "choose another --out, or remove the folder")
        open_run(target.folder, target.settings, identity | ({"model": held["model"]} if "model" in held else {}), free=("out",))
    finished = [target for target in begun if all(whole[target.folder](job.file) for job in work)]
    for target in finished:
        if _is_index(target.folder, work):
            say(f"{target.folder}: all {len(work)} images are there already")
    if len(finished) < len(targets):
        crew = engine.crew(partial(_pipeline, recipe, device))
        model = crew.ask(partial(_looked_at, recipe))
        for target in targets:
            open_samples(target.folder, target.settings, identity | {"model": model})  # not before: it may not exist
        _sample_batches(targets, work, crew, engine, Drawing(targets, loras, work[0].prompt, model), whole)
    for _ in share_tasks(
        [target.folder for target in targets],
        pending=lambda folder: {} if _is_index(folder, work) else {"index": lock_folder(folder) / "index.lock"},
        work=lambda folder, _: write_index(folder, work),
    ):
        pass
    for target in targets:
        shutil.rmtree(target.folder / LOCKS, ignore_errors=True)


def _pipeline(recipe: Recipe, device: str | None) -> Any:
    """What a worker loads."""
    return load_sampler(
        recipe.model, config=recipe.config, lora=recipe.lora, strength=recipe.strength, scheduler=recipe.scheduler, device=device,
        dtype=recipe.dtype, prediction=recipe.prediction,
    )  # fmt: skip


def _looked_at(recipe: Recipe, pipe: Any) -> str:
    """The fingerprint of the model without LoRAs, which can draw such images."""
    image_size(pipe, recipe.size)
    return pipe.base_fingerprint


def _sample_batches(
    targets: Sequence[Target], work: Sequence[Job], crew: Crew[Any], engine: Engine, drawing: Drawing, whole: Mapping[Path, Whole]
) -> None:
    """Sample what is not there yet."""
    batch, folders = targets[0].recipe.batch, range(len(targets))
    parts = [work[start : start + batch] for start in range(0, len(work), batch)]
    tasks = [Batch(number, target, part) for number, part in enumerate(parts) for target in folders]
    todo = [task for task in tasks if not all(whole[targets[task.target].folder](job.file) for job in task.part)]
    total, left = len(work) * len(targets), sum(len(task.part) for task in todo)
    if left < total:
        say(f"{total - left} of {total} images are there already; resuming")
    calls = None if engine.many else targets[0].recipe.steps * len(todo)
    with Progress("sampling", total, start=total - left) as progress:
        for number, _ in crew.run(todo, partial(SampleWorker, replace(drawing, calls=calls))):
            progress.advance(len(todo[number].part))
            began(targets[todo[number].target].folder)
    engine.see([targets[task.target].folder / job.file for task in todo for job in task.part] if engine.many else [])


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together, for one of the sample folders."""

    number: int
    target: int
    part: Sequence[Job]

    def __str__(self) -> str:
        return f"the images {self.part[0].file} to {self.part[-1].file}"


@dataclass(frozen=True)
class Drawing:
    """What all batches share.

    Attributes:
        targets: the sample folders.
        loras: which LoRAs these are, strengths aside.
        prompt: one to measure memory with.
        model: the fingerprint of the model without LoRAs.
        calls: of the UNet in all, for a forecast; None makes none.
    """

    targets: Sequence[Target]
    loras: Sequence[Mapping[str, Any]]
    prompt: str
    model: str
    calls: int | None = None


class SampleWorker:
    """Samples batches; see `core.locks.SharingWorker`.

    Raises:
        UserError: the pipeline that this worker has loaded is of another model.
    """

    def __init__(self, drawing: Drawing, pipe: Any) -> None:
        if pipe.base_fingerprint != drawing.model:
            raise UserError(f"the nodes of the cluster load different models as {drawing.targets[0].recipe.model}; give all the same files")
        recipe = drawing.targets[0].recipe
        size = image_size(pipe, recipe.size)
        self.drawing, self.pipe, self.facts = drawing, pipe, _facts(pipe, recipe, size)
        if len(drawing.targets) > 1 and not changes_text(pipe):
            encode_once(pipe)
        self.limit = batch_limit(pipe, recipe, drawing.prompt, size)
        self.whole = [Whole(target.folder) for target in drawing.targets]
        self.forecast = ExitStack()
        if drawing.calls is not None:
            self.forecast.enter_context(forecast(pipe, recipe.model, drawing.calls))

    def pending(self, task: Batch) -> dict[str, Path]:
        """The lock of a batch that lacks an image."""
        if all(self.whole[task.target](job.file) for job in task.part):
            return {}
        return {"images": lock_folder(self.drawing.targets[task.target].folder) / f"{task.number:06d}.lock"}

    def work(self, task: Batch, _: list[str]) -> None:
        """Sample a batch, and write what is missing of it."""
        target, loras = self.drawing.targets[task.target], self.drawing.loras
        strengths = list(target.recipe.strength) or [1.0] * len(loras)
        if len(self.drawing.targets) > 1:
            set_strengths(self.pipe, strengths)
        told = [{**lora, "strength": strength} for lora, strength in zip(loras, strengths, strict=True)]
        _draw_batch(target, task.part, self.pipe, self.whole[task.target], {**self.facts, "lora": told}, self.limit)


def _draw_batch(target: Target, part: Sequence[Job], pipe: Any, whole: Whole, facts: Mapping[str, Any], limit: BatchLimit) -> None:
    """Sample one batch, and write what is missing of it; `facts` are those of all images of the folder."""
    folder, recipe = target.folder, target.recipe
    missing = [job for job in part if not whole(job.file)]
    for job in missing:
        if (folder / job.file).exists():
            say(f"{folder / job.file} is damaged; it is sampled again")

    def draw(some: Sequence[Job]) -> list[Image.Image]:
        return sample(
            pipe, [job.prompt for job in some], [job.seed for job in some], steps=recipe.steps, guidance=recipe.guidance,
            size=recipe.size, negative=recipe.negative,
        )  # fmt: skip

    drawn = [(image, limit.now) for images in limit.over(part, draw) for image in images]
    for job, (image, together) in zip(part, drawn, strict=True):
        if job in missing:
            told = {**facts, "batch": together} | ({"vae": "tiled"} if is_tiled(pipe) else {})
            save_png(folder / job.file, image, job, recipe.model, told)
    began(folder)


def _facts(pipe: Any, recipe: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """What is the same of all images, LoRAs aside; with an image's own prompt and seed it says how to make the image again."""
    return {
        "model": recipe.model, "model_config": recipe.config, "model_fingerprint": pipe.base_fingerprint, "negative": recipe.negative,
        **({} if recipe.prediction is None else {"model_prediction": recipe.prediction}),
        "steps": recipe.steps, "guidance": recipe.guidance, "height": size[0], "width": size[1], "scheduler": _schedule(pipe),
        "dtype": recipe.dtype, "device": pipe.device.type, "batch": recipe.batch,
        "versions": {name: version(name) for name in ("dedpo_diffusion", "torch", "diffusers", "transformers", "peft")},
    }  # fmt: skip


def save_png(path: Path, image: Image.Image, job: Job, model: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write an image with its prompt, seed and model in its text chunks, atomically.

    With `facts` also the keys `dedpo`, JSON with everything that it takes to make the image again, and `parameters`, the same
    for people's viewers.
    """
    texts = {"prompt": job.prompt, "seed": str(job.seed), "model": model}
    if facts is not None:
        whole = {"prompt": job.prompt, "seed": job.seed, **facts}
        texts = {"parameters": parameters(whole), **texts, "dedpo": json.dumps(whole, allow_nan=False)}
    write_png(path, image, texts)


def write_index(folder: Path, work: Sequence[Job]) -> None:
    """Write `index.parquet`, which says what the images of a folder are: file, prompt, prompt_index, seed, category."""
    with atomic_file(folder / "index.parquet") as temporary:
        pq.write_table(_index(work), temporary)


def _index(work: Sequence[Job]) -> pa.Table:
    texts, whole = pa.string(), pa.int64()
    kinds = {"file": texts, "prompt": texts, "prompt_index": whole, "seed": whole, "category": texts}
    return pa.Table.from_pylist([asdict(job) for job in work], schema=pa.schema(kinds.items()))


def _is_index(folder: Path, work: Sequence[Job]) -> bool:
    """Whether the folder's index is there, and says this."""
    try:
        return pq.read_table(folder / "index.parquet").equals(_index(work))
    except (OSError, pa.ArrowInvalid):
        return False
