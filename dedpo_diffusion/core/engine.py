"""Where a stage's work is done: in this process, or by workers on the nodes of a Ray cluster.

    with open_engine(settings.engine, settings.ray, folders=[settings.pairs]) as engine:
        crew = engine.crew(load)                       # what a worker needs: a model, say
        facts = crew.ask(describe)                     # describe(loaded), by one worker
        for number, result in crew.run(tasks, ready):  # ready(loaded) makes the worker, once
            ...

A task is small, knows by itself what is to be done, and leaves the same files whoever does it, and however often. So both engines
leave the same files, and a task that a lost worker had in hand is given to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.locks import share_tasks, shares
from dedpo_diffusion.core.ray_engine import RayOptions, open_ray

L = TypeVar("L")
L_co = TypeVar("L_co", covariant=True)
A = TypeVar("A")


class Crew(Protocol[L_co]):
    """Workers that each load the same once."""

    def ask(self, question: Callable[[L_co], A]) -> A:
        """What one worker answers of what it loaded."""
        ...

    def run(self, tasks: Sequence[Any], ready: Callable[[L_co], Any]) -> Iterator[tuple[int, Any]]:
        """Do every task.

        Args:
            tasks: small and picklable, of any number; their texts name them in messages.
            ready: makes a worker of what was loaded: a function of a task, or a `SharingWorker` (`core.locks`).

        Yields:
            The number of a task that is done and its result, in any order; None where nothing was left to do. A process that
            shares its tasks with others may come by one twice.

        Raises:
            UserError: of a task, or of a worker that cannot start.
        """
        ...


class Engine(Protocol):
    """What does the work of a stage.

    Attributes:
        many: whether workers elsewhere do it.
        gpus: that those have together.
    """

    many: bool
    gpus: int

    def crew(self, load: Callable[[], L], *, gpu: bool = True) -> Crew[L]:
        """Workers that each call `load` once; `gpu` says whether they use one, where there are any."""
        ...

    def see(self, paths: Sequence[Path]) -> None:
        """Wait until files that workers wrote are seen here.

        Raises:
            UserError: one is not.
        """
        ...


class LocalCrew(Generic[L]):
    """This process; what it needs is loaded when it is first used. See `Crew`."""

    def __init__(self, load: Callable[[], L]) -> None:
        self.load = load
        self._loaded: list[L] = []

    def _have(self) -> L:
        if not self._loaded:
            self._loaded.append(self.load())
        return self._loaded[0]

    def ask(self, question: Callable[[L], A]) -> A:
        """See `Crew`."""
        return question(self._have())

    def run(self, tasks: Sequence[Any], ready: Callable[[L], Any]) -> Iterator[tuple[int, Any]]:
        """See `Crew`; processes of this machine that do the same share the tasks of a `SharingWorker`."""
        worker = ready(self._have())
        if shares(worker):
            yield from share_tasks(tasks, pending=worker.pending, work=worker.work)
        else:
            yield from ((number, worker(task)) for number, task in enumerate(tasks))


class LocalEngine:
    """All in this process. See `Engine`."""

    many = False
    gpus = 0

    def crew(self, load: Callable[[], L], *, gpu: bool = True) -> LocalCrew[L]:
        """See `Engine`."""
        return LocalCrew(load)

    def see(self, paths: Sequence[Path]) -> None:
        """See `Engine`; what this process wrote is there."""


@contextmanager
def open_engine(name: str, options: RayOptions, *, folders: Sequence[Path] = (), device: str | None = None) -> Iterator[Engine]:
    """The engine of a stage, within the block.

    Args:
        name: local or ray.
        options: of the Ray cluster.
        folders: where files are written, which all nodes must see; made where they are not there.
        device: what the stage was told to compute on.

    Raises:
        UserError: Ray is not installed, its cluster is not reached, or it has no node for such a worker.
    """
    if name == "local":
        if options.address is not None or options.workers is not None:
            raise UserError("--ray.address and --ray.workers are for --engine ray; give that too, or leave them out")
        yield LocalEngine()
        return
    with open_ray(options, folders=folders, device=device) as engine:
        yield engine
