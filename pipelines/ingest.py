"""Read a public preference format into a pair dataset.

    dedpo ingest pickapic pick-a-pic-v2/data --out pairs

Writes `OUT/pairs/*.parquet`, `OUT/labels/human.parquet` and `OUT/ingest.json`; OUT appears when all of it is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dedpo_diffusion.console import Progress, UserError, say, stage
from dedpo_diffusion.settings import IngestSettings

SEEN = {"ties": "ties", "unlabelled": "pairs that nobody judged", "identical": "pairs of one image with itself"}


def _check_out(settings: IngestSettings) -> None:
    if settings.out.is_file() or (settings.out.is_dir() and any(settings.out.iterdir())):
        raise UserError(f"{settings.out} exists and is not an empty folder; choose another --out, or remove it first")


def count_lines(counts: Counter[str]) -> Iterator[str]:
    """What was kept, dropped and why, one line each."""
    yield f"rows read: {counts['rows']}"
    for kind, words in SEEN.items():
        dropped = counts[f"{kind}_dropped"]
        yield f"{words}: {counts[kind]} (dropped {dropped})"
    yield f"pairs with an unreadable image: {counts['unreadable_dropped']} dropped"
    yield f"pairs kept: {counts['kept']}, {counts['labelled']} of them with a human label"


def _human_labels(answers: list[tuple[str, float, Any]]) -> Any:
    """The answers as a label file, with the rater where the source names one."""
    import numpy as np

    from dedpo_diffusion.records import Labels

    raters = [None if rater is None else str(rater) for _, _, rater in answers]
    extra = {"rater": raters} if any(rater is not None for rater in raters) else {}
    return Labels([pair_id for pair_id, _, _ in answers], np.array([label for _, label, _ in answers], dtype=np.float64), extra)


def run(settings: IngestSettings) -> None:
    """Read a public preference format into a pair dataset."""
    from dedpo_diffusion.files import atomic_folder, write_json
    from dedpo_diffusion.formats import importer
    from dedpo_diffusion.labels import write_labels
    from dedpo_diffusion.pairs import PairWriter

    _check_out(settings)
    source = importer(settings.format)
    counts: Counter[str] = Counter()
    answers: list[tuple[str, float, Any]] = []
    with atomic_folder(settings.out) as folder, Progress("reading rows", source.rows(settings.source)) as progress:
        with PairWriter(folder, shard_pairs=settings.shard_pairs) as writer:
            for pair, label in source.read(settings.source, settings, counts):
                writer.add(pair)
                if label is not None:
                    answers.append((pair.pair_id, label, pair.source.get("user_id")))
                progress.advance(counts["rows"] - progress.done)
            if not counts["kept"]:
                raise UserError(f"no pair of {settings.source} was kept: " + "; ".join(count_lines(counts)))
        if answers:
            write_labels(folder, "human", _human_labels(answers))
        record = {"format": settings.format, "source": str(settings.source), "counts": dict(sorted(counts.items()))}
        write_json(folder / "ingest.json", record)
    for line in count_lines(counts):
        say(line)
    say(f"wrote {settings.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(IngestSettings, run, argv, prog="dedpo ingest", positional=("format", "source"))


if __name__ == "__main__":
    raise SystemExit(main())
