"""The objectives of training: one signature on errors, target and weight, and what each needs. docs/objectives.md lists them.

A paper's beta log(pi / pi_ref) of an image stands here for the implicit reward -beta (e - r) / 2, and its beta log(pi) for
-beta e / 2: both up to constants that are alike for the two images of a pair, which share timestep and noise.

A formula for a hard label is extended to every target by `Pairs.mix`, so it is affine in the label. What is estimated from the whole
forward pass is held fixed in the gradient; each function says what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dedpo_diffusion.core import plugins
from dedpo_diffusion.dpo.losses import implicit_rewards, margin, preference_loss

LINEAR_SLOPE = 0.4  # of Linear-DPO's line: 0.2 beta of its code, in this convention


@dataclass(frozen=True)
class Pairs:
    """B pairs in one forward pass.

    `policy` and `reference` (B, 2) errors; `target` and `weight` (B,); `beta` and `margin_cap` as in `losses`.
    """

    policy: Tensor
    reference: Tensor | None
    target: Tensor
    weight: Tensor
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


# ---- the formulas, each from `Pairs` to (B,) losses, unweighted


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


def _softplus(values: Tensor) -> Tensor:
    """log(1 + exp(values)), exact where F.softplus is cut to its asymptote."""
    return -F.logsigmoid(-values)


def sigmoid(p: Pairs, *, stop: float) -> Tensor:
    """Diffusion-DPO: the cross-entropy of sigmoid(m) against t. Wallace et al., arXiv 2311.12908, eq. 14.

    `stop` is the margin beyond which a preferred image pulls no further: a hard label's loss is that at the margin clip(m, -inf, stop).
    """
    _require(stop > 0, f"stop must be positive; got {stop}")
    if stop == math.inf:
        return preference_loss(p.margin, p.target, margin_cap=p.margin_cap)
    return _bent(p, _softplus(-p.margin.clamp(max=stop)), _softplus(p.margin.clamp(min=-stop)))


def linear(p: Pairs, *, eta: float) -> Tensor:
    """Linear-DPO: the slope in m is clip(1/2 + 0.4 m, eta, 1 - eta) - t, in place of sigmoid(m) - t. Li et al., arXiv 2605.21123.

    Its EMA reference is not part of it here.
    """
    _require(0 <= eta < 0.5, f"eta must be in [0, 0.5); got {eta}")
    edge = (0.5 - eta) / LINEAR_SLOPE
    inner, outer = p.margin.clamp(-edge, edge), p.margin.abs() - edge
    rise = 0.5 * inner + 0.5 * LINEAR_SLOPE * inner.square()  # the integral of the clipped line, from margin 0
    rise = rise + outer.clamp(min=0) * (0.5 * p.margin.sign() + 0.5 - eta)  # 1 - eta above, -eta below
    return _bent(p, rise - p.margin, rise)


def _bent(p: Pairs, if_0: Tensor, if_1: Tensor) -> Tensor:
    """`Pairs.mix`, with the part that a target has outside [0, 1] bent as `losses.preference_loss` does if a cap is given."""
    if p.margin_cap is None:
        return p.mix(if_0, if_1)
    _require(p.margin_cap > 0, f"margin_cap must be positive; got {p.margin_cap}")
    inside = p.target.clamp(0, 1)
    beyond = p.margin_cap * torch.tanh((if_0 - if_1) / p.margin_cap)
    return inside * if_0 + (1 - inside) * if_1 + (p.target - inside) * beyond


def ipo(p: Pairs) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2 of the log-ratio margin h = m / beta, times the constant beta^2. Azar et al., arXiv 2310.12036, eq. 17."""
    return p.mix((p.margin - 0.5).square(), (p.margin + 0.5).square())


def cdpo(p: Pairs, *, flips: float) -> Tensor:
    """Label smoothing: the label is taken to be wrong with probability `flips`. Mitchell, note on DPO with noisy preferences, 2023."""
    _require(0 <= flips <= 0.5, f"flips must be in [0, 0.5]; got {flips}")
    smoothed = 0.5 + (1 - 2 * flips) * (p.target - 0.5)
    return preference_loss(p.margin, smoothed, margin_cap=p.margin_cap)


