"""What an objective is computed from: the errors of B pairs, and the rewards and margins they stand for.

A paper's beta log(pi / pi_ref) of an image stands here for the implicit reward -beta (e - r) / 2, and its beta log(pi) for
-beta e / 2: both up to constants that are alike for the two images of a pair, which share timestep and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dedpo_diffusion.dpo.losses import implicit_rewards, margin


@dataclass(frozen=True)
class Pairs:
    """B pairs in one forward pass.

    `policy` and `reference` (B, 2) errors; `target` and `weight` (B,); `doubt` (B,) standard deviation of the judges' labels;
    `beta` and `margin_cap` as in `losses`.
    """

    policy: Tensor
    reference: Tensor | None
    target: Tensor
    weight: Tensor
    doubt: Tensor | None
    beta: float
    margin_cap: float | None

    @cached_property
    def rewards(self) -> Tensor:
        """Implicit rewards (B, 2)."""
        assert self.reference is not None
        return implicit_rewards(self.policy, self.reference, beta=self.beta)

    @cached_property
    def margin(self) -> Tensor:
        """Reward of image 0 minus reward of image 1, (B,)."""
        return margin(self.rewards)

    def mix(self, if_0: Tensor, if_1: Tensor) -> Tensor:
        """t if_0 + (1 - t) if_1: the affine extension of two hard-label losses (B,) to every target."""
        return self.target * if_0 + (1 - self.target) * if_1
