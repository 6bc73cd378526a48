"""What people taught a judge, in sentences."""

from __future__ import annotations

from typing import Any

from dedpo_diffusion.labels.image_statistics import WORDS

FARTHEST = 20.0  # a ratio whose interval reaches farther says that the judge hardly heeds this, not how many times


def adapt_sentences(report: dict[str, Any]) -> list[str]:
    """What an `adapt` report means: what it gained, what people mind, which features were taken and which not."""
    texts = [f"{name} gives both images of every pair the same score and was left out." for name in report["left_out"]]
    texts += [
        f"{name} agrees with people no more often than a coin and counts for nothing here; `--invert true` turns it the other way round."
        for name in report["contrary"]
    ]
    texts += [_gain_sentence(report)]
    if report["adapted"]:
        texts += [text for entry in report["features"] if (text := _feature_sentence(entry, report["judges"])) is not None]
    texts += [_group_sentence(entry) for entry in report["groups"] if entry["difference"] is not None]
    if report["weighted"]:
        texts.append("All figures are weighted by the stored propensities, as are the fits.")
    return texts


def _range(ci: list[float] | None, form: str) -> str:
    return "" if ci is None else f" (95 %: {ci[0]:{form}} to {ci[1]:{form}})"


def _gain_sentence(report: dict[str, Any]) -> str:
    loss, agree, judge = report["log_loss"], report["agreement"], report["temperature_of"]
    change = f"{loss['difference']['value']:+.3f}{_range(loss['difference']['ci'], '+.3f')}"
    own, before = (agree[key] for key in ("adapt", "temperature"))
    told = ""
    if own["value"] is not None and before["value"] is not None:
        told = f", and agrees with people on {own['value']:.1%}{_range(own['ci'], '.1%')}, where {judge} by itself does on "
        told += f"{before['value']:.1%}{_range(before['ci'], '.1%')}"
    if report["adapted"]:
        return (
            f"Taught by {report['n_human']} answers, and held out from each pair's own, the judge has a log loss of "
            f"{loss['adapt']['value']:.3f}, {change} against {judge} with a temperature{told}."
        )
    return (
        f"What {report['n_human']} answers teach does not help ({change} in cross-validated log loss, standard error "
        f"{report['gain_se']:.3f}), so these are the labels of {judge} with a temperature."
    )


def _who(judges: list[str]) -> tuple[str, str, str]:
    """Subject, and the verbs "does" and "favours" in its number."""
    return (judges[0], "does", "favours") if len(judges) == 1 else ("the judges", "do", "favour")


def _sure(ci: list[float] | None) -> bool:
    return ci is not None and not ci[0] <= 0 <= ci[1]


def _feature_sentence(entry: dict[str, Any], judges: list[str]) -> str | None:
    """Only what these answers tell surely: an interval of the feature's own weight that excludes 0."""
    if entry["group"] == "generators" and _sure(entry["ci"]):
        more = "more" if entry["weight"] > 0 else "less"
        weight = entry["weight"] / entry["spread"]
        return f"People like images of {entry['name']} {more} than {_who(judges)[0]} predicts, by {abs(weight):.2f} in log-odds."
    if entry["group"] != "statistics" or not _sure(entry["ci"]):
        return None
    who, does, favours = _who(judges)
    if not _sure(entry["people_ci"]):
        side = WORDS[entry["name"]][0 if entry["judge"] > 0 else 1]
        return f"{who[0].upper() + who[1:]} {favours} {side}, and people do not." if _sure(entry["judge_ci"]) else None
    side, other = WORDS[entry["name"]] if entry["people"] > 0 else WORDS[entry["name"]][::-1]
    ratio, ci = entry["ratio"], entry["ratio_ci"]
    if not _sure(entry["judge_ci"]) or ci is None or ratio is None or max(abs(end) for end in ci) > FARTHEST:
        return f"People favour {side}, which {who} hardly {'heeds' if len(judges) == 1 else 'heed'}."
    if ratio < 0:
        return f"People favour {side}, and {who} {favours} {other}."
    how = f"{ratio:.1f} times as much as {who} {does}{_range(ci, '.1f')}"
    return f"People favour {side} {how}."


def _group_sentence(entry: dict[str, Any]) -> str:
    taken = "were taken in" if entry["admitted"] else "were not taken in"
    words = {"statistics": "image statistics", "generators": "generators' names"}.get(entry["group"], entry["group"])
    return f"The {words} {taken}: {entry['why']}."
