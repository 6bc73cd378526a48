"""The benchmarks of a training step: the published step computes our loss, and what is counted is right."""

from __future__ import annotations

import json
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import PairBatch
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.evaluation.benchmarks import gpu, memory, random_models, throughput, throughput_arms
from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter, storage_bytes
from dedpo_diffusion.evaluation.benchmarks.published_step import Examples, PublishedStep
from dedpo_diffusion.evaluation.benchmarks.throughput import ThroughputSettings, count_flop, ratio
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.settings import DataSettings
from dedpo_diffusion.training.sources import LiveSource
from support.training import fresh_accelerate_state  # noqa: F401

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_published_step_computes_our_loss_and_gradient(folders, tmp_path, kind):
    """From the same image files, with the same draws, by two routes that share no code but the networks."""
    torch.manual_seed(3)  # the adapters are drawn, too
    reader = PairReader(tiny.write_pairs(tmp_path, "some", count=4))
    model, preferred = Backbone(str(folders[kind]), device=CPU), np.array([0, 1, 1, 0])
    examples = Examples(reader, preferred, model.text.tokenizers, tiny.SIDE, flip=False)
    settings = {"rank": 2, "batch": 4, "beta": 500.0, "learning_rate": 1e-3, "checkpointing": False}
    published = PublishedStep(model, examples, **settings)
    model.add_lora(rank=2, alpha=2)
    theirs = dict(published.unet.named_parameters())
    for name, parameter in model.trainable().items():  # a policy that has left the reference
        parameter.data += 0.3 * torch.randn_like(parameter)
        theirs[name].data.copy_(parameter.data)

    batch = default_collate([examples[row] for row in range(4)])
    shape = model.latent_shape(tiny.SIDE)
    noise, timesteps = torch.randn(4, *shape), torch.tensor([20, 300, 600, 990])
    torch.manual_seed(5)
    latents = published.latents(batch["pixels"])
    loss, _ = published.losses(latents, noise.repeat(2, 1, 1, 1), timesteps.repeat(2), *published.conditioning(batch))
    loss.backward()

    torch.manual_seed(5)
    winners, losers = torch.randn(8, *shape).chunk(2)
    first = torch.tensor(preferred == 0)[:, None, None, None]
    posterior = torch.stack([torch.where(first, winners, losers), torch.where(first, losers, winners)], dim=1)
    source = LiveSource(reader, model, DataSettings(tmp_path), size=tiny.SIDE, seed=0)
    encoded = source.fetch(range(4), range(4), torch.zeros(4, dtype=torch.bool))
    target = 1.0 - torch.tensor(preferred, dtype=torch.float32)
    ours = PairBatch(model.latents(encoded.mean, encoded.std, posterior), encoded.conditioning, target, torch.ones(4))
    result = preference_step(model, ours, timesteps=timesteps, noise=noise, beta=500.0, balance="none")
    result.loss.mean().backward()

    assert abs(loss.item() - 0.6931) > 0.01
    torch.testing.assert_close(result.loss.mean(), loss, rtol=1e-4, atol=1e-5)
    # what flows back to a layer is rounded by the size of all of it, however little of it is left in the layer's own gradient: in 25 draws
    # of the adapters, gaps above a thousandth of that were up to 15 float32 eps of the largest gradient
    rounding = 32 * torch.finfo(torch.float32).eps * max(parameter.grad.abs().max().item() for parameter in model.trainable().values())
    for name, parameter in model.trainable().items():
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-3 * scale + rounding)


def settings(tmp_path):
    return ThroughputSettings(out=tmp_path / "found.json", pairs=4, dataset=4, rounds=2, warmup=0, threads=1)


