"""What a training step says about itself: numbers for curves, per step and per timestep bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.core.records import PairBatch, StepResult

BUCKETS = 10
SATURATED = 0.1  # of its value at margin 0: below it the sigmoid's slope hardly moves a pair any more (|margin| above 3.64)
LARGEST = 10  # one in so many of a line's pairs, those whose part in the gradient is told


def step_metrics(results: Sequence[StepResult], batches: Sequence[PairBatch], timesteps: Tensor, *, schedule: int) -> dict[str, Tensor]:
    """The per-pair numbers of a step, joined over its micro-batches.

    Args:
        results, batches: of each micro-batch.
        timesteps: (B,) of the whole step's pairs, or groups, on this process.
        schedule: number of timesteps of the training schedule.

    Returns:
        Tensors of B rows: loss, margin, cosine, pull, target, weight (B,); policy, reference, coefficients (B, 2); bucket (B,); and
        labelled (B,), 1 or 0, where the targets say which pairs people labelled; of groups, there (B,), False for what only fills up.
    """
    device = results[0].margin.device
    joined = {name: torch.cat([getattr(result, name).detach() for result in results]) for name in ("loss", "margin", "cosine", "pull")}
    joined["policy"] = torch.cat([result.policy_errors for result in results])
    joined["reference"] = torch.cat([result.reference_errors for result in results])
    joined["coefficients"] = torch.cat([result.coefficients for result in results])
    joined["target"] = torch.cat([batch.target for batch in batches])
    joined["weight"] = torch.cat([batch.weight for batch in batches])
    known = [batch.labelled for batch in batches if batch.labelled is not None]
    if len(known) == len(batches):
        joined["labelled"] = torch.cat(known).float()
    there = [batch.there for batch in batches if batch.there is not None]
    if there:
        joined["there"] = torch.cat(there)
    each = len(joined["margin"]) // len(timesteps)  # pairs of a group share its timestep
    joined["bucket"] = (timesteps.to(device) * BUCKETS // schedule).repeat_interleave(each)
    return joined


def summarise(pairs: dict[str, Tensor], *, schedule: int) -> dict[str, Any]:
    """Means over the pairs of a step.

    "winner" is the image that the target prefers; ties (0.5) have none. A drift is the policy's error minus the
    reference's: falling for winners and rising for losers is what DPO asks for; both rising is the usual decay. Where the reference
    was not predicted with (its errors are NaN), margins, accuracy, saturation and drifts are None. A pair's part in the gradient is its
    `StepResult.pull`, which leaves out how far the model's parameters reach its errors.

    Returns:
        loss, margin (towards the winner), margin_abs_mean, margin_abs_max, saturation (share of pairs whose sigmoid's slope is below
        SATURATED of what it is at margin 0), implicit_accuracy, winner_drift, loser_drift, winner_coefficient, loser_coefficient,
        share_outside, reference_error, largest_gradient_share (part in the gradient of the tenth of the pairs, at least one, that
        have the largest), human_gradient_share (that of the pairs that people labelled; None where the targets do not say), and
        `buckets`, a list with first, last, count, margin, ratio (winner's coefficient over loser's), error_ratio (loser's root error
        over winner's), cosine of the two residuals, winner_drift and loser_drift.
    """
    pairs = {name: value.double().cpu() for name, value in pairs.items()}
    loss = float(pairs["loss"].mean())  # the trained one: what fills groups up is part of its mean
    if "there" in pairs:
        pairs = {name: value[pairs["there"] > 0] for name, value in pairs.items()}
    target = pairs["target"]
    decided = target != 0.5
    winner = (target < 0.5).long()[:, None]  # the column of the preferred image
    drift = pairs["policy"] - pairs["reference"]
    errors = pairs["policy"].clamp(min=torch.finfo(torch.float32).tiny)  # one of 0 has a finite ratio, two of them 1
    towards = pairs["margin"] * torch.where(target > 0.5, 1.0, -1.0)

    def of(values: Tensor, column: Tensor) -> Tensor:
        return values.gather(1, column)[:, 0]

    columns = {
        "margin": towards, "accuracy": torch.where(towards.isnan(), towards, 0.5 * (1 + towards.sign())),
        "winner_drift": of(drift, winner), "loser_drift": of(drift, 1 - winner),
        "winner_coefficient": of(pairs["coefficients"], winner), "loser_coefficient": of(pairs["coefficients"], 1 - winner),
        "cosine": pairs["cosine"],
        "error_ratio": (of(errors, 1 - winner) / of(errors, winner)).sqrt(),
    }  # fmt: skip
    decided_mean = {name: _mean(values[decided]) for name, values in columns.items()}
    buckets = []
    for bucket in range(BUCKETS):
        inside = decided & (pairs["bucket"] == bucket)
        if inside.any():
            span = {"first": bucket * schedule // BUCKETS, "last": (bucket + 1) * schedule // BUCKETS - 1, "count": int(inside.sum())}
            ratio = _mean((columns["winner_coefficient"] / columns["loser_coefficient"])[inside])
            means = {name: _mean(columns[name][inside]) for name in ("error_ratio", "cosine", "winner_drift", "loser_drift")}
            buckets.append({**span, "margin": _mean(towards[inside]), "ratio": ratio, **means})
    slope = 4 * pairs["margin"].sigmoid() * (-pairs["margin"]).sigmoid()
    part = pairs["pull"] / pairs["pull"].sum()  # NaN where nothing pulls
    labelled = (part * pairs["labelled"]).sum() if "labelled" in pairs else torch.tensor(torch.nan)
    return {
        "loss": loss,
        "margin": decided_mean["margin"],
        "margin_abs_mean": _mean(pairs["margin"].abs()),
        "margin_abs_max": _number(pairs["margin"].abs().max()),
        "saturation": _mean(torch.where(slope.isnan(), slope, (slope < SATURATED).double())),
        "implicit_accuracy": decided_mean["accuracy"],
        "winner_drift": decided_mean["winner_drift"],
        "loser_drift": decided_mean["loser_drift"],
        "winner_coefficient": decided_mean["winner_coefficient"],
        "loser_coefficient": decided_mean["loser_coefficient"],
        "reference_error": _mean(pairs["reference"]),
        "largest_gradient_share": _number(part.topk(math.ceil(len(part) / LARGEST)).values.sum()),
        "human_gradient_share": _number(labelled),
        "share_outside": _mean(((target < 0) | (target > 1)).double()),
        "buckets": buckets,
    }


def _mean(values: Tensor) -> float | None:
    return _number(values.mean())


def _number(value: Tensor) -> float | None:
    """A number, or None for NaN, which JSON has not: the mean of nothing, or of what is not known."""
    return None if value.isnan() else float(value)
