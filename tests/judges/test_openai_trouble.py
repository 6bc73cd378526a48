"""The judge behind OpenAI's protocol: its key, many requests at once, and servers that are slow, busy, failing or talk nonsense."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.openai_client import Pace, ServerJudge
from support.servers import (
    SETTINGS,
    VLM,
    Model,
    Reply,
    completion,
    judge_of,
    logprob_choice,
    many,
    questions,
    text_choice,
)

# ---- the key


def test_the_key_is_sent_and_never_shown(server, monkeypatch, capsys):
    judge_of(server)
    assert not any("Authorization" in request.headers for request in server.requests)
    server.requests.clear()
    monkeypatch.setenv("MY_KEY", "sk-secret-123\n")
    judge = judge_of(server, key_variable="MY_KEY")
    judge.answer(questions((9, 0)))
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-secret-123"}
    texts = [judge.version]
    for status in (400, 429, 500, 200):
        server.answer = lambda request, status=status: Reply(f"no: {request.headers['Authorization']}".encode(), status)
        texts += judge.answer(questions((9, 0))).missing
    server.answer = lambda request: Reply({"error": {"message": f"wrong key {request.headers['Authorization']}"}}, 401)
    with pytest.raises(UserError, match=r"wrong key Bearer \*\*\*; put a valid key into the environment variable MY_KEY") as caught:
        judge.answer(questions((9, 0)))
    texts += [str(caught.value), *capsys.readouterr()]
    assert len([text for text in texts if "***" in text]) == 5 and not any("secret" in text for text in texts)


@pytest.mark.parametrize("key", ["sk secret", "sk-sécret", "sk\nsecret"])
def test_a_key_that_cannot_be_one_is_refused_unseen(server, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="variable MY_KEY holds no key") as caught:
        judge_of(server, key_variable="MY_KEY")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(("status", "message"), [(401, "valid key"), (402, "paid up"), (403, "may use"), (404, "/v1"), (308, "moved")])
def test_a_wrong_key_model_or_address_stops_at_once(server, status, message):
    naps = []
    judge = judge_of(server, naps=naps)
    server.requests.clear()
    server.answer = lambda request: Reply({"error": {"message": "no"}}, status)
    with pytest.raises(UserError, match=rf"status {status}: no; .*{message}"):
        judge.answer(many(4))
    assert len(server.requests) == 1 and naps == []
    with pytest.raises(UserError, match=rf"status {status}: no; .*{message}"):
        judge_of(server)


# ---- trouble


NONSENSE = {
    "html": b"<html>oops",
    "nothing": b"",
    "half": b'{"choices": [',
    "deep": b"[" * 100000,
    "a list": [1],
    "no choices": {"choices": []},
    "null choices": {"choices": None},
    "text choices": {"choices": ["1"]},
    "an error inside": {"error": {"message": "overloaded"}},
}
NONSENSE_LOGPROBS = {
    "nan": lambda top: top[0].update(logprob=math.nan),
    "infinite": lambda top: top[1].update(logprob=-math.inf),
    "above one": lambda top: top[0].update(logprob=3.0),
    "far above": lambda top: top[0].update(logprob=1000.0),
    "text": lambda top: top[0].update(logprob="-0.1"),
    "null": lambda top: top[0].update(logprob=None),
    "truth": lambda top: top[0].update(logprob=False),
    "huge": lambda top: top[0].update(logprob=-(10**400)),
    "too much": lambda top: [entry.update(logprob=-0.1) for entry in top],
    "no token": lambda top: top[0].update(token=1),
    "no entry": lambda top: top.__setitem__(0, "1"),
    "dropped": lambda top: top.clear(),
}


def bad_logprobs(damage):
    choice = logprob_choice({"1": 0.6, "2": 0.3})
    damage(choice["logprobs"]["content"][0]["top_logprobs"])
    return {"choices": [choice], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}


@pytest.mark.parametrize("body", [*NONSENSE.values(), *map(bad_logprobs, NONSENSE_LOGPROBS.values())], ids=[*NONSENSE, *NONSENSE_LOGPROBS])
def test_nonsense_is_asked_again_once_and_then_missing(server, body):
    judge = judge_of(server)
    server.requests.clear()
    server.answer = lambda request: Reply(body)
    found = judge.answer(questions((9, 0)))
    assert np.isnan(found.scores).all() and re.match("the server answered nonsense: |an answer that is no JSON", found.missing[0])
    assert len(server.requests) == 2 and len(found.missing[0]) < 250
    assert found.extra["prompt_tokens"] == [0] and found.extra["answer_tokens"] == [0]
    good, bad = Model(), [Reply(body)]
    server.answer = lambda request: bad.pop() if bad else good(request)
    np.testing.assert_allclose(judge.answer(questions((9, 0))).scores, [[0.9, -0.9]], atol=1e-9)


@pytest.mark.parametrize("text", [None, "", " \n", 1, ["1"]])
def test_an_answer_without_text_is_missing(text_server, text):
    judge = judge_of(text_server, samples=2)
    text_server.answer = lambda request: completion(text_choice(text))
    found = judge.answer(questions((9, 0)))
    assert found.missing == ["the server answered nonsense: no text"] and np.isnan(found.scores).all()


TROUBLE = {
    "overloaded": Reply({"error": {"message": "overloaded"}}, 503),
    "busy": Reply(b"", 429),
    "timeout": Reply(b"", 408),
    "conflict": Reply(b"", 409),
    "early": Reply(b"", 425),
    "broken": Reply("traceback", 500),
    "hung up": Reply(None),
    "garbled": Reply(b"no gzip", 200, {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("reply", TROUBLE.values(), ids=list(TROUBLE))
def test_a_failing_server_is_asked_again_with_growing_pauses_and_then_missing(server, reply):
    naps = []
    judge = judge_of(server, naps=naps, retries=3)
    good, bad = Model(), [reply] * 3
    server.answer = lambda request: bad.pop() if bad else good(request)
    np.testing.assert_allclose(judge.answer(questions((9, 0))).scores, [[0.9, -0.9]], atol=1e-9)
    for nap, whole in zip(naps, (1, 2, 4), strict=True):
        assert whole / 2 <= nap <= whole
    server.answer = lambda request: reply
    found = judge.answer(questions((9, 0)))
    assert np.isnan(found.scores).all() and found.missing[0].endswith(" (the last of 4 attempts)")


@pytest.mark.parametrize("dripping", [False, True])
def test_a_slow_server_meets_the_timeout(server, dripping):
    judge = judge_of(server, retries=1)
    judge.connection.timeout = 0.2  # only now, since a busy machine may be slow to greet
    server.answer = lambda request: Reply((b" ",) * 40) if dripping else (time.sleep(0.5), Model()(request))[1]
    assert judge.answer(questions((9, 0))).missing == ["no answer within 0.2 seconds (the last of 2 attempts)"]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.5, 1),
        ("soon", 0.5, 1),
        ("nan", 0.5, 1),
        (200, 100, 200),
        (-200, 0.5, 1),
    ],
)
def test_retry_after_is_honoured(server, header, least, most):
    """A text as it is; a number is a date so many seconds from now."""
    if isinstance(header, int):
        header = format_datetime(datetime.now(UTC) + timedelta(seconds=header), usegmt=True)
    naps = []
    judge = judge_of(server, naps=naps)
    good, bad = Model(), [Reply(b"", 429, {"Retry-After": header})]
    server.answer = lambda request: bad.pop() if bad else good(request)
    assert judge.answer(questions((9, 0))).missing == [""]
    assert len(naps) == 1 and least <= naps[0] <= most


def test_a_server_that_asks_for_too_much_patience_is_not_waited_for(server):
    naps = []
    judge = judge_of(server, naps=naps)
    server.answer = lambda request: Reply({"error": {"message": "daily quota"}}, 429, {"Retry-After": "86400"})
    assert judge.answer(questions((9, 0))).missing == ["status 429: daily quota (come back in 86400 seconds)"] and naps == []


def test_a_refused_pair_is_missing_with_the_servers_reason_and_the_others_go_on(server):
    judge = judge_of(server, failures=1)
    words, good = "content\x1b[31m policy " + "x" * 500 + "\nsecond line", Model()
    server.answer = lambda request: Reply({"error": {"message": words}}, 400) if request.text.count("prompt 1") else good(request)
    found = judge.answer(questions((9, 0), (9, 0), (0, 9)))
    assert found.missing[1].startswith("status 400: content[31m policy xxx") and len(found.missing[1]) <= 212
    np.testing.assert_allclose(found.scores, [[0.9, -0.9], [np.nan, np.nan], [-0.9, 0.9]], atol=1e-9)


def test_the_run_stops_after_so_many_failed_pairs_in_a_row(server):
    judge = judge_of(server, failures=3, retries=0)
    good = Model()
    for prompt in ("prompt 0", "prompt 1"):
        server.answer = lambda request, bad=prompt: Reply({"detail": "down"}, 503) if bad in request.text else good(request)
        assert sum(map(bool, judge.answer(many(2)).missing)) == 1
    server.answer = lambda request: Reply({"detail": "down"}, 503)
    assert judge.answer(many(1)).missing == ["status 503: down"]  # the second in a row: the first was the last call's last pair
    with pytest.raises(
        UserError, match=r"failed 3 pairs in a row \(last: status 503: down\); when the server works again, give the same command to resume"
    ):
        judge.answer(many(5))


def test_a_server_that_goes_away_is_waited_for_and_then_counts_as_failed(server):
    def vanish(request):
        server.http.shutdown()
        server.http.server_close()
        return Reply(None)

    naps = []
    judge = judge_of(server, naps=naps, failures=1)
    server.answer = vanish
    with pytest.raises(UserError, match=r"failed 1 pairs in a row \(last: no connection \(.*\) \(the last of 3 attempts\)\)"):
        judge.answer(questions((9, 0)))
    assert len(naps) == 2


def test_nothing_more_is_asked_once_the_run_has_stopped(server):
    judge = judge_of(server, concurrency=2, failures=2, retries=0)
    server.requests.clear()
    server.answer = lambda request: (time.sleep(0.01), Reply(b"", 503))[1]
    with pytest.raises(UserError, match="failed 2 pairs in a row"):
        judge.answer(many(200))
    time.sleep(0.1)  # for what was under way
    begun = len(server.requests)
    time.sleep(0.1)
    assert len(server.requests) == begun < 100


# ---- many at once


def test_answers_keep_their_order_and_the_concurrency_its_bound(server):
    rng, lock, good = random.Random(0), threading.Lock(), Model()

    def answer(request):
        with lock:
            pause = rng.random() * 0.02
        time.sleep(pause)
        return good(request)

    asked = many(24)
    alone = judge_of(server).answer(asked)
    server.answer = answer
    judge = judge_of(server, concurrency=6)
    server.most = 0
    together = judge.answer(asked)
    np.testing.assert_array_equal(together.scores, alone.scores)
    assert 1 < server.most <= 6 and len(np.unique(alone.scores)) > 20
    assert judge.answer([]).scores.shape == (0, 2)


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.mark.parametrize("per_minute", [0.5, 7.0, 600.0])
def test_no_minute_sees_more_starts_than_allowed(per_minute):
    clock, starts = Clock(), []
    pace = Pace(per_minute, clock=clock, sleep=clock.sleep)
    for k in range(50):
        pace.wait()
        starts.append(clock())
        clock.now += [0.0, 0.3, 31.0][k % 3]  # what the request takes
    for start in starts:
        assert sum(start <= other < start + 60 - 1e-6 for other in starts) <= max(1, per_minute)
    assert starts[0] == 100.0


def test_threads_share_the_pace():
    """At a standing clock 20 threads are told 20 different moments, one interval apart."""
    naps = []
    pace = Pace(60.0, clock=lambda: 0.0, sleep=naps.append)
    threads = [threading.Thread(target=pace.wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(sorted(naps), np.arange(1, 20))


def test_every_request_keeps_the_pace_repeated_ones_too(server):
    clock, starts, good = Clock(), [], Model()

    def answer(request):
        starts.append(clock())
        return Reply(b"", 503) if len(starts) % 5 == 4 else good(request)

    server.answer = answer
    judge = ServerJudge(server.url, VLM, replace(SETTINGS, per_minute=12.0), clock=clock, sleep=clock.sleep)
    assert judge.answer(many(10)).missing == [""] * 10
    assert len(starts) > 25 and np.diff(starts).min() >= 5 - 1e-9


# ---- tokens


def test_tokens_of_repeated_and_sampled_requests_add_up(server, text_server):
    judge, good = judge_of(server, price_in=0.5, price_out=2.0), Model()
    bad = [completion({"message": None})]
    server.answer = lambda request: bad.pop() if bad else good(request)
    found = judge.answer(questions((9, 0), (0, 9)))
    assert found.extra["prompt_tokens"] == [300, 200] and found.extra["answer_tokens"] == [3, 2]
    assert judge.cost(2_000_000, 500_000) == pytest.approx(2.0)
    sampled = judge_of(text_server, samples=5).answer(questions((9, 0)))
    assert sampled.extra["prompt_tokens"] == [1000] and sampled.extra["answer_tokens"] == [10]


def test_the_tokens_of_a_missing_pair_were_paid_too(server):
    judge = judge_of(server)
    server.answer = lambda request: completion(logprob_choice({"The": 0.9}))
    assert judge.answer(questions((9, 0))).extra["prompt_tokens"] == [100]  # and the other order was not bought
