"""Hold judges' labels against people's and show where they err: a table, sentences, and for each judge a JSON and a picture.

No stage: `dedpo label` and `dedpo calibrate` call `summarise` when they are done. Writes `PAIRS/labels/NAME.json` and
`NAME.png` beside the label file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import say, track

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.core.records import Labels, Pair
    from dedpo_diffusion.pairs.dataset import PairReader

LEAST = 10  # pairs with both labels; fewer say nothing
VALUES = (2, 50)  # different values of a source column that pairs are split by
PER_VALUE = 10  # pairs for each of them, on average
KEPT = ("pairs_per_second", "waiting_share", "prompt_tokens", "answer_tokens", "cost")  # told once, by the run that made the labels
WAITING = 32  # pairs in memory at once


def summarise(
    pairs: Path,
    names: Sequence[str],
    *,
    human: str,
    seed: int = 0,
    resamples: int = 1000,
    most: int = 2048,
    extra: dict[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Diagnose judges on the pairs that people labelled.

    Args:
        pairs: the pair dataset.
        names: the judges' label files.
        human: name of the human label file.
        seed: of the draw of pairs and the bootstrap.
        resamples: of the bootstrap.
        most: pairs looked at; of more labelled ones, so many are drawn at random, the same for every judge.
        extra: further entries of each judge's report. What it cost to make the labels is kept from an older report on labels
            of the same version.

    Returns:
        Each judge's report (`diagnosis.diagnose`), with `name`, `judge_version`, `validity` (its mean), `human` (file and its
        sha256), `pairs` (counts: all, labelled by people, looked at, of these without the judge's answer; and the seed of the
        draw), `propensities` (whether people labelled with unequal probabilities) and what is in `extra`. Empty where fewer
        than 10 pairs are labelled; a judge that shares fewer with people is left out, and its older JSON and picture removed.

    Raises:
        UserError: a label file or an image that cannot be read.
    """
    import numpy as np

    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.labels.files import align, label_names, read_labels
    from dedpo_diffusion.labels.judge_diagnosis import diagnose
    from dedpo_diffusion.pairs.dataset import PairReader

    path, names = pairs / "labels" / f"{human}.parquet", [name for name in names if name != human]
    people = read_labels(pairs, human) if human in label_names(pairs) else None
    labelled = 0 if people is None else len(people.pair_id)
    if people is None or labelled < LEAST:
        say(f"no summary: {path} holds {labelled} labels, and {LEAST} are needed to see where judges err; run `dedpo vote {pairs}`")
        _remove(pairs, names)
        return {}
    reader = PairReader(pairs)
    ids = reader.ids()
    z = align(people, ids, folder=pairs, name=human)
    rows = np.flatnonzero(~np.isnan(z))
    if len(rows) > most:
        say(f"{len(rows)} pairs are labelled; judges are compared with people on {most} of them, drawn at random (seed {seed})")
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    judges = {name: judge_answers(read_labels(pairs, name), ids, folder=pairs, name=name) for name in names}
    answered = {name: int((~np.isnan(judge.label_0[rows])).sum()) for name, judge in judges.items()}
    for name, shared in answered.items():
        if shared < LEAST:
            say(f"no summary of {name}: it shares {shared} pairs with {human}, and {LEAST} are needed; label more pairs")
            judges.pop(name)
            _remove(pairs, [name])
    if not judges:
        return {}
    seen = _look(reader, rows)
    reports = {}
    for name, judge in judges.items():
        consistent = None if judge.consistent is None else [judge.consistent[row] for row in rows]
        found = diagnose(
            z[rows], judge.label_0[rows], scores=judge.scores[rows], prompts=seen.prompts, statistics=seen.statistics,
            groups=seen.groups, order_consistent=consistent, resamples=resamples, seed=seed,
        )  # fmt: skip
        if "propensity" in people.extra:
            found["sentences"].append("All figures are those on the labelled pairs, which were not drawn at random; they are not weighted.")
        counts = {"all": len(ids), "labelled": labelled, "looked_at": len(rows), "unanswered": len(rows) - answered[name], "seed": seed}
        about: dict[str, Any] = {"name": name, "judge_version": judge.version, "validity": judge.validity, "pairs": counts}
        about |= {"human": {"file": f"labels/{path.name}", "sha256": file_digest(path)}, "propensities": "propensity" in people.extra}
        reports[name] = about | found | _kept(pairs, name, judge.version) | (extra or {}).get(name, {})
    _write(pairs, human, reports)
    _print(human, reports)
    return reports


# ---- what the judges said


@dataclass(frozen=True)
class Judge:
    """One judge's answers to N pairs: `label_0` (N,) and raw `scores` (N, 2), NaN where there is none; None for what it lacks."""

    label_0: np.ndarray
    scores: np.ndarray
    consistent: list[bool | None] | None
    version: str | None
    validity: float | None


