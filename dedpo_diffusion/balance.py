"""Balanced-DPO for diffusion: equal gradient pull on both images of a pair, at the pair's own timestep.

DPO pushes the rejected answer down harder than it pulls the chosen one up (Balanced-DPO, arXiv 2502.20847). The
coefficients below are this project's derivation for diffusion: at a timestep t, the gradients of the two errors with
respect to the model's output have norms in the ratio sqrt(e_0) : sqrt(e_1), so the image with the larger error pulls
harder; a_0 : a_1 = sqrt(e_1) : sqrt(e_0) makes the norms equal. No label is needed, so soft targets and targets outside
[0, 1] keep their meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_coefficients(
    policy_errors: Tensor, reference_errors: Tensor | None = None, *, mode: str = "output", clip: float = 10.0
) -> Tensor:
    """Gradient factors (a_0, a_1) of the two errors of each pair: 2 sigmoid(+-u), which sum to 2.

    Args:
        policy_errors: e (B, 2).
        reference_errors: r (B, 2); needed by "relative" alone.
        mode: "none": a = 1. "output": u = (ln e_1 - ln e_0) / 2, equal output-space gradient norms.
            "relative": u = [ln(e_1 / r_1) - ln(e_0 / r_0)] / 2, which equals "none" while policy = reference.
        clip: bound of |u|.

    Returns:
        (B, 2), detached.

    Raises:
        ValueError: an unknown mode, or "relative" without reference errors.
    """
    errors = policy_errors.detach()
    if mode == "none":
        return torch.ones_like(errors)
    if mode == "relative":
        if reference_errors is None:
            raise ValueError('mode "relative" needs the reference errors')
        errors = errors / reference_errors.detach()
    elif mode != "output":
        raise ValueError(f"unknown balance mode {mode!r}; known: none, output, relative")
    log_ratio = 0.5 * (errors[:, 1].log() - errors[:, 0].log())
    u = log_ratio.clamp(-clip, clip)
    return 2 * torch.sigmoid(torch.stack([u, -u], dim=1))


def scale_gradients(errors: Tensor, factors: Tensor) -> Tensor:
    """sg(e) + a (e - sg(e)): the values of `errors` bit for bit, their gradients multiplied by `factors` of that shape."""
    frozen = errors.detach()
    return frozen + factors * (errors - frozen)


def balance_errors(policy_errors: Tensor, reference_errors: Tensor | None = None, *, mode: str = "output", clip: float = 10.0) -> Tensor:
    """The same errors, bit for bit, with gradients multiplied by `balance_coefficients`.

    Args, Raises: as `balance_coefficients`.

    Returns:
        (B, 2): sg(e) + a (e - sg(e)), sg being stop-gradient.
    """
    return scale_gradients(policy_errors, balance_coefficients(policy_errors, reference_errors, mode=mode, clip=clip))
