"""Write what a run trained, or another LoRA, so that other programs load it.

    dedpo export runs/mine --out mine.safetensors                                   a LoRA for diffusers
    dedpo export runs/mine --format kohya --out mine.safetensors                    a LoRA for ComfyUI, A1111 and their kin
    dedpo export runs/mine --format merged --out models/mine                        the whole model as a diffusers folder
    dedpo export runs/mine --format checkpoint --out mine.safetensors               the whole model as one file
    dedpo export runs/mine --out share/mine.safetensors --results report/results.json   with a model card
    dedpo export runs/mine --out best.safetensors --strength best --results report/results.json   at the strength found best
    dedpo export runs/mine --out share/mine.safetensors --push OWNER/NAME           and send it to a model hub
    dedpo export one.safetensors --add other.safetensors=0.5 --rank 16 --format kohya --out both.safetensors

Of a run the newest checkpoint is taken, or with --checkpoint best what was trained at the best validation. The same export gives the same
bytes. In the metadata, or beside a folder in dedpo_settings.json, are the run's settings and step, the digests of the base model, data
and label report it was trained with, and what else was done to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, held_already, say, say_next, say_replaced, stage
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.settings import ExportSettings

if TYPE_CHECKING:
    from torch import Tensor

    from dedpo_diffusion.weights import Lora
    from dedpo_diffusion.weights.base_model import Base
    from dedpo_diffusion.weights.source import Source

LORAS = ("diffusers", "kohya")


def run(settings: ExportSettings) -> Path:
    """Write what a run trained, or another LoRA, so that other programs load it."""
    from dedpo_diffusion.weights.source import open_source

    check(settings)
    if settings.push is not None:
        from dedpo_diffusion.weights.hub import check_target

        check_target(settings.push)
    held = held_already(settings.out)
    settings, chosen = with_strength(settings)
    source = open_source(settings)
    if chosen:
        source = replace(source, before={**source.before, "best_strength": chosen})
    if settings.format in LORAS:
        write_lora(settings, source)
    else:
        write_model(settings, source)
    wanted = settings.card or settings.results is not None or settings.push is not None
    card = write_card(settings) if settings.source.is_dir() and wanted else None
    say_replaced(held)
    if settings.push is not None:
        send(settings, card)
    made = ["--model", source.model or "MODEL", "--lora", settings.out] if settings.format in LORAS else ["--model", settings.out]
    prompts = "prompts.txt" if source.model == "shapes" else "parti"
    say_next("sample", *made, "--prompts", prompts, "--limit", 100, "--out", f"samples/{settings.out.stem}")
    return settings.out


def with_strength(settings: ExportSettings) -> tuple[ExportSettings, dict[str, Any]]:
    """The settings with a number for "best", and what is told of that choice; {} where a number was given.

    Raises:
        UserError: the results do not tell this LoRA's best strength.
    """
    from dedpo_diffusion.weights.best_strength import best_strength

    if settings.strength != "best":
        return settings, {}
    assert settings.results is not None  # or `check` had refused
    found = best_strength(settings.results, settings.source, settings.arm)
    check_strength(f"{settings.results}: the best strength", found.strength)
    return replace(settings, strength=found.strength, arm=found.arm), found.told


def check(settings: ExportSettings) -> None:
    """See to it that what was asked for can be meant.

    Raises:
        UserError: it cannot.
    """
    best = settings.strength == "best"
    if best and settings.results is None:
        raise UserError("--strength best takes the strength from a comparison; give its --results, the results.json of `dedpo compare`")
    if (settings.card or (settings.results is not None and not best)) and settings.source.is_file():
        raise UserError(f"{settings.source}: a model card is written from a run folder, and this is a file; leave --card and --results out")
    if settings.private and settings.push is None:
        raise UserError("--private is of what --push sends; give --push OWNER/NAME, or leave it out")
    if settings.arm is not None and settings.results is None:
        raise UserError("--arm names one of the models in --results; give both")
    if settings.results is not None and not settings.results.is_file():
        raise UserError(f"{settings.results}: no such file; `dedpo compare` writes results.json beside its report")
    if settings.rank is not None and settings.format not in LORAS:
        raise UserError(f"--rank is of a LoRA, and --format {settings.format} writes a whole model; leave it out")
    if settings.format == "merged":
        if settings.out.suffix == ".safetensors" or settings.out.exists():
            raise UserError(f"{settings.out}: a merged model is a folder that does not exist yet; choose another --out")
    elif settings.out.suffix != ".safetensors" or settings.out.is_dir():
        raise UserError(f"{settings.out}: give a file name that ends in .safetensors")
    if settings.rank is not None and settings.rank < 1:
        raise UserError(f"--rank is {settings.rank}; it must be at least 1")
    if not isinstance(settings.strength, str):
        check_strength("--strength", settings.strength)
    read = [settings.source, *(path for path, _ in map(to_add, settings.add))]
    again = next((path for path in read if path.resolve() == settings.out.resolve()), None)
    if again is not None:
        raise UserError(f"{settings.out}: it is what is read ({again}), and would be overwritten; choose another --out")


def number(settings: ExportSettings) -> float:
    """The strength, which `with_strength` has made a number."""
    assert not isinstance(settings.strength, str)
    return settings.strength


def check_strength(what: str, strength: float) -> None:
    """Raises UserError where a strength is not finite, 0, or far from any that is used."""
    if not 0 < abs(strength) < 100:
        raise UserError(f"{what} is {strength}; give a number other than 0 between -100 and 100, where 1 is what was trained")


def to_add(text: str) -> tuple[Path, float]:
    """The file and the strength of FILE=STRENGTH. Raises UserError where it is something else."""
    name, _, number = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        strength = float(number)
    except ValueError as error:
        raise UserError(f"--add {text}: {number!r} is no number; give FILE=STRENGTH, as other.safetensors=0.5") from error
    check_strength(f"--add {text}: the strength", strength)
    return Path(name), strength


def write_lora(settings: ExportSettings, source: Source) -> None:
    """A LoRA as one file, in the layout of diffusers or of kohya."""
    from dedpo_diffusion.weights import to_diffusers, to_kohya
    from dedpo_diffusion.weights.algebra import folded, one_alpha
    from dedpo_diffusion.weights.base_model import KEPT, modelspec, network
    from dedpo_diffusion.weights.diffusers_layout import CONFIG
    from dedpo_diffusion.weights.header import save_tensors

    lora, made = changed_lora(settings, source)
    ranks = lora.ranks()
    others = source.lora.metadata if source.lora is not None else {}
    told, dtype = source.told(made) | {key: others[key] for key in KEPT if key in others}, settings.dtype or "float32"
    if settings.format == "kohya":
        base, lora = base_of_lora(settings, source, lora), one_alpha(lora)
        _warn_of_dora(lora)
        tensors = to_kohya(_rounded(lora, dtype), base.family)
        told |= modelspec(base, source.title, lora=True) | network(lora, base, source.title)
        what = f"a kohya LoRA for {base.family}"
    else:
        lora = folded(lora)
        tensors, config = to_diffusers(_rounded(lora, dtype))
        told |= {CONFIG: json.dumps(config, sort_keys=True)}
        what = "a diffusers LoRA"
    save_tensors(settings.out, tensors, told)
    alphas = sorted({layer.alpha for layer in lora.layers.values()})
    filled = f" (layers of rank {_range(ranks)}, filled up with zeros)" if len(ranks) > 1 else ""
    numbers = f"rank {_range(lora.ranks())}{filled}, alpha {_range(alphas)}"
    say(f"wrote {settings.out}: {what}, {len(tensors)} tensors, {numbers}, {dtype}, {_size(settings.out)}{source.at}")


def changed_lora(settings: ExportSettings, source: Source) -> tuple[Lora, dict[str, Any]]:
    """The source's LoRA at the strength and rank that were asked for, with others added, and what is to be said of that."""
    from dedpo_diffusion.weights.algebra import combined, extracted, resized, scaled
    from dedpo_diffusion.weights.source import weights_of

    others, made = added(settings)
    lora, rank = source.lora, settings.rank
    loss = None
    dora = any(layer.magnitude is not None for one in (lora, *(other for other, _ in others)) if one for layer in one.layers.values())
    if lora is None and rank is None:
        raise UserError(
            f"{settings.source}: the whole UNet was trained, so there is no adapter; give --format merged or --format checkpoint, "
            "or --rank to extract a LoRA of that rank"
        )
    if rank is not None and (lora is None or dora):
        pipe, parts = source.load_base(), source.touched(others)
        before = {name: value.clone() for name, value in weights_of(pipe, parts).items()}
        source.apply(pipe, number(settings), others)
        lora, loss = extracted(before, weights_of(pipe, parts), rank, part="")
    else:
        assert lora is not None
        lora = combined([scaled(lora, number(settings)), *(scaled(other, by) for other, by in others)])
        if rank is not None:
            lora, loss = resized(lora, rank)
    if loss is not None:
        name, worst = loss.worst
        outside = f", {loss.left_out} tensors that are no matrices ({loss.left_out_share:.1%} of it) among that" if loss.left_out else ""
        say(f"rank {rank} leaves out {loss.relative:.1%} of the change (Frobenius){outside}; at worst {worst:.1%}, of {name}")
        made |= {"rank": rank, "relative_error": round(loss.relative, 6), "worst_layer": [name, round(worst, 6)]}
    return lora, made


