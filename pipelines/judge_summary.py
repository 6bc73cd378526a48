"""Hold judges' labels against people's and show where they err: a table, sentences, and for each judge a JSON and a picture.

No stage: `dedpo label` and `dedpo calibrate` call `summarise` when they are done. Writes `PAIRS/labels/NAME.json` and
`NAME.png` beside the label file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import say, track

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.pairs import PairReader
    from dedpo_diffusion.records import Pair

LEAST = 10  # pairs with both labels; fewer say nothing
VALUES = (2, 50)  # different values of a source column that pairs are split by
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
        extra: further entries of each judge's report.

    Returns:
        Each judge's report (`diagnosis.diagnose`), with `name`, `judge_version`, `validity` (its mean), `human` (file and its
        sha256), `pairs` (counts: all, labelled by people, looked at, of these without the judge's answer; and the seed of the
        draw), `propensities` (whether people labelled with unequal probabilities) and what is in `extra`. Empty where fewer
        than 10 pairs are labelled; a judge that shares fewer with people is left out.

    Raises:
        UserError: a label file or an image that cannot be read.
    """
    import numpy as np

    from dedpo_diffusion.diagnosis import diagnose
    from dedpo_diffusion.labels import align, label_names, read_labels
    from dedpo_diffusion.pairs import PairReader

    path = pairs / "labels" / f"{human}.parquet"
    people = read_labels(pairs, human) if human in label_names(pairs) else None
    labelled = 0 if people is None else len(people.pair_id)
    if people is None or labelled < LEAST:
        say(f"no summary: {path} holds {labelled} labels, and {LEAST} are needed to see where judges err; run `dedpo vote {pairs}`")
        return {}
    reader = PairReader(pairs)
    ids = reader.ids()
    z = align(people, ids, folder=pairs, name=human)
    rows = np.flatnonzero(~np.isnan(z))
    if len(rows) > most:
        say(f"{len(rows)} pairs are labelled; judges are compared with people on {most} of them, drawn at random (seed {seed})")
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    judges = {name: _read_judge(pairs, name, ids) for name in names if name != human}
    answered = {name: int((~np.isnan(judge.label_0[rows])).sum()) for name, judge in judges.items()}
    for name, shared in answered.items():
        if shared < LEAST:
            say(f"no summary of {name}: it shares {shared} pairs with {human}, and {LEAST} are needed; label more pairs")
            judges.pop(name)
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
            found["sentences"].append("All figures are those on the labelled pairs, which were not drawn at random.")
        counts = {"all": len(ids), "labelled": labelled, "looked_at": len(rows), "unanswered": len(rows) - answered[name], "seed": seed}
        about = {"name": name, "judge_version": judge.version, "validity": judge.validity, "pairs": counts}
        about |= {"human": {"file": f"labels/{path.name}", "sha256": _digest(path)}, "propensities": "propensity" in people.extra}
        reports[name] = about | found | (extra or {}).get(name, {})
    _write(pairs, human, reports)
    _print(human, reports)
    return reports


def _digest(path: Path) -> str:
    from dedpo_diffusion.files import file_digest

    return file_digest(path)


# ---- what the judges said


@dataclass(frozen=True)
class _Judge:
    """One judge's answers to N pairs: `label_0` (N,) and `scores` (N, 2), NaN where there is none."""

    label_0: np.ndarray
    scores: np.ndarray
    consistent: list[bool | None] | None
    version: str | None
    validity: float | None


def _read_judge(pairs: Path, name: str, ids: list[str]) -> _Judge:
    import numpy as np

    from dedpo_diffusion.labels import align, read_labels

    labels = read_labels(pairs, name)
    label_0 = align(labels, ids, folder=pairs, name=name)
    place = {pair_id: row for row, pair_id in enumerate(labels.pair_id)}
    column = {key: [values[place[pair_id]] if pair_id in place else None for pair_id in ids] for key, values in labels.extra.items()}
    nothing = [None] * len(ids)
    scores = np.array([column.get(side, nothing) for side in ("score_0", "score_1")], dtype=np.float64).T
    versions = sorted({str(version) for version in labels.extra.get("judge_version", []) if version is not None})
    validity = [value for value in labels.extra.get("validity", []) if value is not None]
    return _Judge(
        label_0, scores, column.get("order_consistent"), ", ".join(versions) or None, float(np.mean(validity)) if validity else None
    )


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
    groups = {key: values for key, values in columns.items() if VALUES[0] <= len(set(values)) <= VALUES[1]}
    return _Seen(prompts, statistics, groups)


def _looks(reader: PairReader, rows: list[int]) -> Iterator[tuple[str, dict[str, Any], list[dict[str, float]]]]:
    import os

    from dedpo_diffusion.ahead import ahead
    from dedpo_diffusion.decoding import decode_image
    from dedpo_diffusion.diagnosis import image_statistics

    def look(item: tuple[int, Pair]) -> list[dict[str, float]]:
        row, pair = item
        sides = {side: getattr(pair, side) for side in ("image_0", "image_1")}
        return [image_statistics(decode_image(data, f"{reader.location(row)} {side}")) for side, data in sides.items()]

    for (_, pair), found in ahead(((row, reader.pair(row)) for row in rows), look, workers=os.cpu_count() or 1, depth=WAITING):
        yield pair.prompt, pair.source, found


# ---- what is told


def _write(pairs: Path, human: str, reports: dict[str, dict[str, Any]]) -> None:
    from dedpo_diffusion.evaluation.judge_figure import draw
    from dedpo_diffusion.files import write_json

    for name, report in reports.items():
        path = pairs / "labels" / f"{name}.json"
        write_json(path, report)
        draw(report, path.with_suffix(".png"), f"{name} against {human}")


def _stat(stat: dict[str, Any], form: str) -> str:
    if stat["value"] is None:
        return "-"
    return format(stat["value"], form) + ("" if stat["ci"] is None else f" ({stat['ci'][0]:{form}} to {stat['ci'][1]:{form}})")


def _lean(report: dict[str, Any]) -> str:
    from dedpo_diffusion.diagnosis import lean_phrase

    named = [lean for lean in report["leans"] if lean["named"]]
    return f"{lean_phrase(named[0]).split(' (')[0]}, by {abs(named[0]['value']):.2f}" if named else "-"


def _print(human: str, reports: dict[str, dict[str, Any]]) -> None:
    """One table of all judges, then what is to be said of each."""
    from rich.console import Console
    from rich.table import Table

    if not reports:
        return
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
        table.add_row(words, *(_stat(report[key], form) for report in reports.values()))
    table.add_row("leans most to", *map(_lean, reports.values()))
    Console().print(table)
    for name, report in reports.items():
        unanswered = report["pairs"]["unanswered"]
        say(f"{name} (labels/{name}.json, {name}.png):" + (f" no answer to {unanswered} of the pairs" if unanswered else ""))
        for sentence in report["sentences"]:
            say(f"  {sentence}")
