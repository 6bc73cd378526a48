"""The text of a model card, from what a run, its labels and a comparison recorded; what is not recorded is not said.

The head is that of the Hugging Face hub (`huggingface_hub.ModelCardData`). Numbers of a comparison are those of `results.json`, rounded.
Texts of unknown content (prompts, names, sentences) must not become markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import yaml

from dedpo_diffusion.weights.base_model import FAMILIES
from dedpo_diffusion.weights.provenance import base_name, in_short, is_hub_id, rewarded

_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$&]|(?<![^\W_])_|_(?![^\W_]))")
_START = re.compile(r"^(?:([-+=])(?=[-=\s]|$)|(\d+)([.)])(?=\s|$))")


def plain(text: str) -> str:
    """A text in one line that shows as it is."""
    line = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return _START.sub(lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}", line)


def code(text: str, *, cell: bool = False) -> str:
    """A text in one line as inline code; in the cell of a table its bars are escaped."""
    line = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|') if cell else line}{pad}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose cells are Markdown already; [] without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines, ""] if lines else []


def items(texts: Iterable[str]) -> list[str]:
    """The lines of a list of Markdown texts; [] for none."""
    lines = [f"- {text}" for text in texts]
    return [*lines, ""] if lines else []


# ---- what a comparison measured


ROLES = {
    "held_out": "held out",
    "made_labels": "**made the labels**",
    "reward": "**the reward in training**",
    "unknown": "not known to be held out",
}


def interval(entry: Mapping[str, Any], *, sign: bool = False, percent: bool = False) -> str:
    """A mean with its 95 % interval, to the second digit of the interval's half-width."""
    factor = 100 if percent else 1
    mean, ci = factor * entry["mean"], [factor * end for end in entry.get("ci") or []]
    half = (ci[1] - ci[0]) / 2 if ci else 0.0
    places = min(max(1 - math.floor(math.log10(half)), 0), 8) if half > 0 else 1 if percent else 4
    form, unit = f"{'+' if sign else ''}.{places}f", " %" if percent else ""
    if not ci:
        return format(mean, form) + unit
    return f"{format(mean, form)}{unit} ({format(ci[0], form)} to {format(ci[1], form)})"


def role_of(scorer: Mapping[str, Any]) -> str:
    """held_out, made_labels, reward or unknown; older results say only whether a scorer was held out."""
    return scorer.get("role") or ("held_out" if scorer.get("held_out") else "unknown")


def results_section(results: Mapping[str, Any], arm: str, sheet: str | None) -> list[str]:
    """The lines of the section.

    Args:
        results: as `dedpo compare` writes them.
        arm: this model's.
        sheet: name of a picture with samples, None for none.

    Raises:
        KeyError: the results lack something.
    """
    own = results["arms"][arm]
    lines = [
        "## Results", "", f"> {plain(results['verdict'])}", "",
        f"Here this model is {code(arm)}, its base {code(results['base'])}: {results['n_images']} images each, of {results['n_prompts']} "
        "prompts, with the same prompt, seed and noise. Intervals are 95 %, "
        f"from {results['resamples']} bootstrap resamples over prompts.", "",
        *table(["scorer", "role", "gain over the base", "win rate", "images"], _scorers(results, own)),
        *items(plain(text) for text in (*own.get("warnings", []), *results.get("notes", []))),
        *_best_strength(results, arm), *_categories(results, own), *_spread(own), *_people(own),
    ]  # fmt: skip
    return lines if sheet is None else [*lines, f"![samples of the base and of this model]({quote(sheet)})", ""]


