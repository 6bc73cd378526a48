"""The objectives by name, and the one function that computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

import dedpo_diffusion.dpo.objectives.formulas as formulas
from dedpo_diffusion.core import plugins
from dedpo_diffusion.dpo.objectives.quantities import Pairs


@dataclass(frozen=True)
class Objective:
    """An objective.

    Args:
        name: what `kind` is set to.
        title: its name in full.
        formula: loss of a pair in plain text; m margin, t target, R_i reward, e_i policy error of image i.
        source: paper and equation.
        affine: whether the loss is affine in the target, so that debiased targets outside [0, 1] keep their meaning.
        bounded_below: whether it stays bounded below for targets outside [0, 1].
        capped: whether `margin_cap` bends it.
        balanced: whether it moves the two errors by opposite gradients of one size, as every function of e_0 - e_1 does: what the
            balance and the guard are derived for.
        needs: what it needs beside policy errors and labels: "reference" errors, "doubt" of the judges, the whole "batch".
        options: its options and their defaults.
        use: when to use it, in one line.
        loss: from Pairs and the options to (B,) unweighted losses.
    """

    name: str
    title: str
    formula: str
    source: str
    affine: bool
    bounded_below: bool
    capped: bool
    balanced: bool
    needs: tuple[str, ...]
    options: Mapping[str, float]
    use: str
    loss: Callable[..., Tensor] = field(repr=False, compare=False)


_REFERENCE = ("reference",)
_ALL = (
    Objective(
        name="sigmoid", title="Diffusion-DPO", formula="softplus(m) - t m", source="Wallace et al., arXiv 2311.12908, eq. 14",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=_REFERENCE, options={}, loss=formulas.sigmoid,
        use="the default",
    ),
    Objective(
        name="ipo", title="IPO", formula="t (m - 1/2)^2 + (1 - t) (m + 1/2)^2", source="Azar et al., arXiv 2310.12036, eq. 17",
        affine=True, bounded_below=True, capped=False, balanced=True, needs=_REFERENCE, options={}, loss=formulas.ipo,
        use="targets far outside [0, 1]; labels so certain that DPO would never stop",
    ),
    Objective(
        name="hinge", title="SLiC hinge", formula="t max(0, 1 - m) + (1 - t) max(0, 1 + m)",
        source="Zhao et al., arXiv 2305.10425; on log-ratios Liu et al., arXiv 2309.06657",
        affine=True, bounded_below=False, capped=False, balanced=True, needs=_REFERENCE, options={}, loss=formulas.hinge,
        use="when pairs that are already 1 apart should be left alone",
    ),
    Objective(
        name="cdpo", title="label-smoothed DPO", formula="sigmoid at t' = 1/2 + (1 - 2 flips) (t - 1/2)",
        source="Mitchell, note on DPO with noisy preferences, 2023",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=_REFERENCE, options={"flips": 0.1}, loss=formulas.cdpo,
        use="labels wrong at a known rate, when a finite margin is wanted",
    ),
    Objective(
        name="robust", title="robust DPO", formula="sigmoid at t' = 1/2 + (t - 1/2) / (1 - 2 flips)",
        source="Chowdhury et al., arXiv 2403.00409",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=_REFERENCE, options={"flips": 0.1}, loss=formulas.robust,
        use="labels flipped at random at a known rate, without bias; keep margin_cap",
    ),
    Objective(
        name="dr_dpo", title="Dr-DPO", formula="-b log mean(exp(-sigmoid / b)), b = temperature", source="Wu et al., arXiv 2407.07880",
        affine=False, bounded_below=False, capped=True, balanced=True, needs=("reference", "batch"), options={"temperature": 1.0},
        loss=formulas.dr_dpo, use="labels in [0, 1] of which an unknown part is wrong; large batches",
    ),
    Objective(
        name="alpha_dpo", title="AlphaDPO", formula="-log sigmoid(+-(u - alpha z) - gamma), u = -beta (e_0 - e_1) / 2, z = m / rms(m)",
        source="Wu et al., arXiv 2410.10148",
        affine=True, bounded_below=False, capped=False, balanced=True, needs=("reference", "batch"), options={"alpha": 0.1, "gamma": 0.5},
        loss=formulas.alpha_dpo, use="a reference that is far from the preferred images; needs a smaller beta",
    ),
    Objective(
        name="bounded", title="Bounded-DPO",
        formula="-log sigmoid(R_w - b log(share exp(R_l / b) + 1 - share)), b = temperature", source="Cho et al., arXiv 2506.12725",
        affine=True, bounded_below=False, capped=False, balanced=False, needs=_REFERENCE, options={"share": 0.5, "temperature": 1.0},
        loss=formulas.bounded, use="when both errors rise because the rejected image is pushed too far",
    ),
    Objective(
        name="uncertainty", title="uncertainty-penalised DPO", formula="exp(-doubt / temperature) sigmoid",
        source="Houliston et al., arXiv 2410.20187, multiplicative form",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=("reference", "doubt"), options={"temperature": 0.25},
        loss=formulas.uncertainty, use="several judges that disagree on some pairs",
    ),
    Objective(
        name="rpo", title="RPO", formula="sigmoid - weight (t R_0 + (1 - t) R_1)", source="Pang et al., arXiv 2404.19733",
        affine=True, bounded_below=False, capped=True, balanced=False, needs=_REFERENCE, options={"weight": 0.1}, loss=formulas.rpo,
        use="when the error of the preferred images rises in training",
    ),
    Objective(
        name="h_dpo", title="H-DPO", formula="sigmoid at m' = -beta (alpha (e_0 - e_1) - (r_0 - r_1)) / 2",
        source="Omura et al., arXiv 2411.07595",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=_REFERENCE, options={"alpha": 0.95}, loss=formulas.h_dpo,
        use="experiments on diversity; alpha above 1 keeps more of it",
    ),
    Objective(
        name="kto", title="Diffusion-KTO", formula="mean over images of d sigmoid(Q - R) if liked, u sigmoid(R - Q) if not",
        source="Li et al., arXiv 2404.04465; Ethayarajh et al., arXiv 2402.01306",
        affine=True, bounded_below=True, capped=False, balanced=False, needs=("reference", "batch"),
        options={"desirable": 1.0, "undesirable": 1.0}, loss=formulas.kto, use="judgements of single images; targets far outside [0, 1]",
    ),
    Objective(
        name="mapo", title="MaPO", formula="e_w - weight log sigmoid(steps (f(e_w) - f(e_l))), f(e) = snr e / (exp(snr e) - 1)",
        source="Hong et al., arXiv 2406.06424, and its code",
        affine=True, bounded_below=False, capped=False, balanced=False, needs=(), options={"weight": 0.1, "snr": 0.5, "steps": 1000.0},
        loss=formulas.mapo, use="no reference predictions to pay for, or a style that the reference does not know",
    ),
    Objective(
        name="dmpo", title="DMPO", formula="t KL(sigmoid(m), 1 - flips) + (1 - t) KL(sigmoid(m), flips)",
        source="Li et al., arXiv 2507.07510",
        affine=True, bounded_below=True, capped=False, balanced=True, needs=_REFERENCE, options={"flips": 0.1}, loss=formulas.dmpo,
        use="a margin that stops at log((1 - flips) / flips); pairs far on the wrong side are given up",
    ),
    Objective(
        name="poly", title="Poly-DPO", formula="sigmoid + alpha (t sigmoid(-m) + (1 - t) sigmoid(m))", source="Li et al., arXiv 2604.24953",
        affine=True, bounded_below=False, capped=True, balanced=True, needs=_REFERENCE, options={"alpha": 1.0}, loss=formulas.poly,
        use="noisy public pairs (alpha above 0); alpha 0 on clean ones",
    ),
    Objective(
        name="sft", title="supervised fine-tuning", formula="t e_0 + (1 - t) e_1",
        source="Ho et al., arXiv 2006.11239, eq. 14, on preferred images",
        affine=True, bounded_below=False, capped=False, balanced=False, needs=(), options={}, loss=formulas.sft,
        use="a baseline",
    ),
    Objective(
        name="self_npo", title="Self-NPO", formula="(1 - rejected) (e_0 + e_1) / 2 + rejected (t e_1 + (1 - t) e_0)",
        source="Wang et al., arXiv 2505.11777",
        affine=True, bounded_below=False, capped=False, balanced=False, needs=(), options={"rejected": 0.0}, loss=formulas.self_npo,
        use="to train a model that guidance steers away from, on the model's own images",
    ),
)  # fmt: skip
_NEEDS = {"reference": "the reference errors", "doubt": "the judges' doubt of each pair: merge the labels of a judge"}
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _ALL}


@cache  # steps ask again and again
def find_objective(kind: str) -> Objective:
    """The objective of that name, of this package or of another installed one.

    Raises:
        ValueError: there is none.
        UserError: two packages offer it, or it cannot be imported.
    """
    entry = plugins.find(kind, [plugins.OBJECTIVES], OBJECTIVES)
    if entry is not None:
        return plugins.load(entry, lambda made: isinstance(made, Objective) and made.name == kind, f"an Objective of the name {kind!r}")
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
    doubt: Tensor | None = None,
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
        doubt: (B,), for objectives that need "doubt".

    Returns:
        (B,), weighted and not reduced.

    Raises:
        ValueError: an unknown kind or option, an option out of its range, something needed is missing, wrong shapes, or a
            target outside [0, 1] for an objective that is not affine.
    """
    objective = _find(kind, options, {"reference": reference_errors, "doubt": doubt})
    _check_shapes(policy_errors, reference_errors, target, weight, doubt)
    if not objective.affine and ((target < 0) | (target > 1)).any():
        raise ValueError(
            f"objective {kind!r} is not affine in the label, so targets outside [0, 1] mean nothing to it; "
            'merge the labels with --method human_only or naive, or train with an affine objective such as "sigmoid" or "ipo"'
        )
    dtype = torch.promote_types(policy_errors.dtype, torch.float32)
    pairs = Pairs(
        policy=policy_errors.to(dtype),
        reference=None if reference_errors is None else reference_errors.to(dtype),
        target=target.to(dtype),
        weight=weight.to(dtype),
        doubt=None if doubt is None else doubt.to(dtype),
        beta=beta,
        margin_cap=margin_cap,
    )
    return pairs.weight * objective.loss(pairs, **{**objective.options, **(options or {})})


def _find(kind: str, options: Mapping[str, float] | None, given: Mapping[str, Tensor | None]) -> Objective:
    """The objective, once its options are known to it and what it needs is given."""
    objective = find_objective(kind)
    if strange := sorted(set(options or {}) - set(objective.options)):
        known = ", ".join(objective.options) or "none"
        raise ValueError(f"objective {kind!r} has no option {strange[0]!r}; its options: {known}")
    for need, value in given.items():
        if need in objective.needs and value is None:
            raise ValueError(f"objective {kind!r} needs {_NEEDS[need]}")
    return objective


def _check_shapes(policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, doubt: Tensor | None) -> None:
    if policy.ndim != 2 or policy.shape[1] != 2 or (reference is not None and reference.shape != policy.shape):
        other = "" if reference is None else f" and {tuple(reference.shape)}"
        raise ValueError(f"errors must be (B, 2); got {tuple(policy.shape)}{other}")
    for name, value in {"target": target, "weight": weight, "doubt": doubt}.items():
        if value is not None and value.shape != policy.shape[:1]:
            raise ValueError(f"{name} must be ({policy.shape[0]},); got {tuple(value.shape)}")
