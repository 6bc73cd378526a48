"""The base model that weights are for: by their names and shapes, by what metadata tell, and what is told of it in metadata.

The keys are those of Stability-AI/ModelSpec 1.0.1 and of kohya-ss/sd-scripts (library/sai_model_spec.py, networks/
extract_lora_from_models.py); all values are strings. There is no date: the same export gives the same file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.loading import UNLOADABLE, resolve_model
from dedpo_diffusion.models.marks import Marks, chosen, read_marks
from dedpo_diffusion.models.single_file import family as family_of_file
from dedpo_diffusion.weights.header import DIGEST
from dedpo_diffusion.weights.kohya import Family
from dedpo_diffusion.weights.lora import Lora

# ---- what weights show


FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL", "refiner": "the SDXL refiner"}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}  # of the text embeddings that cross-attention reads
_CROSS = re.compile(r"attn2[._](?:processor[._])?to_[kv]")
_DEEP = re.compile(r"(attentions|_blocks?)[._]\d+[._](\d+[._])?transformer_blocks[._][1-9]")  # SD1.x and SD2.x have one in a row
_SECOND = re.compile(r"text_encoder_2\.|lora_te2_")
REFINER = re.compile(r"^(sdxl|stable-diffusion-xl).*refiner")
_NAMED = (  # in ss_base_model_version of kohya's scripts, and in modelspec.architecture
    ("refiner", REFINER),
    ("sdxl", re.compile(r"^(sdxl|stable-diffusion-xl)")),
    ("sd2", re.compile(r"^(sd_v2|stable-diffusion-v2)")),
    ("sd1", re.compile(r"^(sd_v1|sd_1|stable-diffusion-v1)")),
)
UNPUBLISHED = "which no published one has"  # of the width of cross-attention, in an evidence
DECLARED = ("modelspec.architecture", "ss_base_model_version")


@dataclass(frozen=True)
class Evidence:
    """What shows of a base model, and what that says of its family.

    Attributes:
        family: a key of FAMILIES, or None.
        evidence: what shows it, in words; the strongest first.
        contradiction: what does not go together, in words, or "".
    """

    family: str | None
    evidence: list[str]
    contradiction: str = ""

    def words(self) -> str:
        """The family's name with the evidence."""
        name = FAMILIES[self.family] if self.family else "unknown"
        return f"{name} ({'; '.join(self.evidence)})" if self.evidence else name


def find_base(shapes: Mapping[str, tuple[int, ...] | None], metadata: Mapping[str, str]) -> Evidence:
    """The base of weights.

    Args:
        shapes: of the whole weight by the layer's name, (out, in, ...), None where it is not known.
        metadata: of the file.
    """
    found: list[tuple[str | None, str]] = []
    widths = {shape[1] for name, shape in shapes.items() if shape is not None and len(shape) > 1 and _CROSS.search(name)}
    for width in sorted(widths):
        family = WIDTHS.get(width)
        found.append((family, f"cross-attention of width {width}" + ("" if family else f", {UNPUBLISHED}")))
    if any(_DEEP.search(name) for name in shapes):
        found.append(("sdxl", "several transformer blocks in a row"))
    if any(_SECOND.match(name) for name in shapes):
        found.append(("sdxl", "a second text encoder"))
    for key in DECLARED:
        said = metadata.get(key, "")
        named = next((family for family, pattern in _NAMED if pattern.match(said.lower())), None)
        if named is not None:
            found.append((named, f"{key} is {said}"))
    families = list(dict.fromkeys(family for family, _ in found if family is not None))
    if len(families) < 2:
        return Evidence(families[0] if families else None, [words for _, words in found])
    sides = "; ".join(f"{FAMILIES[family]}: {', '.join(words for own, words in found if own == family)}" for family in families)
    return Evidence(families[0], [words for family, words in found if family == families[0]], f"the base is contradictory ({sides})")


def fits_nothing_published(report: Mapping[str, Any]) -> bool:
    """Whether weights, of which `report` tells, have the shape of no published model."""
    base = report.get("base") or {}
    return base.get("family") is None and any(words.endswith(UNPUBLISHED) for words in base.get("evidence") or ())


# ---- what metadata tell


KEPT = tuple(f"modelspec.{name}" for name in ("author", "license", "description", "trigger_phrase", "usage_hint", "tags"))
SIZES: dict[Family, int] = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # of the published models
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # as ModelSpec and sd-scripts write them


@dataclass(frozen=True)
class Base:
    """A base model: its family, what its UNet predicts (in the words of diffusers), and the pixels of a side it was made for.

    `prediction` and `size` are None where they are not known; `zero_snr` if its schedule ends in pure noise.
    """

    family: Family
    prediction: str | None = None
    size: int | None = None
    zero_snr: bool = False

    @property
    def architecture(self) -> str:
        """ModelSpec's name of it."""
        if self.family == "sd2":
            return "stable-diffusion-v2-768-v" if self.prediction == "v_prediction" else "stable-diffusion-v2-512"
        return "stable-diffusion-v1" if self.family == "sd1" else "stable-diffusion-xl-v1-base"


