"""A run that learns from a reward of its own images: which settings go with it, and what it works with."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import typing
from pathlib import Path
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.settings import DataSettings, LoopSettings, ObjectiveSettings, TrainSettings
from dedpo_diffusion.settings.training import Policy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.rollouts import Rollouts
    from dedpo_diffusion.training.validation import Validation


def is_policy(settings: TrainSettings) -> bool:
    """Whether a run learns from a reward rather than from pairs."""
    return settings.objective.kind in typing.get_args(Policy)


def _given(held: object, without: object, name: str) -> str | None:
    """The first setting of a group that is not as it is without being given, by its name."""
    fields = [field.name for field in dataclasses.fields(type(held))]  # type: ignore[arg-type]
    return next((f"{name}.{field}" for field in fields if getattr(held, field) != getattr(without, field)), None)


def check_no_policy(settings: TrainSettings) -> None:
    """Refuse options of a reward where training is on pairs.

    Raises:
        UserError: one is given.
    """
    name = _given(settings.loop, LoopSettings(), "loop")
    if name is not None:
        raise UserError(f"{name} is given, but objective.kind={settings.objective.kind} learns from pairs; give objective.kind loop or apa")


def check_policy(settings: TrainSettings) -> None:
    """See to it that the settings of a run that learns from a reward go together.

    Raises:
        UserError: they do not.
    """
    from dedpo_diffusion.training.rewards import unusable

    loop, kind = settings.loop, settings.objective.kind
    strange = _given(settings.objective, ObjectiveSettings(kind=kind), "objective")
    strange = strange or _given(settings.data, DataSettings(settings.data.pairs, size=settings.data.size), "data")
    if strange is not None:
        raise UserError(f"{strange} is about pairs, and objective.kind={kind} learns from the reward of its own images; leave it out")
    if settings.weights != "lora":
        raise UserError(f"objective.kind={kind} trains an adapter; leave weights at lora")
    if settings.lora.dropout:
        raise UserError(
            f"lora.dropout is {settings.lora.dropout:g}; with dropout a denoising step has no probability that could be computed again, so "
            f"objective.kind={kind} takes 0"
        )
    if settings.validation.pairs is not None:
        raise UserError(
            f"validation.pairs measures the loss of pairs, and objective.kind={kind} has none; give validation.prompts and "
            "validation.scorers, best with a scorer that is not in loop.reward"
        )
    words = unusable(loop) or _out_of_range(loop)
    if words is not None:
        raise UserError(words)


def _out_of_range(loop: LoopSettings) -> str | None:
    """The first number that cannot be used, in words."""
    if loop.images < 2:
        return (
            f"loop.images is {loop.images}; an image's reward is compared with that of the prompt's other images, so give at least 2 "
            "(4 or more are better)"
        )
    if not loop.eta > 0:
        return (
            f"loop.eta is {loop.eta:g}; without noise a sampler step draws nothing, and nothing has a probability that a reward could "
            "raise: give a number above 0, such as 1"
        )
    for name in ("prompts", "updates", "batch"):
        if getattr(loop, name) < 1:
            return f"loop.{name} is {getattr(loop, name)}; it must be at least 1"
    if loop.steps < 2:
        return f"loop.steps is {loop.steps}; the last step draws nothing, so give at least 2"
    if not loop.eta <= 1:
        return f"loop.eta is {loop.eta:g}; beyond 1 there is more noise than the model was trained for: give a number up to 1"
    for name, least in {"clip": 0, "temperature": 0, "ridge": 0}.items():
        if not least < getattr(loop, name) < math.inf:
            return f"loop.{name} is {getattr(loop, name)}; it must be a positive number"
    for name in ("kl", "uncertainty", "guidance"):
        if not 0 <= getattr(loop, name) < math.inf:
            return f"loop.{name} is {getattr(loop, name)}; it must be a number from 0 on"
    return None


def sampled_prompts(source: Path) -> list[str]:
    """The prompts that are sampled, each once: those of a pair dataset, or of a prompt set or file.

    Raises:
        UserError: there are none.
    """
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.sampling.prompts import read_prompts

    is_pairs = (source / "pairs").is_dir()
    found = PairReader(source).prompts() if is_pairs else [prompt.text for prompt in read_prompts(str(source))]
    return list(dict.fromkeys(found))


def prepare_rollouts(settings: TrainSettings, accelerator: Accelerator) -> tuple[Backbone, Rollouts, dict[str, str], Validation | None]:
    """Load the model and the rewards, and read the prompts; also: identity of the inputs, validation.

    Raises:
        UserError: one of them cannot be used.
    """
    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.training.base import add_lora, load_model
    from dedpo_diffusion.training.rewards import Reward
    from dedpo_diffusion.training.rollouts import Rollouts
    from dedpo_diffusion.training.validation import open_validation

    prompts = sampled_prompts(settings.data.pairs)
    reward = Reward(settings, device=str(accelerator.device))
    model = load_model(settings, accelerator)
    size = settings.data.size or model.size
    model.latent_shape(size)  # or the size is refused
    if not 2 <= settings.loop.steps <= len(model.process):
        raise UserError(f"loop.steps is {settings.loop.steps}; the model's schedule has {len(model.process)}")
    validation = open_validation(settings, model, accelerator, size=size)
    if settings.attention == "xformers":
        model.use_xformers()
    add_lora(settings, model)
    if settings.compile:
        model.compile_blocks()
    if settings.gradient_checkpointing:
        model.checkpoint(selective=settings.gradient_checkpointing == "selective")
    rollouts = Rollouts(settings, model, reward, prompts, size=size, accelerator=accelerator)
    listed = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    identity = {"base_model": model.fingerprint, "prompts": listed, "reward": reward.identity}
    if settings.lora.start is not None:
        identity["start"] = file_digest(settings.lora.start)
    return model, rollouts, identity | ({} if validation is None else validation.identity()), validation
