"""Machine labels for every pair of a dataset, by one or several judges.

    dedpo label pairs --with pickscore=FOLDER clip=ViT-L-14:openai
    accelerate launch --num_processes 4 pipelines/label.py pairs --with vlm=FOLDER      # one process a GPU of this machine
    dedpo label pairs --with vlm=FOLDER --engine ray                                    # all nodes of a Ray cluster

Writes `PAIRS/labels/NAME.parquet`: pair_id, label_0, score_0, score_1, judge_version, and what else a judge tells; with human
labels there, `NAME.json` and `NAME.png` say how the judge compares. Every few hundred pairs are kept in
`PAIRS/labels/.NAME.parts` until all are joined, so a stopped run goes on where it stopped. Processes of one machine that run the
same command on the same folder share the pairs; several machines need `--engine ray`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.engine import Crew, Engine, LocalEngine, open_engine
from dedpo_diffusion.core.pace import Clock
from dedpo_diffusion.settings import LabelSettings

if TYPE_CHECKING:
    from dedpo_diffusion.judges.label_worker import Bench, JudgeFacts, Run, Shard
    from dedpo_diffusion.judges.work import FirstUses
    from dedpo_diffusion.pairs.dataset import PairReader

SHOWN = 3  # reasons for missing answers that are printed
HERE = 1 << 30  # bytes of pairs whose images this process looks through by itself, sooner than workers have started


def check_settings(settings: LabelSettings) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        UserError: they do.
    """
    from dedpo_diffusion.labels.files import label_origin

    if settings.name is not None and len(settings.judges) > 1:
        raise UserError(f"--name {settings.name} names one label file, and there are {len(settings.judges)} judges; run each alone")
    if settings.name is not None:
        label_origin(settings.pairs, settings.name)  # refuses what cannot name a label file
    for key in ("batch", "shard", "workers"):
        if getattr(settings, key) != "auto" and getattr(settings, key) < 1:
            raise UserError(f"{key} is {getattr(settings, key)}; it must be at least 1")


def local_device(device: str | None) -> str | None:
    """This process's own GPU, where none is asked for and a launcher started one process for each."""
    local = os.environ.get("LOCAL_RANK")
    if device is not None or local is None:
        return device
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}" if torch.cuda.is_available() else None


# ---- what there is to do


def remove_parts(run: Run) -> None:
    """Tell other processes that all is done, and clean up."""
    run.mark.unlink(missing_ok=True)
    shutil.rmtree(run.parts, ignore_errors=True)


def is_done(run: Run, ids: list[str]) -> bool:
    """Whether this very label file is there already, whole.

    Raises:
        UserError: a file of that name holds other labels, or lacks answers that can no longer be added.
    """
    from dedpo_diffusion.labels.files import label_names, label_origin, read_labels

    dataset = run.folder.parent
    if run.judge.name not in label_names(dataset):
        return False
    held, made = read_labels(dataset, run.judge.name), label_origin(dataset, run.judge.name)
    versions = sorted({str(v) for v in held.extra.get("judge_version", ["no judge"])})
    if versions != [run.judge.version]:
        raise UserError(
            f"{run.path} holds labels of {', '.join(versions)}, not of {run.judge.version}; give another --name, or remove the file"
        )
    if made not in (None, run.origin) or not set(held.pair_id) <= set(ids):
        raise UserError(f"{run.path} labels other pairs than {dataset / 'pairs'} holds; give another --name, or remove the file")
    if held.pair_id != ids and not run.mark.is_file():
        gone = f"lacks {len(ids) - len(held.pair_id)} of {len(ids)} pairs, and {run.parts.name}, from which it would resume, is not there"
        raise UserError(f"{run.path} {gone}; bring that folder back, give another --name, or remove the file to label all pairs again")
    if run.embed:
        from dedpo_diffusion.labels.embedding_files import has_embeddings

        return held.pair_id == ids and has_embeddings(dataset, run.judge.name, run.stamp)
    return held.pair_id == ids


