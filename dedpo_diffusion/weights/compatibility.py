"""Which programs read an adapter file as it is, by the names of its layers.

diffusers: `loaders/lora_conversion_utils.py`; ComfyUI: `comfy/lora.py`, `comfy/weight_adapter`; AUTOMATIC1111's web UI:
`extensions-builtin/Lora/networks.py` (it splits a name at its first dot and looks for kohya's names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dedpo_diffusion.weights.adapters import Adapter, Layer

DIFFUSERS, COMFY, A1111 = "diffusers", "ComfyUI", "AUTOMATIC1111"
KOHYA_DORA = (
    "programs disagree on a DoRA's magnitudes in the kohya layout: LyCORIS computes what was trained, ComfyUI nearly that, diffusers "
    "leaves them out, A1111 takes them for those of columns"
)
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Reading:
    """How many of a file's `of` layers a program reads, and what it takes them for if not for what was trained."""

    layers: int
    of: int
    wrong: str = ""

    @property
    def whole(self) -> bool:
        """Whether it reads all of them."""
        return self.layers == self.of

    def words(self) -> str:
        """ "yes", "no", "12 of 24 layers", or what goes wrong."""
        if self.layers and self.wrong:
            return f"not as trained: {self.wrong}"
        return "yes" if self.whole else f"{self.layers} of {self.of} layers" if self.layers else "no"


def who_reads(adapter: Adapter, alphas: Mapping[str, float | None]) -> dict[str, Reading]:
    """By program, the layers of an adapter for a Stable Diffusion that it reads; alphas by layer, as far as the file stores them."""
    dora = adapter.layout == "kohya" and any("magnitude" in layer.tensors for layer in adapter.layers.values())
    wrong = "it leaves the magnitudes out" if dora else "it takes one alpha for all" if _several(adapter, alphas) else ""
    layers, total = list(adapter.layers.values()), len(adapter.layers)
    ours = sum(_diffusers(layer, adapter.layout) for layer in layers)
    # of a file in kohya's layout it reads all or nothing
    refused = adapter.layout == "kohya" and (ours < total or adapter.strange or _unrecognised_text(adapter))
    return {
        DIFFUSERS: Reading(0 if refused else ours, total, wrong),
        COMFY: Reading(sum(_comfy(layer) for layer in layers), total),
        A1111: Reading(sum(_kohya(layer) for layer in layers), total, "it takes the magnitudes for those of columns" if dora else ""),
    }


def _several(adapter: Adapter, alphas: Mapping[str, float | None]) -> bool:
    """Whether layers of one part have alphas that differ in the layout of kohya."""
    found: dict[str, set[float]] = {}
    for name, layer in adapter.layers.items():
        alpha = alphas.get(name)
        found.setdefault(layer.part, set()).add((adapter.rank(layer) or 0) if alpha is None else alpha)
    return adapter.layout == "kohya" and any(len(values) > 1 for values in found.values())


def _diffusers(layer: Layer, layout: str) -> bool:
    return layout in ("diffusers", "old diffusers", "kohya") and layer.kind == "LoRA" and "mid" not in layer.tensors and layer.part != ""


def _unrecognised_text(adapter: Adapter) -> list[str]:
    """Text encoders that diffusers refuses: it knows their layout by an out_proj or an mlp (`utils/state_dict_utils.py`)."""
    names: dict[str, list[str]] = {}
    for layer in adapter.layers.values():
        if adapter.layout == "kohya" and layer.part.startswith("text"):
            names.setdefault(layer.part, []).append(layer.name)
    return [part for part, found in names.items() if not any(name.endswith("out_proj") or "_mlp_" in name for name in found)]


def _kohya(layer: Layer) -> bool:
    """Whether the name is one of kohya's, as all readers of that layout know it."""
    known = layer.name.startswith("lora_unet_") or (layer.name.startswith(_TEXT) and "_text_model_" in layer.name)
    return known and layer.kind != "incomplete"


def _comfy(layer: Layer) -> bool:
    """It knows kohya's names, text encoders under diffusers' names with text_model, and UNets under the names of attention processors."""
    if layer.kind == "incomplete":
        return False
    if layer.part in ("text_encoder", "text_encoder_2") and not layer.name.startswith("lora_"):
        return layer.name.startswith(f"{layer.part}.text_model.encoder.")
    if layer.part == "unet" and "." in layer.name:
        return not layer.name.startswith("base_model.") and re.search(r"\.attn[12]\.to_", layer.name) is None
    return _kohya(layer) or layer.name.startswith("lycoris_")


def troubles(adapter: Adapter, alphas: dict[str, float | None], path: Path) -> list[str]:
    """What other programs would trip over, each with its remedy."""
    found, layers = [], adapter.layers.values()
    export = f"`dedpo export {path} --format kohya --out {path.stem}-kohya.safetensors`"
    readings = who_reads(adapter, alphas)
    plain = all(layer.kind == "LoRA" and "mid" not in layer.tensors and layer.part for layer in layers)
    if adapter.layout == "run":
        found.append(
            "the parameters of a training run, which no other program reads; export the run: `dedpo export RUN --out FILE.safetensors`"
        )
    elif plain and not all(reading.whole for reading in readings.values()):
        lacking = " and ".join(name for name, reading in readings.items() if not reading.whole)
        found.append(f"{lacking} would leave layers out{_also(adapter, alphas)}; {export} writes what all of them read")
    if plain and adapter.layout == "kohya" and any("magnitude" in layer.tensors for layer in layers):
        found.append(
            f"{KOHYA_DORA}; `dedpo export {path} --rank R`, which extracts a plain LoRA, or --format checkpoint serve all of these"
        )
    if plain and _several(adapter, alphas):
        found.append(f"its layers have several alphas, of which diffusers takes one for all of a part; {export} writes one alpha")
    incomplete = [layer.name for layer in layers if layer.kind == "incomplete"]
    if incomplete:
        found.append(f"{len(incomplete)} layers lack tensors (first: {incomplete[0]}); the file is damaged or of an unknown kind")
    bare = [layer.name for layer in layers if layer.part.startswith("text") and "text_model" not in layer.name]
    if bare and adapter.layout != "run":
        found.append(
            f"{len(bare)} layers of text encoders have no text_model in their names (first: {bare[0]}), which ComfyUI and AUTOMATIC1111 "
            f"look for; {export} puts it there"
        )
    return found + _alpha_troubles(adapter, alphas, export)


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
