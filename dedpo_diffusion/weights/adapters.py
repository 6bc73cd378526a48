"""The layers of an adapter file, in whatever layout: which they are, their ranks and alphas, and how much they change.

Names are those of diffusers and peft, of kohya-ss/sd-scripts, and of LyCORIS (KohakuBlueleaf/LyCORIS); how ComfyUI matches them is in its
`comfy/lora.py`. Reading a file for use is another matter: this tells of files that nobody can use, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dedpo_diffusion.weights.diffusers_layout import COMFY_TEXT, CONFIG, PARTS, config_alpha, with_part
from dedpo_diffusion.weights.header import Header
from dedpo_diffusion.weights.names import ORIGINAL

_END = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.(?P<adapter>default))?(?:\.weight)?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.(?:lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?|(?P<dora>dora_scale))"
    r"|\.(?P<other>alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|oft_(?:blocks|diag)|(?:diff|set_weight)(?:_b)?|[wb]_norm)"
    r"|\.(?P<glora>[ab][12])\.weight"
    r")"
)
KOHYA = {
    "lora_unet_": "unet", "lycoris_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
}  # fmt: skip
WORDS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_BARE = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|time_proj)\b")


@dataclass
class Layer:
    """One adapted layer.

    Attributes:
        name: without the ending of its tensors.
        part: "unet", "text_encoder" or "text_encoder_2"; "" where the name tells none of them.
        tensors: names in the file by role: down, up, mid, alpha, magnitude, hada_w1_a, lokr_w1, diff, ...
    """

    name: str
    part: str
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """LoRA, LoHa, LoKr, OFT, GLoRA, full (all weights of the layer), or incomplete."""
        roles = set(self.tensors)
        if {"down", "up"} <= roles:
            return "LoRA"
        if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= roles:
            return "LoHa"
        if all(roles & {f"lokr_w{k}", f"lokr_w{k}_a"} for k in (1, 2)):
            return "LoKr"
        for start, kind in (("oft_", "OFT"), ("diff", "full"), ("set_weight", "full"), ("w_norm", "full"), ("b_norm", "full")):
            if any(role.startswith(start) for role in roles):
                return kind
        return "GLoRA" if {"a1", "a2", "b1", "b2"} <= roles else "incomplete"


@dataclass(frozen=True)
class Adapter:
    """All layers of a file.

    Attributes:
        header: of the file.
        layout: diffusers, old diffusers (named after attention processors), peft, kohya, ComfyUI (its own), the original code, or run (a
            run's own parameters).
        layers: by name.
        strange: tensors that belong to no layer.
        config: what diffusers or peft store of ranks and alphas, as "unet.lora_alpha"; None where nothing is stored.
    """

    header: Header
    layout: str
    layers: dict[str, Layer]
    strange: list[str]
    config: Mapping[str, Any] | None

    def kinds(self) -> dict[str, int]:
        """How many layers of each kind, the commonest first."""
        found = [layer.kind for layer in self.layers.values()]
        return {kind: found.count(kind) for kind in sorted(set(found), key=lambda kind: -found.count(kind))}

    def shape(self, layer: Layer) -> tuple[int, ...] | None:
        """(out, in) or (out, in, kh, kw) of the changed weight, None where the file does not tell."""
        try:
            return self._shape(layer, {role: self.header.shapes[name] for role, name in layer.tensors.items()})
        except IndexError:  # tensors of too few dimensions
            return None

    def _shape(self, layer: Layer, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        if layer.kind == "LoRA":
            return (sizes["up"][0], *sizes["down"][1:2], *sizes.get("mid", sizes["down"])[2:])
        if layer.kind == "LoHa":
            core = sizes.get("hada_t1", ())[2:]
            return (sizes["hada_w1_a"][1 if core else 0], sizes["hada_w1_b"][1], *core)
        if layer.kind == "LoKr":
            ends = [self._kronecker_part(sizes, k) for k in (1, 2)]
            return (ends[0][0] * ends[1][0], ends[0][1] * ends[1][1], *ends[1][2:])
        return sizes.get("diff")

    @staticmethod
    def _kronecker_part(sizes: Mapping[str, tuple[int, ...]], k: int) -> tuple[int, ...]:
        if f"lokr_w{k}" in sizes:
            return sizes[f"lokr_w{k}"]
        core = sizes.get(f"lokr_t{k}", ())[2:]
        return (sizes[f"lokr_w{k}_a"][1 if core else 0], sizes[f"lokr_w{k}_b"][1], *core)

    def rank(self, layer: Layer) -> int | None:
        """The rank by which an alpha is divided; None where there is none."""
        for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if role in layer.tensors:
                return next(iter(self.header.shapes[layer.tensors[role]]), None)
        return None

    def alpha(self, layer: Layer, tensor: Callable[[str], Tensor]) -> float | None:
        """What the file says of alpha, in a tensor or in its configuration; None where it says nothing, and readers take the rank.

        ValueError tells of a configuration that no reader takes.
        """
        if "alpha" in layer.tensors:
            found = tensor(layer.tensors["alpha"]).float()
            return float(found) if found.numel() == 1 else None
        if self.config is None:
            return None
        keys = [key for key in ("lora_alpha", "alpha_pattern") if key in self.config or f"{layer.part}.{key}" in self.config]
        return config_alpha({key: self._setting(layer, key) for key in keys}, layer.name.removeprefix(f"{layer.part}."))

    def _setting(self, layer: Layer, name: str) -> Any:
        config = self.config or {}
        return config.get(f"{layer.part}.{name}", config.get(name))

    def scale(self, layer: Layer, alpha: float | None) -> float:
        """What the product is multiplied by at strength 1."""
        rank = self.rank(layer)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self._setting(layer, "use_rslora") else rank)

    def change(self, layer: Layer, tensor: Callable[[str], Tensor]) -> float | None:
        """Frobenius norm of the change at scale 1, without what DoRA's magnitudes do; None of a kind that it is not known for.

        RuntimeError tells of factors that do not fit together.

        Args:
            layer: one of `layers`.
            tensor: reads a tensor by its name.
        """
        held = {role: tensor(name).double() for role, name in layer.tensors.items() if role not in ("alpha", "magnitude")}
        if layer.kind == "LoRA" and "mid" not in held:
            up, down = held["up"].flatten(1), held["down"].flatten(1)
            return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))  # |B A| without forming B A
        if layer.kind == "LoRA":
            return float(torch.einsum("oa,abkl,bi->oikl", held["up"].flatten(1), held["mid"], held["down"].flatten(1)).norm())
        if layer.kind == "LoHa":
            return float((_product(held, "hada", 1) * _product(held, "hada", 2)).norm())
        if layer.kind == "LoKr":
            return float(_product(held, "lokr", 1).norm() * _product(held, "lokr", 2).norm())  # of a Kronecker product
        return float(held["diff"].norm()) if "diff" in held else None


def _product(held: Mapping[str, Tensor], kind: str, k: int) -> Tensor:
    """One of the two matrices that LyCORIS multiplies, put together where it is stored as factors."""
    if f"{kind}_w{k}" in held:
        return held[f"{kind}_w{k}"]
    a, b, core = held[f"{kind}_w{k}_a"], held[f"{kind}_w{k}_b"], held.get(f"{kind}_t{k}")
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def find_adapter(header: Header, config: Mapping[str, Any] | None = None) -> Adapter | None:
    """The layers of an adapter file; None if it is none.

    Args:
        header: of the file.
        config: of the adapter, where it lies in a file of its own; None takes what the metadata hold.
    """
    layers: dict[str, Layer] = {}
    strange, layouts = [], set()
    for name in header.shapes:
        match = _END.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        found = {key: value for key, value in match.groupdict().items() if value is not None}
        stem, part, layout = _place(found["layer"], found)
        layers.setdefault(stem, Layer(stem, part)).tensors[_role(found)] = name
        layouts.add(layout)
    if not layers or len(strange) > len(header.shapes) / 2 or all(layer.kind == "incomplete" for layer in layers.values()):
        return None
    order = ("run", "kohya", "ComfyUI", "the original code", "old diffusers", "diffusers", "peft")
    layout = next(name for name in order if name in layouts)
    return Adapter(header, layout, layers, strange, header.stored_json(CONFIG) if config is None else config)


def _role(found: Mapping[str, str]) -> str:
    if "peft" in found:
        return {"A": "down", "B": "up"}[found["peft"]]
    if "magnitude" in found or "dora" in found:
        return "magnitude"
    return next(found[key] for key in ("old", "kohya", "other", "glora") if key in found)


def _place(layer: str, found: Mapping[str, str]) -> tuple[str, str, str]:
    """A layer's name, its part, and the layout that such a name belongs to."""
    prefix = next((prefix for prefix in KOHYA if layer.startswith(prefix)), None)
    if prefix is not None:
        return layer, KOHYA[prefix], "kohya"
    if layer.startswith("lora_"):
        return layer, "", "kohya"
    bare = with_part(layer.removeprefix("base_model.model."))
    first = bare.partition(".")[0]
    part = first if first in PARTS else "unet" if _BARE.match(bare) else ""
    if "adapter" in found:
        return layer, part, "run"
    if layer.startswith((*COMFY_TEXT, "diffusion_model.")) and part:
        return layer, part, "ComfyUI"
    if part == "unet" and ORIGINAL.match(bare.removeprefix("unet.")):
        return layer, part, "the original code"
    if "old" in found:
        return layer, part, "old diffusers"
    return layer, part, "diffusers" if layer.partition(".")[0] in PARTS else "peft"
