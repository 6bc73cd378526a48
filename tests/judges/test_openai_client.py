"""The judge behind OpenAI's protocol: what its answers mean, and how it is set up."""

from __future__ import annotations

import math
import socket
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.judge import Question, probability
from dedpo_diffusion.judges.openai_client import ServerJudge, Stopped
from dedpo_diffusion.judges.question import fitted, read_template
from dedpo_diffusion.judges.registry import load_judge
from dedpo_diffusion.settings import LabelSettings, VlmSettings
from support.servers import (
    SETTINGS,
    VLM,
    Model,
    Reply,
    TextModel,
    completion,
    judge_of,
    logprob_choice,
    many,
    questions,
    serve,
    text_choice,
)


def probabilities(judge: ServerJudge, asked: list[Question]) -> np.ndarray:
    return judge.prefer([q.prompt for q in asked], [q.image_0 for q in asked], [q.image_1 for q in asked])


# ---- what the answers mean


@pytest.mark.parametrize("kind", [Model, TextModel])
def test_swapping_the_images_turns_the_label_around(kind):
    with serve(kind(bias=0.7)) as server:
        judge = judge_of(server)
        asked = many(12)
        back = [Question(q.pair_id, q.prompt, q.image_1, q.image_0) for q in asked]
        np.testing.assert_allclose(probabilities(judge, asked), 1 - probabilities(judge, back), atol=1e-12)


def test_a_lean_to_the_first_place_cancels_to_a_millionth():
    asked = many(12)
    truth = [1 / (1 + math.exp((q.image_1.getpixel((0, 0))[0] - q.image_0.getpixel((0, 0))[0]) / 10)) for q in asked]
    for bias in (-3.0, 0.0, 0.1, 5.0):
        with serve(Model(bias=bias)) as server:
            np.testing.assert_allclose(probabilities(judge_of(server), asked), truth, atol=1e-6)


def test_the_bias_shows_in_the_orders_consistency_and_the_validity_is_told():
    with serve(Model(bias=2.0, validity=0.8)) as server:
        found = judge_of(server).answer(questions((10, 0), (100, 0)))
    assert found.extra["order_consistent"] == [False, True] and found.missing == ["", ""]
    np.testing.assert_allclose(found.extra["validity"], [0.8, 0.8], atol=1e-9)
    np.testing.assert_allclose(found.scores, [[3.0, 1.0], [12.0, -8.0]], atol=1e-9)  # log-odds: brightness / 10 + 2


@pytest.mark.parametrize(
    ("probabilities", "logit", "validity"),
    [
        ({"1": 0.5, "2": 0.25}, math.log(2), 0.75),
        ({"1": 0.3, " 1": 0.2, "1\n": 0.1, "2": 0.2, "12": 0.1, "1.": 0.05}, math.log(3), 0.8),
        ({"1": 0.9, "The": 0.05, "A": 0.01}, math.log(90), 0.9),  # 2 is no likelier than the least token
        ({"2": 0.9, "The": 0.09}, -math.log(0.9 / 0.01), 0.9),  # nor than all tokens that are not reported
        ({"1": 0.9}, math.log(9), 0.9),
        ({"1": 1.0}, math.log(1e6), 1.0),  # but not below rounding
    ],
)
def test_logit_and_validity_by_hand(server, probabilities, logit, validity):
    judge = judge_of(server)
    server.answer = lambda request: completion(logprob_choice(probabilities))
    found = judge.answer(questions((0, 0)))
    np.testing.assert_allclose(found.scores, [[logit, logit]], atol=1e-9)
    np.testing.assert_allclose(found.extra["validity"], [validity], atol=1e-9)


