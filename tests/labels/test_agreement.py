"""Agreement statistics: textbook values, the libraries' numbers, invariances, and intervals that cover."""

from __future__ import annotations

import json

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Votes
from dedpo_diffusion.labels.agreement import _alpha, _raw, judge_agreement, vote_summary

FEW = {"resamples": 200}


def votes(rows, **extra):
    """(pair, label_0, rater) or (pair, label_0, rater, votes) rows."""
    ids, labels, raters, *counts = (list(column) for column in zip(*rows, strict=True))
    return Votes(
        [str(pair) for pair in ids], np.array(labels, dtype=float), np.array(counts[0] if counts else [1] * len(ids)), raters, extra
    )


def between(rows, **options):
    return vote_summary(votes(rows), **{**FEW, **options})["between"]


def two_raters(table):
    """Votes of two people from a 3 x 3 table of counts, categories 0, 0.5, 1."""
    rows, pair = [], 0
    for i, line in enumerate(table):
        for j, count in enumerate(line):
            for _ in range(count):
                rows += [(pair, i / 2, "ann"), (pair, j / 2, "bob")]
                pair += 1
    return rows


# ---- known values


def test_a_textbook_table():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7; D_o = 0.3, D_e = 2 * 45 * 55 / (100 * 99) = 0.5, alpha = 0.4."""
    found = between(two_raters([[15, 0, 10], [0, 0, 0], [5, 0, 20]]))
    assert found["raw"]["value"] == pytest.approx(0.7) and found["pairs"] == 50
    assert found["alpha"]["value"] == pytest.approx(0.4) and found["alpha"]["n"] == 50


def test_krippendorffs_alpha_by_hand():
    """Pairs (1, 1), (1, 0), (0, 0) by two people: n = 6, three of each; D_o = 2 / 6, D_e = (36 - 18) / 30 = 0.6, alpha = 4/9."""
    found = between([(0, 1, "a"), (0, 1, "b"), (1, 1, "a"), (1, 0, "b"), (2, 0, "a"), (2, 0, "b"), (3, 1, "a")])
    assert found["alpha"]["value"] == pytest.approx(4 / 9) and found["alpha"]["n"] == 3
    assert found["raw"]["value"] == pytest.approx(2 / 3)


def test_anonymous_counts_enter_raw_agreement_and_alpha():
    rows = [(0, 1, None, 3), (0, 0, None, 1), (1, 0, None, 4)]
    report = vote_summary(votes(rows), **FEW)
    assert report["n_votes"] == report["n_anonymous"] == 8 and report["raters"] == []
    assert report["between"]["raw"]["value"] == pytest.approx((3 * 2 + 4 * 3) / (4 * 3 + 4 * 3))
    assert report["between"]["alpha"]["value"] == pytest.approx(
        krippendorff.alpha(value_counts=[[1, 3], [4, 0]], level_of_measurement="nominal")
    )


# ---- the vectorised forms are the libraries'

TABLES = st.lists(st.tuples(*[st.integers(0, 4)] * 3).filter(lambda row: sum(row) >= 2), min_size=2, max_size=8)


@given(TABLES, st.lists(st.integers(1, 5), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_alpha_is_the_librarys(patterns, counts):
    table, counts = np.array(patterns), np.array(counts[: len(patterns)])
    whole = np.repeat(table, counts, axis=0)
    if np.count_nonzero(whole.any(axis=0)) < 2:
        assert np.isnan(_alpha(table, counts.astype(float)))
        return
    expected = krippendorff.alpha(value_counts=whole[:, whole.any(axis=0)], level_of_measurement="nominal")
    assert _alpha(table, counts.astype(float)) == pytest.approx(expected, abs=1e-9)
    both = _alpha(table, np.stack([counts, counts[::-1]]).astype(float))
    assert both[0] == pytest.approx(expected, abs=1e-9) and both.shape == (2,)


# ---- invariances


def random_votes(seed, pairs=60, raters=("ann", "bob", "eve"), agree=0.7):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, pairs)
    return [(k, float(truth[k] if rng.random() < agree else 1 - truth[k]), name) for k in range(pairs) for name in raters]


@pytest.mark.parametrize("seed", range(3))
def test_names_order_and_sides_do_not_matter(seed):
    rows = random_votes(seed)
    plain = between(rows)
    renamed = between([(pair, label, {"ann": "x", "bob": "a", "eve": "m"}[name]) for pair, label, name in rows])
    shuffled = between([rows[k] for k in np.random.default_rng(seed).permutation(len(rows))])
    turned = between([(pair, 1 - label, name) for pair, label, name in rows])
    for other in (renamed, shuffled, turned):
        for key in ("raw", "alpha"):
            assert other[key]["value"] == pytest.approx(plain[key]["value"])


def test_the_report_is_json_and_follows_its_seed():
    report = vote_summary(votes(random_votes(0)), **FEW)
    assert json.loads(json.dumps(report, allow_nan=False)) == report == vote_summary(votes(random_votes(0)), **FEW)
    assert vote_summary(votes(random_votes(0)), seed=1, **FEW)["between"]["raw"]["ci"] != report["between"]["raw"]["ci"]


# ---- intervals


@pytest.mark.parametrize(("pairs", "raters"), [(150, ("ann", "bob")), (60, ("ann", "bob", "eve", "joe")), (40, ("ann", "bob"))])
def test_intervals_cover(pairs, raters):
    """People who are each right with probability 0.8: two agree with 0.68, and alpha is 0.36."""
    hits = {"raw": 0, "alpha": 0}
    for seed in range(150):
        found = between(random_votes(seed, pairs=pairs, raters=raters, agree=0.8), resamples=400, seed=seed)
        for key, truth in (("raw", 0.68), ("alpha", 0.36)):
            low, high = found[key]["ci"]
            hits[key] += low <= truth <= high
    for key, count in hits.items():
        assert 0.87 <= count / 150 <= 0.995, key


def test_the_first_pairs_have_honest_intervals():
    """One pair, a few, or answers that are all equal: never an interval of no width, nor an error."""
    one = between([(0, 1, "ann"), (0, 0, "bob")])
    assert one["raw"] == {"value": 0.0, "ci": pytest.approx([0.0, 0.7935], abs=1e-4), "n": 1}  # Wilson: q / (1 + q), q = 1.96^2
    few = vote_summary(votes(two_raters([[3, 0, 0], [0, 0, 0], [1, 0, 4]])), **FEW)
    assert few["between"]["raw"]["ci"] == pytest.approx([0.5291, 0.9776], abs=1e-4)  # Wilson, 7 of 8
    assert few["between"]["alpha"]["ci"] is None and "fewer than 20 pairs" in few["sentences"][-1]
    equal = between(two_raters([[20, 0, 0], [0, 0, 0], [0, 0, 20]]))
    assert equal["raw"]["ci"] == pytest.approx([0.9124, 1.0], abs=1e-4)  # Wilson, 40 of 40
    assert equal["alpha"]["value"] == 1.0 and equal["alpha"]["ci"] is None


def test_many_small_draws_make_the_interval_of_one_large_one(monkeypatch):
    rows = random_votes(0, pairs=900)
    plain = between(rows, resamples=1000)["alpha"]["ci"]
    monkeypatch.setattr("dedpo_diffusion.labels.agreement.DRAWN", 1000)
    np.testing.assert_allclose(between(rows, resamples=1000)["alpha"]["ci"], plain, atol=0.02)


# ---- raters


def test_a_lean_to_the_left_and_an_inconsistent_rater_are_found():
    rng = np.random.default_rng(0)
    rows, swapped, repeat, seconds = [], [], [], []

    def say(pair, rater, left, turned, again=False):
        rows.append((pair, float(left != turned), rater))
        swapped.append(turned)
        repeat.append(again)
        seconds.append(2.0 if rater == "ann" else 6.0)

    for pair in range(200):
        turned = bool(rng.random() < 0.5)
        say(pair, "ann", rng.random() < 0.8, turned)  # mostly left, whatever it shows
        say(pair, "bob", (pair % 2 == 0) != turned, turned)  # always the same image
        if pair % 10 == 0:
            say(pair, "ann", rng.random() < 0.8, not turned, again=True)
            say(pair, "bob", (pair % 2 == 0) == turned, not turned, again=True)
    report = vote_summary(votes(rows, swapped=swapped, repeat=repeat, seconds=seconds), **FEW)
    ann, bob = report["raters"]
    assert ann["left"]["ci"][0] > 0.6 and ann["left"]["n"] == 220 and bob["left"]["ci"][0] <= 0.5 <= bob["left"]["ci"][1]
    assert bob["repeats"] == {"value": 1.0, "ci": bob["repeats"]["ci"], "n": 20} and ann["repeats"]["value"] < 0.6
    assert (ann["votes"], ann["seconds"], bob["seconds"]) == (200, 2.0, 6.0)
    assert report["n_votes"] == 400 and report["n_pairs"] == 200
    text = " ".join(report["sentences"])
    assert "ann leans to the left" in text and "bob leans" not in text and "bob answered 100%" in text


def test_a_repetition_is_equal_in_terms_of_images_and_ties_only_equal_ties():
    extra = {"swapped": [False, True, False, True], "repeat": [False, True, False, True]}
    found = vote_summary(votes([(0, 1, "ann"), (0, 1, "ann"), (1, 0.5, "ann"), (1, 1, "ann")], **extra), **FEW)["raters"][0]
    assert found["repeats"]["value"] == 0.5 and found["ties"] == 1
    assert found["left"] == {"value": pytest.approx(1 / 3), "ci": found["left"]["ci"], "n": 3}  # 1 left, 1 right, 1 right


# ---- where there is nothing to say


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(0, 1, "ann"), (1, 0, "ann")], "No pair was answered by two people"),
        ([(0, 1, "ann"), (1, 0, "bob")], "No pair was answered by two people"),
        ([(0, 1, "ann"), (0, 1, "bob"), (1, 1, "ann"), (1, 1, "bob")], "All of these answers are the same"),
        ([(0, 0.7, "ann")], "1 answers are neither 0, 0.5 nor 1"),
    ],
)
def test_what_does_not_exist_is_none_and_said_without_a_warning(rows, words, recwarn):
    report = vote_summary(votes(rows), **FEW)
    assert words in " ".join(report["sentences"]) and not recwarn.list
    json.dumps(report, allow_nan=False)
    assert report["between"]["alpha"]["value"] is None and report["raters"][0]["left"]["value"] is None


def test_no_answers_at_all_are_no_error():
    report = vote_summary(Votes([], np.zeros(0), np.zeros(0, dtype=np.int64), [], {}), **FEW)
    assert report["n_votes"] == report["n_pairs"] == 0 and report["raters"] == []


def test_one_person_twice_is_not_two_people():
    """Ann answers pair 0 three times, first for image 0: against bob's image 1 that is one disagreement."""
    rows = [(0, 1, "ann"), (0, 0, "ann"), (0, 0, "ann"), (0, 0, "bob"), (1, 1, "ann"), (1, 1, "ann")]
    report = vote_summary(votes(rows, repeat=[False, False, True, False, False, False]), **FEW)
    assert report["between"]["pairs"] == 1 and report["between"]["raw"]["value"] == 0.0
    assert report["n_again"] == 2 and "2 answers were given again by the same person" in report["sentences"][-1]
    assert report["raters"][0]["repeats"]["value"] == 0.0  # the repetition is held against the first answer


def test_raw_agreement_of_one_kind_of_pair():
    assert _raw(np.array([[2, 0, 1]]), np.array([4.0])) == pytest.approx(1 / 3)


# ---- judges


def test_judges_agree_where_both_name_an_image():
    human, judge = np.array([1, 0, 1, 0.5, np.nan, 1]), np.array([0.9, 0.2, 0.3, 0.9, 0.9, 0.5])
    found = judge_agreement(human, judge)
    assert (found["value"], found["n"], found["ties"]) == (pytest.approx(2 / 3), 3, 2)
    assert found["bias"]["value"] == pytest.approx(np.mean(judge[[0, 1, 2, 3, 5]] - human[[0, 1, 2, 3, 5]]))
    assert judge_agreement(np.array([np.nan]), np.array([0.5]))["value"] is None
