"""What a weight file or a folder is, in facts ready for JSON; headers alone are read, but for adapters, which are small."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from dedpo_diffusion.core.console import Progress, UserError, track
from dedpo_diffusion.core.files import is_leftover
from dedpo_diffusion.models.single_file import CLIP, OPEN_CLIP, PICKLED, UNET, VAE, family, foreign
from dedpo_diffusion.weights.adapters import WORDS, Adapter, find_adapter
from dedpo_diffusion.weights.base_model import FAMILIES, Evidence, find_base
from dedpo_diffusion.weights.compatibility import A1111, COMFY, DIFFUSERS, troubles, who_reads
from dedpo_diffusion.weights.diffusers_layout import CONFIG
from dedpo_diffusion.weights.header import Header, read_header
from dedpo_diffusion.weights.provenance import in_short, others_facts, own_facts
from dedpo_diffusion.weights.run_folder import best_folder, checkpoints
from dedpo_diffusion.weights.v_prediction import readers as single_file_readers
from dedpo_diffusion.weights.v_prediction import who_sees

HASHED = 2**30  # bytes; the digest of a larger file is told when it is asked for
BESIDE = ("sources", "made")  # what `dedpo export` stores beside the settings
LARGEST = 5  # layers of the largest changes that are named
Report = dict[str, Any]


def inspect_path(path: Path, *, hash: bool | None = None) -> Report:
    """What lies at a path.

    Args:
        path: a .safetensors file, or a folder: of diffusers, a part of one, a run, a checkpoint of a run, pairs, or weight files.
        hash: whether a file's SHA-256 is computed; None computes it up to 1 GiB.

    Returns:
        `what` in a word or two, `path`, `bytes`, `facts` by label, `warnings` as sentences, and by kind: `layout`, `base`
        {family, name, evidence}, `parameters`, `dtypes`, `parts`, `ranks`, `alphas`, `scales`, `norms`, `readers` {program: words},
        `non_finite`, `settings`, `own`, `metadata`, `sha256`.

    Raises:
        UserError: nothing there, a pickle, or a file that cannot be read.
    """
    if path.is_dir():
        return _checked(inspect_folder(path))
    header = read_header(path)
    size = path.stat().st_size
    report = describe(header)
    if hash or (hash is None and size <= HASHED):
        report["sha256"] = digest(path)
    return _checked(report)


def _checked(report: Report) -> Report:
    """The report, without settings that are none of a training run, whoever wrote them."""
    try:
        settings_in_short(report)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        report["settings"] = None
        report["warnings"].append("the settings of its training cannot be read")
    return report


def describe(header: Header, config: Mapping[str, Any] | None = None) -> Report:
    """What a file is; `config` is an adapter's, where it lies in a file of its own."""
    path, trained = header.path, header.stored_json("dedpo_settings")
    report: Report = {
        "path": str(path), "what": "", "facts": {}, "warnings": [], "bytes": path.stat().st_size, "tensors": len(header.shapes),
        "parameters": header.parameters(), "dtypes": header.dtype_counts(), "settings": trained, "own": own_facts(header.metadata),
        "metadata": others_facts(header.metadata),
    }  # fmt: skip
    adapter = find_adapter(header, config)
    found = _whole(header) if adapter is None else describe_adapter(adapter)
    warnings = found.pop("warnings", [])
    report |= found
    if not header.shapes:
        warnings.append("no tensor is in this file")
    if "dedpo_settings" in header.metadata and trained is None:
        warnings.append("the settings of its training (dedpo_settings) cannot be read")
    report["warnings"] += warnings
    report["facts"] = {"what": title(report), **report["facts"]}
    return report


def title(report: Report) -> str:
    """One line: what it is, and for which base."""
    base = report.get("base") or {}
    layout = f" in the layout of {report['layout']}" if report.get("layout") else ""
    return report["what"] + layout + (f", for {base['name']}" if base.get("family") else "")


def _base_facts(base: Evidence) -> tuple[Report, list[str]]:
    known = {"family": base.family, "name": FAMILIES.get(base.family or ""), "evidence": base.evidence}
    return known, [base.contradiction] if base.contradiction else []


# ---- adapters


