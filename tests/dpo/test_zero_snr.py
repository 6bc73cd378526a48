"""Schedules that end in pure noise: every factor that divides by alpha_t or by the SNR has its limit there, and a step is finite."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.adadpo import adadpo_coefficients
from dedpo_diffusion.dpo.balance import balance_coefficients, probability_scale
from dedpo_diffusion.dpo.noising import ForwardProcess, TimestepDraw, check_betas
from dedpo_diffusion.dpo.objectives import OBJECTIVES
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.training.metrics import step_metrics, summarise
from support.pictures import build_tiny_model

PREDICTIONS = ("epsilon", "v_prediction")
LAST = torch.tensor([999])
BALANCES = ("none", "output", "relative", "probability")
STEPS = [(kind, balance) for kind in sorted(OBJECTIVES) for balance in (BALANCES if OBJECTIVES[kind].balanced else BALANCES[:1])]
STEPS += [(kind, "adadpo") for kind in sorted(OBJECTIVES) if OBJECTIVES[kind].balanced and OBJECTIVES[kind].affine]


def rescaled(rest: float = 0.0) -> torch.Tensor:
    """The schedule of Stable Diffusion, shifted and scaled to end at abar = rest^2, in float64 (Lin et al., algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    return (rest + (root - root[-1]) * (root[0] - rest) / (root[0] - root[-1])).square()


def weight(schedule: torch.Tensor, prediction: str, gamma: float = 5.0) -> float:
    how = TimestepDraw(0, 1000, weighting="min_snr", gamma=gamma)
    return float(how.weights(ForwardProcess(schedule, prediction), LAST))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_our_schedule_is_that_of_diffusers(prediction):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type=prediction
    )
    torch.testing.assert_close(theirs.alphas_cumprod.double(), rescaled(), atol=2e-6, rtol=0)
    assert theirs.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("gamma", [0.01, 1.0, 5.0, 1e6])
def test_min_snr_has_its_limits_at_snr_0(gamma):
    """min(SNR, gamma) / SNR is 1 for every SNR below gamma; min(SNR, gamma) / (SNR + 1) goes to 0 as SNR does."""
    assert weight(rescaled(), "epsilon", gamma) == 1
    assert weight(rescaled(), "v_prediction", gamma) == 0
    for rest in (1e-2, 1e-4, 1e-8, 1e-150):
        snr = rest**2 / (1 - rest**2)
        assert weight(rescaled(rest), "epsilon", gamma) == pytest.approx(min(snr, gamma) / snr if snr else 1, rel=1e-6)
        assert weight(rescaled(rest), "v_prediction", gamma) == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-6, abs=1e-38)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_the_published_ratio_wherever_that_is_a_number(prediction):
    schedule = rescaled()[:-1]
    snr = schedule / (1 - schedule)
    published = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    found = TimestepDraw(0, 999, weighting="min_snr").weights(ForwardProcess(schedule, prediction), torch.arange(999))
    torch.testing.assert_close(found, published.float(), rtol=1e-6, atol=0)


def test_min_snr_at_a_first_step_without_noise():
    """SNR infinite: gamma / SNR goes to 0 for both."""
    schedule = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for prediction in PREDICTIONS:
        found = TimestepDraw(0, 2, weighting="min_snr").weights(ForwardProcess(schedule, prediction), torch.tensor([0]))
        assert found.item() == 0


def test_the_scale_of_v_is_continuous_at_snr_0_and_that_of_noise_grows_without_bound():
    def scale(rest: float, prediction: str) -> float:
        return float(probability_scale(rescaled(rest), LAST, 256, tempering=1e-3, prediction=prediction))

    before = float(rescaled()[-2])
    assert scale(0.0, "v_prediction") == pytest.approx(0.256 * before / (1 - before), rel=1e-6)  # beta_T is 1
    assert scale(1e-9, "v_prediction") == pytest.approx(scale(0.0, "v_prediction"), rel=1e-6)
    grown = [scale(rest, "epsilon") for rest in (1e-2, 1e-4, 1e-8, 1e-12, 1e-30, 0.0)]
    assert grown == sorted(grown) and all(map(math.isfinite, grown))
    assert grown[2] == pytest.approx(scale(1e-8, "v_prediction") / 1e-16, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_scale_is_the_formula_of_the_reverse_step_in_between(prediction):
    """kappa_t = beta_t^2 / (s_t^2 alpha_t (1 - abar_t)), times abar_t for v."""
    now, t = rescaled(), torch.tensor([1, 10, 500, 998])
    before, alpha = now[t - 1], now[t] / now[t - 1]
    variance = (1 - alpha) * (1 - before) / (1 - now[t])
    kappa = (1 - alpha).square() / (variance * alpha * (1 - now[t])) * (now[t] if prediction == "v_prediction" else 1)
    found = probability_scale(now, t, 4, tempering=0.5, prediction=prediction)
    torch.testing.assert_close(found, (2 * kappa).float(), rtol=1e-6, atol=0)


def test_the_probability_balance_of_noise_at_snr_0_is_the_clip_towards_the_larger_error():
    scale = probability_scale(rescaled(), LAST.expand(3), 4096, tempering=1e-3)
    errors = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.3]])
    found = balance_coefficients(errors, mode="probability", scale=scale, clip=2.0)
    torch.testing.assert_close(found[:, 0], 2 * torch.sigmoid(torch.tensor([2.0, -2.0, 0.0])))


