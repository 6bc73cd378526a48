"""What a sampled PNG says of itself, for people's viewers and for programs; and whether a PNG is whole."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.pairs.decoding import UNREADABLE

SAMPLERS = {  # what A1111 calls the schedulers of diffusers
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def write_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write an image with text chunks, atomically."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)  # tEXt where Latin-1 has all characters, which every viewer reads; else iTXt
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def is_whole(path: Path) -> bool:
    """Whether a file is there and a PNG whose checksums are right, to its end."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except UNREADABLE:
        return False
    return True


def told_facts(image: bytes) -> dict[str, Any]:
    """What the file of an image tells, under the key `dedpo`, of how it was sampled; empty where it tells nothing."""
    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
            found = json.loads(opened.info.get("dedpo", "{}"))
    except (*UNREADABLE, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def tensor_hash(path: Path) -> str:
    """What A1111 calls a LoRA's hash: 12 digits of the SHA-256 of a .safetensors file without its header, which metadata are part of."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def parameters(facts: Mapping[str, Any]) -> str:
    """The text under the key `parameters` that A1111 writes, and that viewers and ComfyUI's and A1111's readers show.

    Args:
        facts: of one image: prompt, negative, steps, scheduler (its class and configuration), guidance, seed, width, height, model,
            lora (name, strength and hash of each), versions.
    """
    loras = facts["lora"]
    prompt = " ".join([facts["prompt"], *(f"<lora:{lora['name']}:{lora['strength']:g}>" for lora in loras)])
    sampler = facts["scheduler"]["class"]
    entries = {
        "Steps": facts["steps"], "Sampler": SAMPLERS.get(sampler, sampler), "CFG scale": f"{facts['guidance']:g}", "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}", "Model": Path(facts["model"]).stem,
    }  # fmt: skip
    if loras:
        entries["Lora hashes"] = ", ".join(f"{lora['name']}: {lora['hash']}" for lora in loras)
    entries["Version"] = f"dedpo_diffusion {facts['versions']['dedpo_diffusion']}"
    lines = [prompt, *([f"Negative prompt: {facts['negative']}"] if facts["negative"] else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items())])


def _quoted(value: str) -> str:
    """As JSON where a comma, colon or line break would end the value."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ',:\n"') else value


class Whole:
    """Which images of a folder are there and whole; a file is looked through once for as long as it stays the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, tuple[tuple[int, int], bool]] = {}

    def __call__(self, name: str) -> bool:
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return False
        state = (found.st_mtime_ns, found.st_size)
        if name not in self.known or self.known[name][0] != state:
            self.known[name] = (state, is_whole(self.folder / name))
        return self.known[name][1]
