"""What is exported: the checkpoint of a run, or a LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import read_object
from dedpo_diffusion.settings import ExportSettings
from dedpo_diffusion.weights.run_folder import AS_TRAINED, POWER_FILE, read_identity

if TYPE_CHECKING:
    from torch import Tensor

    from dedpo_diffusion.weights import Lora

BASE = ("model", "model_config", "model_prediction")  # the settings that name a base


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        title: its name.
        lora: the LoRA; None where the whole UNet was trained.
        weights: the whole UNet's weights; None where a LoRA was trained.
        model, model_config, model_prediction: the base, None where nothing names it.
        settings: of the run, with "step"; empty where they are not known.
        sources: digests of what the run was trained with, by name.
        before: how it came to be, where it is a file.
    """

    title: str
    lora: Lora | None
    weights: Mapping[str, Tensor] | None
    model: str | None
    model_config: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    model_prediction: str | None = None

    @property
    def at(self) -> str:
        """ ", step 7" of a run's."""
        return f", step {self.settings['step']}" if "step" in self.settings else ""

    def told(self, made: Mapping[str, Any]) -> dict[str, str]:
        """What the metadata of a file say of settings, sources and what was done."""
        parts = {"settings": self.shared, "sources": self.sources, "made": {**self.before, **made}}
        return {f"dedpo_{name}": json.dumps(dict(part), sort_keys=True) for name, part in parts.items() if part}

    def told_in_folder(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """The same, for a folder's JSON."""
        parts = {"sources": dict(self.sources), "made": {**self.before, **made}}
        return {**self.shared, **{name: part for name, part in parts.items() if part}}

    @property
    def shared(self) -> dict[str, Any]:
        """The settings as they may leave the machine."""
        from dedpo_diffusion.weights.provenance import portable

        return portable(dict(self.settings))

    def load_base(self) -> Any:
        """The base model as a pipeline, float32. Raises as `load_pipeline`, and UserError where nothing names it."""
        from dedpo_diffusion.models.loading import load_pipeline
        from dedpo_diffusion.weights.provenance import is_hub_id

        if self.model is None:
            raise UserError(f"{self.title}: nothing in it names its base model, which is needed here; give --model")
        if self.model != "shapes" and not is_hub_id(self.model) and not Path(self.model).exists():
            raise UserError(f"{self.title}: its base model, {self.model!r}, is needed here and is not there; give --model, where it is now")
        return load_pipeline(self.model, config=self.model_config, prediction=self.model_prediction)

    def apply(self, pipe: Any, strength: float, others: Sequence[tuple[Lora, float]]) -> None:
        """Work this, and other LoRAs, into a pipeline's weights, in float32 and in place."""
        from dedpo_diffusion.weights.fusing import merge, replace_weights

        if self.weights is not None:
            replace_weights(pipe.unet, self.weights, strength=strength)
        if self.lora is not None:
            merge(pipe, self.lora, strength=strength)
        for other, by in others:
            merge(pipe, other, strength=by)

    def touched(self, others: Sequence[tuple[Lora, float]]) -> list[str]:
        """The parts of a pipeline that this and other LoRAs change."""
        names = {"unet"} if self.weights is not None else set()
        for lora in [self.lora, *(other for other, _ in others)]:
            names |= {name.partition(".")[0] for name in (lora.layers if lora else ())}
        return sorted(names)


def weights_of(pipe: Any, parts: Sequence[str]) -> dict[str, Tensor]:
    """The weights of these parts of a pipeline, under the names of LoRAs' layers."""
    from dedpo_diffusion.weights.lora import full_name

    return {full_name(part, name): value for part in parts for name, value in getattr(pipe, part).state_dict().items()}


def open_source(settings: ExportSettings) -> Source:
    """Read what is to be exported.

    Raises:
        UserError: it is no run with a whole checkpoint, and no LoRA file.
    """
    if settings.source.is_dir():
        return _open_run(settings)
    if not settings.source.exists():
        raise UserError(f"there is no {settings.source}; give the folder of a run, which `dedpo train` makes, or a LoRA file")
    return _open_file(settings)


def base_named(settings: ExportSettings, trained: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The base model, its configuration and what it predicts: as given, or else as in the settings that something was trained with."""
    if settings.model:
        return settings.model, settings.model_config, settings.model_prediction
    return trained.get("model"), trained.get("model_config"), settings.model_prediction or trained.get("model_prediction")


def _open_file(settings: ExportSettings) -> Source:
    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.weights import read_lora_file
    from dedpo_diffusion.weights.header import json_dictionary

    for name, usual in (("checkpoint", "last"), ("average", True)):
        if getattr(settings, name) != usual:
            raise UserError(f"--{name} is of a run, and {settings.source} is no run folder; leave it out")
    lora = read_lora_file(settings.source)
    told = {name: json_dictionary(settings.source, lora.metadata, f"dedpo_{name}") for name in ("settings", "sources", "made")}
    trained = told["settings"]
    for name in BASE:
        if settings.model is None and not isinstance(trained.get(name), str | None):
            raise UserError(f"{settings.source}: its dedpo_settings name {trained[name]!r} as {name}; give --model")
    before: dict[str, Any] = {"from": {"file": settings.source.name, "sha256": file_digest(settings.source)}}
    if told["made"]:
        before["from"]["made"] = told["made"]
    title = lora.metadata.get("modelspec.title") or lora.metadata.get("ss_output_name") or settings.source.stem
    model, config, prediction = base_named(settings, trained)
    return Source(title, lora, None, model, config, trained, told["sources"], before, prediction)


def _open_run(settings: ExportSettings) -> Source:
    from dedpo_diffusion.weights import from_parameters
    from dedpo_diffusion.weights.checkpoints import check_checkpoint, load_part

    run = settings.source
    trained = run_settings(run)
    step, folder = chosen(settings)
    try:
        check_checkpoint(folder)
    except UserError as error:
        other = "give the run's `dedpo train` command again, which resumes from the checkpoint before it"
        raise UserError(f"{error}; {'take --checkpoint last' if settings.checkpoint == 'best' else other}") from error
    averaged = settings.average and (folder / "average.safetensors").is_file()
    parameters = load_part(folder, "average" if averaged else "parameters")  # each is read when it is asked for
    assert parameters is not None  # or the check had found it missing
    if averaged:
        say(f"taking the moving average of {run}; --average false takes the last step")
    lora = None
    if trained.get("weights", "lora") == "lora":
        lora = from_parameters(parameters, alpha=trained["lora"]["alpha"], rslora=trained["lora"].get("rslora", False))
    model, config, prediction = base_named(settings, trained)
    title = Path(trained.get("out", run)).name
    told = {**trained, "step": step, **measured_facts(run, trained)}
    return Source(
        title, lora, parameters if lora is None else None, model, config, told, digests(run, trained), model_prediction=prediction
    )


def measured_facts(run: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """As `measured_power`, of a run with objective.power=measured: the power it used, and by which noise ratio; else nothing.

    Raises:
        UserError: the run folder does not say.
    """
    if trained["objective"].get("power") != "measured":
        return {}
    file = run / POWER_FILE
    found = read_object(file, AS_TRAINED)
    try:
        told = {"power": found["power"], "noise_ratio": found["measured"]["value"], "standard_error": found["measured"]["standard_error"]}
        told |= {"endless_power": found["run"]["endless_power"], "visits": found["run"]["visits"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: does not say which power was used; {AS_TRAINED}") from error
    return {"measured_power": told}


def run_settings(run: Path) -> dict[str, Any]:
    """The settings of a run, with what an export needs of them.

    Raises:
        UserError: it is no run folder, or they are damaged.
    """
    import yaml

    from dedpo_diffusion.weights.run_folder import read_settings

    file = run / "settings.yaml"
    try:
        found = read_settings(run)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {AS_TRAINED}") from error
    parts: dict[str, Any] = {name: found.get(name) if isinstance(found, dict) else None for name in ("data", "objective", "lora")}
    needed = ["data", "objective"]
    if isinstance(found, dict) and found.get("weights", "lora") == "lora":
        needed.append("lora")
    lacking = next((name for name in needed if not isinstance(parts[name], dict)), None)
    if lacking is None:
        alpha = isinstance(parts["lora"]["alpha"] if "alpha" in (parts["lora"] or {}) else None, int | float)
        whole = {"model": isinstance(found.get("model"), str), "data.pairs": isinstance(found["data"].get("pairs"), str)}
        whole |= {"data.targets": "targets" in found["data"], "lora.alpha": alpha or "lora" not in needed}
        lacking = next((name for name, fits in whole.items() if not fits), None)
    if lacking is not None:
        raise UserError(f"{file}: it does not say {lacking} as settings of a run do; {AS_TRAINED}")
    return found


def digests(run: Path, trained: Mapping[str, Any]) -> dict[str, str]:
    """What a run was trained with: the fingerprints in its identity.json, and the digest of its targets' label report.

    The report counts only while the targets beside it are those that were trained on.
    """
    from dedpo_diffusion.core.files import file_digest

    found = read_identity(run)
    if "targets" not in found:
        return found
    targets = Path(trained["data"]["pairs"]) / "targets" / f"{trained['data']['targets']}.parquet"
    report = targets.with_suffix(".json")
    if targets.is_file() and report.is_file() and file_digest(targets) == found["targets"]:
        found["label_report"] = file_digest(report)
    else:
        say(f"{report}: not there any more as it was in training, so its digest is not stored")
    return found


def chosen(settings: ExportSettings) -> tuple[int, Path]:
    """The step to export, and the folder of its parameters.

    Raises:
        UserError: the run has no such checkpoint.
    """
    from dedpo_diffusion.weights.run_folder import best_folder, checkpoints

    run = settings.source
    file, found = best_folder(run) / "state.json", checkpoints(run)
    best = read_object(file, AS_TRAINED) if file.is_file() else None
    if best is not None and not (isinstance(best.get("step"), int) and "by" in best and isinstance(best.get("value"), int | float)):
        raise UserError(f"{file}: it does not say which step was best, and by what; {AS_TRAINED}")
    if best is not None and (settings.checkpoint == "best" or (found and found[-1][0] != best["step"])):
        other = "" if settings.checkpoint == "best" else ", which --checkpoint best takes"
        say(f"{run}: step {best['step']} was best{other} ({best['by']} {best['value']:.4f})")
    if settings.checkpoint == "best":
        if best is None:
            raise UserError(f"{run}: no best step is known; train with validation.every, and with held-out pairs or scorers")
        return best["step"], file.parent
    if not found:
        raise UserError(f"{run}: no checkpoint yet; train at least checkpoint_every steps")
    return found[-1]