def describe_adapter(adapter: Adapter) -> Report:
    """Parts, ranks, alphas, strength, change, readers and troubles of an adapter file."""
    header, kinds = adapter.header, adapter.kinds()
    base = find_base({name: adapter.shape(layer) for name, layer in adapter.layers.items()}, header.metadata)
    known, warnings = _base_facts(base)
    with safe_open(header.path, "pt") as file:
        measured = _measure(adapter, file.get_tensor)
    dora = any("magnitude" in layer.tensors for layer in adapter.layers.values())
    what = "trained parameters of a run" if adapter.layout == "run" else " and ".join(kinds).replace("LoRA", "DoRA" if dora else "LoRA")
    ranks = sorted({rank for layer in adapter.layers.values() if (rank := adapter.rank(layer)) is not None})
    alphas = measured["alphas"]
    ours = all(layer.part for layer in adapter.layers.values()) and adapter.layout != "run"
    readers = {name: reading.words() for name, reading in who_reads(adapter, alphas).items()} if ours else {}
    warnings += troubles(adapter, alphas, header.path)
    if measured["untold"] or (CONFIG in header.metadata and adapter.config is None):
        first = f" ({measured['untold'][0]})" if measured["untold"] else ""
        warnings.append(f"its {CONFIG} cannot be read{first}, so no reader takes it as it was trained; export it again from where it was")
    if not ours and adapter.layout != "run":
        warnings.append("its layers are not those of a Stable Diffusion UNet or its text encoders: it belongs to another kind of model")
    if adapter.strange:
        warnings.append(f"{len(adapter.strange)} tensors are of no adapter (first: {adapter.strange[0]})")
    if measured["unfit"]:
        warnings.append(
            f"the factors of {len(measured['unfit'])} layers do not fit together (first: {measured['unfit'][0]}); the file is damaged"
        )
    if measured["non_finite"]:
        names = measured["non_finite"]
        warnings.append(f"{len(names)} tensors hold numbers that are not finite (first: {names[0]}): images would be black or noise")
    return {
        "what": what, "layout": None if adapter.layout == "run" else adapter.layout, "base": known, "kinds": kinds, "dora": dora,
        "parts": _parts(adapter), "ranks": ranks, "alphas": _distinct(alphas.values()), "scales": _distinct(measured["scales"].values()),
        "norms": measured["norms"], "non_finite": measured["non_finite"], "readers": readers, "warnings": warnings,
        "facts": {"base": base.words()},
    }  # fmt: skip


def _distinct(values: Any) -> list[float | None]:
    return sorted(set(values), key=lambda value: (value is None, value))


def _parts(adapter: Adapter) -> dict[str, Report]:
    found: dict[str, Report] = {}
    for layer in adapter.layers.values():
        entry = found.setdefault(layer.part or "other", {"layers": 0, "convolutions": 0, "parameters": 0})
        shape = adapter.shape(layer)
        entry["layers"] += 1
        entry["convolutions"] += int(shape is not None and len(shape) == 4 and math.prod(shape[2:]) > 1)
        entry["parameters"] += adapter.header.parameters(name for role, name in layer.tensors.items() if role != "alpha")
    return {part: found[part] for part in (*WORDS, "other") if part in found}


