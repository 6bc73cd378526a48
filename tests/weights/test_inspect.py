"""What a weight file is: told from names and shapes, the same in every layout, true to what other programs do, no pickle opened."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models import tiny
from dedpo_diffusion.pipelines import inspect_weights
from dedpo_diffusion.settings import DataSettings, TrainSettings
from dedpo_diffusion.weights import inspection
from dedpo_diffusion.weights.inspection import inspect_path
from dedpo_diffusion.weights.run_folder import open_run
from support.adapters import diffusers_lora, save_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "encoder.layers.0.self_attn"
GENERATOR = torch.Generator()


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture(autouse=True)
def same_numbers():
    GENERATOR.manual_seed(0)


def factors(width=768, rank=4, part="unet"):
    """(down, up) by layer: two projections of a UNet, a convolution, and one of a text encoder."""
    return {
        f"unet.{BLOCK}.attn1.to_q": (rand(rank, 8), rand(8, rank)),
        f"unet.{BLOCK}.attn2.to_k": (rand(rank, width), rand(8, rank)),
        "unet.down_blocks.0.resnets.0.conv1": (rand(rank, 8, 3, 3), rand(16, rank, 1, 1)),
        f"text_encoder.text_model.{TEXT}.out_proj": (rand(rank, 16), rand(16, rank)),
    }


def kohya_name(layer):
    part, _, rest = layer.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[part] + rest.replace(".", "_")


def save_kohya(path, layers, *, alpha=2.0, dtype=torch.float32, **metadata):
    tensors = {}
    for layer, (down, up) in layers.items():
        name = kohya_name(layer)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata=metadata)
    return path


def save_diffusers(path, layers, *, alpha=2.0, **config):
    tensors = {f"{name}.lora_{side}.weight": value for name, pair in layers.items() for side, value in zip("AB", pair, strict=True)}
    parts = {name.partition(".")[0] for name in layers}
    known = {} if alpha is None else {f"{part}.{key}": value for part in parts for key, value in ({"lora_alpha": alpha} | config).items()}
    save_lora(path, tensors, known, {"model": "base"})
    return path


def save_old(path, layers):
    """As diffusers before peft: named after attention processors, without alpha."""
    tensors = {}
    for name, (down, up) in layers.items():
        if "attn" in name:
            stem, _, layer = name.rpartition(".")
            inner = "_lora" if name.startswith("unet") else ".lora_linear_layer"
            stem = f"{stem}.processor.{layer}" if name.startswith("unet") else name
            tensors |= {f"{stem}{inner}.down.weight": down, f"{stem}{inner}.up.weight": up}
    save_file(tensors, path)
    return path


def only(layers, word):
    return {name: pair for name, pair in layers.items() if word in name}


# ---- adapters


def test_layouts_of_one_lora_tell_the_same(tmp_path):
    layers = factors()
    one, other = (
        inspect_path(save_kohya(tmp_path / "k.safetensors", layers)),
        inspect_path(save_diffusers(tmp_path / "d.safetensors", layers)),
    )
    assert (one["what"], one["layout"], other["what"], other["layout"]) == ("LoRA", "kohya", "LoRA", "diffusers")
    for key in ("ranks", "alphas", "scales", "parts", "base"):
        assert one[key] == other[key], key
    for part, entry in one["norms"].items():
        assert entry["norm"] == pytest.approx(other["norms"][part]["norm"])
    assert one["parts"]["unet"] == {
        "layers": 3,
        "convolutions": 1,
        "parameters": sum(a.numel() + b.numel() for a, b in only(layers, "unet").values()),
    }
    assert list(one["parts"]) == ["unet", "text_encoder"]
    assert (one["ranks"], one["alphas"], one["scales"]) == ([4], [2.0], [0.5])


def test_norms_are_those_of_the_change_itself(tmp_path):
    layers = factors(width=24)
    report = inspect_path(save_kohya(tmp_path / "k.safetensors", layers, alpha=3.0))
    dense = {name: 3 / 4 * (up.flatten(1) @ down.flatten(1)).norm().item() for name, (down, up) in layers.items()}
    for part in ("unet", "text_encoder"):
        of_part = {name: norm for name, norm in dense.items() if name.startswith(f"{part}.")}
        entry = report["norms"][part]
        assert entry["norm"] == pytest.approx(sum(norm**2 for norm in of_part.values()) ** 0.5, rel=1e-5)
        largest = max(of_part, key=of_part.get)
        assert entry["largest"][0] == {"layer": kohya_name(largest), "norm": pytest.approx(of_part[largest], rel=1e-5)}


def loha(core):
    """Tensors of a LoHa on a layer of (6, 10), or (6, 10, 3, 3), and its change."""
    if not core:
        a, b, c, d = rand(6, 4), rand(4, 10), rand(6, 4), rand(4, 10)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, (a @ b) * (c @ d)
    a, b, c, d, t, u = rand(4, 6), rand(4, 10), rand(4, 6), rand(4, 10), rand(4, 4, 3, 3), rand(4, 4, 3, 3)
    one, two = (torch.einsum("pqkl,po,qi->oikl", core, left, right) for core, left, right in ((t, a, b), (u, c, d)))
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "hada_t1": t, "hada_t2": u}, one * two


def lokr(factored):
    """Tensors of a LoKr on a layer of (6, 768), and its change."""
    w1, (a, b) = rand(2, 3), (rand(3, 4), rand(4, 256))
    if factored:
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(w1, a @ b)
    return {"lokr_w1": w1, "lokr_w2": a @ b}, torch.kron(w1, a @ b)


def tucker():
    """A LoRA with a core, as LyCORIS has it for convolutions: in, in the middle, out."""
    down, mid, up = rand(4, 10, 1, 1), rand(4, 4, 3, 3), rand(6, 4, 1, 1)
    found = torch.einsum("oa,abkl,bi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    x = rand(2, 10, 5, 5)  # what the three convolutions compute one after the other
    in_turn = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    assert torch.allclose(torch.conv2d(x, found), in_turn, atol=1e-3)
    return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, found


@pytest.mark.parametrize(
    ("kind", "made", "scale", "rank"),
    [
        ("LoHa", lambda: loha(core=False), 0.5, [4]),
        ("LoHa", lambda: loha(core=True), 0.5, [4]),
        ("LoKr", lambda: lokr(factored=True), 0.5, [4]),
        ("LoKr", lambda: lokr(factored=False), 1.0, []),  # without factors there is nothing to divide alpha by
        ("LoRA", tucker, 0.5, [4]),
        ("full", lambda: (lambda w: ({"diff": w}, w))(rand(6, 10)), 1.0, []),
    ],
)
def test_the_adapters_of_lycoris(tmp_path, kind, made, scale, rank):
    name = kohya_name(f"unet.{BLOCK}.attn2.to_k")
    tensors, change = made()
    file = tmp_path / "x.safetensors"
    save_file({f"{name}.{role}": value for role, value in tensors.items()} | {f"{name}.alpha": torch.tensor(2.0)}, file)
    report = inspect_path(file)
    assert (report["what"], report["layout"], report["ranks"]) == (kind, "kohya", rank)
    assert report["norms"]["unet"]["norm"] == pytest.approx(scale * change.norm().item(), rel=1e-5)
    assert report["parts"]["unet"]["convolutions"] == (change.ndim == 4)
    assert report["base"]["family"] == ("sd1" if change.shape[1] == 768 else None)
    assert report["readers"] == {"diffusers": "no", "ComfyUI": "yes", "AUTOMATIC1111": "yes"}
    assert not any("dedpo export" in text for text in report["warnings"])  # which reads LoRA and DoRA alone


def test_dora_is_named(tmp_path):
    layers = only(factors(), "attn2")
    [(name, (down, up))] = layers.items()
    file = save_kohya(tmp_path / "k.safetensors", layers)
    save_file(load_file(file) | {f"{kohya_name(name)}.dora_scale": rand(len(up), 1)}, file)
    assert inspect_path(file)["what"] == "DoRA"
    tensors, config = diffusers_lora(
        {f"{BLOCK}.attn2.to_k.lora_A.default.weight": down, f"{BLOCK}.attn2.to_k.lora_B.default.weight": up,
         f"{BLOCK}.attn2.to_k.lora_magnitude_vector.default.weight": rand(len(up))}, rank=4, alpha=2, targets=["to_k"], dora=True,
    )  # fmt: skip
    save_lora(tmp_path / "d.safetensors", tensors, config, {})
    report = inspect_path(tmp_path / "d.safetensors")
    assert (report["what"], report["layout"], report["scales"]) == ("DoRA", "diffusers", [1.0])  # its scale is worked into the weights


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (32, None)])
def test_the_base_by_the_width_of_cross_attention(tmp_path, width, family):
    for save in (save_kohya, save_diffusers):
        report = inspect_path(save(tmp_path / "x.safetensors", factors(width)))
        assert report["base"]["family"] == family
        assert report["facts"]["what"].endswith("for " + str(report["base"]["name"])) == (family is not None)


def test_the_base_by_other_signs(tmp_path):
    layers = only(factors(), "attn1")
    assert inspect_path(save_kohya(tmp_path / "a.safetensors", layers))["base"]["family"] is None
    deep = {name.replace("transformer_blocks.0", "transformer_blocks.3"): pair for name, pair in layers.items()}
    assert inspect_path(save_kohya(tmp_path / "b.safetensors", deep))["base"]["family"] == "sdxl"
    second = layers | {f"text_encoder_2.text_model.{TEXT}.q_proj": (rand(4, 16), rand(16, 4))}
    assert inspect_path(save_diffusers(tmp_path / "c.safetensors", second))["base"]["family"] == "sdxl"
    for key, value, family in (("ss_base_model_version", "sd_v2_v", "sd2"), ("modelspec.architecture", "stable-diffusion-v1/lora", "sd1")):
        report = inspect_path(save_kohya(tmp_path / "d.safetensors", layers, **{key: value}))
        assert report["base"]["family"] == family and report["metadata"][key] == value
    clash = inspect_path(save_kohya(tmp_path / "e.safetensors", factors(768), ss_base_model_version="sdxl_base_v1-0"))
    assert clash["base"]["family"] == "sd1"
    assert any("contradictory" in text and "sdxl_base_v1-0" in text for text in clash["warnings"])


def test_names_of_the_original_unet_and_of_other_models(tmp_path):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    save_file({f"{name}.lora_down.weight": rand(4, 2048), f"{name}.lora_up.weight": rand(640, 4)}, tmp_path / "x.safetensors")
    report = inspect_path(tmp_path / "x.safetensors")
    assert (report["base"]["family"], report["parts"]["unet"]["layers"], len(report["base"]["evidence"])) == ("sdxl", 1, 2)
    flux = "transformer.single_transformer_blocks.3.attn.to_q"
    save_file({f"{flux}.lora_A.weight": rand(4, 8), f"{flux}.lora_B.weight": rand(8, 4)}, tmp_path / "y.safetensors")
    report = inspect_path(tmp_path / "y.safetensors")
    assert report["base"]["family"] is None and report["readers"] == {}
    assert any("another kind of model" in text for text in report["warnings"])


# ---- who reads what


def real_layers(model):
    """(down, up) for a few layers that the tiny model has."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    sizes = {name: module.weight.shape for name, module in unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_k"))}
    layers = {f"unet.{name}": (rand(2, size[1]), rand(size[0], 2)) for name, size in list(sizes.items())[:4]}
    return layers | {f"text_encoder.text_model.{TEXT}.{name}": (rand(2, 32), rand(32, 2)) for name in ("q_proj", "out_proj")}


