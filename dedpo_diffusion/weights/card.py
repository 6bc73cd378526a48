"""A model card beside an exported model: which arm of a comparison it is, where the card goes, and what it says.

Nothing of the user's is overwritten: a card that was changed since it was written is the user's, and so is the card of another model.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import atomic_file, file_digest, write_text
from dedpo_diffusion.labels.files import read_report, targets_path
from dedpo_diffusion.weights.adapters import find_adapter
from dedpo_diffusion.weights.card_text import Exported, model_card
from dedpo_diffusion.weights.header import Header, read_header
from dedpo_diffusion.weights.inspection import inspect_path
from dedpo_diffusion.weights.provenance import own_facts, portable, rewarded
from dedpo_diffusion.weights.run_folder import first_difference, read_identity, read_settings

_MARK = re.compile(r"<!-- model card by dedpo_diffusion, sha256 ([0-9a-f]{64}) -->\n")


def add_card(out: Path, run: Path, *, results: Path | None = None, arm: str | None = None) -> Path:
    """Write the card of an exported model.

    It goes to README.md in the model's folder, or in the folder of its file; where that is the user's, or of another model, to
    MODEL_CARD.md in the model's folder, or to FILE.md beside its file.

    Args:
        out: what `dedpo export` wrote: a .safetensors file, or a diffusers folder.
        run: the run that it was exported from.
        results: `results.json` of `dedpo compare`; a contact_sheet.png beside it is copied beside the card.
        arm: which arm of it this model is; None finds out, by the sample folders if they are found.

    Returns:
        The card.

    Raises:
        UserError: no such model, run or results; a model of another run; an arm that cannot be told; or no place for the card.
    """
    if arm is not None and results is None:
        raise UserError("--arm names one of the models of a comparison; give its --results too")
    report = inspect_path(out, hash=True)
    exported = describe_exported(out, report)
    trained, embedded = read_settings(run), report.get("settings")
    if embedded is not None:
        difference = first_difference(portable(trained), portable({key: embedded.get(key) for key in trained}))
        if difference:
            raise UserError(f"{out}: it was not exported from {run} ({difference}); give the run that it came from")
        trained = {**trained, **({"step": embedded["step"]} if "step" in embedded else {})}
    identity = read_identity(run) | ((report.get("own") or {}).get("sources") or {})
    given: dict[str, Any] = {"identity": identity, "targets": targets_report(trained, identity)}
    path = place_for(out)
    if results is not None:
        found = read_results(results)
        name = which_arm(found, results, out, report, arm)
        given |= {"results": found, "arm": name, "sampled": _sampled(found, results, out, report, name)}
        given["sheet"] = _sheet(results.parent / "contact_sheet.png", path, out)
    try:
        text = model_card(trained, exported, **given)
    except (KeyError, TypeError) as error:
        raise UserError(f"{results or run}: cannot be put into a card ({error} is missing or odd); run `dedpo compare` again") from error
    write_text(path, text + _mark(out, text))
    return path


def describe_exported(out: Path, report: Mapping[str, Any]) -> Exported:
    """What a card says of a model file or folder.

    Raises:
        UserError: it is neither a LoRA nor a whole model.
    """
    family, made = (report.get("base") or {}).get("family"), (report.get("own") or {}).get("made") or {}
    if report["what"] == "whole model":
        return Exported(out.resolve().name, "folder", family=family, made=made)
    if report["what"] == "checkpoint":
        return Exported(out.name, "checkpoint", family=family, sha256=report.get("sha256"), made=made)
    if not report.get("readers") or not report.get("ranks") or not out.is_file():
        raise UserError(
            f"{out}: a {report['what']}, which no card is written for; give a LoRA or a whole model as `dedpo export` writes it"
        )
    ranks, scales = ([f"{value:g}" for value in report[name]] for name in ("ranks", "scales"))
    shown = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"]
    shown.append(f"scale alpha / rank {scales[0]}" if len(scales) == 1 else f"scales {scales[0]} to {scales[-1]}")
    strength = f"{sum(part['layers'] for part in report['parts'].values())} layers in {', '.join(report['dtypes'])}, {', '.join(shown)}"
    return Exported(out.name, "lora", report["layout"], family, strength, report.get("sha256"), made, _same_in_kohya(out))


def _same_in_kohya(out: Path) -> list[str]:
    """Files beside a LoRA that hold the same in kohya's layout, as the settings stored in them tell."""
    own, found = _origin(read_header(out)), []
    for file in sorted(out.parent.glob("*.safetensors")):
        if own is None or file == out:
            continue
        try:
            header = read_header(file)
        except UserError:  # somebody else's
            continue
        adapter = find_adapter(header) if _origin(header) == own else None
        if adapter is not None and adapter.layout == "kohya":
            found.append(file.name)
    return found


