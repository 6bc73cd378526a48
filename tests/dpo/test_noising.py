"""The forward process and the draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dedpo_diffusion.dpo.noising import Draws, ForwardProcess, TimestepDraw, draw, residual_cosine

SCHEDULE = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_exact_prediction_gives_back_the_clean_latents(prediction):
    process = ForwardProcess(SCHEDULE, prediction)
    clean, noise = torch.randn(2, 5, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 300, 800, 999])
    noisy = process.add_noise(clean, noise, t)
    torch.testing.assert_close(process.clean(process.target(clean, noise, t), noisy, t), clean, atol=1e-10, rtol=1e-10)


def test_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")
    process = ForwardProcess(scheduler.alphas_cumprod, "v_prediction")
    clean, noise = torch.randn(2, 4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 250, 500, 999])
    torch.testing.assert_close(process.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t))
    torch.testing.assert_close(process.target(clean, noise, t), scheduler.get_velocity(clean, noise, t))


def test_both_images_of_a_pair_get_the_same_noise():
    process = ForwardProcess(SCHEDULE, "epsilon")
    same = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64).expand(3, 2, 4, 2, 2)
    noise = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    noisy = process.add_noise(same, noise, torch.tensor([5, 500, 900]))
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert not torch.equal(noisy[0], noisy[1])


def test_draws_are_a_function_of_seed_and_step():
    def of(seed: int, step: int):
        return draw(seed, step, 6, (4, 2, 2), timesteps=TimestepDraw(0, 1000), caption_dropout=0.5)

    one, again, later, other = of(0, 3), of(0, 3), of(0, 4), of(1, 3)
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.timesteps, again.timesteps)
    assert not torch.equal(one.noise, later.noise)
    assert not torch.equal(one.noise, other.noise)
    assert torch.equal(torch.cat([one.part(0, 2).posterior, one.part(2, 6).posterior]), one.posterior)


def test_timesteps_stay_in_their_range_and_fill_it():
    drawn = draw(0, 0, 4000, (1, 1, 1), timesteps=TimestepDraw(100, 110), caption_dropout=0.25)
    assert sorted(set(drawn.timesteps.tolist())) == list(range(100, 110))
    assert abs(drawn.drop_caption.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="supported: epsilon, v_prediction"):
        ForwardProcess(SCHEDULE, "sample")


def test_logit_normal_timesteps_have_the_distribution_they_are_named_after():
    drawn = TimestepDraw(200, 800, "logit_normal", location=-0.5, spread=0.8).draw(20000, torch.Generator().manual_seed(0)).numpy()
    assert drawn.min() >= 200 and drawn.max() < 800 and drawn.dtype == np.int64
    place = (drawn + 0.5 - 200) / 600  # the middle of each step
    normal = (np.log(place / (1 - place)) + 0.5) / 0.8
    assert stats.kstest(normal, "norm").statistic < 1.63 / math.sqrt(20000) + 0.005  # 1 % level, and the width of a step


def test_an_extreme_logit_normal_stays_in_its_range():
    drawn = TimestepDraw(0, 10, "logit_normal", location=60.0).draw(100, torch.Generator().manual_seed(0))
    assert (drawn == 9).all()


def test_min_snr_weights_are_bounded_by_gamma_over_snr_and_follow_the_prediction():
    """SNR = abar / (1 - abar). abar = 0.9: SNR 9, eps weight 5 / 9, v weight 5 / 10. abar = 0.2: SNR 0.25, weights 1 and 0.2."""
    t = torch.tensor([0, 1])
    schedule = torch.tensor([0.9, 0.2])
    how = TimestepDraw(0, 2, weighting="min_snr", gamma=5.0)
    torch.testing.assert_close(how.weights(ForwardProcess(schedule, "epsilon"), t), torch.tensor([5 / 9, 1.0]))
    torch.testing.assert_close(how.weights(ForwardProcess(schedule, "v_prediction"), t), torch.tensor([0.5, 0.2]))
    assert (TimestepDraw(0, 2).weights(ForwardProcess(schedule, "epsilon"), t) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 5), "holds some"),
        ((-1, 5), "holds some"),
        ((0, 5, "normal"), "logit_normal"),
        ((0, 5, "uniform", 0.0, 0.0), "must be positive"),
        ((0, 5, "uniform", 0.0, 1.0, "snr"), "min_snr"),
        ((0, 5, "uniform", 0.0, 1.0, "min_snr", -1.0), "must be positive"),
    ],
)
def test_timestep_draws_that_cannot_be_used(arguments, words):
    with pytest.raises(ValueError, match=words):
        TimestepDraw(*arguments)


def test_joined_draws_are_the_parts_in_order():
    whole = draw(1, 2, 6, (2, 3, 3), timesteps=TimestepDraw(0, 50), caption_dropout=0.5)
    again = Draws.join([whole.part(0, 2), whole.part(2, 6)])
    for name in ("timesteps", "noise", "posterior", "drop_caption"):
        assert torch.equal(getattr(whole, name), getattr(again, name))


def test_residual_cosine_is_one_for_equal_and_zero_for_perpendicular_residuals():
    target = torch.zeros(3, 2, 1, 1, 2)
    prediction = torch.tensor([[[1.0, 0], [2, 0]], [[1, 0], [0, 3]], [[1, 1], [-2, -2]]])[:, :, None, None]
    torch.testing.assert_close(residual_cosine(prediction, target), torch.tensor([1.0, 0.0, -1.0]))