def look_up(name: str, config: str | None = None, prediction: str | None = None) -> Base:
    """What the configuration of a model says; no weight is read.

    Args:
        name: as `load_pipeline` takes it.
        config: likewise, for a .safetensors file.
        prediction: likewise, in the place of what the model's files say.

    Raises:
        UserError: the model cannot be found, or is of another kind.
    """
    place, marks = resolve_model(name), chosen(prediction)
    if Path(place).is_file():
        kind: Family = family_of_file(Path(place))  # type: ignore[assignment]
        if config is None and kind == "sd2":
            raise UserError(f"{name}: Stable Diffusion 2.x files differ in prediction and size; give --model_config")
        marks = marks or read_marks(Path(place))
        if config is None:
            return _marked(Base(kind, "epsilon", SIZES[kind]), marks)
        place = config
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig

    try:
        unet = UNet2DConditionModel.load_config(place, subfolder="unet")
        vae = AutoencoderKL.load_config(place, subfolder="vae")
        schedule = DDIMScheduler.load_config(place, subfolder="scheduler")
        act = CLIPTextConfig.from_pretrained(place, subfolder="text_encoder").hidden_act
    except UNLOADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: its configuration cannot be read ({reason}); give --model, where the base model is now") from error
    return _marked(_base(unet, act, schedule, 2 ** (len(vae["block_out_channels"]) - 1)), marks)


def _marked(base: Base, marks: Marks | None) -> Base:
    """What marks say of a base wins over its configuration."""
    if marks is None:
        return base
    zero = base.zero_snr if marks.zero_snr is None else marks.zero_snr
    return replace(base, prediction=marks.prediction or base.prediction, zero_snr=zero)


def base_of(pipe: Any) -> Base:
    """What a loaded pipeline is."""
    return _base(pipe.unet.config, pipe.text_encoder.config.hidden_act, pipe.scheduler.config, pipe.vae_scale_factor)


def _base(unet: Mapping[str, Any], act: str, schedule: Mapping[str, Any], factor: int) -> Base:
    family: Family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd2" if act == "gelu" else "sd1"
    size = unet.get("sample_size")
    prediction = schedule.get("prediction_type", "epsilon")
    return Base(family, prediction, size * factor if size else None, bool(schedule.get("rescale_betas_zero_snr")))


def modelspec(base: Base, title: str, *, lora: bool) -> dict[str, str]:
    """ModelSpec's metadata of a LoRA or of a whole model."""
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": base.architecture + ("/lora" if lora else ""),
        "implementation": "diffusers" if lora else "https://github.com/Stability-AI/generative-models",
        "title": title,
        "hash_sha256": f"0x{DIGEST}",
    }
    if base.size is not None:
        found["resolution"] = f"{base.size}x{base.size}"
    if base.prediction is not None:
        found["prediction_type"] = PREDICTIONS.get(base.prediction, base.prediction)
    return {f"modelspec.{key}": value for key, value in found.items()}


def network(lora: Lora, base: Base, title: str) -> dict[str, str]:
    """What programs around sd-scripts read of a LoRA in its layout: the base's version, rank, alpha and the digest of the tensors."""
    linear = {layer.rank for layer in lora.layers.values() if layer.down.ndim == 2 or layer.down.shape[2:].numel() == 1}
    conv = {layer.rank for layer in lora.layers.values()} if not linear else {
        layer.rank for layer in lora.layers.values() if layer.down.ndim == 4 and layer.down.shape[2:].numel() > 1
    }  # fmt: skip
    alphas = {layer.alpha for layer in lora.layers.values()}
    arguments: dict[str, str] = {}
    if conv:
        arguments |= {"conv_dim": _one(conv), "conv_alpha": _one(alphas)}
    dora = any(layer.magnitude is not None for layer in lora.layers.values())
    if dora:
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base.family]
    v = base.prediction == "v_prediction"
    found = {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": _one(linear or conv),
        "ss_network_alpha": _one(alphas),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "ss_base_model_version": version + ("_v" if v and base.family != "sdxl" else ""),
        "ss_v2": str(base.family == "sd2"),
        "ss_output_name": title,
        "sshs_model_hash": DIGEST,
    }
    return found | ({"ss_v_parameterization": "True"} if v else {})


def _one(values: set[Any]) -> str:
    """The one value, or the word that sd-scripts has for several."""
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"


def told_base(metadata: Mapping[str, str]) -> Base | None:
    """The base that a LoRA file's metadata name, as far as they do; None of another kind, as SDXL's refiner is."""
    architecture, version = metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")
    if any(REFINER.match(text.lower()) for text in (architecture, version)):
        return None
    words = {"v": "v_prediction", "epsilon": "epsilon"}
    by_kohya = "v_prediction" if version.endswith("_v") or metadata.get("ss_v_parameterization") == "True" else None
    prediction = words.get(metadata.get("modelspec.prediction_type", ""), by_kohya)
    size = metadata.get("modelspec.resolution", "").partition("x")[0]
    starts: dict[Family, tuple[str, str]] = {
        "sd1": ("stable-diffusion-v1", "sd_v1"), "sd2": ("stable-diffusion-v2", "sd_v2"), "sdxl": ("stable-diffusion-xl", "sdxl_"),
    }  # fmt: skip
    for family, (by_spec, by_version) in starts.items():
        if architecture.startswith(by_spec) or version.startswith(by_version):
            return Base(family, prediction, int(size) if size.isdigit() else None)
    return None
