"""Calibrate judges' labels on people's, or stack several judges into one.

    dedpo calibrate pairs --judges pickscore clip --method stack
    dedpo calibrate pairs --method adapt

Reads raw scores and human labels from `PAIRS/labels`. Writes a new label file `NAME.parquet`, which `dedpo merge` takes as it
takes any judge's, its report `NAME.json` and picture `NAME.png`. A pair's map never learned from that pair's own human label;
only scores of a judge that itself trained on people's labels, as "self" does, can carry it in. Such judges must be named.
Method adapt teaches the judges what people mind: image statistics of all pairs are measured once, into `PAIRS/statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say, say_next, stage
from dedpo_diffusion.judges.summary import Judge, judge_answers, stat_words, summarise
from dedpo_diffusion.settings import CalibrateSettings, MergeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.labels.adaptation import Adapted, Group
    from dedpo_diffusion.labels.calibration import Calibrated

RAW = ("score_0", "score_1", "judge_version")
TAUGHT = ("self-", "adapted-")  # one of these starts the version of a judge that trained on people's labels


@dataclass(frozen=True)
class Asked:
    """The N pairs and what people said of them, N each.

    `human` is NaN where nobody answered; `weights` the inverse probability of being labelled, None for labels at random.
    """

    ids: list[str]
    prompts: list[str]
    human: np.ndarray
    weights: np.ndarray | None


# ---- what is read


def choose_judges(settings: CalibrateSettings) -> dict[str, Labels]:
    """The label files of the judges that are named, or of all that hold raw scores, are not calibrated already and never
    trained on people's labels.

    Raises:
        UserError: none, the human file, one twice, or one that was calibrated.
    """
    from dedpo_diffusion.labels.files import CALIBRATED, label_names, label_origin, read_labels

    if settings.judges:
        for name in settings.judges:
            if name == settings.human:
                raise UserError(f"--judges names {name!r}, the human label file; name judges alone")
            if settings.judges.count(name) > 1:
                raise UserError(f"--judges names {name!r} twice; name it once")
            if label_origin(settings.pairs, name) == CALIBRATED:
                raise UserError(f"{label_path(settings, name)} was calibrated already; name the judge that it was made from")
        chosen = {name: read_labels(settings.pairs, name) for name in settings.judges}
        taught = [name for name, labels in chosen.items() if is_taught(labels)]
        if taught:
            say(
                f"warning: {', '.join(taught)} trained on people's labels, and through its scores of other pairs a pair's own label "
                "can reach the map that the pair gets: merging with the calibrated labels is not quite unbiased"
            )
        return chosen
    names = [name for name in label_names(settings.pairs) if name != settings.human and label_origin(settings.pairs, name) != CALIBRATED]
    others = {name: read_labels(settings.pairs, name) for name in names}
    lack = [name for name, labels in others.items() if not set(RAW) <= set(labels.extra)]
    taught = [name for name, labels in others.items() if name not in lack and is_taught(labels)]
    if lack:
        say(f"left out, as they have no raw scores: {', '.join(lack)}")
    if taught:
        say(f"left out, since they trained on people's labels: {', '.join(taught)}; --judges can name them")
    chosen = {name: labels for name, labels in others.items() if name not in lack + taught}
    if not chosen:
        other = "other " if taught else ""
        raise UserError(f"{settings.pairs / 'labels'} holds no {other}judge with raw scores; run `dedpo label` first")
    return chosen


def is_taught(labels: Labels) -> bool:
    """Whether the judge behind these labels trained on people's labels, as "self" does."""
    return any(str(version).startswith(TAUGHT) for version in labels.extra.get("judge_version", []))


def label_path(settings: CalibrateSettings, name: str) -> Path:
    """The label file of this name."""
    return settings.pairs / "labels" / f"{name}.parquet"


