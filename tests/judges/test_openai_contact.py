"""What the judge behind OpenAI's protocol learns at first contact, and what it says where a server cannot be asked."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.judges.dialect import Dialect, adapted
from dedpo_diffusion.judges.registry import largest_side
from dedpo_diffusion.judges.scorers.http import ServerFailure
from dedpo_diffusion.pairs.dataset import PairWriter
from support.pictures import picture
from support.servers import Model, Reply, TextModel, completion, judge_of, logprob_choice, many, questions, serve, text_choice


def bad(message: str, status: int = 400, **more) -> Reply:
    return Reply({"error": {"message": message, **more}}, status)


def strict(model: Model, refusals: dict):
    """A server that refuses bodies by name: what a body must not hold, and the reply to that."""

    def answer(request):
        for refuses, reply in refusals.items():
            if request.body and refuses(request.body):
                return reply
        return model(request)

    return answer


def chats(server) -> list[dict]:
    return [request.body for request in server.requests if request.body]


# ---- parameters

UNKNOWN_LIMIT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
PARAMETERS = {
    "max_completion_tokens": ({lambda b: "max_tokens" in b: bad(UNKNOWN_LIMIT)}, {"max_completion_tokens": 1}, "max_completion_tokens"),
    "as FastAPI says it": (
        {lambda b: "max_tokens" in b: Reply({"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]}, 422)},
        {"max_completion_tokens": 1},
        "max_completion_tokens",
    ),
    "no bound at all": (
        {lambda b: "max_tokens" in b or "max_completion_tokens" in b: bad("unknown argument max_tokens or max_completion_tokens")},
        {},
        "no bound on tokens",
    ),
    "sixteen tokens at least": (
        {lambda b: b["max_tokens"] < 16: bad("Invalid 'max_tokens': integer below minimum value. Expected a value >= 16, got 1.")},
        {"max_tokens": 16},
        "must be allowed 16 tokens",
    ),
    "no temperature": (
        {lambda b: b.get("temperature", 1) != 1: bad("Unsupported value: 'temperature' does not support 0 with this model.")},
        {"max_tokens": 1},
        "takes no temperature",
    ),
    "a temperature above 0": (
        {lambda b: b.get("temperature") == 0: bad("`temperature` must be strictly positive", 422)},
        {"max_tokens": 1},
        "takes no temperature",
    ),
    "vLLM's bound": (
        {lambda b: b["top_logprobs"] > 5: bad("Requested sample logprobs of 20, which is greater than max allowed: 5")},
        {"top_logprobs": 5},
        "5 token probabilities",
    ),
    "a range": (
        {lambda b: b["top_logprobs"] > 8: bad("Range of top_logprobs should be [0, 8]")},
        {"top_logprobs": 8},
        "8 token probabilities",
    ),
    "a bound that is not told": (
        {lambda b: b["top_logprobs"] > 5: bad("Invalid value for top_logprobs")},
        {"top_logprobs": 5},
        "5 token probabilities",
    ),
    "all at once": (
        {
            lambda b: "max_tokens" in b: bad(UNKNOWN_LIMIT),
            lambda b: "temperature" in b: bad("temperature is deprecated for this model"),
            lambda b: b["top_logprobs"] > 5: bad("Unsupported value: top_logprobs must be less than or equal to 5"),
        },
        {"max_completion_tokens": 1, "top_logprobs": 5},
        "max_completion_tokens",
    ),
}


@pytest.mark.parametrize(("refusals", "sent", "said"), PARAMETERS.values(), ids=list(PARAMETERS))
def test_parameters_that_a_server_refuses_are_learned_once_and_said_in_one_line(refusals, sent, said, capsys):
    with serve(strict(Model(), refusals)) as server:
        judge = judge_of(server, concurrency=4)
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and said in told and told.startswith(f"judge openai: the server at {server.url}")
        learned = len(chats(server))
        found = judge.answer(many(8))
        np.testing.assert_array_equal(found.missing, [""] * 8)
        bodies = chats(server)[learned:]
        assert len(bodies) == 16 and not capsys.readouterr().out  # none refused, and nothing more said
        for body in bodies:
            plain = {"max_tokens", "max_completion_tokens", "temperature", "top_logprobs"} & set(body)
            assert {key: body[key] for key in sent} == sent and body["logprobs"] is True
            assert "max_tokens" not in plain or "max_completion_tokens" not in sent
        assert len({json.dumps({k: v for k, v in body.items() if k != "messages"}) for body in bodies}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_learning_ends_whatever_a_server_says(seed):
    """Each refusal leaves something out or makes it smaller, so no order of refusals goes in circles."""
    rng, dialect, seen = np.random.default_rng(seed), Dialect(), []
    words = [
        "max_tokens",
        "max_completion_tokens is unknown",
        "temperature",
        "top_logprobs at most 3",
        "logprobs",
        "context length",
        "x >= 4 max_tokens",
    ]
    for _ in range(60):
        assert dialect not in seen
        seen.append(dialect)
        failure = ServerFailure("status 400", "refused", status=400, said=str(rng.choice(words)))
        dialect = adapted(dialect, failure, dialect.side or 1024) or dialect
        if dialect == seen[-1]:
            seen.pop()
    assert len(seen) < 20


def test_what_may_change_an_answer_is_in_the_version():
    named, bounded = (strict(Model(), PARAMETERS[name][0]) for name in ("max_completion_tokens", "a range"))
    with serve(Model()) as first, serve(named) as second, serve(bounded) as third:
        versions = [judge_of(server).version for server in (first, second, third)]
    assert versions[0] == versions[1] != versions[2] and "-logprobs-top8 " in versions[2]


def test_a_refusal_that_names_nothing_is_an_error_at_first_contact():
    with serve(strict(Model(), {lambda b: True: bad("no")})) as server, pytest.raises(UserError, match="status 400: no; check the address"):
        judge_of(server)
    assert len(chats(server)) == 1


# ---- images


def test_a_bound_on_images_is_found_by_pictures_as_large_as_the_runs(capsys):
    model = Model()

    def answer(request):
        if request.body and max(max(image.size) for image in request.images) > 500:
            return bad("Image dimensions exceed the maximum allowed size", 400)
        return model(request)

    with serve(answer) as server:
        judge = judge_of(server, largest=700)
        assert "no larger images than 384 pixels" in capsys.readouterr().out and "side 384" in judge.version
        large = [Image.new("RGB", (700, 350), (level,) * 3) for level in (20, 10)]
        found = judge.answer([questions((0, 0))[0].__class__("p", "x", *large)])
        assert found.missing == [""] and server.requests[-1].images[0].size == (384, 192)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"Payload Too Large", 413),
        bad("This model's maximum context length is 4096 tokens. However, you requested 5200 tokens (1 in max_tokens)."),
        bad("image too large: 5.3 MB"),
    ],
)
def test_a_request_that_is_too_large_is_made_smaller(reply):
    model = Model()
    with serve(lambda r: reply if r.body and r.images[0].size[0] > 300 else model(r)) as server:
        assert judge_of(server, largest=512).dialect == Dialect(side=256)


def test_the_size_of_the_runs_images_is_read_off_the_first_pairs(tmp_path):
    assert largest_side(tmp_path, 64) == 64
    with PairWriter(tmp_path / "d") as writer:
        writer.add(Pair("a", "x", picture(0, (10, 300)), picture(1, (20, 20))))
        writer.add(Pair("b", "x", picture(2, (90, 30)), picture(3, (20, 20))))
    assert largest_side(tmp_path / "d", 64) == 300


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        (bad("At most 1 image(s) may be provided in one prompt."), "limit-mm-per-prompt"),
        (bad("Only one image per request is supported"), "limit-mm-per-prompt"),
        (bad("image input is not supported - hint: if this is unexpected, you may need to provide the mmproj", 500), "sees no images"),
        (bad("tiny is not a multimodal model", 400), "sees no images"),
        (bad("No endpoints found that support image input", 404), "sees no images"),
        (bad("content must be a string", 422), "sees no images"),
    ],
)
def test_a_model_that_cannot_see_a_pair_is_said_at_once(reply, remedy):
    model, naps = Model(), []
    with serve(lambda r: reply if r.body else model(r)) as server:
        with pytest.raises(UserError, match=remedy) as caught:
            judge_of(server, naps=naps)
        assert len(chats(server)) == 1 and naps == [] and "\n" not in str(caught.value)


# ---- answers inside a text


def within(text: list[str], place: int, request, model=None) -> dict:
    """A choice whose tokens are `text`; the one at `place` is the answer, with its probabilities."""
    told = (model or Model()).choice(request)["logprobs"]["content"][0]["top_logprobs"]
    best = max(told[:4], key=lambda entry: entry["logprob"])["token"].strip("\u0120 \n")
    tokens = [best if k == place else token for k, token in enumerate(text)]
    content = [
        {"token": t, "logprob": -0.1, "top_logprobs": told if k == place else [{"token": t, "logprob": -0.1}]} for k, t in enumerate(tokens)
    ]
    if request.body["max_tokens"] == 1:
        return {**text_choice(tokens[0], "length"), "logprobs": {"content": content[:1]}}
    return {**text_choice("".join(tokens)), "logprobs": {"content": content}}


@pytest.mark.parametrize(
    ("text", "place"),
    [(["**", "1", "**"], 1), (["Answer", ":", " 1"], 2), (['{"', "answer", '":', " ", "1", "}"], 4), (["The ", "first: ", "1", "."], 2)],
)
def test_probabilities_are_read_where_the_answer_stands(text, place, capsys):
    model = Model()

    def answer(request):
        return completion(within(text, place, request)) if request.body else model(request)

    with serve(answer) as server, serve(Model()) as plain:
        judge = judge_of(server)
        assert "inside a text" in capsys.readouterr().out and "logprobs-within" in judge.version
        asked = many(6)
        np.testing.assert_allclose(judge.answer(asked).scores, judge_of(plain).answer(asked).scores, atol=1e-9)
        assert len(chats(server)) == 2 + 12  # one request an order


def test_a_model_that_writes_sentences_gets_room_for_them(capsys):
    model = TextModel()

    def answer(request):
        if not request.body:
            return model(request)
        said = f"Both show a shape. {'It is fine. ' * 10}\nAnswer: {model.choice(request)['message']['content']}"
        return completion(text_choice(said) if request.body["max_tokens"] > 100 else text_choice(said[:60], "length"))

    with serve(answer) as server:
        judge = judge_of(server, samples=1)
        assert "answers in sentences: an answer gets 256 tokens" in capsys.readouterr().out and "samples1-room256" in judge.version
        assert judge.answer(questions((9, 0))).missing == [""]


# ---- thinking


def thinking(model, silent, budget, style):
    """A server whose model thinks for `budget` tokens, unless `silent(body)`."""

    def answer(request):
        if not request.body or silent(request.body):
            return model(request)
        said = model.choice(request)["message"]["content"].strip("\u0120 \n")
        room = request.body.get("max_tokens") or request.body.get("max_completion_tokens")
        full = room < budget
        if style == "tags":
            choice = text_choice(
                "<think>Image 1 is red" if full else f"<think>Image 2 is 1</think>\n\n{said}", "length" if full else "stop"
            )
        elif style == "400" and full:
            return bad("Could not finish the message because max_tokens or model output limit was reached. Please try again.")
        else:
            choice = text_choice(None if full else said, "length" if full else "stop")
            choice["message"]["reasoning_content" if style == "parsed" else "reasoning"] = "Okay, image 2"
        return completion(choice)

    return answer


SWITCHES = {
    "openai": lambda body: body.get("reasoning_effort") == "none",
    "older": lambda body: body.get("reasoning_effort") == "minimal",
    "template": lambda body: body.get("chat_template_kwargs") == {"enable_thinking": False},
}


@pytest.mark.parametrize("style", ["tags", "parsed", "openrouter", "400"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_thinking_is_turned_off_where_the_server_can(switch, style, capsys):
    with serve(thinking(Model(), SWITCHES[switch], 100, style)) as server, serve(Model()) as plain:
        judge = judge_of(server)
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and "thinks before it answers, which is turned off by" in told and "\n" not in judge.version
        asked = many(4)
        np.testing.assert_array_equal(judge.answer(asked).scores, judge_of(plain).answer(asked).scores)
        assert all(SWITCHES[switch](body) for body in chats(server)[-8:])


@pytest.mark.parametrize("style", ["tags", "parsed", "400"])
def test_thinking_that_cannot_be_turned_off_gets_room(style, capsys):
    with serve(thinking(TextModel(), lambda body: False, 1000, style)) as server:
        judge = judge_of(server, samples=1)
        assert "in up to 4096 tokens each time" in capsys.readouterr().out
        found = judge.answer(questions((9, 0), (0, 9)))
        np.testing.assert_allclose(found.scores, np.array([[1, -1], [-1, 1]]) * math.log(3))
        assert {body["max_tokens"] for body in chats(server)[-4:]} == {4096}


@pytest.mark.parametrize("style", ["tags", "parsed", "400"])
def test_thinking_without_end_is_said_at_once_with_what_to_set(style):
    with serve(thinking(TextModel(), lambda body: False, 9000, style)) as server:
        with pytest.raises(UserError, match=r"thinks for longer than 4096 tokens.*give --server\.answer_tokens 16384") as caught:
            judge_of(server)
        assert len(chats(server)) < 12 and "when the server works again" not in str(caught.value)
        assert judge_of(server, samples=1, answer_tokens=10000).answer(questions((9, 0))).missing == [""]


def test_a_server_that_refuses_the_switches_is_asked_without(capsys):
    inner = thinking(TextModel(), lambda body: False, 1000, "parsed")
    switches = {"reasoning_effort", "chat_template_kwargs"}
    with serve(
        lambda r: bad("Unrecognized request argument supplied: reasoning_effort") if switches & set(r.body or {}) else inner(r)
    ) as server:
        assert judge_of(server, samples=1).dialect == Dialect(top=None, room=4096)


def test_an_answer_that_thought_too_long_is_missing_with_the_reason_and_not_the_servers_fault():
    """Only one pair makes it think for longer than there is room."""
    model, quick = TextModel(), thinking(TextModel(), lambda body: False, 1000, "parsed")
    slow = thinking(model, lambda body: False, 9000, "parsed")
    with serve(lambda r: slow(r) if r.body and "prompt 1" in r.text else quick(r)) as server:
        found = judge_of(server, samples=2, failures=1).answer(questions((9, 0), (9, 0), (0, 9)))
    assert found.missing == ["", "none of 2 answers was 1 or 2 (it said 'nothing: its room was used up')", ""]
    assert found.extra["failed"] == [False, False, False]


def test_a_model_that_never_says_1_or_2_stops_the_run_early():
    with serve(lambda r: completion(logprob_choice({"The": 0.9})) if r.body else Model()(r)) as server:
        judge = judge_of(server, failures=5)
        with pytest.raises(UserError, match=r"answered none of the first pairs with 1 or 2 .*--vlm\.prompt.*--server\.failures 50"):
            judge.answer(many(60))
        assert len(chats(server)) < 12
