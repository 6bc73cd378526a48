"""AdaDPO for diffusion: the preferred image's pull is multiplied by how much likelier it is than the other one, at most 2.

DPO's gradients with respect to the two probabilities are in the ratio 1 / P_w : 1 / P_l. AdaDPO (Chen et al., arXiv 2605.28440) makes them
equal with the coefficient beta sg(P_w / P_l) in place of beta on the preferred answer, clipped at 2, sg being stop-gradient. Here P_i is
the policy's probability of the reverse step at the pair's own timestep, tempered: log P_i = -scale e_i / 2 with `probability_scale`, so
that P_w / P_l = exp(scale (e_l - e_w) / 2). The reference, an option in the paper, does not enter. That the coefficient stands on the
preferred answer follows from the equality that it is for; the paper was read in its abstract only. It differs from the balance
"probability", whose two factors are in the same ratio, in that the rejected image's gradient stays as it is, and in the clip.

Who is preferred is a matter of the label, so a loss that is affine in the label stays so: every other target has the gradient of
t times a label 1 and 1 - t times a label 0, and merged targets the one that all human labels would have on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.dpo.objectives import find_objective, objective_loss

LARGEST = 2.0  # the paper's clip of P_w / P_l


def adadpo_coefficients(policy_errors: Tensor, scale: Tensor, *, clip: float = 10.0) -> Tensor:
    """The factor of each image's gradient, were it the preferred one: P_i / P_j between exp(-clip) and 2.

    Args:
        policy_errors: e (B, 2).
        scale: (B,), of `balance.probability_scale`.
        clip: bound of |log(P_i / P_j)|, as of the other balances, so that no pull vanishes; upwards the paper's 2 bounds it first.

    Returns:
        (B, 2), detached; exactly 1 where the errors are equal.
    """
    errors = policy_errors.detach()
    u = 0.5 * scale * (errors[:, 1] - errors[:, 0])
    return torch.stack([u, -u], dim=1).clamp(-clip, clip).exp().clamp(max=LARGEST)


def adadpo_loss(
    policy_errors: Tensor,
    reference_errors: Tensor | None,
    target: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float,
    options: Mapping[str, float] | None = None,
    margin_cap: float | None = None,
) -> Tensor:
    """`objective_loss` bit for bit, with AdaDPO's gradients.

    The slope s of the plain loss in e_0 is that in -e_1. At a label 1 the gradient in e_0 gets `coefficients[:, 0]` times s_1, at a label
    0 that in e_1 `coefficients[:, 1]` times -s_0, and the other error's stays. The part of either label in s is read off s itself, which
    `margin_cap` may have bent.

    Args:
        coefficients: (B, 2), of `adadpo_coefficients`.
        policy_errors, reference_errors, target, weight, kind, beta, options, margin_cap: as in `objective_loss`.

    Returns:
        (B,), weighted and not reduced.

    Raises:
        ValueError: an objective whose gradients are not opposite or that is not affine in the label, or as `objective_loss`.
    """
    objective = find_objective(kind)
    if not (objective.balanced and objective.affine):
        raise ValueError(f"balance adadpo is for losses of the margin that are affine in the label, which objective {kind!r} is not")
    asked: dict[str, Any] = {"kind": kind, "beta": beta, "options": options, "margin_cap": margin_cap}
    plain = objective_loss(policy_errors, reference_errors, target, weight, **asked)

    def slope(label: Tensor) -> Tensor:
        """Of the unweighted loss in e_0, (B,)."""
        with torch.enable_grad():
            errors = policy_errors.detach().requires_grad_()
            loss = objective_loss(errors, reference_errors, label, torch.ones_like(weight), **asked)
            return torch.autograd.grad(loss.sum(), errors)[0][:, 0]

    given, if_0, if_1 = slope(target), slope(torch.ones_like(target)), slope(torch.zeros_like(target))
    apart = if_0 - if_1
    share = torch.where(apart == 0, target.to(apart.dtype), (given - if_1) / apart)  # of label 1: t, unless bent
    more = torch.stack([share * if_0, -(1 - share) * if_1], dim=1) * (coefficients - 1)
    return plain + weight * (more * (policy_errors - policy_errors.detach())).sum(dim=1)


def told_coefficients(coefficients: Tensor, target: Tensor) -> Tensor:
    """The gradient factors (B, 2) of the two errors at the likelier label of each pair: what curves show."""
    first = target >= 0.5
    return torch.where(torch.stack([first, ~first], dim=1), coefficients, torch.ones_like(coefficients))
