"""Read a preference format into a pair dataset.

    dedpo ingest auto my-pairs.csv --out pairs
    dedpo ingest pickapic pick-a-pic-v2/data --out pairs

Writes `OUT/pairs/*.parquet`, `OUT/labels/human.parquet`, `OUT/votes/human.parquet` where the source knows single votes,
and `OUT/ingest.json`. OUT appears when all of it is done; until then the work lies in `.OUT.partial` beside it, and the
same command goes on after the last whole shard.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.settings import IngestSettings

if TYPE_CHECKING:
    from dedpo_diffusion.pairs.formats.importing import Journal, Ledger

SHAPES_NOTHING = ("out", "unreadable", "workers")  # settings that may change when an interrupted import goes on


def _check_out(settings: IngestSettings) -> None:
    if settings.out.is_file() or (settings.out.is_dir() and any(settings.out.iterdir())):
        raise UserError(f"{settings.out} exists and is not an empty folder; choose another --out, or remove it first")
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"workers is {settings.workers}; it must be at least 1")


def _identity(settings: IngestSettings, name: str, fingerprint: str) -> dict[str, Any]:
    """What an interrupted import must share with the one that goes on."""
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key not in SHAPES_NOTHING}
    return {"format": name, "fingerprint": fingerprint, "settings": {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}}


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name."""
    shutil.rmtree(partial / "journal")
    if out.is_dir():
        out.rmdir()  # empty, as checked
    os.replace(partial, out)


def _take_up(settings: IngestSettings, partial: Path, identity: dict[str, Any]) -> tuple[Journal, Ledger]:
    """The journal and ledger of an interrupted import of the same source with the same settings, or new ones."""
    from dedpo_diffusion.pairs.formats.importing import Journal, Ledger

    journal = Journal(partial, identity)
    done = journal.shards()
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
        journal.begin()
        return journal, Ledger()
    ledger = journal.read(done)
    say(f"resuming after {ledger.counts['kept']} pairs in {partial}")
    return journal, ledger


def run(settings: IngestSettings) -> Path:
    """Read a preference format into a pair dataset."""
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.pairs.formats import choose
    from dedpo_diffusion.pairs.formats.importing import count_lines, shuffles, take_in

    _check_out(settings)
    chosen = choose(settings)
    say(f"{settings.source} is read as {'a ' * (chosen.name == 'table')}{chosen.name}: {chosen.why}")
    out = settings.out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    identity = _identity(settings, chosen.name, chosen.source.fingerprint)
    journal, ledger = _take_up(settings, partial, identity)
    try:
        with Progress("reading rows", chosen.source.count, start=ledger.place.row) as progress:
            take_in(chosen, settings, partial, journal, ledger, progress.advance)
    except BaseException:
        if journal.shards():
            say(f"what is done stays in {partial}; give the same command again to resume")
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    record = {
        "why": chosen.why,
        "sides_shuffled": shuffles(chosen),
        "counts": dict(sorted(ledger.counts.items())),
        "dropped": ledger.dropped,
    }
    write_json(partial / "ingest.json", {**identity, **record})
    _publish(partial, out)
    for line in count_lines(ledger.counts, ledger.dropped):
        say(line)
    if record["sides_shuffled"]:
        say(f"the source lists the preferred image first: {ledger.counts['sides_swapped']} pairs had their sides swapped")
    say(f"wrote {settings.out}")
    say_next("validate", settings.out)
    return settings.out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(IngestSettings, run, argv, prog="dedpo ingest", positional=("format", "source"))


if __name__ == "__main__":
    raise SystemExit(main())
