"""LoRA files in a sampler: layouts, alphas, strengths, several at once; what diffusers would pass over in silence is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pipelines import sample as stage
from dedpo_diffusion.sampling import sampler as sampling
from dedpo_diffusion.sampling.sampler import Recipe, add_loras, load_sampler, sample
from dedpo_diffusion.weights import Lora, LoraLayer, read_lora_file, to_kohya
from dedpo_diffusion.weights.fusing import merge
from support.adapters import diffusers_lora, save_lora

RANK = 4
PREFIX = {"tiny": {"unet": "lora_unet", "text_encoder": "lora_te"}}
PREFIX["sdxl"] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def adapters(folder, *, seed: int, text: bool) -> dict[str, torch.Tensor]:
    """Random values for every adapter of a model, by the names of its diffusers file."""
    model = Backbone(str(folder), device=torch.device("cpu"))
    model.add_lora(rank=RANK, alpha=RANK, text=text)
    tensors, _ = diffusers_lora(model.trainable(), rank=RANK, alpha=RANK, targets=[])
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}


def write(path, tensors, alpha: float = RANK):
    """A file in the layout of diffusers."""
    config = {}
    for part in {name.partition(".")[0] for name in tensors}:
        config |= {f"{part}.r": RANK, f"{part}.lora_alpha": alpha, f"{part}.use_dora": False, f"{part}.use_rslora": False}
        layers = {name.removeprefix(f"{part}.").rpartition(".lora_")[0] for name in tensors if name.startswith(f"{part}.")}
        config[f"{part}.target_modules"] = (
            ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else sorted(layer.removeprefix("text_model.") for layer in layers)
        )
    save_lora(path, tensors, config, {})
    return path


def write_kohya(path, tensors, alpha: float, prefix):
    """The same in the layout that A1111 and ComfyUI read: PREFIX_<layer with _>.lora_down.weight, .lora_up.weight, .alpha."""
    found = {}
    for name, value in tensors.items():
        part, _, inside = name.partition(".")
        layer, _, factor = inside.partition(".lora_")
        key = f"{prefix[part]}_{layer.replace('.', '_')}"
        found[f"{key}.{'lora_down' if factor.startswith('A') else 'lora_up'}.weight"] = value.contiguous()
        found[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(found, path, metadata={"ss_network_module": "networks.lora"})
    return path


@pytest.fixture(scope="module")
def made(tiny_model, folders, tmp_path_factory):
    """Per kind: a folder of LoRA files, their tensors, and the images that a list of files and strengths gives."""
    root = tmp_path_factory.mktemp("loras")

    models = {"tiny": tiny_model, "sdxl": folders["sdxl"]}
    pipes = {kind: load_sampler(str(model), device="cpu") for kind, model in models.items()}

    @functools.cache
    def image(kind, *files, strength=()) -> np.ndarray:
        add_loras(pipes[kind], kind, files, strength)
        found = np.asarray(sample(pipes[kind], ["a large cross"], [3], steps=2, guidance=4.0)[0]).astype(int)
        pipes[kind].unload_lora_weights()
        return found

    both = {}
    for kind in ("tiny", "sdxl"):
        one, other = adapters(models[kind], seed=1, text=True), adapters(models[kind], seed=2, text=False)
        (root / kind).mkdir()
        write(root / kind / "half.safetensors", one, alpha=2.0)
        write_kohya(root / kind / "kohya.safetensors", one, 2.0, PREFIX[kind])
        write(root / kind / "other.safetensors", other)
        both[kind] = (root / kind, one, other)
    return both, image


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "sdxl"])
def test_both_layouts_give_the_same_image(made, kind):
    """Rank 4 with alpha 2: a reader that takes alpha for the rank would draw something else."""
    both, image = made
    folder = both[kind][0]
    half = image(kind, folder / "half.safetensors")
    np.testing.assert_allclose(image(kind, folder / "kohya.safetensors"), half, atol=1)
    assert np.abs(half - image(kind)).max() > 20
    assert np.abs(half - image(kind, folder / "half.safetensors", strength=(2.0,))).max() > 20


def test_strength_and_alpha_multiply(made, tmp_path):
    both, image = made
    folder, one, _ = both["tiny"]
    whole = write(tmp_path / "whole.safetensors", one, alpha=4.0)
    np.testing.assert_array_equal(image("tiny", folder / "half.safetensors", strength=(2.0,)), image("tiny", whole))
    np.testing.assert_array_equal(image("tiny", whole, strength=(0.0,)), image("tiny"))


def test_several_add_up(made, tmp_path):
    """0.5 of one and -1.5 of the other is one LoRA of twice the rank whose factors are theirs."""
    both, image = made
    folder, one, other = both["tiny"]
    files, strength = (folder / "half.safetensors", folder / "other.safetensors"), (0.5, -1.5)
    stacked = {}
    for name, value in one.items():
        if name in other:
            weight = (0.25, -1.5) if "lora_B" in name else (1, 1)
            stacked[name] = torch.cat([weight[0] * value, weight[1] * other[name]], dim=int("lora_B" in name))
        else:
            stacked[name] = torch.cat([0.25 * value if "lora_B" in name else value, torch.zeros_like(value)], dim=int("lora_B" in name))
    joined = tmp_path / "joined.safetensors"
    save_file(stacked, joined)  # without metadata alpha is the rank
    found = image("tiny", *files, strength=strength)
    np.testing.assert_allclose(found, image("tiny", joined), atol=1)
    assert np.abs(found - image("tiny", *files)).max() > 20


def test_files_that_would_be_passed_over_are_refused(made, tiny_model, tmp_path):
    both, _ = made
    _, one, _ = both["tiny"]
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert first in one
    bad = {
        "renamed": ({name.replace("down_blocks.0", "down_blocks.7"): value for name, value in one.items()}, "have no place in"),
        "elsewhere": ({f"transformer.{name}": value for name, value in one.items()}, "seems to be a LoRA of a transformer"),
        "loha": ({"lora_unet_mid_block_attn.hada_w1_a": torch.ones(2, 2)}, "a LoHa of LyCORIS"),
        "wide": (one | {first: torch.ones(RANK, 99)}, "does not fit"),
    }
    pipe = load_sampler(str(tiny_model), device="cpu")

    def refused(file, words) -> None:
        with pytest.raises(UserError, match=words):
            add_loras(pipe, "tiny", [file])
        pipe.unload_lora_weights()

    for name, (tensors, words) in bad.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", words)
    kohya = write_kohya(tmp_path / "dora.safetensors", one, 2.0, PREFIX["tiny"])
    half = load_file(kohya)
    key = next(key for key in half if key.startswith("lora_unet_") and key.endswith(".lora_up.weight"))
    save_file(half | {key.replace("lora_up.weight", "dora_scale"): torch.ones(len(half[key]), 1)}, kohya)
    refused(kohya, "dora.safetensors: unet: some of its layers are DoRAs")
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused(tmp_path / "text.safetensors", "no safetensors file")
    refused(both["sdxl"][0] / "half.safetensors", r"kind of model|does not fit")


def outcome(pipe) -> list[torch.Tensor]:
    """What the text encoder and the UNet give for the same input."""
    tokens = pipe.tokenizer("a large cross", return_tensors="pt", padding="max_length", max_length=16, truncation=True).input_ids
    generator = torch.Generator().manual_seed(0)
    side = pipe.unet.config.sample_size
    latents = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator)
    words = torch.randn(1, 7, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return [pipe.text_encoder(tokens).last_hidden_state, pipe.unet(latents, 500, words).sample]


def odd(path, tensors, *, seed: int, dora: bool = False):
    """A file in the layout of kohya whose layers have alphas and ranks of their own, and all or none a DoRA's magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for place, name in enumerate(sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))):
        down, up = (tensors[f"{name}.lora_{which}.weight"] for which in "AB")
        alpha, rank = float(torch.randint(1, 9, (), generator=generator)), RANK - place % 3
        magnitude = 1 + torch.rand(len(up), generator=generator) if dora else None
        layers[name] = LoraLayer(0.3 * down[:rank], 0.3 * up[:, :rank], alpha, magnitude=magnitude)
    save_file(to_kohya(Lora(layers), "sd1"), path)
    return path


