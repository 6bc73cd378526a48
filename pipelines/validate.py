"""Say what a pair dataset holds, and what training would trip over.

    dedpo validate pairs
    dedpo validate pairs --depth headers        # without decoding every image and looking for near-duplicates

Writes `PAIRS/validate.json`, and `validate.html` with pictures beside it. Exit code 2 if something is wrong, 0 if
something is merely odd. A stopped run goes on after the last whole shard; shards that have not changed are not read again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import Progress, UserError, say, say_next, stage
from dedpo_diffusion.core.engine import open_engine
from dedpo_diffusion.settings import ValidateSettings

if TYPE_CHECKING:
    from dedpo_diffusion.pairs.prompt_tokens import TokenCounter

NAMED = 10  # errors that the last message names


def _check(settings: ValidateSettings) -> None:
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"workers is {settings.workers}; it must be at least 1")
    if not 0 <= settings.near <= 16:
        raise UserError(f"near is {settings.near}; it must be from 0 (equal hashes) to 16 of 64 bits")


def _stat(stat: dict[str, Any], digits: int = 3) -> str:
    if stat["value"] is None:
        return "-"
    interval = "" if stat["ci"] is None else f" ({stat['ci'][0]:.{digits}f} to {stat['ci'][1]:.{digits}f})"
    return f"{stat['value']:.{digits}f}{interval}"


def table_rows(report: dict[str, Any], pairs: str) -> Iterator[tuple[str, str]]:
    """The report on the dataset `pairs` in two columns, most needed first."""
    from dedpo_diffusion.labels.files import label_names

    prompts, images, duplicates = report["prompts"], report["images"], report["duplicates"]
    files = "1 file" if report["shards"] == 1 else f"{report['shards']} files"
    yield "pairs", f"{report['pairs']} in {files}, {images['bytes'] / 2**20:.1f} MiB of images"
    yield "prompts", f"{prompts['unique']} different"
    tokens = f"{prompts['mean_tokens']:.1f} on average, {prompts['most_tokens']} at most"
    yield f"tokens of {prompts['tokens_of']}, which reads {prompts['tokens_read']}", f"{tokens}; {prompts['cut']} prompts are cut off"
    yield "image kinds", ", ".join(f"{kind} {n}" for kind, n in images["formats"].items()) or "-"
    shown = ", ".join(f"{size['width']}x{size['height']} ({size['images']})" for size in images["sizes"][:4])
    yield "image sizes", f"{images['distinct_sizes']} different: {shown}"
    yield "pairs of two sizes, of two shapes", f"{images['pairs_of_two_sizes']}, {images['pairs_of_two_shapes']}"
    yield "one image twice, pair again", f"{duplicates['one_image_twice']}, {duplicates['repeated_pairs']}"
    yield "images in several pairs", f"{duplicates['images_in_several_pairs']} of {duplicates['distinct_images']} different files"
    if "near_duplicates" in report:
        near = report["near_duplicates"]
        yield f"near-duplicates (<= {near['distance']} of 64 bits)", f"{near['within_pairs']} pairs, {near['groups']} groups of images"
    if not label_names(Path(pairs)):
        yield "labels", f"none; run `dedpo vote {pairs}`"
    for name, label in report.get("labels", {}).items():
        counts = f"{label['labelled']} pairs ({label['share']:.0%}), image 0 wins {_stat(label['image_0_share'])}, {label['ties']} ties"
        yield f"labels/{name}", counts
    for name, judge in report.get("judges", {}).items():
        yield f"{name} agrees with people", f"{_stat(judge)} of {judge['n']} pairs"
    if "targets" in report:
        yield "targets", ", ".join(report["targets"]) or "none"


def print_report(report: dict[str, Any], title: str) -> None:
    """The report as a table, what the votes say, and what is odd."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found (95 % intervals)", title=title)
    for words, value in table_rows(report, title):
        table.add_row(words, value)
    Console().print(table)
    for name, votes in report.get("votes", {}).items():
        say(f"votes/{name}: {votes['n_votes']} answers on {votes['n_pairs']} pairs, {votes['n_ties']} ties")
        for sentence in votes["sentences"]:
            say(f"  {sentence}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")


def _complain(pairs: Path, errors: list[str], page: Path) -> None:
    named = "".join(f"\n  {error}" for error in errors[:NAMED])
    rest = f"\n  and {len(errors) - NAMED} more, in {page}" if len(errors) > NAMED else ""
    raise UserError(f"{pairs}: {len(errors)} things are wrong:{named}{rest}")


def _counter(model: str | None) -> TokenCounter:
    """What counts the tokens of prompts: the tokenizers of the model that is to be trained, else CLIP's."""
    from dedpo_diffusion.pairs.prompt_tokens import clip_counter

    if model is None:
        return clip_counter()
    from dedpo_diffusion.models.prompt_tokens import model_counter

    return model_counter(model)


def run(settings: ValidateSettings) -> dict[str, Any]:
    """Check a pair dataset, its labels and votes, and say what is wrong with it."""
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.inspection.findings import look
    from dedpo_diffusion.pairs.inspection.page import write_overview
    from dedpo_diffusion.pairs.inspection.scan import scan_dataset

    _check(settings)
    counter = _counter(settings.model)
    reader = PairReader(settings.pairs)
    if not len(reader):
        raise UserError(f"{settings.pairs / 'pairs'} holds no pair; make the dataset again")
    workers = settings.workers or os.cpu_count() or 1
    with (
        open_engine(settings.engine, settings.ray, folders=[reader.folder]) as engine,
        Progress("looking at pairs", len(reader)) as progress,
    ):
        scan = scan_dataset(reader, settings.depth, workers=workers, advance=progress.advance, engine=engine)
    found = look(
        reader, scan, depth=settings.depth, human=settings.human, near=settings.near, resamples=settings.resamples, seed=settings.seed,
        counter=counter,
    )  # fmt: skip
    out = settings.out or settings.pairs / "validate.json"
    write_json(out, found.report)
    page = write_overview(out.with_suffix(".html"), reader, found.report, human=settings.human, seed=settings.seed)
    print_report(found.report, f"{settings.pairs}")
    say(f"wrote {out} and {page.name}")
    if found.errors:
        _complain(settings.pairs, found.errors, out)
    _say_next(settings)
    return found.report


def _say_next(settings: ValidateSettings) -> None:
    """The training on targets that are there already, or the first stage that is missing before it."""
    from dedpo_diffusion.core.defaults import DEFAULT_METHOD
    from dedpo_diffusion.labels.files import target_names
    from dedpo_diffusion.labels.next_stage import next_stage, train_words

    targets = target_names(settings.pairs)
    name = DEFAULT_METHOD if DEFAULT_METHOD in targets else next(iter(targets), None)
    say_next(*(next_stage(settings.pairs, human=settings.human) if name is None else train_words(settings.pairs, name)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(ValidateSettings, run, argv, prog="dedpo validate", positional=("pairs",))


if __name__ == "__main__":
    raise SystemExit(main())
