"""Write a pair dataset for annotation tools and other programs, or send it to a hub; `dedpo ingest auto` reads each of these back.
Or join several datasets.

    dedpo pairs export pairs --to labelstudio --out for-label-studio
    dedpo pairs export pairs --to argilla --out for-argilla --fields html
    dedpo pairs export pairs --to datasets --out as-dataset
    dedpo pairs push pairs OWNER/NAME --private true
    dedpo pairs join pairs --others more-pairs --out all-pairs

For annotation tools the sides are shuffled, and each task remembers which image stands on the left. What people have said so far
goes along and comes back with the new answers; `--human null` leaves it out. OUT appears when all of it is done.

What is pushed is listed first, and holds no path or name of this machine, no metadata of images, and a number for each person.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError, say, say_next, stage, track
from dedpo_diffusion.settings import PairsSettings

TOOLS = ("labelstudio", "argilla")
OF_PUSH = {"repository": None, "private": False, "raters": "numbers", "without": [], "license": None, "dry_run": False}
OF_EXPORT = {"to": None, "images": "auto", "root": None, "fields": "image"}
OF_JOIN: dict[str, Any] = {"others": []}
OF = {"push": OF_PUSH, "export": OF_EXPORT, "join": OF_JOIN}  # options that one action has alone, and what they are by themselves


def check(settings: PairsSettings) -> None:
    """See to it that what was asked for can be meant; UserError names the option."""
    for action, options in OF.items():
        strange = next((name for name, usual in options.items() if action != settings.action and getattr(settings, name) != usual), None)
        if strange is not None:
            shown = strange.upper() if strange == "repository" else f"--{strange}"
            raise UserError(f"{shown} is for `dedpo pairs {action}`; leave it out")
    needed: dict[str, Any] = {
        "push": {"OWNER/NAME": settings.repository},
        "export": {"--to": settings.to, "--out": settings.out},
        "join": {"--others": settings.others or None, "--out": settings.out},
    }[settings.action]
    missing = [name for name, given in needed.items() if given is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: `dedpo pairs {settings.action}` needs it")
    out = settings.out
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"{out} exists and is not an empty folder; choose another --out, or remove it first")
    if settings.action == "export":
        check_tool(settings)


def check_tool(settings: PairsSettings) -> None:
    """The same for options of annotation tools."""
    if settings.images != "auto" and settings.to not in TOOLS:
        raise UserError(f"--images is for labelstudio, and {settings.to} has one way to hold images; leave it out")
    if settings.images == "files" and settings.to == "argilla":
        raise UserError("--images files is for labelstudio: Argilla keeps images inside its records; leave it out")
    if settings.root is not None and (settings.to != "labelstudio" or settings.images == "data"):
        raise UserError("--root is for --to labelstudio with images as files; leave it out")
    if settings.fields != "image" and settings.to != "argilla":
        raise UserError(f"--fields {settings.fields} is for --to argilla; leave it out")


def writer_of(name: str) -> Callable[..., list[str]]:
    """What writes this layout."""
    from dedpo_diffusion.pairs.exporting import argilla, labelstudio, tables

    return {
        "labelstudio": labelstudio.write,
        "argilla": argilla.write,
        "datasets": tables.write_datasets,
        "imagefolder": tables.write_imagefolder,
        "csv": tables.write_csv,
    }[name]


def answers_for(settings: PairsSettings) -> dict[str, Any]:
    """What people said so far, by pair; says what stays behind."""
    from dedpo_diffusion.labels.files import label_names, vote_names
    from dedpo_diffusion.pairs.exporting.rows import answers_of

    if settings.human is None:
        return {}
    if settings.human == "human" and "human" not in (*label_names(settings.pairs), *vote_names(settings.pairs)):
        say("nobody has answered yet: the pairs go out without labels")
        return {}
    found, left_out = answers_of(settings.pairs, settings.human)
    for line in left_out:
        say(line)
    return found


def read(settings: PairsSettings) -> tuple[Any, dict[str, Any]]:
    """The reader of the pairs, and what people said of each.

    Raises:
        UserError: an answer about a pair that is not there.
    """
    from dedpo_diffusion.pairs.dataset import PairReader

    reader = PairReader(settings.pairs)
    answers = answers_for(settings)
    unknown = sorted(answers.keys() - set(reader.ids()))
    if unknown:
        raise UserError(f"{settings.pairs}: {settings.human} has an answer about {unknown[0]!r}, which is none of the pairs; remove it")
    return reader, answers


def export(settings: PairsSettings) -> Path:
    """Write the pairs into a folder; returns it."""
    from dedpo_diffusion.core.files import atomic_folder
    from dedpo_diffusion.pairs.exporting.rows import items

    assert settings.to is not None  # or `check` had refused
    reader, answers = read(settings)
    with atomic_folder(settings.folder) as folder:
        to_do = writer_of(settings.to)(track(items(reader, answers), "writing pairs", len(reader)), settings, folder)
    votes = sum(one.votes for said in answers.values() for one in said)
    say(f"wrote {settings.out}: {len(reader)} pairs, {len(answers)} of them with a label from {votes} votes")
    for line in to_do:
        say(line)
    if settings.to == "labelstudio":
        images = [] if settings.images == "data" else ["--images", settings.root or settings.folder]
        say_next("ingest", "labelstudio", "EXPORT.json", *images, "--out", "PAIRS")
    else:
        say_next("ingest", "auto", "answers" if settings.to == "argilla" else settings.out, "--out", "PAIRS")
    return settings.folder


def join_datasets(settings: PairsSettings) -> Path:
    """One dataset of several; returns its folder."""
    from dedpo_diffusion.core.files import atomic_folder
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.joining import join

    with atomic_folder(settings.folder) as folder:
        told = join([settings.pairs, *settings.others], folder, human=settings.human or "human")
    say(f"wrote {settings.out}: {len(PairReader(settings.folder))} pairs of {1 + len(settings.others)} datasets")
    for line in told:
        say(line)
    say_next("merge", settings.folder)
    return settings.folder


# ---- to a hub


def push(settings: PairsSettings) -> str:
    """Send the pairs to a hub of data sets; returns the address there.

    Raises:
        UserError: nobody is logged in, something tells of this machine, or the upload breaks off.
    """
    from dedpo_diffusion.weights import hub

    assert settings.repository is not None  # or `check` had refused
    if not settings.dry_run:
        hub.check_target(settings.repository, "dedpo pairs push")
    to = hub.Repository(settings.repository, "dataset")
    with prepared(settings) as folder:
        parcels = [hub.Parcel(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*")) if file.is_file()]
        if settings.dry_run:
            hub.announce(to, parcels, "nothing is sent, as --dry_run asks")
        else:
            hub.push(to, parcels, private=settings.private, title="pairs", replaces="data/train-*.parquet")
    if settings.out is not None:
        say(f"the same files are in {settings.out}")
    say_next("ingest", "auto", settings.repository, "--out", "PAIRS")
    return to.address


@contextmanager
def prepared(settings: PairsSettings) -> Iterator[Path]:
    """The folder as it is sent: OUT, or one beside the pairs that is removed again."""
    from dedpo_diffusion.core.files import atomic_folder

    folder = settings.out or settings.pairs / ".push"
    if settings.out is None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier push that was killed
    try:
        with atomic_folder(folder) as temporary:
            prepare(settings, temporary)
        yield folder
    finally:
        if settings.out is None:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(settings: PairsSettings, folder: Path) -> None:
    """Write the files to send into `folder`, and say what of the pairs goes and what stays."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.labels.files import label_names
    from dedpo_diffusion.pairs.exporting import sharing
    from dedpo_diffusion.pairs.exporting.rows import items
    from dedpo_diffusion.pairs.exporting.tables import write_parquet

    reader, answers = read(settings)
    if not len(reader):
        raise UserError(f"{settings.pairs / 'pairs'} holds no pair; make the dataset again")
    columns = list(reader.source_types)
    without = sharing.left_out(settings, columns)
    kept = [name for name in columns if name not in without]
    shared = sharing.Sharing(settings, without)
    write_parquet(shared.items(track(items(reader, answers), "writing pairs", len(reader))), settings, folder, without=without)
    write_text(folder / "README.md", sharing.card(settings, shared, kept))
    counts = shared.counts
    say(f"{counts['pairs']} pairs, {counts['labelled']} of them with a label from {counts['votes']} votes")
    say(f"source columns: {', '.join(kept) or 'none'}" + (f"; left out: {', '.join(without)}" if without else ""))
    if shared.people:
        say(f"the people who answered: {len(shared.people)}, " + ("by name" if settings.raters == "names" else "as rater-1, rater-2 ..."))
    for what in ("images without their metadata", "values with paths cut"):
        if counts[what]:
            say(f"{what}: {counts[what]}")
    others = [name for name in label_names(settings.pairs) if name != settings.human]
    if others:
        say(f"other labels stay here: {', '.join(others)}")
    if settings.license is None:
        say("the card says license: unknown; give --license, such as cc-by-4.0, before you share the pairs")


def run(settings: PairsSettings) -> Path | str:
    """Write a pair dataset for annotation tools and other programs, send it to a hub, or join several."""
    check(settings)
    return {"push": push, "export": export, "join": join_datasets}[settings.action](settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(PairsSettings, run, argv, prog="dedpo pairs", positional=("action", "pairs", "repository"), flags={"others": "others"})


if __name__ == "__main__":
    raise SystemExit(main())
