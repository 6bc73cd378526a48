"""Merge human and judge labels into one target and weight per pair, and tell what the labels are worth.

    dedpo merge pairs --method tuned
    dedpo merge pairs --judges clip,vlm
    dedpo merge pairs --method adapted
    dedpo merge pairs --plan 400
    dedpo merge pairs --population dataset=pickapic
    dedpo merge pairs --from labelled_pairs --method adapted

With --method adapted people first teach the judges, as `dedpo calibrate --method adapt` does, where that can be done.
Reads `PAIRS/labels`, writes `PAIRS/targets/NAME.parquet`, its report `NAME.json` and its picture `NAME.png`; with --folds K also
NAME-fold-0 and so on, each merged without the pairs of one fold. With --plan it writes `NAME.plan.json` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, held_already, say, say_next, say_replaced, stage
from dedpo_diffusion.labels.answers import Answers, choose_judges, named_judges, read_clusters, read_human, read_judge
from dedpo_diffusion.settings import CalibrateSettings, MergeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.debias import Merged
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.shift import Shift

UNBOUND = 1e9  # an overshoot that nothing reaches
TAUGHT_JUDGE = "adapt"  # the labels of the judge that people taught


# ---- which method


def resolved(settings: MergeSettings) -> MergeSettings:
    """Of method adapted without a judge's name: with the labels of a judge that people taught, which are made where they are missing.

    Where nobody can be taught it is tuned, under the same name. Judges that are named are taken as they are, and labels of other
    populations teach them by weights of their own.

    Raises:
        UserError: a judge that cannot be taught, in words of `dedpo calibrate`.
    """
    if settings.method != "adapted" or named_judges(settings) or settings.population is not None or settings.other is not None:
        return settings
    made_of = taught_by(settings)
    if is_fresh(settings, made_of):
        return dataclasses.replace(settings, judge=TAUGHT_JUDGE)
    judges, reason = teachable(settings)
    if reason is None:
        from dedpo_diffusion.pipelines import calibrate

        again = " again, since labels have changed" if made_of else ""
        say(f"people teach {', '.join(judges)}{again}, as by `dedpo calibrate --method adapt`:")
        calibrate.make(CalibrateSettings(settings.pairs, judges=judges, method="adapt", human=settings.human, seed=settings.seed))
        return dataclasses.replace(settings, judge=TAUGHT_JUDGE)
    if reason:
        say(f"the method is tuned, since {reason}")
    return dataclasses.replace(settings, method="tuned", name=settings.name or settings.method)


def teachable(settings: MergeSettings) -> tuple[list[str], str | None]:
    """The judges that people can teach; and why they can teach none, None if they can, empty where that is told elsewhere."""
    import numpy as np

    from dedpo_diffusion.labels.adaptation import LEAST
    from dedpo_diffusion.labels.files import label_names, read_labels
    from dedpo_diffusion.pairs.populations import has_scores, raw_judges

    if settings.human not in label_names(settings.pairs):
        return [], ""
    human = read_labels(settings.pairs, settings.human, extras=()).label_0
    if len(human) < LEAST:
        return [], f"{len(human)} human labels teach no judge, as {LEAST} do"
    if (np.asarray(human) == human[0]).all():
        return [], "human labels that are all alike teach no judge"
    scored = [name for name in raw_judges(settings.pairs, settings.human) if has_scores(settings.pairs, name)]
    return scored, None if scored else "no judge has raw scores, by which people could teach it"


def taught_by(settings: MergeSettings) -> dict[str, str]:
    """The label files that the taught judge was made of, with their digests; {} where there is none."""
    from dedpo_diffusion.core.files import read_object
    from dedpo_diffusion.labels.files import CALIBRATED, label_origin

    report = settings.pairs / "labels" / f"{TAUGHT_JUDGE}.json"
    if label_origin(settings.pairs, TAUGHT_JUDGE) != CALIBRATED or not report.is_file():
        return {}
    found = read_object(report, f"remove it, or run `dedpo calibrate {settings.pairs} --method adapt` again")
    return {entry["file"]: entry["sha256"] for entry in found.get("label_files", [])}


def is_fresh(settings: MergeSettings, made_of: dict[str, str]) -> bool:
    """Whether a judge made of these files was taught by these people, and the files are what they were."""
    from dedpo_diffusion.core.files import file_digest

    there = {file: settings.pairs / file for file in made_of}
    same = all(path.is_file() and file_digest(path) == made_of[file] for file, path in there.items())
    return same and f"labels/{settings.human}.parquet" in made_of


# ---- what is merged


def read_answers(settings: MergeSettings, reader: PairReader, ids: list[str], judges: list[str]) -> Answers:
    """Everything that is merged, in the order of the pairs.

    Raises:
        UserError: a label file or an option that cannot be used.
    """
    import numpy as np

    from dedpo_diffusion.core.tables import SOURCE
    from dedpo_diffusion.labels.merge_columns import comparable
    from dedpo_diffusion.pairs.clusters import label_clusters

    human, propensity = read_human(settings, ids)
    if propensity is not None and settings.population is None:
        say(f"{settings.human}: pairs were not labelled at random; the stored propensities make up for it")
    given = np.stack([read_judge(settings, ids, judge) for judge in judges], axis=1) if judges else None
    columns = reader.plain_sources()
    sources = comparable(columns) if settings.method != "naive" else {}
    too_many = [
        SOURCE + name for name, column in columns.items() if sources and SOURCE + name not in sources and str(column.type) != "null"
    ]
    features = None if settings.population else features_of(settings, reader, ids, judges)
    clusters = label_clusters(reader, human, read_clusters(settings.pairs, settings.human, ids))
    return Answers(human, given, judges, propensity, sources, too_many, features, clusters)


def features_of(settings: MergeSettings, reader: PairReader, ids: list[str], judges: list[str]) -> np.ndarray | None:
    """(N, F) differences in which a systematic error of an adapted judge may show; None for other methods, or where there are none."""
    if settings.method != "adapted":
        return None
    from dedpo_diffusion.labels.files import CALIBRATED, label_origin
    from dedpo_diffusion.pairs.features import known_differences

    raw = [name for name in judges if label_origin(settings.pairs, name) != CALIBRATED]
    if raw:
        say(f"warning: {', '.join(raw)} learned nothing from people, and its labels are taken as they are; run `dedpo calibrate` first")
    return known_differences(reader, ids, human=settings.human)[0]


# ---- merging


def merge(settings: MergeSettings, answers: Answers, what: str) -> Merged:
    """Merge; a judge without an answer counts as undecided, but for human_only, which does not need it.

    Raises:
        UserError: the labels (`what` names them) cannot be merged.
    """
    from dedpo_diffusion.debias import merge_labels

    judges = answers.judges if settings.method == "human_only" else answers.judged()
    if judges is not None and judges.shape[1] == 1:
        judges = judges[:, 0]
    options: dict[str, Any] = {"method": settings.method, "power": settings.power, "max_overshoot": settings.max_overshoot}
    options |= {"seed": settings.seed, "propensity": answers.propensity}
    options |= {"rule": settings.rule, "judges": answers.names or None}
    options |= {"correction": settings.correction, "features": answers.features, "rater_agreement": settings.rater_agreement}
    options |= {"visits": settings.visits, "noise_ratio": settings.noise_ratio, "clusters": answers.clusters}
    try:
        return merge_labels(answers.human, judges, **options)
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({what}): {error}") from error


def parts(settings: MergeSettings, reader: PairReader) -> dict[str, np.ndarray]:
    """The targets to write by their name, each with the pairs (N,) bool that they are merged from.

    Targets of a fold are merged without the fold's pairs. Folds consist of whole prompts, if there are enough of them.
    """
    import numpy as np

    name = settings.name or settings.method
    if settings.folds == 1 or settings.folds < 0:
        raise UserError(f"--folds is {settings.folds}; give at least 2, or 0 for no targets by fold")
    if settings.folds and settings.plan is not None:
        raise UserError("--plan writes no targets, by fold or otherwise; leave out --folds or --plan")
    every = {name: np.ones(len(reader), dtype=bool)}
    if settings.folds == 0:
        return every
    from dedpo_diffusion.labels.calibration import assign_folds

    prompts = reader.prompts()
    if len(set(prompts)) < settings.folds:
        say(
            f"there are fewer prompts ({len(set(prompts))}) than folds ({settings.folds}), so pairs of one prompt fall into different folds"
        )
    try:
        fold = assign_folds(prompts, settings.folds, settings.seed)
    except ValueError as error:
        raise UserError(f"--folds {settings.folds}: {error}") from error
    return every | {f"{name}-fold-{k}": fold != k for k in range(settings.folds)}


# ---- labels of another dataset


def merge_from(settings: MergeSettings, other: Path, reader: PairReader) -> Path:
    """Merge the human labels of another dataset into targets of these pairs, whose images people never saw.

    Raises:
        UserError: labels that cannot be merged, or populations that cannot be compared.
    """
    import numpy as np

    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.debias import Merged, hard_targets
    from dedpo_diffusion.labels.files import targets_path
    from dedpo_diffusion.labels.merge_report import draw_report, print_report
    from dedpo_diffusion.labels.next_stage import train_words
    from dedpo_diffusion.labels.shift_words import carried_sentences, shift_sentences, shift_warnings, target_report
    from dedpo_diffusion.labels.warnings import few_labels_warnings
    from dedpo_diffusion.pairs.shift import carry
    from dedpo_diffusion.pairs.shift_answers import pooled, shifted

    name, ids = settings.name or settings.method, reader.ids()
    shift, answers = pooled(settings, other, reader)
    judges = answers.names
    used, model = shifted(settings, shift, answers)
    unbound = dataclasses.replace(settings, max_overshoot=UNBOUND)  # the labelled pairs, whose targets it bounds, are not trained on
    merged = merge(unbound, used, f"{settings.human} of {other}; {', '.join(judges)}")
    about: dict[str, Any] = {"from": other.name, **shift.about(), "carried": None}
    if merged.predicted is not None:
        target, weight = hard_targets(merged.predicted[~shift.labelled])
    else:
        assert merged.judge is not None and merged.powers is not None
        carried = carry(shift, answers.human, merged.judge, merged.powers)
        target, weight, about["carried"] = carried.target, np.ones(len(ids)), carried.about()
    people = other / "labels" / f"{settings.human}.parquet"
    files = _label_files(settings, judges) | {"human": {"file": f"{other.name}/labels/{people.name}", "sha256": file_digest(people)}}
    report = {"name": name, "judge": ", ".join(judges), "human": settings.human, "label_files": files, "propensities": True}
    report |= {"propensity_model": model, **target_report(merged.report, target, weight), "population": about}
    report |= {"n_judge_missing": int(np.isnan(answers.judges).any(axis=1).sum()), "fold": None, "curve": None}
    report["sentences"] = [*shift_sentences(about), *carried_sentences(about["carried"]), *report["sentences"]]
    report["warnings"] = [*few_labels_warnings(about["n_labelled"], judged=True), *shift_warnings(about)]
    print_report(report, f"targets {name}: {settings.human} of {other.name} and {', '.join(judges)}")
    held = held_already(targets_path(settings.pairs, name))
    path = write_part(settings, name, ids, np.ones(len(ids), dtype=bool), Merged(target, weight, merged.power, report), report)
    draw_report(settings, report, path)
    say_replaced(held)
    say_next(*train_words(settings.pairs, path.stem))
    return path


# ---- what is written


def _label_files(settings: MergeSettings, judges: Sequence[str]) -> dict[str, Any]:
    """Names and digests of the label files that were merged."""
    from dedpo_diffusion.core.files import file_digest

    roles = {"human": settings.human} | {f"judge {k + 1}" if k else "judge": name for k, name in enumerate(judges)}
    paths = {role: settings.pairs / "labels" / f"{name}.parquet" for role, name in roles.items()}
    paths = {role: path for role, path in paths.items() if path.is_file()}
    return {role: {"file": f"labels/{path.name}", "sha256": file_digest(path)} for role, path in paths.items()}


def write_part(settings: MergeSettings, name: str, ids: list[str], rows: np.ndarray, merged: Merged, report: dict[str, Any]) -> Path:
    """Write targets of all pairs, those that were left out with weight 0."""
    import numpy as np

    from dedpo_diffusion.core.records import Targets
    from dedpo_diffusion.labels.files import write_targets

    def placed(values: np.ndarray | None, left_out: float) -> np.ndarray | None:
        if values is None or rows.all():
            return values
        every = np.full(len(ids), left_out)
        every[rows] = values
        return every

    columns = {"target": (merged.target, 0.5), "weight": (merged.weight, 0.0), "human": (merged.human, np.nan)}
    columns |= {"judge": (merged.judge, np.nan), "inverse": (merged.inverse, 0.0), "power": (merged.powers, 0.0)}
    found = {column: placed(*given) for column, given in columns.items()}
    path = write_targets(settings.pairs, name, Targets(ids, **found), report)  # type: ignore[arg-type]
    say(f"wrote {path} and {path.with_suffix('.json').name}")
    return path


def print_next(settings: MergeSettings, names: list[str], judges: Sequence[str]) -> None:
    """The commands that make labels of the targets by fold."""
    runs = [f"runs/{name}" for name in names]
    if settings.method != "human_only":
        who = f"judge {judges[0]} learned" if len(judges) == 1 else f"any of the judges {', '.join(judges)} learned"
        say(f"Warning: if {who} from the human labels, it carries them across folds; then use --method human_only.")
    say("Next: train one policy on each fold's targets, and let every pair be judged by the one that never saw it:")
    for name, folder in zip(names, runs, strict=True):
        say(f"  dedpo train --config CONFIG --data.pairs {settings.pairs} --data.targets {name} --out {folder}")
    say(f"  dedpo label {settings.pairs} --with self={','.join(runs)}")
    say(f"  dedpo merge {settings.pairs} --human {settings.human} --judge self --name self")


def say_stale(settings: MergeSettings, written: list[str]) -> None:
    """Name targets by fold of an earlier merge of this name, which do not belong to the new ones."""
    from dedpo_diffusion.labels.files import target_names

    start = f"{written[0]}-fold-"
    stale = [
        name for name in target_names(settings.pairs) if name.startswith(start) and name[len(start) :].isdigit() and name not in written
    ]
    if stale:
        say(f"Warning: {', '.join(stale)} are of an earlier merge, not of this one; remove them, or merge again with as many --folds.")


def run(settings: MergeSettings) -> Path:
    """Merge human and judge labels into one target and weight per pair, or plan how many more labels to ask for."""
    import numpy as np

    from dedpo_diffusion.labels.files import targets_path
    from dedpo_diffusion.labels.merge_columns import with_propensity
    from dedpo_diffusion.labels.merge_report import complete, draw_report, further_sentences, print_report, write_plan
    from dedpo_diffusion.labels.next_stage import train_words
    from dedpo_diffusion.labels.shift_words import about_populations, shift_sentences, unused_sentences
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.shift_answers import check_populations, shift_judges, shifted, shifted_parts

    reader = PairReader(settings.pairs)
    targets_path(settings.pairs, settings.name or settings.method)  # a name that leads elsewhere is refused before all else
    settings = resolved(settings)
    check_populations(settings)
    if settings.other is not None:
        return merge_from(settings, settings.other, reader)
    ids, judges = reader.ids(), choose_judges(settings) if settings.population is None else shift_judges(settings, settings.pairs)
    wanted = parts(settings, reader)
    answers = read_answers(settings, reader, ids, judges)
    shifts: dict[str, Shift] = {}
    if settings.population is not None:
        wanted, shifts = shifted_parts(settings, settings.population, reader, ids, answers, wanted)
    files = ", ".join([settings.human, *judges])
    merged, used, about = {}, {}, {}
    for name, rows in wanted.items():  # all of them, before any is written
        part = answers.part(rows)
        used[name], about[name] = shifted(settings, shifts[name], part) if name in shifts else with_propensity(settings, part)
        merged[name] = merge(settings, used[name], files if rows.all() else f"{files}; targets {name}")
    if settings.plan is not None:
        [name] = wanted
        path = write_plan(settings, name, used[name], merged[name])
        say_next("vote", settings.pairs, *([] if settings.human == "human" else ["--name", settings.human]))
        return path
    common = {"judge": ", ".join(judges) or None, "human": settings.human, "label_files": _label_files(settings, judges)}
    paths, held = [], held_already(*(targets_path(settings.pairs, name) for name in wanted))
    for fold, (name, rows) in enumerate(wanted.items(), start=-1):
        report = {"name": name, **common, "propensities": about[name] is not None, "propensity_model": about[name], **merged[name].report}
        given = used[name].judges
        report["n_judge_missing"] = None if given is None else int(np.isnan(given).any(axis=1).sum())
        report["fold"] = None if fold < 0 else {"number": fold, "of": settings.folds, "seed": settings.seed}
        left_out = int((~rows).sum())
        if name in shifts:
            report["population"] = {"column": settings.population, **shifts[name].about()}
            report["sentences"] = [*shift_sentences(report["population"]), *report["sentences"], *unused_sentences(left_out)]
            left_out = 0
        report["sentences"] = [*report["sentences"], *further_sentences(settings, used[name], report, left_out)]
        if fold < 0:
            report |= complete(settings, used[name], merged[name])
            if name in shifts:
                report["warnings"] = about_populations(report["warnings"], report["population"])
            print_report(report, f"targets {name}: {settings.human} and {', '.join(judges) or 'no judge'}")
        path = write_part(settings, name, ids, rows, merged[name], report)
        if fold < 0:
            draw_report(settings, report, path)
        paths.append(path)
    say_replaced(held)
    say_stale(settings, list(wanted))
    if settings.folds:
        print_next(settings, list(wanted)[1:], judges)
    else:
        say_next(*train_words(settings.pairs, paths[0].stem))
    return paths[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(MergeSettings, run, argv, prog="dedpo merge", positional=("pairs",), flags={"judges": "judges", "from": "other"})


if __name__ == "__main__":
    raise SystemExit(main())
