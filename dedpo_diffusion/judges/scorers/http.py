"""A scorer behind HTTP: ImageReward, HPSv3 or any other, in an environment of its own.

The server answers two requests at one address, in JSON (server/reference_server.py is such a server):

    GET URL   ->  {"name": "imagereward", "version": "ImageReward-v1.0", "temperature": 1.0}
    POST URL  {"prompts": ["a cat", ...], "images": [base64 of a PNG file, ...]}
              ->  {"version": "ImageReward-v1.0", "scores": [0.31, ...]}

name: letters, digits, ".", "-" and "_"; names the label file, so it stays the same as long as scores compare.
version: changes whenever the same image could get another score. Every answer repeats it.
temperature: the difference of two scores that makes the scorer sure to 73 %; 1.0 where the server does not say.
prompts, images: equally many, at least one; images are RGB, 8 bits, without loss.
scores: finite numbers, one for each image in the order of the request, higher is better.

A busy server answers 429 or 5xx, with Retry-After where it likes, and is asked again; any other error stops the run.
`Connection`, the part that asks again, serves the judge behind OpenAI's protocol too.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

from dedpo_diffusion.core.console import UserError

if TYPE_CHECKING:
    import httpx
    from PIL.Image import Image

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts; doubled every time
LONGEST_WAIT = 300.0  # a server that asks for more patience than this many seconds counts as failed
BUSY = (408, 409, 425, 429)  # and 5xx: worth another attempt
NEVER = re.compile(r"not support|unsupported|content.?(policy|filter)", re.I)  # in a failing server's words: it would fail again
MOST_CHARACTERS = 1 << 25  # of images in one request, so that large images do not fill the memory

MEND = "mend the server (its contract: dedpo_diffusion/judges/scorers/http.py)"
Kind = Literal["absent", "busy", "refused", "nonsense"]


class ServerFailure(Exception):
    """A server gave no usable answer; the text says what happened, in one line.

    Attributes:
        kind: "absent" (nothing listens there), "busy" (too slow, overloaded, failing: as with absent, another attempt may
            do), "refused" (it will not answer this request), "nonsense" (it answered, but not what was agreed).
        status: the HTTP status; None where no answer came.
        wait: seconds that the server asked to be left alone.
        said: the body of its answer, to look words up in; it may hold the key, so it is never shown.
    """

    def __init__(self, text: str, kind: Kind, *, status: int | None = None, wait: float = 0.0, said: str = "") -> None:
        super().__init__(text)
        self.kind, self.status, self.wait, self.said = kind, status, wait, said


class Connection:
    """A server that is asked for JSON, and asked again while it is busy. Threads may share it.

    Args:
        url: http:// or https://, without user name and password, which would end up in messages.
        timeout: seconds until an attempt counts as failed.
        retries: further attempts.
        at_once: connections kept open.
        key: sent as a bearer token; appears in no message.
        before: called before each attempt, to hold it back.
        sleep: waits that many seconds.

    Raises:
        UserError: no such address or proxy.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        at_once: int = 1,
        key: str = "",
        before: Callable[[], None] = lambda: None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        import httpx

        address = _parsed(url)
        self.url, self.timeout, self.retries, self.key, self.before, self.sleep = url, timeout, retries, key, before, sleep
        try:
            self.client = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once),
                verify=address.scheme == "https",  # without encryption there are no certificates to load
                trust_env=not _is_local(address.host),  # no proxy can reach a server on this machine's own loopback
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UserError(f"the proxy that the environment names cannot be used ({error}); mend HTTP_PROXY and the like") from error

    def ask(self, path: str = "", body: Any = None, *, first: bool = False) -> Any:
        """POST `body`, or GET without one, and return what the JSON says.

        Args:
            path: behind the address.
            body: anything that JSON can say.
            first: of all requests; nobody listening means then that no server runs, and is not waited out.

        Raises:
            ServerFailure: no usable answer; a busy server was asked `retries` times more.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(path, body)
            except ServerFailure as failure:
                if failure.kind not in ("absent", "busy") or (first and failure.kind == "absent") or failure.wait > LONGEST_WAIT:
                    raise
                if attempt == self.retries:
                    tried = f"{failure} (the last of {attempt + 1} attempts)" if attempt else str(failure)
                    raise ServerFailure(tried, failure.kind, status=failure.status, said=failure.said) from failure
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)  # so that clients do not return in step
                self.sleep(max(pause, failure.wait))
        raise AssertionError("unreachable")

    def _attempt(self, path: str, body: Any) -> Any:
        import httpx

        self.before()
        deadline = time.monotonic() + self.timeout
        parts: dict[str, Any] = {"method": "GET"}
        if body is not None:
            content = json.dumps(body, allow_nan=False).encode()
            parts = {"method": "POST", "content": content, "headers": {"Content-Type": "application/json"}}
        try:
            with self.client.stream(url=self.url + path, timeout=self.timeout, **parts) as response:
                answer = b"".join(_until(deadline, response.iter_bytes()))
        except (httpx.TimeoutException, TimeoutError) as error:
            raise ServerFailure(f"no answer within {self.timeout:g} seconds", "busy") from error
        except httpx.ConnectError as error:
            raise ServerFailure(f"no connection ({self.excerpt(str(error))})", "absent") from error
        except httpx.RequestError as error:
            raise ServerFailure(f"the connection broke ({self.excerpt(str(error)) or type(error).__name__})", "busy") from error
        if not response.is_success:
            raise self._failure(response, answer)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            found = self.excerpt(answer.decode(errors="replace"))[:80]
            raise ServerFailure(f"an answer that is no JSON ({found!r})", "nonsense", status=response.status_code) from error

    def _failure(self, response: httpx.Response, answer: bytes) -> ServerFailure:
        status = response.status_code
        said = self.excerpt(_message(answer) or response.headers.get("location", "") or response.reason_phrase)
        body = answer.decode(errors="replace")
        if status == 429 and "insufficient_quota" in body:  # an empty account, which no patience fills
            return ServerFailure(f"status {status}: {said}", "refused", status=402, said=body)
        if (status not in BUSY and status < 500) or (status >= 500 and NEVER.search(body)):
            return ServerFailure(f"status {status}: {said}", "refused", status=status, said=body)
        wait = seconds_asked(response.headers.get("retry-after", "")) or milliseconds_asked(response.headers.get("retry-after-ms", ""))
        text = f"status {status}: {said}" + (f" (come back in {wait:.0f} seconds)" if wait else "")
        return ServerFailure(text, "busy", status=status, wait=wait, said=body)

    def excerpt(self, text: str) -> str:
        """The first line of what a server said, at most 200 printable characters, without the key."""
        if self.key:
            text = text.replace(self.key, "***")
        lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
        return next((line for line in lines if line), "")[:200]


def _parsed(url: str) -> httpx.URL:
    import httpx

    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        shown = "the server's address" if "@" in url else repr(url)  # it may hold a password
        raise UserError(f"{shown} cannot be read as one; give one like http://127.0.0.1:8000/v1") from error
    if address.userinfo:
        where = f"{address.scheme}://{address.netloc.decode(errors='replace')}"
        raise UserError(f"{where} was given with a user name or password, which would end up in messages and settings; leave them out")
    if address.scheme not in ("http", "https") or not address.host or address.fragment:
        raise UserError(f"{url!r} is no address of a server; give one like http://127.0.0.1:8000/v1")
    return address


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _until(deadline: float, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks; a server that sends them drop by drop does not escape the timeout."""
    for chunk in chunks:
        if time.monotonic() > deadline:
            raise TimeoutError
        yield chunk


