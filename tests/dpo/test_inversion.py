"""DDIM solved backwards: exactly, at exactly the timesteps asked for, on linear models of known answer and on the Shapes model."""

from __future__ import annotations

import pytest
import torch

from dedpo_diffusion.dpo.inversion import ddim_step, implied_noise, invert, knots_through, noise_levels
from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.models.backbone import Backbone

CUMULATED = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
ZERO_SNR = torch.cat([CUMULATED[:-1], torch.zeros(1, dtype=torch.float64)])
WIDTH = 0.7  # standard deviation of the images that the linear models know


def linear_model(process: ForwardProcess):
    """The best prediction for images from a normal distribution, in closed form."""

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.scales(timesteps, noisy)
        spread = alpha**2 * WIDTH**2 + sigma**2
        clean, noise = alpha * WIDTH**2 / spread * noisy, sigma / spread * noisy
        return noise if process.prediction == "epsilon" else alpha * noise - sigma * clean

    return predict


def back(process, predict, noisy, knots):
    """DDIM from the last knot over all the others to the image."""
    for k in range(knots.shape[1] - 1, -1, -1):
        earlier = knots[:, k - 1] if k else torch.full_like(knots[:, 0], -1)
        moved = ddim_step(process, predict, noisy, knots[:, k], earlier)
        noisy = torch.where((knots[:, k] == earlier).view(-1, 1, 1, 1, 1), noisy, moved)
    return noisy


@pytest.mark.parametrize(("cumulated", "prediction"), [(CUMULATED, "epsilon"), (CUMULATED, "v_prediction"), (ZERO_SNR, "v_prediction")])
def test_a_linear_model_is_inverted_as_in_closed_form(cumulated, prediction):
    process = ForwardProcess(cumulated, prediction)
    predict, clean = linear_model(process), torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    knots = torch.tensor([[0, 7, 50, 300, 998, 999], [3, 4, 4, 800, 999, 999]])
    noisy, left = invert(process, predict, clean, knots, tolerance=1e-13)
    assert left.max() < 1e-13
    torch.testing.assert_close(back(process, predict, noisy[:, -1], knots), clean, rtol=0, atol=1e-10)
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    scale = ddim_step(process, predict, one, torch.tensor([300]), torch.tensor([50]))  # a step of a linear model multiplies
    torch.testing.assert_close(noisy[0, 3] * scale.squeeze(), noisy[0, 2], rtol=0, atol=1e-12)
    assert torch.equal(noisy[1, 1], noisy[1, 2])


def test_noise_and_clean_image_make_the_very_point_of_the_trajectory():
    process = ForwardProcess(CUMULATED, "epsilon")
    clean, knots = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64), torch.tensor([[10, 400], [0, 999]])
    noisy, _ = invert(process, linear_model(process), clean, knots)
    for k in range(2):
        noise = implied_noise(process, clean, noisy[:, k], knots[:, k])
        torch.testing.assert_close(process.add_noise(clean, noise, knots[:, k]), noisy[:, k], rtol=0, atol=1e-12)


def test_a_neighbouring_timestep_is_another_noise():
    """What public code does: the nearest step of the sampler in place of the timestep itself."""
    process, clean = ForwardProcess(CUMULATED, "epsilon"), torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    levels = noise_levels(process, 10)
    t = torch.tensor([[(int(levels[4]) + int(levels[5])) // 2]])
    exact, _ = invert(process, linear_model(process), clean, knots_through(levels, t))
    near, _ = invert(process, linear_model(process), clean, levels[None])
    gap = implied_noise(process, clean, exact[:, -1], t[0]) - implied_noise(process, clean, near[:, 4], t[0])
    assert gap.square().mean().sqrt() > 0.03


def test_knots_go_through_every_timestep_and_no_further():
    levels = noise_levels(ForwardProcess(ZERO_SNR, "v_prediction"), 12)
    assert len(levels) <= 12 and levels[0] == 0 and levels[-1] == 998 and (levels.diff() > 0).all()
    t = torch.tensor([[500, 3, 77], [999, 0, 999]])
    knots = knots_through(levels, t)
    assert (knots.diff(dim=1) >= 0).all() and knots[:, -1].tolist() == [500, 999]
    assert all(set(own.tolist()) <= set(row.tolist()) for own, row in zip(t, knots, strict=True))


@pytest.fixture(scope="module")
def shapes():
    """The Shapes model, latents of two rendered pictures, and its prediction at their prompt."""
    import numpy as np

    from dedpo_diffusion.shapes.world import VOCABULARY, render, sample_scene

    model = Backbone("shapes", device=torch.device("cpu"))
    scene = VOCABULARY[5]
    pictures = [np.asarray(render(sample_scene(np.random.default_rng(k), scene))) for k in range(2)]
    pixels = torch.stack([torch.tensor(p).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
    mean, _ = model.encode_images(pixels)
    given = model.encode_prompts([scene.prompt])
    return model, mean[None] * model.scale, lambda x, t: model.predict(x, t, given, reference=True)


def test_own_noise_regenerates_the_image_on_ddim(shapes):
    """From pure noise back to the latents. Each of N steps is solved to 1e-6, and DDIM multiplies a deviation at noise level t by at most
    1 / alpha_t, 15 at the end of the schedule: N * 15 * 1e-6 in all, with room for single latents above the root mean square."""
    model, clean, predict = shapes
    knots = noise_levels(model.process, 12)[None]
    noisy, left = invert(model.process, predict, clean, knots)
    assert left.max() < 1e-6
    again = back(model.process, predict, noisy[:, -1], knots)
    assert (again - clean).square().mean().sqrt() < knots.shape[1] * 15 * 1e-6
    assert (again - clean).abs().max() < 2e-3 < clean.std() / 100
