"""Backbones of every architecture, from every kind of file: what diffusers computes, the reference, adapters, whole UNets."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.pairs.pixels import pair_views
from support.adapters import embeddings, image

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large cross"]


def inputs(model: Backbone, pairs: int = 2) -> tuple[PairBatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = model.latent_shape(model.size)
    given = model.encode_prompts(PROMPTS[:pairs])
    if model.told_sizes:
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [96, 128, 0, 10, 64, 64]]).expand(pairs, 2, 6)
        given = Conditioning(given.text, given.pooled, sizes)
    latents, noise = torch.randn(pairs, 2, *shape, generator=generator), torch.randn(pairs, *shape, generator=generator)
    batch = PairBatch(latents, given, torch.tensor([1.0, 0.2])[:pairs], torch.ones(pairs))
    return batch, torch.tensor([300, 700])[:pairs], noise


def stir(model: Backbone, scale: float = 0.1) -> None:
    """Move what is trained away from where it began."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.trainable().values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_predicts_what_the_pipeline_of_diffusers_predicts(folders, kind):
    """Prompts, pooled prompts and sizes reach the UNet as `StableDiffusion(XL)Pipeline` itself hands them over."""
    model, pipe = Backbone(str(folders[kind]), device=CPU), load_pipeline(str(folders[kind]))
    batch, t, _ = inputs(model)
    ours = model.predict(batch.latents, t, batch.conditioning)
    for row, prompt in enumerate(PROMPTS):
        for side in range(2):
            sample, at = batch.latents[row, side][None], t[row][None]
            if kind == "sdxl":
                text, none, pooled, none_pooled = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1)
                told = tuple(int(number) for number in batch.conditioning.sizes[row, side])
                ids = pipe._get_add_time_ids(told[:2], told[2:4], told[4:], dtype=torch.float32, text_encoder_projection_dim=32)
                theirs = pipe.unet(sample, at, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
                absent = model.encode_prompts([None])
                assert torch.equal(absent.text, none)
                assert torch.equal(absent.pooled, none_pooled)
            else:
                text, none = pipe.encode_prompt(prompt, "cpu", 1, True)
                theirs = pipe.unet(sample, at, text).sample
                torch.testing.assert_close(model.encode_prompts([None]).text, none)
            torch.testing.assert_close(ours[row, side][None], theirs, rtol=1e-4, atol=1e-5)
    assert model.process.prediction == ("v_prediction" if kind == "sd21" else "epsilon")


def test_the_sizes_are_those_of_each_image_and_matter(folders):
    model = Backbone(str(folders["sdxl"]), device=CPU)
    batch, t, _ = inputs(model)
    same = batch.latents[:, :1].expand(-1, 2, -1, -1, -1)
    one, other = model.predict(same, t, batch.conditioning).unbind(1)
    assert (one - other).abs().max() > 1e-6  # equal latents, other sizes
    with pytest.raises(ValueError, match="sizes"):
        model.predict(same, t, Conditioning(batch.conditioning.text))


def test_views_tell_original_crop_and_target():
    wide, small = Image.new("RGB", (200, 100)), Image.new("RGB", (30, 60))
    pixels, sizes = pair_views((wide, small), 50, place=(1.0, 0.5))
    assert pixels.shape == (2, 3, 50, 50)
    assert sizes.tolist() == [[100, 200, 0, 50, 50, 50], [60, 30, 25, 0, 50, 50]]
    mirrored = pair_views((wide, small), 50, place=(1.0, 0.5), flip=True)[1]
    assert mirrored[0].tolist() == [100, 200, 0, 0, 50, 50]  # the crop's right edge is the mirrored picture's left one


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_single_file_is_the_folder_bit_for_bit(folders, kind, tmp_path):
    file = tiny.single_file(folders[kind], tmp_path / "model.safetensors")
    folder, one = Backbone(str(folders[kind]), device=CPU), Backbone(str(file), device=CPU, config=str(folders[kind]))
    assert one.fingerprint == folder.fingerprint
    batch, t, _ = inputs(folder)
    assert torch.equal(one.predict(batch.latents, t, batch.conditioning), folder.predict(batch.latents, t, batch.conditioning))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_lie_where_torch_lays_them_wherever_they_come_from(folders, kind, tmp_path):
    """Kernels round otherwise at addresses that are no multiple of 64 bytes, as those in a mapped file; most plainly on one thread."""
    assert torch.get_num_threads() == 1
    file = tiny.single_file(folders[kind], tmp_path / "model.safetensors")
    pipes = load_pipeline(str(folders[kind])), load_pipeline(str(file), config=str(folders[kind]))
    for pipe in pipes:
        for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
            for name, value in (*part.named_parameters(), *part.named_buffers()):
                assert value.data_ptr() % 64 == 0 and value.is_contiguous(), name
                assert value.untyped_storage().nbytes() == value.nbytes, name  # it shares no memory
    assert torch.equal(*(embeddings(pipe) for pipe in pipes))
    assert torch.equal(*(image(pipe) for pipe in pipes))


def test_a_folder_that_holds_half_precision_alone_is_read_in_float32(tmp_path):
    folder = tiny.build(tmp_path / "half", "sdxl", dtype=torch.float16, variant="fp16")
    assert not list((folder / "unet").glob("diffusion_pytorch_model.safetensors"))
    model = Backbone(str(folder), device=CPU)
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}


