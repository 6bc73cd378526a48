"""Let people say in a web page which image of a pair is better: of a pair dataset, or of two models, blind.

    dedpo vote pairs
    dedpo vote pairs --order disagreement --share true --host 0.0.0.0
    dedpo vote samples/base samples/tuned

Each answer is kept in `PAIRS/votes/NAME.sqlite` before the page shows the next pair. When the server stops, and whenever
the page asks for it, `PAIRS/votes/NAME.parquet` (single answers) and `PAIRS/labels/NAME.parquet` are written. Votes on two
sample folders lie in the second, `ARM/votes`, and make no labels; `dedpo compare` reads them.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.settings import VoteSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.voting.server import Desk, Hosts
    from dedpo_diffusion.voting.service import Booth

LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Voting:
    """An open voting, and what is its own: on a pair dataset, or on two sample folders.

    Attributes:
        booth: votes and images.
        desk: what the page is told, and writes.
        greeting: what is asked, and what becomes of it.
        finish: writes the votes and says what they are; returns the path, or None where nobody has voted.
    """

    booth: Booth
    desk: Desk
    greeting: Sequence[str]
    finish: Callable[[], Path | None]


def voting_name(settings: VoteSettings) -> str:
    """The voting's name: the one given, or human, or vs-BASE for two sample folders."""
    if settings.name is not None:
        return settings.name
    return "human" if len(settings.folders) == 1 else f"vs-{settings.folders[0].resolve().name}"


def check_settings(settings: VoteSettings) -> None:
    """Settings that cannot be meant; UserError names the option."""
    if len(settings.folders) not in (1, 2):
        raise UserError(f"{len(settings.folders)} folders are given; voting takes a pair dataset, or two sample folders, the base's first")
    if len(settings.folders) == 2 and settings.order != "random":
        raise UserError(f"--order {settings.order} is for a pair dataset; leave it out to vote on two sample folders")
    for name, low in (("repeats", 0), ("overlap", 0), ("floor", 0.001)):
        if not low <= getattr(settings, name) <= 1:
            raise UserError(f"--{name} is {getattr(settings, name)}; it must be from {low} to 1")
    if not 0 <= settings.port <= 65535:
        raise UserError(f"--port is {settings.port}; it must be from 0 to 65535")
    if settings.judges and settings.order != "disagreement":
        raise UserError("--judges is for --order disagreement; leave one out, or give the other")
    if voting_name(settings) in settings.judges:
        raise UserError(f"--judges names {voting_name(settings)!r}, which the votes become; give another --name")
    if settings.token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", settings.token):
        raise UserError("--token must be at least 16 letters, digits, - or _; leave it out to have one made")
    if not is_loopback(settings.host) and not settings.share:
        raise UserError(
            f"--host {settings.host} can be reached by others; add --share true if that is meant (the page then asks for a token)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether this stands for every address of the machine."""
    return host in ("0.0.0.0", "::")


def allowed_hosts(settings: VoteSettings) -> Hosts:
    """What browsers may call this server."""
    from dedpo_diffusion.voting.server import Hosts

    names = {*LOCAL, in_address(settings.host), *settings.allow, *([socket.gethostname()] if settings.share else [])}
    return Hosts(frozenset(name.lower() for name in names), any_address=settings.share and is_wildcard(settings.host))


def in_address(host: str) -> str:
    """A host as web addresses spell it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


# ---- what is asked


def judge_labels(settings: VoteSettings, ids: list[str]) -> tuple[np.ndarray, dict[str, str]]:
    """The judges' labels (J, N) that the order looks at, and the digests of their files.

    Raises:
        UserError: no judge, or one that leaves pairs out.
    """
    import numpy as np

    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.labels.files import CALIBRATED, align, label_names, label_origin, read_labels

    pairs = settings.folders[0]
    calibrated = {name for name in label_names(pairs) if label_origin(pairs, name) == CALIBRATED}
    names = sorted(set(settings.judges) or set(label_names(pairs)) - {voting_name(settings)} - calibrated)
    if not names:
        raise UserError(f"{pairs / 'labels'} holds no judge, which --order disagreement needs; run `dedpo label`, or use random")
    try:
        found = [align(read_labels(pairs, name), ids, folder=pairs, name=name, complete=True) for name in names]
    except UserError as error:
        raise UserError(f"{error}; or name the label files of judges with --judges") from error
    return np.stack(found), {name: file_digest(pairs / "labels" / f"{name}.parquet") for name in names}


@contextmanager
def open_booth(settings: VoteSettings) -> Iterator[Booth]:
    """The voting on a pair dataset as it stands; a new one where there is none."""
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.voting.export import check_name
    from dedpo_diffusion.voting.plan import Plan, disagreement, pull
    from dedpo_diffusion.voting.service import Booth
    from dedpo_diffusion.voting.store import Store

    folder, name = settings.folders[0], voting_name(settings)
    reader = PairReader(folder)
    ids, weights, judges = reader.ids(), None, {}
    if is_new(settings):
        check_name(folder, name)
    if settings.order == "disagreement":
        labels, judges = judge_labels(settings, ids)
        weights = pull(disagreement(labels), settings.floor)
    kept = {key: getattr(settings, key) for key in ("seed", "order", "floor", "repeats", "overlap")}
    design: dict[str, Any] = {"dataset": reader.fingerprint(), **kept, "judges": judges}
    with closing(Store(folder, name, design)) as store:
        check_name(folder, name, store.session)
        plan = Plan(ids, seed=settings.seed, weights=weights, repeats=settings.repeats, overlap=settings.overlap)
        yield Booth(reader, plan, store)


def is_new(settings: VoteSettings) -> bool:
    """Whether this voting is still to begin; UserError where that cannot be, since its votes are to be exported."""
    from dedpo_diffusion.voting.store import store_path

    path = store_path(settings.folders[-1], voting_name(settings))
    if settings.export_only and not path.is_file():
        raise UserError(f"there is no {path}, so nobody has voted yet; run `dedpo vote` without --export_only first")
    return not path.is_file()


@contextmanager
def open_pairs(settings: VoteSettings) -> Iterator[Voting]:
    """The voting on a pair dataset, ready to be served."""
    from dedpo_diffusion.voting import export as tally
    from dedpo_diffusion.voting.server import Desk

    folder, name = settings.folders[0], voting_name(settings)
    if (folder / "index.parquet").is_file() and not (folder / "pairs").is_dir():
        raise UserError(f"{folder} is a sample folder, and voting compares two: name the base's first, as in dedpo vote BASE {folder}")
    with open_booth(settings) as booth:
        desk = Desk(
            {"dataset": folder.resolve().name, "name": name, "order": settings.order},
            lambda: tally.summary(booth, name), lambda: tally.export(booth, name),
        )  # fmt: skip
        now = booth.session()
        greeting = (
            f"{now['pairs']} pairs in {settings.order} order; {now['votes']} votes by {len(now['raters'])} people so far, kept in "
            f"{booth.store.path}", f"Ctrl-C stops and writes {folder / 'labels' / name}.parquet; each answer is saved at once",
        )  # fmt: skip
        yield Voting(booth, desk, greeting, lambda: write_labels(settings, booth))


def write_labels(settings: VoteSettings, booth: Booth) -> Path | None:
    """Write vote and label file; None where nobody has voted."""
    from dedpo_diffusion.voting.export import export

    folder, name = settings.folders[0], voting_name(settings)
    if not booth.session()["votes"] and not settings.export_only:
        older = folder / "labels" / f"{name}.parquet"
        say("there are no votes, so no labels were written" + (f"; {older} is of votes undone since" if older.is_file() else ""))
        return None
    done = export(booth, name)
    say(f"wrote {done.path}: {done.labels} labels, and {folder / 'votes' / done.path.name}")
    for sentence in done.sentences:
        say(sentence)
    return done.path


# ---- the server


def listen(settings: VoteSettings) -> socket.socket:
    """A socket that accepts connections; UserError where the port is taken or the address is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, proto=socket.IPPROTO_TCP)[0]
        listener = socket.socket(family, kind, protocol)  # with its protocol named, asyncio sends small answers at once
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {settings.host} port {settings.port} ({error}); give another --port, or --port 0") from error