def embeds(settings: LabelSettings, judge: JudgeFacts) -> bool:
    """Whether this judge's embeddings are kept; a judge that has none is told of."""
    if settings.keep_embeddings and not judge.embeds:
        say(f"{judge.name} gives no embeddings of images; none are kept of it")
        return False
    return settings.keep_embeddings


def open_runs(settings: LabelSettings, judges: Sequence[JudgeFacts], reader: PairReader, ids: list[str]) -> list[Run]:
    """The judges' labels that are still to be made."""
    from dedpo_diffusion.core.locks import hold_lock
    from dedpo_diffusion.judges.label_worker import Run

    stamp = {"dataset": reader.fingerprint(), "shard size": str(settings.shard)}
    runs = []
    for judge in judges:
        run = Run(judge, settings.pairs / "labels", {"judge version": judge.version, **stamp}, embeds(settings, judge))
        done = is_done(run, ids)
        while not done and run not in runs:
            run.parts.mkdir(parents=True, exist_ok=True)
            with hold_lock(run.joining, wait=True) as held:  # not held: another process has just removed the folder
                if held and not (done := is_done(run, ids)):
                    take_up(run)
                    runs.append(run)
        if done:
            say(f"{run.path} is there already: {len(ids)} labels of {judge.version}")
            remove_parts(run)
    return runs


def take_up(run: Run) -> None:
    """Begin a judge's labels, or go on with them.

    Raises:
        UserError: another judge, dataset or shard size made what is there.
    """
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.judges.work import check_stamp, count_missing, read_part

    if run.embed:
        from dedpo_diffusion.labels.embedding_files import prepare

        prepare(run.folder.parent, run.judge.name, run.stamp)
    if run.mark.is_file():
        check_stamp(run.parts, json.loads(run.mark.read_text(encoding="utf-8")), run.stamp)
    else:
        write_json(run.mark, run.stamp)
    tables = {path: read_part(path, run.stamp) for path in sorted(run.parts.glob("shard-*.parquet"))}
    missing = {path: count_missing(table, failed_only=not run.path.is_file()) for path, table in tables.items()}
    run.retried = {path: path.stat().st_mtime_ns for path, count in missing.items() if count}


def shards_of(settings: LabelSettings, pairs: int, first: FirstUses | None) -> list[Shard]:
    """The pairs in shards that are kept as a whole."""
    from dedpo_diffusion.judges.label_worker import Shard

    rows = [range(start, min(pairs, start + settings.shard)) for start in range(0, pairs, settings.shard)]
    return [Shard(number, part, None if first is None else first.mask(part)) for number, part in enumerate(rows)]


# ---- which images come first


def first_uses(engine: Engine, reader: PairReader, fingerprint: str) -> FirstUses:
    """Where each image under its prompt comes first in the dataset of this fingerprint; keys are kept until the labels are done."""
    import numpy as np

    from dedpo_diffusion.judges.label_worker import KeysWorker
    from dedpo_diffusion.judges.work import FirstUses

    folder = reader.folder / "labels" / f".keys-{fingerprint[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{path.stem}.npy" for path in reader.shards]
    while True:
        todo = [shard for shard, path in enumerate(paths) if not path.is_file()]
        by = engine if sum(reader.shards[shard].stat().st_size for shard in todo) > HERE else LocalEngine()
        with Progress("looking for images in several pairs", len(reader)) as progress:
            for _, count in by.crew(_nothing, gpu=False).run(todo, partial(KeysWorker, reader.folder, paths)):
                progress.advance(count or 0)
        by.see([paths[shard] for shard in todo])
        try:
            return FirstUses(np.concatenate([np.load(path, allow_pickle=False) for path in paths]))
        except FileNotFoundError:  # another run was done with them and has removed them
            folder.mkdir(parents=True, exist_ok=True)


def _nothing() -> None:
    """What a worker loads that needs no model."""


# ---- judging


