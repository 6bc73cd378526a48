"""Sampling on a device with little memory: smaller batches, tiles, and the same images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter
from dedpo_diffusion.models import memory, tiny
from dedpo_diffusion.pipelines import propose, sample
from dedpo_diffusion.sampling import fitting
from dedpo_diffusion.sampling import sampler as sampling
from dedpo_diffusion.sampling.recipe import Recipe
from support.sampling import PROMPTS, arguments, pixels


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def told(folder):
    return {file.name: json.loads(Image.open(file).text["dedpo"]) for file in sorted(folder.glob("*.png"))}


def give(monkeypatch, change):
    """Have every pipeline that is loaded changed."""
    load = sampling.load_sampler

    def loaded(*given, **more):
        pipe = load(*given, **more)
        change(pipe)
        return pipe

    monkeypatch.setattr(sampling, "load_sampler", loaded)


def room_for(images: int):
    """A UNet that runs out of memory with more; it predicts with and without the prompt at once."""

    def refuse(module, given):
        if len(given[0]) > 2 * images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return lambda pipe: pipe.unet.register_forward_pre_hook(refuse)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_halved_run_has_the_images_of_one_that_was_not(folders, prompts, tmp_path, monkeypatch, capsys, kind):
    """Those of the smaller batch bit for bit; those of the whole batch up to rounding, which may move a channel by a level."""
    options = {"seeds": 4, "batch": 8}  # twelve images
    for name, batch in (("whole", 8), ("two", 2)):
        assert sample.main(arguments(folders[kind], prompts, tmp_path / name, **options | {"batch": batch})) == 0
    capsys.readouterr()
    give(monkeypatch, room_for(3))
    assert sample.main(arguments(folders[kind], prompts, tmp_path / "halved", **options)) == 0
    said = capsys.readouterr().out
    for tried, half in ((8, 4), (4, 2)):
        assert said.count(f"sampling: the GPU's memory is too small for {tried} images at once; going on with {half}\n") == 1
    halved, two, whole = (pixels(tmp_path / name) for name in ("halved", "two", "whole"))
    assert len(halved) == 12
    for file, image in halved.items():
        assert np.array_equal(image, two[file])
        assert np.abs(image.astype(int) - whole[file].astype(int)).max() <= 1
    assert {one["batch"] for one in told(tmp_path / "halved").values()} == {2}
    assert {one["batch"] for one in told(tmp_path / "whole").values()} == {8}


def test_a_halved_run_goes_on_with_the_whole_batch_elsewhere(tiny_model, prompts, tmp_path, monkeypatch):
    """A card with more memory takes up the folder: the batch that fits is no setting of the run."""
    given = arguments(tiny_model, prompts, tmp_path / "a", batch="auto")
    with monkeypatch.context() as patch:
        give(patch, room_for(1))
        assert sample.main(given) == 0
    first = pixels(tmp_path / "a")
    (tmp_path / "a" / "00001-1.png").unlink()
    (tmp_path / "a" / "index.parquet").unlink()
    assert sample.main(given) == 0
    again = pixels(tmp_path / "a")
    assert list(again) == list(first)
    assert np.abs(again["00001-1.png"].astype(int) - first["00001-1.png"].astype(int)).max() <= 1
    assert {name: one["batch"] for name, one in told(tmp_path / "a").items()} == {"00000-0.png": 1, "00001-1.png": 8, "00002-2.png": 1}


@pytest.mark.slow
def test_no_room_for_one_image_stops_with_a_remedy(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    give(monkeypatch, room_for(0))
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a")) == 2
    assert "even for one of the images at a time; give --dtype bfloat16, or a smaller --size" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [sample, propose])
def test_auto_is_resolved_before_it_is_recorded(tiny_model, prompts, tmp_path, stage, capsys):
    """On a CPU to what the defaults have been: a folder of that time goes on, and holds the same bits."""
    extra = {"images_per_prompt": 2} if stage is propose else {"seeds": 3}
    given = arguments(tiny_model, prompts, tmp_path / "auto", **extra)
    del given[given.index("--batch") : given.index("--batch") + 2]
    own = arguments(tiny_model, prompts, tmp_path / "own", **extra | {"batch": 8, "dtype": "float32"})
    assert stage.main(given) == stage.main(own) == 0
    if stage is sample:
        held = yaml.safe_load((tmp_path / "auto" / "settings.yaml").read_text())
        assert (held["dtype"], held["batch"]) == ("float32", 8)
        files = sorted(file.name for file in (tmp_path / "auto").glob("*.png"))
        assert files and all((tmp_path / "auto" / name).read_bytes() == (tmp_path / "own" / name).read_bytes() for name in files)
        assert sample.main([*given, "--dtype", "float32", "--batch", "8"]) == 0  # the same run
        assert sample.main([*given, "--dtype", "bfloat16"]) == 2
        assert "dtype is 'float32' there, 'bfloat16' now" in capsys.readouterr().err


# ---- measuring


class Counted:
    """A meter that counts what torch's operations allocate on the CPU."""

    def __init__(self, room: int) -> None:
        self.size, self.peaks = room, []

    def room(self) -> int:
        return self.size

    def peak(self, call) -> int:
        with AllocationCounter() as counter:
            call()
        self.peaks.append(counter.peak)
        return counter.peak