def dr_dpo(p: Pairs, *, temperature: float) -> Tensor:
    """Dr-DPO: -b log of the weighted mean of exp(-loss / b) over the pairs of the forward pass. Wu et al., arXiv 2407.07880.

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


def kto(p: Pairs, *, desirable: float, undesirable: float) -> Tensor:
    """Diffusion-KTO: 1 - sigmoid(+-(R - Q)) of each image, averaged over the two. Li et al., arXiv 2404.04465.

    Image 0 is desirable to the degree t, image 1 to the degree 1 - t. Q, held fixed, is the weighted mean reward of the forward
    pass, at least 0; 0 where no pair has weight.
    """
    _require(min(desirable, undesirable) >= 0, "desirable and undesirable must not be negative")
    total = p.weight.sum().clamp(min=torch.finfo(p.weight.dtype).tiny)
    point = ((p.weight * p.rewards.detach().mean(dim=1)).sum() / total).clamp(min=0)
    liked = desirable * torch.sigmoid(point - p.rewards)
    disliked = undesirable * torch.sigmoid(p.rewards - point)
    return 0.5 * p.mix(liked[:, 0] + disliked[:, 1], liked[:, 1] + disliked[:, 0])


def _score(values: Tensor) -> Tensor:
    """x / (exp(x) - 1) of x >= 0, which falls from 1 at 0 to 0."""
    small = values < 1e-3
    safe = values.where(~small, torch.ones_like(values))
    return torch.where(small, 1 - values / 2 + values.square() / 12, safe * torch.exp(-safe) / -torch.expm1(-safe))


def mapo(p: Pairs, *, weight: float, snr: float, steps: float) -> Tensor:
    """MaPO: e of the preferred image, plus `weight` times -log sigmoid of `steps` times the margin of the scores of snr e.

    Hong et al., arXiv 2406.06424, and its code.
    """
    _require(weight >= 0 and snr > 0 and steps > 0, "mapo needs snr and steps above 0 and a weight that is not negative")
    scores = _score(snr * p.policy)
    m = steps * (scores[:, 0] - scores[:, 1])
    return p.mix(p.policy[:, 0] + weight * _softplus(-m), p.policy[:, 1] + weight * _softplus(m))


def sft(p: Pairs) -> Tensor:
    """Diffusion's own training loss on the preferred image. Ho et al., arXiv 2006.11239, eq. 14."""
    return p.mix(p.policy[:, 0], p.policy[:, 1])


# ---- where they stop: the margin at which the loss of a pair is least, from targets (n,); +-inf where more is always better


def _logit(target: Tensor, *, stop: float = math.inf) -> Tensor:
    """Of the sigmoid loss: sigmoid(m) = t, at most `stop`. Outside [0, 1] nothing stops it, `margin_cap` or not."""
    margins = torch.logit(target.clamp(0, 1))
    return torch.where((target >= 0) & (target <= 1), margins.clamp(-stop, stop), margins)


def _line(target: Tensor, *, eta: float) -> Tensor:
    """Of the linear loss, whose slope is flat beyond its edges: 1/2 + 0.4 m = t."""
    margins = (target - 0.5) / LINEAR_SLOPE
    return torch.where((target >= eta) & (target <= 1 - eta), margins, margins.sign() * math.inf)


def _smoothed(target: Tensor, *, flips: float) -> Tensor:
    return _logit(0.5 + (1 - 2 * flips) * (target - 0.5))


def _centred(target: Tensor) -> Tensor:
    return target - 0.5


# ---- by name


@dataclass(frozen=True)
class Objective:
    """An objective.

    Attributes:
        loss: from Pairs and the options to (B,) unweighted losses.
        affine: whether the loss is affine in the target, so that debiased targets outside [0, 1] keep their meaning.
        balanced: whether it moves the two errors by opposite gradients of one size, as every function of e_0 - e_1 does: what the
            balance is derived for.
        needs: what it needs beside policy errors and labels: "reference" errors, the whole "batch".
        options: its options and their defaults.
        stop: from targets (n,) and the options to the margins (n,) at which the loss of a pair is least, +-inf where it falls for ever;
            None where that is no matter of the margin alone.
    """

    loss: Callable[..., Tensor] = field(repr=False)
    affine: bool = True
    balanced: bool = True
    needs: tuple[str, ...] = ("reference",)
    options: Mapping[str, float] = field(default_factory=dict)
    stop: Callable[..., Tensor] | None = field(default=None, repr=False)


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(sigmoid, options={"stop": math.inf}, stop=_logit),
    "linear": Objective(linear, options={"eta": 0.0}, stop=_line),
    "ipo": Objective(ipo, stop=_centred),
    "cdpo": Objective(cdpo, options={"flips": 0.1}, stop=_smoothed),
    "dr_dpo": Objective(
        dr_dpo, affine=False, needs=("reference", "batch"), options={"temperature": 1.0}, stop=lambda target, temperature: _logit(target)
    ),
    "kto": Objective(kto, balanced=False, needs=("reference", "batch"), options={"desirable": 1.0, "undesirable": 1.0}),
    "mapo": Objective(mapo, balanced=False, needs=(), options={"weight": 0.1, "snr": 0.5, "steps": 1000.0}),
    "sft": Objective(sft, balanced=False, needs=()),
}


