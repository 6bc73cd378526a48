"""Strata over stored draws: each pair's timesteps lie in as many parts of their distribution, and a step takes from each part alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dedpo_diffusion.dpo.noising import TimestepDraw
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.training.reference_grid import ReferenceGrid


class Shapes:
    """A source that knows the shapes of its pairs; nothing is computed."""

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        return np.tile((4, 8, 8), (len(rows), 1))


def grid(model, folder, draws: int, *, strata: bool = True, sampling: str = "uniform") -> ReferenceGrid:
    folder.mkdir(exist_ok=True)
    how = TimestepDraw(0, 1000, sampling, strata=strata)
    nothing = np.empty(0, dtype=int)
    return ReferenceGrid(folder, Shapes(), model, nothing, pairs=40, draws=draws, timesteps=how, caption_dropout=0.0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return Backbone(str(tiny_model), device=torch.device("cpu"))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_draws_of_a_pair_lie_in_different_parts_in_an_order_of_its_own(model, tmp_path, sampling):
    stored = grid(model, tmp_path, 4, sampling=sampling)
    ends = stored.timesteps.quantile(torch.arange(4, dtype=torch.float64) / 4)
    parts = torch.stack([torch.cat([stored.at([row], [number])[0].timesteps for number in range(4)]) for row in range(40)])
    found = torch.searchsorted(ends, parts, right=True) - 1
    assert (found.sort(dim=1).values == torch.arange(4)).all()
    assert len({tuple(row) for row in found.tolist()}) > 10  # or a view, which goes with the draw's number, would go with a timestep
    noises = [stored.at([0], [number])[0].noise for number in range(4)]
    assert not any(torch.equal(noises[0], other) for other in noises[1:])


@pytest.mark.parametrize(("draws", "together"), [(4, 8), (3, 8), (5, 3), (1, 4)])
def test_a_step_takes_draws_of_each_part_alike_whatever_its_split(model, tmp_path, draws, together):
    stored = grid(model, tmp_path, draws)
    rows = [(7 * visit) % 40 for visit in range(20 * together)]
    whole = stored.choose(rows, range(len(rows)), seed=3, together=together)
    halves = [stored.choose(rows[k : k + 2], range(k, k + 2), seed=3, together=together) for k in range(0, len(rows) - 1, 2)]
    assert whole[: 2 * len(halves)] == [number for half in halves for number in half]
    t = torch.cat([stored.at([row], [number])[0].timesteps for row, number in zip(rows, whole, strict=True)])
    counts = torch.stack([torch.bincount(step * draws // 1000, minlength=draws) for step in t.view(20, together)])
    assert ((counts - together / draws).abs() < 2).all()
    if together % draws == 0:
        assert (counts == together // draws).all()


def test_every_stored_draw_is_taken_equally_often(model, tmp_path):
    stored = grid(model, tmp_path, 3)
    numbers = stored.choose([5] * 3000, range(3000), seed=0, together=4)
    assert np.abs(np.bincount(numbers, minlength=3) - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)


def test_strata_have_stored_errors_of_their_own(model, tmp_path):
    one, other = grid(model, tmp_path, 2), grid(model, tmp_path, 2, strata=False)
    assert one.folder != other.folder
    assert other.choose([0, 1, 2, 3], range(4), seed=0, together=4) != one.choose([0, 1, 2, 3], range(4), seed=0, together=4)
