"""What a worker of `dedpo label` does: shards of pairs -> parts of label files, in whichever process.

The stage plans and joins; a worker loads the judges once, and judges shard after shard. It looks at the folder before it does one,
so a shard that is finished stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_file
from dedpo_diffusion.core.pace import Clock, Forecast
from dedpo_diffusion.core.prefetch import prefetch
from dedpo_diffusion.judges import registry
from dedpo_diffusion.judges.bradley_terry import BradleyTerry
from dedpo_diffusion.judges.journal import Journal
from dedpo_diffusion.judges.judge import Judge
from dedpo_diffusion.judges.work import Images, ImageWork, PairWork, Work, item_keys, read_part, write_part
from dedpo_diffusion.labels.embedding_files import shard_path, write_shard
from dedpo_diffusion.models.memory import resolved, slow_on_cpu
from dedpo_diffusion.pairs import decoding
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.settings import LabelSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from dedpo_diffusion.core.records import Pair


# ---- the judges


@dataclass(frozen=True)
class JudgeFacts:
    """What the stage must know of a judge that a worker has loaded.

    Attributes:
        name, version, temperature: as of `Judge`.
        by_image: it is made of a scorer, so that an image in several pairs of one prompt is seen once.
        embeds: its scorer gives the embeddings of images too.
        slow: a large model on a CPU.
        prices: of a million prompt tokens and of a million answer tokens.
    """

    name: str
    version: str
    temperature: float
    by_image: bool
    embeds: bool
    slow: bool
    prices: tuple[float, float]

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.prices[0] + answer_tokens * self.prices[1]) / 1e6


@dataclass(frozen=True)
class Bench:
    """The judges that a worker has loaded, and the settings with what `auto` stands for on its device."""

    settings: LabelSettings
    judges: Sequence[Judge]

    def facts(self) -> tuple[LabelSettings, list[JudgeFacts]]:
        """What the stage must know."""
        return self.settings, [_facts(judge) for judge in self.judges]


def _facts(judge: Judge) -> JudgeFacts:
    by_image = isinstance(judge, BradleyTerry)
    embeds = isinstance(judge, BradleyTerry) and judge.embeds
    prices = (judge.cost(1_000_000, 0), judge.cost(0, 1_000_000))
    return JudgeFacts(judge.name, judge.version, judge.temperature, by_image, embeds, slow_on_cpu(judge), prices)


def load_bench(settings: LabelSettings) -> Bench:
    """The judges that the settings name, all of them before any work is done.

    Raises:
        UserError: one that cannot be had, or two of one name.
    """
    settings = resolved(settings, most=registry.MOST)
    judges: list[Judge] = []
    for spec in settings.judges:
        judge = registry.load_judge(spec, settings)
        if judge.name in [earlier.name for earlier in judges]:
            raise UserError(f"two of the judges are called {judge.name}; run one of them alone, with another --name")
        judges.append(judge)
    if settings.name is not None:
        judges[0].name = settings.name
    return Bench(settings, judges)


# ---- what there is to do


@dataclass
class Run:
    """One judge's labels in the making.

    `stamp` identifies them; `retried` holds parts of an earlier run that lack answers, by file, with their time: they
    are asked again, once; `embed` asks for the images' embeddings too. Whoever makes or joins the folder of parts holds the lock `joining`.
    """

    judge: JudgeFacts
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
        return shard_path(self.folder.parent, self.judge.name, shard)

    def journal(self, shard: int) -> Path:
        """The answers to one shard that is not finished, or whose server failed on some pairs."""
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


@dataclass(frozen=True)
class Shard:
    """Some pairs that are kept as a whole.

    `first` is (n, 2) bool, the images that come first here, of `FirstUses.mask`; None where no judge is made of a scorer.
    """

    number: int
    rows: range
    first: np.ndarray | None = None

    def __str__(self) -> str:
        return f"pairs {self.rows.start} to {self.rows.stop - 1}"


# ---- workers


@dataclass(frozen=True)
class Plan:
    """What all shards share: the settings with what `auto` stands for, the judges' runs, and how many pairs are left, or None."""

    settings: LabelSettings
    judges: Sequence[JudgeFacts]
    runs: Sequence[Run]
    left: int | None = None