@cache  # steps ask again and again
def find_objective(kind: str) -> Objective:
    """The objective of that name, of this package or of another installed one.

    Raises:
        ValueError: there is none.
        UserError: two packages offer it, or it cannot be imported.
    """
    entry = plugins.find(kind, [plugins.OBJECTIVES], OBJECTIVES)
    if entry is not None:
        return plugins.load(entry, lambda made: isinstance(made, Objective), "an Objective")
    if kind not in OBJECTIVES:
        raise ValueError(f"unknown objective {kind!r}; {plugins.known(kind, OBJECTIVES, plugins.OBJECTIVES)}")
    return OBJECTIVES[kind]


def objective_loss(
    policy_errors: Tensor,
    reference_errors: Tensor | None,
    target: Tensor,
    weight: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float,
    options: Mapping[str, float] | None = None,
    margin_cap: float | None = None,
) -> Tensor:
    """Weighted loss of each pair; its mean is the loss.

    Computed in float32 at least, whatever the dtype of the errors.

    Args:
        policy_errors: e (B, 2), with graph; gradients may be balanced already.
        reference_errors: r (B, 2); None for objectives that do not need "reference".
        target: t (B,), P(image 0 preferred), or a debiased target if the objective is affine.
        weight: (B,).
        kind: a key of `OBJECTIVES`, or the name of another package's objective.
        beta: as in `losses.implicit_rewards`.
        options: options of the objective that differ from their defaults.
        margin_cap: bound for the part of a target outside [0, 1], see `losses.preference_loss`; the objectives that contain
            the sigmoid loss use it, the others do not.

    Returns:
        (B,), weighted and not reduced.

    Raises:
        ValueError: an unknown kind or option, an option out of its range, something needed is missing, wrong shapes, or a
            target outside [0, 1] for an objective that is not affine.
    """
    objective = _find(kind, options)
    if "reference" in objective.needs and reference_errors is None:
        raise ValueError(f"objective {kind!r} needs the reference errors")
    _check_shapes(policy_errors, reference_errors, target, weight)
    if not objective.affine and ((target < 0) | (target > 1)).any():
        raise ValueError(
            f"objective {kind!r} is not affine in the label, so targets outside [0, 1] mean nothing to it; "
            'merge the labels with --method human_only or naive, or train with an affine objective such as "sigmoid" or "ipo"'
        )
    dtype = torch.promote_types(policy_errors.dtype, torch.float32)
    reference = None if reference_errors is None else reference_errors.to(dtype)
    pairs = Pairs(policy_errors.to(dtype), reference, target.to(dtype), weight.to(dtype), beta, margin_cap)
    return pairs.weight * objective.loss(pairs, **{**objective.options, **(options or {})})


def _find(kind: str, options: Mapping[str, float] | None) -> Objective:
    """The objective, once its options are known to it."""
    objective = find_objective(kind)
    if strange := sorted(set(options or {}) - set(objective.options)):
        known = ", ".join(objective.options) or "none"
        raise ValueError(f"objective {kind!r} has no option {strange[0]!r}; its options: {known}")
    return objective


def _check_shapes(policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor) -> None:
    if policy.ndim != 2 or policy.shape[1] != 2 or (reference is not None and reference.shape != policy.shape):
        other = "" if reference is None else f" and {tuple(reference.shape)}"
        raise ValueError(f"errors must be (B, 2); got {tuple(policy.shape)}{other}")
    for name, value in {"target": target, "weight": weight}.items():
        if value.shape != policy.shape[:1]:
            raise ValueError(f"{name} must be ({policy.shape[0]},); got {tuple(value.shape)}")
