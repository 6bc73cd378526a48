"""How large gradients are by timestep: their second moment in each tenth of the range, measured at the start and followed in training.

With p_k the share of tenth k under uniform timesteps and G_k the mean squared gradient of one visit there,

    measured sampling   q_k in proportion to p_k sqrt(G_k), each visit weighted by p_k / q_k: the same loss, with the least noise
    equal noise         weights in proportion to 1 / sqrt(G_k): each tenth adds p_k to the noise. That is another loss

The gradient of the weights is measured once. After that only the gradient with respect to the model's predictions is known of every visit,
at no cost; the ratio of the two is taken to stay as it was in each tenth. Measured sampling is unbiased whatever becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.dpo.noising import Draws

TENTHS = 10
EVEN = 0.1  # share of measured draws that is uniform: no visit weighs more than 1 / EVEN
LEAST_ROOT = 0.02  # of the mean root; equal noise counts smaller ones as so large


def tenth_ends(first: int, last: int) -> Tensor:
    """Where the tenths of a range [first, last) begin, and the end of the last: (K + 1,) int64; K is 10, or the steps if they are fewer."""
    count = min(TENTHS, last - first)
    return torch.tensor([first + (last - first) * k // count for k in range(count + 1)])


class TimestepMoments:
    """What timesteps are drawn by, or weighted by, and what it follows from.

    Args:
        first, last: range of the timesteps.
        gradient: (K,) mean squared gradient of a visit in each tenth, before training.
        output: (K,) mean of `StepResult.square` of the same visits.
        equal_noise: weight timesteps by these moments, rather than draw by them.
        decay: of the moving average, for each step.

    Raises:
        ValueError: moments that are not positive numbers, or a decay outside [0, 1).
    """

    def __init__(self, first: int, last: int, gradient: Tensor, output: Tensor, *, equal_noise: bool, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay is {decay}: it must lie in [0, 1), where 0 forgets all but the last step")
        self.ends, self.equal_noise, self.decay = tenth_ends(first, last), equal_noise, decay
        gradient, output = gradient.double(), output.double()
        for name, value in {"gradient": gradient, "output": output}.items():
            if value.shape != self.even.shape or not bool((value > 0).all() and value.isfinite().all()):
                raise ValueError(f"the {name}'s second moments by tenth of the timesteps are {value.tolist()}; each must be above 0")
        self.gain = gradient / output
        self.followed = torch.stack([output * self.even, self.even])  # sums of squares, and the visits that they are of

    @property
    def even(self) -> Tensor:
        """p (K,), the share of each tenth under uniform timesteps."""
        return self.ends.diff().double() / (self.ends[-1] - self.ends[0])

    @property
    def moments(self) -> Tensor:
        """G (K,) float64 as it is taken to be now."""
        return self.gain * self.followed[0] / self.followed[1]

    @property
    def shares(self) -> Tensor:
        """q (K,), how often each tenth is drawn."""
        if self.equal_noise:
            return self.even
        wanted = self.even * self.moments.sqrt()
        if not wanted.sum() > 0:  # nothing pulls any more
            return self.even
        return (1 - EVEN) * wanted / wanted.sum() + EVEN * self.even

    @property
    def weights(self) -> Tensor:
        """(K,), what the loss of a visit is multiplied by in each tenth: p / q, or that of equal noise, whose mean is 1."""
        if not self.equal_noise:
            return self.even / self.shares
        root = self.moments.sqrt()
        mean = (self.even * root).sum()
        inverse = 1 / root.clamp(min=LEAST_ROOT * mean) if mean > 0 else torch.ones_like(root)
        return inverse / (self.even * inverse).sum()

    def tenth(self, timesteps: Tensor) -> Tensor:
        """Which tenth timesteps (B,) lie in."""
        return torch.searchsorted(self.ends[1:].to(timesteps.device), timesteps.contiguous(), right=True)

    def quantile(self, share: Tensor) -> Tensor:
        """The timesteps (N,) int64 below which these shares (N,) in [0, 1) of the draws lie."""
        ends, share = self.ends.to(share.device), share.double().contiguous()
        top = self.shares.cumsum(0).to(share.device)
        tenth = torch.searchsorted(top, share, right=True).clamp(max=len(top) - 1)  # the last top may round to less than 1
        below = torch.cat([torch.zeros_like(top[:1]), top[:-1]])[tenth]
        within = ((share - below) / (top[tenth] - below)).clamp(0, 1)
        start, size = ends[tenth], ends.diff()[tenth]
        return start + torch.minimum((within * size).long(), size - 1)

    def redraw(self, draws: Draws) -> Draws:
        """The same draws, at the timesteps that their shares now mean."""
        if self.equal_noise:
            return draws
        assert draws.share is not None
        return replace(draws, timesteps=self.quantile(draws.share))

    def factor(self, timesteps: Tensor) -> Tensor:
        """What the losses at timesteps (B,) are multiplied by, (B,) float32."""
        return self.weights.to(timesteps.device)[self.tenth(timesteps)].float()

    def measure(self, square: Tensor, timesteps: Tensor) -> Tensor:
        """What B visits add to the moving average: (2, K) float64, on their device.

        Args:
            square: (B,) of `StepResult`, of losses that `factor` is part of.
            timesteps: (B,) of the visits.
        """
        tenth = torch.nn.functional.one_hot(self.tenth(timesteps), len(self.ends) - 1).double()
        plain = square.detach().double() / self.factor(timesteps).double().square()
        return torch.stack([plain @ tenth, tenth.sum(dim=0)])

    def update(self, sums: Tensor) -> None:
        """Take in the sums of a whole step, over all its micro-batches and processes; one that is not finite is left out."""
        if bool(sums.isfinite().all()):
            self.followed = self.decay * self.followed + (1 - self.decay) * sums / sums[1].sum()

    def report(self) -> list[dict[str, Any]]:
        """For a line of metrics: of each tenth first and last timestep, share of the draws, weight and second moment."""
        columns = zip(self.ends[:-1].tolist(), (self.ends[1:] - 1).tolist(), self.shares.tolist(), self.weights.tolist(),
                      self.moments.tolist(), strict=True)  # fmt: skip
        return [dict(zip(("first", "last", "share", "weight", "moment"), row, strict=True)) for row in columns]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"gain": self.gain.tolist(), "followed": self.followed.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.gain = torch.tensor(state["gain"], dtype=torch.float64)
        self.followed = torch.tensor(state["followed"], dtype=torch.float64)