def _measure(adapter: Adapter, tensor: Any) -> Report:
    """Alphas and scales by layer, tensors that are not finite, and the norm of the change: of each part, and of its largest layers."""
    alphas: dict[str, float | None] = {}
    scales: dict[str, float] = {}
    norms: dict[str, list[tuple[float, str]]] = {}
    bad: list[str] = []
    unfit: list[str] = []
    untold: list[str] = []
    for name, layer in track(adapter.layers.items(), "reading layers", len(adapter.layers)):
        held: dict[str, Tensor] = {stored: tensor(stored) for stored in layer.tensors.values()}
        broken = [stored for stored, value in held.items() if value.is_floating_point() and not torch.isfinite(value.float()).all()]
        bad += broken
        try:
            alphas[name] = adapter.alpha(layer, held.__getitem__)
        except ValueError as error:
            alphas[name] = None
            untold.append(f"{name}: {error}")
        scales[name] = adapter.scale(layer, alphas[name])
        whole = not broken and layer.kind != "incomplete" and math.isfinite(scales[name])
        try:
            change = adapter.change(layer, held.__getitem__) if whole else None
        except (RuntimeError, IndexError):  # of torch, on factors of shapes that do not go together
            unfit.append(name)
            continue
        if change is not None and math.isfinite(change):
            norms.setdefault(layer.part or "other", []).append((change * abs(scales[name]), name))
    told = {
        part: {
            "norm": math.sqrt(sum(norm**2 for norm, _ in found)),
            "largest": [{"layer": name, "norm": norm} for norm, name in sorted(found, key=lambda item: (-item[0], item[1]))[:LARGEST]],
        }
        for part, found in ((part, norms[part]) for part in (*WORDS, "other") if part in norms)
    }
    alphas = {name: alpha if alpha is None or math.isfinite(alpha) else None for name, alpha in alphas.items()}
    scales = {name: scale for name, scale in scales.items() if math.isfinite(scale)}
    return {"alphas": alphas, "scales": scales, "norms": told, "non_finite": bad, "unfit": unfit, "untold": untold}


# ---- other files


def _whole(header: Header) -> Report:
    """A checkpoint, a part of a model, or something else."""
    names, path = header.shapes, header.path
    shapes = {name.removesuffix(".weight"): shape for name, shape in names.items() if name.endswith(".weight")}
    base = find_base(shapes, header.metadata)
    known, warnings = _base_facts(base)
    alone = _part_alone(header)
    if alone:
        what, layout = alone
        return {"what": what, "layout": layout, "base": known, "warnings": warnings, "facts": {"base": base.words()}}
    other = foreign(names)
    if other is not None:
        return {"what": other[0].removeprefix("a ").removeprefix("an "), "facts": {}}
    if any(name.startswith((UNET, VAE, *CLIP.values(), *OPEN_CLIP.values())) for name in names):
        return _checkpoint(header, known, base, warnings)
    if path.name == "optimizer.safetensors" and all(name.partition(".")[0].isdigit() for name in names):
        return {"what": "optimizer state of a run", "facts": {}}
    first = ", ".join(list(names)[:3])
    return {"what": "file of tensors", "warnings": [f"what it is does not show in its tensors' names ({first} ...)"], "facts": {}}


def _checkpoint(header: Header, known: Report, base: Evidence, warnings: list[str]) -> Report:
    parts = {
        "UNet": (UNET,), "VAE": (VAE,), "text encoders": (*CLIP.values(), *OPEN_CLIP.values(), "cond_stage_model.", "conditioner."),
    }  # fmt: skip
    sizes = {part: header.parameters(name for name in header.shapes if name.startswith(starts)) for part, starts in parts.items()}
    held = {part: {"parameters": size} for part, size in sizes.items() if size}
    try:
        kind = family(header.path)
    except UserError as error:
        only = len(held) == 1
        what = f"{next(iter(held))} alone" if only else "checkpoint"
        note = [] if only else [str(error).removeprefix(f"{header.path}: ")]
        return {
            "what": what,
            "layout": "single files",
            "base": known,
            "parts": held,
            "warnings": warnings + note,
            "facts": {"base": base.words()},
        }
    if base.family not in (kind, None):
        warnings = [*warnings, f"its text encoders are those of {FAMILIES[kind]}, its UNet that of {base.words()}"]
    facts = {"base": Evidence(kind, ["its text encoders", *base.evidence]).words()}
    marked = "v_pred" in header.shapes
    predicts_v = marked or header.metadata.get("modelspec.prediction_type") == "v"
    if predicts_v:
        facts["predicts"] = "v"
        lacking = "it predicts v without the tensor v_pred, by which programs would know; they assume noise unless they are told"
        told = marked or kind == "sd2"
        warnings = [*warnings, who_sees(kind, "ztsnr" in header.shapes) if told else lacking]
    known = {"family": kind, "name": FAMILIES[kind], "evidence": ["its text encoders", *base.evidence]}
    return {
        "what": "checkpoint", "layout": "single files", "base": known, "parts": held, "warnings": warnings,
        "readers": single_file_readers(kind, predicts_v=predicts_v),
        "facts": facts,
    }  # fmt: skip