class LabelWorker:
    """Judges shards; see `core.engine.SharingWorker`.

    Args:
        plan: of the stage.
        bench: the judges that this process has loaded.

    Raises:
        UserError: they are not those of the plan.
    """

    def __init__(self, plan: Plan, bench: Bench) -> None:
        settings, judges = bench.facts()
        _check_alike(plan, settings, judges)
        self.settings, self.reader = settings, PairReader(settings.pairs)
        self.runs = {run.judge.name: run for run in plan.runs}
        self.judges = {judge.name: judge for judge in bench.judges}
        slow = any(run.judge.slow for run in plan.runs)
        self.forecast = Forecast(plan.left, after=int(settings.batch)) if slow and plan.left is not None else None

    def pending(self, shard: Shard) -> dict[str, Path]:
        """The judges that have not seen a shard, each with its lock."""
        return {name: run.lock(shard.number) for name, run in self.runs.items() if run.is_pending(shard.number)}

    def work(self, shard: Shard, names: list[str]) -> Clock:
        """Let these judges see a shard, and keep their answers; returns how long that took."""
        runs, clock = [self.runs[name] for name in names], Clock()
        clock.forecast = self.forecast
        works = [self._work_of(run, shard) for run in runs]
        tables = self._judged(shard.rows, works, clock)
        for run, table, done in zip(runs, tables, works, strict=True):
            if run.embed and isinstance(done, ImageWork):  # first, so that no shard counts as done without them
                write_shard(run.embedded(shard.number), done.embeddings())
            write_part(run.part(shard.number), table, run.stamp)
            if isinstance(done, PairWork):
                done.journal.settle(done.failed())
        clock.forecast = None
        return clock

    def _work_of(self, run: Run, shard: Shard) -> Work:
        judge, batch = self.judges[run.judge.name], int(self.settings.batch)
        if isinstance(judge, BradleyTerry):
            assert shard.first is not None
            return ImageWork(judge, shard.first, 2 * batch, embed=run.embed)
        part = run.part(shard.number)
        known = read_part(part, run.stamp) if part.is_file() else None
        journal = Journal(run.journal(shard.number)) if judge.keeps_answers else None
        return PairWork(judge, batch, known, journal=journal, failed_only=not run.path.is_file())

    def _judged(self, rows: range, works: Sequence[Work], clock: Clock) -> list[pa.Table]:
        """Every judge's answers to a shard of pairs; images are decoded in threads, once for all judges."""

        def load(item: tuple[int, Pair]) -> Images:
            place, pair = item
            wanted = [any(work.wants(place)[side] for work in works) for side in (0, 1)]
            where = self.reader.location(rows.start + place)
            images = [decoding.decode_image(getattr(pair, f"image_{s}"), f"{where} image_{s}") if wanted[s] else None for s in (0, 1)]
            return images[0], images[1]

        pairs = enumerate(islice(self.reader.iter_pairs(rows.start), len(rows)))
        stream = prefetch(pairs, load, workers=self.settings.workers, depth=int(self.settings.batch))
        for (place, pair), images in clock.awaited(stream):
            for work in works:
                work.take(place, pair, images)
        began = time.perf_counter()
        tables = [work.finish() for work in works]
        clock.working += time.perf_counter() - began
        return tables


def _check_alike(plan: Plan, settings: LabelSettings, judges: Sequence[JudgeFacts]) -> None:
    """Workers on other nodes judge as the first one does."""
    if settings.dtype != plan.settings.dtype:
        words = f"one computes in {settings.dtype}, another in {plan.settings.dtype}"
        raise UserError(f"the nodes of the cluster differ: {words}; give --dtype float32, or another that all of them have")
    for mine, planned in zip(judges, plan.judges, strict=True):
        if replace(mine, slow=planned.slow) != planned:
            raise UserError(f"the nodes of the cluster load different judges ({mine.version}, {planned.version}); give all the same files")


class KeysWorker:
    """Writes the keys of the images of files of pairs; see `core.engine.SharingWorker`.

    Args:
        pairs: the pair dataset.
        paths: where the keys of each of its files go.
    """

    def __init__(self, pairs: Path, paths: Sequence[Path], _: Any = None) -> None:
        self.reader, self.paths = PairReader(pairs), paths

    def pending(self, shard: int) -> dict[str, Path]:
        """The lock of a file whose keys are not there."""
        return {} if self.paths[shard].is_file() else {"keys": self.paths[shard].with_suffix(".lock")}

    def work(self, shard: int, _: list[str]) -> int:
        """Write the keys of a file; returns their number."""
        keys = item_keys(self.reader.shard_pairs(shard))
        with atomic_file(self.paths[shard]) as temporary, open(temporary, "wb") as file:
            np.save(file, keys)
        return len(keys)
