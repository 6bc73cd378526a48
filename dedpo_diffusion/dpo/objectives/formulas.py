"""The formulas of the objectives: each from `Pairs` to (B,) losses, unweighted.

A formula for a hard label is extended to every target by `Pairs.mix`, so it is affine in the label. What is estimated from the whole
forward pass is held fixed in the gradient; each function says what.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dedpo_diffusion.dpo.losses import preference_loss
from dedpo_diffusion.dpo.objectives.quantities import Pairs


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


def _softplus(values: Tensor) -> Tensor:
    """log(1 + exp(values)), exact where F.softplus is cut to its asymptote."""
    return -F.logsigmoid(-values)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of (B,) values over the pairs of the forward pass, by weight; 0 where no pair has weight."""
    return (weight * values).sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def sigmoid(p: Pairs) -> Tensor:
    """Diffusion-DPO: the cross-entropy of sigmoid(m) against t."""
    return preference_loss(p.margin, p.target, margin_cap=p.margin_cap)


def ipo(p: Pairs) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2 of the log-ratio margin h = m / beta, times the constant beta^2."""
    return p.mix((p.margin - 0.5).square(), (p.margin + 0.5).square())


def hinge(p: Pairs) -> Tensor:
    """SLiC's calibration loss on the log-ratio margin: max(0, 1 - m)."""
    return p.mix((1 - p.margin).relu(), (1 + p.margin).relu())


def cdpo(p: Pairs, *, flips: float) -> Tensor:
    """Label smoothing: the label is taken to be wrong with probability `flips`."""
    _require(0 <= flips <= 0.5, f"flips must be in [0, 0.5]; got {flips}")
    smoothed = 0.5 + (1 - 2 * flips) * (p.target - 0.5)
    return preference_loss(p.margin, smoothed, margin_cap=p.margin_cap)


def robust(p: Pairs, *, flips: float) -> Tensor:
    """Robust DPO: [(1 - flips) l(label) - flips l(other label)] / (1 - 2 flips), whose mean over random flips is the clean loss.

    The sigmoid loss is affine in t, so this is the sigmoid loss at a target stretched away from 1/2.
    """
    _require(0 <= flips < 0.5, f"flips must be in [0, 0.5); got {flips}")
    stretched = 0.5 + (p.target - 0.5) / (1 - 2 * flips)
    return preference_loss(p.margin, stretched, margin_cap=p.margin_cap)


def dr_dpo(p: Pairs, *, temperature: float) -> Tensor:
    """Dr-DPO: -b log of the weighted mean of exp(-loss / b) over the pairs of the forward pass.

    That aggregate is the minimum over distributions q of E_q[loss] + b KL(q || weights), reached at q in proportion to
    weight exp(-loss / b). With s = q / weights held fixed, the terms s (loss + b log s), each s times the aggregate in value,
    have the aggregate as their weighted mean and its exact gradient.
    """
    _require(temperature > 0, f"temperature must be positive; got {temperature}")
    _require(bool((p.weight >= 0).all()), "dr_dpo needs weights that are not negative")
    losses = preference_loss(p.margin, p.target, margin_cap=p.margin_cap)
    with torch.no_grad():
        counted = p.weight > 0
        if not counted.any():
            return losses
        exponents = -(losses - losses[counted].min()) / temperature
        share = p.weight / p.weight.sum()
        log_s = torch.where(counted, exponents - (share * exponents.exp())[counted].sum().log(), 0.0)
    return log_s.exp() * (losses + temperature * log_s)


def alpha_dpo(p: Pairs, *, alpha: float, gamma: float) -> Tensor:
    """AlphaDPO: -log sigmoid(u - gamma - alpha z), with u the margin without reference and z = m over its root mean square.

    z is held fixed. The paper subtracts the running mean of the winners' margins in z as well; that shifts gamma by one number
    for the whole batch and needs hard labels, so it is left out, and the scale is of this forward pass.
    """
    free = -0.5 * p.beta * (p.policy[:, 0] - p.policy[:, 1])
    m = p.margin.detach()
    scale = _weighted_mean(m.square(), p.weight).sqrt()
    z = torch.where(scale > 0, m / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)
    shifted = free - alpha * z
    return p.mix(_softplus(gamma - shifted), _softplus(gamma + shifted))


def bounded(p: Pairs, *, share: float, temperature: float) -> Tensor:
    """Bounded-DPO: the rejected image is scored under the mixture share * policy + (1 - share) * reference.

    Its reward b log(share exp(R / b) + 1 - share) cannot fall below b log(1 - share), b the temperature.
    """
    _require(0 < share <= 1, f"share must be in (0, 1]; got {share}")
    _require(temperature > 0, f"temperature must be positive; got {temperature}")
    rest = torch.full_like(p.rewards, math.log1p(-share) if share < 1 else -math.inf)
    mixed = temperature * torch.logaddexp(math.log(share) + p.rewards / temperature, rest)
    return p.mix(_softplus(mixed[:, 1] - p.rewards[:, 0]), _softplus(mixed[:, 0] - p.rewards[:, 1]))


