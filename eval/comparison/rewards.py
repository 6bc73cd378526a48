"""What the LoRAs of a comparison were trained to raise, as their files tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.arms import Arm, sampling_settings
from dedpo_diffusion.weights.header import read_header
from dedpo_diffusion.weights.provenance import rewarded


def rewards_of(arms: Sequence[Arm]) -> tuple[dict[str, set[str]], bool]:
    """Names of the scorers that each arm's LoRAs were trained to raise, by objective.kind loop or apa, without the arms that tell of none;
    and whether they are all that these arms were trained by: each has LoRAs, and all of them tell and began afresh.

    Raises:
        UserError: a settings.yaml that holds no settings.
    """
    found, complete = {}, bool(arms)
    for arm in arms:
        loras = sampling_settings(arm.folder).get("lora") or []
        trained = [_trained(Path(file)) for file in loras if isinstance(file, str)] if isinstance(loras, list) else []
        names = {name for one in trained for spec in one["loop"]["reward"] for name in reward_names(spec)}
        if names:
            found[arm.name] = names
        complete &= bool(names) and all(one["loop"]["reward"] and not one["lora"].get("start") for one in trained)
    return found, complete


def _trained(file: Path) -> dict[str, Any]:
    """How one LoRA was trained, as far as it matters: no reward where it tells of none."""
    try:
        told = read_header(file).stored_json("dedpo_settings") or {}
    except UserError:  # gone, or somebody else's
        told = {}
    reward = (told.get("loop") or {}).get("reward") or [] if rewarded(told) else []
    return {"loop": {"reward": reward}, "lora": told.get("lora") or {}}


def reward_names(spec: str) -> list[str]:
    """The scorers that a reward asks: "adapted=FILE,pickscore=MODEL" are adapted and, as one of its judges, pickscore."""
    return [part.partition("=")[0].strip() for part in spec.split(",")]
