"""The journal of answers: what was put is there for the next process, whatever a kill left of the last line."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest

from dedpo_diffusion.judges.journal import Journal, Reading
from support.servers import Model, judge_of, many, serve

READINGS = [Reading(0.5, 0.9, prompt_tokens=3), Reading(word="1"), Reading(refused="refused: no"), Reading(said='"\n\u2028ü')]


def same(a: Reading, b: Reading | None) -> bool:
    return b is not None and repr(a) == repr(b)  # NaN is not equal to itself


def test_what_was_put_is_there_again(tmp_path):
    journal = Journal(tmp_path / "j")
    for k, reading in enumerate(READINGS):
        journal.put((f"p\n{k}", k % 2, k), reading)
    for held in (journal, Journal(tmp_path / "j")):
        assert all(same(reading, held.get((f"p\n{k}", k % 2, k))) for k, reading in enumerate(READINGS))
        assert held.get(("p", 0, 0)) is None


@pytest.mark.parametrize("cut", range(1, 200, 9))
def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, cut):
    journal = Journal(tmp_path / "j")
    journal.put(("a", 0, 0), READINGS[0])
    whole = len((tmp_path / "j").read_bytes())
    journal.put(("b", 0, 0), READINGS[1])
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[: whole + min(cut, len(data) - whole - 2)])
    again = Journal(tmp_path / "j")
    assert same(READINGS[0], again.get(("a", 0, 0))) and again.get(("b", 0, 0)) is None
    again.put(("c", 1, 0), READINGS[2])
    last = Journal(tmp_path / "j")
    assert same(READINGS[0], last.get(("a", 0, 0))) and same(READINGS[2], last.get(("c", 1, 0))) and len(last.held) == 2


def test_threads_share_it(tmp_path):
    journal = Journal(tmp_path / "j")

    def put(thread: int) -> None:
        for k in range(50):
            journal.put((f"{thread}", 0, k), replace(READINGS[0], logit=float(k)))

    threads = [threading.Thread(target=put, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = Journal(tmp_path / "j").held
    assert len(held) == 400 and all(reading.logit == key[2] for key, reading in held.items())
    journal.settle()
    assert not (tmp_path / "j").exists() and math.isnan(Reading().logit)


def test_a_settled_journal_holds_the_pairs_that_failed_at_no_further_cost(tmp_path):
    journal = Journal(tmp_path / "j")
    for pair in "abc":
        journal.put((pair, 0, 0), READINGS[0])
    journal.settle({"b", "d"})
    for held in (journal, Journal(tmp_path / "j")):
        assert list(held.held) == [("b", 0, 0)] and same(replace(READINGS[0], prompt_tokens=0), held.get(("b", 0, 0)))


@pytest.mark.parametrize("kept", [1, 5, 11, 12])
def test_answers_of_the_journal_are_those_that_were_given_and_are_not_asked_again(tmp_path, kept):
    asked = many(6)
    with serve(Model()) as server:
        judge = judge_of(server)
        whole = Journal(tmp_path / "whole")
        first = judge.answer_with(asked, whole)
        part = Journal(tmp_path / "part")
        for key in list(whole.held)[:kept]:
            part.put(key, whole.held[key])
        before = len(server.requests)
        second = judge.answer_with(asked, part)
        assert len(server.requests) - before == 12 - kept
        assert second.scores.tobytes() == first.scores.tobytes() and second.extra == first.extra
