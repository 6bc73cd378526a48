"""What `dedpo merge` tells: tables and sentences, warnings, the curves of what more would buy, the picture, and the plan.

No stage: `merge` calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.defaults import POWERED
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.debias import Merged
    from dedpo_diffusion.labels.answers import Answers
    from dedpo_diffusion.labels.plan import Pool


# ---- the report beyond the estimator's own


def complete(settings: MergeSettings, answers: Answers, merged: Merged) -> dict[str, Any]:
    """`curve`, what more labels or a better judge would buy (None where there is nothing to tell), and `warnings`."""
    return {"curve": curves(settings, known_of(settings, merged)), "warnings": find_warnings(settings, answers, merged)}


def known_of(settings: MergeSettings, merged: Merged) -> Pool | None:
    """What the labels say of the pool, for curve and plan; None where they say nothing."""
    from dedpo_diffusion.labels.plan import describe

    if settings.method in ("human_only", "naive", "adapted") or merged.basis is None:
        return None
    return describe(merged.basis, settings.seed)


def curves(settings: MergeSettings, pool: Pool | None) -> dict[str, Any] | None:
    """Worth against the number of human labels, and against the agreement of a judge."""
    from dedpo_diffusion.labels.plan import judge_curve, worth_curve

    if pool is None:
        return None
    power = pool.fixed if pool.free is None else None
    half = settings.rule == "half"
    judge = judge_curve(pool.labels, pool.pairs, power=power, max_overshoot=pool.max_overshoot, half=half)
    return {"human_labels": worth_curve(pool), "judge": judge}


def find_warnings(settings: MergeSettings, answers: Answers, merged: Merged) -> list[dict[str, Any]]:
    """Everything in labels and targets that a person should look at."""
    import numpy as np

    from dedpo_diffusion.labels import warnings as look

    labelled = ~np.isnan(answers.human)
    found: list[dict[str, Any]] = []
    if settings.method != "naive":
        found += not_at_random(answers, labelled, merged, pairs=settings.pairs)
        found += look.few_labels_warnings(int(labelled.sum()), judged=settings.method != "human_only" and not labelled.all())
    if settings.method in POWERED and answers.judges is not None:
        seen = [look.seen_human_labels(answers.human, answers.judges[:, k], name=name) for k, name in enumerate(answers.names)]
        found += [entry for entry in seen if entry is not None]
    return found + look.overshoot_warnings(merged.target, merged.weight, merged.report["overshoot"])


def not_at_random(answers: Answers, labelled: np.ndarray, merged: Merged, *, pairs: Path) -> list[dict[str, Any]]:
    """Warnings about labels that are merged as if taken at random, or about propensities.

    Judges that were calibrated or taught say nothing of it: labelled pairs have their labels from other maps than the others.
    """
    import numpy as np

    from dedpo_diffusion.labels.files import CALIBRATED, label_origin
    from dedpo_diffusion.labels.warnings import unbalanced, unlike, unlike_warnings

    if not 0 < labelled.sum() < len(labelled):
        return []
    columns: dict[str, Any] = {}
    for k, name in enumerate([] if answers.judges is None else answers.names):
        assert answers.judges is not None
        if label_origin(pairs, name) == CALIBRATED:
            continue
        given = answers.judges[:, k]
        columns |= {f"the label of {name}": given, f"the confidence of {name}": np.abs(given - 0.5)}
    columns |= answers.sources
    if answers.propensity is not None and merged.inverse is not None:
        remedy = "these propensities do not make up for it, and the merge may be biased; ask people about pairs drawn at random"
        return unlike_warnings(unbalanced(labelled, merged.inverse, columns), remedy=remedy)
    return unlike_warnings(unlike(labelled, columns), remedy="try --propensities estimate")


def further_sentences(settings: MergeSettings, answers: Answers, report: dict[str, Any], left_out: int) -> list[str]:
    """What the estimator's own sentences cannot know."""
    texts = []
    model = report["propensity_model"]
    if model is not None and model["from"] == "estimate":
        texts.append(_model_sentence(model))
    elif model is not None and model["from"] == "stored" and answers.judges is not None:
        texts.append("Agreement and bias are those of all pairs, estimated with the stored propensities: labels were not drawn at random.")
    if report["worth_reference"] != "at_random" and settings.method in ("tuned", "dedpo"):
        texts.append("What further labels would add is not estimated: it depends on how they are taken.")
    if answers.judges is not None and settings.method != "human_only":
        corrected = settings.method != "naive" and answers.propensity is None
        for k, name in enumerate(answers.names):
            who = "The judge" if len(answers.names) == 1 else f"Judge {name}"
            texts += silence_sentences(answers.human, answers.judges[:, k], who, corrected=corrected)
    if left_out:
        texts.append(f"{left_out} pairs of this fold have weight 0: a policy trained on these targets never sees them.")
    return texts


def _model_sentence(model: dict[str, Any]) -> str:
    auc = model["auc"]
    low, high = auc["ci"]
    clipped = f"; {model['n_clipped']} were clipped" if model["n_clipped"] else ""
    told = "tell them apart" if low > 0.5 else "tell them apart no better than chance"
    missing = f" ({', '.join(model['left_out'])} left out: too many values)" if model["left_out"] else ""
    return (
        f"The probability of a human label was estimated from {len(model['columns'])} columns{missing}, which {told} "
        f"(AUC {auc['value']:.3f}, 95 %: {low:.3f} to {high:.3f}){clipped}; what is not in the columns is not made up for."
    )


