"""Merge human and judge labels into one target and weight per pair, and tell what the labels are worth.

    dedpo merge pairs --method tuned

Reads `PAIRS/labels`, writes `PAIRS/targets/NAME.parquet` and its report `NAME.json`; with --folds K also NAME-fold-0 and so on,
each merged without the pairs of one fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError, say, stage
from dedpo_diffusion.settings import MergeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.debias import Merged


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
    """(N,) labels of the judge, NaN where it has none.

    Raises:
        UserError: pairs without its answer, unless they count as undecided or the method does not need them.
    """
    import numpy as np

    from dedpo_diffusion.labels import align, read_labels

    labels = align(read_labels(settings.pairs, judge), ids, folder=settings.pairs, name=judge)
    missing = np.flatnonzero(np.isnan(labels))
    if missing.size and settings.missing == "error" and settings.method != "human_only":
        raise UserError(
            f"{settings.pairs / 'labels' / judge}.parquet covers {len(ids) - missing.size} of {len(ids)} pairs "
            f"(first missing: {ids[missing[0]]!r}); run `dedpo label` again, or let the judge count as undecided there with --missing tie"
        )
    return labels


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


@dataclass(frozen=True)
class Answers:
    """The labels of N pairs, NaN where there is none: `human` and `judge` (N,), and `propensity` (N,) of a human label."""

    human: np.ndarray
    judge: np.ndarray | None
    propensity: np.ndarray | None

    def part(self, rows: np.ndarray) -> Answers:
        """Those of some pairs."""
        return Answers(*(None if values is None else values[rows] for values in (self.human, self.judge, self.propensity)))


def merge(settings: MergeSettings, answers: Answers, what: str) -> Merged:
    """Merge; a judge without an answer counts as undecided, but for human_only, which does not need it.

    Raises:
        UserError: the labels (`what` names them) cannot be merged.
    """
    import numpy as np

    from dedpo_diffusion.debias import merge_labels

    judge = answers.judge
    if judge is not None and settings.method != "human_only":
        judge = np.where(np.isnan(judge), 0.5, judge)
    options = {"method": settings.method, "power": settings.power, "max_overshoot": settings.max_overshoot}
    try:
        return merge_labels(answers.human, judge, propensity=answers.propensity, **options)
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({what}): {error}") from error


def parts(settings: MergeSettings, prompts: list[str]) -> dict[str, np.ndarray]:
    """The targets to write by their name, each with the pairs (N,) bool that they are merged from.

    Targets of a fold are merged without the fold's pairs. Folds consist of whole prompts, if there are enough of them.
    """
    import numpy as np

    name = settings.name or settings.method
    if settings.folds == 1 or settings.folds < 0:
        raise UserError(f"--folds is {settings.folds}; give at least 2, or 0 for no targets by fold")
    every = {name: np.ones(len(prompts), dtype=bool)}
    if settings.folds == 0:
        return every
    from dedpo_diffusion.calibration import assign_folds

    if len(set(prompts)) < settings.folds:
        say(
            f"there are fewer prompts ({len(set(prompts))}) than folds ({settings.folds}), so pairs of one prompt fall into different folds"
        )
    try:
        fold = assign_folds(prompts, settings.folds, settings.seed)
    except ValueError as error:
        raise UserError(f"--folds {settings.folds}: {error}") from error
    return every | {f"{name}-fold-{k}": fold != k for k in range(settings.folds)}


def further_sentences(settings: MergeSettings, answers: Answers, left_out: int) -> list[str]:
    """What the estimator's own sentences cannot know."""
    texts = []
    if answers.propensity is not None and answers.judge is not None:
        texts.append("Agreement and bias are those on the labelled pairs, which were not drawn at random.")
    if answers.judge is not None and settings.method != "human_only":
        texts += _silence_sentences(answers, corrected=settings.method != "naive" and answers.propensity is None)
    if left_out:
        texts.append(f"{left_out} pairs of this fold have weight 0: a policy trained on these targets never sees them.")
    return texts


