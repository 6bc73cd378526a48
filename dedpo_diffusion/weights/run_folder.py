"""A run folder: resolved settings, identity of what it was trained on, checkpoints, metrics."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import is_leftover, read_object, remove_folder, remove_leftovers, temporary_name, write_text, writing
from dedpo_diffusion.weights.checkpoints import check_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TIMESTEPS_FILE = "timesteps.json"  # the gradients' second moments by timestep, see `training.measured_timesteps`
POWER_FILE = "power.json"  # of a run that measured its power
MARK = "starting"  # of the file that says, by its name, which process claimed a folder and has done no step yet
CLAIMED = ("settings.yaml", "identity.json", POWER_FILE, "metrics.jsonl", "validation.jsonl", "tensorboard", "samples")  # by a start
AS_TRAINED = "give the run folder as training left it"
NOTHING_GROWS: Mapping[str, str | None] = MappingProxyType({})


def plain(value: Any) -> Any:
    """Settings as the plain dicts, lists, numbers and strings that YAML and JSON know; without those of metadata `recorded` False."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("recorded", True)]
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def open_run(
    folder: Path, settings: Any, identity: Mapping[str, str], free: Sequence[str] = (), grows: Mapping[str, str | None] = NOTHING_GROWS
) -> None:
    """Claim a run folder, or recognise it as this very run's, to be resumed.

    Writes `settings.yaml` and `identity.json` before anything else is written there. The claim of a run that never did a step
    does not count, unless its process still runs: `starting` takes it back where it can, and here it is taken over.

    Args:
        folder: the run folder.
        settings: the stage's dataclass.
        identity: fingerprints of the inputs (base model, targets, ...), by name; a run of an earlier version may know fewer of them.
        free: settings, as "out" or "optim.batch", that may change while the run goes on.
        grows: settings that may become larger when a run goes on, each with None, or with why it may not.

    Raises:
        UserError: the folder holds another run, other things, or this run on inputs that have changed since.
    """
    for place in (folder, folder / "checkpoints", folder / "samples"):
        remove_leftovers(place)
    wanted, file = {"settings": plain(settings), "identity": dict(identity)}, folder / "settings.yaml"
    if not file.is_file():
        if folder.exists() and any(not is_leftover(path) for path in folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a run folder; choose another --out")
        _claim(folder, wanted)
        return
    try:
        _recognise(folder, wanted, free, grows)
    except UserError:
        if not _never_began(folder):
            raise
        say(f"{folder} was claimed by a start that did no step; it is taken over")
        _clear(folder)
        _claim(folder, wanted)
    if not has_begun(folder):
        _mark(folder)


def _claim(folder: Path, wanted: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _mark(folder)
    write_text(folder / "settings.yaml", yaml.safe_dump(wanted["settings"], sort_keys=False))
    write_text(folder / "identity.json", json.dumps(wanted["identity"], indent=2) + "\n")


def _recognise(folder: Path, wanted: Mapping[str, Any], free: Sequence[str], grows: Mapping[str, str | None]) -> None:
    """See to it that the folder holds this very run, and note what has grown."""
    settings_file, identity_file = folder / "settings.yaml", folder / "identity.json"
    held = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    raised = {name: (there, now) for name in grows if _is_less(there := _at(held, name), now := _at(wanted["settings"], name))}
    compared = copy.deepcopy(held)
    for name in (*free, *raised):
        _put(compared, name, _at(wanted["settings"], name))
    difference = first_difference(compared, wanted["settings"])
    if difference:
        raise UserError(f"{folder}: holds another run ({difference}); choose another --out, or remove the folder")
    if not identity_file.is_file():
        write_text(identity_file, json.dumps(wanted["identity"], indent=2) + "\n")
    known = wanted["identity"] | read_identity(folder, "choose another --out, or remove the folder")
    changed = first_difference(known, wanted["identity"])
    if changed:
        raise UserError(f"{folder}: cannot be resumed, as its inputs have changed since it began ({changed}); choose another --out")
    for name, (there, now) in raised.items():
        if grows[name] is not None:
            raise UserError(f"{folder}: {name} is {there} there, {now} now, and {grows[name]}; choose another --out")
        _put(held, name, now)
        say(f"{folder}: {name} is raised from {there} to {now}")
    if raised:
        write_text(settings_file, yaml.safe_dump(held, sort_keys=False))


def _at(settings: Any, name: str) -> Any:
    """A setting by its name, as "optim.batch"; None where there is none."""
    for key in name.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def _put(settings: Any, name: str, value: Any) -> None:
    """Set a setting by its name, where the table that it is of is there."""
    *rooms, key = name.split(".")
    table = _at(settings, ".".join(rooms)) if rooms else settings
    if isinstance(table, dict):
        table[key] = value


def _is_less(one: Any, other: Any) -> bool:
    return isinstance(one, int | float) and isinstance(other, int | float) and one < other


# ---- a claim counts once a step is done


@contextmanager
def starting(*folders: Path) -> Iterator[None]:
    """Within the block a run begins: an error before its first step takes back what `open_run` claimed in it."""
    try:
        yield
    except BaseException:
        for folder in folders:
            give_up(folder)
        raise


def has_begun(folder: Path) -> bool:
    """Whether anything was ever done in a run folder, or a folder of samples: a step, a checkpoint, an image."""
    log = folder / "metrics.jsonl"
    logged = log.is_file() and log.stat().st_size > 0
    return logged or any(any(folder.glob(names)) for names in ("checkpoints/*", "*.png", "index.parquet", "best"))


def began(folder: Path) -> None:
    """Note that the first step is done: from now on the folder is taken."""
    temporary_name(folder / MARK).unlink(missing_ok=True)


def give_up(folder: Path) -> None:
    """Take back this process's claim of a folder in which nothing was done; what others have claimed or done stays."""
    mark = temporary_name(folder / MARK)
    if mark.is_file():
        mark.unlink()
        if _never_began(folder):
            _clear(folder)
            with suppress(OSError):  # something else is in it
                folder.rmdir()


def _mark(folder: Path) -> None:
    temporary_name(folder / MARK).touch()


def _never_began(folder: Path) -> bool:
    """Whether all that a folder holds is a claim, and no process is at it any more."""
    names = {path.name for path in folder.iterdir() if not is_leftover(path)}
    return names <= set(CLAIMED) and not has_begun(folder) and not any(folder.glob(f".{MARK}.*.tmp"))


def _clear(folder: Path) -> None:
    """Remove a claim, and what was written before a first step."""
    for path in (folder / name for name in CLAIMED):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


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


def read_identity(folder: Path, remedy: str = AS_TRAINED) -> dict[str, str]:
    """The fingerprints of a folder's inputs that `open_run` noted, by name; {} where it noted none.

    Raises:
        UserError: the file is damaged; `remedy` tells what to do.
    """
    file = folder / "identity.json"
    return read_object(file, remedy) if file.is_file() else {}


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
