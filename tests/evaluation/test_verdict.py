"""The words of a comparison: verdict, roles, and every rule of over-optimisation; and how often these are false alarms."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedpo_diffusion.evaluation.comparison import verdict
from dedpo_diffusion.evaluation.comparison.intervals import Interval, estimates
from support.comparing import gains, interval, narrowed, results

ROLES = {"judge": "made", "eye": "held", "people": "held"}


def warned(roles=ROLES, spread=None, **means):
    found = results(roles, next(iter(roles)), arm=gains(**means), spread={"arm": spread or {}})
    return verdict.warnings(found, "arm")


# ---- over-optimisation


@pytest.mark.parametrize(
    ("means", "losers"), [({"eye": -0.05, "people": 0.0}, "eye"), ({"eye": 0.05, "people": -0.2}, "people"), ({"eye": -0.05}, "eye")]
)
def test_a_judge_that_rises_while_others_fall(means, losers):
    (text,) = warned(judge=0.3, **means)
    assert text.startswith("Looks over-optimised: it rises on judge (+0.300), which made its labels, and falls on " + losers)


def test_a_scorer_of_unknown_role_counts_where_people_fall():
    (text,) = warned({"clip": "unknown", "people": "held"}, clip=0.3, people=-0.2)
    assert "rises on clip (+0.300), which is not known to be held out, and falls on people (-0.200, -0.210 to -0.190)" in text


def test_a_judge_that_rises_alone_while_images_grow_alike():
    spread = narrowed(dino=-0.05, clip=0.0)
    (text,) = warned(judge=0.3, eye=0.0, people=0.0, spread=spread)
    assert text.startswith("Looks over-optimised")
    assert text.endswith("images of one prompt are less diverse by dino (-0.050, -0.060 to -0.040).")
    (alone,) = warned({"judge": "made"}, judge=0.3, spread=spread)
    assert "and no scorer here is held out" in alone
    for otherwise in (narrowed(dino=-0.05, clip=0.05), narrowed(dino=0.0), {}):
        (text,) = warned(judge=0.3, eye=0.0, spread=otherwise)
        assert text.startswith("Better only on what it was trained by: it rises on judge (+0.300), which made its labels")
        assert warned({"judge": "made"}, judge=0.3, spread=otherwise) == []


def test_better_only_on_the_judge_needs_corrected_evidence():
    assert warned(judge=0.3, eye=0.0, people=0.0)[0].endswith(
        "no scorer that is held out (eye +0.000, -0.010 to +0.010 and people +0.000, -0.010 to +0.010)."
    )
    assert warned(judge=Interval(0.3, 0.01, 0.59, 0.04), eye=0.0, people=0.0) == []


@pytest.mark.parametrize(
    "means",
    [
        {"judge": 0.3, "eye": 0.05, "people": 0.0},  # confirmed by one that is held out
        {"judge": -0.3, "eye": -0.05, "people": -0.1},  # worse, not over-optimised
        {"judge": 0.0, "eye": -0.05, "people": 0.0},
        {"judge": 0.0, "eye": 0.05, "people": 0.1},
    ],
)
def test_what_is_no_sign(means):
    assert warned(**means, spread=narrowed(dino=-0.05)) == []


def test_false_alarms_of_all_rules_together_are_at_most_the_stated_share():
    """1,000 comparisons of models that do not differ: two judges, two held-out scorers, two embedders; each takes half of its
    variance from what they share. At most 2.5 %, and three Monte Carlo errors (1.5 points)."""
    replications, clusters = 1000, np.repeat(np.arange(50), 2)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(100, 1, replications))
    columns = (rng.normal(size=(100, 6, replications)) + shared).reshape(100, -1)
    found = estimates(columns, clusters, resamples=1000)
    every = [found.interval(k) for k in range(6 * replications)]
    roles = {"a": "made", "b": "made", "c": "held", "d": "held"}
    alarms = 0
    for k in range(replications):
        of = every[k::replications]
        spread = {name: {"diversity_minus_base": entry.as_dict()} for name, entry in zip("xy", of[4:], strict=True)}
        alarms += bool(warned(roles, spread, **dict(zip("abcd", of[:4], strict=True))))
    assert 0 < alarms <= (0.025 + 0.015) * replications


def test_opposed_scorers_raise_no_more_false_alarms():
    """One judge and one held-out scorer that falls as the judge rises, 1,000 times; bound as above. Uncorrected rises: 5 %."""
    values = np.random.default_rng(1).normal(size=(100, 1000))
    found = estimates(values, np.repeat(np.arange(50), 2), resamples=500)
    alarms = 0
    for k in range(1000):
        rise = found.interval(k)
        fall = Interval(-rise.mean, -rise.high, -rise.low, rise.p)
        alarms += bool(warned({"a": "made", "b": "held"}, a=rise, b=fall)) + bool(warned({"a": "made", "b": "held"}, a=fall, b=rise))
    assert 0 < alarms / 2 <= (0.025 - 0.005) * 1000  # both directions of 1,000 draws; half of 5 % are rises of the judge


@pytest.mark.parametrize("spread", [None, narrowed(dino=-0.05)])
def test_a_rise_that_correction_does_not_leave_is_no_alarm(spread):
    assert warned(judge=Interval(0.3, 0.01, 0.59, 0.04), eye=0.0, people=0.0, spread=spread) == []
    assert warned(judge=Interval(0.3, 0.01, 0.59, 0.04), eye=Interval(-0.3, -0.59, -0.01, 0.04), spread=spread) == []


# ---- roles


def write_targets(folder, judge, version=None, **more):
    """A targets' report as `dedpo merge` leaves it, and the judge's labels beside it."""
    (folder / "targets").mkdir(parents=True)
    (folder / "labels").mkdir()
    if version:
        pq.write_table(pa.table({"pair_id": ["a"], "judge_version": [version]}), folder / "labels" / f"{judge}.parquet")
    path = folder / "targets" / "mix.json"
    path.write_text(json.dumps({"judge": judge, "judges": [{"name": judge}] if judge else None, **more}))
    return path


VERSIONS = {"pickscore": "pickscore-07-logit", "hps": "hps-2.1"}


@pytest.mark.parametrize(
    ("judge", "version", "held_out", "expected"),
    [
        (None, None, [], ("held_out", "held_out")),  # people alone made the labels
        ("pickscore", None, [], ("made_labels", "held_out")),
        ("pickscore", "pickscore-07-logit temperature 1.0", ["pickscore"], ("made_labels", "held_out")),
        ("machine", "pickscore-07-logit temperature 1.0", [], ("made_labels", "held_out")),  # labels named otherwise
        ("machine", "pickscore-07-logit-b temperature 1.0", [], ("held_out", "held_out")),
        (
            "adapt",
            "calibrated adapt of clip-1 temperature 2.0 + pickscore-07-logit temperature 1.0 on human ab12",
            [],
            ("made_labels", "held_out"),
        ),
    ],
)
def test_roles_by_the_targets_report(tmp_path, judge, version, held_out, expected):
    found, notes = verdict.roles(VERSIONS, held_out, [write_targets(tmp_path, judge, version)], {}, False)
    assert (found["pickscore"], found["hps"]) == expected
    assert notes == [f"{name} is called held out, yet it is a judge of the targets mix." for name in held_out]


def test_roles_without_a_report_that_names_judges(tmp_path):
    assert verdict.roles(VERSIONS, ["hps"], [], {}, False)[0] == {"pickscore": "unknown", "hps": "held_out"}
    (tmp_path / "old.json").write_text('{"sentences": []}')
    assert set(verdict.roles(VERSIONS, [], [tmp_path / "old.json"], {}, False)[0].values()) == {"unknown"}


# ---- the verdict


def told(primary, arm, roles=ROLES, **others):
    found = results(roles, primary, arm=arm, **others)
    found["arms"]["arm"]["warnings"] = verdict.warnings(found, "arm")
    return verdict.verdict(found)


def test_the_verdict_goes_by_the_primary_interval_and_names_what_survives():
    """The primary p is 0.04 and 0.08 after correction for three scorers: planned, so it counts; eye's 0.04 does not."""
    close = Interval(0.3, 0.01, 0.59, 0.04)
    text = told("people", gains(judge=0.3, eye=close, people=close))
    assert text.startswith("On people, arm is better than base: gain +0.300 (95 % interval +0.010 to +0.590), win rate 50.0%")
    assert "After Holm's correction for 3 scorers the difference on judge (+0.300) remains, that on eye does not." in text
    assert told("eye", gains(judge=0.0, eye=0.3, people=0.0)).endswith("On judge or people no difference survives Holm's correction.")
    assert told("eye", gains(eye=0.3), {"eye": "held"}).endswith("win rate 50.0% (40.0% to 60.0%).")


