"""Timesteps in strata: the spread of a step is even, and the mean gradient that of independent timesteps."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from dedpo_diffusion.dpo.noising import TimestepDraw, draw, in_strata
from support.schedules import STEPS, SmallWorld

DRAWS = [TimestepDraw(0, STEPS, strata=True), TimestepDraw(0, STEPS, "logit_normal", -0.3, 0.8, strata=True)]


def chances(how: TimestepDraw, points: int = 40320) -> torch.Tensor:
    """How often each of the 8 timesteps comes, by the middles of many equal parts of the distribution."""
    return torch.bincount(how.quantile((torch.arange(points) + 0.5) / points), minlength=STEPS).double() / points


@pytest.mark.parametrize("pairs", [2, 3, 4])
@pytest.mark.parametrize("how", DRAWS, ids=["uniform", "logit_normal"])
def test_the_mean_gradient_over_all_strata_is_the_plain_one(pairs, how):
    """Every order of the strata, and places within them so fine that each stands for as many: 3 strata cut timesteps in two."""
    world = SmallWorld(2 * pairs, seed=pairs)
    both = [(2 * k, 2 * k + 1) for k in range(pairs)]
    target, weight = torch.linspace(-0.5, 1.5, pairs, dtype=torch.float64), torch.linspace(0.5, 2.0, pairs, dtype=torch.float64)
    fine = 8 if how.sampling == "uniform" else 400  # the logit-normal's ends lie anywhere in a stratum
    of = torch.stack([world.gradient(both[:1], torch.tensor([t]), target[:1], weight[:1]) for t in range(STEPS)])
    if how.sampling == "uniform" and pairs <= 3:
        orders, places = list(permutations(range(pairs))), list(product([(k + 0.5) / fine for k in range(fine)], repeat=pairs))
        found = torch.zeros(3, dtype=torch.float64)
        for order, within in product(orders, places):
            t = how.quantile(in_strata(torch.tensor(order), torch.tensor(within, dtype=torch.float64)))
            found += world.gradient(both, t, target, weight)
        torch.testing.assert_close(found / (len(orders) * len(places)), world.plain(both, target, weight), atol=1e-12, rtol=1e-10)
    within = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine  # one pair by itself, over all strata
    t = how.quantile(torch.cat([(part + within) / pairs for part in range(pairs)]))
    torch.testing.assert_close(of[t].mean(dim=0), chances(how, pairs * fine) @ of, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 7, 10, 64])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_step_takes_one_timestep_from_each_equal_part(count, sampling):
    how = TimestepDraw(100, 900, sampling, -0.5, 0.7, strata=True)
    for seed in range(20):
        share = how.shares(count, torch.Generator().manual_seed(seed))
        assert sorted((share * count).long().tolist()) == list(range(count))
        drawn = how.draw(count, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, how.quantile(share)) and drawn.min() >= 100 and drawn.max() < 900
        ends = how.quantile(torch.arange(count + 1, dtype=torch.float64)[:-1] / count)  # where the parts begin
        assert (drawn.sort().values >= ends).all() and (drawn.sort().values[:-1] <= ends[1:]).all()


def test_which_pair_gets_which_stratum_is_random():
    """Over many steps each pair's timesteps fill the range, and the order changes from step to step."""
    how = TimestepDraw(0, 1000, strata=True)
    drawn = torch.stack([draw(5, step, 4, (1, 1, 1), timesteps=how, caption_dropout=0.0).timesteps for step in range(400)])
    assert (drawn.double().mean(dim=0) - 499.5).abs().max() < 4 * 288.7 / 20  # 4 standard errors
    assert ((drawn.sort(dim=1).values // 250) == torch.arange(4)).all()
    assert len({tuple(order) for order in (drawn // 250).tolist()}) == 24


def test_strata_take_noise_from_a_sum_over_a_step():
    """Of a quantity that falls with the timestep, the mean over 16 in strata varies less than a twentieth as much."""
    spread = {}
    for strata in (False, True):
        how = TimestepDraw(0, 1000, strata=strata)
        t = torch.stack([how.draw(16, torch.Generator().manual_seed(seed)) for seed in range(300)]).double()
        spread[strata] = torch.exp(-t / 300).mean(dim=1).var().item()
    assert spread[True] < spread[False] / 20
