"""People's votes as a scorer of `dedpo compare`: what counts, the numbers, agreement, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.compare import compare, main
from dedpo_diffusion.evaluation.comparison.intervals import rate_interval
from support.samples import write_samples
from support.scores import BASE, CLUSTERS, put_scores, settings

# one answer to each of the 12 pairs: seven for the arm, two ties, three for the base
ANSWERS = np.array([1, 1, 1, 0.5, 1, 1, 0, 0, 1, 1, 0.5, 0])


def put_votes(base, arm, *answers, name="ann"):
    """votes/NAME.parquet as `dedpo vote BASE ARM` leaves it. An answer: row of the index, rater, preferred, and maybe repeat."""
    of_base, of_arm = score.read_index(base), score.read_index(arm)
    rows = [
        {
            "file_base": of_base[row]["file"], "file": of_arm[row]["file"], "prompt_index": of_arm[row]["prompt_index"],
            "seed": of_arm[row]["seed"], "rater": rater, "preferred": float(preferred), "repeat": bool(repeat),
        }
        for row, rater, preferred, *repeat in answers
    ]  # fmt: skip
    metadata = {"base_images": score.images_digest(base, of_base), "arm_images": score.images_digest(arm, of_arm)}
    (arm / "votes").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), arm / "votes" / f"{name}.parquet")


@pytest.fixture
def arms(tmp_path):
    values = {"base": BASE, "dull": BASE, "tuned": BASE + 0.1 * np.where(np.arange(12) < 9, 1, -1)}
    return [put_scores(write_samples(tmp_path / name), truth=v) for name, v in values.items()]


def test_people_are_a_scorer_with_the_numbers_of_the_interval_functions(arms):
    put_votes(arms[0], arms[2], *((k, "ann", a) for k, a in enumerate(ANSWERS)))
    found = compare(settings(arms))
    assert found["scorers"]["people"] == {"version": "votes", "kind": "people", "role": "held_out", "held_out": True}
    entry = found["arms"]["tuned"]["by_scorer"]["people"]
    share = rate_interval(ANSWERS, CLUSTERS, resamples=500)
    assert entry["gain_over_base"]["mean"] == pytest.approx(4 / 12) and entry["gain_over_base"]["p"] == pytest.approx(share.p)
    np.testing.assert_allclose(entry["gain_over_base"]["ci"], [2 * share.low - 1, 2 * share.high - 1])
    wins = rate_interval(ANSWERS, CLUSTERS, resamples=500)
    np.testing.assert_allclose([entry["win_rate_vs_base"]["mean"], *entry["win_rate_vs_base"]["ci"]], [wins.mean, wins.low, wins.high])
    assert entry["n"] == 12
    assert "people" not in found["arms"]["dull"]["by_scorer"] and found["arms"]["dull"]["people"] is None
    # Holm: two scorers, so the smaller p doubles
    p = {name: e["gain_over_base"] for name, e in found["arms"]["tuned"]["by_scorer"].items()}
    assert min(e["p_holm"] for e in p.values()) == pytest.approx(2 * min(e["p"] for e in p.values()))


def test_repetitions_and_second_answers_are_left_out_and_raters_averaged(arms):
    """Row 0: ann 1 (again 0, repeated 0), bob 0.5: 0.75. Row 5: bob 0. The rest nobody saw."""
    put_votes(arms[0], arms[2], (0, "ann", 1), (0, "ann", 0, True), (5, "bob", 0), (0, "bob", 0.5))
    put_votes(arms[0], arms[2], (0, "ann", 0), (7, "ann", 1, True), name="later")
    entry = compare(settings(arms))["arms"]["tuned"]
    assert entry["by_scorer"]["people"]["gain_over_base"]["mean"] == pytest.approx((0.5 - 1) / 2)
    assert entry["by_scorer"]["people"]["win_rate_vs_base"]["mean"] == 0.5 and entry["by_scorer"]["people"]["n"] == 2
    said = entry["people"]
    assert (said["answers"], said["pairs"], said["raters"]) == (3, 2, ["ann", "bob"])
    assert said["agreement"]["pairs"] == 1 and said["agreement"]["raw"]["value"] == 0.0


def test_pairs_of_two_same_pictures_are_ties_that_nobody_was_asked_about(arms):
    put_votes(arms[0], arms[2], (0, "ann", 1), (4, "", 0.5), (6, "", 0.5))
    entry = compare(settings(arms))["arms"]["tuned"]
    assert entry["by_scorer"]["people"]["gain_over_base"]["mean"] == pytest.approx(1 / 3) and entry["by_scorer"]["people"]["n"] == 3
    assert (entry["people"]["answers"], entry["people"]["pairs"], entry["people"]["raters"]) == (1, 1, ["ann"])
    put_votes(arms[0], arms[2], (4, "", 0.5), (6, "", 0.5))
    assert compare(settings(arms))["arms"]["tuned"]["people"] is None


def test_agreement_between_people_and_with_scorers(arms):
    """truth rises in rows 0 to 8 and falls in 9 to 11: of rows 2 to 11 people decide eight, and it agrees on 2 4 5 8 and 11."""
    everyone = [(k, who, a) for k, a in enumerate(ANSWERS) for who in ("ann", "bob") if k >= 2]
    put_votes(arms[0], arms[2], *everyone)
    said = compare(settings(arms))["arms"]["tuned"]["people"]
    assert said["agreement"]["raw"]["value"] == 1.0 and said["agreement"]["alpha"]["value"] == pytest.approx(1.0)
    share = said["with_scorers"]["truth"]
    assert share["mean"] == pytest.approx(5 / 8) and share["n"] == 8 and share["ci"][0] < 5 / 8 < share["ci"][1]


def test_votes_follow_their_images_when_an_index_is_reordered(arms):
    put_votes(arms[0], arms[2], *((k, "ann", a) for k, a in enumerate(ANSWERS)))
    before = compare(settings(arms))
    rows = score.read_index(arms[2])[::-1]
    scores = {row["file"]: row["score"] for row in score.read_scores(arms[2], rows)}
    pq.write_table(pa.Table.from_pylist(rows), arms[2] / "index.parquet")
    put_scores(arms[2], truth=[scores[row["file"]] for row in rows])
    after = compare(settings(arms))
    assert after["arms"] == before["arms"]


def test_few_prompts_all_won_are_no_certainty():
    """As many answers as prompts: the score of 6 of 6 is (1 - 0.5) / sqrt(0.25 / 6) = 2.45, of which Student's t of 5 has p 0.058."""
    for prompts, p in ((2, 0.392), (6, 0.058), (8, 0.0253)):
        assert rate_interval(np.ones(2 * prompts), np.repeat(np.arange(prompts), 2), resamples=500).p == pytest.approx(p, abs=1e-3)