def test_a_servers_word_for_probability_zero_is_no_probability(server):
    judge = judge_of(server)
    choice = logprob_choice({"1": 0.9, "2": 0.5})
    choice["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = -9999.0
    server.answer = lambda request: completion(choice)
    np.testing.assert_allclose(judge.answer(questions((0, 0))).scores, [[math.log(9)] * 2], atol=1e-9)


def test_a_pair_whose_answer_is_neither_or_improbable_is_missing(server):
    judge = judge_of(server, vlm=VlmSettings(min_validity=0.5))
    server.answer = lambda request: completion(logprob_choice({"The": 0.6, "A": 0.3}))
    found = judge.answer(questions((9, 0)))
    assert found.missing == ["neither 1 nor 2 is among the reported tokens (it said 'The')"] and np.isnan(found.scores).all()
    server.answer = Model(validity=0.4)
    found = judge.answer(questions((9, 0)))
    assert "probability of 0.40" in found.missing[0] and np.isnan(found.scores).all()


def test_sampled_answers_are_counted_with_jeffreys_prior(text_server):
    """4 of 5 for the brighter image in both orders: logit log(4.5 / 1.5), so P = sigmoid(log 3) = 3/4."""
    judge = judge_of(text_server)
    model, count = TextModel(), {True: 0, False: 0}

    def answer(request):
        bright = model.log_odds(request) > 0
        count[bright] += 1
        return completion(text_choice("1" if bright != (count[bright] % 5 == 0) else " **2**.\n"))

    text_server.answer = answer
    found = judge.answer(questions((9, 0)))
    np.testing.assert_allclose(found.scores, [[math.log(3), -math.log(3)]], atol=1e-12)
    assert probability(found.scores, judge.temperature)[0] == pytest.approx(0.75)
    assert found.extra["validity"] == [1.0] and found.extra["order_consistent"] == [True]


@pytest.mark.parametrize(
    ("text", "finish", "meant"),
    [
        ("1", "stop", 1), (" 2\n", "stop", 2), ("Answer: 1.", "stop", 1), ("**2**", "stop", 2), ("Image 1, clearly", "stop", 1),
        ("1 1", "stop", 1), ("1 or 2", "stop", 0), ("1/2", "stop", 0), ("12", "stop", 0), ("10", "stop", 0), ("1.5", "stop", 0),
        ("0.2", "stop", 0), ("2nd", "stop", 0), ("v1", "stop", 0), ("one", "stop", 0), ("the first", "stop", 0), ("3", "stop", 0),
        ("１", "stop", 0), ("1,2", "stop", 0), ("1%", "stop", 0), ("1/10", "stop", 0), ("-1", "stop", 0),
        ("Image 1 shows a red circle, while", "length", 0),
    ],
)  # fmt: skip
def test_text_is_read_strictly(text_server, text, finish, meant):
    judge = judge_of(text_server, samples=1)
    text_server.answer = lambda request: completion(text_choice(text, finish))
    found = judge.answer(questions((9, 0)))
    if meant:
        np.testing.assert_allclose(found.scores, [[{1: math.log(3), 2: -math.log(3)}[meant]] * 2], atol=1e-12)
    else:
        assert found.missing == [f"none of 1 answers was 1 or 2 (it said {text!r})"] and np.isnan(found.scores).all()


def test_a_request_holds_both_images_without_loss_and_the_question(server):
    """And nothing that is not OpenAI's, which a strict server would refuse and which may bend the probabilities."""
    judge = judge_of(server, vlm=VlmSettings(min_validity=0.0, max_side=20))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((50, 30), (8, 16))]
    judge.answer([Question("p", "a {cat}", *images)])
    shown, swapped = server.requests[-2:]
    assert set(shown.body) == {"model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs"}
    assert (shown.body["model"], shown.body["max_tokens"], shown.body["temperature"], shown.body["top_logprobs"]) == ("tiny-vl", 1, 0, 20)
    assert shown.text == swapped.text == read_template(None).ask("a {cat}")
    for found, image in zip(shown.images + swapped.images[::-1], images * 2, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(fitted(image, 20)))


# ---- how it is set up


