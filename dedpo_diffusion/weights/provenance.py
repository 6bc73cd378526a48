"""Where weights come from: what they were trained on and how, in short, from the settings of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

KOHYA_FACTS = (  # of the many that kohya's scripts store, what tells how a file was made
    "ss_base_model_version", "ss_sd_model_name", "ss_output_name", "ss_training_comment", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_resolution", "ss_num_train_images", "ss_num_epochs", "ss_epoch", "ss_steps",
    "ss_max_train_steps", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_lr_scheduler", "ss_clip_skip",
    "ss_noise_offset", "ss_min_snr_gamma", "ss_seed", "ss_sd_model_hash", "sshs_model_hash",
)  # fmt: skip
SPEC_FACTS = tuple(
    f"modelspec.{name}"
    for name in (
        "title", "architecture", "author", "description", "date", "license", "usage_hint", "trigger_phrase", "tags", "prediction_type",
        "resolution", "merged_from",
    )
)  # fmt: skip
REWARDED = ("loop", "apa")  # objectives that learn from a reward of the model's own images
OF_PAIRS = (  # in short, what of the settings says nothing of a run with such an objective
    "pairs", "targets", "beta", "sharpness", "balance", "power in training", "pairs in a forward pass", "sampling of pairs",
)  # fmt: skip
SPEC = re.compile(r"\w+=")  # how a scorer or judge with its location begins
ABSOLUTE = re.compile(r"(?<=[=:])(?!//)[/~][^,]*")  # a path of this machine in one


def base_name(model: str) -> str:
    """What a base model is called: a hub id as it is, a folder or file by its last name, which tells nothing of the machine."""
    return model if is_hub_id(model) else PurePath(model).name


def portable(settings: Any) -> Any:
    """Settings as they may be shared: absolute paths, which tell of the machine and its users, by their last name."""
    if isinstance(settings, Mapping):
        return {key: portable(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [portable(value) for value in settings]
    if isinstance(settings, str) and (settings.startswith(("/", "~")) or PureWindowsPath(settings).is_absolute()):
        return PureWindowsPath(settings).name
    if isinstance(settings, str) and SPEC.match(settings):
        return ABSOLUTE.sub(lambda found: PureWindowsPath(found[0]).name, settings)
    return settings


def is_hub_id(model: str) -> bool:
    """Whether a model's name looks like OWNER/NAME of a hub."""
    owner, _, name = model.partition("/")
    return bool(owner and name) and "/" not in name and "\\" not in model and owner[0] not in ".~" and not name.endswith(".safetensors")


def rewarded(trained: Mapping[str, Any]) -> bool:
    """Whether a run learned from a reward of the model's own images rather than from pairs."""
    return (trained.get("objective") or {}).get("kind") in REWARDED


def in_short(trained: Mapping[str, Any]) -> dict[str, str]:
    """Label and value of what matters in a run's settings; what they do not hold is left out."""
    data, objective, optim = (trained.get(name) or {} for name in ("data", "objective", "optim"))
    lora = trained.get("lora") or {}
    found: dict[str, Any] = {
        "base model": base_name(trained["model"]) if "model" in trained else None,
        "pairs": PurePath(data["pairs"]).name if "pairs" in data else None,
        "targets": data.get("targets"),
        "objective": objective.get("kind"),
        "objective options": ", ".join(f"{key} {value:g}" for key, value in (objective.get("options") or {}).items()) or None,
        "beta": objective.get("beta"),
        "sharpness": objective.get("sharpness"),
        "balance": objective.get("balance"),
        "power in training": measured_words(trained.get("measured_power")) or objective.get("power"),
        "trained": "all weights of the UNet" if trained.get("weights") == "full" else _adapter(lora) if lora else None,
        "optimizer": optim.get("optimizer"),
        "learning rate": optim.get("learning_rate"),
        "schedule": optim.get("schedule"),
        "pairs in a forward pass": optim.get("batch"),
        "forward passes per step": optim.get("accumulation"),
        "moving average": optim.get("average"),
        "sampling of pairs": data.get("sampling"),
        "caption dropout": data.get("caption_dropout") or None,
        "size": data.get("size"),
        "precision": {"no": "float32"}.get(trained.get("mixed_precision", ""), trained.get("mixed_precision")),
        "seed": trained.get("seed"),
    }
    if rewarded(trained):
        found = {label: value for label, value in found.items() if label not in OF_PAIRS}
        found["reward"] = ", ".join((trained.get("loop") or {}).get("reward", [])) or None
        found["prompts"] = PurePath(data["pairs"]).name if "pairs" in data else None
        found["denoising steps in a forward pass"] = optim.get("batch")
    steps = optim.get("steps")
    if "step" in trained:
        found["step"] = f"{trained['step']} of {steps}" if steps else trained["step"]
    elif steps:
        found["steps"] = steps
    return {label: f"{value:g}" if isinstance(value, float) else str(value) for label, value in found.items() if value is not None}


def measured_words(found: Mapping[str, Any] | None) -> str | None:
    """The power that a run measured, in words; None where it measured none."""
    if not found:
        return None
    return f"{found['power']:.3g}, measured at noise ratio {found['noise_ratio']:.3g} (endless training: {found['endless_power']:.3g})"


def _adapter(lora: Mapping[str, Any]) -> str:
    words = f"a LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}" if {"rank", "alpha"} <= set(lora) else "a LoRA"
    words += " (rsLoRA)" if lora.get("rslora") else " (DoRA)" if lora.get("dora") else ""
    where = f", on {', '.join(lora['targets'])}" if lora.get("targets") else ""
    return words + where + (", text encoders too" if lora.get("text_encoders") else "")


def others_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What kohya's scripts and the modelspec say in a file's metadata, those entries that tell how it was made."""
    return {key: metadata[key] for key in (*SPEC_FACTS, *KOHYA_FACTS) if metadata.get(key) not in (None, "", "None", "{}")}


def own_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this toolkit stored beside the settings, by name: hashes and the like."""
    found = {}
    for key, text in metadata.items():
        if key.startswith("dedpo_") and key != "dedpo_settings":
            try:
                found[key.removeprefix("dedpo_")] = json.loads(text)
            except ValueError:
                found[key.removeprefix("dedpo_")] = text
    return found