@pytest.mark.slow
def test_arithmetic_of_the_arms(tiny_model, tmp_path):
    """What an arm leaves out is exactly what its arithmetic lacks."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Backbone(str(tiny_model), device=CPU)
    bench = throughput_arms.set_up(settings(tmp_path), model, tmp_path)
    flop = count_flop(bench)
    with FlopCounterMode(display=False) as encoding:
        model.encode_images(torch.zeros(8, 3, model.size, model.size))
        conditioning = model.encode_prompts(["a circle"] * 4)
    noisy = torch.zeros(4, 2, *model.latent_shape(model.size))
    with FlopCounterMode(display=False) as reference:
        model.predict(noisy, torch.zeros(4, dtype=torch.int64), conditioning, reference=True)
    assert flop["published"] == flop["live"]
    assert flop["live"] - flop["cached"] == encoding.get_total_flops() > 0
    assert flop["cached"] - flop["stored"] == reference.get_total_flops() > 0
    assert 1.8 < flop["stored"] / reference.get_total_flops() < 3  # forward, the gradient of activations, and the adapter


@pytest.mark.slow
def test_command(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(random_models, "random_backbone", lambda *_, device, dtype: Backbone(str(tiny_model), device=device, dtype=dtype))
    monkeypatch.setattr(throughput, "matrix_peak", lambda *_: 1e12)
    out = tmp_path / "found.json"
    options = ["--pairs", "2", "--dataset", "2", "--rounds", "2", "--warmup", "0", "--threads", "1", "--gradient_checkpointing", "true"]
    assert throughput.main(["--out", str(out), *options]) == 0
    found = json.loads(out.read_text())
    assert list(found["arms"]) == ["published", "live", "cached", "stored"]
    has = {name: set(arm["phase_shares"]) for name, arm in found["arms"].items()}
    everything = {"noise, target, loss", "loading", "latents", "text", "policy", "reference", "backward", "optimizer"}
    assert has["published"] == has["live"] == everything
    assert has["cached"] == everything - {"latents", "text"}
    assert has["stored"] == everything - {"latents", "text", "reference"}
    for arm in found["arms"].values():
        assert sum(arm["phase_shares"].values()) == pytest.approx(1)
        assert arm["peak_bytes"] == arm["kept_bytes"] + arm["step_bytes"] > 0
    assert found["arms"]["cached"]["kept_bytes"] < found["arms"]["live"]["kept_bytes"]
    assert found["arms"]["published"]["over_published"] == {"ratio": 1, "ci": [1, 1]}


@pytest.mark.slow
def test_the_gpu_script_measures_loras_and_whole_unets_and_keeps_what_failed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(random_models, "random_backbone", lambda *_, device, dtype: Backbone(str(tiny_model), device=device, dtype=dtype))
    monkeypatch.setattr(throughput, "matrix_peak", lambda *_: 1e12)
    rows = [gpu.Row("sd15", 1, gradient_checkpointing="selective"), gpu.Row("sd15", 1, "full"), gpu.Row("sd15", 1, compile=True)]
    monkeypatch.setattr(gpu, "rows", lambda _: rows)
    real = gpu.measure

    def measure(settings):
        if settings.compile:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return real(settings)

    monkeypatch.setattr(gpu, "measure", measure)
    out, threads = tmp_path / "gpu.json", torch.get_num_threads()
    try:
        assert gpu.main(["--out", str(out), "--smoke", "true"]) == 0
    finally:
        torch.set_num_threads(threads)  # other tests compare runs to the bit
    lora, full, failed = json.loads(out.read_text())["rows"].values()
    assert list(lora["arms"]) == ["published", "live", "cached", "stored"] and list(full["arms"]) == ["live", "cached", "stored"]
    assert full["arms"]["live"]["over_published"] is None
    assert full["arms"]["stored"]["kept_bytes"] < full["arms"]["cached"]["kept_bytes"]  # without a reference
    assert failed == {"failed": "OutOfMemoryError: out of memory"}
    assert str(tmp_path) not in out.read_text()


def test_the_gpu_script_needs_a_gpu_or_is_asked_to_do_without(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device here; try the script with --smoke true"):
            gpu.run(gpu.GpuSettings(out=tmp_path / "gpu.json"))
    small = gpu.rows(gpu.GpuSettings(out=tmp_path / "gpu.json", smoke=True))
    assert {row.model for row in small} == {"small_sdxl"} and not any(row.compile for row in small)
    assert {(row.weights, row.gradient_checkpointing) for row in small} == {(row.weights, row.gradient_checkpointing) for row in gpu.ROWS}


def test_ratio_and_its_interval():
    found = ratio([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 2.0, 2.0, 2.0])
    assert found["ratio"] == 3
    assert 2 <= found["ci"][0] <= 3 <= found["ci"][1] <= 5
    with pytest.raises(UserError, match="2 rounds"):
        throughput.check(ThroughputSettings(out=None, rounds=1))


def test_phases_count_inner_parts_alone(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(throughput_arms.time, "perf_counter", lambda: next(clock))
    phases = throughput_arms.PhaseTimer(lambda: None)
    with phases("outer"):
        with phases("inner"):
            pass
        with phases("inner"):
            pass
    assert phases.seconds == {"outer": 1.0 + 3.0 + 5.0, "inner": 2.0 + 4.0}


def test_count_of_known_sizes():
    kept = torch.zeros(100)
    with AllocationCounter() as counter:
        kept.add_(1)
        kept.view(10, 10)[2:4]
        assert counter.live == counter.peak == 0
        one = kept * 2
        two = one.t() if one.ndim == 2 else one[:3]
        assert counter.live == 400
        three = one + one
        del one
        assert counter.live == 800  # a view still holds it
        del two
        assert counter.live == 400
        del three
    assert (counter.live, counter.peak, counter.made) == (0, 800, 800)
    with AllocationCounter(512) as counter:
        four = kept * 2
    assert counter.live == 512
    assert storage_bytes([four, four[2:], kept]) == 800


def trained_bytes(kind, *, real, full=False, checkpointing=False):
    """What `training_bytes` finds on a tiny model, on real or on fake tensors of the processor."""

    def work():
        torch.manual_seed(0)
        with mock.patch.dict(random_models.SIZES, {kind: TINY[kind]}):
            model = random_models.random_backbone(kind, device=CPU, dtype=torch.float32)
        model.train_all(reference=True) if full else model.add_lora(rank=2, alpha=2)
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        batch = memory.some_batch(model, 2, tiny.SIDE, TINY[kind]["unet"]["cross_attention_dim"], stored=False)
        return memory.training_bytes(model, batch, accumulation=2, counter=AllocationCounter())

    if real:
        return work()
    with memory.fake(cuda_rules=False):
        return work()


VAE = random_models.VAE | {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
WORDS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
SHARED = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2], "attention_head_dim": [2, 4], "cross_attention_dim": 72, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32, "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
SD = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "cross_attention_dim": 32,
}  # fmt: skip
TINY = {
    "sdxl": {"unet": SHARED | XL, "vae": VAE, "text": [WORDS, WORDS | {"hidden_size": 40}]},
    "sd15": {"unet": SHARED | SD, "vae": VAE, "text": [WORDS]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("sd15", {"full": True, "checkpointing": True}), ("sdxl", {"checkpointing": True})],
)
def test_bytes_counted_on_fake_tensors_are_those_of_a_real_run(kind, options):
    real, computed = (trained_bytes(kind, real=real, **options) for real in (True, False))
    assert computed == real
    assert real["gradients"] == real["trained_weights"]
    assert 2 * real["trained_weights"] <= real["moments"] <= 2 * real["trained_weights"] + 4 * 1000  # and a count for each tensor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_bytes_of_sampling_on_fake_tensors_are_those_of_a_real_run(kind):
    """The UNet's grow with the number of images; those of decoding, which takes one after the other, by the images that are done alone."""

    def sampled(images):
        with mock.patch.dict(random_models.SIZES, {kind: TINY[kind]}):
            model = random_models.random_backbone(kind, device=CPU, dtype=torch.float32)
        return memory.sampling_bytes(model, images, counter=AllocationCounter)

    real = [sampled(images) for images in (1, 2, 4)]
    with memory.fake(cuda_rules=False):
        assert [sampled(images) for images in (1, 2, 4)] == real
    unet, vae = ([one[part] for one in real] for part in ("unet", "vae"))
    assert unet[2] - unet[1] == pytest.approx(2 * (unet[1] - unet[0]), rel=0.1) and unet[1] > 1.5 * unet[0]
    latent = 4 * TINY[kind]["unet"]["sample_size"] ** 2 * 4
    picture = 3 * TINY[kind]["vae"].get("sample_size", tiny.SIDE) ** 2 * 4
    assert vae[2] - vae[1] <= 4 * (picture + latent)
    for one in real:
        assert one["peak"] == one["weights"] + max(one[part] for part in ("text", "unet", "vae"))


