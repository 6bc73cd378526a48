"""What replies in OpenAI's protocol say: answers in sentences, markdown and JSON, refusals of every kind, and what is left open."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.openai_answers import read_text
from support.servers import Model, Reply, completion, judge_of, logprob_choice, questions, text_choice

TEXTS = [
    ('{"answer": 1}', "1"),
    ('```json\n{"answer": "2"}\n```', "2"),
    ('{"winner": "image_1", "reason": "image 2 is blurry"}', "1"),
    ('{"better_image": "Image 2", "score_1": 1, "score_2": 2}', "2"),
    ('{"reason": "1 and 2 are alike", "choice": 2}', "2"),
    ('{"answer": 1, "choice": 2}', ""),
    ('{"answer": "both"}', ""),
    ('{"answer": true}', ""),
    ('{"x": 1}', "1"),
    ("**Answer:** 1", "1"),
    ("The answer is **2**.", "2"),
    ("Answer: Image 1\n\nImage 2 is blurry, image 1 is not.", "1"),
    ("Image 1 is sharper than image 2.\n\n**1**", "1"),
    ("2\n\nThe second image follows the prompt; image 1 does not.", "2"),
    ("### Verdict: `2`", "2"),
    (r"So it is \boxed{1}, as 2 is worse", "1"),
    ("The better image is 1, since image 2 is blurry", "1"),
    ("Final answer: 1. No: final answer: 2", ""),
    ("The answer is 1 or 2", ""),
    ("Image 1 is better than image 2", ""),
    ("1. Image one is red\n2. Image two is blue", ""),
    ("I would pick neither 1 nor 2", ""),
    ("I'm sorry, I can't help with that.", ""),
    ("<think>1? No, 2.</think>1", "1"),
    ("image 1 or 2?</think>\n2", "2"),
    ("<think>It is 1", ""),
]


@pytest.mark.parametrize(("text", "meant"), TEXTS)
def test_answers_inside_texts(text, meant):
    assert read_text(text_choice(text)) == meant


@pytest.mark.parametrize(("text", "meant"), [t for t in TEXTS if "one" not in t[0]])
def test_the_other_answer_is_read_alike(text, meant):
    """Trading 1 and 2 everywhere trades the answer."""
    trade = str.maketrans("12", "21")
    assert read_text(text_choice(text.translate(trade))) == meant.translate(trade)


def test_text_in_parts_and_text_that_was_cut():
    assert read_text({"message": {"content": [{"type": "text", "text": "Answer: "}, {"type": "text", "text": "2"}]}}) == "2"
    assert read_text(text_choice("1\n\nBecause the first", "length")) == "1"
    assert read_text(text_choice("Answer: 1", "length")) == ""  # or 12


# ---- refusals


def refusal(text: str = "I cannot help with that.") -> Reply:
    choice = text_choice(None)
    choice["message"]["refusal"] = text
    return completion(choice)


REFUSALS = {
    "the field": refusal(),
    "the field beside text": Reply(
        {"choices": [{"message": {"content": "", "refusal": "no"}, "finish_reason": "stop", "logprobs": {"content": []}}]}
    ),
    "finish reason": completion(text_choice("", "content_filter")),
    "finish reason, no message": Reply({"choices": [{"index": 0, "finish_reason": "SAFETY"}]}),
    "with token probabilities": completion({**logprob_choice({"1": 0.9}), "finish_reason": "content_filter"}),
    "azure": Reply(
        {"error": {"code": "content_filter", "message": "The response was filtered due to the prompt triggering a policy"}}, 400
    ),
    "openai": Reply({"error": {"message": "Your request was rejected as a result of our safety system."}}, 400),
    "only in the code": Reply({"error": {"message": "Bad request", "code": "content_policy_violation"}}, 400),
    "forbidden": Reply({"error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_CSAM"}, 403),
    "moderation": Reply({"error": {"message": "The input was flagged", "code": 403, "metadata": {"reasons": ["sexual"]}}}, 403),
    "legal": Reply({"error": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}}, 451),
    "as the server's failure": Reply({"error": {"message": "litellm.ContentPolicyViolationError: content policy"}}, 500),
    "blocked prompt": Reply({"choices": [], "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}),
    "inside": Reply({"error": {"message": "Provider returned error: content moderation", "code": 400}}),
    "in the choice": Reply({"choices": [{"error": {"message": "blocked by content filter"}, "message": {"content": ""}}]}),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("texts", [False, True])
def test_a_refusal_is_a_missing_answer_and_no_failure_of_the_server(server, text_server, texts, kind):
    """Asked once, in one order; the run goes on though a single failure would stop it."""
    running, naps = text_server if texts else server, []
    judge, good = judge_of(running, failures=1, samples=3, naps=naps), running.answer
    running.requests.clear()
    running.answer = lambda request: REFUSALS[kind] if "prompt 1" in request.text or "prompt 2" in request.text else good(request)
    found = judge.answer(questions((9, 0), (9, 0), (9, 0), (0, 9)))
    assert [bool(why) for why in found.missing] == [False, True, True, False] and not any(found.extra["failed"])
    assert all(why.startswith(("refused: ", "status ")) and "\n" not in why for why in found.missing if why)
    assert np.isnan(found.scores[1:3]).all() and naps == []
    assert sum("prompt 1" in request.text for request in running.requests) == 1


def test_a_server_that_refuses_plain_pictures_says_so_at_first_contact(server):
    server.answer = lambda request: refusal() if request.body else Model()(request)
    with pytest.raises(
        UserError, match=r"will not even compare two plain pictures \(refused: I cannot help with that\.\); take another model"
    ):
        judge_of(server)


def test_words_of_policy_do_not_hide_a_wrong_key(server):
    judge = judge_of(server)
    server.answer = lambda request: Reply({"error": {"message": "Incorrect API key provided"}}, 401)
    with pytest.raises(UserError, match="valid key"):
        judge.answer(questions((9, 0)))


def test_an_empty_account_stops_at_once_and_a_busy_one_does_not(server):
    naps = []
    judge, good = judge_of(server, naps=naps), Model()
    busy = [Reply({"error": {"message": "You exceeded your current quota, retry in 34s", "code": 429}}, 429, {"retry-after-ms": "3400"})]
    server.answer = lambda request: busy.pop() if busy else good(request)
    assert judge.answer(questions((9, 0))).missing == [""] and naps == [3.4]
    server.answer = lambda request: Reply({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, 429)
    with pytest.raises(UserError, match="status 429: You exceeded your current quota; the account behind the key must be paid up"):
        judge.answer(questions((9, 0)))
    assert naps == [3.4]
