"""Calibrate judges' labels on people's, or stack several judges into one.

    dedpo calibrate pairs --judges pickscore clip --method stack

Reads raw scores and human labels from `PAIRS/labels`. Writes a new label file `NAME.parquet`, which `dedpo merge` takes as it
takes any judge's, its report `NAME.json` and picture `NAME.png`. A pair's label never learned from that pair's own human label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError, say, stage
from dedpo_diffusion.settings import CalibrateSettings, MergeSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.calibration import Calibrated
    from dedpo_diffusion.records import Labels

ORIGIN = "dedpo calibrate"
RAW = ("score_0", "score_1", "judge_version")


@dataclass(frozen=True)
class Raw:
    """One judge's answers in the order of the N pairs, NaN where it gave none.

    `difference` is score_0 - score_1 and `label_0` the judge's own probability, (N,) each.
    """

    name: str
    version: str
    difference: np.ndarray
    label_0: np.ndarray


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


def choose_judges(settings: CalibrateSettings) -> list[str]:
    """The judges that are named, or all that hold raw scores and are not calibrated already.

    Raises:
        UserError: none, the human file, one twice, or one that was calibrated.
    """
    from dedpo_diffusion.labels import label_names, label_origin, read_labels

    if settings.judges:
        for name in settings.judges:
            if name == settings.human:
                raise UserError(f"--judges names {name!r}, the human label file; name judges alone")
            if settings.judges.count(name) > 1:
                raise UserError(f"--judges names {name!r} twice; name it once")
            if label_origin(settings.pairs, name) == ORIGIN:
                raise UserError(f"{label_path(settings, name)} was calibrated already; name the judge that it was made from")
        return list(settings.judges)
    others = [name for name in label_names(settings.pairs) if name != settings.human and label_origin(settings.pairs, name) != ORIGIN]
    lack = [name for name in others if not set(RAW) <= set(read_labels(settings.pairs, name).extra)]
    if lack:
        say(f"left out, for lack of raw scores: {', '.join(lack)}")
    if len(lack) == len(others):
        raise UserError(f"{settings.pairs / 'labels'} holds no judge with raw scores; run `dedpo label` first")
    return [name for name in others if name not in lack]


def label_path(settings: CalibrateSettings, name: str) -> Path:
    """The label file of this name."""
    return settings.pairs / "labels" / f"{name}.parquet"


def read_judge(settings: CalibrateSettings, name: str, ids: list[str]) -> Raw:
    """A judge's raw answers.

    Raises:
        UserError: no such file, no raw scores in it, or one that is no finite number.
    """
    import numpy as np

    from dedpo_diffusion.labels import align, read_labels

    labels, path = read_labels(settings.pairs, name), label_path(settings, name)
    label_0 = align(labels, ids, folder=settings.pairs, name=name)
    for column in RAW:
        if column not in labels.extra:
            raise UserError(
                f"{path} has no column {column!r}, and calibration needs raw scores; run `dedpo label` again, or leave {name} out"
            )
    scores = np.array([labels.extra["score_0"], labels.extra["score_1"]], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=0))
    if bad.size:
        raise UserError(f"{path} row {bad[0]}: a raw score is missing or infinite; remove the row, or run `dedpo label` again")
    place = {pair_id: row for row, pair_id in enumerate(ids)}
    difference = np.full(len(ids), np.nan)
    difference[[place[pair_id] for pair_id in labels.pair_id]] = scores[0] - scores[1]
    return Raw(name, ", ".join(sorted({str(version) for version in labels.extra["judge_version"]})), difference, label_0)


def read_human(settings: CalibrateSettings) -> Asked:
    """The pairs and their human labels.

    Raises:
        UserError: no such file.
    """
    from dedpo_diffusion.debias import inverse_propensity
    from dedpo_diffusion.labels import label_names
    from dedpo_diffusion.pairs import PairReader
    from dedpo_diffusion.pipelines import merge

    if settings.human not in label_names(settings.pairs):
        path = label_path(settings, settings.human)
        raise UserError(f"there is no {path}, and calibration learns from people; run `dedpo vote`, or name their labels with --human")
    reader = PairReader(settings.pairs)
    ids = reader.ids()
    human, propensity = merge.read_human(MergeSettings(settings.pairs, human=settings.human), ids)
    if propensity is not None:
        say(f"{settings.human}: pairs were not labelled at random; the stored propensities make up for it")
    return Asked(ids, reader.prompts(), human, None if propensity is None else inverse_propensity(human, propensity))


# ---- what is written


def plan(settings: CalibrateSettings, judges: list[str]) -> dict[str, list[str]]:
    """The judges behind each new label file, by its name.

    Raises:
        UserError: a stack of one, one name for several files, or a file that something else made.
    """
    from dedpo_diffusion.labels import label_names, label_origin

    stack = settings.method == "stack"
    if stack and len(judges) < 2:
        raise UserError(f"method stack needs two or more judges, and there is {', '.join(judges)}; use --method temperature")
    if settings.name is not None and not stack and len(judges) > 1:
        raise UserError(
            f"--name {settings.name} names one file, but {len(judges)} judges make one each; leave --name out, or name one judge"
        )
    made = {settings.name or "stack": judges} if stack else {settings.name or f"{name}-{settings.method}": [name] for name in judges}
    for name in made:
        held = label_origin(settings.pairs, name)  # this also refuses what cannot name a file
        if name == settings.human or (name in label_names(settings.pairs) and held != ORIGIN):
            raise UserError(
                f"{label_path(settings, name)} holds labels that calibration did not make; give another --name, or remove the file"
            )
    return made


def calibrated_version(settings: CalibrateSettings, raws: Sequence[Raw]) -> str:
    """What the new labels depend on, in one line."""
    from dedpo_diffusion.files import file_digest

    digest = file_digest(label_path(settings, settings.human))[:12]
    versions = " + ".join(raw.version for raw in raws)
    inverted = " inversion allowed" if settings.invert else ""
    return f"calibrated {settings.method} of {versions} on {settings.human} {digest} folds {settings.folds} seed {settings.seed}{inverted}"


def as_labels(made: Calibrated, ids: list[str], version: str) -> Labels:
    """The label file's content: pairs without an answer are left out, and sigmoid(score_0 - score_1) is the label."""
    import numpy as np

    from dedpo_diffusion.records import Labels

    rows = np.flatnonzero(~np.isnan(made.log_odds))
    half = made.log_odds[rows] / 2
    extra = {"score_0": half.tolist(), "score_1": (-half).tolist(), "judge_version": [version] * len(rows)}
    return Labels([ids[row] for row in rows], made.probability[rows], extra)