def test_count_against_the_allocator():
    """The profiler sees every allocation, also those inside of kernels."""
    from torch.profiler import ProfilerActivity, profile

    unet = UNet2DConditionModel(**TINY["sdxl"]["unet"])
    given = torch.zeros(4, 4, 32, 32), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 16, 72)
    added = {"text_embeds": torch.zeros(4, 32), "time_ids": torch.zeros(4, 6)}

    def work():
        unet(*given, added_cond_kwargs=added).sample.square().mean().backward()
        unet.zero_grad()

    work()
    with AllocationCounter() as counter:
        work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = sorted((event.start_ns(), event.nbytes()) for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    peak = np.cumsum([size for _, size in events]).max()
    assert counter.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("sdxl", torch.bfloat16), ("sd15", torch.float32)])
def test_rules_of_cuda_are_kept_on_the_processor(kind, dtype):
    """A forward pass with its graph under autocast, on fake tensors of both devices."""

    def forward(device):
        with ExitStack() as stack:
            if device == "cuda":
                stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
                stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
                stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", memory._attention))
            stack.enter_context(memory.fake(cuda_rules=device == "cpu"))
            stack.enter_context(torch.device(device))
            unet = nn.Module.to(UNet2DConditionModel(**TINY[kind]["unet"]), dtype)
            added = {"text_embeds": torch.zeros(2, 32, dtype=torch.bfloat16), "time_ids": torch.zeros(2, 6)}
            latents, text = (
                torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16),
                torch.zeros(2, 16, 72 if kind == "sdxl" else 32, dtype=torch.bfloat16),
            )
            with AllocationCounter() as counter, torch.autocast(device, torch.bfloat16):
                out = unet(latents, torch.zeros(2, dtype=torch.int64), text, added_cond_kwargs=added).sample
            return out.dtype, counter.live, counter.peak

    assert forward("cpu") == forward("cuda")


