"""The step on a real (tiny, random) Stable Diffusion with a LoRA."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dedpo_diffusion import preference_step
from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.balance import probability_scale
from dedpo_diffusion.dpo.noising import ForwardProcess
from dedpo_diffusion.models.backbone import Backbone
from support.pictures import build_tiny_model
from support.steps import TARGETS, backbone, batch  # noqa: F401


@pytest.mark.parametrize("balance", ["none", "output", "relative"])
def test_a_fresh_lora_gives_margin_zero_and_loss_log_two(tiny_model, balance):
    pairs, t, noise = batch()
    result = preference_step(backbone(tiny_model), pairs, timesteps=t, noise=noise, beta=2000.0, balance=balance)
    assert torch.equal(result.margin, torch.zeros(5))
    assert torch.equal(result.policy_errors, result.reference_errors)
    torch.testing.assert_close(result.loss, torch.full((5,), math.log(2)))


def test_a_fresh_lora_still_gets_a_gradient(tiny_model):
    model = backbone(tiny_model)
    pairs, t, noise = batch()
    preference_step(model, pairs, timesteps=t, noise=noise, beta=2000.0).loss.mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.trainable().items()}
    assert max(value for name, value in norms.items() if "lora_B" in name) > 0
    assert all(p.grad is None for name, p in model.unet.named_parameters() if "lora_" not in name)


def test_the_reference_is_the_base_model_bit_for_bit(tiny_model):
    plain = Backbone(str(tiny_model), device=torch.device("cpu"))
    adapted = backbone(tiny_model, trained=True)
    pairs, t, _ = batch()
    with torch.no_grad():
        base = plain.predict(pairs.latents, t, pairs.conditioning)
        policy = adapted.predict(pairs.latents, t, pairs.conditioning)
    assert torch.equal(adapted.predict(pairs.latents, t, pairs.conditioning, reference=True), base)
    assert (policy - base).abs().max() > 1e-3
    assert all(p.requires_grad for p in adapted.trainable().values())


def test_swapping_the_images_and_the_target_leaves_the_loss_unchanged(tiny_model):
    model = backbone(tiny_model, trained=True)
    pairs, t, noise = batch()
    swapped = dataclasses.replace(pairs, latents=pairs.latents.flip(1), target=1 - pairs.target)
    one, other = (preference_step(model, b, timesteps=t, noise=noise, beta=20.0) for b in (pairs, swapped))
    assert one.margin.abs().min() > 1e-3
    # the two orders go through the same kernels at other places of the batch: float32 rounding of e times beta
    torch.testing.assert_close(one.loss, other.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.margin, -other.margin, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_equals_diffusion_dpo_written_out(tmp_path, prediction):
    """The published arithmetic on the same tensors: four separate passes, one image each, hard labels."""
    model = backbone(build_tiny_model(tmp_path, prediction_type=prediction), trained=True)
    pairs, t, noise = batch()
    winner_first = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    pairs = dataclasses.replace(pairs, target=winner_first)
    ours = preference_step(model, pairs, timesteps=t, noise=noise, beta=30.0, balance="none").loss
    gradient = torch.autograd.grad(ours.mean(), list(model.trainable().values()))

    cumulated = model.process.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = cumulated.sqrt(), (1 - cumulated).sqrt()

    def error(latents: torch.Tensor) -> torch.Tensor:
        wanted = noise if prediction == "epsilon" else alpha * noise - sigma * latents
        predicted = model.unet(alpha * latents + sigma * noise, t, pairs.conditioning.text).sample
        return (predicted - wanted).pow(2).mean(dim=[1, 2, 3])

    index = (1 - winner_first).long()
    winner, loser = (pairs.latents[torch.arange(5), i] for i in (index, 1 - index))
    with torch.no_grad(), model.reference():
        reference = error(winner) - error(loser)
    inside = -0.5 * 30.0 * (error(winner) - error(loser) - reference)
    theirs = -torch.nn.functional.logsigmoid(inside)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    assert (ours - math.log(2)).abs().max() > 0.01
    for a, b in zip(gradient, torch.autograd.grad(theirs.mean(), list(model.trainable().values())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_weights_multiply_the_loss(tiny_model):
    model = backbone(tiny_model, trained=True)
    pairs, t, noise = batch()
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])
    one = preference_step(model, pairs, timesteps=t, noise=noise, beta=20.0).loss
    other = preference_step(model, dataclasses.replace(pairs, weight=weight), timesteps=t, noise=noise, beta=20.0).loss
    assert torch.equal(other, one * weight)


class Given:
    """A model whose predictions are given, those of the policy as a leaf, so that the loss's gradient can be written out."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.process = ForwardProcess(torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0), "epsilon")
        noise = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)
        drawn = torch.randn(6, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
        drawn[:, 1] += 0.7 * drawn[:, 0]  # residuals that point the same way more or less
        size = torch.tensor([[0.3, 1.0], [1.0, 0.3]] * 3, dtype=torch.float64).view(6, 2, 1, 1, 1)
        self.noise, self.prediction = noise.float(), (noise[:, None] + size * drawn).float().requires_grad_()
        self.base = self.prediction.detach() + 0.1 * torch.randn(self.prediction.shape, generator=generator)

    def predict(self, noisy, timesteps, conditioning, *, reference=False):
        return self.base if reference else self.prediction


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balance", ["none", "output", "relative", "probability"])
def test_the_gradient_is_the_formula_of_every_option(balance, weighted):
    """weight tw (sigmoid(m) - t) (-+beta / 2) a_i 2 (prediction - noise) / D, a of the balance."""
    model, t = Given(), torch.tensor([2, 50, 200, 400, 700, 999])
    target, weight = torch.tensor([1.0, 0.0, 0.3, 1.6, -0.4, 0.5]), torch.linspace(0.5, 2, 6)
    outside = torch.linspace(0.1, 1.0, 6) if weighted else None
    pairs = PairBatch(torch.zeros_like(model.base), Conditioning(torch.zeros(6, 1, 1)), target, weight)
    options = {"balance": balance, "balance_tempering": 0.01, "balance_clip": 1.5, "timestep_weight": outside}
    result = preference_step(model, pairs, timesteps=t, noise=model.noise, beta=3.0, **options)
    found = torch.autograd.grad(result.loss.sum(), model.prediction)[0]

    residual = (model.prediction - model.noise[:, None]).detach()
    e, r = residual.square().mean(dim=(2, 3, 4)), (model.base - model.noise[:, None]).square().mean(dim=(2, 3, 4))
    m = -1.5 * ((e - r)[:, 0] - (e - r)[:, 1])
    scale = probability_scale(model.process.alphas_cumprod, t, 36, tempering=0.01)
    u = {
        "none": torch.zeros(6), "output": (e[:, 1] / e[:, 0]).log() / 2, "probability": scale * (e[:, 1] - e[:, 0]) / 2,
        "relative": (e[:, 1] / r[:, 1] * r[:, 0] / e[:, 0]).log() / 2,
    }[balance].clamp(-1.5, 1.5)  # fmt: skip
    factor = 2 * torch.sigmoid(torch.stack([u, -u], dim=1))
    slope = weight * (torch.sigmoid(m) - target) * (1.0 if outside is None else outside)
    expected = (slope[:, None] * torch.tensor([-1.5, 1.5]) * factor)[:, :, None, None, None] * 2 * residual / 36
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.coefficients, factor)
    plain = weight * (torch.nn.functional.softplus(m) - target * m)
    torch.testing.assert_close(result.loss, plain if outside is None else outside * plain)