def test_the_verdict_says_who_judges_and_ends_with_the_warning():
    text = told("judge", gains(judge=0.3, eye=-0.05, people=0.0))
    assert text.startswith("On judge, which made the training labels, arm is better than base")
    assert text.endswith("and falls on eye (-0.050, -0.060 to -0.040), which had no part in its training.")
    text = told("clip", gains(clip=0.0), {"clip": "unknown"})
    assert text.startswith("On clip, arm and base cannot be told apart: gain")
    assert "Unknown whether clip made the training labels: give --targets or --held_out." in text


def test_the_largest_of_several_gains_says_what_choosing_explains():
    """p = 0.03 of the largest of two arms: by chance in 6 % of comparisons. Of clear gains, and of one arm, nothing is said."""
    slight = Interval(0.3, 0.02, 0.58, 0.03)
    text = told("eye", gains(eye=slight), {"eye": "held"}, other=gains(eye=0.0))
    assert "(the largest gain of 2 arms reaches that by chance with a probability of 0.06)" in text
    assert "by chance" not in told("eye", gains(eye=0.3), {"eye": "held"}, other=gains(eye=0.0))
    assert "by chance" not in told("eye", gains(eye=slight), {"eye": "held"})


def test_small_scales_have_as_many_decimals_as_they_need():
    """Gains of a thousandth: two digits of the narrowest interval, in every sentence."""
    small, lost = (Interval(sign * 0.0005, sign * 0.0005 - 0.0001, sign * 0.0005 + 0.0001, 0.001) for sign in (1, -1))
    text = told("judge", gains(judge=small, eye=lost), {"judge": "made", "eye": "held"})
    assert "gain +0.00050 (95 % interval +0.00040 to +0.00060)" in text and "the difference on eye (-0.00050) remains" in text
    assert "it rises on judge (+0.00050), which made its labels, and falls on eye (-0.00050, -0.00060 to -0.00040)" in text
    assert "eye (-0.00050, -0.00060 to -0.00040)" in warned({"judge": "made", "eye": "held"}, judge=small, eye=lost)[0]
    assert "+0.00050" in noted(a=small, b=lost)[0] and "-0.00050" in noted(a=small, b=lost)[0]