def judge_pairs(
    settings: LabelSettings, crew: Crew[Bench], judges: Sequence[JudgeFacts], runs: Sequence[Run], shards: Sequence[Shard], engine: Engine
) -> Clock:
    """Judge every shard that is not done."""
    from dedpo_diffusion.judges.label_worker import LabelWorker, Plan
    from dedpo_diffusion.models.memory import tell_cpu

    todo = [shard for shard in shards if any(run.is_pending(shard.number) for run in runs)]
    pairs, left, clock = sum(len(shard.rows) for shard in shards), sum(len(shard.rows) for shard in todo), Clock()
    if left < pairs:
        say(f"{pairs - left} of {pairs} pairs are labelled already; going on")
    slow = [run.judge.name for run in runs if run.judge.slow]
    if slow and not engine.many:
        tell_cpu(" and ".join(slow))
    plan, seen, began = Plan(settings, judges, runs, None if engine.many else left), set(), time.perf_counter()
    with Progress(f"labelling with {', '.join(run.judge.name for run in runs)}", pairs, start=pairs - left) as progress:
        for number, took in crew.run(todo, partial(LabelWorker, plan)):
            clock.add(took or Clock())
            if number not in seen:
                progress.advance(len(todo[number].rows))
            seen.add(number)
    if engine.many:
        engine.see([run.part(shard.number) for shard in todo for run in runs])
        clock.stretch(time.perf_counter() - began)
    return clock


# ---- the label files


@dataclass(frozen=True)
class Outcome:
    """Why answers are missing, one line a pair, and the tokens that all answers took, missing and repeated ones too."""

    gone: list[str]
    tokens: dict[str, int]


def write_label_file(run: Run, ids: list[str], first: FirstUses | None, shards: int) -> Outcome:
    """Join all shards into the label file.

    Raises:
        UserError: there is no answer at all.
    """
    import numpy as np

    from dedpo_diffusion.core.records import Labels
    from dedpo_diffusion.judges.judge import probability
    from dedpo_diffusion.judges.work import PART_COLUMNS, TOKENS, joined, read_part
    from dedpo_diffusion.labels.files import write_labels

    table = joined([read_part(run.part(shard), run.stamp) for shard in range(shards)])
    if run.judge.by_image:
        assert first is not None
        scores, missing = first.everywhere(table["score"].to_numpy()), [""] * len(ids)
    else:
        scores, missing = np.stack([table["score_0"].to_numpy(), table["score_1"].to_numpy()], axis=1), table["missing"].to_pylist()
    rows = [row for row, why in enumerate(missing) if not why]
    gone = [f"pair {pair_id}: {why}" for pair_id, why in zip(ids, missing, strict=True) if why]
    if not rows:
        raise UserError(f"{run.judge.name} answered none of the {len(ids)} pairs ({gone[0]}); mend that, and run the same command again")
    extra = {name: table[name].to_pylist() for name in table.column_names if name not in PART_COLUMNS}
    columns: dict[str, list[Any]] = {"score_0": scores[rows, 0].tolist(), "score_1": scores[rows, 1].tolist()}
    columns |= {"judge_version": [run.judge.version] * len(rows)}
    columns |= {name: [values[row] for row in rows] for name, values in extra.items()}
    labels = Labels([ids[row] for row in rows], probability(scores[rows], run.judge.temperature), columns)
    if run.embed and first is not None:
        from dedpo_diffusion.labels.embedding_files import write_uses

        write_uses(run.folder.parent, run.judge.name, first.places())
    write_labels(run.folder.parent, run.judge.name, labels, origin=run.origin)
    return Outcome(gone, {name: sum(count or 0 for count in table[name].to_pylist()) for name in TOKENS if name in table.column_names})


