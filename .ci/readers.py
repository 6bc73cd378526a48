#!/usr/bin/env python3
"""The parts of .ci/readers: `write FOLDER` exports, `read FOLDER RESULT` loads with whatever diffusers is there, `table FOLDER` sums up.

Truth is the live adapter as peft merges it, with no code of the exporting. An error is |theirs - truth| / |truth - base| over all weights.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KINDS = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL"}
PARTS = ("unet", "text_encoder", "text_encoder_2")
TOLERANCE = 1e-4
PROMPT = "a large red circle"


def weights(pipe) -> dict[str, torch.Tensor]:
    """All weights of UNet and text encoders under one name each, with adapters merged by peft."""
    found = {}
    for part in PARTS:
        module = getattr(pipe, part, None)
        if module is None:
            continue
        for layer in module.modules():
            if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
                layer.merge()
        for name, value in module.state_dict().items():
            if "lora_" not in name and not name.endswith("position_ids"):
                name = name.replace(".base_layer", "")
                bare = name.removeprefix("text_model.") if part != "unet" else name
                found[f"{part}.{bare}"] = value.detach().clone().contiguous()
    return found


# ---- writing


def trainings() -> dict[str, dict]:
    """What was trained, by its name in the table, each of another scale."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from support.adapters import CONV

    ends = {"conv_in", "conv_out"}
    blocks = ["to_q", "to_k", "to_v", "to_out.0", *(name for name in CONV if name not in ends | {"to_q"})]
    return {
        "attention and text encoders": {"text": True},
        "attention, alpha 16 of rank 4": {"rank": 4, "alpha": 16.0},
        "attention, convolutions, text encoders": {"targets": blocks, "text": True},
        "all layers, text encoders": {"targets": [*blocks, *ends, "linear_1", "linear_2"], "text": True},
        "rsLoRA": {"text": True, "rslora": True},
        "DoRA": {"text": True, "dora": True},
    }


def live(model) -> dict[str, torch.Tensor]:
    """The trained weights of a model in training."""
    from types import SimpleNamespace

    return weights(SimpleNamespace(unet=model.unet, **dict(zip(PARTS[1:], model.text.encoders, strict=False))))


def write(folder: Path) -> None:
    """Bases, trainings, and what `dedpo export` makes of them."""
    from dedpo_diffusion.models import tiny
    from dedpo_diffusion.pipelines import export
    from dedpo_diffusion.weights.portable_folder import make_portable

    options = trainings()
    from support.adapters import adapted, as_run, pipeline

    pairs = tiny.write_pairs(folder / "pairs", "soft")
    for kind in KINDS:
        base = tiny.build(folder / kind / "base", kind)
        make_portable(base)  # so that every version has the base at all
        before = weights(pipeline(base))
        save_file(before, folder / kind / "base.safetensors")

        def out(run, name, *more, kind=kind):
            assert export.main([str(run), "--out", str(folder / kind / name), *more]) == 0

        made = {}
        for number, (name, trained) in enumerate(options.items()):
            model = adapted(base, **trained)
            run = as_run(model, base, folder / "runs" / f"{kind}{number}", data=pairs, **trained)
            save_file(live(model), folder / kind / f"{number}.truth")
            made[name] = (run, number)
            for layout in ("diffusers", "kohya"):
                if (name, layout) != ("DoRA", "kohya"):  # which no two programs read alike, and export says so
                    out(run, f"{number}.{layout}.safetensors", "--format", layout)
            if name.startswith(("all layers", "DoRA")):
                out(run, f"{number}.merged", "--format", "merged")
                out(run, f"{number}.checkpoint.safetensors", "--format", "checkpoint", "--dtype", "float32")
        (one, first), (_, second) = made["attention and text encoders"], made["attention, convolutions, text encoders"]
        number, other = len(options), folder / kind / f"{second}.kohya.safetensors"
        truths = [load_file(folder / kind / f"{k}.truth") for k in (first, second)]
        save_file({key: truths[0][key] + 0.5 * (truths[1][key] - before[key]) for key in before}, folder / kind / f"{number}.truth")
        for layout in ("diffusers", "kohya"):
            out(one, f"{number}.{layout}.safetensors", "--format", layout, "--add", f"{other}=0.5")
        names = [*options, "one LoRA added to another"]
        (folder / kind / "names.json").write_text(json.dumps(names))
        ids = [pipeline(base).tokenizer(PROMPT).input_ids]
        (folder / kind / "tokens.json").write_text(json.dumps(ids))


# ---- reading