def _origin(header: Header) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The settings and hashes that were stored with an export; None where there are none."""
    settings = header.stored_json("dedpo_settings")
    return None if settings is None else (settings, own_facts(header.metadata))


def targets_report(trained: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of the targets that a run trained on; None where they are gone or have changed, which is said.

    Raises:
        UserError: the report is damaged.
    """
    data = trained.get("data") or {}
    if not {"pairs", "targets"} <= set(data) or rewarded(trained):
        return None
    pairs, name = Path(data["pairs"]), data["targets"]
    file, table = targets_path(pairs, name, ".json"), targets_path(pairs, name)
    if not file.is_file() or not table.is_file():
        say(f"{file}: not there, so the model card does not describe the labels")
        return None
    if identity.get("targets") not in (None, file_digest(table)):
        say(f"{table}: changed since the run trained on it, so the model card does not describe the labels")
        return None
    return read_report(pairs, name)


# ---- the comparison


def read_results(path: Path) -> dict[str, Any]:
    """The results of `dedpo compare`.

    Raises:
        UserError: no such file, or no such results in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the results.json that `dedpo compare` wrote") from error
    wanted = {"verdict", "primary", "base", "n_images", "n_prompts", "resamples", "scorers", "arms"}
    if not isinstance(found, dict) or not wanted <= set(found) or found["base"] not in found["arms"]:
        raise UserError(f"{path}: no results of `dedpo compare`; give the results.json beside its report")
    return found


def which_arm(results: Mapping[str, Any], path: Path, out: Path, report: Mapping[str, Any], named: str | None) -> str:
    """The arm that a model is.

    Args:
        results: of the comparison, read from `path`.
        path: sample folders are looked for beside it, by the arms' names.
        out: the model.
        report: what `inspect_path` says of it.
        named: by the user; it is believed.

    Raises:
        UserError: no such arm, or none that can be told to be this model.
    """
    arms = [name for name in results["arms"] if name != results["base"]]
    listed = ", ".join(arms)
    if named is not None:
        if named not in arms:
            raise UserError(f"--arm {named}: no arm of {path} that is not its base (those are: {listed})")
        return named
    told = {name: _is_sampled_from(_sample_folder(name, path, out), out, report) for name in arms}
    yes = [name for name in arms if told[name]]
    if len(yes) > 1:  # strengths of one LoRA: the one that it has by itself
        yes = [name for name in yes if _strength_of(_sample_folder(name, path, out)) == 1] or yes
    if len(yes) == 1:
        return yes[0]
    if len(arms) == 1 and told[arms[0]] is None:
        return arms[0]
    why = f"{' and '.join(yes)} were sampled from it" if yes else "no sample folder beside it shows which"
    raise UserError(f"{path}: which arm {out} is remains unclear ({why}); name it with --arm ({listed})")


def _sample_folder(name: str, path: Path, out: Path) -> Path | None:
    """Where the samples of an arm lie, if they lie where they usually do."""
    roots = (path.parent, path.parent / "samples", out.parent / "samples", Path("samples"))
    places = [place for root in roots for place in (root / name, root / name / "strength-1")]
    return next((place for place in places if (place / "settings.yaml").is_file()), None)


def _strength_of(folder: Path | None) -> float | None:
    """The strength of the one LoRA of a sample folder, 1 where it tells none; None without a folder."""
    strengths = None if folder is None else _sampling(folder)[0].get("strength") or [1.0]
    return float(strengths[0]) if isinstance(strengths, list) and len(strengths) == 1 else None


def _sampling(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[Path]]:
    """A sample folder's settings, its identity, and the LoRAs that it was sampled with."""
    settings = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8")) or {}
    identity, lora = read_identity(folder, "put back a copy of it, or remove it"), settings.get("lora")
    return settings, identity, [Path(name) for name in (lora if isinstance(lora, list) else [lora] if lora else [])]