def _message(answer: bytes) -> str:
    """The words in an error's body: OpenAI's {"error": {"message"}}, FastAPI's {"detail"}, or plain text."""
    text = answer.decode(errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)


def seconds_asked(header: str) -> float:
    """The seconds that a Retry-After header asks for, given as a number or a date; 0 where it cannot be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def milliseconds_asked(header: str) -> float:
    """The seconds that a retry-after-ms header asks for; 0 where it cannot be read."""
    try:
        seconds = float(header) / 1000
    except ValueError:
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def png_base64(image: Image) -> str:
    """The image's RGB pixels as a PNG file without profile and notes, in base64."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1, icc_profile=None, exif=None)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def finite(value: Any) -> TypeGuard[float]:
    """Whether what JSON said is a number: no text, truth value, NaN or infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


class HttpScore:
    """The scores of a server that keeps this module's contract.

    Args:
        location: the server's address, http:// or https://.
        device, dtype: not used; they are the server's affair.
        batch: images in one request, at most.
        timeout: seconds until an attempt counts as failed.
        retries: further attempts while the server is busy.
        sleep: waits that many seconds.

    Raises:
        UserError: nothing answers there, or not as agreed.
    """

    def __init__(
        self,
        location: str | None,
        *,
        device: str | None = None,
        batch: int = 64,
        dtype: str = "float32",
        timeout: float = 300.0,
        retries: int = 5,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if location is None:
            raise UserError("scorer http needs the address of its server: http=URL")
        self.url, self.batch = location, batch
        self.connection = Connection(location, timeout=timeout, retries=retries, sleep=sleep)
        said = self._ask(first=True)
        name, self.served = said.get("name"), said.get("version")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise self._error(f"its name is {name!r}, and must be letters, digits, '.', '-' and '_', since it names a label file")
        if not isinstance(self.served, str) or not re.fullmatch(r"\S(.{0,198}\S)?", self.served) or not self.served.isprintable():
            raise self._error(f"its version is {self.served!r}, and must be one line of text")
        temperature = said.get("temperature", 1.0)
        if not finite(temperature) or temperature <= 0:
            raise self._error(f"its temperature is {temperature!r}, and must be a positive number")
        self.name, self.temperature, self.version = name, float(temperature), f"http-{name} {self.served}"

    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> np.ndarray:
        """The server's score of each image for its prompt.

        Args:
            prompts: N prompts.
            images: N images; they are sent as RGB.

        Returns:
            (N,) float64.

        Raises:
            UserError: the server fails, answers something else than N finite numbers, or changed its version.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts, but {len(images)} images")
        scores: list[float] = []
        for encoded in self._requests(images):
            part = list(prompts[len(scores) : len(scores) + len(encoded)])
            scores += self._scores(self._ask({"prompts": part, "images": encoded}), len(encoded))
        return np.array(scores, dtype=np.float64)

    def _requests(self, images: Sequence[Image]) -> Iterator[list[str]]:
        """Encoded images in order, as many as one request takes."""
        held: list[str] = []
        for image in images:
            encoded = png_base64(image)
            if len(held) == self.batch or (held and sum(map(len, held)) + len(encoded) > MOST_CHARACTERS):
                yield held
                held = []
            held.append(encoded)
        if held:
            yield held

    def _ask(self, body: Any = None, *, first: bool = False) -> dict[str, Any]:
        try:
            said = self.connection.ask("", body, first=first)
        except ServerFailure as failure:
            remedy = "start the server, or give http=URL with its address"
            if failure.kind == "refused":
                remedy = "give http=URL with the server's address; its own log may say more"
            raise self._error(str(failure), MEND if failure.kind == "nonsense" else remedy) from failure
        if not isinstance(said, dict):
            raise self._error(f"it answered {_shown(said)}, and must answer a JSON object")
        return said

    def _scores(self, said: dict[str, Any], count: int) -> list[float]:
        if said.get("version") != self.served:
            now = _shown(said.get("version"))
            raise self._error(f"its version was {self.served!r} and is {now} now; scores of two versions do not compare", "start again")
        scores = said.get("scores")
        if not isinstance(scores, list) or len(scores) != count:
            what = f"{len(scores)} scores" if isinstance(scores, list) else f"scores {_shown(scores)}"
            raise self._error(f"it answered {what} to {count} images")
        for place, score in enumerate(scores):
            if not finite(score):
                raise self._error(f"score {place} of {count} is {_shown(score)}, and must be a finite number")
        return [float(score) for score in scores]

    def _error(self, what: str, remedy: str = MEND) -> UserError:
        return UserError(f"scorer http at {self.url}: {what}; {remedy}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