def raw_answers(settings: CalibrateSettings, name: str, labels: Labels, ids: list[str]) -> Judge:
    """A judge's answers, with raw scores wherever there is a label.

    Raises:
        UserError: no raw scores, or one that is no finite number.
    """
    import numpy as np

    path = label_path(settings, name)
    for column in RAW:
        if column not in labels.extra:
            raise UserError(
                f"{path} has no column {column!r}, and calibration needs raw scores; run `dedpo label` again, or leave {name} out"
            )
    bad = np.flatnonzero(~np.isfinite(np.array([labels.extra["score_0"], labels.extra["score_1"]], dtype=np.float64)).all(axis=0))
    if bad.size:
        raise UserError(f"{path} row {bad[0]}: a raw score is missing or infinite; remove the row, or run `dedpo label` again")
    return judge_answers(labels, ids, folder=settings.pairs, name=name)


def read_human(settings: CalibrateSettings) -> Asked:
    """The pairs and their human labels.

    Raises:
        UserError: no such file.
    """
    from dedpo_diffusion.debias import inverse_propensity
    from dedpo_diffusion.labels import answers
    from dedpo_diffusion.labels.files import label_names
    from dedpo_diffusion.pairs.dataset import PairReader

    if settings.human not in label_names(settings.pairs):
        path = label_path(settings, settings.human)
        raise UserError(f"there is no {path}, and calibration learns from people; run `dedpo vote`, or name their labels with --human")
    reader = PairReader(settings.pairs)
    ids = reader.ids()
    human, propensity = answers.read_human(MergeSettings(settings.pairs, human=settings.human), ids)
    if propensity is not None:
        say(f"{settings.human}: pairs were not labelled at random; the stored propensities make up for it")
    return Asked(ids, reader.prompts(), human, None if propensity is None else inverse_propensity(human, propensity))


# ---- what is written


def plan(settings: CalibrateSettings, judges: Sequence[str]) -> dict[str, list[str]]:
    """The judges behind each new label file, by its name.

    Raises:
        UserError: a stack of one, one name for several files, or a file that something else made.
    """
    from dedpo_diffusion.labels.files import CALIBRATED, label_names, label_origin

    stack = settings.method == "stack"
    if stack and len(judges) < 2:
        raise UserError(f"method stack needs two or more judges, and there is {', '.join(judges)}; use --method temperature")
    if settings.name is not None and settings.method not in ("stack", "adapt") and len(judges) > 1:
        raise UserError(
            f"--name {settings.name} names one file, but {len(judges)} judges make one each; leave --name out, or name one judge"
        )
    together = stack or settings.method == "adapt"
    made = {settings.name or settings.method: list(judges)} if together else {}
    made = made or {settings.name or f"{name}-{settings.method}": [name] for name in judges}
    for name in made:
        held = label_origin(settings.pairs, name)  # this also refuses what cannot name a file
        if name == settings.human or (name in label_names(settings.pairs) and held != CALIBRATED):
            raise UserError(
                f"{label_path(settings, name)} holds labels that calibration did not make; give another --name, or remove the file"
            )
    return made


def calibrated_version(settings: CalibrateSettings, judges: dict[str, Judge]) -> str:
    """What the new labels depend on, in one line."""
    from dedpo_diffusion.core.files import file_digest

    digest = file_digest(label_path(settings, settings.human))[:12]
    versions = " + ".join(judge.version or f"{name} of no version" for name, judge in judges.items())
    inverted = " inversion allowed" if settings.invert else ""
    return f"calibrated {settings.method} of {versions} on {settings.human} {digest} folds {settings.folds} seed {settings.seed}{inverted}"


def as_labels(made: Calibrated | Adapted, ids: list[str], version: str) -> Labels:
    """The label file's content: pairs without an answer are left out, and sigmoid(score_0 - score_1) is the label."""
    import numpy as np

    from dedpo_diffusion.core.records import Labels

    rows = np.flatnonzero(~np.isnan(made.log_odds))
    half = made.log_odds[rows] / 2
    extra = {"score_0": half.tolist(), "score_1": (-half).tolist(), "judge_version": [version] * len(rows)}
    return Labels([ids[row] for row in rows], made.probability[rows], extra)