def finish(run: Run, ids: list[str], first: FirstUses | None, shards: int) -> Outcome | None:
    """Write the label file, unless another process does."""
    from dedpo_diffusion.core.locks import share_tasks

    outcome: Outcome | None = None

    def work(_: Run, __: list[str]) -> None:
        nonlocal outcome
        outcome = write_label_file(run, ids, first, shards)
        if not outcome.gone:
            remove_parts(run)

    for _ in share_tasks([run], pending=lambda _: {"join": run.joining} if outcome is None and run.mark.is_file() else {}, work=work):
        pass
    if outcome is None:
        say(f"{run.path}: joined by another process")
        return None
    gone = outcome.gone
    say(f"wrote {run.path}: {len(ids) - len(gone)} labels of {run.judge.version}")
    for line in gone[:SHOWN]:
        say(f"  no answer for {line}")
    if gone:
        say(f"{len(gone)} of {len(ids)} pairs have no answer of {run.judge.name}; the same command asks for them again")
    return outcome


def finish_all(runs: Sequence[Run], ids: list[str], first: FirstUses | None, shards: int) -> dict[str, Outcome | None]:
    """Write every judge's label file; None for those that another process writes.

    Raises:
        UserError: a judge without any answer, once the others' files are written.
    """
    outcomes: dict[str, Outcome | None] = {}
    errors = []
    for run in runs:
        try:
            outcomes[run.judge.name] = finish(run, ids, first, shards)
        except UserError as error:
            errors.append(error)
    folder = runs[0].folder
    if not any(folder.glob(".*.parts/unfinished")):  # nobody else needs them
        for keys in folder.glob(".keys-*"):
            shutil.rmtree(keys, ignore_errors=True)
    if errors:
        raise errors[0]
    return outcomes


def spending(judge: JudgeFacts, tokens: dict[str, int]) -> dict[str, Any]:
    """Tokens that a judge's answers took, and their price; nothing where the judge counts none."""
    return {**tokens, "cost": judge.cost(tokens["prompt_tokens"], tokens["answer_tokens"])} if tokens else {}


def run(settings: LabelSettings) -> list[Path]:
    """Label every pair of a dataset with machine judges."""
    from dedpo_diffusion.judges.label_worker import Bench, load_bench
    from dedpo_diffusion.labels.next_stage import next_stage
    from dedpo_diffusion.pairs.dataset import PairReader

    reader = PairReader(settings.pairs)
    ids = reader.ids()
    check_settings(settings)
    settings = replace(settings, device=local_device(settings.device))
    with open_engine(settings.engine, settings.ray, folders=[settings.pairs / "labels"], device=settings.device) as engine:
        crew = engine.crew(partial(load_bench, settings))
        settings, judges = crew.ask(Bench.facts)
        if settings.human in [judge.name for judge in judges]:
            raise UserError(f"{settings.human!r} is the human label file's name, and no judge may take it; give another --name")
        runs = open_runs(settings, judges, reader, ids)
        facts: dict[str, dict[str, Any]] = {judge.name: {} for judge in judges}
        if runs:
            first = first_uses(engine, reader, runs[0].stamp["dataset"]) if any(run.judge.by_image for run in runs) else None
            shards = shards_of(settings, len(reader), first)
            clock = judge_pairs(settings, crew, judges, runs, shards, engine)
            outcomes = finish_all(runs, ids, first, len(shards))
            for judge in judges:
                outcome = outcomes.get(judge.name, Outcome([], {}))
                if outcome is None:
                    del facts[judge.name]  # the other process tells of it
                elif judge.name in outcomes:
                    facts[judge.name] = clock.report(list(outcomes)) | spending(judge, outcome.tokens)
            if clock.pairs:
                say(clock.words())
    if settings.summary and facts:
        from dedpo_diffusion.judges.summary import summarise

        summarise(settings.pairs, list(facts), human=settings.human, extra=facts)
    say_next(*next_stage(settings.pairs, human=settings.human, judges=[judge.name for judge in judges]))
    return [settings.pairs / "labels" / f"{judge.name}.parquet" for judge in judges]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(LabelSettings, run, argv, prog="dedpo label", positional=("pairs",), flags={"with": "judges"})


if __name__ == "__main__":
    raise SystemExit(main())
