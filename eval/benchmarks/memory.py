"""Peak GPU memory of training by configs/, and of sampling, computed without a GPU: the project's own step on tensors that have sizes
but no numbers.

    python eval/benchmarks/memory.py --out memory.json

A `Backbone` of the published size (`random_models.py`), `preference_step`, backward, clipping and the optimizer run under torch's
FakeTensorMode, and `AllocationCounter` counts the storages that are alive, in blocks of 512 bytes as torch's allocator for CUDA does. Fake
tensors of a CUDA device cannot run backward on a machine without one, so they are those of a processor, made to follow the rules of CUDA:
attention keeps queries, keys, values, output and log-sum-exp (the flash and memory-efficient kernels), and autocast computes norms in
float32. A test compares the forward pass under those rules with autocast on fake CUDA tensors, and the count with a real run.

Not seen: what exists only inside of a kernel (a convolution's workspace), the CUDA context, and fragmentation. `OVERHEAD` is assumed for
them. Memory is that of the second micro-batch of the second optimizer step, when gradients and moments are there; of the optimizer's own
step, if that needs more; and, apart from them, of filling the cache, which comes before the UNet is on the device. While sampling all
parts of the model are on the device in one precision, the UNet predicts with and without the prompt at once, and the VAE decodes one
image after the other, as `dedpo sample` has it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from dedpo_diffusion.core.console import say, stage, track

if TYPE_CHECKING:
    from dedpo_diffusion.core.records import PairBatch
    from dedpo_diffusion.models.backbone import Backbone

BLOCK = 512  # bytes
OVERHEAD = 0.8 * 2**30  # bytes assumed for CUDA's context, workspaces and fragmentation
LENGTH = 77  # tokens of a prompt
MODELS = {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15"}


@dataclass(frozen=True)
class MemorySettings:
    """Settings of the computation.

    Args:
        out: file for the result (JSON).
        configs: files of configs/, without their ending.
        models: models that images are sampled from.
        batches: images sampled at once.
    """

    out: Path
    configs: list[str] = field(default_factory=lambda: ["sdxl_lora_12gb", "sdxl_lora", "sd15_full"])
    models: list[str] = field(default_factory=lambda: ["sd15", "sd21", "sdxl"])
    batches: list[int] = field(default_factory=lambda: [1, 2, 4])


def _apply(module: Any, change: Callable[[Any], Any], recurse: bool = True) -> Any:
    """In place of `nn.Module._apply`, which cannot exchange fake parameters."""
    import torch

    for child in module.children() if recurse else ():
        _apply(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                made = change(parameter)
            if made is not parameter:
                module._parameters[name] = torch.nn.Parameter(made.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _attention(query: Any, key: Any, value: Any, **_: Any) -> Any:
    """Attention without a mask by a kernel that keeps no matrix of scores."""
    import torch

    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


def _in_float32(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that autocast computes in float32 on CUDA devices, made to do so on a processor."""
    import torch

    def cast(*args: Any, **options: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return call(*args, **options)
        with torch.autocast("cpu", enabled=False):
            wide = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
            return call(*wide, **{key: arg.float() if isinstance(arg, torch.Tensor) else arg for key, arg in options.items()})

    return cast


@contextmanager
def fake(*, cuda_rules: bool = True) -> Iterator[None]:
    """Tensors made inside hold no numbers; with `cuda_rules` attention and autocast keep what they keep on CUDA devices."""
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn import functional as F

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        # a copied tensor stays in the mode of the others
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True))
        if cuda_rules:
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
            for name in ("group_norm", "layer_norm"):
                stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        stack.enter_context(FakeTensorMode())
        yield


def some_batch(model: Backbone, pairs: int, size: int, width: int, *, stored: bool) -> PairBatch:
    """A batch without meaning; `width` is that of the text embeddings."""
    import torch

    from dedpo_diffusion.core.records import Conditioning, PairBatch

    pooled = (
        model.unet.config.projection_class_embeddings_input_dim - 6 * model.unet.config.addition_time_embed_dim if model.told_sizes else 0
    )
    told = (torch.zeros(pairs, pooled), torch.zeros(pairs, 2, 6)) if model.told_sizes else (None, None)
    conditioning = Conditioning(torch.zeros(pairs, LENGTH, width), *told)
    known = torch.zeros(pairs, 2) if stored else None
    latents = torch.zeros(pairs, 2, *model.latent_shape(size))
    return PairBatch(latents, conditioning, torch.zeros(pairs), torch.ones(pairs), known)


