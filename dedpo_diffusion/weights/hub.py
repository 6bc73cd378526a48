"""Sends an exported model, its card and its results, or a data set, to a hub: says what would go, sends just that, and says what arrived.

Settings and results are sent with absolute paths cut to their last name; where a path or this machine's name remains, nothing is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.core.privacy import check_private, cut, without_paths
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.models.single_file import PICKLED
from dedpo_diffusion.weights.header import read_header

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, RESULTS = "README.md", "results.json"
Kind = Literal["model", "dataset"]
AGAIN = "the same command sends it again, and leaves out what the hub has stored already"
TOKENIZERS = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")  # words of a language alone
IMAGES = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Parcel:
    """One file to be sent: its name on the hub, and either a file or what to send in its place."""

    name: str
    file: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.file.stat().st_size if self.content is None else len(self.content)

    def is_held(self, held: Any) -> bool:
        """Whether the hub's entry of this name is this very content."""
        if held.size != self.size:
            return False
        data = self.content
        if held.lfs is not None:
            return held.lfs.sha256 == (file_digest(self.file) if data is None else hashlib.sha256(data).hexdigest())
        data = self.file.read_bytes() if data is None else data
        return held.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as git names it


# ---- what is sent


def collect(out: Path, card: Path | None, results: Path | None) -> list[Parcel]:
    """The files of a model, its card with the pictures that it shows, and its results.

    Args:
        out: what `dedpo export` wrote, a file or a folder.
        card: its card, which is README.md on the hub; None where there is none.
        results: of `dedpo compare`; None where there are none.

    Raises:
        UserError: a path or this machine's name is in one of them, or two would have one name.
    """
    files = sorted(file for file in out.rglob("*") if file.is_file()) if out.is_dir() else [out]
    found = [_parcel(file.relative_to(out if out.is_dir() else out.parent).as_posix(), file) for file in files if file != card]
    if card is not None:
        found = [parcel for parcel in found if parcel.name != CARD] + [_parcel(CARD, card)]
        for name in dict.fromkeys(map(unquote, IMAGES.findall(card.read_text(encoding="utf-8")))):
            picture = card.parent / name
            if "/" not in name and picture.is_file() and picture not in files:
                found.append(_parcel(name, picture))
    if results is not None:
        found.append(_parcel(RESULTS, results))
    names = [parcel.name for parcel in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{out}: two files would be {twice} on the hub; rename one of them")
    for parcel in found:
        for where, text in _texts(parcel):
            check_private(where, text)
    return found


def _parcel(name: str, file: Path) -> Parcel:
    """A file as it is sent: cards and JSON but vocabularies without absolute paths, and results without the names of the people asked."""
    if name == CARD:
        text = file.read_text(encoding="utf-8")
        return Parcel(name, file) if cut(text) == text else Parcel(name, file, cut(text).encode())
    if file.suffix != ".json" or file.name in TOKENIZERS or file.name.endswith(".index.json"):
        return Parcel(name, file)
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({error}); write it again, or move it away") from error
    plain = without_paths(_unnamed(held) if name == RESULTS else held)
    return Parcel(name, file) if plain == held else Parcel(name, file, (json.dumps(plain, indent=2) + "\n").encode())


def _unnamed(value: Any) -> Any:
    """Results in which the people who were asked are a number."""
    if isinstance(value, Mapping):
        return {key: len(item) if key == "raters" and isinstance(item, list) else _unnamed(item) for key, item in value.items()}
    return [_unnamed(item) for item in value] if isinstance(value, list) else value


def _texts(parcel: Parcel) -> Iterator[tuple[str, str]]:
    """What there is to read in a file, and where; nothing in weights but their metadata."""
    file = parcel.file
    if parcel.content is not None:
        yield str(file), parcel.content.decode()
    elif file.suffix == ".safetensors":
        yield from ((f"{file}: its {key}", value) for key, value in read_header(file).metadata.items())
    elif file.suffix.lower() in PICKLED:
        raise UserError(f"{file}: a pickled file, which can run code where it is loaded and is not sent; export safetensors")
    elif file.suffix == ".png":
        from PIL import Image

        with Image.open(file) as image:
            yield from ((f"{file}: its {key}", value) for key, value in image.info.items() if isinstance(value, str))
    elif file.name not in TOKENIZERS and file.suffix in (".json", ".md", ".txt", ".yaml"):
        yield str(file), file.read_text(encoding="utf-8")


# ---- sending


def check_target(repository: str, asked: str = "--push") -> None:
    """See to it that something can be sent there, before anything is made; nobody is asked.

    Args:
        repository: OWNER/NAME.
        asked: what the person gave who wants that, for messages.

    Raises:
        UserError: no such name, no login, or a machine that is told to stay offline.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{asked} {repository}: {_line(error)}; give OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UserError(f"{asked} {repository}: give OWNER/NAME, where OWNER is you or an organisation")
    if constants.is_offline_mode():
        raise UserError(f"{asked} sends files, and HF_HUB_OFFLINE says that nothing may be sent; unset it, or leave {asked} out")
    if get_token() is None:
        raise UserError(f"{asked} {repository}: nobody is logged in here; `hf auth login`, or set HF_TOKEN to a token that may write")


@dataclass(frozen=True)
class Repository:
    """Where something is sent: OWNER/NAME, and of which kind it is."""

    name: str
    kind: Kind = "model"

    @property
    def address(self) -> str:
        """Where people see it."""
        return f"{_api().endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def announce(to: Repository, parcels: Sequence[Parcel], how: str, gone: Sequence[str] = ()) -> None:
    """Say what is sent where, and what of an earlier upload goes; `how` says what is there so far."""
    say(f"{len(parcels)} files, {size_words(sum(parcel.size for parcel in parcels))}, go to {to.address} ({how}):")
    for parcel in parcels:
        say(f"  {parcel.name}  {size_words(parcel.size)}" + (", absolute paths cut" if parcel.content is not None else ""))
    for name in gone:
        say(f"  {name}  of an earlier upload, is removed there")


def push(to: Repository, parcels: Sequence[Parcel], *, private: bool, title: str, replaces: str | None = None) -> str:
    """Say what is sent, and send it as one commit: all of it is there afterwards, or nothing.

    Args:
        to: where to.
        parcels: the files.
        private: whether a new repository is private.
        title: of the commit, behind "Add".
        replaces: a pattern of names; what the hub holds by such a name and is not sent is removed there.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses, or the upload breaks off; what arrived is said.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, address = _api(), to.address
    is_private = visibility(api, to, private=private)
    how = {None: "a new repository", True: "it is there, and private", False: "it is there, and public"}[is_private]
    gone = [] if is_private is None or replaces is None else _others(api, to, parcels, replaces)
    announce(to, parcels, how + ("" if is_private is not None else ", private" if private else ", which everyone can see"), gone)
    files = [CommitOperationAdd(parcel.name, parcel.content if parcel.content is not None else parcel.file) for parcel in parcels]
    try:
        api.create_repo(to.name, repo_type=to.kind, private=private if is_private is None else None, exist_ok=True)
        api.create_commit(
            to.name,
            [*files, *(CommitOperationDelete(name) for name in gone)],
            commit_message=f"Add {title}",
            repo_type=to.kind,
        )
        there = arrived(api, to, parcels)
    except Exception as error:  # of the network, the hub's client, or the hub; its answer may be all that was lost
        there = _arrived_in_spite(api, to, parcels, error)
    if len(there) < len(parcels):
        raise UserError(f"{address}: {_arrived_words(parcels, there)}; give the same command again")
    say(f"sent: all {len(parcels)} files are at {address}")
    return address


def visibility(api: HfApi, to: Repository, *, private: bool) -> bool | None:
    """Whether the repository is private; None where there is none yet.

    Raises:
        UserError: it is public and was to be private, or the hub cannot be asked.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = bool(api.repo_info(to.name, repo_type=to.kind).private)
    except RepositoryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"{to.address}: the hub cannot be asked ({_line(error)}); nothing was sent") from error
    if private and not found:
        raise UserError(f"{to.address} is public; make it private there first, choose another name, or leave --private out")
    return found


def _others(api: HfApi, to: Repository, parcels: Sequence[Parcel], pattern: str) -> list[str]:
    """What the hub holds by names of this pattern beside what is sent."""
    try:
        held = api.list_repo_files(to.name, repo_type=to.kind)
    except Exception as error:
        raise UserError(f"{to.address}: the hub cannot be asked ({_line(error)}); nothing was sent") from error
    return sorted(name for name in held if fnmatch(name, pattern) and name not in {parcel.name for parcel in parcels})


def arrived(api: HfApi, to: Repository, parcels: Sequence[Parcel]) -> list[str]:
    """The names of those files that the hub holds with just this content."""
    held = {entry.path: entry for entry in api.get_paths_info(to.name, [parcel.name for parcel in parcels], repo_type=to.kind)}
    return [parcel.name for parcel in parcels if parcel.name in held and parcel.is_held(held[parcel.name])]


def _arrived_in_spite(api: HfApi, to: Repository, parcels: Sequence[Parcel], error: Exception) -> list[str]:
    """The files of an upload that broke off, where all of them arrived. Raises UserError where they did not, or nobody knows."""
    try:
        there = arrived(api, to, parcels)
        said = _arrived_words(parcels, there)
    except Exception:  # the hub is out of reach, or there is no repository yet
        there, said = [], "the hub could not be asked what arrived, which is all of it or nothing"
    if len(there) == len(parcels):
        return there
    again = f"The model is written here; {AGAIN}" if to.kind == "model" else f"{AGAIN[0].upper()}{AGAIN[1:]}"
    raise UserError(f"{to.address}: the upload broke off ({_line(error)}); {said}. {again}") from error


def _arrived_words(parcels: Sequence[Parcel], there: Sequence[str]) -> str:
    missing = [parcel.name for parcel in parcels if parcel.name not in there]
    if not there:
        return f"none of the {len(parcels)} files arrived"
    return f"{len(there)} of {len(parcels)} files arrived ({', '.join(there)})" + (f", {', '.join(missing)} did not" if missing else "")


def _line(error: BaseException) -> str:
    """What an error says, in one line and without the token."""
    from huggingface_hub import get_token

    text = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    return (text.replace(token, "***") if token else text).rstrip(".")