@pytest.mark.filterwarnings("ignore:While injecting")  # the configuration names layers by their endings
def test_diffusers_reads_what_it_is_said_to_read(folders, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folders["sd15"])
    layers = real_layers(folders["sd15"])
    files = {
        "kohya": save_kohya(tmp_path / "kohya.safetensors", layers),
        "diffusers": save_diffusers(tmp_path / "diffusers.safetensors", layers, r=2, target_modules=["to_q", "to_k", "q_proj", "out_proj"]),
        "bare": tmp_path / "bare.safetensors",
        "processors": tmp_path / "processors.safetensors",
        "ComfyUI": tmp_path / "comfy.safetensors",
        "kohya's ends": tmp_path / "ends.safetensors",
        "old": save_old(tmp_path / "old.safetensors", only(layers, "unet")),
        "no out_proj": save_kohya(tmp_path / "qkv.safetensors", {name: pair for name, pair in layers.items() if "out_proj" not in name}),
        "loha": tmp_path / "loha.safetensors",
        "mid": tmp_path / "mid.safetensors",
    }
    name = kohya_name(next(iter(layers)))
    save_file({f"{name}.{role}": value for role, value in loha(core=False)[0].items()}, files["loha"])
    save_file(load_file(files["kohya"]) | {f"{name}.lora_mid.weight": rand(2, 2, 1, 1)}, files["mid"])
    save_file({name.removeprefix("unet."): value for name, value in load_file(files["diffusers"]).items() if "unet" in name}, files["bare"])
    save_file({name.removeprefix("unet."): value for name, value in load_file(files["old"]).items()}, files["processors"])
    q, shape = "input_blocks.1.1.transformer_blocks.0.attn1.to_q", {"lora_down.weight": rand(2, 8), "lora_up.weight": rand(8, 2)}
    save_file({f"diffusion_model.{q}.{end}": value for end, value in shape.items()}, files["ComfyUI"])
    save_file({f"unet.{BLOCK}.attn1.to_q.{end}": value for end, value in shape.items()}, files["kohya's ends"])
    said = {}
    for kind, file in files.items():
        said[kind] = inspect_path(file)["readers"]["diffusers"]
        try:
            pipe.load_lora_weights(tmp_path, weight_name=file.name)
            held = pipe.get_list_adapters()
            pipe.unload_lora_weights()
        except (ValueError, RuntimeError, KeyError, AttributeError, IndexError):
            held = {}
        assert said[kind].startswith(("yes", "from 0.40 on")) == bool(held), kind
        if kind in ("kohya", "diffusers"):
            assert set(held) == {"unet", "text_encoder"}
    late = "from 0.40 on; 0.34 to 0.39 refuse it"  # its configuration has no patterns
    assert said == dict.fromkeys(files, "no") | {"kohya": "yes", "old": "yes", "diffusers": late}


