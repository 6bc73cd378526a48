"""Which programs read an adapter file as it is, by the names of its layers.

diffusers: `loaders/lora_conversion_utils.py`; ComfyUI: `comfy/lora.py`, `comfy/weight_adapter`; AUTOMATIC1111's web UI 1.10.1, its last:
`extensions-builtin/Lora/networks.py` (it splits a name at its first dot and looks for kohya's names). What is said of them and of others
was measured with their own loaders; docs/loading.md has the versions. Where nothing else is said, diffusers is today's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dedpo_diffusion.weights.adapters import Adapter, Layer
from dedpo_diffusion.weights.base_model import find_base
from dedpo_diffusion.weights.conversion import exported
from dedpo_diffusion.weights.diffusers_layout import COMFY_TEXT, PARTS
from dedpo_diffusion.weights.names import ORIGINAL

DIFFUSERS, COMFY, A1111 = "diffusers", "ComfyUI", "AUTOMATIC1111"
KOHYA_DORA = (
    "programs disagree on a DoRA's magnitudes in the kohya layout: LyCORIS, SD.Next and OneTrainer (with output axis on) compute what was "
    "trained, ComfyUI and Forge nearly that (they miss 2 to 4 % of a usual change), diffusers and sd-scripts leave them out, "
    "A1111 and InvokeAI take them for those of columns, which is noise"
)
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_")
_BLOCKS = re.compile(r"lora_unet_(input_blocks|output_blocks|middle_block)_")
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Reading:
    """How many of a file's `of` layers a program reads, what it takes them for if not for what was trained, and which versions do."""

    layers: int
    of: int
    wrong: str = ""
    versions: str = ""

    @property
    def whole(self) -> bool:
        """Whether every version reads all of them; what they are taken for is another matter."""
        return self.layers == self.of and not self.versions

    def words(self) -> str:
        """ "yes", "no", "12 of 24 layers", or what goes wrong."""
        if self.layers and self.wrong:
            return f"not as trained: {self.wrong}"
        if self.layers != self.of:
            return f"{self.layers} of {self.of} layers" if self.layers else "no"
        return self.versions or "yes"


def who_reads(adapter: Adapter, alphas: Mapping[str, float | None]) -> dict[str, Reading]:
    """By program, the layers of an adapter for a Stable Diffusion that it reads; alphas by layer, as far as the file stores them."""
    layers, total = list(adapter.layers.values()), len(adapter.layers)
    sdxl = _family(adapter) == "sdxl"
    columns = adapter.layout == "kohya" and _dora(adapter)
    return {
        DIFFUSERS: _diffusers(adapter, alphas),
        COMFY: Reading(sum(_comfy(layer) for layer in layers), total),
        A1111: Reading(
            sum(_a1111(layer, sdxl) for layer in layers), total, "it takes the magnitudes for those of columns" if columns else ""
        ),
    }


def _family(adapter: Adapter) -> str | None:
    return find_base({name: adapter.shape(layer) for name, layer in adapter.layers.items()}, adapter.header.metadata).family


def _namings(adapter: Adapter) -> set[bool]:
    """Whether the UNet's layers have the names of the original code, in the kohya layout."""
    names = [layer.name for layer in adapter.layers.values()]
    return {ORIGINAL.match(name.removeprefix("lora_unet_")) is not None for name in names if name.startswith("lora_unet_")}


def _dora(adapter: Adapter) -> bool:
    return any("magnitude" in layer.tensors for layer in adapter.layers.values())


# ---- diffusers


def _diffusers(adapter: Adapter, alphas: Mapping[str, float | None]) -> Reading:
    layers, total = list(adapter.layers.values()), len(adapter.layers)
    kohya = adapter.layout == "kohya"
    stored = any(name.endswith(".dora_scale") for layer in layers for name in layer.tensors.values())
    wrong = "it leaves the magnitudes out" if stored else "it takes one alpha for all" if _several(adapter, alphas) else ""
    if _refused(adapter):
        return Reading(0, total, wrong)
    mixed = kohya and len(_namings(adapter)) > 1  # it then finds those of the original code's blocks nowhere
    found = [layer for layer in layers if _plain(layer) and not (mixed and _BLOCKS.match(layer.name))]
    if kohya:
        return Reading(sum("_add_embedding_" not in layer.name for layer in found), total, wrong)
    return Reading(
        sum(layer.name.startswith(tuple(f"{part}." for part in PARTS)) for layer in found), total, wrong, _versions(adapter, alphas)
    )


def _plain(layer: Layer) -> bool:
    return layer.kind == "LoRA" and "mid" not in layer.tensors and layer.part != ""


