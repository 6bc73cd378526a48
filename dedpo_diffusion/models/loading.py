"""Base models: a diffusers folder, a hub id, a single-file checkpoint, or the embedded one, as a diffusers pipeline."""

from __future__ import annotations

import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.errors import unreachable
from dedpo_diffusion.models.file_check import check_tensors, expected_shapes
from dedpo_diffusion.models.folder import first_not_finite, load_folder, part_files
from dedpo_diffusion.models.marks import Marks, chosen, configure, read_marks, settle
from dedpo_diffusion.models.single_file import PICKLED, family, how_to_convert

CONFIGS = {  # where diffusers looks up what a single file leaves unsaid: sizes, scheduler, tokenizers; SD2.x files differ in them
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, IndexError)  # of diffusers on odd files
LEFT_OUT: dict[str, dict[str, Any]] = {  # parts that neither training nor sampling needs, by class
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
}


def resolve_model(name: str) -> str:
    """The folder of "shapes", the embedded model; any other name is returned as it is.

    Raises:
        UserError: a name that looks like a path and is neither a diffusers folder nor a .safetensors file.
    """
    if name == "shapes":
        return str(files("dedpo_diffusion.shapes") / "model")
    path, wanted = Path(name), "give a diffusers folder, a .safetensors file, a hub id, or 'shapes'"
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{name}: no model_index.json there; {wanted}")
    if path.is_file() and path.suffix != ".safetensors":
        mend = how_to_convert(path) if path.suffix.lower() in PICKLED else wanted
        raise UserError(f"{name}: only .safetensors files are read, as others can run code when they are opened; {mend}")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.suffix == ".safetensors"):
        raise UserError(f"{name}: no such folder or file; {wanted}")
    return name


def load_pipeline(name: str, *, config: str | None = None, dtype: torch.dtype = torch.float32, prediction: str | None = None) -> Any:
    """Load a Stable Diffusion 1.x, 2.x or XL (base) pipeline, without safety checker and watermark.

    Args:
        name: diffusers folder, hub id, .safetensors file, or "shapes".
        config: for a .safetensors file, the diffusers folder or hub id of its architecture; None takes the published one of its
            family, from the hub or its cache.
        dtype: of all weights.
        prediction: a key of `marks.PREDICTIONS`, in the place of what the model's files say; None takes that.

    Raises:
        UserError: the model cannot be found, is of another kind, or lacks a part.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")  # diffusers passes it, the user did not
    location, override = resolve_model(name), chosen(prediction)
    if Path(location).is_file():
        return _load_file(location, config, dtype, override)
    if config is not None:
        raise UserError(f"model_config goes with a .safetensors file, and {name} is none; leave it out")
    try:
        kind = DiffusionPipeline.load_config(location)["_class_name"]
        if kind not in LEFT_OUT:
            raise UserError(f"{name}: it is a {kind}; supported are {' and '.join(LEFT_OUT)}")
        if Path(location).is_dir():
            pipe = load_folder(Path(location), kind, dtype, LEFT_OUT[kind])
        else:
            pipe = getattr(diffusers, kind).from_pretrained(location, dtype=dtype, use_safetensors=True, **LEFT_OUT[kind])
    except UNLOADABLE as error:
        if not Path(location).exists() and unreachable(error):
            raise UserError(f"{name}: the hub cannot be reached; download it elsewhere and give --model FOLDER") from error
        remedy = "give a folder or hub id with .safetensors weights of an SD1.x, SD2.x or SDXL"
        raise UserError(f"{name}: cannot be loaded as a diffusers model ({_first_line(error)}); {remedy}") from error
    configure(pipe, override or Marks(), name)
    return _checked(pipe, name, Path(location), dtype)


def _load_file(location: str, config: str | None, dtype: torch.dtype, override: Marks | None) -> Any:
    import diffusers

    kind = family(Path(location))
    if kind not in CONFIGS and config is None:
        raise UserError(
            f"{location}: Stable Diffusion 2.x files differ in prediction and size; give --model_config, a diffusers folder or hub id"
        )
    where = config if config is not None else CONFIGS[kind]
    if config is None:
        say(f"{location}: read as a {kind} with the configuration of {where}; --model_config gives another")
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    if Path(where).is_dir():
        found = diffusers.DiffusionPipeline.load_config(where)["_class_name"]
        if found != name:
            raise UserError(f"model_config {where} is a {found}, but {location} holds a {name}; give the folder of its own architecture")
    marks = override or read_marks(Path(location))
    try:
        check_tensors(Path(location), expected_shapes(where), where)
        pipe = getattr(diffusers, name).from_single_file(
            location, config=where, local_files_only=Path(where).is_dir(), dtype=dtype, **LEFT_OUT[name]
        )
    except UNLOADABLE as error:
        if not Path(where).exists() and unreachable(error):
            what = f"{location}: its configuration is that of {where}, and the hub cannot be reached"
            raise UserError(f"{what}; download it elsewhere and give --model_config FOLDER") from error
        remedy = "give --model_config, a diffusers folder of the same architecture" if config is None else f"does {config} fit it?"
        raise UserError(f"{location}: cannot be loaded ({_first_line(error)}); {remedy}") from error
    configure(pipe, marks, location, where)
    return _checked(pipe, location, Path(location), dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checked(pipe: Any, name: str, location: Path, dtype: torch.dtype) -> Any:
    channels = pipe.unet.config.in_channels
    if channels != pipe.vae.config.latent_channels:
        raise UserError(f"{name}: its UNet takes {channels} channels, so it is no text-to-image model (inpainting?); give the base model")
    settle(pipe, name)
    own_memory(pipe)
    bad = not_finite(pipe)
    if bad is not None:
        raise UserError(_blame(name, location, bad, dtype))
    return pipe


def _blame(name: str, location: Path, bad: str, dtype: torch.dtype) -> str:
    """Which tensor of which file is not finite; `bad` is what it is called in the pipeline."""
    files = part_files(location) if location.is_dir() else [location] if location.is_file() else []
    found = first_not_finite(files, dtype)
    if found is None:
        return f"{name}: its weights {bad} are not finite; download it again, or give another model"
    file, tensor, narrow = found
    if narrow:
        return f"{file}: the tensor {tensor} has numbers too large for {dtype!s}; give --dtype bfloat16 or float32".replace("torch.", "")
    return f"{file}: the tensor {tensor} has numbers that are not finite; fetch the file again, or give another model"


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def own_memory(pipe: Any) -> Any:
    """Copy all weights of a pipeline, in place, into memory of torch's own, and return it.

    As they are loaded they lie in the mapped file, wherever its header ends, and kernels round by the address (a multiple of 64 bytes or
    none): the same weights of a folder and of a single file would predict differently in the last bit.
    """
    for part in modules(pipe).values():
        for value in (*part.parameters(), *part.buffers()):
            value.data = value.data.clone(memory_format=torch.contiguous_format)
    return pipe


def not_finite(pipe: Any) -> str | None:
    """The first of a pipeline's weights with numbers that are not finite, as "unet.conv_in.weight"; None where all are."""
    for name, part in modules(pipe).items():
        for key, value in part.named_parameters():
            whole = bool(value.detach().sum().isfinite())  # one pass without a copy; a sum may overflow where no number is at fault
            if not whole and not value.detach().isfinite().all():
                return f"{name}.{key}"
    return None
