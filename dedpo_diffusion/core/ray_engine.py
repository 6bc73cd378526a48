"""A stage's work on the nodes of a Ray cluster: `core.engine` by Ray Data, the only place that imports Ray.

The tasks are a Ray dataset of one row each, and a pool of actors maps it. Ray restarts actors and gives the tasks of a lost node to
others, without end; so a task that kills its worker again and again is counted here, by an actor beside this process.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import remove_leftovers, temporary_name
from dedpo_diffusion.core.locks import shares

L = TypeVar("L")
A = TypeVar("A")

MISSING = '--engine ray needs Ray on this machine and on every node: pip install "dedpo_diffusion[ray]"'
DEATHS = 3  # of workers at one task, after which the task is to blame
BLOCKS = 4096  # of the dataset of tasks at most; from there on several tasks are one
CONTACT = 10.0  # seconds until a cluster that does not answer is not there
PATIENCE = 90.0  # seconds until a network file system shows what another machine wrote
TOLD = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # to workers
AGAIN = "give the same command again to go on"


class RayOptions(Protocol):
    """The settings of a Ray cluster; `settings.RaySettings` has them."""

    address: str | None
    workers: int | None
    cpus: int


# ---- what workers run


@dataclass(frozen=True)
class Place:
    """How a worker comes to where this process is.

    Attributes:
        folder: the working folder, so that paths mean the same.
        marks: files that this process made where outputs go.
        variables: of the environment.
    """

    folder: str
    marks: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def enter(self) -> None:
        """Be there.

        Raises:
            UserError: this machine does not see the folders.
        """
        for name, value in self.variables.items():
            os.environ.setdefault(name, value)
        for path in (self.folder, *self.marks):
            if not appears(Path(path)):
                where = path if path == self.folder else str(Path(path).parent)
                raise UserError(f"node {_node()} of the cluster does not see {where}; keep it in a folder that all nodes share")
        os.chdir(self.folder)


def _node() -> str:
    import ray

    return ray.util.get_node_ip_address()


def appears(path: Path, seconds: float = PATIENCE) -> bool:
    """Whether a path is there, or comes within some seconds."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _answer(place: Place, load: Callable[[], L], question: Callable[[L], A]) -> tuple[str, Any]:
    """What one worker answers: ("done", answer), or ("error", words)."""
    try:
        place.enter()
        return "done", question(load())
    except UserError as error:
        return "error", str(error)


class Attempts:
    """Counts how often each task was begun and not ended: an actor without a core."""

    def __init__(self) -> None:
        self.open: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count a beginning; returns how many there are without an end, this one too."""
        self.open[number] += 1
        return self.open[number]

    def end(self, number: int) -> None:
        """The task ended, well or with an error that it told."""
        self.open[number] = 0


class TaskActor:
    """An actor of the pool: loads once, at its first task, then does task after task."""

    def __init__(self, place: Place, load: Callable[[], Any], ready: Callable[[Any], Any], attempts: Any) -> None:
        self.place, self.load, self.ready, self.attempts = place, load, ready, attempts
        self.worker: Any = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The outcomes of one or several tasks."""
        found = [self._outcome(int(number), pickle.loads(task)) for number, task in zip(rows["number"], rows["task"], strict=True)]
        return {"number": rows["number"], "outcome": [pickle.dumps(outcome) for outcome in found]}

    def _outcome(self, number: int, task: Any) -> tuple[str, Any]:
        import ray

        begun = ray.get(self.attempts.begin.remote(number))
        if begun > DEATHS:
            words = f"{DEATHS} workers died while they had {task} in hand; give them more memory, or a smaller --batch; {AGAIN}"
            return "error", words
        try:
            outcome = ("done", self._do(task))
        except UserError as error:
            outcome = ("error", str(error))
        ray.get(self.attempts.end.remote(number))
        return outcome

    def _do(self, task: Any) -> Any:
        if self.worker is None:
            self.place.enter()
            self.worker = self.ready(self.load())
        if not shares(self.worker):
            return self.worker(task)
        parts = list(self.worker.pending(task))
        return self.worker.work(task, parts) if parts else None


# ---- this side


