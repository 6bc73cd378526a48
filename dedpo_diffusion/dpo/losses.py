"""From errors to the pair loss of Diffusion-DPO (Wallace et al., arXiv 2311.12908).

`implicit_rewards` -> `margin` -> `preference_loss`, each per pair, without reduction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def implicit_rewards(policy_errors: Tensor, reference_errors: Tensor, *, beta: float) -> Tensor:
    """Implicit reward of each image: -0.5 beta (e - r), in the convention of Diffusion-DPO's published code.

    Args:
        policy_errors: e (B, 2), mean squared errors of the policy.
        reference_errors: r (B, 2), mean squared errors of the reference at the same noise and timestep.
        beta: strength of the pull to the reference; 2000 to 5000 for Stable Diffusion.

    Returns:
        (B, 2); exactly 0 where the policy is the reference.

    Raises:
        ValueError: the shapes differ or are not (B, 2), or beta is not positive.
    """
    if policy_errors.shape != reference_errors.shape or policy_errors.ndim != 2 or policy_errors.shape[1] != 2:
        raise ValueError(f"errors must both be (B, 2); got {tuple(policy_errors.shape)} and {tuple(reference_errors.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive; got {beta}")
    return -0.5 * beta * (policy_errors - reference_errors)


def margin(rewards: Tensor) -> Tensor:
    """Reward of image 0 minus reward of image 1, (B, 2) -> (B,); positive means "image 0 preferred"."""
    return rewards[:, 0] - rewards[:, 1]


def preference_loss(margin: Tensor, target: Tensor, *, kind: str = "sigmoid", margin_cap: float | None = None) -> Tensor:
    """Loss of each pair: the binary cross-entropy of sigmoid(margin) against `target`.

    softplus(m) - t m is affine in t, so a debiased target outside [0, 1] is as legal as a probability; t = 1 and t = 0
    recover Diffusion-DPO's -log sigmoid(+-m). Outside [0, 1] it is unbounded below, so `margin_cap` M can bend the part
    that a target has beyond [0, 1]: softplus(m) - t_c m - (t - t_c) M tanh(m / M), t_c = clip(t, 0, 1), which changes
    nothing for targets inside and has the same gradient at m = 0.

    Args:
        margin: m (B,).
        target: t (B,), P(image 0 preferred), or a debiased target.
        kind: "sigmoid"; the other objectives need more than a margin and are in `objectives`.
        margin_cap: M; None leaves the loss affine in the target.

    Returns:
        (B,), not reduced; log 2 at m = 0 whatever the target.

    Raises:
        ValueError: another kind, or a cap that is not positive.
    """
    if kind != "sigmoid":
        raise ValueError(f"unknown loss {kind!r}; known: sigmoid")
    softplus = -F.logsigmoid(-margin)  # F.softplus is cut to its asymptote at 20, which costs 2e-9
    if margin_cap is None:
        return softplus - target * margin
    if not margin_cap > 0:
        raise ValueError(f"margin_cap must be positive; got {margin_cap}")
    inside = target.clamp(0, 1)
    return softplus - inside * margin - (target - inside) * margin_cap * torch.tanh(margin / margin_cap)
