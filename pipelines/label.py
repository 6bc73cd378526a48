"""Machine labels for every pair of a dataset, by one or several judges.

    dedpo label pairs --with pickscore=FOLDER clip=ViT-L-14:openai
    accelerate launch --num_processes 4 pipelines/label.py pairs --with vlm=FOLDER

Writes `PAIRS/labels/NAME.parquet`: pair_id, label_0, score_0, score_1, judge_version, and what else a judge tells; with human
labels there, `NAME.json` and `NAME.png` say how the judge compares. Every few hundred pairs are kept in
`PAIRS/labels/.NAME.parts` until all are joined, so a stopped run goes on where it stopped. Processes and machines that run the
same command on the same folder share the pairs; they need not know of each other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.pace import Clock, Forecast
from dedpo_diffusion.settings import LabelSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.judges.judge import Judge
    from dedpo_diffusion.judges.work import FirstUses, Images, Work
    from dedpo_diffusion.pairs.dataset import PairReader

SHOWN = 3  # reasons for missing answers that are printed


def load_judges(settings: LabelSettings) -> list[Judge]:
    """The judges that the settings name, all of them before any work is done.

    Raises:
        UserError: one that cannot be had, or two of one name.
    """
    from dedpo_diffusion.judges.registry import load_judge
    from dedpo_diffusion.labels.files import label_origin

    if settings.name is not None and len(settings.judges) > 1:
        raise UserError(f"--name {settings.name} names one label file, and there are {len(settings.judges)} judges; run each alone")
    if settings.name is not None:
        label_origin(settings.pairs, settings.name)  # refuses what cannot name a label file
    for key in ("batch", "shard", "workers"):
        if getattr(settings, key) != "auto" and getattr(settings, key) < 1:
            raise UserError(f"{key} is {getattr(settings, key)}; it must be at least 1")
    judges = []
    for spec in settings.judges:
        judge = load_judge(spec, settings)
        if judge.name in [earlier.name for earlier in judges]:
            raise UserError(f"two of the judges are called {judge.name}; run one of them alone, with another --name")
        judges.append(judge)
    if settings.name is not None:
        judges[0].name = settings.name
    if settings.human in [judge.name for judge in judges]:
        raise UserError(f"{settings.human!r} is the human label file's name, and no judge may take it; give another --name")
    return judges


def local_device(device: str | None) -> str | None:
    """This process's own GPU, where none is asked for and a launcher started one process for each."""
    local = os.environ.get("LOCAL_RANK")
    if device is not None or local is None:
        return device
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}" if torch.cuda.is_available() else None


# ---- what there is to do


@dataclass
class Run:
    """One judge's labels in the making.

    `stamp` identifies them; `retried` holds parts of an earlier run that lack answers, by file, with their time: they
    are asked again, once; `embed` asks for the images' embeddings too. Whoever makes or joins the folder of parts holds the lock `joining`.
    """

    judge: Judge
    folder: Path
    stamp: dict[str, str]
    embed: bool = False
    retried: dict[Path, int] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The label file."""
        return self.folder / f"{self.judge.name}.parquet"

    @property
    def parts(self) -> Path:
        """Where finished shards are kept."""
        return self.folder / f".{self.judge.name}.parts"

    def part(self, shard: int) -> Path:
        """The file of one shard."""
        return self.parts / f"shard-{shard:06d}.parquet"

    def embedded(self, shard: int) -> Path:
        """The file of one shard's embeddings."""
        from dedpo_diffusion.labels.embedding_files import shard_path

        return shard_path(self.folder.parent, self.judge.name, shard)

    def journal(self, shard: int) -> Path:
        """The answers to one shard that is not finished."""
        return self.parts / f"answers-{shard:06d}.jsonl"

    def lock(self, shard: int) -> Path:
        """The lock of one shard."""
        return self.parts / f"shard-{shard:06d}.lock"

    @property
    def mark(self) -> Path:
        """A file that holds the stamp, and is there as long as the shards are not joined."""
        return self.parts / "unfinished"

    @property
    def joining(self) -> Path:
        """The lock of all shards together."""
        return self.parts / "join.lock"

    @property
    def origin(self) -> str:
        """What the finished file says of itself; the judge's version stands in its rows."""
        return f"dedpo label of dataset {self.stamp['dataset']}"

    def is_pending(self, shard: int) -> bool:
        """Whether nobody has finished this shard."""
        part = self.part(shard)
        if self.embed and not self.embedded(shard).is_file():
            return self.mark.is_file()
        try:
            return self.retried.get(part) == part.stat().st_mtime_ns
        except FileNotFoundError:
            return self.mark.is_file()

    def remove_parts(self) -> None:
        """Tell other processes that all is done, and clean up."""
        self.mark.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)


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


