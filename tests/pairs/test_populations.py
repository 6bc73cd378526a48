"""What is known of pairs of two populations: what tells them apart ignores sides, what teaches a judge changes its sign with them."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.labels.image_statistics import WORDS
from dedpo_diffusion.pairs.populations import Known, even_features, odd_differences, odd_groups, shared_generators, together
from dedpo_diffusion.pairs.shift import carry, measure_shift


def known(n: int, seed: int, *, names: tuple[str, ...] = ("a", "b", "c"), dark: float = 0.0) -> Known:
    """N pairs of random measures, of images `dark` darker."""
    rng = np.random.default_rng(seed)
    statistics = 0.2 + rng.random((n, len(WORDS), 2))
    statistics[:, 0] -= dark
    made = list(names), rng.integers(0, len(names), (n, 2))
    return Known(statistics, made, {"clip": rng.normal(size=(n, 2))}, {"clip": rng.random(n)}, {"clip": rng.normal(size=(n, 2, 3))})


def swapped(given: Known) -> Known:
    names, codes = given.generators or ([], np.zeros((0, 2), int))
    both = {name: value[:, ::-1] for name, value in given.scores.items()}
    embedded = {name: value[:, ::-1] for name, value in given.embeddings.items()}
    return Known(given.statistics[:, :, ::-1], (names, codes[:, ::-1]), both, {k: 1 - v for k, v in given.labels.items()}, embedded)


def test_what_tells_populations_apart_is_blind_to_sides_and_what_teaches_is_not():
    one = known(40, 0)
    other = swapped(one)
    plain, turned = even_features(one), even_features(other)
    assert list(plain) == list(turned) and len(plain) == 2 * (len(WORDS) + 1 + 3) + 3 + 1
    for name in plain:
        np.testing.assert_allclose(turned[name], plain[name], atol=1e-12, err_msg=name)
    for mine, theirs in zip((a := odd_groups(one, ["clip"]))[1] + [a[0]], (b := odd_groups(other, ["clip"]))[1] + [b[0]], strict=True):
        np.testing.assert_allclose(theirs.values, -mine.values, atol=1e-12)
    np.testing.assert_allclose(odd_differences(other)[0], -odd_differences(one)[0], atol=1e-12)
    assert [group.name for group in a[1]] == ["statistics", "generators", "embeddings"]


def test_a_measure_that_some_pairs_lack_and_one_that_never_differs_are_left_out():
    given = known(20, 1)
    given.scores["clip"][3] = np.nan
    given.statistics[:, 6] = 0.5
    found = even_features(given)
    assert "score of clip" not in found and "pixels" not in found and "confidence of clip" in found
    assert "score of clip" not in odd_differences(given)[1]


def test_generators_of_one_population_alone_are_left_out():
    given, labelled = known(6, 0), np.array([True, True, True, False, False, False])
    given.generators[1][:] = [[0, 1], [0, 0], [1, 0], [1, 2], [2, 1], [1, 1]]  # a: labelled alone, c: target alone
    kept, left_out = shared_generators(given, labelled)
    assert kept.generators[0] == ["b"] and left_out == ["a", "c"]
    assert kept.generators[1].tolist() == [[-1, 0], [-1, -1], [0, -1], [0, -1], [-1, 0], [0, 0]]
    np.testing.assert_array_equal(even_features(kept)["images by b"], [1, 0, 1, 1, 1, 2])
    [made] = [group for group in odd_groups(kept, ["clip"])[1] if group.name == "generators"]
    assert made.values[:, 0].tolist() == [-1, 0, 1, 1, -1, 0]


def test_two_folders_are_joined_by_what_both_know():
    one, other = known(5, 0, names=("a", "b")), known(4, 1, names=("b", "c"))
    other.scores["vlm"] = np.zeros((4, 2))
    other.embeddings.clear()
    both = together(one, other)
    assert both.generators[0] == ["a", "b", "c"] and both.statistics.shape == (9, len(WORDS), 2)
    assert set(both.scores) == {"clip"} and both.embeddings == {} and both.labels["clip"].shape == (9,)
    for given, rows in ((one, slice(0, 5)), (other, slice(5, 9))):
        names = np.array(given.generators[0])[given.generators[1]]
        np.testing.assert_array_equal(np.array(both.generators[0])[both.generators[1][rows]], names)
    part = both.at(np.array([8, 0]))
    np.testing.assert_array_equal(part.scores["clip"], both.scores["clip"][[8, 0]])


def test_what_is_carried_has_the_sum_of_the_labelled_pairs_along_its_directions():
    one, other = known(60, 0), known(80, 1, dark=0.15)
    pool, labelled = together(other, one), np.arange(140) >= 80
    shift = measure_shift(pool, labelled, [f"prompt {k % 50}" for k in range(140)], seed=0)
    rng = np.random.default_rng(2)
    human, judge = np.where(labelled, rng.integers(0, 2, 140), np.nan), pool.labels["clip"]
    found = carry(shift, human, judge, np.full(140, 0.6))
    moved = found.target - 0.5 - 0.6 * (judge[~labelled] - 0.5)
    stands = shift.inverse[labelled] - 1
    residual = (human[labelled] - 0.5) - 0.6 * (judge[labelled] - 0.5)
    assert stands.sum() == pytest.approx(80) and found.directions[0] == "the judge's label"
    assert (judge[~labelled] - 0.5) @ moved == pytest.approx((judge[labelled] - 0.5) @ (stands * residual))
    columns, names = odd_differences(shift.known)
    for name in found.directions[1:]:
        column = columns[:, names.index(name)]
        assert column[~labelled] @ moved == pytest.approx(column[labelled] @ (stands * residual)), name
    assert len(found.directions) == min(len(names) + 1, shift.ratio.effective // 4)
