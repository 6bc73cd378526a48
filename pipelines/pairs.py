"""Write a pair dataset for annotation tools and other programs, which `dedpo ingest auto` reads back; or join several datasets.

    dedpo pairs export pairs --to labelstudio --out for-label-studio
    dedpo pairs export pairs --to argilla --out for-argilla --fields html
    dedpo pairs export pairs --to datasets --out for-the-hub
    dedpo pairs join pairs --others more-pairs --out all-pairs

For annotation tools the sides are shuffled, and each task remembers which image stands on the left. What people have said so far
goes along and comes back with the new answers; `--human null` leaves it out. OUT appears when all of it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dedpo_diffusion.core.console import UserError, say, say_next, stage, track
from dedpo_diffusion.settings import PairsSettings

TOOLS = ("labelstudio", "argilla")


def check(settings: PairsSettings) -> None:
    """See to it that what was asked for can be meant; UserError names the option."""
    if settings.out.is_file() or (settings.out.is_dir() and any(settings.out.iterdir())):
        raise UserError(f"{settings.out} exists and is not an empty folder; choose another --out, or remove it first")
    if settings.action == "join" and not settings.others:
        raise UserError("join needs the datasets to join: give --others MORE [MORE ...]")
    if settings.action == "export" and settings.to is None:
        raise UserError("export needs a layout: give --to labelstudio, argilla, datasets, imagefolder or csv")
    if settings.action == "export" and settings.others:
        raise UserError("--others is for join; leave it out")
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


def run(settings: PairsSettings) -> None:
    """Write a pair dataset for annotation tools and other programs, or join several."""
    check(settings)
    if settings.action == "join":
        join_datasets(settings)
    else:
        export(settings)


def join_datasets(settings: PairsSettings) -> None:
    """One dataset of several."""
    from dedpo_diffusion.core.files import atomic_folder
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.joining import join

    with atomic_folder(settings.out) as folder:
        told = join([settings.pairs, *settings.others], folder, human=settings.human or "human")
    say(f"wrote {settings.out}: {len(PairReader(settings.out))} pairs of {1 + len(settings.others)} datasets")
    for line in told:
        say(line)
    say_next("merge", settings.out)


def export(settings: PairsSettings) -> None:
    """One dataset in another layout."""
    from dedpo_diffusion.core.files import atomic_folder
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.pairs.exporting.rows import items

    assert settings.to is not None
    reader = PairReader(settings.pairs)
    answers = answers_for(settings)
    unknown = sorted(answers.keys() - set(reader.ids()))
    if unknown:
        raise UserError(f"{settings.pairs}: {settings.human} has an answer about {unknown[0]!r}, which is none of the pairs; remove it")
    with atomic_folder(settings.out) as folder:
        to_do = writer_of(settings.to)(track(items(reader, answers), "writing pairs", len(reader)), settings, folder)
    votes = sum(one.votes for said in answers.values() for one in said)
    say(f"wrote {settings.out}: {len(reader)} pairs, {len(answers)} of them with a label from {votes} votes")
    for line in to_do:
        say(line)
    if settings.to == "labelstudio":
        images = [] if settings.images == "data" else ["--images", settings.root or settings.out]
        say_next("ingest", "labelstudio", "EXPORT.json", *images, "--out", "PAIRS")
    else:
        say_next("ingest", "auto", "answers" if settings.to == "argilla" else settings.out, "--out", "PAIRS")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(PairsSettings, run, argv, prog="dedpo pairs", positional=("action", "pairs"), flags={"others": "others"})


if __name__ == "__main__":
    raise SystemExit(main())