DORA = [("sdxl", True), *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("sd15", "sd21"))]


@pytest.mark.parametrize(("kind", "dora"), [("sd15", False), pytest.param("sd21", False, marks=pytest.mark.slow), ("sdxl", False), *DORA])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_policy_and_reference_agree_until_the_adapter_moves_and_the_reference_never_does(folders, kind, dora, dtype):
    plain, model = (Backbone(str(folders[kind]), device=CPU, dtype=dtype) for _ in range(2))
    model.add_lora(rank=2, alpha=4, dora=dora)
    batch, t, noise = inputs(model)
    fresh = preference_step(model, batch, timesteps=t, noise=noise, beta=100.0)
    assert fresh.margin.abs().max() < (1e-3 if dora else 1e-12)  # DoRA divides by norms that it multiplies with again
    fresh.loss.mean().backward()
    moved = {name.split("lora_")[1].split(".")[0] for name, p in model.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert "B" in moved
    assert ("magnitude_vector" in moved) == dora
    stir(model)
    base = plain.predict(batch.latents, t, batch.conditioning)
    assert torch.equal(model.predict(batch.latents, t, batch.conditioning, reference=True), base)
    assert (model.predict(batch.latents, t, batch.conditioning) - base).abs().max() > 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_is_scaled_by_alpha_over_the_rank_or_its_root(folders, rslora):
    model = Backbone(str(folders["sd15"]), device=CPU)
    model.add_lora(rank=4, alpha=6, rslora=rslora)
    stir(model)
    name = next(name for name in model.trainable() if "lora_A" in name)
    layer = model.unet.get_submodule(name.split(".lora_A")[0])
    low, high = model.trainable()[name], model.trainable()[name.replace("lora_A", "lora_B")]
    x = torch.randn(3, low.shape[1])
    wanted = layer.base_layer(x) + (6 / (2 if rslora else 4)) * x @ low.T @ high.T
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.slow
def test_an_adapter_to_go_on_from_is_policy_and_reference_at_first(folders):
    first = Backbone(str(folders["sdxl"]), device=CPU)
    first.add_lora(rank=2, alpha=4)
    stir(first)
    start = {name: parameter.detach().clone() for name, parameter in first.trainable().items()}
    model = Backbone(str(folders["sdxl"]), device=CPU)
    before = model.reference_fingerprint()
    model.add_lora(rank=2, alpha=4, start=start)
    assert model.reference_fingerprint() != before
    batch, t, noise = inputs(model)
    assert torch.equal(preference_step(model, batch, timesteps=t, noise=noise, beta=100.0).margin, torch.zeros(2))
    stir(model)
    reference = model.predict(batch.latents, t, batch.conditioning, reference=True)
    assert torch.equal(reference, first.predict(batch.latents, t, batch.conditioning))
    with pytest.raises(UserError, match=r"lora\.rank"):
        Backbone(str(folders["sdxl"]), device=CPU).add_lora(rank=3, alpha=4, start=start)
    with pytest.raises(UserError, match=r"lora\.targets"):
        Backbone(str(folders["sdxl"]), device=CPU).add_lora(rank=2, alpha=4, targets=["to_q"], start=start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_unet_starts_at_margin_zero_and_its_reference_stays(folders, dtype):
    model = Backbone(str(folders["sdxl"]), device=CPU, dtype=dtype)
    model.train_all(reference=True)
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}
    kept = {parameter.dtype for parameter in model.frozen.parameters()}
    assert kept == ({torch.float32} if dtype == torch.float32 else {torch.float32, torch.bfloat16})
    batch, t, noise = inputs(model)
    result = preference_step(model, batch, timesteps=t, noise=noise, beta=2000.0)
    assert result.margin.abs().max() < 1e-3  # of beta times errors of about 1: kernels with and without a graph may round apart
    result.loss.mean().backward()
    assert all(parameter.grad is not None for parameter in model.trainable().values())
    before = model.predict(batch.latents, t, batch.conditioning, reference=True)
    stir(model, 0.01)
    assert torch.equal(model.predict(batch.latents, t, batch.conditioning, reference=True), before)
    assert not torch.equal(model.predict(batch.latents, t, batch.conditioning), before)


def test_without_a_reference_none_can_be_asked(folders):
    model = Backbone(str(folders["sd15"]), device=CPU)
    model.train_all(reference=False)
    batch, t, _ = inputs(model)
    with pytest.raises(ValueError, match="no reference"):
        model.predict(batch.latents, t, batch.conditioning, reference=True)


def test_v_prediction_and_epsilon_agree_through_the_errors(folders):
    """v - v_target = (eps - eps_target) / alpha at the same x_t: a model of either kind has the same error up to alpha squared."""
    model = Backbone(str(folders["sd21"]), device=CPU)
    batch, t, noise = inputs(model)
    process = model.process
    noisy = process.add_noise(batch.latents, noise[:, None], t)
    v = model.predict(noisy, t, batch.conditioning)
    alpha, sigma = process.scales(t, batch.latents)
    eps = alpha * v + sigma * noisy
    error_v = (v - process.target(batch.latents, noise[:, None], t)).square().mean(dim=(-3, -2, -1))
    error_eps = (eps - noise[:, None]).square().mean(dim=(-3, -2, -1))
    torch.testing.assert_close(error_eps, alpha[:, :, 0, 0, 0] ** 2 * error_v, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_same_weights_under_another_configuration_are_another_model(folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders["sd15"], other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    one, two = Backbone(str(folders["sd15"]), device=CPU), Backbone(str(other), device=CPU)
    assert one.fingerprint != two.fingerprint
    assert one.encoders_fingerprint == two.encoders_fingerprint
    change(other, "vae", scaling_factor=0.2)
    assert Backbone(str(other), device=CPU).encoders_fingerprint != one.encoders_fingerprint


def change(folder, part: str, **values) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.slow
def test_models_of_other_kinds_are_refused_by_name(folders, tmp_path):
    def copied(kind: str):
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders[kind], folder)
        return folder

    other = copied("sdxl")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    with pytest.raises(UserError, match="StableDiffusionXLImg2ImgPipeline"):
        load_pipeline(str(other))
    pickled = copied("sd15")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="pickled file, which is not opened"):
        load_pipeline(str(pickled))
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only \.safetensors"):
        load_pipeline(str(tmp_path / "old.ckpt"))
    with pytest.raises(UserError, match="model_config"):
        load_pipeline(str(folders["sd15"]), config=str(folders["sd15"]))
    odd = copied("sd15")
    scheduler = odd / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "sample"}))
    with pytest.raises(UserError, match="sample"):
        Backbone(str(odd), device=CPU)
    for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        edm = copied("sdxl")
        index = json.loads((edm / "model_index.json").read_text())
        (edm / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
        (edm / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UserError, match="no schedule of betas"):
            Backbone(str(edm), device=CPU)
    refiner = copied("sdxl")
    change(refiner, "text_encoder_2", projection_dim=24)
    with pytest.raises(UserError):
        Backbone(str(refiner), device=CPU)
    file = tiny.single_file(folders["sd21"], tmp_path / "v2.safetensors")
    with pytest.raises(UserError, match="give --model_config"):
        load_pipeline(str(file))
    file = tiny.single_file(folders["sdxl"], tmp_path / "xl.safetensors")
    with pytest.raises(UserError, match="its own architecture"):
        load_pipeline(str(file), config=str(folders["sd15"]))