@pytest.mark.parametrize("dora", [False, True])
def test_a_loaded_lora_is_a_merged_one(made, tiny_model, tmp_path, dora):
    """Alphas and ranks that differ by layer, DoRAs in the layout of kohya; and two with text encoders add up."""
    one, two = made[0]["tiny"][1], adapters(tiny_model, seed=5, text=True)
    files = [odd(tmp_path / "one.safetensors", one, seed=1, dora=dora)]
    if not dora:  # whose changes depend on what they are put upon
        files.append(odd(tmp_path / "two.safetensors", two, seed=2))
    loaded, merged = (load_sampler(str(tiny_model), device="cpu") for _ in range(2))
    bare = outcome(merged)
    add_loras(loaded, "tiny", files)
    for file in files:
        merge(merged, read_lora_file(file))
    for found, wanted, before in zip(outcome(loaded), outcome(merged), bare, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - before).abs().max() > 0.05


BAD = {  # what people have in place of a LoRA
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "html": b"<!DOCTYPE html><html>sign in</html>",
    "pickle": b"PK\x03\x04" + bytes(60),
    "empty": b"",
}


@pytest.mark.parametrize("what", [*BAD, "cut", "nan"])
def test_files_that_are_no_lora_are_refused_by_the_command(made, tmp_path, capsys, monkeypatch, what):
    folder, one, _ = made[0]["tiny"]
    bad = tmp_path / "bad.safetensors"
    if what == "nan":
        write(bad, one | {name: torch.full_like(value, torch.nan) for name, value in list(one.items())[:1]})
    else:
        bad.write_bytes(BAD[what] if what in BAD else (folder / "half.safetensors").read_bytes()[:-100])
    monkeypatch.setattr(sampling, "load_sampler", None)  # not reached
    assert stage.main(["--model", "shapes", "--prompts", "parti", "--out", str(tmp_path / "a"), "--lora", str(bad)]) == 2
    said = capsys.readouterr().err
    assert "bad.safetensors: " in said and "Traceback" not in said
    assert "is not finite" in said or what != "nan"
    assert not (tmp_path / "a").exists()


def test_strengths_go_with_files(made, tiny_model, tmp_path, capsys):
    folder = made[0]["tiny"][0]
    files = [str(folder / name) for name in ("half.safetensors", "other.safetensors")]
    given = ["--model", str(tiny_model), "--prompts", "parti", "--out", str(tmp_path / "a"), "--lora", *files]
    assert stage.main([*given, "--strength", "1"]) == 2
    assert "1 strengths for 2 LoRA files" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="no such adapter file"):
        Recipe("shapes", 2, 1.0, 1, lora=[folder / "none.safetensors"]).check()
