"""The forward process and the draws."""

from __future__ import annotations

import pytest
import torch

from dedpo_diffusion.noising import ForwardProcess, draw

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
        return draw(seed, step, 6, (4, 2, 2), timesteps=(0, 1000), caption_dropout=0.5)

    one, again, later, other = of(0, 3), of(0, 3), of(0, 4), of(1, 3)
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.timesteps, again.timesteps)
    assert not torch.equal(one.noise, later.noise)
    assert not torch.equal(one.noise, other.noise)
    assert torch.equal(torch.cat([one.part(0, 2).posterior, one.part(2, 6).posterior]), one.posterior)


def test_timesteps_stay_in_their_range_and_fill_it():
    drawn = draw(0, 0, 4000, (1, 1, 1), timesteps=(100, 110), caption_dropout=0.25)
    assert sorted(set(drawn.timesteps.tolist())) == list(range(100, 110))
    assert abs(drawn.drop_caption.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="supported: epsilon, v_prediction"):
        ForwardProcess(SCHEDULE, "sample")
