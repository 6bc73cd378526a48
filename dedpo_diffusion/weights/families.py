"""For which Stable Diffusion weights are made, by what their names, shapes and metadata show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
        name = FAMILIES[self.family] if self.family else "cannot be told"
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
        found.append((family, f"cross-attention of width {width}" + ("" if family else ", which no published one has")))
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