def introduce(settings: VoteSettings, voting: Voting, port: int, token: str | None) -> None:
    """Say where the page is, what it asks, and how to stop."""
    host = socket.gethostname() if is_wildcard(settings.host) else in_address(settings.host)
    say(f"open http://{host}:{port}/" + ("" if token is None else f"?token={token}"))
    if is_loopback(settings.host):
        say(f"from another machine: run ssh -L {port}:{host}:{port} {socket.gethostname()} there, then open the same address there")
    for line in voting.greeting:
        say(line)


def serve(settings: VoteSettings, voting: Voting) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    import uvicorn

    from dedpo_diffusion.voting.server import create_app

    token = settings.token or (secrets.token_urlsafe(16) if settings.share else None)
    log = voting.booth.store.path.with_suffix(".log")
    app = create_app(voting.booth, voting.desk, hosts=allowed_hosts(settings), token=token, log=log)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, http="h11", ws="none", loop="asyncio", lifespan="off", proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with listen(settings) as listener, _stopping(server):
        introduce(settings, voting, listener.getsockname()[1], token)
        server.run(sockets=[listener])


@contextmanager
def _stopping(server: Any) -> Iterator[None]:
    """Let signals end the server, not the program; uvicorn raises them once more when it has ended."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(settings: VoteSettings) -> Path | None:
    """Let people say which image of a pair is better: of a pair dataset, or of two models, blind."""
    from dedpo_diffusion.evaluation.comparison.model_votes import open_samples

    check_settings(settings)
    with (open_pairs if len(settings.folders) == 1 else open_samples)(settings) as voting:
        if not settings.export_only:
            serve(settings, voting)
        return voting.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(VoteSettings, run, argv, prog="dedpo vote", positional=("folders",))


if __name__ == "__main__":
    raise SystemExit(main())