# ---- categories


def noted(arm_gain=0.0, **parts):
    categories = {"arm": {name: {"eye": {"gain_over_base": entry.as_dict() | {"p": entry.p}}} for name, entry in parts.items()}}
    return verdict.category_notes(results({"eye": "held"}, "eye", arm=gains(eye=arm_gain), categories=categories))


def test_categories_in_opposite_directions_are_told():
    up, down, level = interval(0.2), interval(-0.1), interval(0.0)
    assert noted(a=up, b=down, c=level) == [
        "On eye, arm is better on a (+0.200) and worse on b (-0.100) (after Holm's correction for 3 categories)."
    ]
    assert noted(0.1, a=level, b=down)[0].startswith("On eye, arm is better on the whole, and worse on b (-0.100)")
    assert noted(-0.1, a=up)[0].startswith("On eye, arm is worse on the whole, and better on a (+0.200)")


def test_categories_that_agree_or_are_unclear_are_not_told():
    weak = Interval(-0.3, -0.59, -0.01, 0.04)  # 0.08 after correction for another unclear one
    one_prompt = Interval(-0.3, np.nan, np.nan)
    level = interval(0.0)
    for parts in ({"a": interval(0.2), "b": interval(0.1)}, {"a": interval(0.2), "b": weak, "c": level}, {"b": one_prompt}, {}):
        assert noted(0.1, **parts) == []