def _part_alone(header: Header) -> tuple[str, str] | None:
    """A part of a diffusers folder, by the names in it."""
    names = header.shapes
    if any(name.startswith(("controlnet_", "control_model.")) or "motion_modules." in name for name in names):
        return None
    if {"conv_in.weight", "time_embedding.linear_1.weight"} <= set(names):
        return "UNet", "diffusers"
    if any(name.startswith(("encoder.mid_block.", "decoder.mid_block.")) for name in names):
        return "VAE", "diffusers"
    if any(name.removeprefix("text_model.") == "embeddings.token_embedding.weight" for name in names):
        return "text encoder", "diffusers"
    return None


# ---- folders


def inspect_folder(path: Path) -> Report:
    """What a folder is, by the files that tell."""
    report: Report = {"path": str(path), "what": "", "facts": {}, "warnings": []}
    if (path / "model_index.json").is_file():
        report |= _diffusers_folder(path)
    elif (path / "state.json").is_file() and (path / "parameters.safetensors").is_file():
        report |= _run_checkpoint(path)
    elif (path / "settings.yaml").is_file() and "data" in _yaml(path / "settings.yaml"):
        report |= _run(path)
    elif (path / "adapter_config.json").is_file():
        config, files = _json(path / "adapter_config.json"), sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path}: an adapter_config.json without .safetensors weights; pickled ones are not opened, convert them")
        report |= {"parts": None, **describe(read_header(files[0]), config), "path": str(path)}
    elif any((path / "pairs").glob("*.parquet")):
        report |= {"what": "pair dataset", "facts": {"more": f"dedpo validate {path}"}}
    else:
        report |= _files(path)
    report["facts"] = {"what": title(report), **report["facts"]}
    return report


