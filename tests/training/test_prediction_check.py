"""What a model predicts is told by one look: models of noise, the same as models of v, optimal denoisers of both schedules, random ones."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import resolve_model
from dedpo_diffusion.models.marks import schedule
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.shapes.world import parse_prompt, render, sample_scene
from dedpo_diffusion.training.prediction_check import Evidence, look
from support.training import arguments, fresh_accelerate_state  # noqa: F401 - a fixture

USUAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {zero: schedule({**USUAL, "rescale_betas_zero_snr": zero}) for zero in (False, True)}
PROMPT = "a large red circle on a white background"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes():
    model = Backbone("shapes", device=CPU)
    model.place()
    return model


def pictures(model: Backbone, seed: int) -> tuple[torch.Tensor, Conditioning]:
    """A pair of the world's pictures of one prompt, encoded."""
    rng = np.random.default_rng(seed)
    pixels = torch.stack(
        [torch.from_numpy(np.array(render(sample_scene(rng, parse_prompt(PROMPT))))).permute(2, 0, 1) / 127.5 - 1 for _ in range(2)]
    )
    mean, _ = model.encode_images(pixels.float())
    return model.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))[None], model.encode_prompts([PROMPT])


class AsV(torch.nn.Module):
    """The exact model of v that a model of noise is: v = (eps - sigma x) / alpha."""

    def __init__(self, unet: torch.nn.Module, alphas: torch.Tensor) -> None:
        super().__init__()
        self.unet, self.alphas = unet, alphas

    def forward(self, x, t, text, added_cond_kwargs=None):
        abar = self.alphas[t].view(-1, 1, 1, 1)
        eps = self.unet(x, t, text).sample
        return SimpleNamespace(sample=(eps - (1 - abar).sqrt() * x) / abar.sqrt())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_of_noise_and_the_same_as_a_model_of_v_are_told_apart(shapes, seed):
    latents, prompt = pictures(shapes, seed)
    found = look(shapes.unet, shapes.dtype, SCHEDULES, latents, prompt, False)
    assert found.prediction == "epsilon" and found.zero_snr is None
    assert found.explained["epsilon", False] > 0.8 and found.explained["v_prediction", False] < 0
    found = look(AsV(shapes.unet, shapes.process.alphas_cumprod), shapes.dtype, {False: SCHEDULES[False]}, latents, prompt, False)
    assert found.prediction == "v_prediction" and found.explained["epsilon", False] < 0


class Denoiser(torch.nn.Module):
    """The optimal predictor of v for images of 2 x 2 flat fields, each a normal number, of 32 x 32 latents."""

    def __init__(self, alphas: torch.Tensor) -> None:
        super().__init__()
        self.alphas = alphas

    def forward(self, x, t, text, added_cond_kwargs=None):
        abar = self.alphas[t].view(-1, 1, 1, 1).double()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        field = functional.interpolate(functional.avg_pool2d(x.double(), x.shape[-1] // 2), x.shape[-2:])
        clean = alpha * field / (abar + sigma.square() / (x.shape[-1] // 2) ** 2)
        return SimpleNamespace(sample=((alpha * x - clean) / sigma).float())  # alpha eps - sigma x_0, with eps = (x - alpha x_0) / sigma


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_schedule_shows_in_what_is_made_of_a_shift_at_the_last_timestep(trained, seed):
    fields = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    latents = functional.interpolate(fields, (64, 64))[None]
    found = look(Denoiser(SCHEDULES[trained]), torch.float32, SCHEDULES, latents, Conditioning(torch.zeros(1, 1, 1)), False)
    assert found.prediction == "v_prediction" and found.zero_snr is trained
    small = look(
        Denoiser(SCHEDULES[trained]),
        torch.float32,
        SCHEDULES,
        latents[..., :16, :16].contiguous(),
        Conditioning(torch.zeros(1, 1, 1)),
        False,
    )
    assert small.follows is None and small.zero_snr is None


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_is_told_of_random_weights(folders, kind):
    model = Backbone(str(folders[kind]), device=CPU)
    model.place()
    before = torch.get_rng_state()
    sizes = torch.tensor([[[64.0, 64, 0, 0, 64, 64]] * 2])
    prompt = model.encode_prompts(["a circle"])
    latents = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = look(model.unet, model.dtype, SCHEDULES, latents, Conditioning(prompt.text, prompt.pooled, sizes), model.told_sizes)
    assert found.prediction is None and found.zero_snr is None
    assert torch.equal(torch.get_rng_state(), before) and not model.unet.training


def test_close_shares_tell_nothing():
    def told(noise: float, v: float) -> str | None:
        return Evidence(
            {("epsilon", False): noise, ("v_prediction", False): v, ("epsilon", True): -9, ("v_prediction", True): -9}, None
        ).prediction

    assert told(0.9, 0.1) == "epsilon" and told(0.1, 0.9) == "v_prediction"
    assert told(0.5, 0.4) is None and told(0.1, -1.0) is None and told(-0.1, -0.2) is None


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """The embedded model, as it is and declared to predict v; and pairs of pictures."""
    where = tmp_path_factory.mktemp("declared")
    pairs = tiny.write_pairs(where / "pairs", "tuned", 4)
    found = {}
    for prediction in ("epsilon", "v_prediction"):
        found[prediction] = shutil.copytree(resolve_model("shapes"), where / prediction)
        path = found[prediction] / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    return found, pairs


def begin(model, pairs, out, **changes) -> int:
    given = {"data.targets": "tuned", "optim.steps": 1, "optim.batch": 2} | changes
    return train.main(arguments(model, pairs, out, **given))


@pytest.mark.parametrize("changes", [{}, {"weights": "full"}, {"data.cache": "cache"}])
def test_a_model_of_noise_declared_as_v_is_refused_before_step_1(declared, tmp_path, capsys, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    models, pairs = declared
    assert begin(models["v_prediction"], pairs, tmp_path / "run", **changes) == 2
    said = capsys.readouterr().err
    assert f"{models['v_prediction']}: it is taken to predict v, but at mid and high noise its output explains" in said
    assert "of noise (epsilon) and 0% of v, so it predicts noise (epsilon); give --model_prediction epsilon" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_option_mends_it_and_what_is_given_by_hand_is_warned_of(declared, tmp_path, capsys):
    models, pairs = declared
    assert begin(models["v_prediction"], pairs, tmp_path / "mended", model_prediction="epsilon") == 0
    said = capsys.readouterr().out
    assert "it predicts noise (epsilon), by --model_prediction epsilon" in said and "taken to predict" not in said
    assert begin(models["epsilon"], pairs, tmp_path / "forced", model_prediction="v") == 0
    assert "Warning" in (said := capsys.readouterr().out) and "it is taken to predict v, but" in said


def test_a_sound_model_starts_without_a_word_and_a_random_one_with_one(declared, folders, tmp_path, capsys):
    models, pairs = declared
    assert begin(models["epsilon"], pairs, tmp_path / "sound") == 0
    assert "predict" not in capsys.readouterr().out
    assert begin(folders["sdxl"], pairs, tmp_path / "random") == 0
    assert "cannot tell whether it predicts noise or v; it is taken to predict noise (epsilon)" in capsys.readouterr().out
