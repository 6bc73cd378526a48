"""The report of a merge: its numbers, and what they mean in sentences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dedpo_diffusion.core.defaults import POWERED
from dedpo_diffusion.debias.coefficients import WITHOUT_POWER, mix_judges
from dedpo_diffusion.debias.compute import run_report, run_terms
from dedpo_diffusion.debias.estimate import Estimate
from dedpo_diffusion.debias.tuning import assign_folds, choose_powers
from dedpo_diffusion.debias.worth import Basis, agreement, judge_bias, no_worth, worths

HELD_OUT_FOLDS = 5  # by which the worth of many tuned powers is told


def make_report(case: Estimate, basis: Basis, seed: int) -> dict[str, Any]:
    """Every number of the report, and its sentences; ready for JSON. `seed` is that of the bootstrap."""
    labelled, naive, fit = ~np.isnan(case.z), case.method in WITHOUT_POWER, case.powers.pooled
    counted = case.weight > 0
    outside = counted & ((case.target < -1e-9) | (case.target > 1 + 1e-9))
    worth = worths(basis, seed)
    report: dict[str, Any] = {
        "method": case.method,
        "n": len(case.z),
        "n_human": int(labelled.sum()),
        "n_ties": int((case.z == 0.5).sum()),
        "clusters": None if case.clusters is None else len(np.unique(case.clusters[labelled])),
        "labelled_share": float(labelled.mean()),
        "agreement": _agreement(case, case.mixed),
        "weighted": case.uneven(),
        "power": None if naive else _mean(case.total),
        "power_raw": None if fit is None else float(fit.raw.sum()),
        "power_se": None if fit is None else _known(fit.total_se),
        "power_cap": None if case.powers.cap is None else float(case.powers.cap.min()),
        "capped_share": _capped_share(case),
        "overshoot": None if naive else float((case.h[labelled] / case.weight[labelled]).max()),
        "mean_abs_offset": float(case.weight @ np.abs(case.target - 0.5) / case.weight.sum()),
        "labelled_weight": float(case.weight[~np.isnan(case.z)].sum() / case.weight.sum()),
        "correction": None if case.correction is None else dataclasses.asdict(case.correction),
        "run": _run(case, seed),
        "share_outside": float(outside.mean()),
        "max_abs_offset": float(np.abs(case.target - 0.5)[counted].max()),
        "judge_bias": _bias(case, case.mixed),
        "effective_human_labels": worth.here,
        "effective_human_labels_power_1": no_worth(worth.here["n_human"]) if np.isnan(case.g).any() else worth.at_one,
        "worth_reference": "same_propensities" if basis.uneven else "at_random",
        "rule": case.rule,
        "folds": case.folds if case.rule == "cross_fitted" else None,
        "judges": [_judge_entry(case, k) for k in range(len(case.names))] if not np.isnan(case.g).all() else [],
    }
    return {**report, "sentences": sentences(report)}


def _run(case: Estimate, seed: int) -> dict[str, Any] | None:
    """What the labels are worth in a run of so many visits, where the run is known."""
    if case.run is None or case.endless is None:
        return None
    terms = run_terms(case.z, case.mixed, case.h, case.endless)
    return run_report(terms, case.scale, case.run, _mean(case.endless), seed, _of(case, ~np.isnan(case.z)))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float:
    """Their mean; equal values to the bit."""
    return float(values[0]) if (values == values[0]).all() else float(values.mean())


def _capped_share(case: Estimate) -> float | None:
    """Share of the pairs whose power is as large as the cap allows, where labels asked for more."""
    made = case.powers
    if made.cap is None or made.free is None or made.back is None:
        return None
    at_cap = (made.cap < 1) & (made.free - made.back > made.cap) & np.isclose(made.table.sum(axis=1), made.cap, rtol=1e-9)
    return float(at_cap[made.cell].mean())


def _both(case: Estimate, g: np.ndarray) -> np.ndarray:
    return ~np.isnan(case.z) & ~np.isnan(g)


def _of(case: Estimate, rows: np.ndarray) -> np.ndarray | None:
    return None if case.clusters is None else case.clusters[rows]


def _agreement(case: Estimate, g: np.ndarray) -> dict[str, Any]:
    """Of all pairs: each labelled one counts for those of its propensity."""
    rows = _both(case, g)
    return agreement(case.z[rows], g[rows], case.h[rows] if case.stated else None, _of(case, rows))


def _bias(case: Estimate, g: np.ndarray) -> dict[str, Any]:
    """Of all pairs, which may have been labelled with propensities of their own."""
    rows = _both(case, g)
    return judge_bias(case.z[rows], g[rows], case.h[rows] if case.stated else None, _of(case, rows))


def make_basis(case: Estimate, seed: int) -> Basis:
    """The labelled pairs by which the worth is told; `seed` is that of the folds.

    Many powers, tuned, look better on the labels that they were fitted to than they are: then each pair is judged by powers
    that were fitted to other pairs. A single power hardly does, and is taken as it is. A judge that is missing counts as
    undecided, as it does where its power is 0.
    """
    rows, made = ~np.isnan(case.z), case.powers
    z, g, h = case.z[rows], case.g[rows], case.h[rows]
    if made.pooled is not None and case.folds == 1 and g.shape[1] > 1:
        of = _of(case, rows)
        fold = assign_folds(np.zeros(len(z), dtype=bool), HELD_OUT_FOLDS, np.random.default_rng((seed, 2)), of)
        options: dict[str, Any] = {"fold": fold, "folds": HELD_OUT_FOLDS, "max_overshoot": case.max_overshoot, "clusters": of}
        made = choose_powers(z, g, h, rule=case.rule, **options)
        mixed, total, at = mix_judges(g, made.table, made.cell), made.totals(), made.cell
    else:
        mixed, total, at = case.mixed[rows], case.total[rows], made.cell[rows]
    even = mixed if g.shape[1] == 1 else g.mean(axis=1)
    if not case.stated:  # shares of folds, which differ by a label, are of no interest
        h = np.full(len(z), len(rows) / max(len(z), 1))
    return Basis(
        z, _undecided(mixed), _undecided(even), h, total, len(rows),
        None if made.free is None else made.free[at], None if made.back is None else made.back[at], case.max_overshoot,
        case.uneven(), _of(case, rows),
    )  # fmt: skip


def _undecided(g: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(g), 0.5, g)


def _judge_entry(case: Estimate, k: int) -> dict[str, Any]:
    g, fit = case.g[:, k], case.powers.pooled
    return {
        "name": case.names[k],
        "agreement": _agreement(case, g),
        "judge_bias": _bias(case, g),
        "power": None if case.method in WITHOUT_POWER else _mean(case.powers.table[:, k][case.powers.cell]),
        "power_raw": None if fit is None else float(fit.raw[k]),
        "power_se": None if fit is None else _known(fit.se[k]),
    }


# ---- sentences


def sentences(report: dict[str, Any]) -> list[str]:
    """What the numbers mean."""
    return [
        *_cluster_sentences(report),
        *_worth_sentences(report),
        *_judge_sentences(report),
        *_power_sentences(report),
        *run_sentences(report),
        *_correction_sentences(report),
        *_target_sentences(report),
    ]


def every_pair_labelled(report: dict[str, Any]) -> bool:
    """Whether people answered every pair and every answer counts alike: then targets are human labels at any power."""
    return report["method"] in POWERED and report["n_human"] == report["n"] and report["worth_reference"] == "at_random"


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _cluster_sentences(report: dict[str, Any]) -> list[str]:
    if report["clusters"] is None:
        return []
    return [
        "Human labels that depend on each other, such as comparisons of one ranking or pairs of one prompt, are counted together: the "
        f"{report['n_human']} come from {report['clusters']} independent ones, and intervals are as wide as that makes them."
    ]


def _worth_sentences(report: dict[str, Any]) -> list[str]:
    n, n_human, worth = report["n"], report["n_human"], report["effective_human_labels"]
    labels = f"{n_human} human and {n - n_human} judge labels"
    if every_pair_labelled(report):
        return ["Every pair has a human label, so the judge adds nothing here."]
    if report["method"] == "naive":
        return [
            f"The {labels} are trained on as if people had given them all: naive merging keeps the judge's bias, "
            "so no number of human labels is equal to it."
        ]
    if report["method"] == "adapted":
        return [f"The {labels} make one prediction of what people would say of each pair; no number of human labels is equal to it."]
    if report["method"] == "human_only":
        return [f"Only the {n_human} human labels are used; {n - n_human} pairs have weight 0.", *_reference_sentences(report)]
    if worth["value"] is None:
        return [f"What these {labels} are worth cannot be estimated: every human label is a tie."]
    interval = f" (95 %: {_count(worth['ci'][0])} to {_count(worth['ci'][1])})" if worth["ci"] else ""
    text = f"These {labels} are worth about {_count(worth['value'])} human labels{interval}."
    published = report["effective_human_labels_power_1"]["value"]
    if report["power"] < 1 and published is not None:
        text += f" At power 1, as published, they would be worth {_count(published)}."
    texts = [text, *_reference_sentences(report)]
    if worth["value"] >= n_human * (1 - 1e-9) or report["power_raw"] is not None:  # a tuned power is below it by chance alone
        return texts
    return [*texts, f"Warning: that is less than the {n_human} human labels alone; give --method tuned."]


def _reference_sentences(report: dict[str, Any]) -> list[str]:
    """Which human labels a worth is counted in, where these labels were not taken at random."""
    if report["worth_reference"] == "at_random":
        return []
    return ["Worth is counted in human labels taken with the same unequal probabilities, not at random."]


def _judge_sentences(report: dict[str, Any]) -> list[str]:
    several = len(report["judges"]) > 1
    texts = []
    for entry in report["judges"]:
        who = f"Judge {entry['name']}" if several else "The judge"
        known, bias = entry["agreement"], entry["judge_bias"]
        if known["value"] is not None:
            low, high = known["ci"]
            of = f"all pairs, estimated from {known['n']} answers" if report["weighted"] else f"{known['n']} pairs"
            texts.append(f"{who} agrees with people on {known['value']:.1%} of {of} (95 %: {low:.1%} to {high:.1%}).")
            if known["value"] < 0.5:
                used = "its power is 0 and its labels are not used" if entry["power"] == 0 else "yet its labels are used"
                about = f"judge {entry['name']}" if several else "the judge"
                remedy = "consider inverting it" if high < 0.5 else "so few answers do not tell it from a coin"
                texts.append(f"Warning: {about} agrees with people less often than a coin would, {used}; {remedy}.")
        if bias["ci"] is not None and not bias["ci"][0] <= 0 <= bias["ci"][1]:
            side = 0 if bias["value"] > 0 else 1
            texts.append(f"{who} leans towards image {side}, by {abs(bias['value']):.3f} on average: does it see both orders of a pair?")
    return texts


def _power_sentences(report: dict[str, Any]) -> list[str]:
    if report["power_raw"] is None or every_pair_labelled(report):
        return []
    error = "" if report["power_se"] is None else f" (standard error {report['power_se']:.2f})"
    several = len(report["judges"]) > 1
    parts = ": " + ", ".join(f"{entry['power']:.2f} of {entry['name']}" for entry in report["judges"]) if several else ""
    texts = [
        f"Power (how much the judge{'s count' if several else ' counts'}: 0 is not at all, 1 as published): {report['power']:.2f} is used"
        f"{parts}; the labels ask for {report['power_raw']:.2f}{error}."
    ]
    if report["rule"] == "half":
        texts.append("That is half of the power which the labels ask for, unless it is capped (rule half).")
    if report["rule"] == "minus_se":
        texts.append("One standard error was taken off the power (rule minus_se).")
    if report["rule"] == "cross_fitted":
        texts.append(f"The power of a pair was fitted to the labels of other pairs ({report['folds']} folds); what is used is their mean.")
    if report["capped_share"]:
        where = "" if report["capped_share"] == 1 else f" in {report['capped_share']:.0%} of the pairs"
        texts.append(f"Warning: the power was capped{where} so that no target is stretched by more than {report['overshoot']:.2f}.")
    elif report["power"] == 0:
        texts.append("The judge's labels are not used: at power 0 this is training on the human labels alone.")
    return texts


def run_sentences(report: dict[str, Any]) -> list[str]:
    """What the labels are worth in a run of finite length, of a report with `power` and `run`; nothing where there is no run."""
    run = report["run"]
    if run is None:
        return []
    here, endless = run["effective_human_labels"], run["endless"]
    words = [f"In a run of {run['visits']:.0f} visits at noise ratio {run['noise_ratio']:.3g}"]
    if run["scale"] < 1:
        words.append(f"a power of {report['power']:.2f} is best; endless training would take {run['endless_power']:.2f}")
    if here["value"] is not None and endless["value"] is not None:
        interval = f" (95 %: {_count(here['ci'][0])} to {_count(here['ci'][1])})" if here["ci"] else ""
        words.append(f"these labels are worth about {_count(here['value'])} human labels{interval}")
        words[-1] += f", in endless training {_count(endless['value'])}"
    return [f"{words[0]}, {'; '.join(words[1:])}."] if len(words) > 1 else []


def _correction_sentences(report: dict[str, Any]) -> list[str]:
    moved = report["correction"]
    if moved is None:
        return []
    texts = []
    if moved["bias"] is not None:
        texts.append(
            f"Along {moved['directions']} direction{'s' * (moved['directions'] > 1)} the judge's systematic error is "
            f"{moved['bias']:.2g}, where chance alone makes {moved['noise']:.2g}: the labels ask for a correction of {moved['wanted']:.2f}."
        )
    place = "labelled pairs keep the human label" if moved["keep"] == 1 else f"an answer moves its pair {moved['keep']:.0%} of the way"
    if moved["c"] > moved["floor"] * moved["keep"]:
        texts.append(f"A correction of {moved['c']:.2f} is used, between imputation ({moved['floor']:.2f}) and DeDPO (1).")
    else:
        texts.append(f"A correction of {moved['c']:.2f} is no more than imputation ({moved['floor']:.2f}): {place}.")
    if moved["capped"]:
        texts.append("Warning: the correction was held back so that no target is stretched beyond the bound of the overshoot.")
    share = f"{report['labelled_weight']:.0%}"
    return [
        *texts,
        f"How sure a prediction is goes into its pair's weight, and every target is 0 or 1: labelled pairs have {share} of the weight.",
    ]


def _target_sentences(report: dict[str, Any]) -> list[str]:
    if report["share_outside"] == 0:
        return []
    furthest = report["max_abs_offset"]
    share = f"{report['share_outside']:.1%} of the training targets lie outside [0, 1], up to {furthest:.2f} from 0.5."
    return [f"{share} That is expected: training takes them as they are."]
