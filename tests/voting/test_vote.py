"""`dedpo vote` over real HTTP: the real command in a process of its own, and the application under uvicorn in a thread."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import numpy as np
import pytest

from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.labels.files import CALIBRATED, label_origin, read_labels, read_votes, write_labels
from dedpo_diffusion.pipelines.vote import main
from dedpo_diffusion.settings import VoteSettings
from dedpo_diffusion.voting.opening import judge_labels, open_service
from support.pictures import picture
from support.voting import PAIRS, client_of, command, connect, finish, in_process, make_pairs, post


def pair_of(item):
    return item["prompt"].removeprefix("prompt of ")


# ---- the journey


def wish(pair_id):
    """What everybody prefers: image 0, image 1, or neither; or they skip."""
    return (1.0, 0.0, 0.5, 1.0, 0.0, None)[int(pair_id[1:]) % 6]


def label_everything(url, rater):
    """Vote until nothing is left; returns what was pressed, [(pair_id, label or None, side of image 0)], and asserts on the way."""
    pressed = []
    with client_of(url) as client:
        state = client.get("/api/next", params={"rater": rater}).json()
        while item := state["item"]:
            pair_id = pair_of(item)
            k = int(pair_id[1:])
            left, right = (client.get(item[side]).content for side in ("left", "right"))
            assert {left, right} == {picture(2 * k, (8, 8)), picture(2 * k + 1, (8, 8))}
            first_left = left == picture(2 * k, (8, 8))
            wanted = wish(pair_id)
            answer = {None: "skip", 0.5: "tie", 1.0: "left" if first_left else "right", 0.0: "right" if first_left else "left"}[wanted]
            following = state["following"]
            state = post(client, "/api/vote", rater=rater, ticket=item["ticket"], answer=answer, seconds=0.25)
            assert len(pressed) + 1 == state["progress"]["answered"] + state["progress"]["skipped"]
            assert following is None or state["item"] is not None or wanted is not None
            pressed.append((pair_id, wanted, first_left))
    return pressed


@pytest.mark.slow
def test_two_people_label_everything_at_once(tmp_path):
    folder = make_pairs(tmp_path / "data")
    write_labels(folder, "clip", Labels([f"p{k}" for k in range(PAIRS)], np.linspace(0, 1, PAIRS)))
    with command(folder, "--repeats", "0.2", "--overlap", "0.3") as server:
        with ThreadPoolExecutor(2) as pool:
            pressed = dict(zip(("anna", "ben"), pool.map(label_everything, [server.url] * 2, ("anna", "ben")), strict=True))
        with client_of(server.url) as client:
            assert client.get("/api/session").json() == {
                "dataset": "data", "pairs": PAIRS, "name": "human", "order": "random", "raters": ["anna", "ben"],
                "votes": sum(label is not None for said in pressed.values() for _, label, _ in said),
            }  # fmt: skip
        code, out, err = finish(server)
    assert (code, err) == (0, "") and f"wrote {folder / 'labels' / 'human.parquet'}" in out
    firsts = {rater: list(dict.fromkeys(pair_id for pair_id, *_ in said)) for rater, said in pressed.items()}
    labelled = {rater: {p for p in mine if wish(p) is not None} for rater, mine in firsts.items()}
    assert labelled["anna"] | labelled["ben"] == {f"p{k}" for k in range(PAIRS) if wish(f"p{k}") is not None}
    assert 0 < len(labelled["anna"] & labelled["ben"]) < PAIRS / 2
    labels, votes = read_labels(folder, "human"), read_votes(folder, "human")
    assert dict(zip(labels.pair_id, labels.label_0.tolist(), strict=True)) == {p: wish(p) for p in labelled["anna"] | labelled["ben"]}
    assert "propensity" not in labels.extra
    for rater, said in pressed.items():
        rows = [k for k, who in enumerate(votes.rater) if who == rater]
        kept = [(pair_id, label, first_left) for pair_id, label, first_left in said if label is not None]
        stored = [(votes.pair_id[k], votes.label_0[k], not votes.extra["swapped"][k]) for k in rows]
        assert stored == kept
        again = [k for k in rows if votes.extra["repeat"][k]]
        assert again and len(rows) - len(again) == len(labelled[rater])
        for k in again:
            first = next(j for j in rows if votes.pair_id[j] == votes.pair_id[k])
            assert votes.extra["swapped"][first] != votes.extra["swapped"][k]
    assert set(votes.extra["seconds"]) == {0.25} and all(time.endswith("+00:00") for time in votes.extra["time"])


@pytest.mark.slow
def test_a_restart_goes_on_where_it_stopped_and_exports_add_up(tmp_path, capsys):
    folder, expected = make_pairs(tmp_path / "data"), None
    for number, before, votes in ((signal.SIGINT, 0, 3), (signal.SIGTERM, 3, 5)):
        with command(folder) as server, client_of(server.url) as client:
            state = client.get("/api/next", params={"rater": " anna "}).json()
            assert state["rater"] == "anna" and state["progress"]["answered"] == before
            assert expected in (None, state["item"])
            assert f"{before} votes by" in server.stdout.readline() + server.stdout.readline()
            while state["progress"]["answered"] < votes:
                state = post(client, "/api/vote", rater="anna", ticket=state["item"]["ticket"], answer="tie", seconds=1)
            expected = state["item"]
            exported = post(client, "/api/export")
            assert exported["path"] == "labels/human.parquet" and exported["labels"] == votes and exported["sentences"]
            assert finish(server, number)[0] == 0  # the client's connection is still open
        assert len(read_labels(folder, "human").pair_id) == votes
    session = label_origin(folder, "human")
    (folder / "labels" / "human.parquet").unlink()
    assert main([str(folder), "--export_only", "true"]) == 0
    assert label_origin(folder, "human") == session and re.fullmatch("dedpo vote [0-9a-f]{16}", session)
    assert main([str(folder), "--export_only", "true", "--seed", "1"]) == 2
    assert "seed 0 (now 1)" in capsys.readouterr().err


def test_a_label_file_of_another_origin_is_never_overwritten(tmp_path, capsys):
    folder = make_pairs(tmp_path / "data", 3)
    with command(folder) as server, client_of(server.url) as client:
        item = client.get("/api/next", params={"rater": "anna"}).json()["item"]
        post(client, "/api/vote", rater="anna", ticket=item["ticket"], answer="left", seconds=1)
        write_labels(folder, "human", Labels(["p0"], np.array([0.75])), origin="somebody")
        refused = client.post("/api/export", json={})
        assert refused.status_code == 409 and "made by somebody; give another --name" in refused.json()["error"]
        code, _, err = finish(server)
    assert code == 2 and "made by somebody" in err
    assert main([str(folder)]) == 2 and "made by somebody" in capsys.readouterr().err
    assert read_labels(folder, "human").label_0.tolist() == [0.75]


def test_calibrated_copies_of_a_judge_do_not_count_as_further_judges(tmp_path):
    folder = make_pairs(tmp_path / "d")
    ids = [f"p{k}" for k in range(PAIRS)]
    for name, origin in (("clip", None), ("clip-temperature", CALIBRATED)):
        write_labels(folder, name, Labels(ids, np.full(PAIRS, 0.4)), origin=origin)
    assert list(judge_labels(VoteSettings([folder]), ids)[1]) == ["clip"]
    assert list(judge_labels(VoteSettings([folder], judges=["clip-temperature"]), ids)[1]) == ["clip-temperature"]


def test_propensities_of_the_disagreement_order_reach_the_label_file(tmp_path):
    folder = make_pairs(tmp_path / "data")
    doubt = np.linspace(0, 1, PAIRS)
    write_labels(folder, "clip", Labels([f"p{k}" for k in range(PAIRS)], 1 - doubt / 2))
    with command(folder, "--order", "disagreement", "--repeats", "0", "--floor", "0.2") as server, client_of(server.url) as client:
        state = client.get("/api/next", params={"rater": "anna"}).json()
        for _ in range(12):
            state = post(client, "/api/vote", rater="anna", ticket=state["item"]["ticket"], answer="left", seconds=1)
        following = pair_of(state["item"])
        assert finish(server)[0] == 0
    labels = read_labels(folder, "human")
    with open_service(VoteSettings([folder], order="disagreement", repeats=0, floor=0.2)) as service:
        plan, number = service.plan, service.queue.number
    pairs = [number[pair_id] for pair_id in labels.pair_id]
    assert pairs == plan.order[:12] and number[following] == plan.order[12]
    np.testing.assert_allclose(labels.extra["propensity"], np.minimum(1, (0.2 + 0.8 * doubt[pairs]) * plan.keys[plan.order[12]]))


@pytest.mark.slow
def test_the_summary_speaks_of_raters_and_judges(tmp_path):
    folder = make_pairs(tmp_path / "data")
    write_labels(folder, "clip", Labels([f"p{k}" for k in range(PAIRS)], np.array([wish(f"p{k}") or 0.0 for k in range(PAIRS)])))
    write_labels(folder, "stray", Labels(["unknown"], np.array([1.0])))
    with command(folder, "--overlap", "1") as server, client_of(server.url) as client:
        assert client.get("/api/summary").json()["votes"] == 0
        assert client.post("/api/export", json={}).status_code == 409
        for rater in ("anna", "ben"):
            label_everything(server.url, rater)
        found = client.get("/api/summary").json()
    assert found["votes"] >= 2 * PAIRS * 5 // 6 and len(found["raters"]) == 2 and found["between"] and len(found["sentences"]) > 1
    assert [judge["name"] for judge in found["judges"]] == ["clip"] and found["judges"][0]["value"] == 1
    assert any("labels/stray.parquet row 0" in sentence for sentence in found["sentences"])


# ---- nothing waits for what it does not need


def test_a_slow_image_delays_no_vote_and_a_slow_vote_no_question(tmp_path):
    settings = VoteSettings([make_pairs(tmp_path / "data")], port=0)
    with in_process(settings) as (service, url), client_of(url) as client, contextlib.ExitStack() as stack:
        item = client.get("/api/next", params={"rater": "anna"}).json()["item"]
        with service.image_lock:
            images = [stack.enter_context(connect(url)) for _ in range(60)]  # more than there are threads
            for image in images:
                image.sendall(f"GET {item['left']} HTTP/1.1\r\nHost: {url[7:-1]}\r\nConnection: close\r\n\r\n".encode())
            time.sleep(0.5)  # all of them are waiting for the lock, or for a thread
            state = post(client, "/api/vote", rater="anna", ticket=item["ticket"], answer="left", seconds=1)
            assert state["progress"]["answered"] == 1
        assert all(image.recv(12) == b"HTTP/1.1 200" for image in images)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with service.writing:
            waiting = pool.submit(post, client, "/api/vote", rater="anna", ticket=state["item"]["ticket"], answer="tie", seconds=1)
            with client_of(url) as other:
                assert other.get("/api/next", params={"rater": "ben"}).status_code == 200 and not waiting.done()
        assert waiting.result()["progress"]["answered"] == 2


@pytest.mark.slow
def test_the_command_stops_at_once_whatever_is_still_open(tmp_path):
    folder = make_pairs(tmp_path / "data")
    with command(folder) as server, client_of(server.url) as client:
        state = client.get("/api/next", params={"rater": "anna"}).json()
        post(client, "/api/vote", rater="anna", ticket=state["item"]["ticket"], answer="left", seconds=1)
        head = f"POST /api/undo HTTP/1.1\r\nHost: {server.url[7:-1]}\r\nOrigin: {server.url[:-1]}\r\n".encode()
        with connect(server.url) as within_head, connect(server.url) as within_body:
            within_head.sendall(head)
            within_body.sendall(head + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
            client.get("/api/session")
            code, out, _ = finish(server)
    assert code == 0 and "1 labels" in out and read_labels(folder, "human").extra["votes"] == [1]


# ---- killed


class Voter(threading.Thread):
    """Answers as fast as it can, and sends again what was not acknowledged; counts on nothing else."""

    def __init__(self):
        super().__init__()
        self.acknowledged, self.url, self.over = [], "", False
        self.there, self.heard = threading.Event(), threading.Event()  # a server is there; it has acknowledged something

    def run(self):
        pending = None
        while self.there.wait() and not self.over:
            with contextlib.suppress(httpx.TransportError), client_of(self.url) as client:
                state = None if pending else client.get("/api/next", params={"rater": "anna"}).json()
                while self.there.is_set():
                    pending = pending or (state["item"], ("left", "right", "tie", "skip")[len(self.acknowledged) % 4])
                    state = post(client, "/api/vote", rater="anna", ticket=pending[0]["ticket"], answer=pending[1], seconds=0)
                    self.acknowledged.append((pair_of(pending[0]), pending[1]))
                    pending = None
                    self.heard.set()


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_when_the_server_is_killed_fifty_times(tmp_path):
    folder, chance, voter = make_pairs(tmp_path / "data", 3000, (1, 1)), random.Random(0), Voter()
    voter.start()
    for _ in range(50):
        with command(folder, "--repeats", "0") as server:
            voter.url = server.url
            voter.heard.clear()
            voter.there.set()
            assert voter.heard.wait(20)
            time.sleep(chance.uniform(0, 0.04))
            server.kill()
            voter.there.clear()
        with closing(sqlite3.connect(folder / "votes" / "human.sqlite")) as store:
            stored = store.execute("SELECT pair_id, answer FROM events ORDER BY number").fetchall()
        said = list(voter.acknowledged)
        assert stored[: len(said)] == said and len(stored) - len(said) in (0, 1)
    voter.over = True
    voter.there.set()
    voter.join()
    with open_service(VoteSettings([folder], repeats=0)) as service:
        assert [pair_id for pair_id, _ in stored] == [service.plan.ids[i] for i in service.plan.order[: len(stored)]]
    assert len(stored) > 50
