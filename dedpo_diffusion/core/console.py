"""What every stage shows a person: settings from the command line, progress, errors in the user's words."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dedpo_diffusion.core.errors import NoSpace as NoSpace
from dedpo_diffusion.core.errors import UserError as UserError
from dedpo_diffusion.core.gone import first_gone
from dedpo_diffusion.core.parser import HELP, Parser
from dedpo_diffusion.core.stopping import Terminated

T = TypeVar("T")
S = TypeVar("S")
PYTHON = "Python"  # in place of a stage's name, where a program called it
_running: list[str] = []  # the stages that run in this process, the outermost first
_listeners: list[Callable[[Update], None]] = []  # who is told of progress in place of the console, the innermost last


@dataclass(frozen=True)
class Update:
    """How far one piece of work is.

    Attributes:
        what: the name of the work; a stage does several, one after the other or one within another.
        done: units that are done, those of an earlier, interrupted call among them.
        total: how many there are; None where nobody knows before the end.
        note: a word or two about the last ones, such as the loss.
        finished: whether this is the last update of this work; there is none where it failed.
    """

    what: str
    done: int
    total: int | None
    note: str = ""
    finished: bool = False


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed because a disk or a quota is full; safetensors says so in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)


def say(text: str) -> None:
    """Print one line at once, for people and for logs."""
    print(text, flush=True)


def say_next(*words: object) -> None:
    """Print the command that people usually type next, quoted as a shell needs it: say_next("merge", folder, "--judge", name)."""
    inside = len(_running) > 1 or PYTHON in _running  # of a stage that another stage or a program runs, the next one is theirs to choose
    if not inside and not int(os.environ.get("RANK", "0")):  # the first of several processes says it
        say("next: " + shlex.join(["dedpo", *map(str, words)]))


def held_already(*paths: Path) -> list[Path]:
    """Which of the files that a stage will write are there; for `say_replaced`, once they are written."""
    return [path for path in paths if path.exists()]


def say_replaced(held: Sequence[Path]) -> None:
    """Say which files were replaced, in one line; nothing where none was."""
    if held:
        say(f"replaced {', '.join(map(str, held))}")


def stage(
    settings: type[S],
    body: Callable[[S], Any],
    argv: Sequence[str] | None,
    *,
    prog: str,
    positional: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> int:
    """Parse a stage's settings, run it, and turn a user's mistake into one clear message.

    Args:
        settings: the stage's dataclass (`settings`).
        body: the stage itself.
        argv: the arguments; None takes the command line's.
        prog: how the stage is called, for the help text.
        positional: fields given without a name, in this order.
        flags: option names that differ from their field's, {"with": "scorers"}.

    Returns:
        The exit code: 0 done, 2 a mistake in the arguments or the input, 130 interrupted, 141 nobody reads the output,
        143 asked to end, and saved.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    _quieten()
    if hasattr(sys.stdout, "reconfigure"):  # a file name that is no UTF-8, or a prompt that the terminal has no letters for, ends no stage
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = Parser(settings, positional, flags)
    asked = [word for word in arguments if word in HELP]
    if asked:
        from dedpo_diffusion.core.help import stage_help

        try:
            say(stage_help(parser, prog, (body.__doc__ or "").strip().split("\n\n")[0], every=any(HELP[word] for word in asked)))
        except BrokenPipeError:
            return _unread()
        return 0
    gone = first_gone(arguments)
    if gone is not None:
        _complain(prog, gone)
        return 2
    try:
        parsed = parser.parse(arguments)
    except UserError as error:
        _complain(prog, error)
        print(f"`{prog} --help` shows the options", file=sys.stderr, flush=True)
        return 2
    return _run(body, parsed, prog)


def _quieten() -> None:
    """Keep back libraries' notices, which are for their programmers; their errors still show."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def call(body: Callable[[S], T], settings: S, progress: Callable[[Update], None] | None = None) -> T:
    """Run a stage for a program.

    Args:
        body: the stage itself.
        settings: its settings.
        progress: is told how far the stage is, in place of the console, which still shows what the stage finds.

    Returns:
        What the stage returns.

    Raises:
        UserError: input that cannot be used, or a full disk.
    """
    _quieten()
    _running.append(PYTHON)
    try:
        check_device(getattr(settings, "device", None))
        with _told(progress):
            return body(settings)
    except OSError as error:
        if not is_full(error):
            raise
        raise NoSpace(error.filename or "a file") from error
    finally:
        _running.pop()


@contextmanager
def _told(progress: Callable[[Update], None] | None) -> Iterator[None]:
    """Within it, progress goes to this function."""
    if progress is None:
        yield
        return
    _listeners.append(progress)
    try:
        yield
    finally:
        _listeners.remove(progress)


def _unread() -> int:
    """The exit code where whoever read the output has gone, as `| head` does; what Python still holds has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _complain(prog: str, words: object) -> None:
    print(f"{prog}: error: {words}", file=sys.stderr, flush=True)


