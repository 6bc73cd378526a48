"""Write what a run trained, so that other programs load it.

    dedpo export runs/tuned --out tuned.safetensors
    dedpo export runs/tuned --format merged --out models/tuned

The newest checkpoint is taken, or with --checkpoint best what was trained at the best validation. True alpha and the run's settings
are stored in the file's metadata, or beside the merged model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.console import UserError, say, stage
from dedpo_diffusion.settings import ExportSettings

if TYPE_CHECKING:
    from torch import Tensor


def run(settings: ExportSettings) -> Path:
    """Write what a run trained, so that other programs load it."""
    from safetensors.torch import load_file

    from dedpo_diffusion.checkpoints import check_checkpoint
    from dedpo_diffusion.runs import read_settings

    trained = read_settings(settings.run)
    full = trained.get("weights", "lora") == "full"
    if full and settings.format != "merged":
        raise UserError(f"{settings.run}: the whole UNet was trained, so there is no adapter; give --format merged")
    if settings.format != "merged" and settings.out.suffix != ".safetensors":
        raise UserError(f"{settings.out}: give a file name that ends in .safetensors")
    if settings.format == "merged" and (settings.out.suffix == ".safetensors" or settings.out.exists()):
        raise UserError(f"{settings.out}: a merged model is a folder that does not exist yet; choose another --out")
    step, folder = chosen(settings)
    try:
        check_checkpoint(folder)
    except UserError as error:
        other = "give the run's `dedpo train` command again, which goes on from the checkpoint before it"
        raise UserError(f"{error}; {'take --checkpoint last' if settings.checkpoint == 'best' else other}") from error
    averaged = settings.average and (folder / "average.safetensors").is_file()
    parameters = load_file(folder / ("average.safetensors" if averaged else "parameters.safetensors"))
    if averaged:
        say(f"taking the moving average of {settings.run}; --average false takes the last step")
    if trained["objective"].get("kind") == "self_npo":
        say("Warning: objective.kind=self_npo trains a model to be worse, for guidance to steer away from; do not sample from it alone")
    if settings.format == "merged":
        write_merged(settings, trained, parameters, step)
    else:
        write_lora(settings, trained, parameters, step)
    return settings.out


def chosen(settings: ExportSettings) -> tuple[int, Path]:
    """The step to export, and the folder of its parameters.

    Raises:
        UserError: the run has no such checkpoint.
    """
    from dedpo_diffusion.runs import best_folder, checkpoints

    file, found = best_folder(settings.run) / "state.json", checkpoints(settings.run)
    best = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if best is not None and (settings.checkpoint == "best" or (found and found[-1][0] != best["step"])):
        other = "" if settings.checkpoint == "best" else ", which --checkpoint best takes"
        say(f"{settings.run}: step {best['step']} was best{other} ({best['by']} {best['value']:.4f})")
    if settings.checkpoint == "best":
        if best is None:
            raise UserError(f"{settings.run}: no best step is known; train with validation.every, and with held-out pairs or scorers")
        return best["step"], file.parent
    if not found:
        raise UserError(f"{settings.run}: no checkpoint yet; train at least checkpoint_every steps")
    return found[-1]


def write_lora(settings: ExportSettings, trained: dict[str, Any], parameters: Mapping[str, Tensor], step: int) -> None:
    """The adapter as one file."""
    from dedpo_diffusion.weights import save_lora

    tensors, config = adapter(trained, parameters)
    save_lora(settings.out, tensors, config, {**trained, "step": step})
    lora = trained["lora"]
    say(f"wrote {settings.out}: {len(tensors)} tensors, rank {lora['rank']}, alpha {lora['alpha']:g}, step {step}")


def adapter(trained: dict[str, Any], parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors and configuration, as diffusers reads them."""
    from dedpo_diffusion.models import ATTENTION
    from dedpo_diffusion.weights import diffusers_lora

    lora = trained["lora"]
    return diffusers_lora(
        parameters, rank=lora["rank"], alpha=lora["alpha"], targets=lora["targets"] or list(ATTENTION),
        rslora=lora.get("rslora", False), dora=lora.get("dora", False),
    )  # fmt: skip


def write_merged(settings: ExportSettings, trained: dict[str, Any], parameters: Mapping[str, Tensor], step: int) -> None:
    """The base model with what was trained worked in, float32, as a diffusers folder."""
    from dedpo_diffusion.bases import load_pipeline
    from dedpo_diffusion.files import atomic_folder, write_json
    from dedpo_diffusion.weights import save_lora

    pipe = load_pipeline(trained["model"], config=trained.get("model_config"))
    with atomic_folder(settings.out) as temporary:
        if trained.get("weights", "lora") == "full":
            pipe.unet.load_state_dict(dict(parameters))
        else:  # diffusers reads alpha from a file alone
            tensors, config = adapter(trained, parameters)
            save_lora(temporary / "adapter.safetensors", tensors, config, {})
            pipe.load_lora_weights(temporary, weight_name="adapter.safetensors")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            (temporary / "adapter.safetensors").unlink()
        pipe.save_pretrained(temporary)
        write_json(temporary / "dedpo_settings.json", {**trained, "step": step})
    say(f"wrote {settings.out}: the whole model, step {step}")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ExportSettings, run, argv, prog="dedpo export", positional=("run",))


if __name__ == "__main__":
    raise SystemExit(main())
