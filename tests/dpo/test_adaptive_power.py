"""The power that follows training: exact at margin 0, its moving average, its state, and what it leaves unbiased."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dedpo_diffusion import merge_labels
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning, Labels, PairBatch, Targets
from dedpo_diffusion.debias import power_cap
from dedpo_diffusion.dpo.adaptive_power import AdaptivePower, Parts, loss_parts, retarget, visited_pairs
from dedpo_diffusion.labels.files import read_targets, write_labels, write_targets
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import merge
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.training.sources import Source
from support.pictures import write_pairs


def labels(n: int = 80, seed: int = 0):
    """Human labels of a third of the pairs, a soft judge that is too sure of itself, and the inverse propensities."""
    rng = np.random.default_rng(seed)
    z = np.where(np.arange(n) < n // 3, (rng.random(n) < 0.5).astype(float), np.nan)
    wrong = rng.random(n) < 0.25
    judge = np.where(np.isnan(z), rng.random(n), np.where(wrong, 1 - z, z)) * rng.uniform(0.8, 1.0, n)
    return z, judge, np.where(np.isnan(z), 0.0, n / (n // 3))


def parts_of(z, judge, h, visit=None) -> Parts:
    return Parts(*(torch.tensor(values, dtype=torch.float64) for values in (z, judge, h, np.ones(len(z)) if visit is None else visit)))


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_retargeting_is_merging_at_that_power(power):
    z, judge, h = labels()
    merged = merge_labels(z, judge, method="dedpo", power=power)
    target, weight = retarget(*(torch.tensor(values) for values in (z, judge, h)), power)
    np.testing.assert_allclose(weight.numpy(), merged.weight, atol=1e-12)
    np.testing.assert_allclose(target.numpy(), merged.target, atol=1e-12)


def test_it_starts_from_the_statistic_of_the_labels_alone_however_pairs_are_visited():
    """Without a step forgotten (decay 0) and at margin 0, one epoch of weighted visits asks for the power that `tuned` fits."""
    z, judge, h = labels()
    fitted = merge_labels(z, judge, method="tuned", max_overshoot=100.0).power
    p = np.random.default_rng(1).dirichlet(np.full(len(z), 5.0))
    adaptive = AdaptivePower(parts_of(z, judge, h, 1 / (len(z) * p)), power=0.5, cap=1.0, decay=0.0)
    start = adaptive.moments.clone()
    c, v, *_ = start.tolist()
    assert c / v == pytest.approx(fitted, rel=1e-9)
    places = np.random.default_rng(2).choice(len(z), 200_000, p=p).tolist()
    sums = adaptive.measure(torch.zeros(len(places)), places)
    np.testing.assert_allclose((sums / sums[3])[:2].numpy(), start[:2].numpy(), rtol=0.03)
    adaptive.update(sums)
    assert adaptive.power == pytest.approx(fitted, abs=0.02)


def test_strong_margins_halve_the_power_and_the_cap_holds():
    z, judge, h = labels()
    everything = list(range(len(z)))
    cap = power_cap(h, 2.0)
    adaptive = AdaptivePower(parts_of(z, judge, h), power=0.5, cap=cap, decay=0.0)
    for size in (0.9, 1.1):
        margins = torch.full((len(z),), size)
        sums = adaptive.measure(margins, everything)
        adaptive.update(sums)
        wanted = min(max(float(sums[0] / sums[1]), 0.0), 1.0)
        assert adaptive.power == pytest.approx(min(wanted if size < 1 else wanted / 2, cap))


def test_the_moving_average_forgets_at_its_decay_and_its_state_is_whole():
    z, judge, h = labels()
    adaptive, twin = (AdaptivePower(parts_of(z, judge, h), power=0.5, cap=1.0, decay=0.9) for _ in range(2))
    before = adaptive.moments.clone()
    sums = adaptive.measure(torch.linspace(-2, 2, len(z)), list(range(len(z))))
    adaptive.update(sums)
    torch.testing.assert_close(adaptive.moments, 0.9 * before + 0.1 * sums / sums[3], rtol=0, atol=1e-15)
    twin.restore(adaptive.state())
    assert twin.power == adaptive.power and torch.equal(twin.moments, adaptive.moments)


def test_a_judge_against_the_people_ends_at_power_zero():
    z, _, h = labels()
    against = np.where(np.isnan(z), 0.5, 1 - z)
    adaptive = AdaptivePower(parts_of(z, against, h), power=0.5, cap=1.0, decay=0.0)
    adaptive.update(adaptive.measure(torch.zeros(len(z)), list(range(len(z)))))
    assert adaptive.power == 0.0


def test_a_batch_gets_the_present_power_and_its_visits_factor():
    z, judge, h = labels()
    visit = np.linspace(0.5, 2, len(z))
    adaptive = AdaptivePower(parts_of(z, judge, h, visit), power=0.4, cap=1.0, decay=0.9)
    nothing = torch.zeros(3)
    batch = PairBatch(torch.zeros(3, 2, 1, 1, 1), Conditioning(torch.zeros(3, 1, 1)), nothing, nothing)
    found = adaptive.apply(batch, [0, 50, 79])
    merged = merge_labels(z, judge, method="dedpo", power=0.4)
    np.testing.assert_allclose(found.weight.numpy(), (merged.weight * visit)[[0, 50, 79]], rtol=1e-6)
    np.testing.assert_allclose(found.target.numpy(), merged.target[[0, 50, 79]], rtol=1e-6)


def test_a_decay_that_never_learns_is_refused():
    with pytest.raises(ValueError, match="decay"):
        AdaptivePower(parts_of(*labels()), power=0.5, cap=1.0, decay=1.0)


# ---- which pairs are visited


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> Path:
    """24 pairs, 12 with human labels, a judge; targets of two folds at power 0.4 ("tuned-fold-0") and at power 0 ("human_only-fold-0")."""
    pairs = write_pairs(tmp_path_factory.mktemp("folds") / "data")
    ids, rng = PairReader(pairs).ids(), np.random.default_rng(0)
    write_labels(pairs, "human", Labels(ids[:12], (rng.random(12) < 0.5).astype(float)))
    write_labels(pairs, "judge", Labels(ids, rng.uniform(0.1, 0.9, 24)))
    assert merge.main([str(pairs), "--method", "tuned", "--power", "0.4", "--folds", "2"]) == 0
    assert merge.main([str(pairs), "--method", "human_only", "--folds", "2"]) == 0
    return pairs


class OneShape(Source):
    """Pairs of one shape that are never asked for."""

    def shapes(self, rows):
        return np.tile((4, 8, 8), (len(rows), 1))

    def load(self, rows, visits, drop_caption):
        raise NotImplementedError

    encode = originals = load


def loaders(pairs: Path, name: str, sampling: str) -> tuple[PairLoader, PairLoader]:
    """With the power of the merge, and with one that follows; nothing is encoded."""
    options = {"targets": name, "seed": 0, "sampling": sampling, "together": 4}
    fixed, adaptive = (PairLoader(PairReader(pairs), OneShape(), adaptive=kind, **options) for kind in (False, True))
    return fixed, adaptive


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
@pytest.mark.parametrize("factor", [1.0, 24 / 7])
def test_at_the_power_of_the_merge_a_power_that_follows_visits_and_weighs_the_same(folds, sampling, factor):
    targets = read_targets(folds, "tuned-fold-0")
    write_targets(folds, "scaled", dataclasses.replace(targets, weight=factor * targets.weight), {})
    fixed, adaptive = loaders(folds, "scaled", sampling)
    assert 0 < len(fixed.rows) < 24 and adaptive.power == 0.4
    assert fixed.rows.tolist() == adaptive.rows.tolist()
    assert fixed.visits.rows(0, 60) == adaptive.visits.rows(0, 60)
    nothing = torch.zeros(len(fixed.rows))
    batch = PairBatch(torch.zeros(len(nothing), 2, 1, 1, 1), Conditioning(torch.zeros(len(nothing), 1, 1)), nothing, nothing)
    found = AdaptivePower(adaptive.parts, power=0.4, cap=1.0, decay=0.9).apply(batch, list(range(len(nothing))))
    torch.testing.assert_close(found.target, fixed.target)
    torch.testing.assert_close(found.weight, fixed.weight)


def test_from_power_0_the_pairs_of_the_judge_are_visited_and_those_of_the_fold_are_not(folds):
    targets = read_targets(folds, "human_only-fold-0")
    fixed, adaptive = loaders(folds, "human_only-fold-0", "importance")
    inside = ~np.isnan(targets.judge)
    assert 0 < len(fixed.rows) < inside.sum() < 24
    assert adaptive.power == 0 and adaptive.rows.tolist() == np.flatnonzero(inside).tolist()
    chance = torch.tensor(adaptive.visits.probability)
    _, weight = retarget(adaptive.parts.human, adaptive.parts.judge, adaptive.parts.inverse, 0.0)
    np.testing.assert_allclose((weight * adaptive.parts.visit * 24 * chance).numpy(), targets.weight[inside], rtol=1e-12)


def made_of(power: float = 0.5) -> Targets:
    """Two labelled pairs, two that only the judge labelled, and one that was left out."""
    z, g = np.array([1.0, 0.0, np.nan, np.nan, np.nan]), np.array([0.8, 0.4, 0.9, 0.2, np.nan])
    h, powers = np.array([2.0, 2.0, 0.0, 0.0, 0.0]), np.array([power] * 4 + [0.0])
    return Targets(list("abcde"), np.full(5, 0.5), h + powers * (1 - h), human=z, judge=g, inverse=h, power=powers)


def test_pairs_that_were_left_out_stay_out_whatever_their_columns_say():
    everyone, file = [True] * 4 + [False], Path("t")
    for power in (0.0, 0.5):
        assert visited_pairs(made_of(power), file, adaptive=True).tolist() == everyone
    strange = dataclasses.replace(made_of(), judge=np.full(5, 0.5), power=np.full(5, 0.5))
    assert visited_pairs(strange, file, adaptive=True).tolist() == everyone  # weight 0 at a power that would give it some
    assert loss_parts(strange, file, np.arange(4))[1] == 0.5
    assert visited_pairs(made_of(0.0), file, adaptive=False).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("power", [0.5, 0.5, 0.5, 0.4], "powers of their own"),
        ("judge", [0.8, np.nan, 0.9, 0.2], "without a judge's label"),
        ("weight", [1.5, 1.5, 0.5, 0.6], "times one number"),
        ("weight", [0.0, 0.0, 0.0, 1.0], "times one number"),
    ],
)
def test_targets_that_a_power_cannot_follow_are_refused(column, values, words):
    with pytest.raises(UserError, match=words):
        loss_parts(dataclasses.replace(made_of(), **{column: np.array([*values, 0.0])}), Path("t"), np.arange(4))