def test_who_else_reads_it_and_what_to_do(tmp_path):
    layers = factors()
    kohya = inspect_path(save_kohya(tmp_path / "k.safetensors", layers))
    assert set(kohya["readers"].values()) == {"yes"} and kohya["warnings"] == []
    raw = inspect_path(save_diffusers(tmp_path / "d.safetensors", layers))
    # ComfyUI maps the text encoder's names and those of convolutions, and misses attention: half of the change is gone
    late = "from 0.40 on; 0.34 to 0.39 refuse it, 0.33 and earlier take the rank for alpha"
    assert raw["readers"] == {"diffusers": late, "ComfyUI": "2 of 4 layers", "AUTOMATIC1111": "no"}
    [text] = raw["warnings"]
    assert f"`dedpo export {tmp_path / 'd.safetensors'} --format kohya --out d-kohya.safetensors`" in text and "alpha" in text
    old = inspect_path(save_old(tmp_path / "o.safetensors", layers))
    assert (old["layout"], old["readers"]["ComfyUI"], old["readers"]["AUTOMATIC1111"]) == ("old diffusers", "yes", "no")


def test_what_is_wrong_with_an_alpha(tmp_path):
    layers = factors()
    missing = inspect_path(save_kohya(tmp_path / "a.safetensors", layers, alpha=None))
    assert (missing["alphas"], missing["scales"]) == ([None], [1.0])
    assert any("no alpha is stored for all layers" in text for text in missing["warnings"])
    half = inspect_path(save_kohya(tmp_path / "b.safetensors", layers, dtype=torch.bfloat16))
    assert half["alphas"] == [2.0]
    assert any("bfloat16" in text and "--format kohya" in text for text in half["warnings"])
    tensors = load_file(save_kohya(tmp_path / "c.safetensors", layers))
    tensors.pop(f"{kohya_name(next(iter(layers)))}.alpha")
    save_file(tensors, tmp_path / "c.safetensors")
    assert any("for 1 of 4 layers" in text for text in inspect_path(tmp_path / "c.safetensors")["warnings"])


