"""Timesteps by measured gradients: the same mean gradient with less noise, and weights by which every tenth is equally noisy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.dpo.noising import Draws, TimestepDraw, draw
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.dpo.timestep_moments import EVEN, LEAST_ROOT, TimestepMoments, tenth_ends
from support.schedules import STEPS, SmallWorld
from support.steps import backbone, batch

PAIRS = [(0, 1), (2, 3), (4, 5)]
TARGET, WEIGHT = torch.tensor([1.3, 0.2, 0.0], dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def made(gradient: torch.Tensor, *, equal_noise: bool = False, decay: float = 0.9, span: tuple[int, int] = (0, STEPS)) -> TimestepMoments:
    return TimestepMoments(*span, gradient, torch.ones_like(gradient), equal_noise=equal_noise, decay=decay)


def of_steps(world: SmallWorld) -> torch.Tensor:
    """Gradients (pairs, 8, 3) of each pair alone at each timestep."""
    return torch.stack(
        [
            torch.stack([world.gradient([pair], torch.tensor([t]), TARGET[k : k + 1], WEIGHT[k : k + 1]) for t in range(STEPS)])
            for k, pair in enumerate(PAIRS)
        ]
    )


def pieces(moments: TimestepMoments, first: float, last: float) -> list[tuple[int, float]]:
    """The timesteps that shares in [first, last) are mapped to by `quantile`, and the length of each piece of constant timestep."""
    cuts = [0.0, *moments.shares.cumsum(0).tolist()[:-1], 1.0]
    ends = sorted({first, last, *(cut for cut in cuts if first < cut < last)})
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(ends)], dtype=torch.float64)
    return list(zip(moments.quantile(middles).tolist(), [b - a for a, b in pairwise(ends)], strict=True))


@pytest.mark.parametrize("strata", [1, 3])
def test_the_weighted_mean_gradient_over_all_draws_is_the_plain_one(strata):
    """Exactly, over every piece of every stratum on which the timestep is constant; a pair gets each stratum equally often."""
    world = SmallWorld(6)
    each = of_steps(world)
    moments = made(each.square().sum(dim=2).mean(dim=0))
    found = torch.zeros(3, dtype=torch.float64)
    for pair in each:
        for part in range(strata):
            for t, length in pieces(moments, part / strata, (part + 1) / strata):
                found += length * moments.weights[moments.tenth(torch.tensor([t]))] * pair[t] / len(PAIRS)
    torch.testing.assert_close(found, world.plain(PAIRS, TARGET, WEIGHT), rtol=1e-10, atol=1e-12)
    chance = torch.zeros(STEPS, dtype=torch.float64)
    for t, length in pieces(moments, 0.0, 1.0):
        chance[t] += length
    torch.testing.assert_close(chance, moments.shares)  # a tenth is a timestep here
    assert chance.max() / chance.min() > 5


moments_strategy = st.lists(st.floats(1e-8, 1e4), min_size=10, max_size=10).map(lambda values: torch.tensor(values, dtype=torch.float64))


@given(moments_strategy, st.sampled_from([(0, 1000), (100, 117), (3, 13)]))
def test_measured_draws_have_the_least_noise_but_for_the_even_part(gradient, span):
    """Sum of q w^2 G: at most (sum p sqrt G)^2 / (1 - EVEN), which is below the uniform sum p G but for that."""
    moments = made(gradient, span=span)
    q, w, p = moments.shares, moments.weights, moments.even
    assert float(q.sum()) == pytest.approx(1) and float((q * w).sum()) == pytest.approx(1)
    noise, least = (q * w.square() * gradient).sum(), (p * gradient.sqrt()).sum().square()
    assert least * (1 - 1e-9) <= noise <= least / (1 - EVEN) * (1 + 1e-9)
    assert w.max() <= 1 / EVEN * (1 + 1e-9)


@given(moments_strategy, st.sampled_from([(0, 1000), (100, 117)]))
def test_equal_noise_weights_make_every_tenth_as_noisy_as_its_share(gradient, span):
    moments = made(gradient, span=span, equal_noise=True)
    w, p, root = moments.weights, moments.even, gradient.sqrt()
    assert float((p * w).sum()) == pytest.approx(1) and torch.equal(moments.shares, p)
    kept = root >= LEAST_ROOT * (p * root).sum()
    noise = (w.square() * gradient)[kept]
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=1e-9, atol=0)
    assert (w * root <= (w * root)[kept].max() * (1 + 1e-9)).all()  # the others less, as their weights are bounded


@pytest.mark.parametrize(("first", "last"), [(0, 1000), (0, 8), (40, 53), (5, 6)])
def test_tenths_cover_the_range_and_draws_stay_in_theirs(first, last):
    ends = tenth_ends(first, last)
    assert ends[0] == first and ends[-1] == last and (ends.diff() > 0).all() and len(ends) <= 11
    moments = made(torch.linspace(1, 3, len(ends) - 1), span=(first, last))
    t = torch.arange(first, last)
    tenth = moments.tenth(t)
    assert ((ends[tenth] <= t) & (t < ends[tenth + 1])).all()
    drawn = moments.quantile(torch.cat([torch.rand(5000, dtype=torch.float64), torch.tensor([0.0, 1 - 1e-16, 1.0])]))
    assert drawn.min() >= first and drawn.max() < last and set(drawn.tolist()) >= (set(t.tolist()) if last - first < 50 else set())
    counts = torch.bincount(moments.tenth(drawn), minlength=len(tenth.unique())) / len(drawn)
    assert (counts - moments.shares).abs().max() < 4 * (0.25 / 5000) ** 0.5


def test_what_is_followed_does_not_depend_on_how_it_was_drawn():
    """Visits with squares 4 at the first tenth and 1 elsewhere, told with the factor in them: the moments become those, times the gain."""
    t = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0])
    square = torch.where(t == 0, 4.0, 1.0)
    for equal in (False, True):
        moments = made(torch.linspace(1, 8, 8), equal_noise=equal, decay=0.0)
        moments.update(moments.measure(square * moments.factor(t).square(), t))
        torch.testing.assert_close(moments.moments, torch.linspace(1, 8, 8).double() * torch.tensor([4.0] + [1.0] * 7).double())
    slow = made(torch.ones(8), decay=0.75)
    slow.update(slow.measure(square * slow.factor(t).square(), t))
    assert 1 < slow.moments[0] < 4 and torch.allclose(slow.moments[1:], torch.ones(7, dtype=torch.float64))
    before = slow.moments
    slow.update(torch.full((2, 8), torch.inf, dtype=torch.float64))  # a step that overflowed
    assert torch.equal(slow.moments, before)


def test_parts_of_a_step_add_up_and_a_checkpoint_gives_the_same():
    moments, t = made(torch.rand(8) + 0.1), torch.arange(8).repeat(3)
    square = torch.rand(24)
    whole = moments.measure(square, t)
    torch.testing.assert_close(moments.measure(square[:10], t[:10]) + moments.measure(square[10:], t[10:]), whole)
    moments.update(whole)
    again = made(torch.ones(8))
    again.restore(moments.state())
    assert torch.equal(again.moments, moments.moments) and again.report() == moments.report()
    share = torch.rand(100, dtype=torch.float64)
    assert torch.equal(again.quantile(share), moments.quantile(share))


def test_where_nothing_pulls_any_more_draws_are_uniform():
    moments = made(torch.linspace(1, 8, 8), decay=0.0)
    moments.update(moments.measure(torch.zeros(8), torch.arange(8)))
    assert torch.equal(moments.shares, moments.even) and torch.equal(moments.weights, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.zeros(8), torch.full((8,), torch.nan), torch.ones(7)])
def test_moments_that_cannot_be_used(bad):
    with pytest.raises(ValueError, match="above 0"):
        TimestepMoments(0, 8, torch.ones(8), bad, equal_noise=False, decay=0.5)
    with pytest.raises(ValueError, match="decay is 1"):
        made(torch.ones(8), decay=1.0)


def test_draws_keep_their_shares_and_are_placed_anew():
    how = TimestepDraw(0, 1000, "measured", strata=True)
    one = draw(3, 5, 6, (1, 2, 2), timesteps=how, caption_dropout=0.0)
    assert one.share is not None and torch.equal(one.timesteps, how.quantile(one.share))
    assert torch.equal(Draws.join([one.part(0, 2), one.part(2, 6)]).share, one.share)
    moments = made(torch.tensor([100.0] + [1.0] * 9), span=(0, 1000))
    placed = moments.redraw(one)
    assert torch.equal(placed.noise, one.noise) and placed.timesteps.double().mean() < one.timesteps.double().mean()
    assert draw(3, 5, 6, (1, 2, 2), timesteps=TimestepDraw(0, 1000, strata=True), caption_dropout=0.0).share is None


@pytest.mark.parametrize("balance", ["output", "none"])
def test_the_square_of_a_step_is_the_squared_gradient_of_the_predictions(tiny_model, balance):
    model = backbone(tiny_model, trained=True)
    pairs, t, noise = batch()
    kept = []
    real = model.predict

    def keeping(*given, reference=False):
        found = real(*given, reference=reference)
        if not reference:
            found.retain_grad()
            kept.append(found)
        return found

    model.predict = keeping
    result = preference_step(model, pairs, timesteps=t, noise=noise, beta=200.0, balance=balance, timestep_weight=torch.linspace(0.5, 2, 5))
    result.loss.sum().backward()
    torch.testing.assert_close(result.square, kept[0].grad.square().sum(dim=(1, 2, 3, 4)))