def _json(path: Path) -> Report:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the folder again") from error
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> Report:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder, without the variants (model.fp16.safetensors) of those that are there in full."""
    files = sorted(file for file in folder.glob("*.safetensors") if not is_leftover(file))
    return [file for file in files if "." not in file.stem] or files


def _diffusers_folder(path: Path) -> Report:
    index = _json(path / "model_index.json")
    parts: dict[str, Report] = {}
    warnings = []
    for name, entry in index.items():
        folder = path / name
        if (
            name.startswith("_")
            or not isinstance(entry, list)
            or entry[:1] == [None]
            or not any((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
        ):
            continue
        headers = [read_header(file) for file in weight_files(folder)]
        if not headers:
            warnings.append(
                f"{name} has pickled weights alone, which are not opened because they can run code; convert them to safetensors"
            )
            continue
        counts: dict[str, int] = {}
        for header in headers:
            for dtype, count in header.dtype_counts().items():
                counts[dtype] = counts.get(dtype, 0) + count
        parts[name] = {"class": str(entry[-1]), "parameters": sum(counts.values()), "dtypes": counts}
    for name in ("unet", "vae", "text_encoder"):
        if name in index and name not in parts and not any(text.startswith(name) for text in warnings):
            warnings.append(f"{name} has no weights here; fetch the folder again")
    unet = _json(path / "unet" / "config.json") if (path / "unet" / "config.json").is_file() else {}
    width = unet.get("cross_attention_dim")  # a list has one a block
    widths = {one for one in (width if isinstance(width, list) else [width]) if isinstance(one, int)}
    shapes: dict[str, tuple[int, ...] | None] = {f"unet.{k}.attn2.to_k": (0, one) for k, one in enumerate(sorted(widths))}
    if "text_encoder_2" in parts:
        shapes["text_encoder_2."] = None
    base = find_base(shapes, {})
    known, odd = _base_facts(base)
    stored = _json(path / "dedpo_settings.json") if (path / "dedpo_settings.json").is_file() else None
    return {
        "what": "whole model", "layout": "diffusers", "base": known, "parts": parts,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "parameters": sum(part["parameters"] for part in parts.values()), "warnings": warnings + odd,
        "settings": None if stored is None else {key: value for key, value in stored.items() if key not in BESIDE},
        "own": {key: value for key, value in (stored or {}).items() if key in BESIDE},
        "readers": {DIFFUSERS: "yes, with from_pretrained", COMFY: "no: it reads single files", A1111: "no: it reads single files"},
        "facts": {"base": base.words(), "class": str(index.get("_class_name"))},
    }  # fmt: skip


def _run(path: Path) -> Report:
    trained, found, best = _yaml(path / "settings.yaml"), checkpoints(path), best_folder(path) / "state.json"
    state = _json(best) if best.is_file() else None
    facts = {"checkpoints": ", ".join(f"step {step}" for step, _ in found) or "none yet"}
    warnings = []
    if state is not None:
        try:
            facts["best"] = f"step {state['step']} ({state['by']} {state['value']:.4f})"
        except (KeyError, TypeError, ValueError):
            warnings.append(f"{best} cannot be read, so which step was best is not known")
    identity = path / "identity.json"
    facts["next"] = f"dedpo export {path} --out FILE.safetensors" if found else "train at least checkpoint_every steps"
    return {
        "what": "training run", "facts": facts, "settings": trained, "own": {"identity": _json(identity)} if identity.is_file() else {},
        "steps": [step for step, _ in found], "warnings": warnings,
    }  # fmt: skip


def _run_checkpoint(path: Path) -> Report:
    state, header = _json(path / "state.json"), read_header(path / "parameters.safetensors")
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    facts = {"step": str(state.get("step")), "moving average": "yes" if (path / "average.safetensors").is_file() else "no"}
    facts["next"] = f"dedpo export {run} --out FILE.safetensors" + (" --checkpoint best" if path.name == "best" else "")
    settings = run / "settings.yaml"
    return {
        "what": "checkpoint of a training run", "facts": facts, "parameters": header.parameters(), "dtypes": header.dtype_counts(),
        "settings": _yaml(settings) if settings.is_file() else None,
    }  # fmt: skip


def _files(path: Path) -> Report:
    """A folder of loose weight files."""
    files = weight_files(path) if (path / "config.json").is_file() else sorted(path.glob("*.safetensors"))
    pickled = sorted(file.name for file in path.iterdir() if file.suffix.lower() in PICKLED)
    warnings = [f"{len(pickled)} pickled files are not opened, because they can run code (first: {pickled[0]})"] if pickled else []
    if len(files) == 1 and (path / "config.json").is_file():
        found = describe(read_header(files[0]))
        return found | {"path": str(path), "warnings": found["warnings"] + warnings}
    if not files:
        raise UserError(f"{path}: no weights here that can be read" + (f"; {warnings[0]}" if warnings else "; give a .safetensors file"))
    entries = []
    for file in files:
        try:
            found = _short(read_header(file))
        except UserError as error:
            found = {"path": str(file), "what": str(error).removeprefix(f"{file}: "), "bytes": file.stat().st_size}
        entries.append(found)
    return {"what": f"folder of {len(files)} weight files", "files": entries, "warnings": warnings, "facts": {}}


def _short(header: Header) -> Report:
    """A file in a line, by its header alone."""
    adapter = find_adapter(header)
    if adapter is None:
        report = _whole(header)
        return {"path": str(header.path), "what": title(report), "bytes": header.path.stat().st_size}
    base, _ = _base_facts(find_base({name: adapter.shape(layer) for name, layer in adapter.layers.items()}, header.metadata))
    layout = None if adapter.layout == "run" else adapter.layout
    return {
        "path": str(header.path), "what": title({"what": " and ".join(adapter.kinds()), "layout": layout, "base": base}),
        "bytes": header.path.stat().st_size,
    }  # fmt: skip


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, with progress."""
    found, block = hashlib.sha256(), 2**24
    with open(path, "rb") as file, Progress("SHA-256, in pieces of 16 MiB", math.ceil(path.stat().st_size / block)) as progress:
        while piece := file.read(block):
            found.update(piece)
            progress.advance()
    return found.hexdigest()


def settings_in_short(report: Report) -> dict[str, str]:
    """The settings that a file or folder came with, in short."""
    return in_short(report["settings"]) if report.get("settings") else {}


def part_words(name: str) -> str:
    """A part's name for people."""
    return WORDS.get(name, name)
