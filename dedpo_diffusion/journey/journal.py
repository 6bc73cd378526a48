"""What a journey has done, in OUT/journal.json: of each step its command line and fingerprints of its inputs.

| what is found | what becomes of the step |
|---|---|
| done, with the same command and inputs, and its output is there | skipped |
| begun and stopped, with the same command and inputs | goes on |
| done or begun with another command or other inputs | what it made is removed, which is said, and it is done again |
| in no journal, but its output is there | refused, unless the stage itself goes on with what is there |

Nothing is removed but what the journal says that this journey made.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import file_digest, is_leftover, remove_leftovers, write_json

NAME = "journal.json"
SCHEMA = 1
LARGEST = 64 << 20  # bytes of a file whose content is looked at; of a larger one size and time tell


@dataclass(frozen=True)
class Step:
    """One command of the journey.

    Attributes:
        name: what tells it from the other steps.
        stage: the stage's name, or that of a step that is no stage.
        argv: its arguments.
        inputs: files and folders that it reads; it is done again when one of them changes.
        outputs: files that are there when it is done.
        made: files and folders to remove before it is done again.
        redo: when its command or inputs have changed: replace removes what it made; stage leaves that to the stage, which goes on with
            what it can use; refuse tells the user, as people's work hangs on it.
        resumes: whether the stage goes on with what a stopped run left.
        whole: whether its outputs appear when all of it is there, and not before: then it is done, whatever the journal had time to note.
        free: options whose values may change without spoiling what is there.
        cost: what it will take, in words.
    """

    name: str
    stage: str
    argv: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    made: tuple[Path, ...] = ()
    redo: Literal["replace", "stage", "refuse"] = "replace"
    resumes: bool = False
    whole: bool = False
    free: tuple[str, ...] = ()
    cost: str = ""

    def line(self) -> str:
        """The command line, to be typed."""
        return f"dedpo {self.stage} {shlex.join(self.argv)}"


@dataclass(frozen=True)
class Found:
    """Whether a step is to be done, why, and whether what it left is to be removed first."""

    due: bool
    why: str = ""
    remove: tuple[Path, ...] = field(default=())


def fingerprint(path: Path) -> str:
    """What tells whether a file or folder has changed: the content of files, the names, sizes and times of a folder's."""
    if path.is_file():
        found = path.stat()
        return file_digest(path) if found.st_size <= LARGEST else f"{found.st_size} bytes at {found.st_mtime_ns}"
    if not path.is_dir():
        return "absent"
    told = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not is_leftover(file):
            found = file.stat()
            told.update(f"{file.relative_to(path).as_posix()}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return told.hexdigest()


def without(argv: Sequence[str], free: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    kept, skipping = [], False
    for part in argv:
        if part.startswith("--"):
            skipping = part in free
        if not skipping:
            kept.append(part)
    return kept


class Journal:
    """The journal of one folder.

    Args:
        out: the journey's folder.
        identity: what the journey is about (model, prompts or pairs, ...): another journey may not use the folder.

    Raises:
        UserError: the folder holds something else, or another journey.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.file = out, out / NAME
        self.identity = dict(identity)
        self.steps: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.file.is_file():
            if self.out.is_file() or (self.out.is_dir() and any(not is_leftover(file) for file in self.out.iterdir())):
                raise UserError(f"{self.out} is there and holds no journey of `dedpo align`; choose another --out")
            return {}
        try:
            held = json.loads(self.file.read_text(encoding="utf-8"))
            schema, there, steps = held["schema"], held["journey"], held["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} cannot be read as a journal ({error!r}); restore it, or choose another --out") from error
        if schema != SCHEMA:
            raise UserError(f"{self.file} is of version {schema}, not {SCHEMA}; choose another --out")
        for name in dict.fromkeys([*there, *self.identity]):
            if there.get(name) != self.identity.get(name):
                what = f"{name} is {there.get(name)!r} there, {self.identity.get(name)!r} now"
                raise UserError(f"{self.out} holds another journey ({what}); choose another --out, or remove the folder")
        return dict(steps)

    def open(self) -> None:
        """Claim the folder."""
        remove_leftovers(self.out)
        self._write()

    def _write(self) -> None:
        write_json(self.file, {"schema": SCHEMA, "journey": self.identity, "steps": self.steps})

    # ---- paths, as they are told wherever the command is given

    def _told(self, path: Path) -> str:
        whole, out = path.absolute(), self.out.absolute()
        return f"OUT/{whole.relative_to(out).as_posix()}" if whole.is_relative_to(out) else str(whole)

    def _place(self, told: str) -> Path:
        return self.out / told.removeprefix("OUT/") if told.startswith("OUT/") else Path(told)

    def _key(self, argv: Sequence[str]) -> str:
        return shlex.join(self._part(part) for part in argv)

    def _part(self, part: str) -> str:
        return self._told(Path(part)) if Path(part).is_absolute() or part.startswith(f"{self.out}/") else part

    def _inputs(self, step: Step) -> dict[str, str]:
        return {self._told(path): fingerprint(path) for path in step.inputs}

    # ---- what is to be done

    def look(self, step: Step) -> Found:
        """What is to be done about a step.

        Raises:
            UserError: something is in its place that this journey did not make, or what it made must not be replaced.
        """
        held = self.steps.get(step.name)
        if held is None:
            return self._look_new(step)
        made = tuple(self._place(told) for told in held["made"])
        why = self._change(step, held)
        if why:
            if step.redo == "refuse":
                what = f"{why} since {step.outputs[0]} was made, and people's answers may hang on it"
                raise UserError(f"{what}; choose another --out, or remove {self.out}")
            return Found(True, why, made if step.redo == "replace" else ())
        missing = [path for path in step.outputs if not path.exists()]
        whole = held["done"] or step.whole
        if whole and not missing and held["line"] == self._key(step.argv):
            return Found(False)
        why = f"{missing[0]} is not there" if held["done"] and missing else "its options have changed" if held["done"] else "it was stopped"
        if not step.resumes:
            return Found(True, why, made)
        return Found(True, why, tuple(path for path in made if path not in step.made) if step.redo == "replace" else ())

    def _look_new(self, step: Step) -> Found:
        there = [path for path in step.made if path.exists()]
        if there and not step.resumes:
            raise UserError(f"{there[0]} is there, and this journey did not make it; move it away, or choose another --out")
        return Found(True)

    def _change(self, step: Step, held: Mapping[str, Any]) -> str:
        """What of command and inputs has changed since; "" for nothing."""
        for told, now in self._inputs(step).items():
            if held["inputs"].get(told) != now:
                return f"{self._place(told)} has changed"
        key = self._key(without(step.argv, step.free))
        return "" if held["key"] == key and len(held["inputs"]) == len(step.inputs) else "its command has changed"

    @contextmanager
    def doing(self, step: Step, found: Found) -> Iterator[None]:
        """Remove what is in the way, note that the step is begun, and, when the block ends well, that it is done; count its seconds."""
        seconds = self.steps.get(step.name, {}).get("seconds", 0.0) if not found.remove else 0.0
        for path in found.remove:
            if path.exists():
                say(f"{path}, which this journey made, is removed: {found.why}")
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        line, key = self._key(step.argv), self._key(without(step.argv, step.free))
        entry: dict[str, Any] = {"stage": step.stage, "line": line, "key": key, "inputs": self._inputs(step)}
        entry |= {"made": [self._told(path) for path in step.made], "done": False, "seconds": seconds}
        self.steps[step.name] = entry
        self._write()
        began = time.monotonic()
        try:
            yield
            entry["done"] = True
        finally:
            entry["seconds"] = round(seconds + time.monotonic() - began, 2)
            self._write()

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and in all."""
        found: dict[str, float] = {}
        for entry in self.steps.values():
            found[entry["stage"]] = round(found.get(entry["stage"], 0.0) + entry["seconds"], 2)
        return found | {"total": round(sum(found.values()), 2)}
