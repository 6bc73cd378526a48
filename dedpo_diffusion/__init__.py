"""Align diffusion models with few human and many machine preference labels.

Every stage is a function here. It takes the stage's settings object, or keyword arguments by the names of the command's options:

    from dedpo_diffusion import merge, train
    from dedpo_diffusion.settings import MergeSettings

    path, report = merge(MergeSettings(Path("pairs"), judge="clip"))
    run = train(config="sdxl_lora_24gb.yaml", data={"pairs": "pairs", "targets": "adapted"}, out="runs/adapted")

`config` names a YAML file or recipe, which the other arguments override. `progress` is a function that gets an `Update` at each step
of the work, in place of the console's progress. Everything is imported when it is first used, so `import dedpo_diffusion` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dedpo_diffusion.core.console import Update as Update
    from dedpo_diffusion.core.errors import UserError as UserError
    from dedpo_diffusion.debias import Merged as Merged
    from dedpo_diffusion.debias import merge_labels as merge_labels
    from dedpo_diffusion.dpo.balance import balance_errors as balance_errors
    from dedpo_diffusion.dpo.losses import implicit_rewards as implicit_rewards
    from dedpo_diffusion.dpo.losses import margin as margin
    from dedpo_diffusion.dpo.losses import preference_loss as preference_loss
    from dedpo_diffusion.dpo.step import preference_step as preference_step
    from dedpo_diffusion.settings import (
        AlignSettings,
        CacheSettings,
        CalibrateSettings,
        CompareSettings,
        ExportSettings,
        IngestSettings,
        InspectSettings,
        LabelSettings,
        MergeSettings,
        PairsSettings,
        ProposeSettings,
        QuickstartSettings,
        SampleSettings,
        ScoreSettings,
        TrainSettings,
        ValidateSettings,
        VoteSettings,
    )

    Callback = Callable[[Update], None]

_HOME = {
    "Merged": "debias",
    "Update": "core.console",
    "UserError": "core.errors",
    "balance_errors": "dpo.balance",
    "implicit_rewards": "dpo.losses",
    "margin": "dpo.losses",
    "merge_labels": "debias",
    "preference_loss": "dpo.losses",
    "preference_step": "dpo.step",
}

__all__ = [
    "Merged", "Update", "UserError", "align", "balance_errors", "cache", "calibrate", "compare", "export", "export_pairs",
    "implicit_rewards",
    "ingest", "inspect", "join_pairs", "label", "margin", "merge", "merge_labels", "preference_loss", "preference_step", "propose",
    "push_pairs",
    "quickstart", "sample", "score", "train", "validate", "vote",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def _run(stage: str, settings: Any, progress: Callback | None, options: dict[str, Any]) -> Any:
    """Run a stage with its settings, or with those that keyword arguments make. Raises UserError where both are given."""
    from dedpo_diffusion.core.console import UserError, call
    from dedpo_diffusion.core.parser import Parser
    from dedpo_diffusion.pipelines import STAGES

    kind = getattr(import_module(".settings", __name__), f"{stage.title()}Settings")
    if settings is None:
        settings = Parser(kind).keywords(options)
    elif options:
        raise UserError(f"{stage}: settings are given, and {', '.join(options)} too; use dataclasses.replace to change settings")
    elif not isinstance(settings, kind):
        raise UserError(f"{stage}: a {type(settings).__name__} is given, and it takes {kind.__name__}, or keyword arguments")
    return call(import_module(f".{STAGES[stage][0]}", __name__).run, settings, progress)


def _pairs(action: str, settings: PairsSettings | None, progress: Callback | None, options: dict[str, Any]) -> Any:
    """Run the stage of pairs for one of its actions. Raises UserError where the settings are for another."""
    if settings is None:
        return _run("pairs", None, progress, {"action": action} | options)
    if getattr(settings, "action", action) != action:
        from dedpo_diffusion.core.console import UserError

        raise UserError(f"{action}_pairs: the settings are for {settings.action}")
    return _run("pairs", settings, progress, options)


# ---- pairs


def ingest(settings: IngestSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Read a public preference format, your own table or a data set of the hub into a pair data set.

    Returns:
        Its folder. `ingest.json` in it counts what was read, kept, merged and dropped.

    Raises:
        UserError: the source cannot be read, or the folder exists.
    """
    return _run("ingest", settings, progress, options)