def embeds(settings: LabelSettings, judge: Judge) -> bool:
    """Whether this judge's embeddings are kept; a judge that has none is told of."""
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry

    if settings.keep_embeddings and not (isinstance(judge, BradleyTerry) and judge.embeds):
        say(f"{judge.name} gives no embeddings of images; none are kept of it")
        return False
    return settings.keep_embeddings


def open_runs(settings: LabelSettings, judges: Sequence[Judge], reader: PairReader, ids: list[str]) -> list[Run]:
    """The judges' labels that are still to be made."""
    from dedpo_diffusion.core.locks import hold_lock

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
            run.remove_parts()
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


def shard_rows(settings: LabelSettings, pairs: int) -> list[range]:
    """The rows of each shard of pairs that is kept as a whole."""
    return [range(start, min(pairs, start + settings.shard)) for start in range(0, pairs, settings.shard)]


# ---- which images come first


def first_uses(reader: PairReader, fingerprint: str) -> FirstUses:
    """Where each image under its prompt comes first in the dataset of this fingerprint; keys are kept until the labels are done."""
    import numpy as np

    from dedpo_diffusion.core.files import atomic_file
    from dedpo_diffusion.core.locks import share_tasks
    from dedpo_diffusion.judges.work import FirstUses, item_keys

    folder = reader.folder / "labels" / f".keys-{fingerprint[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{path.stem}.npy" for path in reader.shards]

    def work(shard: int, _: list[str]) -> None:
        keys = item_keys(reader.shard_pairs(shard))
        with atomic_file(paths[shard]) as temporary, open(temporary, "wb") as file:
            np.save(file, keys)
        progress.advance(len(keys))

    while True:
        with Progress("looking for images in several pairs", len(reader)) as progress:
            share_tasks(
                range(len(paths)),
                pending=lambda shard: {} if paths[shard].is_file() else {"keys": paths[shard].with_suffix(".lock")},
                work=work,
            )
        try:
            return FirstUses(np.concatenate([np.load(path, allow_pickle=False) for path in paths]))
        except FileNotFoundError:  # another run was done with them and has removed them
            folder.mkdir(parents=True, exist_ok=True)


# ---- judging


def judge_shard(settings: LabelSettings, reader: PairReader, rows: range, works: Sequence[Work], clock: Clock) -> list[pa.Table]:
    """Every judge's answers to a shard of pairs; images are decoded in threads, once for all judges."""
    from dedpo_diffusion.core.prefetch import prefetch
    from dedpo_diffusion.pairs.decoding import decode_image

    def load(item: tuple[int, Pair]) -> Images:
        place, pair = item
        wanted = [any(work.wants(place)[side] for work in works) for side in (0, 1)]
        where = reader.location(rows.start + place)
        images = [decode_image(getattr(pair, f"image_{s}"), f"{where} image_{s}") if wanted[s] else None for s in (0, 1)]
        return images[0], images[1]

    pairs = enumerate(islice(reader.iter_pairs(rows.start), len(rows)))
    stream = prefetch(pairs, load, workers=settings.workers, depth=int(settings.batch))
    for (place, pair), images in clock.awaited(stream):
        for work in works:
            work.take(place, pair, images)
    began = time.perf_counter()
    tables = [work.finish() for work in works]
    clock.working += time.perf_counter() - began
    return tables