def test_alphas_of_diffusers_configuration(tmp_path):
    layers = only(factors(), "unet")
    mixed = inspect_path(save_diffusers(tmp_path / "a.safetensors", layers, alpha=4, alpha_pattern={"attn2.to_k": 1}))
    assert mixed["alphas"] == [1.0, 4.0] and mixed["scales"] == [0.25, 1.0]
    rooted = inspect_path(save_diffusers(tmp_path / "b.safetensors", layers, alpha=4, use_rslora=True))
    assert rooted["scales"] == [2.0]  # alpha / sqrt(rank)
    folder = tmp_path / "peft"
    folder.mkdir()
    bare = {name.replace("unet.", "base_model.model."): pair for name, pair in layers.items()}
    save_file(
        {f"{n}.lora_{s}.weight": v for n, pair in bare.items() for s, v in zip("AB", pair, strict=True)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
    report = inspect_path(folder)
    assert (report["layout"], report["scales"], report["parts"]["unet"]["layers"]) == ("peft", [0.5], 3)


def test_text_model_that_is_missing(tmp_path):
    layers = {name.replace("text_model.", ""): pair for name, pair in factors().items()}
    for save in (save_kohya, save_diffusers):
        report = inspect_path(save(tmp_path / "x.safetensors", layers))
        assert any("no text_model" in text and "ComfyUI" in text for text in report["warnings"])
        assert report["readers"]["AUTOMATIC1111"] != "yes"


def test_numbers_that_are_not_finite_are_named(tmp_path, capsys):
    layers = factors()
    name = f"unet.{BLOCK}.attn2.to_k"
    layers[name][0][0, 0] = float("nan")
    file = save_kohya(tmp_path / "x.safetensors", layers, alpha=float("inf"))
    assert inspect_weights.main([str(file), "--json", "true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{kohya_name(name)}.lora_down.weight" in report["non_finite"] and len(report["non_finite"]) == 5
    assert any("not finite" in text for text in report["warnings"])


def test_damaged_factors_and_steering_signs(tmp_path, capsys):
    name = kohya_name(f"unet.{BLOCK}.attn1.to_q")
    file = tmp_path / "x.safetensors"
    save_file(
        {f"{name}.lora_down.weight": rand(4, 8), f"{name}.lora_up.weight": rand(8, 5)}, file, metadata={"ss_output_name": "a\x1b[2Jb"}
    )
    assert inspect_weights.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "do not fit together" in shown and "\x1b[2J" not in shown


# ---- checkpoints, parts, folders


@pytest.mark.parametrize(("kind", "family"), [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")])
def test_whole_models(folders, tmp_path, monkeypatch, kind, family):
    file = tiny.single_file(folders[kind], tmp_path / "model.safetensors")
    monkeypatch.setattr(inspection, "HASHED", 0)
    one, other = inspect_path(file), inspect_path(folders[kind])
    assert (one["what"], one["layout"], one["base"]["family"]) == ("checkpoint", "single files", family)
    assert other["what"] == "whole model" and other["layout"] == "diffusers"
    assert other["base"]["family"] == ("sdxl" if kind == "sdxl" else None)  # tiny widths are of no published model
    assert one["parts"]["UNet"]["parameters"] == other["parts"]["unet"]["parameters"]
    assert one["parts"]["VAE"]["parameters"] == other["parts"]["vae"]["parameters"]
    assert "sha256" not in one and len(inspect_path(file, hash=True)["sha256"]) == 64
    assert not one["warnings"] and not other["warnings"]
    tensors = load_file(file)
    save_file(tensors | {"v_pred": torch.zeros(0)}, file)
    noise = "it takes its prediction for noise unless it is told"
    seen = {name: noise not in words for name, words in inspect_path(file)["readers"].items()}
    assert seen == {"diffusers": family == "sd2", "ComfyUI": family != "sd1", "AUTOMATIC1111": family == "sd2"}  # as measured
    assert any(text.startswith("it predicts v: ") for text in inspect_path(file)["warnings"])
    save_file({name: value for name, value in tensors.items() if name.startswith("model.diffusion_model.")}, file)
    assert inspect_path(file)["what"] == "UNet alone"
    save_file({name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}, file)
    assert any("lacks the VAE" in text for text in inspect_path(file)["warnings"])


def test_parts_of_a_diffusers_folder(folders, tmp_path):
    for name, what in (("unet", "UNet"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        [file] = (folders["sd15"] / name).glob("*.safetensors")
        assert (inspect_path(file)["what"], inspect_path(folders["sd15"] / name)["what"]) == (what, what)
    copy = shutil.copytree(folders["sd15"], tmp_path / "copy")
    [file] = (copy / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    (copy / "text_encoder" / "model.safetensors").unlink()
    texts = inspect_path(copy)["warnings"]
    assert any("vae has pickled weights alone" in text for text in texts) and any("text_encoder has no weights" in text for text in texts)
    [file] = (copy / "unet").glob("*.safetensors")
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert inspect_path(copy)["parts"]["unet"] == inspect_path(folders["sd15"])["parts"]["unet"]  # not counted twice


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"emb_params": (4, 768)}, "textual inversion"),
        ({"control_model.input_hint_block.0.weight": (4, 4)}, "ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (4, 4), "down_blocks.0.x.weight": (4, 4)}, "ControlNet"),
        ({"encoder.mid.block_1.conv1.weight": (4, 4), "decoder.conv_in.weight": (4, 4)}, "VAE alone"),
        ({"nonsense": (2,)}, "file of tensors"),
        ({}, "file of tensors"),
    ],
)
def test_other_files(tmp_path, names, what):
    file = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, file)
    report = inspect_path(file)
    assert report["what"] == what
    assert bool(report["warnings"]) == (what == "file of tensors")


def make_run(folder):
    """A run folder with a checkpoint, as training leaves it."""
    settings = TrainSettings(model="owner/base", out=folder, data=DataSettings(pairs=folder / "data"))
    open_run(folder, settings, {"base_model": "a" * 64})
    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True)
    names = (f"{BLOCK}.attn2.to_k.lora_A.default.weight", f"{BLOCK}.attn2.to_k.lora_B.default.weight")
    save_file({names[0]: rand(4, 768), names[1]: rand(8, 4)}, place / "parameters.safetensors")
    (place / "state.json").write_text('{"step": 3}')
    return folder


def test_runs_and_folders_of_files(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    report = inspect_path(run)
    assert (report["what"], report["steps"], report["settings"]["model"]) == ("training run", [3], "owner/base")
    place = run / "checkpoints" / "step-00000003"
    report = inspect_path(place)
    assert (report["what"], report["facts"]["step"]) == ("checkpoint of a training run", "3") and str(run) in report["facts"]["next"]
    report = inspect_path(place / "parameters.safetensors")
    assert report["what"] == "trained parameters of a run" and "dedpo export RUN" in report["warnings"][0]

    loose = tmp_path / "loras"
    loose.mkdir()
    save_kohya(loose / "a.safetensors", factors())
    (loose / "b.safetensors").write_bytes(b"")
    (loose / "c.pt").write_bytes(b"\x80")
    assert inspect_weights.main([str(loose)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "LoRA in the layout of kohya" in shown and "an empty file" in shown and "c.pt" in shown


def test_the_command(tmp_path, capsys):
    file = save_diffusers(tmp_path / "d.safetensors", factors())
    assert inspect_weights.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rank", "scale of the change", "read by ComfyUI", "Warning: ", "SHA-256", "Stable Diffusion 1.x"))
    assert inspect_weights.main([str(file), "--json", "true", "--hash", "false"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"] == {"model": "base"} and "sha256" not in report


# ---- what is refused


def test_a_shape_that_no_published_model_has_is_said_in_place_of_readers(tmp_path, capsys):
    for width, fits in ((768, True), (32, False)):
        assert inspect_weights.main([str(save_kohya(tmp_path / f"{width}.safetensors", factors(width)))]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("read by ComfyUI" in shown) is fits and ("no published model has this shape" in shown) is not fits


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('opened')",))


def test_what_cannot_be_read_is_refused_in_words(tmp_path, capsys):
    good = save_kohya(tmp_path / "good.safetensors", factors()).read_bytes()
    cases = {
        "a.ckpt": (pickle.dumps(Trap()), "pickled"),
        "a2.PT": (b"an archive of old", "pickled"),
        "b.safetensors": (pickle.dumps(Trap()), "pickled"),
        "c.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "d.safetensors": (good[: len(good) // 2], "cut short"),
        "e.safetensors": (b"", "empty"),
        "f.safetensors": (b"<!DOCTYPE html><html>", "web page"),
        "g.safetensors": (b"\xff" * 200, "no safetensors file"),
    }
    for name, (data, words) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words):
            inspect_path(tmp_path / name)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "nowhere.safetensors", empty):
        assert inspect_weights.main([str(path)]) == 2
        assert "give a .safetensors file" in capsys.readouterr().err
    (empty / "model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="not opened"):
        inspect_path(empty)