def judge_answers(labels: Labels, ids: list[str], *, folder: Path, name: str) -> Judge:
    """A judge's answers in the order of the pairs.

    Args:
        labels: read from `folder/labels/<name>.parquet`.
        ids: the N pair_ids of the dataset.
        folder, name: for messages.

    Raises:
        UserError: a label of an unknown pair.
    """
    import numpy as np

    from dedpo_diffusion.labels.files import align

    label_0 = align(labels, ids, folder=folder, name=name)
    place = {pair_id: row for row, pair_id in enumerate(labels.pair_id)}
    wanted = {key: labels.extra[key] for key in ("score_0", "score_1", "order_consistent") if key in labels.extra}
    column = {key: [values[place[pair_id]] if pair_id in place else None for pair_id in ids] for key, values in wanted.items()}
    nothing = [None] * len(ids)
    scores = np.array([column.get(side, nothing) for side in ("score_0", "score_1")], dtype=np.float64).T
    versions = sorted({str(version) for version in labels.extra.get("judge_version", []) if version is not None})
    validity = [value for value in labels.extra.get("validity", []) if value is not None]
    return Judge(
        label_0, scores, column.get("order_consistent"), ", ".join(versions) or None, float(np.mean(validity)) if validity else None
    )


# ---- older reports


def _remove(pairs: Path, names: Sequence[str]) -> None:
    """An older report would stand for labels that it does not know."""
    for name in names:
        for suffix in (".json", ".png"):
            (pairs / "labels" / f"{name}{suffix}").unlink(missing_ok=True)


def _kept(pairs: Path, name: str, version: str | None) -> dict[str, Any]:
    """What making these labels took, as an older report on the same version tells it."""
    path = pairs / "labels" / f"{name}.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # one that is no JSON is about to be replaced
        return {}
    same = isinstance(old, dict) and version is not None and old.get("judge_version") == version
    return {key: old[key] for key in KEPT if key in old} if same else {}


# ---- what is to be seen


@dataclass(frozen=True)
class _Seen:
    """Of n pairs: prompts, image statistics (n, 2) each, and the source columns that split them."""

    prompts: list[str]
    statistics: dict[str, np.ndarray]
    groups: dict[str, list[str]]


def _look(reader: PairReader, rows: np.ndarray) -> _Seen:
    """Read these pairs, decode their images in threads and take their statistics."""
    import numpy as np

    prompts, sources, both = [], [], []
    for prompt, source, found in track(_looks(reader, rows.tolist()), "looking at labelled pairs", len(rows)):
        prompts.append(prompt)
        sources.append(source)
        both.append(found)
    statistics = {key: np.array([[one[key], other[key]] for one, other in both]) for key in both[0][0]}
    columns = {key: ["none" if source.get(key) is None else str(source[key]) for source in sources] for key in sources[0]}
    most = min(VALUES[1], len(rows) // PER_VALUE)
    groups = {key: values for key, values in columns.items() if VALUES[0] <= len(set(values)) <= most}
    return _Seen(prompts, statistics, groups)


def _looks(reader: PairReader, rows: list[int]) -> Iterator[tuple[str, dict[str, Any], list[dict[str, float]]]]:
    import os

    from dedpo_diffusion.core.prefetch import prefetch
    from dedpo_diffusion.labels.image_statistics import image_statistics
    from dedpo_diffusion.pairs.decoding import decode_image

    def look(item: tuple[int, Pair]) -> list[dict[str, float]]:
        row, pair = item
        sides = {side: getattr(pair, side) for side in ("image_0", "image_1")}
        return [image_statistics(decode_image(data, f"{reader.location(row)} {side}")) for side, data in sides.items()]

    for (_, pair), found in prefetch(((row, reader.pair(row)) for row in rows), look, workers=os.cpu_count() or 1, depth=WAITING):
        yield pair.prompt, pair.source, found


# ---- what is told


def _write(pairs: Path, human: str, reports: dict[str, dict[str, Any]]) -> None:
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.labels.judge_figure import draw

    for name, report in reports.items():
        path = pairs / "labels" / f"{name}.json"
        write_json(path, report)
        draw(report, path.with_suffix(".png"), f"{name} against {human}")


def stat_words(stat: dict[str, Any], form: str) -> str:
    """A statistic for a table, with its interval if it has one."""
    if stat["value"] is None:
        return "-"
    ci = stat.get("ci")
    return format(stat["value"], form) + ("" if ci is None else f" ({ci[0]:{form}} to {ci[1]:{form}})")


def _lean(report: dict[str, Any]) -> str:
    from dedpo_diffusion.labels.judge_diagnosis import lean_phrase

    named = [lean for lean in report["leans"] if lean["named"]]
    return f"{lean_phrase(named[0]).split(' (')[0]}, by {abs(named[0]['value']):.2f}" if named else "-"


def _print(human: str, reports: dict[str, dict[str, Any]]) -> None:
    """One table of all judges, then what is to be said of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("95 % intervals", *reports, title=f"judges against {human}")
    table.add_row("pairs", *(str(report["n"]) for report in reports.values()))
    lines = {
        "agreement": ("agreement", ".1%"),
        "AUC": ("auc", ".3f"),
        "log loss": ("log_loss", ".3f"),
        "calibration error": ("calibration_error", ".3f"),
        "same in both orders": ("order_consistency", ".1%"),
    }
    for words, (key, form) in lines.items():
        table.add_row(words, *(stat_words(report[key], form) for report in reports.values()))
    table.add_row("leans most to", *map(_lean, reports.values()))
    Console().print(table)
    for name, report in reports.items():
        unanswered = report["pairs"]["unanswered"]
        say(f"{name} (labels/{name}.json, {name}.png):" + (f" no answer to {unanswered} of the pairs" if unanswered else ""))
        for sentence in report["sentences"]:
            say(f"  {sentence}")
