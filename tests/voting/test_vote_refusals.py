"""What the server of `dedpo vote` refuses, and how it says so: over real HTTP, against the real command."""

from __future__ import annotations

import json
import re
import socket

import httpx
import numpy as np
import pytest

from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.labels.files import write_labels
from dedpo_diffusion.pipelines.vote import allowed_hosts, main
from dedpo_diffusion.settings import VoteSettings
from support.voting import client_of, command, connect, finish, make_pairs


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A running command, its folder, and one handed-out item; shared, since what is refused changes nothing."""
    folder = make_pairs(tmp_path_factory.mktemp("served") / "data")
    with command(folder) as server, client_of(server.url) as client:
        yield server.url, folder, client.get("/api/next", params={"rater": "anna"}).json()["item"]
        assert client.get("/api/session").json()["votes"] == 0


def last_refusal(folder):
    return (folder / "votes" / "human.log").read_text().splitlines()[-1]


PATHS = [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../service.py", "/static/%2e%2e/service.py", "/static/..%2fservice.py",
    "/static/%2e%2e%2f%2e%2e%2fpairs.py", "/static/..%5cservice.py", "/static/....//vote.js", "/static//etc/passwd", "/static/%2fetc",
    "/static/index.html", "/static/vote.js%00.css", "/static/", "/static", "//etc/passwd", "/image/../left", "/image/{t}/../left",
    "/image/{t}/%2e%2e%2fleft", "/image/{t}/up", "/image/{t}", "/image/%2fetc%2fpasswd/left", "/image/00000000000000000000/left",
    "/api/next/", "/api", "http://example.com/x", "/%ff%00", "/index.html", "/docs",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_unknown_paths_and_tickets_are_404(served, path):
    url, folder, item = served
    target = path.format(t=item["ticket"])
    with connect(url) as connection:  # a client library would tidy the path up
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {url[7:-1]}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404") and "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    assert "127.0.0.1 GET " in last_refusal(folder) and ": 404, " in last_refusal(folder)


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (421, {"Host": "example.com"}),
        (421, {"Host": "127.0.0.1.example.com:80"}),
        (421, {"Host": "192.168.0.1"}),
        (403, {"Origin": None}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://example.com"}),
        (403, {"Origin": "http://127.0.0.1:1"}),
        (403, {"Origin": "http://example.com/127.0.0.1"}),
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Type": None}),
        (400, {"content": b"{"}),
        (400, {"content": b"[]"}),
        (400, {"content": b"\xff\xfe"}),
        (400, {"content": b"[" * 9000}),
        (400, {"content": b"1" * 9000}),
        (400, {"rater": None}),
        (400, {"rater": 7}),
        (400, {"rater": " "}),
        (400, {"rater": "x" * 41}),
        (400, {"rater": "a\nb"}),
        (400, {"rater": "\ud800"}),
        (400, {"ticket": 7}),
        (400, {"answer": "up"}),
        (400, {"answer": ["left"]}),
        (400, {"seconds": -1}),
        (400, {"seconds": "1"}),
        (400, {"seconds": True}),
        (400, {"seconds": float("nan")}),
        (400, {"seconds": 10**400}),
        (404, {"ticket": "0" * 20}),
        (404, {"ticket": "../../etc/passwd"}),
        (404, {"rater": "ben"}),
        (413, {"content": b" " * (16 * 1024 + 1)}),
        (413, {"content": [b" " * 4096] * 5}),  # in chunks, without a Content-Length
        (413, {"content": [b" " * 65536] * 200}),
    ],
)
def test_bad_votes_are_refused_and_logged(served, status, change):
    url, folder, item = served
    headers = {"Host": url[7:-1], "Origin": url[:-1], "Content-Type": "application/json"}
    body = {"rater": "anna", "ticket": item["ticket"], "answer": "left", "seconds": 1.0}
    headers = {key: value for key, value in (headers | {k: v for k, v in change.items() if k in headers}).items() if value is not None}
    content = change["content"] if "content" in change else json.dumps(body | change).encode()
    content = iter(content) if isinstance(content, list) else content
    answer = httpx.post(url + "api/vote?token=secret", content=content, headers=headers, timeout=30)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    assert re.fullmatch(rf"\S+\+00:00 127.0.0.1 POST '/api/vote': {status}, .+", last_refusal(folder))
    assert "secret" not in last_refusal(folder)


def test_other_sites_may_link_to_the_page_and_embed_nothing(served):
    url, folder, item = served
    for path, status in (("", 200), (item["left"][1:], 403), ("api/next?rater=x", 403), ("static/vote.js", 403)):
        assert httpx.get(url + path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == status
        assert httpx.get(url + path, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
        assert httpx.get(url + path, headers={"Origin": "http://example.com"}).status_code == 403
    assert "another site" in last_refusal(folder)


def test_methods_that_do_not_fit_are_405(served):
    url, folder, _ = served
    for method, path in (("GET", "api/vote"), ("POST", "api/next"), ("DELETE", "api/session"), ("PUT", ""), ("OPTIONS", "api/vote")):
        answer = httpx.request(method, url + path, headers={"Origin": url[:-1]})
        assert answer.status_code == 405 and "error" in answer.json() and "allow" in answer.headers
        assert ": 405, " in last_refusal(folder)


def test_every_answer_carries_the_security_headers(served):
    url, _, item = served
    for path in ("", "api/session", "api/vote", "nowhere", item["left"][1:]):
        headers = httpx.get(url + path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["cache-control"] == ("private, max-age=3600" if path.startswith("image") else "no-store")
    foreign = httpx.get(url, headers={"Host": "example.com"})
    assert foreign.status_code == 421 and "content-security-policy" in foreign.headers


def test_a_tunnel_may_change_the_port(served):
    url, _, _ = served
    for host in ("localhost:9999", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        answer = httpx.post(url + "api/undo", json={"rater": "anna"}, headers={"Host": host, "Origin": f"https://{host.lower()}"})
        assert answer.status_code == 200 and answer.json()["undone"] is False


def test_the_page_and_its_two_files_are_served(served):
    url, _, _ = served
    for path, kind in (("", "text/html"), ("static/vote.js", "text/javascript"), ("static/vote.css", "text/css")):
        answer = httpx.get(url + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind) and len(answer.content) > 500


def test_a_token_is_asked_for_and_never_logged(tmp_path):
    folder, token = make_pairs(tmp_path / "data"), "right-token-0123456789"
    with command(folder, "--share", "true", "--token", token) as server:
        base = server.url.partition("?")[0]
        assert server.url == f"{base}?token={token}"
        with httpx.Client(base_url=base) as client:
            page = client.get("/")
            assert page.status_code == 401 and 'name="token"' in page.text and "<form" in page.text
            for path in ("/api/session", "/api/next?rater=anna", "/static/vote.js", "/image/0/left", f"/api/session?token={token}"):
                assert client.get(path).status_code == 401 and "error" in client.get(path).json()
            assert client.get("/?token=wrong-token-0123456789").status_code == 401
            bearer = {"Authorization": "Bearer wrong-token-0123456789"}
            assert client.get("/api/session", headers=bearer).status_code == 401
            assert client.get("/api/session", headers={"Authorization": f"Bearer {token}"}).status_code == 200
            entered = client.get(f"/?token={token}")
            assert entered.status_code == 303 and entered.headers["location"] == "/"
            assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(entered.headers["set-cookie"].split("; "))
            assert client.get("/api/session").status_code == 200 and client.get("/").status_code == 200
            named = client.get("/", params={"token": token, "rater": 'ann "b" & <c>'})
            assert named.headers["location"] == "/?rater=ann+%22b%22+%26+%3Cc%3E"  # a link may name the person
            linked = client.get(f"/?token={token}&rater=%22%3E", headers={"Sec-Fetch-Site": "cross-site"})
            assert linked.status_code == 200 and 'url=/?rater=%22%3E"' in linked.text and "set-cookie" in linked.headers
        code, _, err = finish(server)
    log = (folder / "votes" / "human.log").read_text()
    assert code == 0 and log.count(": 401, ") == 13 and "token-0123456789" not in log + err


def test_a_shared_server_may_be_called_by_its_own_names_alone():
    local = allowed_hosts(VoteSettings(["data"], allow=["vote.example.org"]))
    shared = allowed_hosts(VoteSettings(["data"], host="192.168.0.7", share=True))
    everywhere = allowed_hosts(VoteSettings(["data"], host="0.0.0.0", share=True))
    machine = socket.gethostname()
    for host, who in {
        "localhost:80": (True, True, True), "vote.example.org": (True, False, False), "192.168.0.7:8765": (False, True, True),
        "192.168.0.8": (False, False, True), "[fe80::1]:80": (False, False, True), machine: (machine == "localhost", True, True),
        "example.com": (False, False, False), "": (False, False, False), "192.168.0.7.example.com": (False, False, False),
    }.items():  # fmt: skip
        assert tuple(hosts.allow(host) for hosts in (local, shared, everywhere)) == who, host


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "add --share true"),
        (["--host", "example.com"], "add --share true"),
        (["--token", "short"], "at least 16"),
        (["--token", "sixteen or more ; letters"], "at least 16"),
        (["--repeats", "1.5"], "--repeats is 1.5"),
        (["--overlap", "-1"], "--overlap is -1"),
        (["--floor", "0"], "--floor is 0.0"),
        (["--port", "70000"], "--port is 70000"),
        (["--judges", '["clip"]'], "--judges is for --order disagreement"),
        (["--order", "disagreement"], "holds no judge"),
        (["--name", "../human"], "cannot name a file"),
        (["--name", "ingested"], "labels/ingested.parquet is there already, made by something else; give another --name"),
        (["--export_only", "true"], "nobody has voted yet"),
    ],
)
def test_settings_that_cannot_be_meant_are_told(tmp_path, capsys, options, words):
    folder = make_pairs(tmp_path / "data", 3)
    if "ingested" in options:
        write_labels(folder, "ingested", Labels(["p0"], np.array([1.0])))
    assert main([str(folder), *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(folder.glob("votes/*.sqlite"))


def test_a_taken_port_and_a_store_in_use_are_told(tmp_path, capsys):
    folder = make_pairs(tmp_path / "data", 3)
    with command(folder) as server:
        assert main([str(folder), "--port", "0"]) == 2
        assert "open in another `dedpo vote`" in capsys.readouterr().err
        assert main([str(folder), "--port", server.url[:-1].rpartition(":")[2], "--name", "other"]) == 2
        assert "give another --port" in capsys.readouterr().err