def loaded(file: Path, base: Path):
    """A pipeline with what the file holds, by diffusers alone."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if (base / "text_encoder_2").is_dir() else StableDiffusionPipeline
    without = {} if (base / "text_encoder_2").is_dir() else {"safety_checker": None, "feature_extractor": None}
    if file.is_dir():
        return kind.from_pretrained(file, **without)
    if ".checkpoint." in file.name:
        return kind.from_single_file(str(file), config=str(base), local_files_only=True, **without)
    pipe = kind.from_pretrained(base, **without)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipe


def measured(file: Path, folder: Path) -> dict[str, object]:
    """{"error": relative error, "lost": layers} of a file, or {"refused": words}."""
    truth, base = load_file(folder / f"{file.name.split('.')[0]}.truth"), load_file(folder / "base.safetensors")
    try:
        pipe = loaded(file, folder / "base")
        theirs = weights(pipe)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
    changed = [name for name in truth if not torch.equal(truth[name], base[name])]
    missing = sorted(set(truth) ^ set(theirs))
    if missing:
        return {"refused": f"{len(missing)} weights have other names (first: {missing[0]})"}
    lost = [name for name in changed if (theirs[name].float() - base[name]).norm() < 1e-6 * (truth[name] - base[name]).norm()]
    gap = sum((theirs[name].float() - truth[name]).double().square().sum().item() for name in truth)
    whole = sum((truth[name] - base[name]).double().square().sum().item() for name in truth)
    found: dict[str, object] = {"error": (gap / whole) ** 0.5, "lost": len(lost), "of": len(changed), "first": (lost or [""])[0]}
    if file.is_dir():
        found["tokens"] = [pipe.tokenizer(PROMPT).input_ids] == json.loads((folder / "tokens.json").read_text())
    return found


def read(folder: Path, result: Path) -> bool:
    """Read every file; prints what is wrong, and returns whether nothing is."""
    warnings.filterwarnings("ignore")
    found: dict[str, object] = {}
    try:
        import diffusers
        import transformers
        from diffusers import StableDiffusionXLPipeline  # noqa: F401 - which parts import shows at use alone

        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        found["versions"] = [diffusers.__version__, transformers.__version__]
    except Exception as error:
        print(f"cannot be imported together: {(str(error).splitlines() or ['?'])[0]}")
        result.write_text(json.dumps({"import": str(error)}))
        return True
    early = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 39)  # knows no first and last layers in the kohya layout
    good = True
    for kind in KINDS:
        names = json.loads((folder / kind / "names.json").read_text())
        for file in sorted(path for path in (folder / kind).iterdir() if path.name[0].isdigit() and not path.name.endswith(".truth")):
            number, layout = file.name.split(".")[:2]
            one = measured(file, folder / kind)
            found[f"{kind}|{names[int(number)]}|{layout}"] = one
            right = "refused" not in one and one["error"] < TOLERANCE and one.get("tokens", True)
            known = (layout, names[int(number)].partition(",")[0]) == ("kohya", "all layers") and early
            if not right:
                print(f"{'known: ' if known else ''}{kind}, {names[int(number)]}, {layout}: {one}")
                good = good and known
    errors = [one["error"] for one in found.values() if isinstance(one, dict) and "error" in one and one["error"] < TOLERANCE]
    print(f"{len(errors)} of {len(found) - 1} files right, largest relative error {max(errors, default=0):.1e}", flush=True)
    result.write_text(json.dumps(found, indent=1))
    return good


def table(folder: Path) -> None:
    """All results as a Markdown table: the largest relative error of the three bases, or what goes wrong."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    whole = [one for one in results if "versions" in one]
    rows = dict.fromkeys(key.partition("|")[2] for one in whole for key in one if "|" in key)
    print("| trained, format | " + " | ".join(f"diffusers {a}, transformers {b}" for a, b in (one["versions"] for one in whole)) + " |")
    print("|---" * (len(whole) + 1) + "|")
    for row in rows:
        cells = [_cell({kind: one[f"{kind}|{row}"] for kind in KINDS if f"{kind}|{row}" in one}) for one in whole]
        print("| " + row.replace("|", ", `") + "` | " + " | ".join(cells) + " |")
    for one in results:
        if "import" in one:
            print(f"cannot be imported together: {one['import']}")


def _cell(by_kind: dict[str, dict]) -> str:
    wrong = []
    for kind, one in by_kind.items():
        if "refused" in one:
            wrong.append(f"{KINDS[kind]} refused")
        elif one["lost"]:
            wrong.append(f"{KINDS[kind]} without {one['lost']} of {one['of']} layers")
        elif one["error"] >= TOLERANCE:
            wrong.append(f"{KINDS[kind]} error {one['error']:.2g}")
        elif not one.get("tokens", True):
            wrong.append(f"{KINDS[kind]} other tokens")
    return "; ".join(wrong) or f"{max(one['error'] for one in by_kind.values()):.0e}"


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    done = {"write": write, "read": read, "table": table}[command](*map(Path, paths))
    sys.exit(done is False)