def added(settings: ExportSettings) -> tuple[list[tuple[Lora, float]], dict[str, Any]]:
    """The LoRAs to add with their strengths, and how the result was made, as far as the settings tell."""
    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.weights import read_lora_file

    found, listed = [], []
    for path, strength in map(to_add, settings.add):
        found.append((read_lora_file(path), strength))
        listed.append({"file": path.name, "sha256": file_digest(path), "strength": strength})
    made: dict[str, Any] = {} if settings.strength == 1 else {"strength": settings.strength}
    return found, made | ({"added": listed} if listed else {})


def base_of_lora(settings: ExportSettings, source: Source, lora: Lora) -> Base:
    """The base that the LoRA is for: the one given, that of the settings, the one that the file names, or the one its layers fit."""
    from dedpo_diffusion.weights.base_model import Base, look_up, told_base
    from dedpo_diffusion.weights.kohya import family_of

    shown = family_of(lora)
    told = None if source.lora is None or settings.model else told_base(source.lora.metadata)
    if told is None and source.model is not None:
        try:
            told = look_up(source.model, source.model_config, source.model_prediction)
        except UserError as error:
            given = "" if settings.model or "--model," in str(error) else "; give --model, where the base model is now"
            if settings.model or shown is None:
                raise UserError(f"{error}{given}") from error
            say(
                f"Warning: {error}. The LoRA's layers are those of an {shown}, which is what the file says; what its base predicts and "
                "of which size is not stored in it. Give --model, where the base model is now, to have them stored"
            )
    if told is None and shown is not None:
        told = Base(shown)
    if told is None:
        raise UserError(f"{settings.source}: nothing in it shows which family its base model is of; give --model")
    if shown is not None and shown != told.family:
        raise UserError(f"{settings.source}: it is a LoRA of an {shown}, and the base model is an {told.family}; give its own --model")
    return told


