"""HTTP around the service: what is answered, and what is refused.

No path of the file system is ever formed from a request: the page's files are three fixed names, images are found by
tickets in memory. What a web page elsewhere could make a browser do is refused: a foreign Host (DNS rebinding), a foreign
or missing Origin (cross-site requests), anything but JSON in a POST.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.voting.export import Export
from dedpo_diffusion.voting.service import Refusal, VoteService

T = TypeVar("T")
MAX_BODY = 16 << 10
COOKIE = "dedpo_token"
PAGE = Path(__file__).parent / "page"
STATIC = {
    "vote.js": "text/javascript",
    "vote.css": "text/css",
    "link.js": "text/javascript",
    "figures.js": "text/javascript",
    "screens.js": "text/javascript",
    "rank.js": "text/javascript",
    "rank.css": "text/css",
}
PAGES = ("index.html", "rank.html")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = [  # of every answer that does not say otherwise
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>dedpo vote</title><link rel="icon" href="data:,">'
ASK_TOKEN = f"""{HEAD}
<form action="/"><label>Token, as printed where the server runs: <input name="token" autofocus></label> <button>Enter</button></form>
"""
ENTER = HEAD + '<meta http-equiv="refresh" content="0; url={}">'

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosts:
    """Names that browsers may call this server by, whatever the port: SSH tunnels change it."""

    names: frozenset[str]
    any_address: bool = False  # IP literals too: the server listens on all of them, and only names can be rebound

    def allow(self, header: str) -> bool:
        """Whether a Host header is one of these."""
        front, _, port = header.rpartition(":")
        name = front if port.isdecimal() else header
        if name.lower() in self.names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return self.any_address


class Refusals:
    """Answers requests that are refused, and writes each to the log file: time, client, method, path, status, reason."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, request: Request, status: int, text: str, response: Response | None = None) -> Response:
        path = repr(request.scope["path"])[:200]  # without the query, which may hold a token
        client = request.client.host if request.client else "?"
        line = f"{client} {request.method} {path}: {status}, {text}"
        logger.warning("refused %s", line)
        with suppress(OSError), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:  # the disk may be full
            file.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}\n")
        return response or JSONResponse({"error": text}, status)


