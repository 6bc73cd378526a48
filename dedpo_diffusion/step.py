"""One preference step, from a batch of pairs to the loss of each: noise, predictions, errors, balance, margin, loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .balance import balance_coefficients, scale_gradients
from .losses import implicit_rewards, margin, preference_loss
from .noising import ForwardProcess, image_errors
from .records import Conditioning, PairBatch, StepResult


class Model(Protocol):
    """What the step needs of a model; `models.Backbone` is one."""

    process: ForwardProcess

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, *, reference: bool = False) -> Tensor:
        """(B, 2, C, h, w) predictions at x_t of that shape."""
        ...


def preference_step(
    model: Model,
    batch: PairBatch,
    *,
    timesteps: Tensor,
    noise: Tensor,
    beta: float,
    kind: str = "sigmoid",
    balance: str = "output",
    balance_clip: float = 10.0,
    margin_cap: float | None = None,
) -> StepResult:
    """The weighted preference loss of each pair.

    Both images of a pair share timestep and noise. The reference is the model without its adapter.

    Args:
        model: predicts with the policy and with the reference.
        batch: B pairs.
        timesteps: (B,) int64.
        noise: (B, C, h, w), one draw a pair.
        beta, kind, margin_cap: see `losses`.
        balance, balance_clip: see `balance`.

    Returns:
        StepResult; `loss` (B,) is weighted and not reduced.
    """
    shared = noise[:, None]  # (B, 1, C, h, w): one noise for both images
    noisy = model.process.add_noise(batch.latents, shared, timesteps)
    wanted = model.process.target(batch.latents, shared, timesteps)
    reference_errors = image_errors(model.predict(noisy, timesteps, batch.conditioning, reference=True), wanted)
    policy_errors = image_errors(model.predict(noisy, timesteps, batch.conditioning), wanted)
    factors = balance_coefficients(policy_errors, reference_errors, mode=balance, clip=balance_clip)
    m = margin(implicit_rewards(scale_gradients(policy_errors, factors), reference_errors, beta=beta))
    loss = batch.weight * preference_loss(m, batch.target, kind=kind, margin_cap=margin_cap)
    return StepResult(loss, m.detach(), policy_errors.detach(), reference_errors, factors)
