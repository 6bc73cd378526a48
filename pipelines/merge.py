"""Merge human and judge labels into one target and weight per pair, and tell what the labels are worth.

    dedpo merge pairs --method tuned

Reads `PAIRS/labels`, writes `PAIRS/targets/NAME.parquet` and its report `NAME.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError, say, stage
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np


def choose_judge(settings: MergeSettings) -> str | None:
    """The judge's label file: the one named, or the only one that is not human; None only for human_only."""
    from dedpo_diffusion.labels import label_names

    if settings.judge is not None:
        if settings.judge == settings.human:
            raise UserError(f"--judge and --human both name {settings.judge!r}; name two label files")
        return settings.judge
    judges = [name for name in label_names(settings.pairs) if name != settings.human]
    if len(judges) == 1:
        return judges[0]
    if settings.method == "human_only":
        return None
    folder = settings.pairs / "labels"
    if judges:
        raise UserError(f"{folder} holds several judges ({', '.join(judges)}); name one with --judge")
    raise UserError(f"{folder} holds no judge labels, which method {settings.method} needs; run `dedpo label`, or use --method human_only")


def read_judge(settings: MergeSettings, ids: list[str], judge: str) -> np.ndarray:
    """(N,) labels of the judge; only human_only can do with part of them."""
    from dedpo_diffusion.labels import align, read_labels

    labels = read_labels(settings.pairs, judge)
    return align(labels, ids, folder=settings.pairs, name=judge, complete=settings.method != "human_only")


def read_human(settings: MergeSettings, ids: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """(N,) human labels, NaN where there is none, and (N,) probability of being labelled, None for labels taken at random.

    Naive merging can do without the usual file, and has no use for propensities.
    """
    import numpy as np

    from dedpo_diffusion.labels import align, label_names, read_labels

    if settings.method == "naive" and settings.human == "human" and "human" not in label_names(settings.pairs):
        return np.full(len(ids), np.nan), None
    labels = read_labels(settings.pairs, settings.human)
    human = align(labels, ids, folder=settings.pairs, name=settings.human)
    if settings.method == "naive" or "propensity" not in labels.extra:
        return human, None
    known = dict(zip(labels.pair_id, labels.extra["propensity"], strict=True))
    return human, np.array([known.get(pair_id, 1.0) for pair_id in ids])  # an unlabelled pair's own counts for nothing


def _label_files(settings: MergeSettings, judge: str | None) -> dict[str, Any]:
    """Names and digests of the label files that were merged."""
    from dedpo_diffusion.files import file_digest

    paths = {role: settings.pairs / "labels" / f"{name}.parquet" for role, name in (("human", settings.human), ("judge", judge)) if name}
    paths = {role: path for role, path in paths.items() if path.is_file()}
    return {role: {"file": f"labels/{path.name}", "sha256": file_digest(path)} for role, path in paths.items()}


def _number(entry: Any, digits: int = 3) -> str:
    """A number, or a value with its interval, for the table."""
    if not isinstance(entry, dict):
        return "-" if entry is None else f"{entry:.{digits}f}" if isinstance(entry, float) else str(entry)
    interval = "" if entry.get("ci") is None else f"  ({entry['ci'][0]:.{digits}f} to {entry['ci'][1]:.{digits}f})"
    return _number(entry["value"], digits) + interval


def print_report(report: dict[str, Any], title: str) -> None:
    """The report as a table, then its sentences."""
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
        "overshoot": ("overshoot", 2),
        "targets outside [0, 1]": ("share_outside", 3),
        "effective human labels": ("effective_human_labels", 0),
        "  at power 1, as published": ("effective_human_labels_power_1", 0),
    }
    for words, (key, digits) in lines.items():
        table.add_row(words, _number(report[key], digits))
    Console().print(table)
    for sentence in report["sentences"]:
        say(sentence)


def run(settings: MergeSettings) -> Path:
    """Merge human and judge labels into one target and weight per pair."""
    from dedpo_diffusion.debias import merge_labels
    from dedpo_diffusion.labels import write_targets
    from dedpo_diffusion.pairs import PairReader
    from dedpo_diffusion.records import Targets

    ids = PairReader(settings.pairs).ids()
    judge = choose_judge(settings)
    human, propensity = read_human(settings, ids)
    synthetic = None if judge is None else read_judge(settings, ids, judge)
    if propensity is not None:
        say(f"{settings.human}: pairs were not labelled at random; the stored propensities make up for it")
    try:
        merged = merge_labels(
            human, synthetic, method=settings.method, power=settings.power, propensity=propensity, max_overshoot=settings.max_overshoot
        )
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({', '.join(filter(None, (settings.human, judge)))}): {error}") from error
    name = settings.name or settings.method
    report = {"name": name, "judge": judge, "human": settings.human, "label_files": _label_files(settings, judge)}
    report |= {"propensities": propensity is not None, **merged.report}
    if propensity is not None and judge is not None:
        report["sentences"] = [*report["sentences"], "Agreement and bias are those on the labelled pairs, which were not drawn at random."]
    path = write_targets(settings.pairs, name, Targets(ids, merged.target, merged.weight), report)
    print_report(report, f"targets {name}: {settings.human} and {judge or 'no judge'}")
    say(f"wrote {path} and {path.with_suffix('.json').name}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(MergeSettings, run, argv, prog="dedpo merge", positional=("pairs",))


if __name__ == "__main__":
    raise SystemExit(main())
