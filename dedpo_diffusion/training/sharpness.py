"""How sharp a run's targets are, in words, and the beta that objective.sharpness makes of the given one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.settings import ObjectiveSettings, TrainSettings

if TYPE_CHECKING:
    from dedpo_diffusion.dpo.sharpness import Sharpness
    from dedpo_diffusion.training.data import PairLoader

ADVICE = (
    "Leave objective.sharpness out; or merge labels that say how sure the judge is (dedpo calibrate, then dedpo merge --method tuned); "
    "or train with objective.kind=ipo or cdpo, which stop at hard labels too"
)


def check_sharpness(objective: ObjectiveSettings) -> None:
    """See to it that objective.sharpness goes with the objective.

    Raises:
        UserError: it does not.
    """
    from dedpo_diffusion.dpo.objectives import find_objective

    if objective.sharpness is None:
        return
    if find_objective(objective.kind).stop is None:
        raise UserError(
            f"objective.sharpness is the margin at which targets stop, and objective.kind={objective.kind} has no such margin; leave it out"
        )
    if objective.power != "fixed":
        raise UserError(
            f"objective.sharpness is set by the targets of the merge, which objective.power={objective.power} changes; "
            "leave one of them out"
        )


def measure_sharpness(objective: ObjectiveSettings, loader: PairLoader) -> Sharpness | None:
    """How sharp the visited pairs' targets are, None where the objective has no margin at which it stops."""
    from dedpo_diffusion.dpo.sharpness import sharpness

    return sharpness(*loader.merged, kind=objective.kind, options=objective.options)


def sharpen(settings: TrainSettings, loader: PairLoader) -> TrainSettings:
    """The settings with the beta that is trained with, from the one that was given.

    Raises:
        UserError: no beta brings these targets to objective.sharpness.
    """
    from dedpo_diffusion.dpo.sharpness import beta_for

    objective = settings.objective
    if objective.sharpness is None:
        return settings
    found = measure_sharpness(objective, loader)
    assert found is not None, "checked with the settings"
    try:
        beta = beta_for(objective.beta, found, objective.sharpness)
    except ValueError as error:
        where = f"objective.sharpness={objective.sharpness:g} on targets {settings.data.targets!r}"
        if found.typical == 0:
            raise UserError(f"{where}: at least half of the weight is on ties, which stop at margin 0 with every beta") from error
        never = found.hard + found.outside
        raise UserError(f"{where}: {never:.1%} of the weight is on targets that never stop, with any beta. {ADVICE}") from error
    return dataclasses.replace(settings, objective=dataclasses.replace(objective, beta=beta))


def sharpness_words(objective: ObjectiveSettings, found: Sharpness | None) -> Sequence[str]:
    """Sentences that say how sharp targets are; `objective` has the beta that is trained with."""
    from dedpo_diffusion.dpo.sharpness import error_gap

    if found is None:
        return [f"no margin stops the training: objective {objective.kind} does not depend on the margin alone"]
    words, beta = [], objective.beta
    if found.typical < math.inf:
        words.append(
            f"pairs stop at a margin of {found.typical:.3g} (median by weight; mean {found.mean:.3g}): the preferred image's error has "
            f"then fallen by {error_gap(found.typical, beta):.3g} against the other's, compared with the reference"
        )
        if objective.sharpness is not None:
            given = beta * objective.sharpness / found.typical
            words.append(f"objective.sharpness {objective.sharpness:g}: beta is {beta:.6g} in place of {given:.6g}")
    elif not math.isnan(found.mean):
        words.append(f"pairs that stop do so at a mean margin of {found.mean:.3g}")
    never = [(found.hard, "hard labels"), (found.outside, "targets outside [0, 1]")]
    parts = [f"{share:.1%} of the weight is on {what}" for share, what in never if share > 0]
    if parts:
        words.append(" and ".join(parts) + ", which never stop: more steps or a higher learning rate always widen their margins")
    return words
