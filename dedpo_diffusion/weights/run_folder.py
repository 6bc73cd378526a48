"""A run folder: resolved settings, identity of what it was trained on, checkpoints, metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import is_leftover, remove_folder, remove_leftovers, write_text, writing
from dedpo_diffusion.weights.checkpoints import check_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

POWER_FILE = "power.json"  # of a run that measured its power


def plain(value: Any) -> Any:
    """Settings as the plain dicts, lists, numbers and strings that YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def open_run(folder: Path, settings: Any, identity: Mapping[str, str], free: Sequence[str] = ()) -> None:
    """Claim a run folder, or recognise it as this very run's, to be resumed.

    Writes `settings.yaml` and `identity.json` before anything else is written there.

    Args:
        folder: the run folder.
        settings: the stage's dataclass.
        identity: fingerprints of the inputs (base model, targets, ...), by name; a run of an earlier version may know fewer of them.
        free: settings, as "out" or "optim.batch", that may change while the run goes on.

    Raises:
        UserError: the folder holds another run, other things, or this run on inputs that have changed since.
    """
    for place in (folder, folder / "checkpoints", folder / "samples"):
        remove_leftovers(place)
    wanted = {"settings": plain(settings), "identity": dict(identity)}
    settings_file, identity_file = folder / "settings.yaml", folder / "identity.json"
    if not settings_file.is_file():
        if folder.exists() and any(not is_leftover(file) for file in folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a run folder; choose another --out")
        write_text(settings_file, yaml.safe_dump(wanted["settings"], sort_keys=False))
    held = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    for name in free:
        *rooms, key = name.split(".")
        there, now = held, wanted["settings"]
        for room in rooms:
            there, now = there.get(room), now[room]
        if isinstance(there, dict):
            there[key] = now[key]
    difference = first_difference(held, wanted["settings"])
    if difference:
        raise UserError(f"{folder}: holds another run ({difference}); choose another --out, or remove the folder")
    if not identity_file.is_file():
        write_text(identity_file, json.dumps(wanted["identity"], indent=2) + "\n")
    known = {**wanted["identity"], **json.loads(identity_file.read_text(encoding="utf-8"))}
    changed = first_difference(known, wanted["identity"])
    if changed:
        raise UserError(f"{folder}: cannot be resumed, as its inputs have changed since it began ({changed}); choose another --out")


def first_difference(held: Any, wanted: Any, name: str = "") -> str:
    """The first setting that differs, as "optim.steps is 100 there, 200 now"; "" if none does."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in [*held, *(key for key in wanted if key not in held)]:
            found = first_difference(held.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return ""
    return "" if held == wanted else f"{name} is {held!r} there, {wanted!r} now"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = (run / "checkpoints").glob("step-*/state.json")
    return sorted((int(file.parent.name.removeprefix("step-")), file.parent) for file in found)


def newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is as it was written, None where none was ever written.

    Newer ones that are damaged are set aside under another name, and said.

    Raises:
        UserError: all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            check_checkpoint(folder)
        except UserError as error:
            damaged.append((folder, str(error)))
            continue
        for bad, why in damaged:
            names = (bad.with_name(f"damaged-{bad.name}" + (f"-{k}" if k else "")) for k in itertools.count())
            aside = next(path for path in names if not path.exists())
            bad.rename(aside)
            say(f"Warning: {why}; this checkpoint is set aside as {aside}, and the run resumes from {folder.name}")
        return int(folder.name.removeprefix("step-")), folder
    if damaged:
        raise UserError(f"{damaged[0][1]}, and no other checkpoint is whole; put back a copy of one, or remove {run} to begin anew")
    return None


def best_folder(run: Path) -> Path:
    """Where what was trained at the best validation lies, if there was one."""
    return run / "best"


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for _, folder in checkpoints(run)[:-keep]:
        remove_folder(folder)


def read_settings(run: Path) -> dict[str, Any]:
    """The resolved settings of a run folder.

    Raises:
        UserError: it is no run folder.
    """
    file = run / "settings.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no run folder (it has no settings.yaml); `dedpo train --out {run}` makes one")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def read_metrics(run: Path, last: int, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, or of another log, up to a step; [] where there is none."""
    return [json.loads(text) for text in _kept_lines(run / f"{name}.jsonl", last)]


def _kept_lines(file: Path, last: int) -> list[str]:
    """The whole lines of a file of metrics up to a step; a killed process leaves a cut one."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]


def merit(line: Mapping[str, Any]) -> tuple[str, float] | None:
    """What a validation is ranked by, and its value: the held-out loss, else the mean of the first scorer; None where it is not known."""
    if "loss" in line:
        return None if line["loss"] is None else ("held-out loss", line["loss"])
    for name, found in line.get("scores", {}).items():
        return f"mean {name}", found["mean"]
    return None


def best_line(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best of a run's validations: the lowest held-out loss, else the highest mean of the first scorer; the first of equals."""
    ranked = [(line, found[1] if "loss" in line else -found[1]) for line in lines if (found := merit(line)) is not None]
    return min(ranked, key=lambda item: item[1])[0] if ranked else None


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard and other trackers.

    Args:
        run: the run folder.
        done: steps that the resumed run has behind it; later lines are removed, they will be written again.
        name: of another log, whose numbers TensorBoard shows as a run of its own.
        board: whether TensorBoard's files are written.
        also: what else takes the numbers, by name, and their step; those of another log are "NAME/number".
    """

    def __init__(
        self,
        run: Path,
        done: int,
        name: str = "metrics",
        *,
        board: bool = True,
        also: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.path, self.also, self.prefix = run / f"{name}.jsonl", also, "" if name == "metrics" else f"{name}/"
        if self.path.is_file():
            write_text(self.path, "".join(_kept_lines(self.path, done)))
        with writing(self.path):
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self.board = _board(run / "tensorboard" / self.prefix, done) if board else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; lists go to the file alone. Raises NoSpace where the disk is full."""
        with writing(self.path):
            try:
                self.file.write(json.dumps(dict(record), allow_nan=False) + "\n")
                self.file.flush()
            except OSError:
                with suppress(OSError):  # else it tries, and complains, once more when it is collected
                    self.file.close()
                raise
        numbers = {name: value for name, value in _numbers(record) if name != "step"}
        if self.board is not None:
            with writing(self.path.with_name("tensorboard")):
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, record["step"])
        if self.also is not None:
            self.also({self.prefix + name: value for name, value in numbers.items()}, record["step"])

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        if self.board is not None:
            with writing(self.path.with_name("tensorboard")):
                self.board.close()


def _board(folder: Path, done: int) -> SummaryWriter:
    """TensorBoard's writer; what it shows of later steps is hidden, they will be taken again."""
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder):
        return SummaryWriter(str(folder), purge_step=done + 1)


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line by name, nested ones as "outer/inner"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