def write_model(settings: ExportSettings, source: Source) -> None:
    """The base model with what was trained worked in, as a diffusers folder or as one file."""
    import torch

    from dedpo_diffusion.core.files import atomic_folder, write_json
    from dedpo_diffusion.weights.fusing import cast
    from dedpo_diffusion.weights.portable_folder import make_portable

    others, made = added(settings)
    pipe = source.load_base()
    source.apply(pipe, number(settings), others)
    dtype = settings.dtype or ("float16" if settings.format == "checkpoint" else "float32")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        cast(part, getattr(torch, dtype))
    if settings.format == "checkpoint":
        write_checkpoint(settings, source, pipe, made, dtype)
        return
    with atomic_folder(settings.out) as temporary:
        pipe.save_pretrained(temporary)
        make_portable(temporary)
        write_json(temporary / "dedpo_settings.json", source.told_in_folder(made))
    size, count = _size(settings.out), sum(len(part.state_dict()) for part in parts)
    say(f"wrote {settings.out}: the whole model as a diffusers folder, {count} tensors, {dtype}, {size}{source.at}")


def write_checkpoint(settings: ExportSettings, source: Source, pipe: Any, made: Mapping[str, Any], dtype: str) -> None:
    """The whole model as one file in the original layout; a v-prediction is marked by a tensor, for which some programs look."""
    import torch

    from dedpo_diffusion.models.single_file import to_single_file
    from dedpo_diffusion.weights.base_model import base_of, modelspec
    from dedpo_diffusion.weights.header import save_tensors
    from dedpo_diffusion.weights.v_prediction import who_sees

    base = base_of(pipe)
    second = getattr(pipe, "text_encoder_2", None)
    tensors: dict[str, Tensor] = to_single_file(pipe.unet, pipe.vae, pipe.text_encoder, second)
    if base.prediction == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
        if base.zero_snr:
            tensors["ztsnr"] = torch.zeros(0)
    elif base.prediction != "epsilon":
        raise UserError(f"--format checkpoint: no reader of single files knows prediction {base.prediction}; give --format merged")
    save_tensors(settings.out, tensors, source.told(made) | modelspec(base, source.title, lora=False))
    what = f"the whole model as one file, {base.family}"
    say(f"wrote {settings.out}: {what}, {len(tensors)} tensors, {dtype}, {_size(settings.out)}{source.at}")
    if base.prediction == "v_prediction":
        say(f"Warning: {who_sees(base.family, base.zero_snr)}")
    if base.family == "sd2":
        say('ComfyUI logs "clip missing" of the text encoder\'s last layer: it is not in the file, since an SD2.x makes no use of it')