def _is_sampled_from(folder: Path | None, out: Path, report: Mapping[str, Any]) -> bool | None:
    """Whether samples are of this model: its own file, or another file exported from the same step of the same run; None if unknown."""
    if folder is None:
        return None
    settings, identity, loras = _sampling(folder)
    if not loras:
        return Path(str(settings.get("model"))).resolve() == out.resolve()
    if len(loras) > 1:
        return False
    if identity.get("lora") == report.get("sha256"):
        return True
    if not loras[0].is_file() or report.get("settings") is None or file_digest(loras[0]) != identity.get("lora"):
        return False
    origin = _origin(read_header(loras[0]))
    return origin == (report["settings"], report.get("own") or {})


def _sampled(results: Mapping[str, Any], path: Path, out: Path, report: Mapping[str, Any], arm: str) -> str:
    """How the arm's images were made otherwise than from the very file, in a sentence; "" if they were not, or nothing is known."""
    folder = _sample_folder(arm, path, out)
    if folder is None:
        return ""
    settings, identity, loras = _sampling(folder)
    strengths = settings.get("strength") or []
    found = []
    made = ((report.get("own") or {}).get("made") or {}).get("strength", 1.0)
    if loras and made != 1 and strengths == [made]:
        return f"The images were sampled from the LoRA at strength {made:g}, which is worked into this file."
    if loras and identity.get("lora") != report.get("sha256"):
        found.append("The images are of another file of the same LoRA, not of this very one.")
    if any(strength != 1 for strength in (strengths if isinstance(strengths, list) else [strengths])):
        found.append(f"The images were sampled at strength {', '.join(f'{strength:g}' for strength in strengths)}.")
    return " ".join(found)


# ---- where it goes


def _mark(out: Path, text: str) -> str:
    """The last line of a card, by which it is known to be as it was written, and of which model."""
    digest = hashlib.sha256(f"{out.resolve().name}\n{text}".encode()).hexdigest()
    return f"\n<!-- model card by dedpo_diffusion, sha256 {digest} -->\n"


def _is_ours(path: Path, out: Path) -> bool:
    """Whether a file is the card of this model as it was written, so that a new one may take its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, _, last = text.rstrip("\n").rpartition("\n")
    return _MARK.fullmatch(last + "\n") is not None and text == body + _mark(out, body)


def place_for(out: Path) -> Path:
    """Where the card of a model goes.

    Raises:
        UserError: both places are taken by something of the user's.
    """
    places = [out / "README.md", out / "MODEL_CARD.md"] if out.is_dir() else [out.parent / "README.md", out.with_suffix(".md")]
    for path in places:
        if not path.exists() or _is_ours(path, out):
            return path
    raise UserError(f"{places[0]} and {places[1]} are yours, or changed since they were written, and are not overwritten; move one away")


def _sheet(source: Path, card: Path, out: Path) -> str | None:
    """The name of the contact sheet beside the card, copied there under a name of its own content; None if there is no sheet."""
    if not source.is_file():
        return None
    if source.parent.resolve() == card.parent.resolve():
        return source.name
    stem = "" if out.is_dir() else f"{out.stem}-"
    target = card.parent / f"{stem}samples-{file_digest(source)[:8]}.png"
    if not target.exists():
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
    return target.name