def _silence_sentences(answers: Answers, *, corrected: bool) -> list[str]:
    """Where the judge has no answer. Its ties are harmless unless they depend on whether a person was asked."""
    import numpy as np

    silent, labelled = np.isnan(answers.judge), ~np.isnan(answers.human)
    if not silent.any():
        return []
    texts = [f"The judge has no answer for {silent.sum()} of {len(silent)} pairs and counts as undecided there (0.5)."]
    here, there = silent[labelled], silent[~labelled]
    if corrected and len(here) and len(there):
        from scipy.stats import fisher_exact

        counts = [[int(part.sum()), int((~part).sum())] for part in (here, there)]
        if fisher_exact(counts).pvalue < 0.001:
            texts.append(
                f"Warning: the judge has no answer for {here.sum()} of {len(here)} pairs with a human label, but for {there.sum()} of "
                f"{len(there)} others; its errors are then corrected by the wrong amount: label both kinds alike."
            )
    return texts


def write_part(settings: MergeSettings, name: str, ids: list[str], rows: np.ndarray, merged: Merged, report: dict[str, Any]) -> Path:
    """Write targets of all pairs, those that were left out with weight 0."""
    import numpy as np

    from dedpo_diffusion.labels import write_targets
    from dedpo_diffusion.records import Targets

    target, weight = np.full(len(ids), 0.5), np.zeros(len(ids))
    target[rows], weight[rows] = merged.target, merged.weight
    path = write_targets(settings.pairs, name, Targets(ids, target, weight), report)
    say(f"wrote {path} and {path.with_suffix('.json').name}")
    return path


def print_next(settings: MergeSettings, names: list[str], judge: str | None) -> None:
    """The commands that make labels of the targets by fold."""
    runs = [f"runs/{name}" for name in names]
    if settings.method != "human_only":
        say(f"Warning: if judge {judge} learned from the human labels, it carries them across folds; then use --method human_only.")
    say("Next: train one policy on each fold's targets, and let every pair be judged by the one that never saw it:")
    for name, folder in zip(names, runs, strict=True):
        say(f"  dedpo train --config CONFIG --data.pairs {settings.pairs} --data.targets {name} --out {folder}")
    say(f"  dedpo label {settings.pairs} --with self={','.join(runs)}")
    say(f"  dedpo merge {settings.pairs} --human {settings.human} --judge self --name self")


def run(settings: MergeSettings) -> Path:
    """Merge human and judge labels into one target and weight per pair."""
    import numpy as np

    from dedpo_diffusion.pairs import PairReader

    reader = PairReader(settings.pairs)
    ids, judge = reader.ids(), choose_judge(settings)
    human, propensity = read_human(settings, ids)
    answers = Answers(human, None if judge is None else read_judge(settings, ids, judge), propensity)
    if propensity is not None:
        say(f"{settings.human}: pairs were not labelled at random; the stored propensities make up for it")
    wanted = parts(settings, reader.prompts())
    files = ", ".join(filter(None, (settings.human, judge)))
    merged = {  # all of them, before any is written
        name: merge(settings, answers.part(rows), files if rows.all() else f"{files}; targets {name}") for name, rows in wanted.items()
    }
    common = {"judge": judge, "human": settings.human, "label_files": _label_files(settings, judge), "propensities": propensity is not None}
    paths = []
    for fold, (name, rows) in enumerate(wanted.items(), start=-1):
        used = answers.part(rows)
        report = {"name": name, **common, **merged[name].report}
        report["n_judge_missing"] = None if used.judge is None else int(np.isnan(used.judge).sum())
        report["fold"] = None if fold < 0 else {"number": fold, "of": settings.folds, "seed": settings.seed}
        report["sentences"] = [*report["sentences"], *further_sentences(settings, used, len(ids) - int(rows.sum()))]
        if fold < 0:
            print_report(report, f"targets {name}: {settings.human} and {judge or 'no judge'}")
        paths.append(write_part(settings, name, ids, rows, merged[name], report))
    if settings.folds:
        print_next(settings, list(wanted)[1:], judge)
    return paths[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(MergeSettings, run, argv, prog="dedpo merge", positional=("pairs",))


if __name__ == "__main__":
    raise SystemExit(main())
