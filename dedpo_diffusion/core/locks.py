"""Work shared out among processes of one machine that see one folder, by lock files in it.

Whoever holds a task's lock does it. A lock ends with its process, so the tasks of a killed one are taken over by the
others or by the next run; processes need not know of each other, nor start together. Network file systems do not keep such locks
between machines: several machines work together by `--engine ray` (`core.engine`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
PAUSE = 0.2  # seconds between two looks at what others have not finished yet


class SharingWorker(Protocol):
    """A worker whose tasks leave files. Any other worker is a function of a task that gives a result.

    `pending` gives the unfinished parts of a task, each with a lock file for the processes of one machine; empty once all are done,
    by whomever. `work` does the parts that it is given.
    """

    def pending(self, task: Any) -> Mapping[str, Path]:
        """The unfinished parts of a task."""
        ...

    def work(self, task: Any, parts: list[str]) -> Any:
        """Do these parts of a task."""
        ...


def shares(worker: Any) -> bool:
    """Whether this is a `SharingWorker`."""
    return hasattr(worker, "pending")


@contextmanager
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock `path` within the block.

    Args:
        path: the lock file, in a folder that is there.
        wait: until whoever holds it is done; else yield False where another process does.

    Yields:
        Whether the lock is held; False too where the folder was removed, by a process that finished.
    """
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():  # it would be made again
        yield False
        return
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def share_tasks(
    tasks: Sequence[T], *, pending: Callable[[T], Mapping[str, Path]], work: Callable[[T, list[str]], R]
) -> Iterator[tuple[int, R | None]]:
    """Do every task that no other process does, and wait for those that others do.

    Args:
        tasks: in the order in which they are tried.
        pending: the unfinished parts of a task, each with its lock file; empty once the task is finished, by whomever.
        work: does the given parts of a task, which are then no longer pending.

    Yields:
        The number of a task and the result of this process's work on it; and of each that is finished, None where this process had
        no part in the end of it.
    """
    todo = list(enumerate(tasks))
    while todo:
        left = []
        for number, task in todo:
            found: R | None = None
            with ExitStack() as locks:
                mine = [part for part, lock in pending(task).items() if locks.enter_context(hold_lock(lock))]
                unfinished = pending(task) if mine else {}  # another process may have finished a part before its lock was had
                mine = [part for part in mine if part in unfinished]
                if mine:
                    found = work(task, mine)
            unfinished = pending(task)
            if unfinished:
                left.append((number, task))
            if found is not None or not unfinished:
                yield number, found
        if len(left) == len(todo):
            time.sleep(PAUSE)
        todo = left