def judge_pairs(settings: LabelSettings, reader: PairReader, runs: Sequence[Run], first: FirstUses | None) -> Clock:
    """Judge every shard that is not done, sharing them with other processes."""
    from dedpo_diffusion.core.locks import share_tasks
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry
    from dedpo_diffusion.judges.journal import Journal
    from dedpo_diffusion.judges.work import ImageWork, PairWork, read_part, write_part
    from dedpo_diffusion.labels.embedding_files import write_shard
    from dedpo_diffusion.models.memory import slow_on_cpu, tell_cpu

    rows, by_name, clock = shard_rows(settings, len(reader)), {run.judge.name: run for run in runs}, Clock()
    slow = [run.judge.name for run in runs if slow_on_cpu(run.judge)]

    def pending(shard: int) -> dict[str, Path]:
        return {name: run.lock(shard) for name, run in by_name.items() if run.is_pending(shard)}

    def work_of(run: Run, shard: int) -> Work:
        if isinstance(run.judge, BradleyTerry):
            assert first is not None
            return ImageWork(run.judge, first.mask(rows[shard]), 2 * int(settings.batch), embed=run.embed)
        part = run.part(shard)
        known = read_part(part, run.stamp) if part.is_file() else None
        journal = Journal(run.journal(shard)) if run.judge.keeps_answers else None
        return PairWork(run.judge, int(settings.batch), known, journal=journal, failed_only=not run.path.is_file())

    def work(shard: int, names: list[str]) -> None:
        mine = [by_name[name] for name in names]
        works = [work_of(run, shard) for run in mine]
        tables = judge_shard(settings, reader, rows[shard], works, clock)
        for run, table, done in zip(mine, tables, works, strict=True):
            if run.embed and isinstance(done, ImageWork):  # first, so that no shard counts as done without them
                write_shard(run.embedded(shard), done.embeddings())
            write_part(run.part(shard), table, run.stamp)
            if isinstance(done, PairWork):
                done.journal.remove()
        progress.advance(len(rows[shard]))

    todo = [shard for shard in range(len(rows)) if pending(shard)]
    kept = len(reader) - sum(len(rows[shard]) for shard in todo)
    if kept:
        say(f"{kept} of {len(reader)} pairs are labelled already; going on")
    if slow:
        tell_cpu(" and ".join(slow))
        clock.forecast = Forecast(len(reader) - kept, after=int(settings.batch))
    with Progress(f"labelling with {', '.join(by_name)}", len(reader), start=kept) as progress:
        share_tasks(todo, pending=pending, work=work)
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
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry
    from dedpo_diffusion.judges.judge import probability
    from dedpo_diffusion.judges.work import PART_COLUMNS, TOKENS, joined, read_part
    from dedpo_diffusion.labels.files import write_labels

    table = joined([read_part(run.part(shard), run.stamp) for shard in range(shards)])
    if isinstance(run.judge, BradleyTerry):
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
            run.remove_parts()

    share_tasks([run], pending=lambda _: {"join": run.joining} if outcome is None and run.mark.is_file() else {}, work=work)
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


def spending(judge: Judge, tokens: dict[str, int]) -> dict[str, Any]:
    """Tokens that a judge's answers took, and their price; nothing where the judge counts none."""
    return {**tokens, "cost": judge.cost(tokens["prompt_tokens"], tokens["answer_tokens"])} if tokens else {}


def run(settings: LabelSettings) -> list[Path]:
    """Label every pair of a dataset with machine judges."""
    from dedpo_diffusion.judges.bradley_terry import BradleyTerry
    from dedpo_diffusion.judges.registry import MOST
    from dedpo_diffusion.labels.next_stage import next_stage
    from dedpo_diffusion.models.memory import resolved
    from dedpo_diffusion.pairs.dataset import PairReader

    reader = PairReader(settings.pairs)
    ids = reader.ids()
    settings = resolved(replace(settings, device=local_device(settings.device)), most=MOST)
    judges = load_judges(settings)
    runs = open_runs(settings, judges, reader, ids)
    facts: dict[str, dict[str, Any]] = {judge.name: {} for judge in judges}
    if runs:
        first = first_uses(reader, runs[0].stamp["dataset"]) if any(isinstance(run.judge, BradleyTerry) for run in runs) else None
        clock = judge_pairs(settings, reader, runs, first)
        outcomes = finish_all(runs, ids, first, len(shard_rows(settings, len(reader))))
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
