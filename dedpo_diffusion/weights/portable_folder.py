"""A diffusers folder that older programs load too, and that tells nothing of the machine it was written on.

transformers since 5.6 writes CLIPTextModel's tensors without the `text_model.` that earlier versions look for (these load none of them,
and go on with random weights), and since 5.0 a tokenizer as tokenizer.json alone, without the vocabulary and merges that 4.x needs. All
versions read what is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file, write_json
from dedpo_diffusion.models.text_encoders import NAMES
from dedpo_diffusion.weights.header import save_tensors

_FROM = ("_name_or_path", "name_or_path")  # where diffusers and transformers keep the place that a part was loaded from


def make_portable(folder: Path) -> None:
    """Change what `save_pretrained` of a Stable Diffusion's pipeline wrote, in place.

    Raises:
        UserError: a tokenizer that is no byte-pair encoding, as CLIP's are.
    """
    for name in NAMES:
        _name_text_model(folder / name)
    for file in sorted(folder.glob("tokenizer*/tokenizer.json")):
        _write_vocabulary(file)
    for file in sorted(folder.rglob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and any(key in found for key in _FROM):
            write_json(file, {key: value for key, value in found.items() if key not in _FROM})


def _name_text_model(encoder: Path) -> None:
    """Put `text_model.` before the tensors of a text encoder that has lost it."""
    for file in sorted(encoder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            lost = any(_full(name) != name for name in held.keys())  # noqa: SIM118 - it is no dictionary
        if lost:
            save_tensors(file, {_full(name): value for name, value in load_file(file).items()}, {})
    for file in sorted(encoder.glob("*.safetensors.index.json")):  # of an encoder in several files
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, index | {"weight_map": {_full(name): place for name, place in index["weight_map"].items()}})


def _full(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _write_vocabulary(file: Path) -> None:
    """vocab.json and merges.txt beside a tokenizer.json that has both, as CLIP's tokenizer of transformers 4 reads them."""
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    if not {"vocab", "merges"} <= set(model):
        raise UserError(f"{file.parent.name}: a tokenizer of type {model.get('type')}, not the one of CLIP that a Stable Diffusion has")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_json(file.with_name("vocab.json"), model["vocab"])
    with atomic_file(file.with_name("merges.txt")) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in ["#version: 0.2", *pairs]), encoding="utf-8")