def test_adadpos_coefficient_of_noise_at_snr_0_is_one_of_its_ends():
    scale = probability_scale(rescaled(), LAST.expand(4), 4096, tempering=1e-3)
    errors = torch.tensor([[0.1, 0.2], [0.0, 9.0], [0.2, 0.1], [0.3, 0.3]])
    found = adadpo_coefficients(errors, scale, clip=10.0)
    least = math.exp(-10)
    torch.testing.assert_close(found, torch.tensor([[2.0, least], [2.0, least], [least, 2.0], [1.0, 1.0]]))


@pytest.mark.parametrize("mode", ["output", "relative"])
def test_errors_of_zero_balance_each_other_and_nan_is_not_hidden(mode):
    errors = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [torch.nan, 0.5]])
    found = balance_coefficients(errors, torch.ones_like(errors), mode=mode)
    torch.testing.assert_close(found[:3, 0], 2 * torch.sigmoid(torch.tensor([0.0, 10.0, -10.0])))
    assert found[3].isnan().all()
    same = balance_coefficients(torch.rand(8, 2) * torch.tensor([0.0, 1.0]), torch.zeros(8, 2), mode=mode)
    assert same.isfinite().all()


class Copying:
    """A model whose weight is the share of x_t that it predicts: at 1 the noise of a pure noise, without error."""

    def __init__(self, prediction: str, share: float) -> None:
        self.process = ForwardProcess(rescaled().float(), prediction)
        self.share = torch.tensor(share, requires_grad=True)

    def predict(self, noisy, timesteps, conditioning, *, reference=False):
        return (self.share.detach() if reference else self.share) * noisy


def batch(count: int) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 2, 4, 4, 4, generator=generator)
    target = torch.tensor([0.0, 1.0, 0.5])[torch.arange(count) % 3]
    return PairBatch(latents=latents, conditioning=Conditioning(torch.zeros(count, 1, 1)), target=target, weight=torch.ones(count))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("share", [0.5, 1.0])  # at 1 errors of noise are 0 at the last timestep
@pytest.mark.parametrize(("kind", "balance"), STEPS)
def test_a_step_at_the_last_timestep_is_finite(prediction, share, kind, balance):
    model, pairs, t = Copying(prediction, share), batch(6), torch.tensor([999, 999, 998, 500, 0, 999])
    noise = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    weights = TimestepDraw(0, 1000, weighting="min_snr").weights(model.process, t)
    result = preference_step(model, pairs, timesteps=t, noise=noise, beta=2000.0, kind=kind, balance=balance, timestep_weight=weights)
    result.loss.mean().backward()
    for name in ("loss", "policy_errors", "coefficients", "pull", "cosine"):
        assert getattr(result, name).isfinite().all(), name
    assert model.share.grad.isfinite()
    told = summarise(step_metrics([result], [pairs], t, schedule=1000), schedule=1000)
    numbers = [told, *told["buckets"]]
    assert all(math.isfinite(value) for part in numbers for value in part.values() if isinstance(value, float))
    assert all(bucket["error_ratio"] is not None for bucket in told["buckets"])


@pytest.mark.parametrize("broken", [[0.1, float("nan")], [1.1, 0.5], [0.1, -0.1], [0.1, float("inf")]])
def test_a_schedule_that_is_none_is_refused(broken):
    with pytest.raises(ValueError, match="noise schedule is broken"):
        check_betas(broken)


def test_a_model_of_a_broken_schedule_is_refused_by_name(tmp_path):
    model = build_tiny_model(tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 1.5}))
    with pytest.raises(UserError, match=r"model: its noise schedule is broken: a beta is not between 0 and 1"):
        Backbone(str(model), device=torch.device("cpu"))
