"""What the tests of scorers and judges share: a tiny judge in the published format, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dedpo_diffusion.judges.scorers import load_scorer
from dedpo_diffusion.shapes import world

PROMPTS = [attributes.prompt for attributes in world.VOCABULARY[::29]]  # five


def pictures(count: int = 5, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def build_judge(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel with random weights and its processor, in PickScore's file format."""
    from transformers import CLIPConfig, CLIPModel

    from dedpo_diffusion.shapes.pretrain import TOKENS, build_tokenizer, judge_processor

    tokenizer = build_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, **ends}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 64, "patch_size": 16}, projection_dim=8))
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder)
    judge_processor(tokenizer).save_pretrained(folder)
    return folder


def load(spec: str, batch: int = 64, dtype: str = "float32"):
    return load_scorer(spec, device="cpu", batch=batch, dtype=dtype)


def count_rows(tower: torch.nn.Module) -> list[int]:
    """How many rows each forward call of a tower had, as they happen."""
    rows: list[int] = []
    tower.register_forward_hook(lambda module, inputs, kwargs, output: rows.append(len(output[0])), with_kwargs=True)
    return rows