def test_an_objective_without_reference_does_not_predict_with_it(tiny_model, monkeypatch):
    asked, real = [], Backbone.predict

    def counting(self, *arguments, reference=False):
        asked.append(reference)
        return real(self, *arguments, reference=reference)

    monkeypatch.setattr(Backbone, "predict", counting)
    model = backbone(tiny_model, trained=True)
    pairs, t, noise = batch()
    result = preference_step(model, pairs, timesteps=t, noise=noise, beta=20.0, kind="sft", balance="none")
    assert asked == [False]
    assert result.margin.isnan().all() and result.reference_errors.isnan().all()
    assert torch.isfinite(result.loss).all() and not result.reference_errors.requires_grad
    known = dataclasses.replace(pairs, reference_errors=result.policy_errors)
    assert (preference_step(model, known, timesteps=t, noise=noise, beta=20.0, kind="sft", balance="none").margin == 0).all()


@pytest.mark.parametrize("started", [False, True])
def test_the_reference_knows_no_dropout(tiny_model, started):
    """Neither the base nor, where training goes on from an adapter, the base with that."""
    torch.manual_seed(1)
    other = Backbone(str(tiny_model), device=torch.device("cpu"))
    other.add_lora(rank=4, alpha=4)
    start = {name: value.detach() + 0.2 * torch.randn_like(value) for name, value in other.trainable().items()}
    model = Backbone(str(tiny_model), device=torch.device("cpu"))
    model.add_lora(rank=4, alpha=4, dropout=0.5, start=start if started else None)
    for name, parameter in model.trainable().items():
        parameter.data.copy_(start[name])
    pairs, t, _ = batch()
    one, other = (model.predict(pairs.latents, t, pairs.conditioning, reference=True) for _ in range(2))
    assert torch.equal(one, other)
    with torch.no_grad():
        policies = [model.predict(pairs.latents, t, pairs.conditioning) for _ in range(2)]
        assert model.unet.training and not torch.equal(*policies)
        model.unet.eval()
        without = model.predict(pairs.latents, t, pairs.conditioning)
    assert torch.equal(without, one) == started
    model.predict(pairs.latents, t, pairs.conditioning, reference=True)
    assert not model.unet.training