def send(settings: ExportSettings, card: Path | None) -> None:
    """Send what was written to the hub."""
    from dedpo_diffusion.weights.hub import Repository, collect, push

    assert settings.push is not None
    if card is None:
        say(f"{settings.source} is no run folder, so no model card is written or sent")
    push(Repository(settings.push), collect(settings.out, card, settings.results), private=settings.private, title=settings.out.name)


def write_card(settings: ExportSettings) -> Path:
    """The model card beside what was written."""
    from dedpo_diffusion.weights.card import add_card

    try:
        path = add_card(settings.out, settings.source, results=settings.results, arm=settings.arm)
    except UserError as error:
        raise UserError(f"{error} (the model itself is written; only its card is not)") from error
    say(f"wrote {path}: the model card; fill in its license before you share the model")
    return path


def _rounded(lora: Lora, dtype: str) -> Lora:
    """The LoRA with its matrices in a precision."""
    import torch

    def rounded(name: str, value: Tensor | None) -> Tensor | None:
        found = None if value is None else value.to(getattr(torch, dtype))
        if found is not None and not torch.isfinite(found).all():
            remedy = "give --dtype bfloat16 or float32" if dtype == "float16" else "give a smaller --strength, or another LoRA"
            raise UserError(f"{name}: not finite as {dtype}; {remedy}")
        return found

    layers = {
        name: replace(layer, **{kind: rounded(name, getattr(layer, kind)) for kind in ("down", "up", "magnitude")})
        for name, layer in lora.layers.items()
    }
    return replace(lora, layers=layers)


def _warn_of_dora(lora: Lora) -> None:
    from dedpo_diffusion.weights.compatibility import KOHYA_DORA

    if any(layer.magnitude is not None for layer in lora.layers.values()):
        say(f"Warning: {KOHYA_DORA}. For all of these, give --rank, which extracts a plain LoRA, or --format checkpoint")


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return size_words(sum(file.stat().st_size for file in files))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(ExportSettings, run, argv, prog="dedpo export", positional=("source",), flags={"add": "add"})


if __name__ == "__main__":
    raise SystemExit(main())
