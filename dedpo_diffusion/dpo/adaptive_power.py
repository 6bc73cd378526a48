"""A power that follows training: re-estimated from the margins as they grow, by a moving average, never from the batch it serves.

At margin m the gradient of a pair's loss is rho = sigmoid(m) - label times that of m. The power that makes the variance
of the merged gradient least is then sum q rho_z rho_g / sum q rho_g^2 over labelled pairs (q: how much the pair's margin
moves; taken as equal here). At m = 0 that is the statistic of the labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import PairBatch, Targets

LEAST_POWER = 0.1  # that visits are planned for: pairs without a human label stay in sight while the power is 0
WIDE = 1.0  # mean |margin| beyond which the estimate is too high, and is halved


@dataclass(frozen=True)
class Parts:
    """What targets are made of, each (n,) float64: `human` label (NaN: none), `judge` label, `inverse` propensity h, and `visit`.

    `visit` is what h + lam (1 - h) is multiplied by: 1 / (N p) of a pair that is visited with probability p out of a pool of N, times
    whatever common factor the merged weights carry.
    """

    human: Tensor
    judge: Tensor
    inverse: Tensor
    visit: Tensor

    def at(self, places: list[int]) -> Parts:
        """Those of some pairs."""
        return Parts(self.human[places], self.judge[places], self.inverse[places], self.visit[places])


def visited_pairs(merged: Targets, path: Path, *, adaptive: bool) -> np.ndarray:
    """Which pairs a run visits, (N,) bool: those that carry weight, and with a power that follows those that may come to carry some.

    A merge whose power is 0 gives the pairs that only a judge labelled no weight, which a power that follows may change. Pairs that
    the merge left out (a fold's, for one) stay out.

    Args:
        merged: the targets.
        path: their file, to be named.
        adaptive: the power will change.

    Raises:
        UserError: the file does not say what its targets were merged from.
    """
    weighted = merged.weight != 0
    if not adaptive:
        return weighted
    if merged.human is None or merged.judge is None or merged.inverse is None or merged.power is None:
        raise UserError(
            f"{path} does not say what its targets were merged from, which objective.power=adaptive needs; run `dedpo merge` again"
        )
    if not weighted.any() or merged.power[weighted].any():
        return weighted
    return weighted | ~np.isnan(merged.judge)


def loss_parts(merged: Targets, path: Path, rows: np.ndarray) -> tuple[Parts, float]:
    """What the targets of the visited pairs are made of, and the one power that they were merged with.

    Args:
        merged: the targets.
        path: their file, to be named.
        rows: the pairs of `visited_pairs`, at least one.

    Returns:
        The parts, whose `visit` is the factor between the stored weights and h + power (1 - h), and the power.

    Raises:
        UserError: pairs without a judge's label, of several powers, or with weights of another kind.
    """
    human, judge, inverse, power, weight = (getattr(merged, name)[rows] for name in ("human", "judge", "inverse", "power", "weight"))
    if np.isnan(judge).any():
        raise UserError(f"{path} has pairs without a judge's label, which objective.power=adaptive needs; merge with method tuned or dedpo")
    if np.ptp(power) > 0:
        raise UserError(f"{path}: pairs have powers of their own (cross-fitting); objective.power=adaptive needs one for all")
    plain = inverse + power * (1 - inverse)
    factor = weight.sum() / plain.sum() if plain.any() else 0.0
    if not np.allclose(weight, factor * plain, rtol=1e-6, atol=0):
        raise UserError(
            f"{path}: its weights are not those of its powers and propensities times one number, which objective.power=adaptive needs; "
            "run `dedpo merge` again"
        )
    parts = (torch.tensor(values, dtype=torch.float64) for values in (human, judge, inverse, np.full(len(rows), factor)))
    return Parts(*parts), float(power[0])


def retarget(human: Tensor, judge: Tensor, inverse: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Target and weight (n,) at a power: weight = h + lam (1 - h), weight * target = h z + lam (1 - h) g."""
    weight = (1 - power) * inverse + power
    stretch = torch.where(weight > 0, inverse / weight, 0.0)
    target = torch.where(torch.isnan(human), judge, human + (stretch - 1) * (human - judge))
    return torch.where(weight > 0, target, 0.5), weight


def _terms(part: Parts, margins: Tensor) -> Tensor:
    """h (h - 1) rho_z rho_g and h (h - 1) rho_g^2 of each pair, (n, 2); 0 where no human answered."""
    labelled, share = ~torch.isnan(part.human), torch.sigmoid(margins)
    counted = torch.where(labelled, part.inverse * (part.inverse - 1).clamp(min=0), 0.0)
    rho_z, rho_g = share - torch.nan_to_num(part.human), share - part.judge
    return torch.stack([counted * rho_z * rho_g, counted * rho_g**2], dim=1)


class AdaptivePower:
    """The power of a run that re-estimates it.

    Args:
        parts: of all visited pairs.
        power: where it starts: what the labels alone ask for, capped.
        cap: its bound, see `debias.power_cap`.
        decay: of the moving average, for each step.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, parts: Parts, *, power: float, cap: float, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the power's decay is {decay}: it must lie in [0, 1), where 0 forgets all but the last step")
        self.parts, self.power, self.cap, self.decay = parts, power, cap, decay
        c, v = _terms(parts, torch.zeros(len(parts.human), dtype=torch.float64)).sum(dim=0) / (1 / parts.visit).sum()  # over the pool
        self.moments = torch.stack([c, v, torch.zeros_like(c), torch.ones_like(c)])

    def measure(self, margins: Tensor, places: list[int]) -> Tensor:
        """Sums over B visits of what the power is made of: (4,) float64, the terms c and v, |margin|, and the visits' number.

        Args:
            margins: (B,) of the visits.
            places: which of the pairs they are of.
        """
        part, m = self.parts.at(places), margins.detach().double().cpu()
        c, v = (part.visit[:, None] * _terms(part, m)).sum(dim=0)
        return torch.stack([c, v, m.abs().sum(), torch.tensor(float(len(places)), dtype=torch.float64)])

    def update(self, sums: Tensor) -> None:
        """Take in the sums of a whole step, over all its micro-batches and processes; the power of the next step follows."""
        sums = sums / sums[3]
        self.moments = self.decay * self.moments + (1 - self.decay) * sums
        c, v, width, _ = self.moments.tolist()
        wanted = min(max(c / v, 0.0), 1.0) if v > 0 else 0.0
        self.power = min(wanted / 2 if width > WIDE else wanted, self.cap)

    def apply(self, batch: PairBatch, places: list[int]) -> PairBatch:
        """The batch with targets and weights at the present power."""
        part = self.parts.at(places)
        target, weight = retarget(part.human, part.judge, part.inverse, self.power)
        device = batch.target.device
        return replace(batch, target=target.float().to(device), weight=(weight * part.visit).float().to(device))

    def state(self) -> dict[str, float | list[float]]:
        """What a checkpoint keeps."""
        return {"power": self.power, "moments": self.moments.tolist()}

    def restore(self, state: Mapping[str, float | list[float]]) -> None:
        """Put back what `state` gave."""
        self.power = float(state["power"])  # type: ignore[arg-type]
        self.moments = torch.tensor(state["moments"], dtype=torch.float64)