def uncertainty(p: Pairs, *, temperature: float) -> Tensor:
    """The sigmoid loss times exp(-doubt / temperature): pairs whose judges disagree pull less."""
    _require(temperature > 0, f"temperature must be positive; got {temperature}")
    assert p.doubt is not None
    return torch.exp(-p.doubt / temperature) * preference_loss(p.margin, p.target, margin_cap=p.margin_cap)


def rpo(p: Pairs, *, weight: float) -> Tensor:
    """DPO plus `weight` times the negative log-likelihood of the preferred image, beta (e - r) / 2 in the reward's unit."""
    _require(weight >= 0, f"weight must not be negative; got {weight}")
    likelihood = p.mix(p.rewards[:, 0], p.rewards[:, 1])
    return preference_loss(p.margin, p.target, margin_cap=p.margin_cap) - weight * likelihood


def h_dpo(p: Pairs, *, alpha: float) -> Tensor:
    """H-DPO: alpha times the policy's share of the margin; alpha below 1 asks for a sharper policy."""
    _require(alpha > 0, f"alpha must be positive; got {alpha}")
    assert p.reference is not None
    sharpened = alpha * p.policy - p.reference
    margin = -0.5 * p.beta * (sharpened[:, 0] - sharpened[:, 1])
    return preference_loss(margin, p.target, margin_cap=p.margin_cap)


def kto(p: Pairs, *, desirable: float, undesirable: float) -> Tensor:
    """Diffusion-KTO: 1 - sigmoid(+-(R - Q)) of each image, averaged over the two.

    Image 0 is desirable to the degree t, image 1 to the degree 1 - t. Q, held fixed, is the weighted mean reward of the forward
    pass, at least 0.
    """
    _require(min(desirable, undesirable) >= 0, "desirable and undesirable must not be negative")
    point = _weighted_mean(p.rewards.detach().mean(dim=1), p.weight).clamp(min=0)
    liked = desirable * torch.sigmoid(point - p.rewards)
    disliked = undesirable * torch.sigmoid(p.rewards - point)
    return 0.5 * p.mix(liked[:, 0] + disliked[:, 1], liked[:, 1] + disliked[:, 0])


def _score(values: Tensor) -> Tensor:
    """x / (exp(x) - 1) of x >= 0, which falls from 1 at 0 to 0."""
    small = values < 1e-3
    safe = values.where(~small, torch.ones_like(values))
    return torch.where(small, 1 - values / 2 + values.square() / 12, safe * torch.exp(-safe) / -torch.expm1(-safe))


def mapo(p: Pairs, *, weight: float, snr: float, steps: float) -> Tensor:
    """MaPO: e of the preferred image, plus `weight` times -log sigmoid of `steps` times the margin of the scores of snr e."""
    _require(weight >= 0 and snr > 0 and steps > 0, "mapo needs snr and steps above 0 and a weight that is not negative")
    scores = _score(snr * p.policy)
    m = steps * (scores[:, 0] - scores[:, 1])
    return p.mix(p.policy[:, 0] + weight * _softplus(-m), p.policy[:, 1] + weight * _softplus(m))


def dmpo(p: Pairs, *, flips: float) -> Tensor:
    """DMPO: the reverse divergence KL(sigmoid(m) || label), the label smoothed to 1 - flips."""
    _require(0 < flips < 0.5, f"flips must be in (0, 0.5); got {flips}")
    for_0, for_1 = torch.sigmoid(p.margin), torch.sigmoid(-p.margin)
    entropy = for_0 * _softplus(-p.margin) + for_1 * _softplus(p.margin)
    right, wrong = math.log(1 - flips), math.log(flips)
    return p.mix(-for_0 * right - for_1 * wrong, -for_1 * right - for_0 * wrong) - entropy


def poly(p: Pairs, *, alpha: float) -> Tensor:
    """Poly-DPO: the sigmoid loss plus alpha (1 - probability of the label)."""
    extra = p.mix(torch.sigmoid(-p.margin), torch.sigmoid(p.margin))
    return preference_loss(p.margin, p.target, margin_cap=p.margin_cap) + alpha * extra


def sft(p: Pairs) -> Tensor:
    """Diffusion's own training loss on the preferred image."""
    return p.mix(p.policy[:, 0], p.policy[:, 1])


def self_npo(p: Pairs, *, rejected: float) -> Tensor:
    """Self-NPO: diffusion's own training loss on images that the model itself made, to be steered away from when sampling.

    `rejected` moves the weight from both images alike (0, no label used) to the rejected one alone (1).
    """
    _require(0 <= rejected <= 1, f"rejected must be in [0, 1]; got {rejected}")
    return (1 - rejected) * p.policy.mean(dim=1) + rejected * p.mix(p.policy[:, 1], p.policy[:, 0])
