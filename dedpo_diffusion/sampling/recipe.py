"""How images are sampled, prompts and seeds aside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights import read_lora_file

MOST = 8  # images at once that `--batch auto` stands for; more hardly make a card faster
SCHEDULERS = {  # by the names of SampleSettings.scheduler
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

_REMEDY = {  # by the number of LoRAs, where strengths are not as many
    0: "a strength is of a LoRA: give its file with --lora. A merged model has no strength of its own; export it again from its run or "
    "LoRA with `dedpo export ... --format merged --strength S`",
    1: "give one",
    2: "give one for each file, or none for 1 each. To try several strengths of all together, make them one file first (`dedpo export "
    "A.safetensors --add B.safetensors=0.5 --out both.safetensors`), and sample that one",
}


@dataclass(frozen=True)
class Recipe:
    """How images are sampled, prompts and seeds aside.

    Attributes:
        model, config, prediction, dtype: what `load_pipeline` takes.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        batch: images whose company is fixed, sampled at once where memory allows.
        size: pixels of a side, or (height, width); None takes the model's own.
        negative: the negative prompt of every image; None takes what the pipeline takes for none.
        lora, strength: adapter files, and how strongly each counts; no strengths are 1 each.
        scheduler: a key of SCHEDULERS; None takes the model's own.
        fit: measure on a GPU how many images of a batch its memory has room for, rather than try all of them at once.
    """

    model: str
    steps: int
    guidance: float
    batch: int
    size: int | tuple[int, int] | None = None
    negative: str | None = None
    lora: Sequence[Path] = ()
    strength: Sequence[float] = ()
    scheduler: str | None = None
    config: str | None = None
    dtype: str = "float32"
    fit: bool = False
    prediction: str | None = None

    def check(self) -> None:
        """Refuse what cannot be sampled, before anything is loaded.

        Raises:
            UserError: a number out of range, strengths that are not as many as the LoRAs, or a file that holds no LoRA.
        """
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.strength and len(self.strength) != len(self.lora):
            raise UserError(f"{len(self.strength)} strengths for {len(self.lora)} LoRA files; {_REMEDY[min(len(self.lora), 2)]}")
        for strength in self.strength:
            if not math.isfinite(strength):
                raise UserError(f"--strength {strength}: not a finite number; 1 is what was trained")
        for file in self.lora:
            if not file.is_file():
                raise UserError(f"{file}: no such adapter file; `dedpo export RUN --out {file}` writes one")
            read_lora_file(file)
