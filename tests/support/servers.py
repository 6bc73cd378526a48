"""Servers on 127.0.0.1 that answer as a test wants: a scorer's, and a vision-language model's in OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from dedpo_diffusion.judges.judge import Question
from dedpo_diffusion.judges.openai_client import ServerJudge
from dedpo_diffusion.settings import ServerSettings, VlmSettings


@dataclass
class Reply:
    """`body`: bytes as they are, a tuple of bytes one by one, anything else as JSON; None hangs up."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def images(self) -> list[Image.Image]:
        """The pictures in a chat request."""
        parts = self.body["messages"][0]["content"]
        return [decoded(part["image_url"]["url"].partition(",")[2]) for part in parts if part["type"] == "image_url"]

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][-1]["text"]


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


class Server:
    """Counts what it is asked; `answer` maps a Request to a Reply and may be replaced at any time."""

    def __init__(self, answer, port: int = 0) -> None:
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.busy = self.most = 0  # requests under way now, and at most
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.root}/v1"

    def handle(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            return self.answer(request)
        finally:
            with self.lock:
                self.busy -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, else each answer waits for an acknowledgement
    owner: Server

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        reply = self.owner.handle(Request(self.path, dict(self.headers), body))
        self.close_connection = reply.body is None or isinstance(reply.body, tuple)
        if reply.body is None:
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if isinstance(reply.body, tuple):
            self.end_headers()
            return self._drip(reply.body)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _drip(self, parts):
        """One part every 50 ms, until the client has gone."""
        try:
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
                threading.Event().wait(0.05)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@contextmanager
def serve(answer, port: int = 0) -> Iterator[Server]:
    server = Server(answer, port)
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def logprob_choice(probabilities: dict[str, float]) -> dict[str, Any]:
    """A choice whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    message = {"role": "assistant", "content": next(iter(probabilities))}
    return {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def text_choice(text: Any, finish: str = "stop") -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None}


def completion(choice: dict[str, Any]) -> Reply:
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return Reply({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


class Model:
    """Prefers the brighter picture, and the first place by `bias`; says 1 or 2 with probability `validity`."""

    def __init__(self, bias: float = 0.0, validity: float = 0.9, names: tuple[str, ...] = ("tiny-vl",)) -> None:
        self.bias, self.validity, self.names = bias, validity, names

    def log_odds(self, request: Request) -> float:
        first, second = (float(np.asarray(image, dtype=np.float64).mean()) for image in request.images)
        return (first - second) / 10 + self.bias

    def __call__(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": name} for name in self.names]})
        return completion(self.choice(request))

    def choice(self, request: Request) -> dict[str, Any]:
        p = self.validity / (1 + math.exp(-self.log_odds(request)))
        rest = self.validity - p
        return logprob_choice({"1": 0.75 * p, " 1": 0.25 * p, "2": 0.5 * rest, "\u0120 2\n": 0.5 * rest, "The": 0.6 * (1 - self.validity)})


class TextModel(Model):
    """Has no token probabilities and leaves them out without a word; says the likelier answer."""

    def choice(self, request: Request) -> dict[str, Any]:
        return text_choice("1" if self.log_odds(request) > 0 else "2")


# ---- what the judge's tests share

SETTINGS = ServerSettings(retries=2, concurrency=1, failures=1000, key_variable="NO_SUCH_KEY")
VLM = VlmSettings(min_validity=0.0)


def judge_of(server: Server, *, naps: list[float] | None = None, vlm: VlmSettings = VLM, largest: int = 64, **settings: Any) -> ServerJudge:
    """A judge that notes in `naps` how long it would have slept."""
    asked = replace(SETTINGS, **settings)
    return ServerJudge(server.url, vlm, asked, largest=largest, sleep=[].append if naps is None else naps.append)


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (3, 2), (level,) * 3)


def questions(*levels: tuple[int, int]) -> list[Question]:
    return [Question(f"p{k}", f"prompt {k}", grey(a), grey(b)) for k, (a, b) in enumerate(levels)]


def many(count: int) -> list[Question]:
    return questions(*np.random.default_rng(1).integers(0, 30, (count, 2)).tolist())