def training_bytes(model: Backbone, batch: PairBatch, *, accumulation: int, counter: Any) -> dict[str, int]:
    """Bytes by what they are for, at the peak of training on this batch.

    Args:
        model: with its adapter, or trained as a whole.
        batch: of one micro-batch.
        accumulation: micro-batches of a step.
        counter: that counts, not yet open.
    """
    import torch

    from dedpo_diffusion.dpo.step import preference_step
    from dedpo_diffusion.evaluation.benchmarks.allocations import storage_bytes
    from dedpo_diffusion.training.optimizers import build_optimizer

    trained = list(model.trainable().values())
    mine = {id(parameter) for parameter in trained}
    frozen = [tensor for tensor in (*model.unet.parameters(), *model.unet.buffers()) if id(tensor) not in mine]
    frozen += [] if model.frozen is None else [*model.frozen.parameters(), *model.frozen.buffers()]
    optimizer = build_optimizer("adamw", trained, learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01)
    for group in optimizer.param_groups:
        group["fused"] = True  # as on CUDA devices
    timesteps, noise = torch.zeros(len(batch.target), dtype=torch.int64), torch.zeros_like(batch.latents[:, 0])
    gradients = 0
    with counter:
        for micro in (1, min(accumulation, 2)):  # the first step makes the moments
            for _ in range(micro):
                counter.peak = counter.live
                preference_step(model, batch, timesteps=timesteps, noise=noise, beta=2000.0).loss.mean().backward()
            working, gradients = counter.peak, storage_bytes((p.grad for p in trained if p.grad is not None), block=counter.block)
            counter.peak = counter.live
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizing = counter.peak
            optimizer.zero_grad()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    moments = storage_bytes(held, block=counter.block)
    found = {
        "frozen_weights": storage_bytes(frozen, block=counter.block), "trained_weights": storage_bytes(trained, block=counter.block),
        "moments": moments, "gradients": gradients,
        "activations": max(working, optimizing) - moments - gradients,
    }  # fmt: skip
    return found | {"peak": sum(found.values())}


