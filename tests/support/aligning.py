"""Small whole journeys of `dedpo align` on Shapes, and what they end with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SMALL = [
    "--model", "shapes", "--prompts", "shapes", "--limit", "24", "--judges", "oracle_clean", "--people", "simulated",
    "--human_share", "0.5",
    "--methods", "naive", "--recipe", "shapes_lora.yaml", "--steps", "2", "--strengths", "1", "2", "--eval_prompts", "shapes",
    "--eval_limit", "4", "--eval_seeds", "1", "--scorers", "oracle_reward", "--sampler_steps", "2", "--batch", "12", "--device", "cpu",
]  # fmt: skip


def align_command(out: Path, *changes: str) -> list[str]:
    return [sys.executable, "-m", "dedpo_diffusion.pipelines.align", *SMALL, "--out", str(out), *changes]


def results_of(out: Path) -> dict:
    return {key: value for key, value in json.loads((out / "results.json").read_text()).items() if key != "seconds"}


def without_places(found: object, out: Path) -> object:
    return json.loads(json.dumps(found).replace(str(out), "OUT"))
