"""A stand-in of a hub's HTTP API on 127.0.0.1: models and data sets, the LFS store, commits, and files as huggingface_hub reads them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "a" * 40  # of every commit
TOKEN = "hf_" + "Secret0Token" * 3


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
        repositories, datasets: by OWNER/NAME.
        refuse: given (method, path), a (status, message) to answer with in place of the true answer, "hang up" to say nothing, "after"
            to do what is asked and hang up then, or None.
        puts: the digest of every object that was uploaded, in order.
        asked: (method, path) of every request.
        tokens: every Authorization that was sent.
    """

    def __init__(self, token: str) -> None:
        self.token, self.lock = token, threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
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
        if parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            files = self.datasets["/".join(parts[1:3])].files
            name = "/".join(parts[5:])
            return (200, files[name]) if name in files else (404, {"error": "Entry not found"})
        held, name = self._held(parts[1]), "/".join(parts[2:4])
        if name not in held:
            return 404, {"error": "Repository not found"}
        return self._of(held[name], name, parts[4:], body)

    def _held(self, kind: str | None) -> dict[str, Repository]:
        return self.datasets if kind in ("dataset", "datasets") else self.repositories

    def _create(self, told: dict[str, Any]) -> tuple[int, Any]:
        name, held = f"{told['organization']}/{told['name']}", self._held(told.get("type"))
        status = 409 if name in held else 200
        held.setdefault(name, Repository(told.get("visibility") == "private"))
        return status, {"url": f"{self.url}/{name}", "name": name}

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.store:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def _of(self, repository: Repository, name: str, what: list[str], body: bytes) -> tuple[int, Any]:
        if not what or what[0] == "revision":
            siblings = [{"rfilename": path} for path in repository.files]
            return 200, {"id": name, "private": repository.private, "sha": SHA, "tags": [], "siblings": siblings}
        if what[0] == "tree":
            return 200, self._tree(repository, "/".join(what[2:]))
        if what[0] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular",
                }
                | ({"oid": entry.get("lfs", entry)["oid"]} if (entry := self._entry(repository, file["path"])) else {})
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if what[0] == "commit":
            return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        assert what[0] == "paths-info", what
        paths = parse_qs(body.decode()).get("paths", []) if not body.startswith(b"{") else json.loads(body)["paths"]
        folders = {path.rpartition("/")[0] for path in repository.files if "/" in path}
        listed = [{"type": "directory", "path": path, "size": 0, "oid": SHA} for path in paths if path in folders]
        return 200, [*listed, *(entry for path in paths if (entry := self._entry(repository, path)))]

    def _tree(self, repository: Repository, below: str) -> list[dict[str, Any]]:
        found = [self._entry(repository, path) for path in repository.files if path.startswith(f"{below}/" if below else "")]
        folders = {path.rpartition("/")[0] for path in repository.files if "/" in path} - {below}
        return [*({"type": "directory", "path": path, "size": 0, "oid": SHA} for path in sorted(folders)), *filter(None, found)]

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
            elif line["key"] == "deletedFile":
                del repository.files[told["path"]]
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
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if isinstance(content, bytes) and asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        if isinstance(content, bytes):
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("X-Repo-Commit", SHA)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "Entry" in str(content) else "RepoNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process and the commands that it starts are logged in to."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its chunks go to servers of another kind
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with model_hub(TOKEN) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