@pytest.mark.slow
def test_two_images_tell_what_more_of_them_take(folders):
    """The line through 1 and 2 images meets what 4 and 8 take within a tenth, on a real UNet."""
    pipe = sampling.load_sampler(str(folders["sdxl"]), device="cpu")
    recipe = Recipe(str(folders["sdxl"]), steps=9, guidance=5.0, batch=8, fit=True)
    size = (tiny.SIDE, tiny.SIDE)
    meter = Counted(room=10**12)
    assert fitting.batch_limit(pipe, recipe, PROMPTS[0], size, meter=meter).now == 8
    one, two = meter.peaks
    for count in (4, 8):
        needed = meter.peak(lambda count=count: fitting.probe(pipe, recipe, PROMPTS[0], size, count))
        assert needed == pytest.approx(one + (count - 1) * (two - one), rel=0.1)
        room = needed / memory.SHARE
        assert fitting.batch_limit(pipe, recipe, PROMPTS[0], size, meter=Counted(1.1 * room)).now == count
        assert fitting.batch_limit(pipe, recipe, PROMPTS[0], size, meter=Counted(0.9 * room)).now == count // 2


def test_a_batch_that_was_asked_for_is_tried_unmeasured(tiny_model):
    pipe = sampling.load_sampler(str(tiny_model), device="cpu")
    recipe = Recipe(str(tiny_model), steps=2, guidance=5.0, batch=3)
    assert fitting.batch_limit(pipe, recipe, PROMPTS[0], (16, 16), meter=Counted(0)).now == 3


def test_measuring_changes_no_image(tiny_model):
    """Noise comes from the seeds alone, so what was sampled before leaves no trace."""
    pipe = sampling.load_sampler(str(tiny_model), device="cpu")
    given = {"steps": 3, "guidance": 5.0}
    [before] = sampling.sample(pipe, PROMPTS[:1], [5], **given)
    fitting.probe(pipe, Recipe(str(tiny_model), batch=2, **given), PROMPTS[0], sampling.image_size(pipe, None), 2)
    [after] = sampling.sample(pipe, PROMPTS[:1], [5], **given)
    assert before.tobytes() == after.tobytes()


# ---- decoding


def vae_with_room_for(pixels: int, images: int = 99):
    """A VAE whose decoder runs out of memory with larger latents, or with more of them."""

    def refuse(module, given):
        if given[0].shape[-1] > pixels or len(given[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return lambda pipe: pipe.vae.decoder.register_forward_pre_hook(refuse)


def test_images_are_decoded_one_by_one_once_memory_is_short(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "whole")) == 0
    give(monkeypatch, vae_with_room_for(99, images=1))
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "sliced")) == 0
    assert "tiles" not in capsys.readouterr().out
    whole, sliced = (pixels(tmp_path / name) for name in ("whole", "sliced"))
    assert all(np.abs(sliced[file].astype(int) - image.astype(int)).max() <= 1 for file, image in whole.items())
    assert all("vae" not in one for one in told(tmp_path / "sliced").values())


@pytest.mark.slow
def test_an_image_that_is_too_large_is_decoded_in_tiles(folders, prompts, tmp_path, monkeypatch, capsys):
    """Of the model's own size too; the file says so."""
    pipe = sampling.load_sampler(str(folders["sdxl"]), device="cpu")
    side = pipe.vae.tile_latent_min_size
    assert sample.main(arguments(folders["sdxl"], prompts, tmp_path / "whole", size=side * pipe.vae_scale_factor)) == 0
    give(monkeypatch, vae_with_room_for(side // 2))
    assert sample.main(arguments(folders["sdxl"], prompts, tmp_path / "tiled", size=side * pipe.vae_scale_factor)) == 0
    assert capsys.readouterr().out.count("decoding in tiles, which may leave faint seams") == 1
    whole, tiled = (pixels(tmp_path / name) for name in ("whole", "tiled"))
    for file, image in whole.items():
        assert tiled[file].shape == image.shape
    assert all(one["vae"] == "tiled" for one in told(tmp_path / "tiled").values())


@pytest.mark.slow
def test_no_room_for_a_tile_stops_with_a_remedy(folders, prompts, tmp_path, monkeypatch, capsys):
    give(monkeypatch, vae_with_room_for(0))
    assert sample.main(arguments(folders["sdxl"], prompts, tmp_path / "a")) == 2
    assert "even for one of the images at a time" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_in_float16_the_vae_stays_in_float32(folders, kind):
    """SDXL's overflows in float16: here one whose activations grow beyond 65504."""
    pipe = sampling.load_sampler(str(folders[kind]), device="cpu", dtype="float16")
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    seen = []
    pipe.vae.decoder.conv_in.register_forward_hook(lambda module, given, out: out * 1e6)
    pipe.vae.decoder.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    [image] = sampling.sample(pipe, PROMPTS[:1], [0], steps=2, guidance=5.0)  # or it is refused as not finite
    assert seen == [torch.float32] and image.size[0] > 0
    assert sampling.load_sampler(str(folders[kind]), device="cpu", dtype="bfloat16").vae.dtype == torch.bfloat16


# ---- on a CPU


def test_a_large_model_on_a_cpu_says_how_long_it_takes(tiny_model, prompts, tmp_path, monkeypatch, capsys):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "small")) == 0
    assert "CPU" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "large")) == 0
    said = capsys.readouterr().out
    assert f"no GPU is here: {tiny_model} runs on the CPU. If this machine has a GPU, install a build of torch that finds it\n" in said
    assert said.count("on the CPU this would take about 1 second in all, by the pace of its beginning\n") == 1


def test_a_model_that_does_not_fit_the_device(tiny_model, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(StableDiffusionPipeline, "to", full)
    with pytest.raises(UserError, match=r"does not fit on the device in float32 .*; give --dtype bfloat16, or --device cpu"):
        sampling.load_sampler(str(tiny_model), device="cpu")
