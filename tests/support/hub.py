"""A stand-in of a model hub's HTTP API on 127.0.0.1: repositories, the LFS store and commits, as huggingface_hub talks to them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "a" * 40  # of every commit


@dataclass
class Repository:
    """`files`: content by path, as the last commit left them; `lfs`: which of them lie in the LFS store."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)


class Hub:
    """Holds what it was sent.

    Attributes:
        refuse: given (method, path), a (status, message) to answer with in place of the true answer, "hang up" to say nothing, "after"
            to do what is asked and hang up then, or None.
        puts: the digest of every object that was uploaded, in order.
        asked: (method, path) of every request.
        tokens: every Authorization that was sent.
    """

    def __init__(self, token: str) -> None:
        self.token, self.lock = token, threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuse: Callable[[str, str], Any] = lambda method, path: None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "lfs":
            self.puts.append(hashlib.sha256(body).hexdigest())
            assert self.puts[-1] == parts[1]
            self.store[parts[1]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(parts[2:4])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of(self.repositories[name], name, parts[4:], body)

    def _create(self, told: dict[str, Any]) -> tuple[int, Any]:
        name = f"{told['organization']}/{told['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, Repository(told.get("visibility") == "private"))
        return status, {"url": f"{self.url}/{name}", "name": name}

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.store:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def _of(self, repository: Repository, name: str, what: list[str], body: bytes) -> tuple[int, Any]:
        if not what:
            return 200, {"id": name, "private": repository.private, "sha": SHA, "tags": [], "siblings": []}
        if what[0] == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                | ({"oid": entry.get("lfs", entry)["oid"]} if (entry := self._entry(repository, file["path"])) else {})
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if what[0] == "commit":
            return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        assert what[0] == "paths-info", what
        paths = parse_qs(body.decode()).get("paths", []) if not body.startswith(b"{") else json.loads(body)["paths"]
        return 200, [entry for path in paths if (entry := self._entry(repository, path))]

    def _entry(self, repository: Repository, path: str) -> dict[str, Any] | None:
        data = repository.files.get(path)
        if data is None:
            return None
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if path in repository.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            told = line["value"]
            if line["key"] == "header":
                repository.commits.append(told["summary"])
            elif line["key"] == "file":
                repository.files[told["path"]] = base64.b64decode(told["content"])
            else:
                repository.files[told["path"]] = self.store[told["oid"]]
                repository.lfs.add(told["path"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{SHA}", "commitOid": SHA}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    owner: Hub

    def _do(self) -> None:
        hub, path = self.owner, urlsplit(self.path).path
        size = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        with hub.lock:
            hub.asked.append((self.command, path))
            token = self.headers.get("Authorization")
            hub.tokens |= {token} if token else set()
            said = hub.refuse(self.command, path)
            if said == "hang up":
                self.close_connection = True
                return
            if isinstance(said, tuple):
                status, content = said[0], {"error": said[1]}
            elif not path.startswith("/lfs/") and token != f"Bearer {hub.token}":
                status, content = 401, {"error": f"Invalid credentials: {token}"}
            else:
                status, content = hub.answer(self.command, path, body)
        if said == "after":
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    do_GET = do_POST = do_PUT = do_HEAD = _do

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def model_hub(token: str) -> Iterator[Hub]:
    """A hub that knows one token, ended with the context."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()
