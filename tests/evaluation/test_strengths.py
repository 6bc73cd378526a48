"""The best strength is chosen without the prompts that it is judged on; so picking the best of equals gains nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.evaluation.comparison.intervals import mean_interval
from dedpo_diffusion.evaluation.comparison.strengths import at_chosen, choose, cross_choose, halves, is_judged, means

STRENGTHS = (0.5, 1.0, 2.0, 3.0)


def draw(seed, *, prompts=12, each=2, strengths=4):
    """Gains (S, N) and the prompts (N,) of the rows."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(strengths, prompts * each)), np.repeat(np.arange(prompts), each)


# ---- the halves


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 1000))
def test_halves_keep_prompts_whole_and_are_equal(prompts, each, seed):
    clusters = np.repeat([f"prompt {k}" for k in range(prompts)], each)
    half = halves(clusters, seed)
    of = [set(half[clusters == prompt]) for prompt in np.unique(clusters)]
    assert all(len(sides) == 1 for sides in of)
    assert abs(sum(sides == {0} for sides in of) - sum(sides == {1} for sides in of)) <= 1
    order = np.random.default_rng(seed).permutation(len(clusters))
    np.testing.assert_array_equal(halves(clusters[order], seed), half[order])  # a prompt's half is the prompt's own


def test_halves_are_a_draw():
    clusters = np.arange(40)
    assert len({halves(clusters, seed).tobytes() for seed in range(10)}) == 10
    assert 0.35 < np.mean([halves(clusters, seed)[0] for seed in range(400)]) < 0.65
    with pytest.raises(ValueError, match="halves need two prompts, and there are 1"):
        halves(np.zeros(4), 0)


# ---- the choice


def test_known_values():
    """Half 0 is best at 3 and half 1 at 0.5: each is judged at what the other chose."""
    half = np.array([0, 0, 1, 1])
    values = np.array([[1.0, 2, 9, 9], [3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 4, 2]])
    assert cross_choose(values, STRENGTHS, half) == (0, 3)
    np.testing.assert_array_equal(at_chosen(values, (0, 3), half), [1, 2, 4, 2])
    assert choose(values, STRENGTHS) == 0  # 21, 12, 6, 16


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1e6, 1e6))
def test_a_half_is_judged_at_a_strength_that_it_did_not_choose(seed, scale):
    """Whatever the scores of a half are, the strength at which it is judged stays; and its own choice is the other half's alone."""
    values, clusters = draw(seed)
    half = halves(clusters, 0)
    chosen = cross_choose(values, STRENGTHS, half)
    for side in (0, 1):
        changed = values.copy()
        changed[:, half == side] = scale * np.random.default_rng(seed + 1).normal(size=changed[:, half == side].shape)
        assert cross_choose(changed, STRENGTHS, half)[side] == chosen[side]


def test_a_half_that_changes_its_mind_moves_the_other():
    values, clusters = draw(3)
    half = halves(clusters, 0)
    for wanted in range(4):
        values[:, half == 0] = 0.0
        values[wanted, half == 0] = 1.0
        assert cross_choose(values, STRENGTHS, half)[1] == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_rows_and_of_strengths_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    values, clusters = draw(seed)
    values = np.round(values, 1)  # equal means happen
    values[2] = values[1][rng.permutation(values.shape[1])]  # and here they surely do
    half = halves(clusters, 5)
    before = [STRENGTHS[k] for k in cross_choose(values, STRENGTHS, half)]
    kept = at_chosen(values, cross_choose(values, STRENGTHS, half), half)
    rows, arms = rng.permutation(len(clusters)), rng.permutation(4)
    moved = values[arms][:, rows]
    names = [STRENGTHS[k] for k in arms]
    chosen = cross_choose(moved, names, halves(clusters[rows], 5))
    assert [names[k] for k in chosen] == before
    np.testing.assert_array_equal(at_chosen(moved, chosen, half[rows]), kept[rows])


