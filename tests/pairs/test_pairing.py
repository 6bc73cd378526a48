"""Pairs among a prompt's images: worked by hand, and RSO's acceptance by its formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dedpo_diffusion.pairs.pairing import acceptance, accepted, paired, told

REWARDS = np.array([0.2, 0.9, 0.5, 0.1])  # four images


@pytest.mark.parametrize(
    ("pairing", "options", "wanted"),
    [
        ("disjoint", {}, [(0, 1), (2, 3)]),
        ("all", {}, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("best_worst", {}, [(1, 3)]),
        # gaps .7 .3 .1 .4 .8 .4; sigmoid(gap / .2) above .85 asks for a gap above .347
        ("threshold", {"temperature": 0.2, "threshold": 0.85}, [(0, 1), (1, 2), (1, 3), (2, 3)]),
        ("threshold", {"temperature": 0.2, "threshold": 0.98}, [(1, 3)]),
        ("threshold", {"temperature": 0.2, "threshold": 0.999}, []),
    ],
)
def test_pairs_worked_by_hand(pairing, options, wanted):
    assert paired(4, pairing, REWARDS, **options) == wanted


def test_equal_rewards_make_no_best_and_no_worst():
    assert paired(3, "best_worst", np.ones(3)) == [] and paired(3, "threshold", np.ones(3), threshold=0.5) == []
    assert paired(3, "best_worst", np.array([1.0, 2.0, 2.0])) == [(0, 1)]


def test_the_pairs_above_a_threshold_are_fewer_the_higher_it_is():
    found = [set(paired(4, "threshold", REWARDS, temperature=0.2, threshold=p)) for p in (0.5, 0.7, 0.9, 0.98)]
    assert all(more > fewer for more, fewer in itertools.pairwise(found))
    assert found[0] == set(paired(4, "all"))


def chances(rewards: np.ndarray, temperature: float) -> dict[tuple[int, ...], float]:
    """How probably the first round accepts each set of images: every set enumerated."""
    p = np.exp((rewards - max(rewards)) / temperature)
    every = [np.array(hits) for hits in itertools.product((False, True), repeat=len(rewards))]
    return {tuple(np.flatnonzero(hits)): float(np.prod(np.where(hits, p, 1 - p))) for hits in every}


@pytest.mark.parametrize("temperature", [0.1, 0.5, 5.0])
def test_acceptance_is_rsos_formula_on_enumerated_rewards(temperature):
    """How often each image is among the accepted of the first round, by its formula and by counting."""
    by_set = chances(REWARDS, temperature)
    assert sum(by_set.values()) == pytest.approx(1)
    each = [sum(chance for hits, chance in by_set.items() if k in hits) for k in range(4)]
    np.testing.assert_allclose(acceptance(REWARDS, temperature), each)
    assert acceptance(REWARDS, temperature)[1] == 1  # the best one always

    rng, rounds = np.random.default_rng(0), 4000
    first = np.zeros(4)
    for _ in range(rounds):
        first[accepted(REWARDS, temperature=temperature, wanted=1, rng=rng)[0]] += 1
    # the first of a round in the images' order: accepted, and none before it
    p = np.array(each)
    wanted = p * np.cumprod([1, *(1 - p[:-1])])
    assert (np.abs(first / rounds - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / rounds) + 1e-9).all()


def test_rejection_sampling_goes_on_until_there_are_enough_and_takes_no_image_twice():
    rng = np.random.default_rng(1)
    for wanted in (2, 4):
        for _ in range(50):
            found = accepted(REWARDS, temperature=0.05, wanted=wanted, rng=rng)
            assert len(found) == len(set(found)) == wanted
    pairs = paired(4, "rso", REWARDS, temperature=0.3, wanted=4, rng=rng)
    assert sorted(itertools.chain(*pairs)) == [0, 1, 2, 3] and all(a < b for a, b in pairs)
    with pytest.raises(ValueError, match="5 images are to be accepted of 4"):
        accepted(REWARDS, temperature=1.0, wanted=5, rng=rng)


def rejection_sampling(rewards: tuple[float, ...], temperature: float, wanted: int) -> dict[tuple[int, ...], float]:
    """How probable each outcome of all rounds is: every set that a round may accept, and for each what later rounds do with the rest."""

    def rounds(left: tuple[int, ...], found: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        if len(found) >= wanted:
            return {found[:wanted]: 1.0}
        outcomes: dict[tuple[int, ...], float] = {}
        for hits, chance in chances(np.array([rewards[k] for k in left]), temperature).items():
            taken = tuple(left[k] for k in hits)
            if chance:  # the best one is always accepted, so each round has fewer left
                for outcome, later in rounds(tuple(k for k in left if k not in taken), found + taken).items():
                    outcomes[outcome] = outcomes.get(outcome, 0) + chance * later
        return outcomes

    return rounds(tuple(range(len(rewards))), ())


def test_all_rounds_of_rejection_sampling_are_as_enumerated():
    """Rewards 0, ln 2, ln 4 at temperature 1: chances 1/4, 1/2, 1; of the first two alone 1/2, 1. By hand for two images:
    (0, 1) 1/4 1/2, (0, 2) 1/4 1/2, (1, 2) 3/4 1/2; only 2 in the first round, 3/8: then (2, 0) 1/2, (2, 1) 1/2."""
    rewards = (0.0, np.log(2), np.log(4))
    exact = rejection_sampling(rewards, 1.0, 2)
    assert {outcome: round(float(chance) * 16, 9) for outcome, chance in exact.items()} == {
        (0, 1): 2, (0, 2): 2, (1, 2): 6, (2, 0): 3, (2, 1): 3,
    }  # fmt: skip
    rng, draws, counted = np.random.default_rng(2), 8000, dict.fromkeys(exact, 0)
    for _ in range(draws):
        counted[tuple(accepted(np.array(rewards), temperature=1.0, wanted=2, rng=rng))] += 1
    for outcome, chance in exact.items():
        assert abs(counted[outcome] / draws - chance) < 4 * np.sqrt(chance * (1 - chance) / draws)


def test_a_high_temperature_accepts_all_alike_and_a_low_one_the_best():
    np.testing.assert_allclose(acceptance(REWARDS, 1e6), 1, atol=1e-5)
    np.testing.assert_allclose(acceptance(REWARDS, 1e-3), [0, 1, 0, 0], atol=1e-6)


def test_what_was_kept_and_why_is_told():
    assert told("threshold", [[(0, 1), (0, 2)], []], 8) == (
        "2 pairs, paired threshold; 3 of 8 images are in one; 1 of 2 prompts have none: no two of their images differ by enough"
    )
    assert told("disjoint", [[(0, 1), (2, 3)]], 4) == "2 pairs, paired disjoint; 4 of 4 images are in one"
