"""The objectives of training: one signature on errors, target and weight, and what each needs. docs/objectives.md lists them."""

from __future__ import annotations

from dedpo_diffusion.dpo.objectives.registry import OBJECTIVES as OBJECTIVES
from dedpo_diffusion.dpo.objectives.registry import Objective as Objective
from dedpo_diffusion.dpo.objectives.registry import find_objective as find_objective
from dedpo_diffusion.dpo.objectives.registry import objective_loss as objective_loss
