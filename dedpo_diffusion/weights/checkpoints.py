"""Training state as safetensors and JSON: what a stopped run needs to go on as if it had not stopped.

Randomness needs no state here: every draw of a run is a function of (seed, step), see `noising.step_generator`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.files import atomic_folder, file_checksum, write_json
from dedpo_diffusion.models.sharded_tensors import own_part, whole

CHECKSUMS = "checksums.json"  # of the other files of a checkpoint; those of earlier versions have none
QUANTISED = "__bnb_optimizer_quant_state__"  # where bitsandbytes nests its moments; it reads them without the nest too
INTEGER = "#int"  # marks the name of a state that was no tensor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimizer's state to tensors named "<parameter index>.<state name>".

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor an integer.
    """
    flat: dict[str, torch.Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        nested = state.get(QUANTISED, {})
        for name, value in ({name: value for name, value in state.items() if name != QUANTISED} | nested).items():
            if type(value) is int:  # 8-bit optimizers count their steps so
                name, value = f"{name}{INTEGER}", torch.tensor(value)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {name!r} is a {type(value).__name__}; only tensors and integers can be checkpointed")
            flat[f"{index}.{name}"] = value
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` took; the parameter groups (learning rates and the like) stay the optimizer's own."""
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in flat.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.ndim and value.shape == parameter.shape:  # a moment, which lies as its parameter does
            value = own_part(value, parameter)
        state.setdefault(int(index), {})[name.removesuffix(INTEGER)] = int(value) if name.endswith(INTEGER) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
    meta: Mapping[str, Any],
    average: Mapping[str, torch.Tensor] | None = None,
    *,
    rollout: Mapping[str, torch.Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write `parameters.safetensors`, `optimizer.safetensors`, `state.json`, if there is a moving average `average.safetensors`, in the
    middle of a rollout `rollout.safetensors` (the policy that sampled it), and the `checksums.json` of these, into `folder`, atomically.
    What is written without an optimizer can be exported, and nothing resumes from it.

    Where processes hold parts of the tensors, all of them call it, and all but one with `write` False.

    Raises:
        UserError: a parameter is no longer finite, or the disk is full; nothing is written.
    """
    parts = {"parameters": parameters, "average": average, "rollout": rollout}
    parts["optimizer"] = None if optimizer is None else optimizer_tensors(optimizer)
    with atomic_folder(folder) if write else nullcontext(folder) as temporary:
        for name, tensors in parts.items():
            found = None if tensors is None else whole(tensors, keep=write)
            if found is not None and write:
                if name != "optimizer":
                    _check_finite(folder, found)
                save_file(found, temporary / f"{name}.safetensors")
        if write:
            write_json(temporary / "state.json", dict(meta))
            sums = {file.name: [file.stat().st_size, file_checksum(file)] for file in sorted(temporary.iterdir())}
            write_json(temporary / CHECKSUMS, sums)


def _check_finite(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{folder}: not written, since {name} is no longer finite; the checkpoint before it is kept. "
                "Lower optim.learning_rate, or train with mixed_precision bf16 in place of fp16"
            )


def check_checkpoint(folder: Path) -> None:
    """See to it that a checkpoint's files are as they were written; of one without checksums, that they are whole.

    Raises:
        UserError: one is missing or damaged.
    """
    try:
        listed = folder / CHECKSUMS
        known = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    except ValueError as error:
        raise UserError(f"{listed}: damaged ({error})") from error
    wanted = known or {
        "parameters.safetensors",
        "optimizer.safetensors",
        "state.json",
        *(file.name for file in folder.glob("*.safetensors")),
    }
    for name in sorted(wanted):
        file = folder / name
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                safe_open(file, "pt")  # compares the header's lengths with the file's
            if name in known and [file.stat().st_size, file_checksum(file)] != known[name]:
                raise ValueError("it is not what was written")
        except FileNotFoundError as error:
            raise UserError(f"{file}: missing") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error})") from error


def load_checkpoint(folder: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a checkpoint into live parameters and optimizer, in place, and return its `state.json`.

    Raises:
        ValueError: names or shapes differ from the live parameters.
    """
    stored = _Stored(folder / "parameters.safetensors")
    if set(stored) != set(parameters):
        odd = sorted(set(stored) ^ set(parameters))[0]
        raise ValueError(f"{folder}: its parameters are not this model's (first difference: {odd!r})")
    with torch.no_grad():
        for name, value in parameters.items():
            found = stored[name]
            if value.shape != found.shape:
                raise ValueError(f"{folder}: {name} has shape {tuple(found.shape)}, the model {tuple(value.shape)}")
            value.copy_(own_part(found, value))
    restore_optimizer(optimizer, _Stored(folder / "optimizer.safetensors"))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for: every process of a machine reads all of them and keeps its parts."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def load_part(folder: Path, name: str) -> Mapping[str, torch.Tensor] | None:
    """A checkpoint's "parameters", "average" or "rollout", whole and on the CPU, None where it has none."""
    file = folder / f"{name}.safetensors"
    return _Stored(file) if file.is_file() else None
