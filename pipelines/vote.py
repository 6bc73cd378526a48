"""Let people say in a web page which image of a pair is better: of a pair dataset, or of two models, blind.

    dedpo vote pairs
    dedpo vote pairs --order disagreement --share true --host 0.0.0.0
    dedpo vote pairs --rank true
    dedpo vote samples/base samples/mine

Each answer is kept in `PAIRS/votes/NAME.sqlite` before the page shows the next pair. When the server stops, and whenever
the page asks for it, `PAIRS/votes/NAME.parquet` (single answers) and `PAIRS/labels/NAME.parquet` are written. Votes on two
sample folders lie in the second, `ARM/votes`, and make no labels; `dedpo compare` reads them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say, say_next, stage
from dedpo_diffusion.settings import VoteSettings
from dedpo_diffusion.voting.opening import Voting, open_pairs, voting_name

if TYPE_CHECKING:
    from dedpo_diffusion.voting.server import Hosts

LOOK_EVERY, LINGER = 0.3, 1.5  # seconds: between two counts of the answers, and from the last one to the end
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def check_settings(settings: VoteSettings) -> None:
    """Settings that cannot be meant; UserError names the option."""
    if len(settings.folders) not in (1, 2):
        raise UserError(f"{len(settings.folders)} folders are given; voting takes a pair dataset, or two sample folders, the base's first")
    if len(settings.folders) == 2 and settings.order != "random":
        raise UserError(f"--order {settings.order} is for a pair dataset; leave it out to vote on two sample folders")
    if len(settings.folders) == 2 and settings.rank:
        raise UserError("--rank is for a pair dataset; leave it out to vote on two sample folders")
    for name, low in (("repeats", 0), ("overlap", 0), ("floor", 0.001)):
        if not low <= getattr(settings, name) <= 1:
            raise UserError(f"--{name} is {getattr(settings, name)}; it must be from {low} to 1")
    if not 0 <= settings.port <= 65535:
        raise UserError(f"--port is {settings.port}; it must be from 0 to 65535")
    if settings.until is not None and settings.until < 1:
        raise UserError(f"--until is {settings.until}; give the number of answers to stop at, 1 or more")
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
    """Serve the page until Ctrl-C or SIGTERM, or until there are as many answers as are wanted."""
    import uvicorn

    from dedpo_diffusion.voting.server import create_app

    token = settings.token or (secrets.token_urlsafe(16) if settings.share else None)
    log = voting.service.store.path.with_suffix(".log")
    app = create_app(voting.service, voting.hooks, hosts=allowed_hosts(settings), token=token, log=log)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, http="h11", ws="none", loop="asyncio", lifespan="off", proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    if settings.until is not None and voting.service.session()["votes"] >= settings.until:
        say(f"{settings.until} answers are there already")
        return
    with listen(settings) as listener, _stopping(server), _until(settings, voting, server):
        introduce(settings, voting, listener.getsockname()[1], token)
        if settings.open:
            show(f"http://{in_address(settings.host)}:{listener.getsockname()[1]}/" + ("" if token is None else f"?token={token}"))
        server.run(sockets=[listener])


@contextmanager
def _until(settings: VoteSettings, voting: Voting, server: Any) -> Iterator[None]:
    """End the server a moment after the last answer that was asked for, so that its page still hears of it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY):
            if voting.service.session()["votes"] >= (settings.until or 0):
                say(f"{settings.until} answers are there")
                done.wait(LINGER)
                server.should_exit = True
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if settings.until is not None:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if settings.until is not None:
            watcher.join()


def show(url: str) -> None:
    """Open an address in a browser with windows; a text browser would take this terminal."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        import webbrowser

        webbrowser.open(url)


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
    from dedpo_diffusion.labels.next_stage import next_stage

    check_settings(settings)
    with (open_pairs if len(settings.folders) == 1 else open_samples)(settings) as voting:
        if not settings.export_only:
            serve(settings, voting)
        path = voting.finish()
    if len(settings.folders) > 1:
        say_next("compare", *settings.folders)
    else:
        say_next(*next_stage(settings.folders[0], human=settings.name or "human"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage."""
    return stage(VoteSettings, run, argv, prog="dedpo vote", positional=("folders",))


if __name__ == "__main__":
    raise SystemExit(main())
