"""What every stage shows a person: settings from the command line, progress, errors in the user's words."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dedpo_diffusion.core.errors import NoSpace as NoSpace
from dedpo_diffusion.core.errors import UserError as UserError
from dedpo_diffusion.core.gone import first_gone
from dedpo_diffusion.core.stopping import Terminated

T = TypeVar("T")
S = TypeVar("S")


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed because a disk or a quota is full; safetensors says so in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)


def say(text: str) -> None:
    """Print one line at once, for people and for logs."""
    print(text, flush=True)


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
    from jsonargparse import ArgumentParser

    arguments = sys.argv[1:] if argv is None else list(argv)
    gone = first_gone(arguments)
    if gone is not None:
        print(f"{prog}: error: {gone}", file=sys.stderr, flush=True)
        return 2
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):  # their notices are for programmers; their errors still show
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    flags = dict(flags or {})
    parser = ArgumentParser(prog=prog, description=(body.__doc__ or "").strip().split("\n\n")[0], allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(settings)
    documented = _field_docs(settings)
    parser.add_argument("--config", action="config", help="a YAML file with these settings; later options override it")
    for name in (*positional, *flags):
        field = fields[flags.get(name, name)]
        hint: Any = hints[field.name]
        extra: dict[str, Any] = {}
        if typing.get_origin(hint) is list:  # several values, separated by blanks
            hint, extra["nargs"] = typing.get_args(hint)[0], "+"
        if name in flags:
            extra |= _default(field)
        parser.add_argument(f"--{name}" if name in flags else name, type=hint, help=documented.get(field.name, ""), **extra)
    parser.add_class_arguments(settings, skip={*positional, *flags.values()}, fail_untyped=True)
    if {"-h", "--help"} & set(arguments):
        _tell_plugins(parser, settings, {field: name for name, field in flags.items()})
    parsed = parser.instantiate(parser.parse_args(arguments))
    values = {flags.get(name, name): value for name, value in vars(parsed).items() if name not in ("config", "__default_config__")}
    threading.excepthook = _thread_error
    try:
        body(settings(**values))
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does; what Python still holds has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not is_full(error):
            raise
        print(f"{prog}: error: {NoSpace(error.filename or 'a file')}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; give the same command again to resume", file=sys.stderr, flush=True)
        return 130
    except Terminated as error:
        print(f"{prog}: asked to end; {error}; give the same command again to resume", file=sys.stderr, flush=True)
        return 143
    return 0


def _tell_plugins(parser: Any, settings: type, names: Mapping[str, str], prefix: str = "") -> None:
    """Add the names that other packages offer to the help of the options that take them; their metadata are read, nothing imported."""
    from dedpo_diffusion.core import plugins

    actions = {action.dest: action for action in parser._actions}
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(hints[field.name]):
            _tell_plugins(parser, typing.cast(type, hints[field.name]), {}, f"{prefix}{field.name}.")
        elif added := plugins.names(*field.metadata.get("plugins", ())):
            action = actions[prefix + names.get(field.name, field.name)]
            action.help = f"{action.help} Of other packages: {', '.join(added)}.".replace("%", "%%")


def _thread_error(found: threading.ExceptHookArgs) -> None:
    """Print the traceback of a library's thread, unless the disk was full, which its caller meets as well."""
    if not is_full(found.exc_value):
        threading.__excepthook__(found)


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse is told of an option that need not be given, or must be."""
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {"required": True} if field.default is dataclasses.MISSING else {"default": field.default}


def _field_docs(settings: type) -> dict[str, str]:
    from docstring_parser import parse

    return {item.arg_name: item.description or "" for item in parse(settings.__doc__ or "").params}


class Progress:
    """One line of progress: a live bar on a terminal, a plain line every few seconds in a log.

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

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` as done; `note` is shown behind the bar."""
        self.done += units
        self.note = note or self.note
        now = time.monotonic()
        if now - self.shown >= self.every:
            self.shown = now
            self._show(now)

    def close(self) -> None:
        """Print the last state, if the work took long enough for anyone to have waited."""
        now = time.monotonic()
        if now - self.began > 2:
            self._show(now, end=True)

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

    def __exit__(self, *_: object) -> None:
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
