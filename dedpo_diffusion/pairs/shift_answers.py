"""What `dedpo merge` merges where people labelled another population: the answers of both, with density ratios as propensities.

No stage: `merge` calls it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.labels.answers import Answers, choose_judges, named_judges, read_clusters, read_judge
from dedpo_diffusion.labels.files import CALIBRATED, align, label_names, label_origin, read_labels
from dedpo_diffusion.pairs.clusters import label_clusters
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.populations import (
    asked_rows,
    embedding_axes,
    has_scores,
    judge_version,
    known_pairs,
    odd_differences,
    raw_judges,
    together,
)
from dedpo_diffusion.pairs.shift import Shift, measure_shift, teach
from dedpo_diffusion.settings import MergeSettings


def check_populations(settings: MergeSettings) -> None:
    """Refuse options that labels of another population do not go with.

    Raises:
        UserError: both kinds at once, or an option that has no meaning there.
    """
    if settings.population is None and settings.other is None:
        return
    option = "--population" if settings.population is not None else "--from"
    if settings.population is not None and settings.other is not None:
        raise UserError("--population and --from both say where people's labels are from; give one of them")
    if settings.method == "naive":
        raise UserError(f"{option} weights people's labels, which method naive takes as they are; use tuned, dedpo or adapted")
    if settings.propensities != "stored":
        raise UserError(f"{option} estimates how much each label counts, and so does --propensities; leave that out")
    if settings.plan is not None:
        raise UserError(f"--plan counts further labels as taken at random from all pairs, which those of {option} are not; leave one out")
    if settings.other is None:
        return
    if settings.other.resolve() == settings.pairs.resolve():
        raise UserError(f"--from names {settings.other}, the pairs themselves; use --population, or leave it out")
    if settings.method == "human_only":
        raise UserError(
            f"--from leaves no labelled image to train on with method human_only; use tuned, dedpo or adapted, or make one dataset with "
            f"`dedpo pairs join {settings.pairs} {settings.other}` and give --population dataset={settings.other.resolve().name}"
        )
    for name in ("correction", "rater_agreement", "visits"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name} is about labelled pairs in training, and with --from none is trained on; leave it out")
    if settings.folds:
        raise UserError("--folds leaves labelled pairs out of training, and with --from none is trained on; leave it out")


def shift_judges(settings: MergeSettings, *folders: Path) -> list[str]:
    """The judges that are merged; of method adapted those that are taught, which need raw scores in every folder.

    Raises:
        UserError: none, or one that cannot be taught.
    """
    if settings.method != "adapted":
        return choose_judges(settings)
    named = named_judges(settings)
    if not named:
        common = [set(raw_judges(folder, settings.human)) for folder in folders]
        named = [name for name in sorted(set.intersection(*common)) if all(has_scores(folder, name) for folder in folders)]
    if not named:
        raise UserError(
            f"no judge has raw scores in {' and in '.join(str(folder / 'labels') for folder in folders)}, and method adapted teaches one; "
            "run `dedpo label` first"
        )
    for name in named:
        for folder in folders:
            if label_origin(folder, name) == CALIBRATED:
                raise UserError(f"{folder / 'labels' / name}.parquet learned from people already; name the judge that it was made from")
            if name in label_names(folder) and not has_scores(folder, name):
                raise UserError(
                    f"{folder / 'labels' / name}.parquet has no raw scores (score_0, score_1), and method adapted teaches by them; name "
                    "another judge"
                )
    return named


# ---- one dataset, a column of which tells populations apart


def shifted_parts(
    settings: MergeSettings, column: str, reader: PairReader, ids: list[str], answers: Answers, wanted: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Shift]]:
    """The pairs of each targets to write, (N,) bool, without those that were drawn for people and have no label; and their density ratios.

    Raises:
        UserError: a column that cannot be used, labels of pairs that were not drawn, or populations that cannot be compared.
    """
    drawn, labelled = asked_rows(reader, ids, settings.human, column), ~np.isnan(answers.human)
    strange = np.flatnonzero(labelled & ~drawn)
    if strange.size:
        raise UserError(
            f"--population {column}: {strange.size} pairs have a human label and were not drawn for one (first: {ids[strange[0]]!r}); mend "
            "the column, or name one that tells which pairs people were asked about"
        )
    if answers.propensity is not None:
        say(f"{settings.human}: the stored propensities are not used; --population estimates how much each label counts")
    named = [name for name in answers.names if label_origin(settings.pairs, name) != CALIBRATED]
    known, prompts = known_pairs(reader, ids, sorted({*named, *raw_judges(settings.pairs, settings.human)})), np.array(reader.prompts())
    parts = {name: rows & (labelled | ~drawn) for name, rows in wanted.items()}
    shifts = {}
    for name, rows in parts.items():
        try:
            shifts[name] = measure_shift(known.at(np.flatnonzero(rows)), labelled[rows], prompts[rows].tolist(), seed=settings.seed)
        except ValueError as error:
            raise UserError(f"--population {column}: {error}") from error
    return parts, shifts


def shifted(settings: MergeSettings, shift: Shift, answers: Answers) -> tuple[Answers, dict[str, Any]]:
    """The answers with the ratio as propensity, of method adapted with the judges taught by it; and what the report says of it.

    Raises:
        UserError: judges that cannot be taught.
    """
    found = dataclasses.replace(answers, propensity=shift.propensity, sources={}, too_many=[])
    about: dict[str, Any] = {"from": "density_ratio"}
    if settings.method != "adapted":
        return found, about
    try:
        made = teach(shift, answers.human, answers.names, seed=settings.seed)
    except (KeyError, ValueError) as error:
        raise UserError(f"judges {', '.join(answers.names)}, taught by labels of another population: {error}") from error
    if not made.adapted:
        say("people taught the judges nothing that helps; the labels are the best judge's own, at the temperature that fits")
    taught = {key: made.report[key] for key in ("adapted", "judges", "temperature_of", "groups", "l2", "log_loss", "agreement")}
    changes: dict[str, Any] = {"judges": made.probability[:, None], "names": ["adapted"], "features": odd_differences(shift.known)[0]}
    return dataclasses.replace(found, **changes), about | {"taught": taught}


# ---- labels of another folder


def pooled(settings: MergeSettings, other: Path, reader: PairReader) -> tuple[Shift, Answers]:
    """The pairs that are trained on, followed by the labelled ones of another dataset, and the answers to all of them.

    Raises:
        UserError: no human labels there, judges that did not label both, or populations that cannot be compared.
    """
    ids, there = reader.ids(), PairReader(other)
    human, rows = _labelled_elsewhere(settings, there)
    judges = shift_judges(settings, settings.pairs, other)
    given = np.stack([_judge_of_both(settings, there, ids, rows, name) for name in judges], axis=1)
    alike = set(raw_judges(settings.pairs, settings.human)) & set(raw_judges(other, settings.human))
    names = sorted(name for name in alike if judge_version(settings.pairs, name) == judge_version(other, name))
    mine = known_pairs(reader, ids, names)
    theirs = known_pairs(there, there.ids(), names, axes=embedding_axes(reader, names)).at(rows)
    labelled = np.arange(len(ids) + len(rows)) >= len(ids)
    prompts = there.prompts()
    try:
        shift = measure_shift(
            together(mine, theirs), labelled, [*reader.prompts(), *(prompts[row] for row in rows)], seed=settings.seed
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--from {other}: {error}") from error
    everyone = np.full(len(there), np.nan)
    everyone[rows] = human
    clusters = label_clusters(there, everyone, read_clusters(other, settings.human, there.ids()))
    tied = None if clusters is None else np.concatenate([np.full(len(ids), -1), clusters[rows]])
    answers = Answers(np.concatenate([np.full(len(ids), np.nan), human]), given, judges, None, {}, [], None, tied)
    return shift, answers


def _labelled_elsewhere(settings: MergeSettings, there: PairReader) -> tuple[np.ndarray, np.ndarray]:
    """Human labels (n,) of another dataset, and the rows (n,) there."""
    folder, name = there.folder, settings.human
    if name not in label_names(folder):
        raise UserError(
            f"{folder / 'labels'} holds no human labels {name!r}, which --from takes from there; run `dedpo vote {folder}`, or name them "
            "with --human"
        )
    if name in label_names(settings.pairs):
        say(
            f"warning: human labels of {settings.pairs} itself have no part in this merge, which takes those of {folder}; `dedpo pairs "
            "join` makes one dataset of both"
        )
    found = read_labels(folder, name, extras=("propensity",))
    if "propensity" in found.extra:
        say(f"{folder / 'labels' / name}.parquet: the stored propensities are not used; --from estimates how much each label counts")
    human = align(found, there.ids(), folder=folder, name=name)
    rows = np.flatnonzero(~np.isnan(human))
    return human[rows], rows


def _judge_of_both(settings: MergeSettings, there: PairReader, ids: list[str], rows: np.ndarray, name: str) -> np.ndarray:
    """(N + n,) labels of one judge: of the pairs that are trained on, and of those at rows (n,) of the other dataset."""
    folder = there.folder
    for place in (settings.pairs, folder):
        if label_origin(place, name) == CALIBRATED:
            raise UserError(
                f"{place / 'labels' / name}.parquet learned from the people of one dataset; name the judge that it was made from, or use "
                "--method adapted, which teaches it for these pairs"
            )
    remedy = f"what people said there is compared with what the judge says; run `dedpo label {folder}` with the same judge"
    if name not in label_names(folder):
        raise UserError(f"{folder / 'labels'} has no labels of judge {name!r}, and {remedy}")
    versions = [judge_version(place, name) for place in (settings.pairs, folder)]
    if None not in versions and versions[0] != versions[1]:
        raise UserError(f"labels {name} are of judge {versions[0]} in {settings.pairs} and of {versions[1]} in {folder}, and {remedy}")
    mine = read_judge(settings, ids, name)
    theirs = align(read_labels(folder, name, extras=()), there.ids(), folder=folder, name=name)[rows]
    missing = np.flatnonzero(np.isnan(theirs))
    if missing.size and settings.missing == "error":
        raise UserError(
            f"{folder / 'labels' / name}.parquet lacks {missing.size} of the {len(rows)} pairs that people labelled, and {remedy}, or let "
            "it count as undecided there with --missing tie"
        )
    return np.concatenate([mine, theirs])