@pytest.mark.slow
def test_memory_of_a_config(monkeypatch, tmp_path, capsys):
    """The real configurations and the command, on tiny networks but pictures of the real size."""
    monkeypatch.setattr(memory, "BLOCK", 1)
    for kind, sizes in TINY.items():
        monkeypatch.setitem(random_models.SIZES, kind, sizes)
    out = tmp_path / "found.json"
    assert memory.main(["--out", str(out), "--configs", '["sdxl_lora_12gb", "sd15_full"]', "--models", '["sd15"]']) == 0
    assert "computed" in capsys.readouterr().out
    lines = {(line["config"], line["reference_stored"]): line for line in json.loads(out.read_text())["lines"]}
    stored, full = lines["sdxl_lora_12gb", True], lines["sd15_full", False]["bytes"]
    assert stored["batch"] == 1
    assert stored["gradient_checkpointing"]
    assert stored["bytes"]["peak"] <= lines["sdxl_lora_12gb", False]["bytes"]["peak"]
    assert lines["sd15_full", True]["bytes"]["frozen_weights"] == 0 < full["frozen_weights"] < full["trained_weights"]
    assert full["gradients"] == full["trained_weights"] <= full["moments"] / 2
    sampling = json.loads(out.read_text())["sampling"]
    assert [(line["model"], line["dtype"], line["batch"]) for line in sampling] == [
        ("sd15", dtype, batch) for dtype in ("bfloat16", "float32") for batch in (1, 2, 4)
    ]
    half, whole = sampling[0]["bytes"]["weights"], sampling[3]["bytes"]["weights"]
    assert 1.8 * half < whole < 2 * half  # positions of words are whole numbers in both
