"""Adapted judges: symmetry and cross-fitting first, then the way back to temperature, what is learned, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from dedpo_diffusion.labels import adaptation
from dedpo_diffusion.labels.adapt_words import adapt_sentences
from dedpo_diffusion.labels.adaptation import Group, Taught, adapt, choose, compare, fit_weights, mean_and_error
from dedpo_diffusion.labels.calibration import HeldOut, calibrate

N = 400
STATISTICS = ["brightness", "contrast", "detail"]


@pytest.fixture(scope="module", autouse=True)
def few_inner_folds():
    """Nothing here depends on their number, nor on that of resamples, and each costs time."""
    before = adaptation.INNER, adaptation.RESAMPLES
    adaptation.INNER, adaptation.RESAMPLES = 5, 60
    yield
    adaptation.INNER, adaptation.RESAMPLES = before


def world(seed=0, n=N, labelled=80, clutter=-1.5):
    """A judge that sees content and likes detail a little; people see content too, and mind detail by `clutter`."""
    rng = np.random.default_rng(seed)
    content, statistics = rng.normal(size=n), rng.normal(size=(n, 3))
    score = 3 * (content + 0.5 * statistics[:, 2] + 0.3 * rng.normal(size=n))
    likely = expit(1.5 * content + clutter * statistics[:, 2])
    z = (rng.random(n) < likely).astype(float)
    human = np.where(np.isin(np.arange(n), rng.permutation(n)[:labelled]), z, np.nan)
    groups = Group("scores", ["clip"], score[:, None]), [Group("statistics", STATISTICS, statistics)]
    return *groups, human, [f"prompt {k}" for k in rng.integers(0, 2 * n // 3, n)], likely


def made(scores, others, human, prompts, **options):
    return adapt(scores, others, human, prompts=prompts, **options)


@pytest.fixture(scope="module")
def taught():
    scores, others, human, prompts, likely = world()
    return scores, others, human, prompts, likely, made(scores, others, human, prompts)


# ---- symmetry


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "a third of all"])
def test_swapped_images_flip_labels_exactly(taught, kind):
    scores, others, human, prompts, _, before = taught
    labelled = ~np.isnan(human)
    rows = {"labelled": np.flatnonzero(labelled)[[3]], "unlabelled": np.flatnonzero(~labelled)[[5]], "a third of all": np.arange(0, N, 3)}
    turn = np.where(np.isin(np.arange(N), rows[kind]), -1.0, 1.0)
    swapped = [Group(group.name, group.columns, turn[:, None] * group.values) for group in (scores, *others)]
    after = made(swapped[0], swapped[1:], np.where(turn < 0, 1 - human, human), prompts)
    assert before.adapted and after.adapted
    np.testing.assert_array_equal(after.log_odds, turn * before.log_odds)


def test_equal_images_are_undecided_and_scales_do_not_matter(taught):
    scores, others, human, prompts, _, before = taught
    blank = int(np.flatnonzero(np.isnan(human))[0])
    alike = [Group(group.name, group.columns, group.values * (np.arange(N) != blank)[:, None]) for group in (scores, *others)]
    found = made(alike[0], alike[1:], human, prompts)
    assert found.adapted and found.log_odds[blank] == 0 and found.probability[blank] == 0.5
    scaled = [Group(group.name, group.columns, group.values * (2.0**k)) for k, group in ((3, scores), (-5, others[0]))]
    after = made(scaled[0], scaled[1:], human, prompts)
    np.testing.assert_allclose(after.log_odds, before.log_odds, atol=1e-9)


def test_a_group_counts_as_a_whole_however_many_columns_tell_it(taught):
    scores, (statistics,), human, prompts, _, before = taught
    twice = Group("statistics", [*STATISTICS, *(f"{name} again" for name in STATISTICS)], np.tile(statistics.values, 2))
    after = made(scores, [twice], human, prompts)
    assert after.adapted and after.report["l2"] == before.report["l2"]
    np.testing.assert_allclose(after.probability, before.probability, atol=1e-5)


def test_weights_are_the_least_of_the_penalised_loss():
    rng = np.random.default_rng(1)
    x, z, w = rng.normal(size=(50, 3)), rng.random(50), rng.uniform(0.5, 2, 50)
    [found] = fit_weights(x, z, w, [2.0])

    def loss(b):
        odds = x @ b
        return np.sum(w / w.mean() * (np.logaddexp(0, odds) - z * odds)) + b @ b  # strength / 2

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(found, best, atol=1e-5)


# ---- cross-fitting


@pytest.mark.slow
def test_an_answer_never_moves_its_own_pair_nor_its_fold(taught):
    scores, others, human, prompts, _, before = taught
    labelled = np.flatnonzero(~np.isnan(human))
    moved = 0
    for row in labelled[:: len(labelled) // 4]:
        changed = human.copy()
        changed[row] = 1 - changed[row]
        after = made(scores, others, changed, prompts)
        assert after.adapted
        fold = (before.fold == before.fold[row]) & ~np.isnan(human)
        assert fold[row]
        np.testing.assert_array_equal(after.log_odds[fold], before.log_odds[fold])
        same = np.array([prompt == prompts[row] for prompt in prompts]) & ~np.isnan(human)
        np.testing.assert_array_equal(after.log_odds[same], before.log_odds[same])
        moved += int((after.log_odds != before.log_odds).sum())
    assert moved > N  # and it does move others


def test_pairs_of_one_prompt_share_their_fold(taught):
    _, _, human, prompts, _, before = taught
    folds = {}
    for prompt, fold, answer in zip(prompts, before.fold, human, strict=True):
        if not np.isnan(answer):
            folds.setdefault(prompt, set()).add(int(fold))
    assert all(len(found) == 1 for found in folds.values()) and set.union(*folds.values()) == set(range(5))


# ---- never worse than temperature by a standard error of its own cross-validation


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_features_that_say_nothing_change_little(seed):
    scores, others, human, prompts, _ = world(seed, clutter=0.75)  # people mind detail just as the judge does
    noise = Group("statistics", STATISTICS, np.random.default_rng(seed + 50).normal(size=(N, 3)))
    found = made(scores, [noise], human, prompts)
    plain = calibrate(scores.values, human, groups=prompts)
    report = found.report
    assert found.adapted == (report["log_loss"]["difference"]["value"] < report["gain_se"])
    assert report["log_loss"]["difference"]["value"] < 0.02
    assert np.mean(np.abs(found.probability - plain.probability)) < 0.1


def test_a_judge_that_cannot_be_taught_keeps_its_temperature_labels():
    scores, others, human, prompts, _ = world(1)
    said = np.where(np.isnan(human), scores.values[:, 0] > 0, human > 0.5)
    scores = Group("scores", ["clip"], 2.0 * said[:, None] - 1)  # right wherever people answered
    found = made(scores, others, human, prompts)
    plain = calibrate(scores.values[:, 0], human, groups=prompts)
    assert not found.adapted
    for name in ("probability", "log_odds", "fold"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    assert "so these are the labels of clip with a temperature" in adapt_sentences(found.report)[0]


@pytest.mark.slow
def test_forty_answers_teach(monkeypatch):
    """They rarely prove by a standard error that a group helps; over draws of the answers they help all the same."""
    monkeypatch.setattr(adaptation, "RESAMPLES", 2)  # for intervals that are not looked at
    better = []
    for seed in range(4):
        scores, others, human, prompts, likely = world(seed, labelled=40)
        taught, plain = (made(scores, groups, human, prompts).probability for groups in (others, []))
        better.append(np.mean((taught - likely) ** 2) - np.mean((plain - likely) ** 2))
    assert np.mean(better) < -0.01 and max(better) < 0.01


@pytest.mark.parametrize(("features", "small"), [(3, True), (20, True), (21, False)])
def test_small_groups_stay_unless_they_hurt_and_large_ones_must_help(features, small):
    rng = np.random.default_rng(features)
    verdicts = set()
    for strength in (0.0, 0.4, 3.0):
        x, judge = rng.normal(size=(80, features)), rng.normal(size=(80, 1))
        z = (rng.random(80) < expit(judge[:, 0] + strength * x[:, 0])).astype(float)
        sample = Taught([judge, x], z, np.ones(80), np.arange(80))
        entry = choose(sample, ["scores", "more"], 0)[2][1]
        edge = entry["se"] if small else -entry["se"]
        assert entry["admitted"] == (entry["difference"] < edge)
        verdicts.add(entry["admitted"])
    assert verdicts == ({True} if features == 3 else {True, False})


def test_held_out_figures_are_paired_and_those_of_the_labels(taught):
    _, _, human, _, likely, before = taught
    rows, report = ~np.isnan(human), before.report
    p = before.probability[rows]
    loss = -np.mean(np.where(human[rows] == 1, np.log(p), np.log1p(-p)))
    assert report["log_loss"]["adapt"]["value"] == pytest.approx(loss)
    losses = report["log_loss"]
    assert losses["difference"]["value"] == pytest.approx(losses["adapt"]["value"] - losses["temperature"]["value"])
    assert losses["difference"]["ci"][0] < losses["difference"]["value"] < losses["difference"]["ci"][1] < 0
    assert report["agreement"]["adapt"]["value"] == pytest.approx(np.mean((p > 0.5) == (human[rows] > 0.5)))
    others = ~rows
    assert np.mean((before.probability[others] - likely[others]) ** 2) < 0.03
    assert json_ready(report)


def json_ready(report):
    import json

    return json.dumps(report, allow_nan=False)


# ---- what is learned


def test_only_groups_that_help_are_admitted(taught):
    scores, others, human, prompts, _, before = taught
    noise = Group("embeddings", [f"clip component {k}" for k in range(24)], np.random.default_rng(9).normal(size=(N, 24)))
    found = made(scores, [*others, noise], human, prompts)
    log = {entry["group"]: entry for entry in found.report["groups"]}
    assert log["statistics"]["admitted"] and not log["embeddings"]["admitted"]
    assert log["statistics"]["difference"] < -log["statistics"]["se"] and "standard error" in log["embeddings"]["why"]
    np.testing.assert_array_equal(found.log_odds[np.isnan(human)], before.log_odds[np.isnan(human)])


@pytest.mark.slow
def test_ratios_tell_how_much_more_people_mind_than_the_judge():
    """People mind detail by -1 where content moves them by 1; the judge by -.5: 2.0 times as much. And the words for it."""
    rng = np.random.default_rng(3)
    n = 4000
    content, statistics = rng.normal(size=n), rng.normal(size=(n, 3))
    score = content - 0.5 * statistics[:, 2]
    human = (rng.random(n) < expit(2 * (content - statistics[:, 2]))).astype(float)
    found = adapt(Group("scores", ["pick"], score[:, None]), [Group("statistics", STATISTICS, statistics)], human, seed=1)
    detail = next(entry for entry in found.report["features"] if entry["name"] == "detail")
    assert detail["ratio"] == pytest.approx(2.0, abs=0.15) and detail["ratio_ci"][0] < 2 < detail["ratio_ci"][1]
    words = adapt_sentences(found.report)
    low, high = detail["ratio_ci"]
    wanted = (
        f"People favour the plainer image (less detail) {detail['ratio']:.1f} times as much as pick does (95 %: {low:.1f} to {high:.1f})."
    )
    assert wanted in words
    turned = dataclasses.replace(found, report=found.report | {"features": [detail | {"ratio": -1.0, "judge": -detail["judge"]}]})
    assert "People favour the plainer image (less detail), and pick favours the busier image (more detail)." in adapt_sentences(
        turned.report
    )


def test_an_adversarial_judge_is_turned_round_if_asked_and_a_silent_one_left_out():
    scores, others, human, prompts, likely = world(4)
    both = Group("scores", ["contrary", "silent"], np.column_stack([-scores.values[:, 0], np.zeros(N)]))
    found = made(both, others, human, prompts, invert=True)
    assert found.adapted and found.report["left_out"] == ["silent"] and found.report["judges"] == ["contrary"]
    assert found.report["contrary"] == [] and np.mean((found.probability > 0.5) == (likely > 0.5)) > 0.75
    assert adapt_sentences(found.report)[0].startswith("silent gives both images of every pair the same score")


def test_a_judge_that_people_contradict_counts_for_nothing():
    """The labels are those of the statistics alone, as if the judge were random noise with no weight."""
    scores, others, human, prompts, _ = world(4)
    contrary = Group("scores", ["contrary"], -scores.values)
    found = made(contrary, others, human, prompts)
    assert found.report["contrary"] == ["contrary"]
    judge = next(entry for entry in found.report["features"] if entry["name"] == "contrary")
    assert judge["weight"] == 0 and any(entry["weight"] for entry in found.report["features"])
    again = made(Group("scores", ["contrary"], -3 * scores.values**3), others, human, prompts)
    np.testing.assert_allclose(again.log_odds, found.log_odds, atol=1e-9)
    assert "contrary agrees with people no more often than a coin and counts for nothing here" in adapt_sentences(found.report)[0]


@pytest.mark.slow
def test_soft_labels_count_as_both_outcomes_and_propensities_reach_the_fit(taught):
    scores, others, human, prompts, _, before = taught
    soft = np.where(np.arange(N) % 2 == 0, human, 0.8 * human + 0.1)
    assert not np.allclose(made(scores, others, soft, prompts).log_odds, before.log_odds)
    weights = np.random.default_rng(2).uniform(1, 6, N)
    weighted = made(scores, others, human, prompts, weights=weights)
    assert weighted.report["weighted"] and not np.allclose(weighted.log_odds, before.log_odds)
    np.testing.assert_allclose(made(scores, others, human, prompts, weights=np.full(N, 3.0)).log_odds, before.log_odds, atol=1e-7)


def test_a_standard_error_goes_by_prompts():
    values, w = np.array([1.0, 1.0, -1.0, -1.0]), np.ones(4)
    assert mean_and_error(values, w, np.arange(4)) == (0.0, pytest.approx(np.sqrt(4 / 3 / 4)))
    assert mean_and_error(values, w, np.array([0, 0, 1, 1]))[1] == pytest.approx(1.0)


def test_shares_go_by_prompts_and_their_sentence_tells_intervals():
    rng = np.random.default_rng(0)
    human, odds, prompts = (rng.random(30) < 0.7).astype(float), rng.normal(0.5, 1, 30), np.arange(30)
    once = compare(HeldOut(human, np.ones(30), prompts, 0), odds, odds + 0.3)
    human, odds, prompts = (np.repeat(values, 40) for values in (human, odds, prompts))
    copies = compare(HeldOut(human, np.ones(1200), prompts, 0), odds, odds + 0.3)
    for key in ("temperature", "adapt"):
        assert copies["agreement"][key]["ci"] == pytest.approx(once["agreement"][key]["ci"], abs=0.02)  # clusters count C / (C - 1)
        assert all(entry["ci"][1] - entry["ci"][0] > 0.3 for entry in copies["reliability"][key])
    told = f"{once['agreement']['adapt']['value']:.1%} (95 %: {once['agreement']['adapt']['ci'][0]:.1%} to"
    report = once | {"adapted": True, "n_human": 30, "temperature_of": "clip", "left_out": [], "contrary": [], "features": [], "groups": []}
    assert told in adapt_sentences(report | {"weighted": False})[0]


def test_choosing_sees_its_sample_alone():
    scores, others, human, _, _ = world(6)
    rows = np.flatnonzero(~np.isnan(human))
    sample = Taught([scores.values[rows], others[0].values[rows]], human[rows], np.ones(len(rows)), np.arange(len(rows)))
    used, strength, log = choose(sample, ["scores", "statistics"], 0)
    assert used == [0, 1] and strength > 0 and [entry["admitted"] for entry in log] == [True, True]
    assert choose(sample, ["scores", "statistics"], 0)[1:] == (strength, log)


# ---- what cannot be used


def test_what_cannot_be_used_is_refused():
    scores, others, human, prompts, _ = world()
    few = np.where(np.cumsum(~np.isnan(human)) <= 19, human, np.nan)
    with pytest.raises(ValueError, match="there are 19 human labels, and adapting a judge takes at least 20"):
        made(scores, others, few, prompts)
    with pytest.raises(ValueError, match="all 80 human labels are 1"):
        made(scores, others, np.where(np.isnan(human), np.nan, 1.0), prompts)
    with pytest.raises(ValueError, match="no judge prefers any image to another"):
        made(Group("scores", ["clip"], np.zeros((N, 1))), others, human, prompts)
    holes = scores.values.copy()
    holes[3] = np.nan
    with pytest.raises(ValueError, match="clip is missing for 1 of 400 pairs"):
        made(Group("scores", ["clip"], holes), others, human, prompts)
    with pytest.raises(ValueError, match="lies outside"):
        made(scores, others, np.where(np.isnan(human), np.nan, 2 * human), prompts)


def test_few_prompts_make_no_intervals_but_labels():
    scores, others, human, _, _ = world()
    found = made(scores, others, human, [f"prompt {k % 8}" for k in range(N)])
    assert all(entry["ci"] is None for entry in found.report["features"]) and np.isfinite(found.log_odds).all()
    assert adapt_sentences(found.report)


@pytest.mark.slow
def test_a_million_pairs_take_little_time_and_memory():
    """Fits see the labelled pairs alone; the others are predicted in blocks. Measured in a process of its own."""
    import subprocess
    import sys

    code = """
import resource, time
import numpy as np
from dedpo_diffusion.labels.adaptation import Group, adapt
rng, n = np.random.default_rng(0), 1_000_000
x = rng.normal(size=(n, 8)).astype(np.float32)
score = rng.normal(size=(n, 1))
z = (rng.random(n) < 1 / (1 + np.exp(-(score[:, 0] - x[:, 4])))).astype(float)
human = np.where(rng.random(n) < 0.002, z, np.nan)
began = time.perf_counter()
groups = Group("scores", ["clip"], score), Group("statistics", [f"s{k}" for k in range(8)], x)
found = adapt(groups[0], groups[1:], human, prompts=[f"p{k % 300_000}" for k in range(n)])
assert found.adapted and np.mean((found.probability > 0.5) == (z > 0.5)) > 0.7
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 300 and gigabytes < 2, done.stdout