def differences_of(judges: dict[str, Judge]) -> np.ndarray:
    """(N, J) raw score of image 0 minus that of image 1, by judge."""
    import numpy as np

    return np.stack([judge.scores[:, 0] - judge.scores[:, 1] for judge in judges.values()], axis=1)


def write_made(
    settings: CalibrateSettings, name: str, made: Calibrated | Adapted, judges: dict[str, Judge], asked: Asked
) -> tuple[Path, list[dict[str, str]]]:
    """Write one new label file; its path, and names and digests of the files that it was made from."""
    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.labels.files import CALIBRATED, write_labels

    path = write_labels(settings.pairs, name, as_labels(made, asked.ids, calibrated_version(settings, judges)), origin=CALIBRATED)
    used = [label_path(settings, file) for file in (settings.human, *judges)]
    return path, [{"file": f"labels/{file.name}", "sha256": file_digest(file)} for file in used]


def calibrate_file(settings: CalibrateSettings, name: str, judges: dict[str, Judge], asked: Asked) -> dict[str, Any]:
    """Calibrate, write and tell one new label file; returns what a summary of it does not know: where it is from, and how."""
    import numpy as np

    from dedpo_diffusion.labels.calibration import calibrate

    try:
        made = calibrate(
            differences_of(judges), asked.human, method=settings.method, folds=settings.folds, groups=asked.prompts, invert=settings.invert,
            seed=settings.seed, weights=asked.weights, names=list(judges),
            own=np.stack([judge.label_0 for judge in judges.values()], axis=1),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({', '.join(judges)} and {settings.human}): {error}") from error
    path, used = write_made(settings, name, made, judges, asked)
    print_report(made.report, f"{name}: calibrated on {settings.human}")
    say(f"wrote {path}")
    return {"label_files": used, "calibration": made.report}


# ---- the method adapt


def check_taught(settings: CalibrateSettings, answers: dict[str, Judge], asked: Asked) -> None:
    """Refuse what cannot be adapted before any image is looked at.

    Raises:
        UserError: too few answers or all alike, or a judge without scores for some pairs.
    """
    import numpy as np

    from dedpo_diffusion.labels.adaptation import check_human

    try:
        check_human(asked.human)
    except ValueError as error:
        remedy = f"run `dedpo vote {settings.pairs}`, or use --method temperature"
        raise UserError(f"{label_path(settings, settings.human)}: {error} ({remedy})") from error
    for name, judge in answers.items():
        missing = np.flatnonzero(np.isnan(judge.scores).any(axis=1))
        if missing.size:
            raise UserError(
                f"{label_path(settings, name)} has no scores for {missing.size} of {len(asked.ids)} pairs (first missing: "
                f"{asked.ids[missing[0]]!r}), and method adapt takes all; run `dedpo label` again, or name other judges with --judges"
            )


def features_of(settings: CalibrateSettings, answers: dict[str, Judge]) -> list[Group]:
    """What may be taken in beside the judges' scores, in this order.

    Raises:
        UserError: an image that cannot be read.
    """
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.features import embedding_group, generator_group, statistics_group
    from dedpo_diffusion.pairs.statistics import measure_statistics

    reader = PairReader(settings.pairs)
    found = [statistics_group(measure_statistics(reader))] if settings.statistics else []
    versions = {name: judge.version for name, judge in answers.items()}
    others = (generator_group(reader), embedding_group(reader, versions, seed=settings.seed))
    return found + [group for group in others if group is not None]


def adapt_file(settings: CalibrateSettings, name: str, answers: dict[str, Judge], asked: Asked) -> dict[str, Any]:
    """Teach the judges, write the labels; returns what a summary does not know.

    Raises:
        UserError: labels, scores or images that cannot be used.
    """
    from dedpo_diffusion.labels.adapt_words import adapt_sentences
    from dedpo_diffusion.labels.adaptation import Group, adapt

    check_taught(settings, answers, asked)
    scores = Group("scores", list(answers), differences_of(answers))
    if not scores.varied().columns:
        raise UserError(
            f"{settings.pairs / 'labels'}: {', '.join(answers)} give both images of every pair the same score; use another judge"
        )
    try:
        made = adapt(
            scores, features_of(settings, answers), asked.human, folds=settings.folds, prompts=asked.prompts, weights=asked.weights,
            invert=settings.invert, seed=settings.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({', '.join(answers)} and {settings.human}): {error}") from error
    report = made.report | {"sentences": adapt_sentences(made.report)}
    path, used = write_made(settings, name, made, answers, asked)
    for sentence in report["sentences"]:
        say(sentence)
    say(f"wrote {path}")
    return {"label_files": used, "calibration": report}


# ---- what is told


def print_report(report: dict[str, Any], title: str) -> None:
    """Each judge as it came, the calibrated labels below them, then the sentences."""
    from rich.console import Console
    from rich.table import Table

    title += ", weighted by the stored propensities" if report["weighted"] else ""
    table = Table("labels", "agreement", "used", "temperature", "log loss", "calibration error", title=title)
    for judge in report["judges"]:
        temperature = "-" if judge["temperature"] is None else f"{judge['temperature']:.4g}"
        table.add_row(
            judge["name"], stat_words(judge["agreement"], ".3f"), judge["used"], temperature,
            stat_words(judge["log_loss"], ".3f"), stat_words(judge["calibration_error"], ".3f"),
        )  # fmt: skip
    table.add_row("calibrated, held out", "", "", "", *(stat_words(report[key], ".3f") for key in ("log_loss", "calibration_error")))
    Console().print(table)
    for sentence in report["sentences"]:
        say(sentence)


def make(settings: CalibrateSettings) -> dict[str, dict[str, Any]]:
    """Write and tell the new label files; what is known of each, by its name."""
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.labels.adapt_figure import draw_adapted

    asked, files = read_human(settings), choose_judges(settings)
    made = plan(settings, list(files))
    answers = {judge: raw_answers(settings, judge, labels, asked.ids) for judge, labels in files.items()}
    of = {name: {judge: answers[judge] for judge in judges} for name, judges in made.items()}
    work = adapt_file if settings.method == "adapt" else calibrate_file
    reports = {name: work(settings, name, judges, asked) for name, judges in of.items()}
    summaries = summarise(settings.pairs, list(reports), human=settings.human, seed=settings.seed, extra=reports)
    for name in set(reports) - set(summaries):  # too few human labels for a summary
        about = {"name": name, "judge_version": calibrated_version(settings, of[name]), "human": reports[name]["label_files"][0]}
        about["propensities"] = asked.weights is not None
        write_json(label_path(settings, name).with_suffix(".json"), about | reports[name])
    for name, report in reports.items():
        if settings.method == "adapt":
            draw_adapted(report["calibration"], label_path(settings, name).with_suffix(".png"), f"{name}: what people taught")
    return reports


def run(settings: CalibrateSettings) -> list[Path]:
    """Calibrate judges' labels on the human ones, or stack several judges into one."""
    reports = make(settings)
    for name, report in reports.items():
        further = ["--missing", "tie"] if report["calibration"]["n_missing"] else []
        further = ["--method", "adapted"] if settings.method == "adapt" else further
        say_next("merge", settings.pairs, "--judge", name, *further)
    return [label_path(settings, name) for name in reports]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(CalibrateSettings, run, argv, prog="dedpo calibrate", positional=("pairs",), flags={"judges": "judges"})


if __name__ == "__main__":
    raise SystemExit(main())
