"""Experiment trackers beside the run folder: Weights & Biases, MLflow and trackio, through accelerate.

A tracker gets the settings, the curves, the grids of sampled images and the report of the labels. A run never depends on one: what fails is
told once, and the run folder holds all the same. Where each tracker keeps its data is its own affair (WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_DIR and the like). None of the packages is imported unless it is named.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import write_json
from dedpo_diffusion.settings import TrainSettings

IDS = "trackers.json"  # in the run folder: the run's id with each tracker, by which a resumed run goes on there
REST = 60.0  # seconds that a tracker is left alone after a failure: each one may wait for a network
PROJECT = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "trackio": "TRACKIO_PROJECT"}  # variables of theirs
HINTS = {
    "wandb": "`wandb login` stores a key, and WANDB_MODE=offline needs none",
    "mlflow": "MLFLOW_TRACKING_URI says which server or folder it writes to",
    "trackio": "TRACKIO_DIR says which folder it writes to",
}


def check_trackers(settings: TrainSettings) -> None:
    """See to it that the trackers can be had; nothing of them is imported.

    Raises:
        UserError: one is named twice or not installed, or `none` is named beside others.
    """
    names: Sequence[str] = settings.tracker
    if not names:
        raise UserError("tracker names none; give --tracker none to keep metrics.jsonl alone")
    if len(set(names)) < len(names):
        raise UserError(f"tracker {' '.join(names)}: one of them is named twice; name each once")
    if "none" in names and len(names) > 1:
        raise UserError(f"tracker {' '.join(names)}: none goes with no other; leave it out")
    for name in PROJECT:
        if name in names and not _installed(name):
            raise UserError(
                f"tracker {name}: the package {name} is not installed; `pip install {name}`, or dedpo_diffusion with its extra [{name}]"
            )


def _installed(name: str) -> bool:
    """Whether there is such a package; a folder of that name, as wandb leaves one, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


class Tracker:
    """One tracker's run. Nothing here raises: what fails is told once, and the tracker is left alone for a while.

    Args:
        name: of the tracker.
        run: its id there, None for a new one.
        settings: of the training run.
    """

    name = ""

    def __init__(self, run: str | None, settings: TrainSettings) -> None:
        self.run, self.resumed, self.settings = run, run is not None, settings
        self.project = settings.tracker_project or os.environ.get(PROJECT[self.name]) or "dedpo"
        self.started = self.told = False
        self.missed, self.again = 0, 0.0
        self.inner: Any = None

    def attempt(self, what: Callable[[], Any]) -> None:
        """Do something with the tracker, or count that it was not done."""
        if time.monotonic() < self.again:
            self.missed += 1
            return
        try:
            what()
        except Exception as error:  # whatever a foreign package raises; a run does not end by it
            self.missed, self.again = self.missed + 1, time.monotonic() + REST
            if not self.told:
                self.told = True
                said = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
                say(f"Warning: tracker {self.name}: {said}. Training goes on, and metrics.jsonl has every number; {HINTS[self.name]}")

    def start(self, config: Mapping[str, Any], report: Path | None) -> None:
        """Open the run there, and hand in the settings and the report of the labels."""

        def begin() -> None:
            self.open(config)
            self.started = True
            if report is not None:
                self.report(report)

        self.attempt(begin)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One point of every curve."""
        if self.started:
            self.attempt(lambda: self.inner.log(dict(numbers), step=step))

    def grid(self, file: Path, step: int) -> None:
        """The grid of sampled images after a step."""
        if self.started:
            self.attempt(lambda: self.image(file, step))

    def finish(self, failed: bool) -> None:
        """Close the run there, and say what did not reach it."""
        if self.started:
            self.again = 0.0
            self.attempt(lambda: self.end(failed))
            if self.missed:
                say(f"tracker {self.name}: {self.missed} entries did not reach it; they are in {self.settings.out}")

    # ---- what each does in its own way

    def open(self, config: Mapping[str, Any]) -> None:
        """Open the run; `run` is then its id."""
        raise NotImplementedError

    def report(self, file: Path) -> None:
        """Store the report of the labels as a file."""
        raise NotImplementedError

    def image(self, file: Path, step: int) -> None:
        """Store an image."""
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        """Close the run."""
        self.inner.finish()


class Wandb(Tracker):
    """Weights & Biases; its files lie in the run folder unless WANDB_DIR says otherwise."""

    name = "wandb"

    def open(self, config: Mapping[str, Any]) -> None:
        """Open the run, with the training step as the axis of every curve: wandb's own count would refuse steps that are taken again."""
        from accelerate.tracking import WandBTracker

        self.run = self.run or uuid4().hex[:8]
        folder = os.environ.get("WANDB_DIR") or str(self.settings.out)
        self.inner = WandBTracker(self.project, name=self.settings.out.name, id=self.run, resume="allow", dir=folder)
        self.inner.start()
        self.inner.store_init_configuration(dict(config))
        self.inner.tracker.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One point of every curve."""
        if self.started:
            self.attempt(lambda: self.inner.log({**numbers, "step": step}))

    def report(self, file: Path) -> None:
        """As an artifact."""
        import wandb

        artifact = wandb.Artifact(f"label_report-{self.run}", type="label_report")
        artifact.add_file(str(file))
        self.inner.tracker.log_artifact(artifact)

    def image(self, file: Path, step: int) -> None:
        """As media of that step."""
        import wandb

        self.inner.log({"samples": wandb.Image(str(file)), "step": step})

    def end(self, failed: bool) -> None:
        """With an exit code, so that a run that broke off is seen to have done so."""
        self.inner.tracker.finish(exit_code=int(failed))


class Mlflow(Tracker):
    """MLflow, on the server or in the folder of MLFLOW_TRACKING_URI."""

    name = "mlflow"

    def open(self, config: Mapping[str, Any]) -> None:
        """Open the run; parameters cannot change there, so those of a resumed run stay."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # else training waits for minutes where a server has gone
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from accelerate.tracking import MLflowTracker

        self.inner = MLflowTracker(self.project, run_id=self.run, run_name=self.settings.out.name)
        self.inner.start()
        self.run = self.inner.tracker.info.run_id
        if not self.resumed:
            self.inner.store_init_configuration(dict(config))

    def report(self, file: Path) -> None:
        """As an artifact."""
        self.inner.log_artifact(str(file), "label_report")

    def image(self, file: Path, step: int) -> None:
        """As an image of that step, which its pages show."""
        import mlflow
        from PIL import Image

        with Image.open(file) as image:
            mlflow.log_image(image, key="samples", step=step, synchronous=True)

    def end(self, failed: bool) -> None:
        """With its status."""
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """trackio, in its local database; it knows runs by their names alone, so that the name is made one of a kind."""

    name = "trackio"

    def open(self, config: Mapping[str, Any]) -> None:
        """Open the run."""
        from accelerate.tracking import TrackioTracker

        self.run = self.run or f"{self.settings.out.name}-{uuid4().hex[:8]}"
        self.inner = TrackioTracker(self.project, name=self.run, resume="allow", config=dict(config))
        self.inner.start()

    def report(self, file: Path) -> None:
        """As an artifact."""
        self.inner.tracker.log_artifact(str(file), name="label_report", type="label_report")

    def image(self, file: Path, step: int) -> None:
        """As media of that step."""
        import trackio

        self.inner.log({"samples": trackio.Image(str(file))}, step=step)


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, Mlflow, Trackio)}