def test_people_may_be_primary_for_the_arms_they_judged(arms):
    put_votes(arms[0], arms[2], *((k, "ann", 1) for k in range(12)))
    found = compare(settings(arms, primary="people"))
    told = "On people, tuned and base cannot be told apart: gain +1.000 (95 % interval -0.048 to +1.000)"
    assert found["verdict"].startswith(told)
    assert "; dull cannot be ranked, for want of votes. " in found["verdict"] and "of 2 arms" not in found["verdict"]
    assert "not compared" not in found["verdict"] and "gain_over_base" not in found["arms"]["dull"]
    put_votes(arms[0], arms[1], *((k, "bob", 0.5) for k in range(4, 12)))
    found = compare(settings(arms, primary="people"))
    assert found["differences"]["tuned_minus_dull"]["mean"] == 1.0
    assert "not distinguishable from dull (+1.000, -0.591 to +2.000)" in found["verdict"]  # four prompts that all say the same


def test_votes_of_one_prompt_are_told_and_have_no_interval(arms):
    put_votes(arms[0], arms[2], (0, "ann", 1), (1, "ann", 0))
    found = compare(settings(arms))
    assert found["notes"] == ["People judged images of one prompt only of tuned, which says nothing about other prompts."]
    assert "people" not in found["scorers"] and "people" not in found["arms"]["tuned"]["by_scorer"]
    assert found["arms"]["tuned"]["people"]["pairs"] == 2
    with pytest.raises(UserError, match="--primary people: no votes on these images of two prompts or more; run `dedpo vote"):
        compare(settings(arms, primary="people"))


def test_a_scorer_of_that_name_is_refused(arms):
    for folder in arms:
        put_scores(folder, people=BASE)
    put_votes(arms[0], arms[2], (0, "ann", 1), (4, "ann", 0))
    with pytest.raises(UserError, match="scorer named 'people', which stands for people's votes"):
        compare(settings(arms, held_out=[]))


def test_people_as_primary_leave_images_to_the_first_shared_scorer(arms, tmp_path):
    """The base's own first scorer is one that no other folder has."""
    for folder in arms:
        index = score.read_index(folder)
        names = ("lone", "truth") if folder == arms[0] else ("truth",)
        score.write_scores(
            folder, index, [{**row, "scorer": name, "version": "1", "score": 0.1 * k} for name in names for k, row in enumerate(index)]
        )
    put_votes(arms[0], arms[2], *((k, "ann", 1) for k in range(12)))
    assert main([*map(str, arms), "--out", str(tmp_path / "r.html"), "--resamples", "200", "--primary", "people"]) == 0
