"""Images from a model, each with a seed of its own, so that two models can share prompt, seed and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .bases import LEFT_OUT, load_pipeline
from .console import Progress, UserError, say
from .files import atomic_file, file_digest
from .models import Backbone
from .records import Conditioning
from .runs import open_run


def load_sampler(
    model: str, *, config: str | None = None, lora: Path | None = None, device: str | None = None, dtype: str = "float32"
) -> Any:
    """A Stable Diffusion pipeline ready to sample, with an adapter file loaded if one is given; `config` as in `load_pipeline`.

    Raises:
        UserError: model or adapter cannot be loaded.
    """
    pipe = load_pipeline(model, config=config, dtype=getattr(torch, dtype))
    if lora is not None:
        if not lora.is_file():
            raise UserError(f"{lora}: no such adapter file; `dedpo export RUN --out {lora}` writes one")
        try:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{lora}: this adapter does not fit {model} ({str(error).splitlines()[0]})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, size: int | None = None
) -> list[Image.Image]:
    """One image per (prompt, seed), sampled as one batch; the initial noise depends on the seed alone.

    Args:
        prompts: N prompts.
        seeds: N seeds, of CPU generators, so a GPU starts from the same noise.
        steps: sampler steps of the pipeline's own scheduler.
        guidance: classifier-free guidance scale.
        size: pixels of a side; None takes the model's own.

    Returns:
        N RGB images.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    result = pipe(list(prompts), generator=generators, num_inference_steps=steps, guidance_scale=guidance, height=size, width=size)
    return result.images


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
    """
    device, count = pipe.unet.device, len(seeds)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
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
    with torch.autocast(device.type, enabled=False):  # half precision overflows in some VAEs
        pixels = pipe.vae.decode(found.images.float() / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")


@dataclass(frozen=True)
class Job:
    """One image to sample; `file` is its name in the sample folder."""

    file: str
    prompt: str
    prompt_index: int
    seed: int


def jobs(prompts: Sequence[str], per_prompt: int, first_seed: int) -> list[Job]:
    """`per_prompt` images for each prompt, every image with a seed of its own, counted up from `first_seed`."""
    return [
        Job(f"{index:05d}-{first_seed + index * per_prompt + k}.png", prompt, index, first_seed + index * per_prompt + k)
        for index, prompt in enumerate(prompts)
        for k in range(per_prompt)
    ]


def sample_folder(
    folder: Path, work: Sequence[Job], settings: Any, *, model: str, lora: Path | None = None, device: str | None, dtype: str,
    steps: int, guidance: float, size: int | None, batch: int, config: str | None = None,
) -> None:  # fmt: skip
    """Sample every job into `folder` as PNG, then write `index.parquet`; a killed run goes on at its last batch.

    Raises:
        UserError: the folder holds samples of other settings, or the model cannot be loaded.
    """
    identity = {"lora": _digest(lora)}
    if (folder / "index.parquet").is_file():
        open_run(folder, settings, identity)
        say(f"{folder}: all {len(work)} images are there already")
        return
    pipe = load_sampler(model, config=config, lora=lora, device=device, dtype=dtype)  # before the folder is claimed: it may not exist
    open_run(folder, settings, identity)
    with Progress("sampling", len(work)) as progress:
        for part in _batches(work, batch):
            # a batch is sampled as a whole or not at all: a different batch could round differently
            if not all((folder / job.file).is_file() for job in part):
                images = sample(pipe, [j.prompt for j in part], [j.seed for j in part], steps=steps, guidance=guidance, size=size)
                for job, image in zip(part, images, strict=True):
                    save_png(folder / job.file, image, job, model)
            progress.advance(len(part))
    write_index(folder, work)


def write_index(folder: Path, work: Sequence[Job]) -> None:
    """Write `index.parquet`, which says what the images of a folder are."""
    columns = {name: [getattr(job, name) for job in work] for name in ("file", "prompt", "prompt_index", "seed")}
    with atomic_file(folder / "index.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)


def _batches(work: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(work), size):
        yield work[start : start + size]


def save_png(path: Path, image: Image.Image, job: Job, model: str) -> None:
    """Write an image with its prompt, seed and model in its metadata, atomically."""
    text = PngInfo()
    for key, value in (("prompt", job.prompt), ("seed", str(job.seed)), ("model", model)):
        text.add_itxt(key, value)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def _digest(path: Path | None) -> str:
    return file_digest(path) if path is not None and path.is_file() else ""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UserError: there is no such file, it is not UTF-8 text, or it holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompt in it; write one prompt a line")
    return prompts
