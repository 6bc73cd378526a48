"""How models that run here are found, loaded and told what they may use; whatever goes wrong becomes one line for the user."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.errors import unreachable
from dedpo_diffusion.core.files import file_digest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def check_options(batch: int, dtype: str) -> None:
    """Refuse a batch below 1, and a precision that is not one of DTYPES.

    Raises:
        UserError: either of them.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")


def usable(device: str | None) -> torch.device:
    """The device of that name; None takes a GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with in_one_line(f"device {chosen} cannot be used here", "give another --device, or none"):
        return torch.empty(0, device=chosen).device


def local_or_hub(location: str, patterns: Sequence[str], *, name: str, ignored: Sequence[str] = ()) -> Path:
    """A folder for `name`: the location itself, or the local copy of the hub repository it names.

    Args:
        location: a folder, or a hub id.
        patterns: the files to fetch from the hub, as "*.json".
        name: the scorer or judge, for messages.
        ignored: files among them that are not fetched.

    Raises:
        UserError: neither.
    """
    if Path(location).is_dir():
        return Path(location)
    if Path(location).is_absolute() or location.startswith((".", "~")) or location.count("/") > 1:
        raise UserError(f"{name}: {location}: no such folder")
    from huggingface_hub import snapshot_download

    with fetching(name, location, f"give {name}=FOLDER", found="is no folder here and"):
        return Path(snapshot_download(location, allow_patterns=list(patterns), ignore_patterns=list(ignored)))


@contextmanager
def fetching(name: str, what: str, remedy: str, *, found: str = "") -> Iterator[None]:
    """Say that `what` comes from the hub, which may take long, and turn what goes wrong with that into one line.

    Raises:
        UserError: it cannot be had.
    """
    say(f"{name}: taking {what} from the hub, or from the copy of it that is here")
    with in_one_line(" ".join(filter(None, (f"{name}: {what}", found, "is not available from the hub"))), remedy):
        yield


def model_type(folder: Path, *, name: str, owner: str) -> str | None:
    """What config.json says a folder holds, as "clip"; None where it does not say.

    Args:
        folder: as transformers saves a model.
        name: the scorer or judge, for messages.
        owner: of what the folder ought to be, as "CLIP" or "model's".

    Raises:
        UserError: no config.json, or one that cannot be read.
    """
    with in_one_line(f"{name}: {folder} holds no readable config.json, so it is no {owner} folder", f"give {name}=FOLDER"):
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


def load_whole(cls: Any, folder: Path, dtype: str, *, name: str, remedy: str = "copy it again") -> Any:
    """A model on the CPU with every weight from the folder's .safetensors files; weights that it has no place for are counted aloud.

    Args:
        cls: a class of transformers with `from_pretrained`; code that lies in the folder is not run.
        folder: as transformers saves a model.
        dtype: precision of the weights, one of DTYPES.
        name: the scorer or judge, for messages.
        remedy: where it cannot be loaded.

    Raises:
        UserError: the folder cannot be loaded, or the model needs a weight that it lacks.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading the weights: a second of noise
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    with in_one_line(f"{name}: {folder} cannot be loaded", remedy):
        model, info = cls.from_pretrained(folder, **options)
    if info["missing_keys"]:  # these would be left random
        raise UserError(f"{name}: {folder}: the weights lack {sorted(info['missing_keys'])[0]}; copy the folder again")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        say(f"{name}: {len(unused)} weights in {folder} have no use here (first: {unused[0]})")
    return model


def folder_digest(folder: Path, *, name: str) -> str:
    """The digest of the weights that transformers saved in a folder, for scorer or judge `name`.

    Raises:
        UserError: there are none.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise UserError(f"{name}: {folder} holds no weights (model.safetensors; other formats are not read); copy the folder again")
    return weights_digest(paths)


def weights_digest(paths: Sequence[Path]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a weight file (of the digests, where there are several)."""
    digests = [file_digest(path) for path in paths]
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:12]


@contextmanager
def in_one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever another library trips over into one line, "WHAT (reason); REMEDY".

    Raises:
        UserError: with that line.
    """
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        reason = "it is no checkpoint, or holds more than tensors, and nothing is unpickled here; save the tensors as .safetensors"
        raise UserError(f"{what} ({reason}); {remedy}") from error
    except Exception as error:  # of a library that reads a foreign file, or the network: there is no list of what it may be
        reason = "the hub cannot be reached" if unreachable(error) else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} ({reason if len(reason) <= 300 else reason[:300] + ' ...'}); {remedy}") from error
