"""One preference step, from a batch of pairs to the loss of each: noise, predictions, errors, balance, margin, loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dedpo_diffusion.core.records import Conditioning, PairBatch, StepResult
from dedpo_diffusion.dpo.adadpo import adadpo_coefficients, adadpo_loss, told_coefficients
from dedpo_diffusion.dpo.balance import balance_coefficients, probability_scale, scale_gradients
from dedpo_diffusion.dpo.losses import implicit_rewards, margin
from dedpo_diffusion.dpo.noising import ForwardProcess, image_errors, image_noise, residual_cosine
from dedpo_diffusion.dpo.objectives import find_objective, objective_loss


class Model(Protocol):
    """What the step needs of a model; `models.Backbone` is one."""

    process: ForwardProcess

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, *, reference: bool = False) -> Tensor:
        """(B, 2, C, h, w) predictions at x_t of that shape."""
        ...


def needs_reference(kind: str, balance: str) -> bool:
    """Whether the loss or the balance asks for the reference's errors."""
    return "reference" in find_objective(kind).needs or balance == "relative"


def in_pairs(values: Tensor, members: Tensor | None) -> Tensor:
    """(B P, 2, ...) of the pairs of B groups, from values (B, K, ...) of their images; (B, 2, ...) as it is without groups."""
    if members is None:
        return values
    groups = torch.arange(len(values), device=values.device)[:, None, None]
    return values[groups, members].flatten(0, 1)


def _on_images(pull: Tensor, members: Tensor | None, images: int) -> Tensor:
    """What pairs pull in all at each image, (B, K), from what each pulls at its two (B P, 2)."""
    if members is None:
        return pull
    which = torch.nn.functional.one_hot(members, images).to(pull.dtype)
    return (which * pull.view(members.shape)[..., None]).sum(dim=(1, 2))


def _scale(process: ForwardProcess, timesteps: Tensor, elements: int, balance: str, tempering: float) -> Tensor | None:
    """The scale (B,) of the balances that compare probabilities."""
    if balance not in ("probability", "adadpo"):
        return None
    return probability_scale(process.alphas_cumprod, timesteps, elements, tempering=tempering, prediction=process.prediction)


def preference_step(
    model: Model,
    batch: PairBatch,
    *,
    timesteps: Tensor,
    noise: Tensor,
    beta: float,
    kind: str = "sigmoid",
    options: Mapping[str, float] | None = None,
    margin_cap: float | None = None,
    balance: str = "output",
    balance_clip: float = 10.0,
    balance_tempering: float = 1e-3,
    timestep_weight: Tensor | None = None,
) -> StepResult:
    """The weighted preference loss of each pair.

    Both images of a pair share the timestep, and the noise unless each has its own. The reference is what the model says it is;
    objectives that do not need it are computed without predicting with it.

    Args:
        model: predicts with the policy and with the reference.
        batch: B pairs, or groups of them; its reference errors, if it has them, save the reference's predictions.
        timesteps: (B,) int64.
        noise: (B, C, h, w), one draw a pair, or (B, 2, C, h, w), one an image.
        beta, kind, options, margin_cap: see `objectives`.
        balance, balance_clip, balance_tempering: see `balance`, and of "adadpo" `adadpo`.
        timestep_weight: (B,) factors of the pair losses, outside the sigmoid.

    Returns:
        StepResult; `loss` (B,) is weighted and not reduced. `reference_errors` and `margin` are NaN where nobody needed the reference.
    """
    noise, members = image_noise(noise), batch.members  # (B, 1, C, h, w) where both images, or all of a group, share it
    noisy = model.process.add_noise(batch.latents, noise, timesteps)
    wanted = model.process.target(batch.latents, noise, timesteps)
    reference_errors = batch.reference_errors
    if reference_errors is None and needs_reference(kind, balance):
        reference_errors = image_errors(model.predict(noisy, timesteps, batch.conditioning, reference=True), wanted)
    prediction = model.predict(noisy, timesteps, batch.conditioning)
    own = image_errors(prediction, wanted)
    policy_errors = in_pairs(own, members)
    cosine = residual_cosine(in_pairs(prediction.detach(), members), in_pairs(wanted, members))
    if members is not None:
        reference_errors = None if reference_errors is None else in_pairs(reference_errors, members)
        timesteps = timesteps.repeat_interleave(members.shape[1])
        timestep_weight = None if timestep_weight is None else timestep_weight.repeat_interleave(members.shape[1])
    objective: dict[str, Any] = {"kind": kind, "beta": beta, "options": options, "margin_cap": margin_cap}
    scale = _scale(model.process, timesteps, noise[0, 0].numel(), balance, balance_tempering)
    if balance == "adadpo":
        assert scale is not None
        coefficients = adadpo_coefficients(policy_errors, scale, clip=balance_clip)
        factors = told_coefficients(coefficients, batch.target)
        loss = adadpo_loss(policy_errors, reference_errors, batch.target, batch.weight, coefficients, **objective)
    else:
        factors = balance_coefficients(policy_errors, reference_errors, mode=balance, clip=balance_clip, scale=scale)
        loss = objective_loss(scale_gradients(policy_errors, factors), reference_errors, batch.target, batch.weight, **objective)
    if timestep_weight is not None:
        loss = timestep_weight * loss
    if reference_errors is None:
        reference_errors = torch.full_like(policy_errors, torch.nan, requires_grad=False)
    m = margin(implicit_rewards(policy_errors.detach(), reference_errors, beta=beta))
    # from the losses to the errors only, which costs next to nothing; the model's own graph stays as it is
    pull = torch.autograd.grad(loss.sum(), policy_errors, retain_graph=True)[0] if loss.requires_grad else torch.zeros_like(policy_errors)
    on_images = _on_images(pull, members, own.shape[1])
    square = 4 / noise[0, 0].numel() * (on_images.square() * own.detach()).sum(dim=1)  # an error is a mean of squares
    return StepResult(loss, m, cosine, policy_errors.detach(), reference_errors, factors, pull.abs().sum(dim=1), square)
