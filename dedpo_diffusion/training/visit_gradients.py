"""The gradient of one visit of a pair before training: what a run measures before its first step is made of these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import StepResult
from dedpo_diffusion.dpo.gradient_noise import step_gradient
from dedpo_diffusion.dpo.noising import Draws, TimestepDraw, image_noise, step_generator
from dedpo_diffusion.settings import TrainSettings

if TYPE_CHECKING:
    from dedpo_diffusion.dpo.timestep_moments import TimestepMoments
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.data import PairLoader

DROPOUT = 1005  # stream of `step_generator` for the adapter's dropout
LOSS_SCALE = 65536.0  # where float16's begins
Measured = TypeVar("Measured")


def read_measurement(file: Path, parse: Callable[[Any], Measured]) -> Measured | None:
    """What a run folder keeps of a measurement, None where there is no such file.

    Args:
        file: JSON.
        parse: makes of its content what is returned; ValueError, TypeError or KeyError where it holds something else.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it, and it is measured anew") from error


def visit_gradient(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, place: int, number: int, drawn: Draws,
    moments: TimestepMoments | None = None,
) -> tuple[StepResult, list[torch.Tensor]]:  # fmt: skip
    """Result and gradient of the run's loss of one pair at label 1 and weight 1 and, the policy being the reference, at margin exactly 0.

    Args:
        settings, model, loader: of the run; nothing was trained.
        timesteps: how it weights them.
        place: of the pair.
        number: of the visit, which picks the view.
        drawn: of one pair.
        moments: what timesteps are drawn and weighted by, where that is measured.
    """
    batch, draws = loader.batch(loader.at([place], [number], drawn), model)
    draws, factor = weigh(draws, timesteps, model, moments)
    one = torch.ones_like(batch.target)
    known = model.errors(batch.latents, image_noise(draws.noise), draws.timesteps, batch.conditioning)
    batch = dataclasses.replace(batch, target=one, weight=one, reference_errors=known)
    options = settings.objective.step_options()
    options |= {"timesteps": draws.timesteps, "noise": draws.noise, "timestep_weight": factor}
    torch.manual_seed(step_generator(settings.seed, number, DROPOUT).initial_seed())
    return _scaled(model, batch, options, fp16=settings.mixed_precision == "fp16")


def weigh(draws: Draws, timesteps: TimestepDraw, model: Backbone, moments: TimestepMoments | None) -> tuple[Draws, torch.Tensor]:
    """The draws at the timesteps of a step, and the factors (B,) of their losses."""
    if moments is None:
        return draws, timesteps.weights(model.process, draws.timesteps)
    draws = moments.redraw(draws)
    return draws, timesteps.weights(model.process, draws.timesteps) * moments.factor(draws.timesteps)


def _scaled(model: Backbone, batch: Any, options: dict[str, Any], *, fp16: bool) -> tuple[StepResult, list[torch.Tensor]]:
    """A gradient; in float16 of a loss as large as it can hold, as a scaler finds it in training."""
    parameters, scale = list(model.trainable().values()), LOSS_SCALE if fp16 else 1.0
    while True:
        result, found = step_gradient(model, batch, parameters, scale=scale, **options)
        if scale <= 1 or all(bool(value.isfinite().all()) for value in found):
            return result, found
        scale /= 16
