"""Machine labels for every pair of a dataset.

    dedpo label pairs --with pickscore=FOLDER

Writes `PAIRS/labels/NAME.parquet`: pair_id, label_0, score_0, score_1, judge_version. Each finished shard is kept in
`PAIRS/labels/.NAME.parts` until all are joined, so a stopped run goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import Progress, UserError, say, stage
from dedpo_diffusion.settings import LabelSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.annotators.bradley_terry import BradleyTerry
    from dedpo_diffusion.pairs import PairReader


def load_judge(settings: LabelSettings) -> BradleyTerry:
    """The judge that the settings name; its `version` covers weights and temperature."""
    from dedpo_diffusion.annotators.bradley_terry import BradleyTerry
    from dedpo_diffusion.scorers import load_scorer

    return BradleyTerry(load_scorer(settings.judge, device=settings.device, batch=2 * settings.batch), temperature=settings.temperature)


def is_done(settings: LabelSettings, name: str, version: str, ids: list[str]) -> bool:
    """Whether this very label file is there already.

    Raises:
        UserError: a file of that name holds other labels.
    """
    from dedpo_diffusion.labels import label_names, read_labels

    if name not in label_names(settings.pairs):
        return False
    held, path = read_labels(settings.pairs, name), settings.pairs / "labels" / f"{name}.parquet"
    versions = sorted({str(v) for v in held.extra.get("judge_version", ["no judge"])})
    if versions != [version]:
        raise UserError(f"{path} holds labels of {', '.join(versions)}, not of {version}; give another --name, or remove the file")
    if held.pair_id != ids:
        raise UserError(f"{path} labels other pairs than {settings.pairs / 'pairs'} holds; give another --name, or remove the file")
    return True


def score_shard(judge: BradleyTerry, reader: PairReader, shard: int, batch: int, progress: Progress) -> tuple[list[str], np.ndarray]:
    """The pair_ids and the raw scores (N, 2) of one shard."""
    import numpy as np

    ids: list[str] = []
    scores = []
    for pairs, places in _batches(reader, shard, batch):
        scores.append(judge.scores([p.prompt for p in pairs], *_images(pairs, places)))
        ids += [p.pair_id for p in pairs]
        progress.advance(len(pairs))
    return ids, np.concatenate([np.empty((0, 2)), *scores])


def _batches(reader: PairReader, shard: int, batch: int) -> Iterator[tuple[list[Any], list[str]]]:
    """Pairs and their places (file and row), `batch` at a time."""
    first, stream = sum(reader.counts[:shard]), reader.shard_pairs(shard)
    while pairs := list(islice(stream, batch)):
        yield pairs, [reader.location(first + i) for i in range(len(pairs))]
        first += len(pairs)


def _images(pairs: list[Any], places: list[str]) -> tuple[list[Any], list[Any]]:
    from dedpo_diffusion.decoding import decode_image

    def side(name: str) -> list[Any]:
        return [decode_image(getattr(pair, name), f"{place} {name}") for pair, place in zip(pairs, places, strict=True)]

    return side("image_0"), side("image_1")


def write_part(path: Path, ids: list[str], scores: np.ndarray, stamp: dict[str, str]) -> None:
    """Keep a finished shard; `stamp` says which judge scored which pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dedpo_diffusion.files import atomic_file

    table = pa.table({"pair_id": pa.array(ids, pa.string()), "score_0": scores[:, 0], "score_1": scores[:, 1]})
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(stamp), temporary)


def read_part(path: Path, stamp: dict[str, str]) -> tuple[list[str], np.ndarray]:
    """The pair_ids and the raw scores (N, 2) of a finished shard.

    Raises:
        UserError: another judge, temperature or dataset made it.
    """
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    held = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    for key, value in stamp.items():
        if held.get(key) != value:
            raise UserError(
                f"{path.parent} holds unfinished labels of another {key} ({held.get(key)}, now {value}): "
                "finish them with the same settings, give another --name, or remove that folder"
            )
    return table["pair_id"].to_pylist(), np.stack([table["score_0"].to_numpy(), table["score_1"].to_numpy()], axis=1)


def score_pairs(settings: LabelSettings, judge: BradleyTerry, reader: PairReader, parts: Path) -> tuple[list[str], np.ndarray]:
    """The pair_ids and raw scores (N, 2) of all shards; finished shards are read, not scored again."""
    import numpy as np

    stamp = {"judge version": judge.version, "dataset": reader.fingerprint()}
    paths = [parts / f"{path.stem}.parquet" for path in reader.shards]
    done = {path: read_part(path, stamp) for path in paths if path.is_file()}
    kept = sum(len(ids) for ids, _ in done.values())
    if kept:
        say(f"{kept} of {len(reader)} pairs are labelled already; going on")
    with Progress("labelling", len(reader), start=kept) as progress:
        for shard, path in enumerate(paths):
            if path not in done:
                done[path] = score_shard(judge, reader, shard, settings.batch, progress)
                write_part(path, *done[path], stamp)
    return [pair_id for path in paths for pair_id in done[path][0]], np.concatenate([done[path][1] for path in paths])


def run(settings: LabelSettings) -> Path:
    """Label every pair of a dataset with a machine judge."""
    from dedpo_diffusion.labels import write_labels
    from dedpo_diffusion.pairs import PairReader
    from dedpo_diffusion.records import Labels

    reader = PairReader(settings.pairs)
    expected = reader.ids()
    if settings.batch < 1:
        raise UserError(f"batch is {settings.batch}; it must be at least 1")
    if settings.name is not None and (settings.name != Path(settings.name).name or settings.name.startswith(".")):
        raise UserError(f"--name {settings.name!r} cannot name a label file; use letters, digits, - and _")
    judge = load_judge(settings)
    name = settings.name or judge.name
    path, parts = settings.pairs / "labels" / f"{name}.parquet", settings.pairs / "labels" / f".{name}.parts"
    if is_done(settings, name, judge.version, expected):
        say(f"{path} is there already: {len(reader)} labels of {judge.version}")
    else:
        ids, scores = score_pairs(settings, judge, reader, parts)
        extra = {"score_0": scores[:, 0].tolist(), "score_1": scores[:, 1].tolist(), "judge_version": [judge.version] * len(ids)}
        write_labels(settings.pairs, name, Labels(ids, judge.probability(scores), extra))
        say(f"wrote {path}: {len(ids)} labels of {judge.version}")
    shutil.rmtree(parts, ignore_errors=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(LabelSettings, run, argv, prog="dedpo label", positional=("pairs",), flags={"with": "judge"})


if __name__ == "__main__":
    raise SystemExit(main())