def _refused(adapter: Adapter) -> bool:
    """Whether it refuses the whole file: for a tensor that is no LoRA's, an end or a layer that it does not know."""
    layers = list(adapter.layers.values())
    if adapter.strange:
        return True
    if adapter.layout == "kohya":
        original = _family(adapter) in ("sd1", "sd2") and any(_BLOCKS.match(layer.name) for layer in layers)  # which it knows of SDXL alone
        return original or not all(map(_plain, layers)) or bool(_unrecognised_text(adapter))
    ends = any(name.endswith((".alpha", ".lora_down.weight", ".lora_up.weight")) for layer in layers for name in layer.tensors.values())
    inside = [layer.name.partition(".")[2] for layer in layers if layer.name.startswith("unet.")]
    return adapter.layout not in ("diffusers", "old diffusers") or ends or any(map(ORIGINAL.match, inside))


def _versions(adapter: Adapter, alphas: Mapping[str, float | None]) -> str:
    """Which versions read a file with a configuration, where not all do."""
    config, parts = adapter.config, {layer.part for layer in adapter.layers.values()}
    if not config or adapter.layout != "diffusers":
        return ""
    bare = any(f"{part}.{key}" not in config for part in parts for key in _PATTERNS)
    scaled = any(abs(adapter.scale(layer, alphas.get(name)) - 1) > 1e-6 for name, layer in adapter.layers.items())
    refused, lost = "0.34 to 0.39 refuse it", "0.33 and earlier take the rank for alpha"
    if bare:
        return f"from 0.40 on; {refused}" + (f", {lost}" if scaled else "")
    return f"from 0.34 on; {lost}" if scaled else ""


def _several(adapter: Adapter, alphas: Mapping[str, float | None]) -> bool:
    """Whether layers of one part have alphas that differ in the layout of kohya."""
    found: dict[str, set[float]] = {}
    for name, layer in adapter.layers.items():
        alpha = alphas.get(name)
        found.setdefault(layer.part, set()).add((adapter.rank(layer) or 0) if alpha is None else alpha)
    return adapter.layout == "kohya" and any(len(values) > 1 for values in found.values())


def _unrecognised_text(adapter: Adapter) -> list[str]:
    """Text encoders that diffusers refuses: it knows their layout by an out_proj or an mlp (`utils/state_dict_utils.py`)."""
    names: dict[str, list[str]] = {}
    for layer in adapter.layers.values():
        if adapter.layout == "kohya" and layer.part.startswith("text"):
            names.setdefault(layer.part, []).append(layer.name)
    return [part for part, found in names.items() if not any(name.endswith("out_proj") or "_mlp_" in name for name in found)]


# ---- ComfyUI and AUTOMATIC1111


def _kohya(layer: Layer) -> bool:
    """Whether the name is one of kohya's, as all readers of that layout know it."""
    known = layer.name.startswith("lora_unet_") or (layer.name.startswith(_TEXT) and "_text_model_" in layer.name)
    return known and layer.kind != "incomplete"


def _a1111(layer: Layer, sdxl: bool) -> bool:
    """It has no rule for SDXL's embedding of sizes under diffusers' name, and for upsamplers one of SD1.x alone."""
    lost = "_add_embedding_" in layer.name or (sdxl and layer.name == "lora_unet_up_blocks_0_upsamplers_0_conv")
    return _kohya(layer) and not lost


def _comfy(layer: Layer) -> bool:
    """It knows kohya's names and its own, text encoders under diffusers' names with text_model, and UNets by attention processors."""
    name = layer.name
    if layer.kind == "incomplete":
        return False
    if name.startswith((*COMFY_TEXT, "lora_te1_text_projection", "lora_te2_text_projection")):
        return True
    if name.startswith("diffusion_model."):
        return ORIGINAL.match(name.removeprefix("diffusion_model.")) is not None
    if layer.part in ("text_encoder", "text_encoder_2") and not name.startswith("lora_"):
        return name.startswith(f"{layer.part}.text_model.encoder.")
    if layer.part == "unet" and "." in name:
        strange = name.startswith("base_model.") or ORIGINAL.match(name.removeprefix("unet."))
        return not strange and re.search(r"\.attn[12]\.to_", name) is None
    return _kohya(layer) or name.startswith("lycoris_")


# ---- what to do


