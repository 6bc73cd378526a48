"""Export: what training saw is what plain diffusers loads, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pipelines import export
from dedpo_diffusion.settings import DataSettings, LoraSettings, TrainSettings
from dedpo_diffusion.weights.checkpoints import save_checkpoint
from dedpo_diffusion.weights.run_folder import checkpoint_folder, open_run
from support.adapters import read_metadata

PLAIN = """
import sys, torch
from diffusers import StableDiffusionPipeline
assert not any(name.startswith("dedpo") for name in sys.modules)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe.load_lora_weights(sys.argv[2])
x, t, text = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(pipe.unet(x, t, text).sample, sys.argv[4])
"""


@pytest.fixture
def trained(tiny_model, tmp_path):
    """A run folder with one checkpoint of a random adapter, rank 4 with alpha 10, and the live model."""

    def build(rank: int = 4, alpha: float = 10.0, targets: list[str] | None = None):
        model = Backbone(str(tiny_model), device=torch.device("cpu"))
        model.add_lora(rank=rank, alpha=alpha, targets=targets)
        for k, parameter in enumerate(model.trainable().values()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
        lora = LoraSettings(rank=rank, alpha=alpha, targets=targets)
        settings = TrainSettings(model=str(tiny_model), out=tmp_path / "run", data=DataSettings(pairs=tmp_path), lora=lora)
        open_run(settings.out, settings, {})
        save_checkpoint(checkpoint_folder(settings.out, 7), model.trainable(), torch.optim.AdamW(model.trainable().values()), {"step": 7})
        return model, settings.out

    return build


@pytest.mark.slow  # tests of exported files hold the same
@pytest.mark.parametrize(("alpha", "targets"), [(4.0, None), (10.0, None), (1.0, ["to_q", "conv1", "proj_in"])])
def test_plain_diffusers_reproduces_the_training_time_unet(trained, tiny_model, tmp_path, alpha, targets):
    model, run = trained(alpha=alpha, targets=targets)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    t = torch.tensor([10, 700])
    with torch.no_grad():
        ours = model.unet(x, t, text).sample
        with model.reference():
            base = model.unet(x, t, text).sample
    assert export.main([str(run), "--out", str(tmp_path / "lora.safetensors")]) == 0
    torch.save((x, t, text), tmp_path / "in.pt")
    paths = [str(tmp_path / name) for name in ("lora.safetensors", "in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", PLAIN, str(tiny_model), *paths], check=True, capture_output=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_alpha_and_settings_are_in_the_metadata(trained, tmp_path):
    _, run = trained()
    assert export.main([str(run), "--out", str(tmp_path / "lora.safetensors")]) == 0
    stored = read_metadata(tmp_path / "lora.safetensors")
    assert stored["lora_adapter_metadata"]["unet.lora_alpha"] == stored["lora_adapter_metadata"]["unet.r"] == 4  # the scale is worked in
    assert stored["dedpo_settings"]["lora"]["alpha"] == 10.0
    assert stored["dedpo_settings"]["objective"]["beta"] == 2000.0
    assert stored["dedpo_settings"]["step"] == 7
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert all(isinstance(value, str) for value in file.metadata().values())
        json.loads(file.metadata()["dedpo_settings"])


def test_merged_by_hand_without_peft(trained, tiny_model, tmp_path):
    """W + B A with the file's own numbers gives the adapted layer: alpha / r is worked into B."""
    model, run = trained()
    assert export.main([str(run), "--out", str(tmp_path / "lora.safetensors")]) == 0
    tensors = load_file(tmp_path / "lora.safetensors")
    name = next(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("to_k.lora_A.weight"))
    layer = model.unet.get_submodule(name.removeprefix("unet."))
    by_hand = layer.base_layer.weight + tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    x = torch.randn(3, by_hand.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ by_hand.T, atol=1e-5, rtol=1e-5)


def test_mistakes(trained, tmp_path, capsys):
    _, run = trained()
    assert export.main([str(run), "--out", str(tmp_path / "lora.bin")]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert export.main([str(tmp_path), "--out", str(tmp_path / "lora.safetensors")]) == 2
    assert "no settings.yaml" in capsys.readouterr().err
    assert not (tmp_path / "lora.safetensors").exists()
