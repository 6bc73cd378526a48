"""What the LoRAs of a comparison were trained to raise, as their files tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
        told = [_rewards(Path(file)) for file in loras if isinstance(file, str)] if isinstance(loras, list) else []
        names = {name for specs, _ in told for spec in specs for name in reward_names(spec)}
        if names:
            found[arm.name] = names
        complete &= bool(names) and all(specs and afresh for specs, afresh in told)
    return found, complete


def _rewards(file: Path) -> tuple[list[str], bool]:
    """A LoRA's rewards as they were given, none where it tells of none; and whether it began without another LoRA."""
    try:
        trained = read_header(file).stored_json("dedpo_settings") or {}
    except UserError:  # gone, or somebody else's
        return [], False
    specs = (trained.get("loop") or {}).get("reward") or [] if rewarded(trained) else []
    return specs, not (trained.get("lora") or {}).get("start")


def reward_names(spec: str) -> list[str]:
    """The scorers that a reward asks: "adapted=FILE,pickscore=MODEL" are adapted and, as one of its judges, pickscore."""
    return [part.partition("=")[0].strip() for part in spec.split(",")]