def _run(body: Callable[[S], Any], settings: S, prog: str) -> int:
    """Run a stage; returns its exit code."""
    threading.excepthook = _thread_error
    _running.append(prog)
    try:
        if getattr(settings, "engine", "local") == "local":
            check_device(getattr(settings, "device", None))
        body(settings)
    except UserError as error:
        _complain(prog, error)
        return 2
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        if not is_full(error):
            raise
        _complain(prog, NoSpace(error.filename or "a file"))
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; give the same command again to resume", file=sys.stderr, flush=True)
        return 130
    except Terminated as error:
        print(f"{prog}: asked to end; {error}; give the same command again to resume", file=sys.stderr, flush=True)
        return 143
    finally:
        _running.pop()
    return 0


def check_device(device: str | None) -> None:
    """Refuse a device that is not here, before anything is loaded; torch is imported only where a GPU is asked for.

    Raises:
        UserError: it is unknown, or not here.
    """
    if device in (None, "cpu", "auto"):
        return
    kind, _, number = device.partition(":")
    if kind not in ("cuda", "mps", "xpu") or (number and not number.isdigit()):
        raise UserError(f"--device {device}: there is no such device; it takes cpu, cuda or cuda:0")
    if kind != "cuda":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError("no CUDA device is here; leave --device out, or install a CUDA build of torch")
    if number and int(number) >= count:
        raise UserError(f"--device {device}: the last CUDA device here is cuda:{count - 1}")


def _thread_error(found: threading.ExceptHookArgs) -> None:
    """Print the traceback of a library's thread, unless the disk was full, which its caller meets as well."""
    if not is_full(found.exc_value):
        threading.__excepthook__(found)


class Progress:
    """One line of progress: a live bar on a terminal, a plain line every few seconds in a log, or a program's own callback.

    Args:
        what: the name of the work.
        total: how many units it has; None where nobody knows before the end.
        start: units already done, when work is resumed.
    """

    def __init__(self, what: str, total: int | None, *, start: int = 0, every: float = 10.0) -> None:
        self.what, self.total, self.done, self.start = what, total, start, start
        self.began = self.shown = time.monotonic()
        self.every = every if not sys.stdout.isatty() else 0.2
        self.note = ""
        self.listener = _listeners[-1] if _listeners else None
        self._tell()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` as done; `note` is shown behind the bar."""
        self.done += units
        self.note = note or self.note
        if self.listener is not None:
            self._tell()
            return
        now = time.monotonic()
        if now - self.shown >= self.every:
            self.shown = now
            self._show(now)

    def close(self) -> None:
        """Print the last state, if the work took long enough for anyone to have waited."""
        if self.listener is not None:
            self._tell(finished=True)
            return
        now = time.monotonic()
        if now - self.began > 2:
            self._show(now, end=True)

    def _tell(self, *, finished: bool = False) -> None:
        if self.listener is not None:
            self.listener(Update(self.what, self.done, self.total, self.note, finished))

    def _show(self, now: float, end: bool = False) -> None:
        spent = now - self.began
        if end or self.total is None:
            tail = f"took {_clock(spent)}" if end else f"{_clock(spent)} so far"
        else:
            rate = (self.done - self.start) / spent if spent > 0 else 0.0
            tail = f"{_clock((self.total - self.done) / rate if rate > 0 else 0.0)} left"
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.what}: {self.done}{of}, {tail}" + (f", {self.note}" if self.note else "")
        if sys.stdout.isatty():
            filled = 0 if self.total is None else int(24 * self.done / max(self.total, 1))
            bar = "[" + "#" * filled + "." * (24 - filled) + "] "
            print(f"\r\x1b[K{'' if self.total is None else bar}{text}", end="\n" if end else "", flush=True)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.listener is None:  # a program learns of a failure by the exception
            self.close()


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Iterate with progress."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
