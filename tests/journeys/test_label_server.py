"""`dedpo label --with openai=...` is stopped in every way: no answer is lost, and none is asked for (and paid for) twice."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.labels.files import read_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines.label import main
from support.pictures import picture
from support.servers import Model, Reply, Request, Server, TextModel, completion, serve, text_choice

COUNT = 30


@pytest.fixture
def pairs(tmp_path) -> Path:
    with PairWriter(tmp_path / "d") as writer:
        for k in range(COUNT):
            writer.add(Pair(f"p{k}", f"a fox, number {k}.", picture(2 * k), picture(2 * k + 1)))
    return tmp_path / "d"


class Counted:
    """Counts the answers that it gives to each question, and may do something else first."""

    def __init__(self, model, first=lambda request, count: None) -> None:
        self.model, self.first, self.lock = model, first, threading.Lock()
        self.given: collections.Counter[str] = collections.Counter()

    def __call__(self, request: Request) -> Reply:
        if not request.body or "a fox" not in request.text:
            return self.model(request)
        other = self.first(request, sum(self.given.values()))
        if other is not None:
            return other
        with self.lock:
            self.given[request.text + request.body["messages"][0]["content"][0]["image_url"]["url"][-80:]] += 1
        return self.model(request)


def command(pairs: Path, server: Server, *more: str) -> list[str]:
    words = [str(pairs), "--with", f"openai={server.url}", "--vlm.min_validity", "0", "--server.key_variable", "NO_SUCH_KEY"]
    return [*words, "--shard", "12", "--server.retries", "0", *more]


def start(arguments: list[str]) -> subprocess.Popen:
    code = "import sys; from dedpo_diffusion.pipelines.label import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=-1, stderr=-1, text=True
    )


def wait_for(done, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def uninterrupted(pairs: Path, model=Model) -> np.ndarray:
    with serve(model()) as server:
        assert main([*command(pairs, server), "--name", "whole"]) == 0
    return read_labels(pairs, "whole").label_0


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "most"), [(signal.SIGINT, 0), (signal.SIGKILL, 4)])
@pytest.mark.parametrize("model", [Model, TextModel])
def test_a_run_that_is_interrupted_or_killed_pays_for_nothing_twice(pairs, stop, most, model):
    """After Ctrl-C the answers under way are waited for; a kill can lose those alone, one for each thread."""
    counted = Counted(model(), lambda request, count: time.sleep(0.03))
    with serve(counted) as server:
        arguments = command(pairs, server, "--server.concurrency", "4")
        for goal in (9, 37):
            process = start(arguments)
            wait_for(lambda goal=goal: sum(counted.given.values()) >= goal)
            process.send_signal(stop)
            process.communicate(timeout=60)
            assert process.returncode != 0 and not (pairs / "labels" / "openai.parquet").exists()
        assert main(arguments) == 0
    each = 1 if model is Model else 5
    assert set(counted.given.values()) <= set(range(each, each + 1 + 2 * most)) and len(counted.given) == 2 * COUNT
    assert sum(counted.given.values()) - 2 * COUNT * each <= 2 * most
    np.testing.assert_array_equal(read_labels(pairs, "openai").label_0, uninterrupted(pairs, model))
    assert not list((pairs / "labels").glob(".openai.parts/*"))


TROUBLE = {
    "dead": (Reply({"detail": "down"}, 503), "when the server works again, give the same command to resume"),
    "gone": (Reply(None), "when the server works again"),
    "key": (Reply({"error": {"message": "expired"}}, 401), "put a valid key"),
    "unpaid": (Reply({"error": {"message": "quota", "code": "insufficient_quota"}}, 429), "must be paid up"),
    "daily limit": (Reply({"error": {"message": "daily"}}, 429, {"Retry-After": "86400"}), "come back in 86400 seconds"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TROUBLE)
def test_a_server_that_fails_half_way_costs_no_answer(pairs, kind, capsys):
    reply, words = TROUBLE[kind]
    state = {"bad": True}
    counted = Counted(Model(), lambda request, count: reply if state["bad"] and count >= 17 else None)
    with serve(counted) as server:
        arguments = command(pairs, server, "--server.failures", "3", "--server.concurrency", "3")
        assert main(arguments) != 0 and words in capsys.readouterr().err
        assert main(arguments) != 0  # still the same
        state["bad"] = False
        assert main(arguments) == 0
    assert set(counted.given.values()) == {1} and len(counted.given) == 2 * COUNT
    np.testing.assert_array_equal(read_labels(pairs, "openai").label_0, uninterrupted(pairs))


@pytest.mark.slow
def test_a_pair_that_fails_in_its_second_order_keeps_the_first_ones_answer(pairs):
    """Every third pair fails so, never two in a row: the shards are done, and those pairs are asked again by the next run."""
    state, begun = {"bad": True}, set()

    def first(request, count):
        third = int(request.text.split("number ")[1].split(".")[0]) % 3 == 0
        if state["bad"] and third and request.text in begun:
            return Reply(b"", 503)
        begun.add(request.text)

    counted = Counted(Model(), first)
    with serve(counted) as server:
        assert main(command(pairs, server)) == 0
        assert len(read_labels(pairs, "openai").pair_id) == COUNT - len(range(0, COUNT, 3))
        state["bad"] = False
        assert main(command(pairs, server)) == 0
    assert set(counted.given.values()) == {1} and len(counted.given) == 2 * COUNT
    assert set(read_labels(pairs, "openai").extra["prompt_tokens"]) == {200}
    np.testing.assert_array_equal(read_labels(pairs, "openai").label_0, uninterrupted(pairs))


@pytest.mark.slow
def test_rate_limits_are_waited_out(pairs):
    """Every fifth request is one too many."""
    turn = iter(range(10**6))
    counted = Counted(Model(), lambda request, count: Reply(b"", 429, {"retry-after-ms": "1"}) if next(turn) % 5 == 4 else None)
    with serve(counted) as server:
        assert main(command(pairs, server, "--server.retries", "3", "--server.concurrency", "2", "--shard", "64")) == 0
    assert set(counted.given.values()) == {1} and len(counted.given) == 2 * COUNT


def test_a_budget_stops_the_run_and_the_same_command_goes_on(pairs, capsys):
    """100 prompt tokens an answer at 1000 a million are 0.1; so 2.5 are 25 answers, and one more for each thread that had begun."""
    counted = Counted(Model())
    with serve(counted) as server:
        arguments = command(pairs, server, "--server.budget", "2.5", "--server.price_in", "1000", "--server.concurrency", "2")
        assert main(arguments) != 0 and "server.budget is 2.5; all answers are kept" in capsys.readouterr().err
        assert 25 <= sum(counted.given.values()) <= 26
        assert main(arguments) != 0 and main(arguments) == 0
    assert set(counted.given.values()) == {1} and len(counted.given) == 2 * COUNT


def test_a_budget_needs_prices(pairs, capsys):
    assert main([*command(pairs, Server(Model())), "--server.budget", "1"]) != 0
    assert "--server.price_in" in capsys.readouterr().err


def test_refusals_are_kept_through_a_stop_and_asked_again_once_all_is_done(pairs, capsys):
    """Pairs 0 to 9 are refused; the run fails in the third shard, and does not ask for them again until it is whole."""
    state, refused = {"bad": True}, collections.Counter()

    def first(request, count):
        number = int(request.text.split("number ")[1].split(".")[0])
        if number < 10:
            refused[number] += 1
            choice = text_choice(None)
            choice["message"]["refusal"] = "I cannot look at foxes."
            return completion(choice) if state["bad"] is not None else None
        return Reply(b"", 503) if state["bad"] and number >= 26 else None

    with serve(Counted(Model(), first)) as server:
        arguments = command(pairs, server, "--server.failures", "2", "--server.concurrency", "2")
        assert main(arguments) != 0
        state["bad"] = False
        assert main(arguments) == 0
        assert refused == dict.fromkeys(range(10), 1) and "pair p0: refused: I cannot look at foxes." in capsys.readouterr().out
        assert read_labels(pairs, "openai").pair_id == [f"p{k}" for k in range(10, COUNT)]
        state["bad"] = None  # it has thought better of it
        assert main(arguments) == 0
    assert read_labels(pairs, "openai").pair_id == [f"p{k}" for k in range(COUNT)]


def test_every_process_asks_alike_and_a_server_that_changed_is_not_mixed_in(pairs, capsys):
    """The first run meets a server that tells token probabilities, the second one that does not."""
    counted = Counted(Model(), lambda request, count: Reply(b"", 503) if count >= 17 else None)
    with serve(counted) as server:
        assert main(command(pairs, server, "--server.failures", "1")) != 0
        server.answer = TextModel()
        assert main(command(pairs, server)) != 0
        assert "unfinished labels of another judge version" in capsys.readouterr().err