def load_ray() -> Any:
    """The module ray, with Ray Data.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(MISSING) from error
    return ray


@contextmanager
def open_ray(options: RayOptions, *, folders: Sequence[Path], device: str | None) -> Iterator[RayEngine]:
    """The engine on a cluster, within the block; arguments and errors as of `open_engine`."""
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device} is one of this machine's; with --engine ray, give cpu, cuda or nothing")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--engine ray starts its own workers; give the command without a launcher")
    for name in ("workers", "cpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--ray.{name} is {value}; it must be at least 1")
    ray = load_ray()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, options.address)
    marks = [temporary_name(folder / "nodes") for folder in folders]
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(mark.parent)
            mark.touch()
        variables = {name: os.environ[name] for name in TOLD if name in os.environ}
        place = Place(os.getcwd(), tuple(str(mark.absolute()) for mark in marks), variables)
        yield RayEngine(ray, options, place, device)
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up ({_first_line(error)}); {AGAIN}") from error
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
        if mine:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster at an address; None joins the one that runs here (RAY_ADDRESS, `ray start`), or starts one in this machine."""
    host, _, port = (address or "").rpartition(":")
    try:
        if host and port.isdigit() and "/" not in host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONTACT).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **({} if address else {"include_dashboard": False}))
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray cluster"
        raise UserError(f"{where} is not reached ({_first_line(error)}); see that `ray status` shows it on this machine") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


class RayEngine:
    """See `core.engine.Engine`."""

    many = True

    def __init__(self, ray: Any, options: RayOptions, place: Place, device: str | None) -> None:
        self.ray, self.options, self.place = ray, options, place
        self.nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in self.nodes))
        if device == "cuda" and not self.gpus:
            raise UserError("no node of the Ray cluster has a GPU; leave --device out")
        cpus = int(sum(node.get("CPU", 0) for node in self.nodes))
        counted = "1 node" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        say(f"Ray: {counted} with {cpus} CPU cores and {self.gpus or 'no'} GPU{'' if self.gpus == 1 else 's'}")

    def crew(self, load: Callable[[], L], *, gpu: bool = True) -> RayCrew[L]:
        """See `core.engine.Engine`."""
        return RayCrew(self, load, {"num_cpus": self.options.cpus, "num_gpus": 1 if gpu and self.gpus else 0})

    def room(self, needs: dict[str, int]) -> int:
        """How many workers with these needs the nodes have room for.

        Raises:
            UserError: none.
        """
        wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
        found = sum(min(int(node.get(name, 0) // count) for name, count in wanted.items() if count) for node in self.nodes)
        if not found:
            what = f"{wanted['CPU']} CPU cores" + (" and a GPU" if wanted["GPU"] else "")
            raise UserError(f"no node of the Ray cluster has {what} for a worker; give a smaller --ray.cpus, or start larger nodes")
        return found

    def see(self, paths: Sequence[Path]) -> None:
        """See `core.engine.Engine`."""
        for path in paths:
            if not appears(path):
                raise UserError(f"{path} was written by a worker and is not seen here; keep it in a folder that all nodes share; {AGAIN}")


class RayCrew(Generic[L]):
    """See `core.engine.Crew`."""

    def __init__(self, engine: RayEngine, load: Callable[[], L], needs: dict[str, int]) -> None:
        self.engine, self.ray, self.load, self.needs = engine, engine.ray, load, needs

    def ask(self, question: Callable[[L], A]) -> A:
        """See `core.engine.Crew`; it loads for this one question."""
        self.engine.room(self.needs)
        once = self.ray.remote(max_retries=DEATHS, **self.needs)(_answer)
        return _unfolded(self.ray.get(once.remote(self.engine.place, self.load, question)))

    def run(self, tasks: Sequence[Any], ready: Callable[[L], Any]) -> Iterator[tuple[int, Any]]:
        """See `core.engine.Crew`."""
        if not tasks:
            return
        attempts = self.ray.remote(num_cpus=0, scheduling_strategy=self._here())(Attempts).remote()
        rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
        made = {"place": self.engine.place, "load": self.load, "ready": ready, "attempts": attempts}
        with _quiet(self.ray):
            outcomes = self.ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
                TaskActor, batch_size=None, compute=self._pool(len(rows)), fn_constructor_kwargs=made, **self.needs
            )
            for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
                for number, outcome in zip(batch["number"], batch["outcome"], strict=True):
                    yield int(number), _unfolded(pickle.loads(outcome))
        self.ray.kill(attempts)

    def _here(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)

    def _pool(self, tasks: int) -> Any:
        """As many actors as the nodes have room for, or the tasks need; more where nodes are added, unless a number was asked for."""
        most = self.engine.options.workers
        first = min(self.engine.room(self.needs), tasks, most or tasks)
        return self.ray.data.ActorPoolStrategy(min_size=1, initial_size=first, max_size=most)


def _unfolded(outcome: tuple[str, Any]) -> Any:
    kind, found = outcome
    if kind == "error":
        raise UserError(found)
    return found


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray Data shows no progress of its own within the block: stages show theirs."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars, context.print_on_execution_start = False, False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