class Guard:
    """The door: host, origin and token of every request, and the headers of every answer."""

    def __init__(self, app: ASGIApp, hosts: Hosts, token: str | None, refuse: Refusals) -> None:
        self.app, self.hosts, self.token, self.refuse = app, hosts, token, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name.lower() for name, _ in message["headers"]}
                message = {**message, "headers": [*message["headers"], *(header for header in HEADERS if header[0] not in own)]}
            await send(message)

        answer = self._check(Request(scope)) or self.app
        try:
            await answer(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server stops and has waited long enough for this one
            if not begun:
                await self.refuse(Request(scope), 503, "the server is stopping")(scope, receive, send_with_headers)

    def _check(self, request: Request) -> Response | None:
        """A refusal, or None."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self.hosts.allow(host):
            return self.refuse(request, 421, f"this server is not called {host[:100]!r}; start it with --allow to call it so")
        if origin is None and request.method not in ("GET", "HEAD"):
            return self.refuse(request, 403, "the request has no Origin header")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return self.refuse(request, 403, f"the request comes from another site, {origin[:100]!r}")
        if request.headers.get("sec-fetch-site") == "cross-site" and request.scope["path"] != "/":  # a link to the page is welcome
            return self.refuse(request, 403, "the request comes from another site")
        return None if self.token is None else self._check_token(request, self.token)

    def _check_token(self, request: Request, token: str) -> Response | None:
        def fits(given: str | None) -> bool:
            return given is not None and hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())

        if request.scope["path"] == "/" and fits(request.query_params.get("token")):
            # after a link on another site a browser keeps strict cookies back, even over a redirect, but not over a refresh
            elsewhere = request.headers.get("sec-fetch-site") == "cross-site"
            rater = request.query_params.get("rater")
            place = f"/?{urlencode({'rater': rater})}" if rater else "/"
            response = HTMLResponse(ENTER.format(place)) if elsewhere else RedirectResponse(place, 303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict", path="/")
            return response
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if fits(request.cookies.get(COOKIE)) or (scheme.lower() == "bearer" and fits(bearer.strip())):
            return None
        form = HTMLResponse(ASK_TOKEN, 401) if request.scope["path"] == "/" else None
        return self.refuse(request, 401, "the token is missing or wrong; open the address that `dedpo vote` printed", form)


# ---- what requests hold


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        Refusal: another content type, more than MAX_BODY bytes (nothing beyond them is kept), or no JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be application/json")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise Refusal(413, f"the body is longer than {MAX_BODY} bytes")
        found = json.loads(body)
    except ClientDisconnect as error:
        raise Refusal(400, "the connection broke off within the body") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error
    if not isinstance(found, dict):
        raise Refusal(400, "the body is not a JSON object")
    return found


def check_rater(name: Any) -> str:
    """A rater's name without the blanks around it; Refusal unless it has 1 to 40 characters and none that controls."""
    name = name.strip() if isinstance(name, str) else ""
    if not 1 <= len(name) <= 40 or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise Refusal(400, "rater must be a name of 1 to 40 characters without control characters")
    return name


def check_vote(body: dict[str, Any]) -> tuple[str, str, Any, float]:
    """Rater, ticket, answer and seconds of a vote; Refusal where one is not what it must be. The service knows what an answer is."""
    ticket, answer, seconds = body.get("ticket"), body.get("answer"), body.get("seconds")
    if not isinstance(ticket, str):
        raise Refusal(400, "ticket must be text")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 1e9:
        raise Refusal(400, "seconds must be a number, and at least 0")
    return check_rater(body.get("rater")), ticket, answer, float(seconds)


# ---- what is answered


@dataclass(frozen=True)
class PageHooks:
    """What is the voting's own, a pair dataset's or two models'.

    Attributes:
        about: what the page is told at the start: `dataset`, its heading; `blind`, if nobody may learn which model is which.
        summary: what the votes so far are worth, see export.summary.
        export: writes the votes so far.
        page: its HTML file.
    """

    about: dict[str, Any]
    summary: Callable[[], dict[str, Any]]
    export: Callable[[], Export]
    page: str = "index.html"


class Api:
    """The endpoints. Work that waits for a disk runs in threads: votes, images and statistics each have their own."""

    def __init__(self, service: VoteService, hooks: PageHooks) -> None:
        self.service, self.hooks = service, hooks
        self.votes, self.images, self.statistics = CapacityLimiter(16), CapacityLimiter(4), CapacityLimiter(1)
        self.page = {name: (PAGE / name).read_bytes() for name in (*PAGES, *STATIC) if (PAGE / name).is_file()}

    async def index(self, request: Request) -> Response:
        return self._file(self.hooks.page, "text/html")

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        return self._file(name, STATIC.get(name, ""))

    def _file(self, name: str, kind: str) -> Response:
        if not kind or name not in self.page:
            raise Refusal(404, "there is no such file")
        return Response(self.page[name], media_type=kind)

    async def session(self, request: Request) -> Response:
        return JSONResponse({**self.hooks.about, **await self._run(self.votes, self.service.session)})

    async def next(self, request: Request) -> Response:
        rater = check_rater(request.query_params.get("rater"))
        return JSONResponse(await self._run(self.votes, self.service.state, rater))

    async def vote(self, request: Request) -> Response:
        return JSONResponse(await self._run(self.votes, self.service.vote, *check_vote(await read_json(request))))

    async def undo(self, request: Request) -> Response:
        rater = check_rater((await read_json(request)).get("rater"))
        return JSONResponse(await self._run(self.votes, self.service.undo, rater))

    async def image(self, request: Request) -> Response:
        ticket, side = request.path_params["ticket"], request.path_params["side"]
        if not self.service.has_place(side):
            raise Refusal(404, "there is no such image")
        data, kind = await self._run(self.images, self.service.image, ticket, side)
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def summary(self, request: Request) -> Response:
        return JSONResponse(await self._run(self.statistics, self.hooks.summary))

    async def export(self, request: Request) -> Response:
        await read_json(request)
        done = await self._run(self.statistics, self.hooks.export)
        where = {} if self.hooks.about.get("blind") else {"path": f"{done.path.parent.name}/{done.path.name}"}
        return JSONResponse({**where, "labels": done.labels, "sentences": done.sentences})

    async def _run(self, limiter: CapacityLimiter, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await to_thread.run_sync(work, *arguments, limiter=limiter)
        except UserError as error:
            raise Refusal(409, str(error)) from error


def create_app(service: VoteService, hooks: PageHooks, *, hosts: Hosts, token: str | None, log: Path) -> ASGIApp:
    """The web application.

    Args:
        service: votes and images.
        hooks: what is said and written of them.
        hosts: names that browsers may call this server by.
        token: what browsers must show; None asks for nothing.
        log: file that refused requests are appended to.
    """
    refuse = Refusals(log)
    api = Api(service, hooks)
    gets = {
        "/": api.index, "/static/{name}": api.static, "/image/{ticket}/{side}": api.image, "/api/session": api.session,
        "/api/next": api.next, "/api/summary": api.summary,
    }  # fmt: skip
    posts = {"/api/vote": api.vote, "/api/undo": api.undo, "/api/export": api.export}

    async def on_refusal(request: Request, error: Any) -> Response:
        return refuse(request, error.status, error.text)

    async def on_http_error(request: Request, error: Any) -> Response:
        words = {404: "there is no such page", 405: f"this page does not answer {request.method}"}
        response = refuse(request, error.status_code, words.get(error.status_code, error.detail))
        response.headers.update(error.headers or {})
        return response

    async def on_failure(request: Request, error: Exception) -> Response:
        return refuse(request, 500, f"the server failed ({type(error).__name__}); its terminal shows more")

    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ],
        exception_handlers={Refusal: on_refusal, HTTPException: on_http_error, Exception: on_failure},
    )
    app.router.redirect_slashes = False
    return Guard(app, hosts, token, refuse)