def test_the_version_tells_apart_whatever_changes_labels(server, text_server, tmp_path):
    own = tmp_path / "q.txt"
    own.write_text("Which is better for {prompt}?")
    versions = [
        judge_of(server).version,
        judge_of(server, logprobs="no").version,
        judge_of(server, logprobs="no", samples=3).version,
        judge_of(server, model="other").version,
        judge_of(server, vlm=replace(VLM, prompt=own)).version,
        judge_of(server, vlm=replace(VLM, max_side=None)).version,
        judge_of(server, vlm=replace(VLM, min_validity=0.1)).version,
        ServerJudge(server.url, VLM, SETTINGS, temperature=1.0).version,
    ]
    assert len(set(versions)) == len(versions)
    assert versions[0] == f"openai-tiny-vl-{read_template(None).digest}-logprobs side 1024 validity 0 temperature 2.0"
    assert judge_of(text_server).version == versions[1]  # auto comes to the same where there are no probabilities


def test_the_judge_is_loaded_by_its_address(server, tmp_path):
    judge = load_judge(f"openai={server.url}/", LabelSettings(tmp_path, [], vlm=VLM, server=SETTINGS))
    assert (judge.name, judge.temperature) == ("openai", 2.0)
    np.testing.assert_allclose(probabilities(judge, questions((10, 0))), [1 / (1 + math.exp(-1))], atol=1e-9)


@pytest.mark.parametrize(
    "refusal",
    [
        Reply({"error": {"message": "Unsupported parameter: 'logprobs'"}}, 400),
        Reply({"error": {"message": "You are not allowed to request logprobs from this model"}}, 403),
        Reply({"detail": [{"loc": ["body", "top_logprobs"], "msg": "extra fields not permitted"}]}, 422),
    ],
)
def test_a_server_that_refuses_logprobs_is_asked_for_text(refusal, capsys):
    model = TextModel()
    with serve(lambda request: refusal if "logprobs" in (request.body or {}) else model(request)) as server:
        judge = judge_of(server, samples=2)
        assert f"the server at {server.url}: it gives no token probabilities (status {refusal.status}" in capsys.readouterr().out
        np.testing.assert_allclose(probabilities(judge, questions((9, 0), (0, 9))), [5 / 6, 1 / 6], atol=1e-12)
        assert len(server.requests) == 3 + 8
        with pytest.raises(UserError, match=r"give --server\.logprobs auto or no"):
            judge_of(server, logprobs="yes")


def test_one_model_is_found_and_several_are_listed(server):
    assert judge_of(server).model == "tiny-vl"
    server.answer = Model(names=("tiny-vl", "large-vl"))
    with pytest.raises(UserError, match=r"lists 2 models \(tiny-vl, large-vl\); give --server.model NAME"):
        judge_of(server)
    before = len(server.requests)
    assert judge_of(server, model="large-vl").model == "large-vl"
    assert [request.path for request in server.requests[before:]] == ["/v1/chat/completions"]
    server.answer = Model(names=())
    with pytest.raises(UserError, match=r"lists no model; give --server.model"):
        judge_of(server)


def test_a_server_that_does_not_run_is_said_at_once_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    naps = []
    with pytest.raises(UserError, match=rf"the server at {url}: no connection \(.*\); start it .* or give openai=URL") as caught:
        ServerJudge(url, VLM, SETTINGS, sleep=naps.append)
    assert "\n" not in str(caught.value) and naps == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0), ("concurrency", 0), ("retries", -1), ("failures", 0), ("timeout", 0.0), ("timeout", math.nan),
        ("per_minute", 0.0), ("per_minute", math.inf), ("price_in", -1.0),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(UserError, match=rf"server.{name} is .*; it must be"):
        ServerJudge("http://127.0.0.1:9/v1", VLM, replace(SETTINGS, **{name: value}))


def test_a_proxy_in_the_environment_does_not_matter_on_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert judge_of(server).model == "tiny-vl"


def test_a_pair_cut_short_by_a_later_one_tells_that_ones_reason():
    """The first pair is still under way when the second learns that the server will answer no more."""
    judge = object.__new__(ServerJudge)
    judge.stopping, judge.server = threading.Event(), replace(SETTINGS, concurrency=2)

    def ask(question, journal):
        if question == "second":
            raise UserError("the account is empty")
        assert judge.stopping.wait(10)
        raise Stopped

    judge._ask_pair = ask
    with pytest.raises(UserError, match="the account is empty"):
        list(judge._spread(["first", "second"], None))