class Trackers:
    """All trackers of a run, used as a context: leaving it closes them.

    Args:
        settings: of the run.
        active: whether this process talks to them; the main one does.
    """

    def __init__(self, settings: TrainSettings, *, active: bool) -> None:
        self.settings, self.board = settings, "tensorboard" in settings.tracker
        self.names = [name for name in settings.tracker if name in KINDS and active]
        self.all: list[Tracker] = []

    def open(self, settings: TrainSettings) -> None:
        """Open a run with each, or go on with the one that the run folder names.

        Args:
            settings: with what the run chose itself, which the trackers are to show.
        """
        if not self.names:
            return
        file = self.settings.out / IDS
        known = _json(file)
        report = report_file(settings)
        config = flat_config(settings, report)
        self.all = [KINDS[name](known.get(name), settings) for name in self.names]
        for tracker in self.all:
            tracker.start(config, report)
        found = {tracker.name: tracker.run for tracker in self.all if tracker.started}
        if found:
            try:
                write_json(file, known | found)
            except (UserError, OSError) as error:
                say(f"Warning: {error}; a resumed run will begin anew with each tracker")
        first = self.settings.out / "samples" / "step-00000000" / "grid.png"
        for tracker in self.all:
            if first.is_file() and not tracker.resumed:
                tracker.grid(first, 0)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One point of every curve, for each tracker."""
        for tracker in self.all:
            tracker.log(numbers, step)

    def grid(self, file: Path, step: int) -> None:
        """A grid of sampled images, for each tracker."""
        for tracker in self.all:
            tracker.grid(file, step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for tracker in self.all:
            tracker.finish(kind is not None)


def report_file(settings: TrainSettings) -> Path | None:
    """The report that `dedpo merge` wrote beside the targets; None where there is none."""
    file = settings.data.pairs / "targets" / f"{settings.data.targets}.json"
    return file if file.is_file() else None


def flat_config(settings: TrainSettings, report: Path | None) -> dict[str, Any]:
    """The settings by their names on the command line, and the numbers of the label report as "label_report.NAME"."""
    from dedpo_diffusion.weights.run_folder import plain

    found = dict(_flat(plain(settings)))
    if report is not None:
        found |= {name: value for name, value in _flat({"label_report": _json(report)}) if isinstance(value, int | float | str)}
    return found


def _json(file: Path) -> dict[str, Any]:
    """The table in a JSON file; {} where there is none, as a tracker is no reason to end a run."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