def silence_sentences(human: np.ndarray, judge: np.ndarray, who: str, *, corrected: bool) -> list[str]:
    """Where a judge has no answer. Its ties are harmless unless they depend on whether a person was asked."""
    import numpy as np

    silent, labelled = np.isnan(judge), ~np.isnan(human)
    if not silent.any():
        return []
    texts = [f"{who} has no answer for {silent.sum()} of {len(silent)} pairs and counts as undecided there (0.5)."]
    here, there = silent[labelled], silent[~labelled]
    if corrected and len(here) and len(there):
        from scipy.stats import fisher_exact

        counts = [[int(part.sum()), int((~part).sum())] for part in (here, there)]
        if fisher_exact(counts).pvalue < 0.001:
            texts.append(
                f"Warning: {who[0].lower() + who[1:]} has no answer for {here.sum()} of {len(here)} pairs with a human label, but for "
                f"{there.sum()} of {len(there)} others; its errors are then corrected by the wrong amount: label both kinds alike."
            )
    return texts


# ---- on the console


def _number(entry: Any, digits: int = 3) -> str:
    """A number, or a value with its interval, for the table."""
    if not isinstance(entry, dict):
        return "-" if entry is None else f"{entry:.{digits}f}" if isinstance(entry, float) else str(entry)
    interval = "" if entry.get("ci") is None else f"  ({entry['ci'][0]:.{digits}f} to {entry['ci'][1]:.{digits}f})"
    return _number(entry["value"], digits) + interval


def print_report(report: dict[str, Any], title: str) -> None:
    """The report as tables, then its sentences and warnings."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value (95 % interval)", title=title)
    lines = {
        "pairs": ("n", 0),
        "human labels": ("n_human", 0),
        "ties among them": ("n_ties", 0),
        "agreement of the judge": ("agreement", 3),
        "bias of the judge": ("judge_bias", 3),
        "power": ("power", 3),
        "  standard error of the fit": ("power_se", 3),
        "overshoot": ("overshoot", 2),
        "targets outside [0, 1]": ("share_outside", 3),
        "distance of targets from 0.5": ("mean_abs_offset", 3),
        "effective human labels": ("effective_human_labels", 0),
        "  at power 1, as published": ("effective_human_labels_power_1", 0),
    }
    if report["method"] not in POWERED:
        del lines["  at power 1, as published"]
    for words, (key, digits) in lines.items():
        table.add_row(words, _number(report[key], digits))
    if report["run"] is not None:
        table.add_row("  in this run", _number(report["run"]["effective_human_labels"], 0))
    if report["correction"] is not None:
        table.add_row("correction (0: the human label, 1: DeDPO)", _number(report["correction"]["c"]))
    Console().print(table)
    if len(report["judges"] or []) > 1:
        _print_judges(report["judges"])
    for sentence in report["sentences"]:
        say(sentence)
    for warning in report["warnings"]:
        say(warning["text"])


def _print_judges(judges: list[dict[str, Any]]) -> None:
    """A table with a line for each judge; the report holds the intervals that are left out."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("judge", "agreement", "bias", "power")
    for entry in judges:
        cells = [_number(entry[key]["value"], digits) for key, digits in (("agreement", 2), ("judge_bias", 3))]
        table.add_row(escape(str(entry["name"])), *cells, _number(entry["power"], 2))
    Console().print(table)


def draw_report(settings: MergeSettings, report: dict[str, Any], path: Path) -> None:
    """Draw NAME.png beside the targets; an older one, which would stand for other labels, is removed where nothing is drawn."""
    picture = path.with_suffix(".png")
    if report["curve"] is None or not settings.picture:
        picture.unlink(missing_ok=True)
        return
    from dedpo_diffusion.labels.worth_figure import draw

    draw(report, picture, f"targets {report['name']}: what the labels are worth")
    say(f"drew {picture.name}")


# ---- the plan


def write_plan(settings: MergeSettings, name: str, answers: Answers, merged: Merged) -> Path:
    """Print how many more labels make the labels worth what is wanted, and write NAME.plan.json beside the targets.

    Raises:
        UserError: a worth that makes no sense, or labels that say nothing of it.
    """
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.labels.files import targets_path
    from dedpo_diffusion.labels.plan import plan

    wanted = settings.plan
    if wanted is None or not wanted > 0:
        raise UserError(f"--plan is {wanted}; give the number of human labels that the labels shall be worth")
    known = known_of(settings, merged)
    if known is None and merged.basis is not None and merged.basis.uneven:
        raise UserError("--plan counts further labels as taken at random, and these have unequal propensities; give --propensities none")
    if known is None:
        raise UserError(
            "--plan needs a judge, a method that uses it (tuned or dedpo) and at least two human labels that are not all ties; "
            "label some pairs first, a hundred at random are a start"
        )
    found = {"name": name, "judges": answers.names, "human": settings.human} | plan(known, wanted)
    found["warnings"] = find_warnings(settings, answers, merged)
    for sentence in [*found["sentences"], *(warning["text"] for warning in found["warnings"])]:
        say(sentence)
    path = targets_path(settings.pairs, name, ".plan.json")
    write_json(path, found)
    say(f"wrote {path}; no targets were written")
    return path