def propose(settings: ProposeSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Make pairs from a model's own images.

    Returns:
        The folder of the pair data set.

    Raises:
        UserError: the model or the prompts cannot be used, or the folder holds pairs.
    """
    return _run("propose", settings, progress, options)


def validate(settings: ValidateSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> dict[str, Any]:
    """Check a pair data set, its labels and votes, and write a page with pictures about them.

    Returns:
        What was found, as in `validate.json`.

    Raises:
        UserError: the pairs cannot be used for training; the report is written all the same.
    """
    return _run("validate", settings, progress, options)


def cache(settings: CacheSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> None:
    """List and remove the caches of encoded pairs that training keeps.

    Returns:
        Nothing; what is there is said.

    Raises:
        UserError: there is no cache of that name, or it is in use.
    """
    _run("cache", settings, progress, options)


def export_pairs(settings: PairsSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Write a pair data set for annotation tools and other programs.

    Returns:
        The folder that was written.

    Raises:
        UserError: the pairs or an option cannot be used, or the folder exists.
    """
    return _pairs("export", settings, progress, options)


def join_pairs(settings: PairsSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Make one pair dataset of several; action is `join`.

    Returns:
        The folder `out`.

    Raises:
        UserError: the pairs or an option cannot be used, a pair is in two of them, or the folder exists.
    """
    return _pairs("join", settings, progress, options)


def push_pairs(settings: PairsSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> str:
    """Send a pair data set to a hub, after saying what would be sent; nothing in it tells of this machine or names a person.

    Returns:
        Its address there.

    Raises:
        UserError: nobody is logged in, something tells of this machine, or the upload breaks off; what arrived is said.
    """
    return _pairs("push", settings, progress, options)


# ---- labels


def vote(settings: VoteSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path | None:
    """Let people label pairs, or compare two models, in a web page; goes on until there are `until` answers, or Ctrl-C.

    Returns:
        The label file, or that of the votes on two models; None where nobody answered.

    Raises:
        UserError: the pairs, the address or an option cannot be used.
    """
    return _run("vote", settings, progress, options)


def label(settings: LabelSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> list[Path]:
    """Label every pair with machine judges.

    Returns:
        The judges' label files, in the order of `judges`.

    Raises:
        UserError: a judge cannot be loaded, or answers no pair.
    """
    return _run("label", settings, progress, options)


def calibrate(settings: CalibrateSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> list[Path]:
    """Calibrate judges' labels on the human ones, stack several judges into one, or let people teach one.

    Returns:
        The new label files.

    Raises:
        UserError: there are too few human labels, or none of a judge.
    """
    return _run("calibrate", settings, progress, options)


def merge(settings: MergeSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> tuple[Path, dict[str, Any]]:
    """Merge human and machine labels into one target and weight per pair, and tell what they are worth.

    Returns:
        The file of targets, and its report; with `plan` the file of the plan, and the plan.

    Raises:
        UserError: labels are missing, or cannot be merged.
    """
    import json

    path = _run("merge", settings, progress, options)
    return path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# ---- training


def train(settings: TrainSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Train a LoRA, or the whole UNet, from pairs and targets; the same call goes on with a run that was stopped.

    Returns:
        The run folder.

    Raises:
        UserError: model, pairs or settings cannot be used, the device's memory is too small, or the loss is no longer finite.
    """
    return _run("train", settings, progress, options)


def export(settings: ExportSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Write what a run trained, or another LoRA, for other programs; with `push`, send it to a model hub.

    Returns:
        The file or folder that was written.

    Raises:
        UserError: the source or an option cannot be used, or the hub refuses.
    """
    return _run("export", settings, progress, options)


def inspect(settings: InspectSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> dict[str, Any]:
    """Tell what a weight file or a folder is, for which base, and which programs read it.

    Returns:
        What was found: `what`, `path`, `bytes`, `facts`, `warnings`, and more by kind.

    Raises:
        UserError: nothing of it can be read.
    """
    return _run("inspect", settings, progress, options)


# ---- images and verdict


def sample(settings: SampleSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> Path:
    """Sample images, seed-paired with every other model sampled with the same prompts and seed.

    Returns:
        The folder of images; of several strengths, the folder of their folders.

    Raises:
        UserError: the model, a LoRA or the prompts cannot be used, or the folder holds other images.
    """
    return _run("sample", settings, progress, options)


def score(settings: ScoreSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> list[Path]:
    """Score sampled images.

    Returns:
        The score files, one of each folder.

    Raises:
        UserError: a scorer cannot be loaded, or a folder cannot be read.
    """
    return _run("score", settings, progress, options)


def compare(settings: CompareSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> dict[str, Any]:
    """Compare sample folders that share prompts and seeds, and write the report; the first is the base.

    Returns:
        The results, as in `results.json`: `verdict`, `arms`, `differences`, `loras` and others.

    Raises:
        UserError: the folders cannot be compared.
    """
    return _run("compare", settings, progress, options)


# ---- whole journeys


def align(settings: AlignSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> dict[str, Any] | None:
    """The whole journey on your own model: pairs, labels, targets, LoRAs, images, verdict; the same call goes on where it stopped.

    Returns:
        The results, as in `results.json`; None with `dry_run`.

    Raises:
        UserError: settings that cannot be used, or a stage that failed.
    """
    return _run("align", settings, progress, options)


def quickstart(settings: QuickstartSettings | None = None, /, *, progress: Callback | None = None, **options: Any) -> dict[str, Any] | None:
    """The whole journey on the embedded world, on a CPU, in minutes.

    Returns:
        The results, as in `results.json`; None with `dry_run`.

    Raises:
        UserError: settings that cannot be used.
    """
    return _run("quickstart", settings, progress, options)
