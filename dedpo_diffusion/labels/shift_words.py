"""What `dedpo merge` says of labels of another population: the density ratio in words, and when not to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SMALL = 50  # effective labels; fewer are few, however many there are
TOLD_APART = 0.95  # area under the curve from which only few labelled pairs look like target pairs
FAR = 0.25  # standard deviations by which a feature may differ after weighting
BEYOND = 0.05  # share of target pairs that look like no labelled one


def shift_sentences(about: Mapping[str, Any]) -> list[str]:
    """What the ratio is, of `pairs.shift.Shift.about`."""
    auc, gap = about["auc"], about["imbalance"]
    texts = [
        f"The {about['n_labelled']} human labels are of another population than the {about['n_target']} pairs to be trained on. A "
        f"classifier tells the two apart by {len(about['columns'])} features (AUC {auc['value']:.3f}, 95 %: {auc['ci'][0]:.3f} to "
        f"{auc['ci'][1]:.3f}; 0.5 is not at all), and its odds weight the labels.",
        f"Weighted like this, the {about['n_labelled']} labels tell as much as about {about['effective']:.0f} of equal weight. "
        + (
            f"{about['n_clipped']} weights were clipped at {about['bound']:g} times the mean."
            if about["n_clipped"]
            else f"None had to be clipped at {about['bound']:g} times the mean."
        ),
        f"The feature that differs most between the populations differed by {gap['before']:.2f} standard deviations before weighting; "
        f"after it the largest difference is {gap['after']:.2f} ({gap['furthest']}).",
    ]
    if about["left_out"]:
        names = ", ".join(about["left_out"][:5]) + (f" and {len(about['left_out']) - 5} more" if len(about["left_out"]) > 5 else "")
        texts.append(
            f"Generators of one population alone have no part in the weights: {names}. Whether people judge their images alike, "
            "no label tells."
        )
    texts.append("What the features do not show is not made up for, and intervals take the weights as given.")
    return texts


def shift_warnings(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What should make a person doubt the ratio."""
    found = []
    if about["effective"] < max(SMALL, about["n_labelled"] / 10):
        found.append(
            f"Warning: only about {about['effective']:.0f} of the {about['n_labelled']} labels' worth is left after weighting, so a few "
            "pairs decide; ask people about some of the pairs to be trained on."
        )
    if about["auc"]["value"] > TOLD_APART:
        found.append(
            f"Warning: labelled and target pairs hardly overlap (AUC {about['auc']['value']:.3f}); what the labels say of the target pairs "
            "rests on the few labelled ones that look like them."
        )
    if about["beyond"] > BEYOND:
        found.append(
            f"Warning: {about['beyond']:.0%} of the target pairs look less like the labelled ones than any of these does; for them the "
            "labels are an extrapolation."
        )
    if about["imbalance"]["after"] > FAR:
        found.append(
            f"Warning: after weighting, {about['imbalance']['furthest']} still differs by {about['imbalance']['after']:.2f} standard "
            "deviations between the populations; the weights make up for a part of the difference only."
        )
    return [{"kind": "population", "text": text} for text in found]


def about_populations(warnings: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Warnings of a merge without those that compare labelled pairs with the others as if of one population, and with those
    of the ratio."""
    return [*(dict(entry) for entry in warnings if entry["kind"] not in ("not_at_random", "seen")), *shift_warnings(about)]


def carried_sentences(carried: Mapping[str, Any] | None) -> list[str]:
    """How the correction came onto pairs whose images are not the labelled ones; nothing where none did."""
    if carried is None:
        return []
    count = len(carried["directions"])
    told = "" if carried["bias"] is None else f", {carried['bias']:.2g} where chance alone makes {carried['noise']:.2g}"
    texts = [
        f"The labelled images are not trained on, so what people said beyond the judge was carried over to the target pairs along {count} "
        f"direction{'s' * (count > 1)} (the judge's squared systematic error there{told})."
    ]
    if carried["left_out"]:
        texts.append(f"Too few effective labels for {len(carried['left_out'])} more: {', '.join(carried['left_out'])}.")
    return texts


def unused_sentences(count: int) -> list[str]:
    """Pairs of the labelled population that nobody labelled."""
    if not count:
        return []
    return [f"{count} pairs have weight 0: those that were drawn for people and have no label, or that a fold leaves out."]


def target_report(report: Mapping[str, Any], target: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """The report of a merge of two datasets' pairs with what it says of targets told of those that are trained on, (N,) each."""
    from dedpo_diffusion.debias.report import sentences

    offset = np.abs(target - 0.5)
    found = dict(report) | {"overshoot": None, "labelled_weight": 0.0, "correction": None, "capped_share": None}
    found |= {"share_outside": float((offset > 0.5 + 1e-9).mean()), "max_abs_offset": float(offset[weight > 0].max(initial=0.0))}
    found["mean_abs_offset"] = float(weight @ offset / weight.sum()) if weight.any() else 0.0
    return found | {"sentences": sentences(found)}
