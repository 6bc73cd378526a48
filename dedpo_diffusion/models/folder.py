"""A diffusers folder, part by part: each in whichever precision it is there, and whole or refused with the file and the tensor that lack.

A part (UNet, VAE, a text encoder) is kept in full, as `diffusion_pytorch_model.safetensors`, or as a variant, as
`diffusion_pytorch_model.fp16.safetensors`; either may be in shards, with an index that says which file holds which tensor. What a part
lacks would be left random by the library that loads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import is_leftover
from dedpo_diffusion.models.single_file import opened

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
NEEDED = {"tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")), "scheduler": (("scheduler_config.json",),)}  # one of these
PREFERRED = (None, "fp16", "bf16")  # where a part is there in several
IDLE = re.compile(r"(^|\.)(position_ids|logit_scale)$|^(text_projection\.|vision_model\.|visual_projection\.)")  # of no use to any part
FETCH = "fetch the folder again"


@dataclass(frozen=True)
class Part:
    """The weights of one part: its folder, the variant they are kept in, None in full, and the files that hold them."""

    folder: Path
    variant: str | None
    files: list[Path]


def find_part(folder: Path, stem: str) -> Part:
    """The weights of a part.

    Args:
        folder: of the part.
        stem: what the library calls weights, as "model".

    Raises:
        UserError: there are none, several variants and none in full, or a shard or the index is missing.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'}: no such file; {FETCH}")
    found = {variant: files for variant, files in _variants(folder, stem)}
    if not found:
        raise UserError(f"{folder}: no weights in {stem}.safetensors, nor a variant of it; {_instead(folder)}")
    chosen = next((variant for variant in PREFERRED if variant in found), next(iter(found)))
    if chosen not in PREFERRED and len(found) > 1:
        raise UserError(f"{folder}: it has the variants {', '.join(map(str, found))} and no {stem}.safetensors; leave one there")
    for file in found[chosen]:
        if not file.is_file():
            raise UserError(f"{file}: no such file, which holds a part of the weights; {FETCH}")
    return Part(folder, chosen, found[chosen])


def _variants(folder: Path, stem: str) -> Iterator[tuple[str | None, list[Path]]]:
    """Which variants there are, and the files of each, as far as one can tell."""
    indexed: set[Path] = set()
    for index in sorted(folder.glob(f"{stem}.safetensors.index*.json")):
        files = sorted({folder / name for name in _weight_map(index).values()})
        indexed |= set(files)
        variant = index.name.removeprefix(f"{stem}.safetensors.index").removesuffix("json").strip(".")
        yield variant or None, files
    whole = re.compile(re.escape(stem) + r"(?:\.(?P<variant>[\w-]+?))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<late>[\w-]+))?\.safetensors")
    for file in sorted(folder.glob("*.safetensors")):
        match = whole.fullmatch(file.name)
        if match is None or file in indexed or is_leftover(file):
            continue
        if match["shard"]:
            variant = match["variant"] or match["late"]
            index = folder / ".".join(filter(None, (f"{stem}.safetensors.index", variant, "json")))
            if not index.is_file():
                raise UserError(f"{index}: no such file, which says what {file.name} and its like hold; {FETCH}")
            continue
        yield match["variant"], [file]


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): Path(str(value)).name for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: it is no index of weights ({error!r}); {FETCH}") from error


def _instead(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        return f"{pickled[0]} is a pickled file, which is not opened because it can run code; give a folder with .safetensors weights"
    return FETCH


def load_folder(folder: Path, kind: str, dtype: torch.dtype, left_out: dict[str, Any]) -> Any:
    """A pipeline of a diffusers folder on this machine.

    Args:
        folder: as diffusers saves one.
        kind: the pipeline's class.
        dtype: of all weights.
        left_out: parts of it that are not wanted, None each, and other arguments of the pipeline.

    Raises:
        UserError: a part, a file or a tensor is missing or does not fit.
        Exception: whatever else diffusers and transformers raise.
    """
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    _require_files(folder, index)
    parts = {name: find_part(folder / name, STEMS[name]) for name in PARTS if _named(index, name)}
    variants = {name: part.variant for name, part in parts.items() if part.variant is not None}
    if variants:
        say(f"{folder}: there only as a variant, which is read: {', '.join(f'{name} ({variant})' for name, variant in variants.items())}")
    with _quiet():
        modules = {name: _load_part(part, index[name], dtype) for name, part in parts.items()}
        return getattr(diffusers, kind).from_pretrained(folder, dtype=dtype, use_safetensors=True, **modules, **left_out)


def _named(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _require_files(folder: Path, index: dict[str, Any]) -> None:
    """Every part that the model index names is there."""
    for name in (name for name in index if _named(index, name)):
        known = next((choices for start, choices in NEEDED.items() if name.startswith(start)), None)
        if known is None:
            if name in PARTS and not (folder / name).is_dir():
                raise UserError(f"{folder / name}: no such folder, and model_index.json names it; {FETCH}")
        elif not any(all((folder / name / file).is_file() for file in files) for files in known):
            raise UserError(f"{folder / name / known[-1][0]}: no such file; {FETCH}")


@contextmanager
def _quiet() -> Iterator[None]:
    """What is missing is told in our words, once."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = [(library, library.get_verbosity()) for library in (ours, theirs)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)


def _load_part(part: Part, entry: list[str], dtype: torch.dtype) -> Any:
    """One part with every weight from its files."""
    import importlib

    holders: dict[str, Path] = {}
    for file in part.files:
        with opened(file) as content:
            holders |= dict.fromkeys(content.keys(), file)
    _require_indexed(part, holders)
    cls = getattr(importlib.import_module(entry[0]), entry[1])
    model, info = cls.from_pretrained(part.folder, dtype=dtype, variant=part.variant, use_safetensors=True, output_loading_info=True)
    place = str(part.files[0]) if len(part.files) == 1 else str(part.folder)
    missing, unused = (sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if wrong := sorted(map(str, info.get("mismatched_keys") or ())):
        raise UserError(f"{place}: {wrong[0]} has another shape than config.json asks for; {FETCH}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{place}: the weights lack the tensor {missing[0]}{more}; {FETCH}")
    unused = [key for key in unused if not IDLE.search(key)]
    if any("lora_" in key for key in unused):
        raise UserError(f"{holders.get(unused[0], place)}: {unused[0]} is of a LoRA that was not merged; merge it, or give the base model")
    if unused:
        say(f"Warning: {place}: {len(unused)} tensors have no place in a {entry[1]} and are not used (first: {unused[0]})")
    return model


def _require_indexed(part: Part, holders: dict[str, Path]) -> None:
    """Every shard holds what the index says it does."""
    for index in part.folder.glob("*.safetensors.index*.json"):
        for key, name in _weight_map(index).items():
            if part.folder / name in part.files and key not in holders:
                raise UserError(f"{part.folder / name}: it lacks the tensor {key}, which {index.name} says it holds; {FETCH}")


def first_not_finite(files: list[Path], dtype: torch.dtype) -> tuple[Path, str, bool] | None:
    """The first tensor of these files with numbers that are not finite: its file, its name, and whether only this dtype makes it so."""
    for file in files:
        with opened(file) as content:
            for key in content.keys():  # noqa: SIM118 - it is no dictionary
                value = content.get_tensor(key)
                if value.is_floating_point() and not value.float().to(dtype).isfinite().all():
                    return file, key, bool(value.float().isfinite().all())
    return None


def part_files(folder: Path) -> list[Path]:
    """The weight files of a folder that were loaded."""
    return [file for name in PARTS if (folder / name).is_dir() for file in find_part(folder / name, STEMS[name]).files]