def troubles(adapter: Adapter, alphas: dict[str, float | None], path: Path) -> list[str]:
    """What other programs would trip over, each with a remedy that was tried on the file's names."""
    layers = adapter.layers.values()
    if adapter.layout == "run":
        return [
            "the parameters of a training run, which no other program reads; export the run: `dedpo export RUN --out FILE.safetensors`",
            *_incomplete(adapter),
        ]
    plain = all(map(_plain, layers))
    made = exported(adapter) if plain else ""
    model = " --model BASE" if not isinstance(made, str) and made.unknown_base else ""
    export = f"`dedpo export {path} --format kohya --out {path.stem}-kohya.safetensors{model}`"
    found = []
    readings = who_reads(adapter, alphas)
    if plain and not all(reading.whole for reading in readings.values()):
        lacking = " and ".join(name for name, reading in readings.items() if not reading.whole)
        after = {} if isinstance(made, str) else who_reads(made.adapter, dict.fromkeys(made.adapter.layers, 1.0))
        found.append(f"{lacking} would leave layers out{_also(adapter, alphas)}; {_remedy(export, made, after)}")
    if plain and isinstance(made, str):
        return found + _incomplete(adapter)  # what cannot be read here has no remedy here
    if plain and _dora(adapter) and (adapter.layout == "kohya" or any(".dora_scale" in name for name in adapter.header.shapes)):
        found.append(
            f"{KOHYA_DORA}; `dedpo export {path} --rank R --out PLAIN.safetensors{model}`, which extracts a plain LoRA, or --format "
            "checkpoint serve all of these"
        )
    if plain and _several(adapter, alphas):
        found.append(f"its layers have several alphas, of which diffusers takes one for all of a part; {export} writes one alpha")
    return found + _names_troubles(adapter, export if plain else "") + _incomplete(adapter) + _alpha_troubles(adapter, alphas, export)


def _remedy(export: str, made: object, after: Mapping[str, Reading]) -> str:
    """What an export would make of it: after it, who reads all."""
    if isinstance(made, str):
        return f"it cannot be exported here: {made}"
    good = [name for name, reading in after.items() if reading.whole]
    if len(good) == len(after):
        return f"{export} writes what all of them read"
    listed = " and ".join(good)
    return f"{export} writes what {listed} reads" if good else "--format checkpoint, which merges it into its model, serves all of these"


def _incomplete(adapter: Adapter) -> list[str]:
    names = [layer.name for layer in adapter.layers.values() if layer.kind == "incomplete"]
    return [f"{len(names)} layers lack tensors (first: {names[0]}); the file is damaged or of an unknown kind"] if names else []


def _names_troubles(adapter: Adapter, export: str) -> list[str]:
    """What programs beside those of `who_reads` trip over in names and ranks; `export` is empty where there is none."""
    layers, found = adapter.layers.values(), []
    unet = _namings(adapter)
    if export and len(unet) == 2:
        found.append(f"it mixes the names of diffusers and of the original code, which InvokeAI and OneTrainer refuse; {export} writes one")
    elif export and unet == {False} and _family(adapter) == "sdxl":
        found.append(
            "it names SDXL's layers as diffusers does, where sd-scripts' merging and resuming, and LyCORIS, find none of the UNet's; "
            f"{export} gives them the names of sd-scripts"
        )
    ranks = {adapter.rank(layer) for layer in layers}
    if export and adapter.layout == "kohya" and len(ranks) > 1:
        found.append(
            "its layers have several ranks, which OneTrainer and sd-scripts' resuming refuse and diffusers 0.32 gets wrong; "
            f"{export} fills them up to one"
        )
    bare = [layer.name for layer in layers if layer.part.startswith("text") and not re.search("text_model|text_projection", layer.name)]
    if export and bare:
        found.append(
            f"{len(bare)} layers of text encoders have no text_model in their names (first: {bare[0]}), which ComfyUI and AUTOMATIC1111 "
            f"look for; {export} puts it there"
        )
    return found


def _also(adapter: Adapter, alphas: dict[str, float | None]) -> str:
    """What else happens to an alpha that only diffusers finds."""
    hidden = any(alpha not in (None, adapter.rank(adapter.layers[name])) for name, alpha in alphas.items())
    return ", and take the rank for alpha, which is in diffusers' metadata alone" if adapter.layout != "kohya" and hidden else ""


def _alpha_troubles(adapter: Adapter, alphas: dict[str, float | None], export: str) -> list[str]:
    found = []
    without = [name for name, alpha in alphas.items() if alpha is None and adapter.rank(adapter.layers[name])]
    if without and adapter.layout != "run":
        found.append(
            f"no alpha is stored for {_count(len(without), len(alphas))} layers, so every program takes their rank for it; "
            "if they were trained with another alpha, the file loads at another strength: export it again from where it was trained"
        )
    odd = [
        name for name in (layer.tensors.get("alpha") for layer in adapter.layers.values())
        if name is not None and adapter.header.dtypes[name] not in ("float32", "float64", "float16")
    ]  # fmt: skip
    if odd:
        dtype = adapter.header.dtypes[odd[0]]
        found.append(f"alpha is stored in {dtype}, which readers that go through numpy cannot read; {export} stores it in float32")
    return found


def _count(some: int, total: int) -> str:
    return "all" if some == total else f"{some} of {total}"
