"""What the tests of strengths share: scored sample folders of LoRAs at several strengths."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import yaml

from dedpo_diffusion.sampling.strength_folders import strength_folder
from support.samples import write_samples
from support.scores import put_scores

STRENGTHS = (0.5, 1.0, 2.0, 3.0)


def tell(folder, lora: str, strength: float, *, model: str = "m", **more):
    """What `dedpo sample` says in a folder that it was sampled with."""
    found = {"model": model, "steps": 20, "lora": [f"loras/{lora}.safetensors"], "strength": [strength], "out": str(folder), **more}
    (folder / "settings.yaml").write_text(yaml.safe_dump(found))
    digest = hashlib.sha256(lora.encode()).hexdigest()
    (folder / "identity.json").write_text(json.dumps({"lora": digest, "images": "i", "model": model}))
    return folder


def write_sweep(root, lora: str, scores: dict[float, dict[str, np.ndarray]], *, each: int = 2, seed: int = 0):
    """A folder with one for each strength, scored; `scores` are (6 * each,) by strength and scorer."""
    for strength, by_scorer in scores.items():
        folder = write_samples(root / strength_folder(strength), seed, each=each)
        put_scores(tell(folder, lora, strength), **by_scorer)
    return root


def write_base(folder, *, each: int = 2, **by_scorer):
    """The base, scored, as sampled without a LoRA."""
    found = {"model": "m", "steps": 20, "lora": [], "strength": [], "out": str(folder)}
    write_samples(folder, each=each)
    (folder / "settings.yaml").write_text(yaml.safe_dump(found))
    return put_scores(folder, **by_scorer)