def calibrate_file(settings: CalibrateSettings, name: str, raws: Sequence[Raw], asked: Asked) -> dict[str, Any]:
    """Calibrate, write and tell one new label file; returns its report."""
    import numpy as np

    from dedpo_diffusion.calibration import calibrate
    from dedpo_diffusion.files import file_digest
    from dedpo_diffusion.labels import write_labels

    differences, own = (np.stack([getattr(raw, key) for raw in raws], axis=1) for key in ("difference", "label_0"))
    judges = [raw.name for raw in raws]
    try:
        made = calibrate(
            differences, asked.human, method=settings.method, folds=settings.folds, groups=asked.prompts, invert=settings.invert,
            seed=settings.seed, weights=asked.weights, names=judges, own=own,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{settings.pairs / 'labels'} ({', '.join(judges)} and {settings.human}): {error}") from error
    version = calibrated_version(settings, raws)
    path = write_labels(settings.pairs, name, as_labels(made, asked.ids, version), origin=ORIGIN)
    used = [label_path(settings, file) for file in (settings.human, *judges)]
    files = [{"file": f"labels/{file.name}", "sha256": file_digest(file)} for file in used]
    about = {"name": name, "judge_version": version, "human": settings.human, "label_files": files}
    about["propensities"] = asked.weights is not None
    print_report(made.report, f"{name}: calibrated on {settings.human}")
    say(f"wrote {path}")
    return about | {"calibration": made.report}


# ---- what is told


def _stat(stat: dict[str, Any], digits: int) -> str:
    if stat["value"] is None:
        return "-"
    ci = stat.get("ci")
    return f"{stat['value']:.{digits}f}" + ("" if ci is None else f" ({ci[0]:.{digits}f} to {ci[1]:.{digits}f})")


def print_report(report: dict[str, Any], title: str) -> None:
    """Each judge as it came, the calibrated labels below them, then the sentences."""
    from rich.console import Console
    from rich.table import Table

    table = Table("labels", "agreement", "used", "temperature", "log loss", "calibration error", title=title)
    for judge in report["judges"]:
        temperature = "-" if judge["temperature"] is None else f"{judge['temperature']:.4g}"
        table.add_row(
            judge["name"], _stat(judge["agreement"], 3), judge["used"], temperature,
            _stat(judge["log_loss"], 3), _stat(judge["calibration_error"], 3),
        )  # fmt: skip
    table.add_row("calibrated, held out", "", "", "", _stat(report["log_loss"], 3), _stat(report["calibration_error"], 3))
    Console().print(table)
    for sentence in report["sentences"]:
        say(sentence)


def run(settings: CalibrateSettings) -> list[Path]:
    """Calibrate judges' labels on the human ones, or stack several judges into one."""
    from dedpo_diffusion.files import write_json
    from dedpo_diffusion.pipelines.judge_summary import summarise

    asked = read_human(settings)
    made = plan(settings, choose_judges(settings))
    raws = {judge: read_judge(settings, judge, asked.ids) for judges in made.values() for judge in judges}
    reports = {name: calibrate_file(settings, name, [raws[judge] for judge in judges], asked) for name, judges in made.items()}
    summaries = summarise(settings.pairs, list(reports), human=settings.human, seed=settings.seed, extra=reports)
    for name in set(reports) - set(summaries):  # too few human labels for a summary
        write_json(label_path(settings, name).with_suffix(".json"), reports[name])
    for name, report in reports.items():
        missing = " --missing tie" if report["calibration"]["n_missing"] else ""
        say(f"next: dedpo merge {settings.pairs} --judge {name}{missing}")
    return [label_path(settings, name) for name in made]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(CalibrateSettings, run, argv, prog="dedpo calibrate", positional=("pairs",), flags={"judges": "judges"})


if __name__ == "__main__":
    raise SystemExit(main())