def test_of_equal_strengths_the_smallest_is_taken():
    values = np.tile([0.1, 0.2, 0.3, 0.7], (3, 1))
    assert choose(values, (2.0, 0.5, 1.0)) == 1
    values[0] = values[0][::-1]  # another order of summation
    assert choose(values, (0.5, 2.0, 1.0)) == 0 and len(set(means(values))) == 1


def test_rows_that_nobody_judged_are_left_out():
    values = np.array([[1.0, np.nan, 1, 1], [np.nan, 2, 0, np.nan]])
    np.testing.assert_array_equal(means(values), [1, 1])
    half, clusters = np.array([0, 0, 1, 1]), np.arange(4)
    assert cross_choose(values, (1.0, 2.0), half) == (0, 1) and is_judged(values, half, clusters)
    np.testing.assert_array_equal(at_chosen(values, (0, 1), half), [1, np.nan, 0, np.nan])
    values[1, 2] = np.nan  # strength 2 is judged in half 0 alone
    assert not is_judged(values, half, clusters)
    with pytest.raises(ValueError, match="a strength was judged on no image of these"):
        cross_choose(values, (1.0, 2.0), half)
    assert not is_judged(np.ones((2, 4)), half, np.array([0, 0, 0, 0]))


# ---- what it is worth


def simulated(seed, truth, *, alike: float, prompts: int = 48, each: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Gains of strengths whose true means are `truth`: `alike` is the share of a prompt's variance that all strengths share."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(1, prompts)), rng.normal(size=(len(truth), prompts))
    of_prompt = np.repeat(np.sqrt(alike) * shared + np.sqrt(1 - alike) * own, each, axis=1)
    noise = 0.5 * rng.normal(size=of_prompt.shape)
    return np.asarray(truth)[:, None] + of_prompt + noise, np.repeat(np.arange(prompts), each)


def replicate(truth, alike, count, **options):
    """Of each replication: the cross-fitted gain, the naive one, what the choice is really worth, and whether the interval holds that."""
    found = []
    for seed in range(count):
        values, clusters = simulated(seed, truth, alike=alike, **options)
        half = halves(clusters, seed)
        chosen = cross_choose(values, np.arange(len(truth)), half)
        worth = np.where(half == 0, truth[chosen[0]], truth[chosen[1]]).mean()
        interval = mean_interval(at_chosen(values, chosen, half), clusters, resamples=300, seed=seed)
        found.append((interval.mean, means(values).max(), worth, not interval.excludes(worth)))
    return np.array(found).T


def test_the_best_of_five_equals_gains_nothing_when_judged_fairly_and_much_when_not():
    fair, naive, _, _ = replicate(np.zeros(5), 0.0, 400)
    error = fair.std() / np.sqrt(len(fair))
    assert abs(fair.mean()) < 3 * error
    assert naive.mean() > 0.15 and naive.mean() > 20 * error


def test_what_is_estimated_is_what_the_choice_is_worth():
    """A real best strength, hard to find: the estimate is unbiased for the mean of the two choices, which is below the best of all."""
    truth = np.array([0.0, 0.1, 0.15, 0.1, 0.0])
    fair, naive, worth, _ = replicate(truth, 0.5, 400)
    assert abs((fair - worth).mean()) < 3 * (fair - worth).std() / np.sqrt(len(fair))
    assert worth.mean() < truth.max() < naive.mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "alike", "least"),
    [
        (np.zeros(5), 0.8, 0.92), (np.zeros(5), 0.0, 0.89), (np.array([0, 0.1, 0.15, 0.1, 0]), 0.8, 0.93),
        (np.array([0, 0.3, 0.6, 0.3, 0]), 0.8, 0.93),
    ],
)  # fmt: skip
def test_the_interval_holds_what_the_choice_is_worth(truth, alike, least):
    """95 % where a best strength stands out; less where all are alike, since each choice knows the images that the other is judged on."""
    *_, held = replicate(truth, alike, 1500)
    assert least <= held.mean() < 0.965