def encoding_bytes(model: Backbone, size: int, counter: Any) -> int:
    """Bytes at the peak of filling the cache: VAE, text encoders, and what encoding adds."""
    import torch

    from dedpo_diffusion.evaluation.benchmarks.allocations import storage_bytes
    from dedpo_diffusion.training.cache import PIXELS

    images = 2 * min(16, max(1, PIXELS // size**2))
    weights = [tensor for part in (model.vae, *model.text.encoders) for tensor in (*part.parameters(), *part.buffers())]
    with counter:
        model.encode_images(torch.zeros(images, 3, size, size))
        model.encode_prompts(["a large red circle"] * 16)
    return storage_bytes(weights, block=counter.block) + counter.peak


def by_config(name: str, *, stored: bool) -> dict[str, Any]:
    """Memory of training by one file of configs/, with the reference's errors stored beforehand or predicted in every step."""
    import torch
    import yaml

    from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter
    from dedpo_diffusion.evaluation.benchmarks.random_models import SIZES, random_backbone

    told = yaml.safe_load((files("dedpo_diffusion.configs") / f"{name}.yaml").read_text(encoding="utf-8"))
    kind, optim, size = MODELS[told["model"]], told["optim"], told["data"]["size"]
    full = told.get("weights") == "full"
    with fake():
        model = random_backbone(kind, device=torch.device("cpu"), dtype={"bf16": torch.bfloat16}[told["mixed_precision"]])
        encoding = encoding_bytes(model, size, AllocationCounter(BLOCK))
        model.drop_encoders()
        if full:
            model.train_all(reference=not stored)
        else:
            model.add_lora(rank=told["lora"]["rank"], alpha=told["lora"]["alpha"])
        if told.get("gradient_checkpointing"):
            model.checkpoint()
        batch = some_batch(model, optim["batch"], size, sum(part["hidden_size"] for part in SIZES[kind]["text"]), stored=stored)
        found = training_bytes(model, batch, accumulation=optim.get("accumulation", 1), counter=AllocationCounter(BLOCK))
    used = {"batch": optim["batch"], "size": size, "gradient_checkpointing": bool(told.get("gradient_checkpointing"))}
    return {"config": name, "reference_stored": stored, **used, "bytes": found, "encoding_bytes": encoding}


def sampling_bytes(model: Backbone, images: int, *, counter: Callable[[], Any]) -> dict[str, int]:
    """Bytes at the peak of sampling images of the model's size, by part; the greatest of the three activations counts.

    Args:
        model: all of it in the precision that is sampled in.
        images: sampled at once, each with and without its prompt.
        counter: makes one that counts, not yet open.
    """
    import torch

    from dedpo_diffusion.evaluation.benchmarks.allocations import storage_bytes

    parts, dtype = (model.unet, model.vae, *model.text.encoders), next(model.unet.parameters()).dtype
    block = counter().block
    noisy = torch.zeros(2 * images, *model.latent_shape(model.size), dtype=dtype)
    words = torch.zeros(2 * images, LENGTH, model.unet.config.cross_attention_dim, dtype=dtype)
    told = model.unet.config.projection_class_embeddings_input_dim
    added = None
    if model.told_sizes:
        pooled = torch.zeros(2 * images, told - 6 * model.unet.config.addition_time_embed_dim, dtype=dtype)
        added = {"text_embeds": pooled, "time_ids": torch.zeros(2 * images, 6, dtype=dtype)}
    model.vae.enable_slicing()
    work = {
        "text": lambda: model.encode_prompts(["a large red circle"] * 2 * images),
        "unet": lambda: model.unet(noisy, torch.zeros(()), words, added_cond_kwargs=added),
        "vae": lambda: model.vae.decode(noisy[:images]),
    }
    found = {"weights": storage_bytes((value for part in parts for value in (*part.parameters(), *part.buffers())), block=block)}
    for name, call in work.items():
        with torch.no_grad(), counter() as counted:
            call()
        found[name] = counted.peak
    return found | {"peak": found["weights"] + max(found[name] for name in work)}


def by_model(kind: str, dtype: str, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Memory of sampling from a model of published size, for each number of images at once."""
    import torch

    from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter
    from dedpo_diffusion.evaluation.benchmarks.random_models import random_backbone

    with fake():
        model = random_backbone(kind, device=torch.device("cpu"), dtype=getattr(torch, dtype))
        for part in (model.unet, model.vae, *model.text.encoders):
            part.to(dtype=getattr(torch, dtype))
        for images in batches:
            found = sampling_bytes(model, images, counter=lambda: AllocationCounter(BLOCK))
            yield {"model": kind, "size": model.size, "dtype": dtype, "batch": images, "bytes": found}


def sampling_lines(settings: MemorySettings) -> list[dict[str, Any]]:
    """Memory of sampling from every model in both precisions, printed as a table."""
    from rich.console import Console
    from rich.table import Table

    cases = [(kind, dtype) for kind in settings.models for dtype in ("bfloat16", "float32")]
    lines = [line for kind, dtype in track(cases, "computing", len(cases)) for line in by_model(kind, dtype, settings.batches)]
    shown = Table("model", "size", "precision", "images at once", *lines[0]["bytes"], "with overhead", title="GiB while sampling, computed")
    for line in lines:
        line["with_overhead"] = line["bytes"]["peak"] + OVERHEAD
        numbers = [*line["bytes"].values(), line["with_overhead"]]
        shown.add_row(
            line["model"], *(str(line[key]) for key in ("size", "dtype", "batch")), *(f"{value / 2**30:.2f}" for value in numbers)
        )
    Console(width=170).print(shown)
    return lines


def training_lines(settings: MemorySettings) -> list[dict[str, Any]]:
    """Memory of training by every configuration, printed as a table."""
    from rich.console import Console
    from rich.table import Table

    cases = [(name, stored) for name in settings.configs for stored in (True, False)]
    lines = [by_config(name, stored=stored) for name, stored in track(cases, "computing", len(cases))]
    parts = list(lines[0]["bytes"])
    shown = Table("config", "reference", *(part.replace("_", " ") for part in parts), "with overhead", "encoding", title="GiB, computed")
    for line in lines:
        line["with_overhead"] = max(line["bytes"]["peak"], line["encoding_bytes"]) + OVERHEAD
        line["fits_12_gib"] = line["with_overhead"] <= 12 * 2**30
        numbers = [*line["bytes"].values(), line["with_overhead"], line["encoding_bytes"]]
        shown.add_row(line["config"], "stored" if line["reference_stored"] else "predicted", *(f"{value / 2**30:.2f}" for value in numbers))
    Console(width=170).print(shown)
    return lines


def run(settings: MemorySettings) -> None:
    """Compute the peak memory of training by the configurations, and of sampling."""
    import torch

    from dedpo_diffusion.core.files import write_json

    facts = {"kind": "computed", "torch": torch.__version__, "overhead_assumed_bytes": OVERHEAD}
    write_json(settings.out, facts | {"lines": training_lines(settings), "sampling": sampling_lines(settings)})
    say(f"wrote {settings.out}")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(MemorySettings, run, argv, prog="memory.py")


if __name__ == "__main__":
    raise SystemExit(main())
