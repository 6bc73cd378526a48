"""What the LoRAs of a comparison were trained to raise, as their files tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.comparison.arms import Arm, sampling_settings
from dedpo_diffusion.weights.header import read_header
from dedpo_diffusion.weights.provenance import rewarded


def rewards_of(arms: Sequence[Arm]) -> dict[str, set[str]]:
    """Names of the scorers that each arm's LoRAs were trained to raise, by objective.kind loop or apa; without the arms of which a file
    is gone, or was trained otherwise.

    Raises:
        UserError: a settings.yaml that holds no settings.
    """
    found = {}
    for arm in arms:
        loras = sampling_settings(arm.folder).get("lora") or []
        told = [_rewards(Path(file)) for file in loras if isinstance(file, str)] if isinstance(loras, list) else []
        if told and all(told):
            found[arm.name] = set[str]().union(*told)
    return found


def _rewards(file: Path) -> set[str]:
    """Of one LoRA file; empty where it tells of none."""
    try:
        trained = read_header(file).stored_json("dedpo_settings") or {}
    except UserError:  # gone, or somebody else's
        return set()
    specs = (trained.get("loop") or {}).get("reward") or [] if rewarded(trained) else []
    return {name for spec in specs for name in reward_names(spec)}


def reward_names(spec: str) -> list[str]:
    """The scorers that a reward asks: "adapted=FILE,pickscore=MODEL" are adapted and, as one of its judges, pickscore."""
    return [part.partition("=")[0].strip() for part in spec.split(",")]
