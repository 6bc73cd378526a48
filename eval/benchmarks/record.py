"""What benchmarks do alike: what is done is kept, several processes share what is not, and the result is written behind its settings."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import Progress, UserError, say


def check_arms(settings: Any, known: Sequence[str]) -> None:
    """Raises UserError for arms that are not `known`, seeds that are no first and last one, and fewer than two strengths."""
    if not settings.arms or any(arm not in known for arm in settings.arms):
        raise UserError(f"arms {settings.arms}: give some of {', '.join(known)}")
    if settings.seeds[1] < settings.seeds[0] or len(settings.strengths) < 2:
        raise UserError("give the first and the last seed, and two strengths or more")


def make_folders(work: Path) -> None:
    """Make the folders of cells and locks."""
    for name in ("locks", "cells"):
        (work / name).mkdir(parents=True, exist_ok=True)


def call(main: Callable[[list[str]], int], *arguments: object) -> None:
    """Run a stage, without what it says.

    Raises:
        UserError: it failed; with its last words.
    """
    argv, said = [str(argument) for argument in arguments], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    if code:
        raise UserError(f"a stage ended with exit code {code}: {' '.join(argv)}\n{said.getvalue()[-2000:]}")


def take_arms(settings: Any, make: Callable[[], Any]) -> dict[str, dict[int, Any]]:
    """Do every arm of every seed that is not done yet, seed by seed; returns what is done, by arm and seed.

    Args:
        settings: with `work`, `arms` and `seeds`, the first and the last.
        make: makes what does them by `do(arm, seed, folder)`, in a folder that nobody else looks at; one process makes it at a time, and
            only where something is to do.
    """
    from dedpo_diffusion.core.files import write_json
    from dedpo_diffusion.core.locks import hold_lock

    work, made = settings.work, None
    make_folders(work)
    seeds = range(settings.seeds[0], settings.seeds[1] + 1)
    jobs = {(arm, seed): work / "cells" / f"{arm}-{seed}.json" for seed in seeds for arm in settings.arms}
    with Progress("trainings", len(jobs)) as progress:
        for (arm, seed), file in jobs.items():
            if made is None and not file.is_file():
                with hold_lock(work / "locks" / "pool.lock", wait=True):
                    made = make()
            with hold_lock(work / "locks" / f"{arm}-{seed}.lock") as mine:
                if made is not None and mine and not file.is_file():
                    write_json(file, made.do(arm, seed, work / "runs" / f"{arm}-{seed}"))
            progress.advance(note=f"{arm}, seed {seed}")
    read: dict[str, dict[int, Any]] = {}
    for (arm, seed), file in jobs.items():
        if file.is_file():
            read.setdefault(arm, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    if missing := sum(not file.is_file() for file in jobs.values()):
        say(f"{missing} trainings are not done yet: start the same command again, or wait for the other processes")
    return read


def write_record(settings: Any, result: dict[str, Any]) -> None:
    """Write the result to `settings.out` (JSON) behind the settings that made it, folders and files left out, and say so."""
    from dedpo_diffusion.core.files import write_json

    kept = {key: value for key, value in asdict(settings).items() if not isinstance(value, Path)}
    write_json(settings.out, {"settings": kept, **result})
    say(f"wrote {settings.out}")
