"""objective.timestep_sampling=measured and timestep_weighting=equal_noise: gradients by timestep, measured before a run's first step.

The second moments that a run began with are in `timesteps.json` in its folder, which a resumed run reads instead of measuring again; how
they went on is in its checkpoints and in each line of `metrics.jsonl`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dedpo_diffusion.core.console import Progress, UserError, say
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.dpo.gradient_noise import squared_norm
from dedpo_diffusion.dpo.noising import TimestepDraw, draw, step_generator
from dedpo_diffusion.dpo.timestep_moments import TimestepMoments, tenth_ends
from dedpo_diffusion.settings import TrainSettings
from dedpo_diffusion.training.visit_gradients import read_measurement, visit_gradient
from dedpo_diffusion.weights.run_folder import TIMESTEPS_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.training.data import PairLoader

STREAM, CHOICE = 1008, 1009  # of `step_generator`: for the draws, and for the pairs that are measured
NAMES = ("gradient", "output")


def check_timesteps(settings: TrainSettings) -> None:
    """Refuse settings that do not go with measured timesteps.

    Raises:
        UserError: what stands against it, and what to do.
    """
    objective, data = settings.objective, settings.data
    measured, equal = objective.timestep_sampling == "measured", objective.timestep_weighting == "equal_noise"
    if not (measured or equal):
        return
    if equal and objective.timestep_sampling != "uniform":
        raise UserError(
            "objective.timestep_weighting=equal_noise goes with objective.timestep_sampling=uniform, not "
            f"{objective.timestep_sampling}: with these weights every tenth is as noisy as another, so uniform timesteps have the least "
            "noise. Set timestep_sampling to uniform, or timestep_weighting to none"
        )
    if measured and data.reference_draws is not None:
        raise UserError(
            "objective.timestep_sampling=measured draws by what is measured as training goes, and data.reference_draws fixes the timesteps "
            "of every pair beforehand; leave one of them out"
        )
    if objective.timestep_pairs < 1:
        raise UserError(f"objective.timestep_pairs is {objective.timestep_pairs}; it must be at least 1")
    if not 0 <= objective.timestep_decay < 1:
        raise UserError(
            f"objective.timestep_decay is {objective.timestep_decay}: it must lie in [0, 1), where 0 forgets all but the last step"
        )


def measured_places(settings: TrainSettings, loader: PairLoader) -> list[int]:
    """Which of the visited pairs are measured: objective.timestep_pairs of them, drawn without replacement, or all there are."""
    order = torch.randperm(len(loader.rows), generator=step_generator(settings.seed, 0, CHOICE))
    return sorted(order[: settings.objective.timestep_pairs].tolist())


def own_squares(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, process: int, processes: int
) -> torch.Tensor:
    """Squared gradients of the weights, and of the predictions, of each measured pair in each tenth: (n, K, 2) float64.

    Those of the other processes' pairs are 0. A visit depends on seed, pair and tenth alone.
    """
    places, ends = measured_places(settings, loader), tenth_ends(timesteps.first, timesteps.last).tolist()
    found = torch.zeros(len(places), len(ends) - 1, len(NAMES), dtype=torch.float64)
    mine = range(process, len(places), processes)
    with Progress("measuring timesteps", len(mine)) as progress:
        for k in mine:
            row = int(loader.rows[places[k]])
            [shape] = loader.source.shapes(np.array([row])).tolist()
            for tenth in range(len(ends) - 1):
                number = row * (len(ends) - 1) + tenth
                here = replace(timesteps, first=ends[tenth], last=ends[tenth + 1], sampling="uniform")
                drawn = draw(settings.seed, number, 1, shape, timesteps=here, caption_dropout=settings.data.caption_dropout, stream=STREAM)
                result, gradient = visit_gradient(settings, model, loader, timesteps, places[k], number, drawn)
                found[k, tenth] = torch.tensor([squared_norm(gradient), float(result.square.sum())])
            progress.advance()
    return found


def measure(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, accelerator: Accelerator,
    hosts: ProcessGroup | None,
) -> dict[str, Any]:  # fmt: skip
    """What `timesteps.json` holds, measured by all processes: pairs, range, and the mean squares (K,) of both kinds."""
    squares = own_squares(settings, model, loader, timesteps, accelerator.process_index, accelerator.num_processes)
    if hosts is not None:
        torch.distributed.all_reduce(squares, group=hosts)
    means = squares.mean(dim=0).T.tolist()
    return {"pairs": len(squares), "timesteps": [timesteps.first, timesteps.last], **dict(zip(NAMES, means, strict=True))}


def read_measured(out: Path) -> dict[str, Any] | None:
    """What a run folder keeps of the measurement, None where it keeps none.

    Raises:
        UserError: the file is damaged.
    """
    return read_measurement(out / TIMESTEPS_FILE, _checked)


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    for name in NAMES:
        if not all(math.isfinite(value) and value > 0 for value in found[name]):
            raise ValueError(f"{name} is {found[name]}")
    return found


def keep_measured(out: Path, found: dict[str, Any]) -> None:
    """Write it into the run folder."""
    write_json(out / TIMESTEPS_FILE, found)


def timestep_moments(
    settings: TrainSettings, model: Backbone, loader: PairLoader, timesteps: TimestepDraw, accelerator: Accelerator,
    hosts: ProcessGroup | None,
) -> tuple[TimestepMoments, dict[str, Any]] | None:  # fmt: skip
    """What this run draws or weights its timesteps by, read from its folder or measured now, and what its folder keeps; None for neither.

    Raises:
        UserError: gradients that are 0 or not finite somewhere.
    """
    from accelerate.utils import broadcast_object_list

    objective = settings.objective
    if objective.timestep_sampling != "measured" and objective.timestep_weighting != "equal_noise":
        return None
    # the main process reads, for the others may not see the folder
    [found] = broadcast_object_list([read_measured(settings.out) if accelerator.is_main_process else None])
    if found is None:
        found = measure(settings, model, loader, timesteps, accelerator, hosts)
    equal = objective.timestep_weighting == "equal_noise"
    gradient, output = (torch.tensor(found[name], dtype=torch.float64) for name in NAMES)
    try:
        made = TimestepMoments(timesteps.first, timesteps.last, gradient, output, equal_noise=equal, decay=objective.timestep_decay)
    except ValueError as error:
        raise UserError(
            f"objective: {error}; measure on more pairs (objective.timestep_pairs), or leave timestep_sampling at uniform and "
            "timestep_weighting at none"
        ) from error
    return made, found


def say_moments(moments: TimestepMoments) -> None:
    """Tell what the timesteps of the first step are drawn or weighted by."""
    told = "weights of timesteps" if moments.equal_noise else "draws of timesteps"
    key = "weight" if moments.equal_noise else "share"
    say(f"{told}, by tenth: " + ", ".join(f"{line['first']}-{line['last']} {line[key]:.3g}" for line in moments.report()))