def _scorers(results: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, about in results["scorers"].items():
        if name not in own["by_scorer"]:
            continue
        entry = own["by_scorer"][name]
        gain = interval(entry["gain_over_base"], sign=True)
        p = entry["gain_over_base"].get("p_holm")
        words = gain if p is None else f"{gain}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
        count = entry.get("n", results["n_images"])
        shown = code(name, cell=True) + (" (verdict)" if name == results["primary"] else "")
        yield [shown, ROLES[role_of(about)], words, interval(entry["win_rate_vs_base"], percent=True), str(count)]


def _best_strength(results: Mapping[str, Any], arm: str) -> list[str]:
    """What the LoRA that this arm is a strength of is worth at its best strength, without the luck of the choice."""
    for name, entry in (results.get("loras") or {}).items():
        if arm in [at["arm"] for at in entry["strengths"]] and entry["gain_at_best_strength"] is not None:
            tried = ", ".join(f"{at['strength']:g}" for at in entry["strengths"])
            chosen = " and ".join(dict.fromkeys(f"{value:g}" for value in entry["chosen"]))
            worth = interval(entry["gain_at_best_strength"], sign=True)
            return [
                f"Of the strengths {tried} of {code(name)} the best is {entry['best_strength']:g}, by {code(entry['choose_by'])}. "
                f"With each half of the prompts judged at the strength that the other half chose ({chosen}), the gain on "
                f"{code(results['primary'])} is {worth}; the table's is of one strength on all prompts.", "",
            ]  # fmt: skip
    return []


def _categories(results: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    primary, rows = results["primary"], []
    for category, scorers in (own.get("categories") or {}).items():
        if primary in scorers:
            entry = scorers[primary]
            gain, wins = interval(entry["gain_over_base"], sign=True), interval(entry["win_rate_vs_base"], percent=True)
            rows.append([plain(category), str(entry["n_prompts"]), gain, wins])
    return (
        [f"By category of the prompt, on {code(primary)}:", "", *table(["category", "prompts", "gain", "win rate"], rows)] if rows else []
    )


def _spread(own: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, entry in (own.get("spread") or {}).items():
        diversity, change = entry.get("diversity"), entry.get("diversity_minus_base")
        shown = [interval(diversity) if diversity else "one seed a prompt", interval(change, sign=True) if change else "one seed a prompt"]
        rows.append([code(name, cell=True), *shown, interval(entry["drift"])])
    if not rows:
        return []
    words = "Cosine distances between embeddings: of images of one prompt (diversity), and from the base's image (drift)."
    return [words, "", *table(["embedding", "diversity", "diversity minus the base's", "drift"], rows)]


def _people(own: Mapping[str, Any]) -> list[str]:
    people = own.get("people")
    if not people:
        return []
    texts = [f"{people['answers']} answers on {people['pairs']} pairs, given blind by {len(people['raters'])} people."]
    equal = (people.get("agreement") or {}).get("raw") or {}
    if equal.get("value") is not None:
        texts.append(f"Two people's answers to one pair are equal in {equal['value']:.0%} of cases.")
    texts += [
        f"{code(name)} sides with them in {interval(entry, percent=True)} of {entry['n']} decided pairs."
        for name, entry in (people.get("with_scorers") or {}).items()
        if entry and entry.get("mean") is not None
    ]
    return ["People's judgement:", "", *items(texts)]


# ---- the card


PAPERS = {"dedpo": "2602.06195", "tuned": "2602.06195"}  # of the way labels were merged
NO_DPO = {"sft", "kto", "mapo", "loop", "apa"}  # objectives that are no direct preference optimisation
LICENCE = "# license: the author has to choose one; the licences of the base model and of the training data apply as well"
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Exported:
    """What a card is about.

    Attributes:
        name: of the file or folder.
        kind: "lora", "checkpoint" (one file) or "folder" (of diffusers).
        layout: of a LoRA, diffusers or kohya.
        family: sd1, sd2 or sdxl; None where it cannot be told.
        strength: of a LoRA, its rank, alpha and the like in words; "" for none.
        sha256: of a file.
        made: what was done to what was trained: "strength", "added", "rank", "relative_error".
        kohya: names of files beside it that hold the same LoRA in kohya's layout.
    """

    name: str
    kind: str
    layout: str | None = None
    family: str | None = None
    strength: str = ""
    sha256: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    kohya: Sequence[str] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        """The name without ending."""
        return self.name.removesuffix(".safetensors")


def model_card(
    trained: Facts, exported: Exported, *, identity: Facts | None = None, targets: Facts | None = None, results: Facts | None = None,
    arm: str | None = None, sampled: str = "", sheet: str | None = None,
) -> str:  # fmt: skip
    """The text of README.md.

    Args:
        trained: settings of the run, with the exported "step" where it is known.
        exported: what the card is about.
        identity: fingerprints of the run's inputs.
        targets: the report of the merged targets that it trained on.
        results: of `dedpo compare`; `arm` is then this model's.
        sampled: how the arm's samples were made otherwise than from this very file, in words.
        sheet: name of a picture of samples beside the card.

    Raises:
        KeyError: results that lack something.
    """
    lines = [*front_matter(trained, exported), "", f"# {plain(exported.title)}", "", *_summary(trained, exported), *_use(trained, exported)]
    lines += [*_data(trained, identity or {}, targets), *_labels(targets), *_training(trained)]
    if results is not None and arm is not None:
        lines += results_section(results, arm, sheet)
        if sampled:
            lines += [sampled, ""]
    lines += [*_limits(trained, targets, results, arm), *_hashes(exported, identity or {}, targets)]
    return "\n".join(lines).rstrip() + "\n"


def front_matter(trained: Facts, exported: Exported) -> list[str]:
    """The head in YAML; the licence, and a base model that is no hub id, are left to the author."""
    model, lora = str(trained.get("model", "")), exported.kind == "lora"
    known: dict[str, Any] = {}
    if is_hub_id(model):
        known = {"base_model": model, "base_model_relation": "adapter" if lora else "finetune"}
    tags = ["text-to-image", "diffusers", "lora" if lora else "full", "dedpo"]
    if (trained.get("objective") or {}).get("kind", "sft") not in NO_DPO:
        tags.append("diffusion-dpo")
    if exported.family in FAMILIES:
        tags.append("stable-diffusion-xl" if exported.family == "sdxl" else "stable-diffusion")
    if lora and exported.family in FAMILIES:  # what the hub shows a gallery and a widget for
        tags.append("template:sd-lora")
    known |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    comments = [LICENCE]
    if "base_model" not in known:
        comments.append("# base_model: the base model's OWNER/NAME on the hub, if it is there")
    return ["---", *comments, *yaml.safe_dump(known, sort_keys=False, allow_unicode=True).splitlines(), "---"]


# ---- what it is, and how to load it


def _what(exported: Exported) -> str:
    return {"lora": "A LoRA", "checkpoint": "A whole model as one file", "folder": "A whole model as a diffusers folder"}[exported.kind]


def _summary(trained: Facts, exported: Exported) -> list[str]:
    objective = (trained.get("objective") or {}).get("kind")
    family = f" ({FAMILIES[exported.family]})" if exported.family in FAMILIES else ""
    link = " for" if exported.kind == "lora" else ", made from"
    base = f"{link} {code(base_name(str(trained['model'])))}{family}" if "model" in trained else ""
    how = "" if objective is None else f" with the objective {code(str(objective))}"
    if objective == "sigmoid":
        how = " with Diffusion-DPO ([2311.12908](https://arxiv.org/abs/2311.12908))"
    source = "by a reward of its own images" if rewarded(trained) else "on preference labels"
    return [f"{_what(exported)}{base}, fine-tuned {source}{how} by dedpo_diffusion.", ""]


def _use(trained: Facts, exported: Exported) -> list[str]:
    xl, known = exported.family == "sdxl", exported.family in FAMILIES
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline" if known else "DiffusionPipeline"
    before: list[str] = []
    if exported.kind == "lora":
        call, before, after = _base_call(trained)
        load = [f"pipe = {kind}.{call}{after}", f'pipe.load_lora_weights(".", weight_name={exported.name!r})']
    elif exported.kind == "checkpoint":
        load = [f"pipe = {kind}.from_single_file({exported.name!r})"]
    else:
        load = [f"pipe = {kind}.from_pretrained({exported.name!r})"]
    script = [*before, f"from diffusers import {kind}", "", *load, 'image = pipe("a prompt").images[0]']
    return ["## Use", "", "```python", *script, "```", "", *_interfaces(exported)]


def _base_call(trained: Facts) -> tuple[str, list[str], str]:
    """How the base model is loaded, what is imported for it, and a remark."""
    model = str(trained.get("model", ""))
    if model == "shapes":
        return 'from_pretrained(files("dedpo_diffusion.shapes") / "model")', ["from importlib.resources import files", ""], ""
    way = "from_single_file" if model.endswith(".safetensors") else "from_pretrained"
    remark = "" if is_hub_id(model) else "  # the base model, wherever it lies"
    return f"{way}({base_name(model)!r})", [], remark


def _interfaces(exported: Exported) -> list[str]:
    if exported.kind == "checkpoint":
        words = f"ComfyUI reads {code(exported.name)} from `models/checkpoints`, AUTOMATIC1111 from `models/Stable-diffusion`."
        return [words, ""]
    if exported.kind == "folder":
        return []
    files = [exported.name] if exported.layout == "kohya" else list(exported.kohya)
    if not files:
        command = f"dedpo export {exported.name} --format kohya --out {exported.title}-kohya.safetensors"
        return [f"ComfyUI and AUTOMATIC1111 do not read this layout; {code(command)} writes theirs.", ""]
    named = " and ".join(code(name) for name in files)
    prompt = code(f"<lora:{files[0].removesuffix('.safetensors')}:1>")
    return [f"ComfyUI reads {named} from `models/loras`, AUTOMATIC1111 from `models/Lora` with {prompt} in the prompt.", ""]


# ---- what it learned from


def _data(trained: Facts, identity: Facts, targets: Facts | None) -> list[str]:
    data = trained.get("data") or {}
    if rewarded(trained):  # in the table of its training
        return []
    rows = [["pairs", code(PurePath(data["pairs"]).name, cell=True)]] if "pairs" in data else []
    if targets and "n" in targets:
        rows.append(["number of pairs", str(targets["n"])])
    if "pairs" in identity:
        rows.append(["fingerprint of the pairs", code(str(identity["pairs"]), cell=True)])
    if "targets" in data:
        rows.append(["targets", code(str(data["targets"]), cell=True)])
    if "label_share" in identity:
        rows.append(["visits to pairs that people labelled", format(float(identity["label_share"]), ".0%")])
    return ["## Data", "", *table(["", ""], rows)] if rows else []


def _stat(entry: Any, form: str) -> str | None:
    """A value with its interval, in the form of the label report."""
    if not isinstance(entry, Mapping) or entry.get("value") is None:
        return None
    ends = f" ({format(entry['ci'][0], form)} to {format(entry['ci'][1], form)})" if entry.get("ci") else ""
    return format(entry["value"], form) + ends


def _labels(targets: Facts | None) -> list[str]:
    """What the report of the merge says."""
    if not targets:
        return []
    rows: list[list[str | None]] = [
        ["human labels", f"{targets['n_human']} of {targets['n']} pairs" if {"n", "n_human"} <= set(targets) else None],
        ["judges", ", ".join(code(entry["name"], cell=True) for entry in targets.get("judges") or []) or None],
        ["method", code(str(targets["method"]), cell=True) + _paper(targets["method"]) if "method" in targets else None],
        ["power", None if targets.get("power") is None else f"{targets['power']:.3g}"],
        ["worth in human labels (95 %)", _stat(targets.get("effective_human_labels"), ".0f")],
        ["worth at power 1, as published (95 %)", _stat(targets.get("effective_human_labels_power_1"), ".0f")],
    ]
    for entry in targets.get("judges") or []:
        name, power = code(entry["name"], cell=True), entry.get("power")
        rows.append([f"agreement of {name} with people (95 %)", _stat(entry.get("agreement"), ".1%")])
        rows.append([f"power of {name}", None if power is None or len(targets["judges"]) == 1 else f"{power:.3g}"])
    lines = table(["", ""], [[cell for cell in row if cell is not None] for row in rows if None not in row])
    said = [*targets.get("sentences", []), *(entry["text"] for entry in targets.get("warnings") or [])]
    lines += items(plain(text) for text in said)
    return ["## Labels", "", *lines] if lines else []


def _paper(method: Any) -> str:
    return f" ([{PAPERS[method]}](https://arxiv.org/abs/{PAPERS[method]}))" if method in PAPERS else ""


def _training(trained: Facts) -> list[str]:
    shown = {label: words for label, words in in_short(trained).items() if label not in ("base model", "pairs", "targets")}
    return (
        ["## Training", "", *table(["", ""], [[plain(label), code(words, cell=True)] for label, words in shown.items()])] if shown else []
    )


# ---- what it does not tell


def _limits(trained: Facts, targets: Facts | None, results: Facts | None, arm: str | None) -> list[str]:
    texts = []
    judges = [code(entry["name"]) for entry in (targets or {}).get("judges") or []]
    if judges and (targets or {}).get("method") != "human_only":
        texts.append(f"Labels of {' and '.join(judges)} were trained on: what these misjudge, the model may have learned.")
    if results is None or arm is None:
        texts.append("How it compares with its base was not measured for this card.")
    else:
        roles: dict[str, list[str]] = {}
        for name, about in results["scorers"].items():
            if name in results["arms"][arm]["by_scorer"]:
                roles.setdefault(role_of(about), []).append(code(name))
        held = " and ".join(roles.get("held_out", []))
        texts.append(
            f"Of what judged the images, {held} took no part in making the labels." if held
            else "Nothing that judged the images is known to have taken no part in making the labels."
        )  # fmt: skip
        texts.append("The intervals cover the choice of prompts and seeds of images, not the seed of training: this is one run.")
        if not any(about.get("kind") == "people" for about in results["scorers"].values()):
            texts.append("No person judged these images; a scorer is not a person.")
    texts.append("Limits and biases of the base model remain.")
    return ["## Limits", "", *items(texts)]


def _hashes(exported: Exported, identity: Facts, targets: Facts | None) -> list[str]:
    rows = [[code(exported.name, cell=True), code(exported.sha256, cell=True)]] if exported.sha256 else []
    rows += [
        [words, code(str(identity[key]), cell=True)]
        for key, words in (
            ("base_model", "base model"),
            ("pairs", "pairs"),
            ("targets", "targets"),
            ("label_report", "label report"),
            ("start", "LoRA that training started from"),
        )
        if key in identity
    ]
    for role, entry in ((targets or {}).get("label_files") or {}).items():
        rows.append([f"labels, {plain(role)}", code(entry["sha256"], cell=True)])
    texts = [f"{code(exported.name)} holds {exported.strength}."] if exported.strength else []
    lines = items([*texts, *_made(exported.made)])
    return ["## Files", "", *lines, *table(["", "SHA-256 or fingerprint"], rows)] if rows or lines else []


def _made(made: Facts) -> list[str]:
    """What was done to what was trained."""
    scaled = "strength" in made or "best_strength" in made
    texts = [f"The change is what was trained times {made.get('strength', 1.0):g}."] if scaled else []
    if "best_strength" in made:
        best = made["best_strength"]
        tried = ", ".join(f"{strength:g}" for strength in best["tried"])
        texts.append(f"That is the best of the strengths {tried} of {code(best['lora'])}, by {code(best['by'])}.")
    for other in made.get("added") or []:
        texts.append(f"{code(other['file'])} (SHA-256 {code(other['sha256'])}) was added to it at strength {other['strength']:g}.")
    if "relative_error" in made:
        texts.append(f"It was brought to rank {made['rank']}, which leaves out {made['relative_error']:.1%} of the change (Frobenius).")
    return texts
