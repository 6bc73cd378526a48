"""LoRA files: plain readers find what was trained, under the names that they look for; what is written is read; what is foreign is told."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.weights import Lora, LoraLayer, from_parameters, read_lora_file, to_diffusers, to_kohya, to_parameters
from dedpo_diffusion.weights.algebra import folded, one_alpha
from dedpo_diffusion.weights.base_model import Base, look_up, modelspec, network, told_base
from dedpo_diffusion.weights.diffusers_layout import CONFIG
from dedpo_diffusion.weights.header import DIGEST, save_tensors
from dedpo_diffusion.weights.kohya import family_of
from support.adapters import CONV, adapted, embeddings, live_embeddings, pipeline, prediction
from support.original_names import a1111, original_names

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


def write(path, lora, layout, family="sd1"):
    if layout == "kohya":
        save_tensors(path, to_kohya(lora, family), {})
    else:
        tensors, config = to_diffusers(lora)
        save_tensors(path, tensors, {CONFIG: json.dumps(config)})
    return path


# ---- plain diffusers

GRID = [
    ("sd15", {"text": True, "targets": CONV}), ("sdxl", {"text": True, "rslora": True}), ("sd15", {}), ("sdxl", {}),
    ("sd21", {"text": True}), ("sd15", {"text": True, "rslora": True}), ("sdxl", {"targets": [*CONV, "linear_1"]}),
    ("sdxl", {"rslora": True}), ("sd21", {"targets": CONV, "rslora": True}), ("sdxl", {"text": True}),
    ("sd15", {"text": True, "dora": True}), ("sdxl", {"text": True, "dora": True}), ("sdxl", {"dora": True, "rslora": True}),
    ("sd15", {"targets": ["to_q", "conv1"], "dora": True}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [pytest.param(*case, marks=[] if k < 2 else pytest.mark.slow) for k, case in enumerate(GRID)])
def test_plain_diffusers_computes_what_was_trained(folders, tmp_path, kind, options):
    """UNet and text encoders, rank 8 with alpha 4. Of a DoRA in the kohya layout, diffusers 0.42 leaves out the magnitudes, and says so."""
    model = adapted(folders[kind], **options)
    ours, text = prediction(model.unet), live_embeddings(model)
    lora = from_parameters(model.trainable(), alpha=4.0, rslora=options.get("rslora", False))
    for layout in ("diffusers", "kohya"):
        pipe = pipeline(folders[kind], write(tmp_path / f"{layout}.safetensors", lora, layout, FAMILY[kind]))
        theirs = prediction(pipe.unet)
        if options.get("dora") and layout == "kohya":
            assert (theirs - ours).abs().max() > 1e-3
            continue
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embeddings(pipe), text, atol=1e-5, rtol=1e-5)
    base = pipeline(folders[kind])
    assert (prediction(base.unet) - ours).abs().max() > 1e-2
    assert ((embeddings(base) - text).abs().max() > 1e-2) == options.get("text", False)


def varied(lora: Lora) -> Lora:
    """Another rank, alpha and scaling in each layer."""
    layers = {}
    for k, (name, layer) in enumerate(lora.layers.items()):
        rank = (2, 8, 5)[k % 3]
        down, up = layer.down[:rank].contiguous(), layer.up[:, :rank].contiguous()
        layers[name] = LoraLayer(down, up, (1.0, 4.0, 2.0, 2.0)[k % 4], rslora=k % 5 == 0)
    return Lora(layers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_plain_diffusers_reads_layers_of_several_ranks_and_alphas(folders, tmp_path, kind):
    """In the kohya layout they have one alpha; with several of them, diffusers 0.42 computes something else."""
    from dedpo_diffusion.weights.fusing import merge

    model = adapted(folders[kind], text=True, targets=["to_q", "to_out.0", "conv1"])
    lora = varied(from_parameters(model.trainable(), alpha=4.0))
    merged = pipeline(folders[kind])
    merge(merged, lora)
    files = {
        "diffusers": write(tmp_path / "d.safetensors", lora, "diffusers"),
        "one": write(tmp_path / "k.safetensors", one_alpha(lora), "kohya", FAMILY[kind]),
        "several": write(tmp_path / "s.safetensors", lora, "kohya", FAMILY[kind]),
    }
    for name, file in files.items():
        pipe = pipeline(folders[kind], file)
        gap = (embeddings(pipe) - embeddings(merged)).abs().max().item()
        assert gap > 1e-2 if name == "several" else gap < 1e-5, name
        if name != "several":
            torch.testing.assert_close(prediction(pipe.unet), prediction(merged.unet), atol=1e-5, rtol=1e-5)


# ---- the names that ComfyUI and A1111 look for, from their sources, not from ours

# LORA_CLIP_MAP of ComfyUI, by encoder: prefix and number of layers; the last layer of SDXL's first encoder is not trained
TEXT = {"sd15": {"lora_te_": 3}, "sdxl": {"lora_te1_": 2, "lora_te2_": 3}}
SELF_ATTENTION = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_names_and_shapes_are_those_that_comfyui_and_a1111_match(folders, kind):
    every = [*CONV, "to_k", "to_v", "to_out.0", "proj_out", "linear_1", "linear_2"]
    model = adapted(folders[kind], targets=every, text=True)
    tensors = to_kohya(from_parameters(model.trainable(), alpha=4.0), FAMILY[kind])
    names = original_names(kind)
    has = {name for name, module in model.unet.named_modules() if hasattr(module, "base_layer")}
    said = names if kind == "sdxl" else dict(zip(names, names, strict=True))  # sd-scripts names SDXL by the original code
    table = {"lora_unet_" + said[path].replace(".", "_"): model.unet.get_submodule(path).base_layer.weight.shape for path in has}
    comfyui = {"lora_unet_" + path.replace(".", "_") for path in (*names, *names.values())}
    assert set(table) <= comfyui
    assert len(table) > 0.9 * len(names)  # not every resnet has a shortcut
    wide = {"lora_te_": 32, "lora_te1_": 32, "lora_te2_": 40}
    for prefix, count in TEXT[kind].items():
        keys = [f"{prefix}text_model_encoder_layers_{i}_{name}" for i in range(count) for name in SELF_ATTENTION]
        table |= {key: torch.Size([wide[prefix]] * 2) for key in keys}
    expected = {}
    for key, (out, *inner) in table.items():
        ends = [1] * (len(inner) - 1)
        expected |= {f"{key}.lora_down.weight": (8, *inner), f"{key}.lora_up.weight": (out, 8, *ends), f"{key}.alpha": ()}
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in tensors.values())
    assert {value.item() for key, value in tensors.items() if key.endswith(".alpha")} == {4.0}

    original = {path.replace(".", "_") for path in names.values()}
    unmatched = [key for key in table if key.startswith("lora_unet_") and a1111(key) not in original]
    assert unmatched == []


# ---- what is written is read


def random_lora(names=None, **changes) -> Lora:
    shapes = {
        "unet.conv_in": (8, 4, 3, 3), "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (6, 6),
        "unet.down_blocks.1.resnets.0.conv_shortcut": (8, 6, 1, 1), "unet.up_blocks.2.upsamplers.0.conv": (4, 4, 3, 3),
        "unet.mid_block.attentions.0.proj_in": (5, 7), "unet.add_embedding.linear_2": (6, 3), "unet.time_embedding.linear_1": (6, 3),
        "unet.up_blocks.0.attentions.2.transformer_blocks.10.ff.net.0.proj": (12, 6),
        "text_encoder.text_model.encoder.layers.10.self_attn.out_proj": (4, 4), "text_encoder_2.text_projection": (5, 4),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (9, 4),
    }  # fmt: skip
    generator, layers = torch.Generator().manual_seed(0), {}
    for k, name in enumerate(names or shapes):
        out, *inner = shapes[name]
        rank = 1 + k % 3
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
        magnitude = torch.rand(out, generator=generator) if changes.get("dora") else None
        layers[name] = LoraLayer(down, up, 1.5 if changes.get("one") else 0.5 + k, bool(changes.get("rslora")), magnitude)
    return Lora(layers)


def assert_same(mine: Lora, other: Lora, *, exact: bool = True):
    assert set(mine.layers) == set(other.layers)
    for name, layer in mine.layers.items():
        theirs = other.layers[name]
        if exact:
            assert (layer.alpha, layer.rslora) == (theirs.alpha, theirs.rslora)
            assert torch.equal(layer.down, theirs.down) and torch.equal(layer.up, theirs.up)
        torch.testing.assert_close(layer.delta(), theirs.delta(), atol=1e-6, rtol=1e-5)
        assert (layer.magnitude is None) == (theirs.magnitude is None)
        assert layer.magnitude is None or torch.equal(layer.magnitude, theirs.magnitude)


@pytest.mark.parametrize("changes", [{}, {"one": True}, {"rslora": True}, {"dora": True}])
def test_what_is_written_is_read(tmp_path, changes):
    lora = random_lora(**changes)
    kohya = read_lora_file(write(tmp_path / "k.safetensors", lora, "kohya", "sdxl"))
    assert_same(lora, kohya, exact="rslora" not in changes)  # which that layout has no word for
    read = read_lora_file(write(tmp_path / "d.safetensors", kohya, "diffusers"))
    assert_same(lora, read, exact=False)
    assert_same(read, read_lora_file(write(tmp_path / "e.safetensors", read, "diffusers")))
    for one in (one_alpha(lora), folded(lora), read):
        assert_same(lora, one, exact=False)
        assert len({layer.alpha for layer in one.layers.values()}) == 1 and not any(layer.rslora for layer in one.layers.values())
        assert one.ranks() == [3]
    assert {layer.scale for layer in read.layers.values()} == {1.0}


def test_an_adapter_takes_what_is_read(tiny_model):
    model = adapted(tiny_model, rank=2, targets=["to_q", "conv1"], text=True, dora=True)
    lora = from_parameters(model.trainable(), alpha=3.0)
    for name, value in to_parameters(lora, scale=3 / 2).items():
        assert torch.equal(value, model.trainable()[name])
    halved = to_parameters(lora, scale=3.0)
    assert all(torch.equal(value, model.trainable()[name] * (0.5 if "lora_B" in name else 1)) for name, value in halved.items())
    assert set(halved) == set(model.trainable())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_names_of_the_original_code_are_read(tmp_path, kind):
    """As sd-scripts names SDXL's layers, and some other programs those of SD1.x."""
    names, tensors, expected = original_names(kind), {}, {}
    for k, (ours, theirs) in enumerate(names.items()):
        key, down, up = "lora_unet_" + theirs.replace(".", "_"), torch.full((2, 3), float(k)), torch.ones(4, 2)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        expected[f"unet.{ours}"] = down
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora_file(tmp_path / "x.safetensors")
    assert {name: layer.down[0, 0].item() for name, layer in read.layers.items()} == {n: v[0, 0].item() for n, v in expected.items()}
    assert {layer.scale for layer in read.layers.values()} == {0.5}
    if kind == "sdxl":
        assert family_of(read) == "sdxl"


def test_names_of_earlier_diffusers_are_read(tmp_path):
    q, out = "unet.mid_block.attentions.0.transformer_blocks.0.attn1", "text_encoder.text_model.encoder.layers.0.self_attn"
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    for ours, theirs in (("to_q.lora", "out_proj.lora_linear_layer"), ("processor.to_q_lora", "to_out_lora")):
        tensors = {}
        for place in (f"{q}.{ours}", f"{out}.{theirs}"):
            tensors |= {f"{place}.down.weight": down.clone(), f"{place}.up.weight": up.clone()}
        save_file(tensors, tmp_path / "x.safetensors")
        read = read_lora_file(tmp_path / "x.safetensors")
        assert set(read.layers) == {f"{q}.to_q", f"{out}.out_proj"}
        assert all(torch.equal(layer.delta(), up @ down) for layer in read.layers.values())


def test_the_same_content_is_the_same_bytes_and_its_digest_is_right(tmp_path):
    tensors = {f"t{k}": torch.randn(k + 1, dtype=torch.float16 if k % 2 else torch.float32) for k in range(9)}
    metadata = {f"key \u00e9 \n{k}": f'"{k}" \\' for k in range(9)} | {"hash": f"0x{DIGEST}"}
    for name in "ab":
        save_tensors(tmp_path / name, tensors, metadata if name == "a" else dict(reversed(metadata.items())))
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata | {"format": "pt", "hash": f"0x{hashlib.sha256(data[start:]).hexdigest()}"}
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "a").items())


# ---- what is told of the base


def test_families_are_told_apart(folders, tmp_path):
    from dedpo_diffusion.models import tiny

    assert look_up(str(folders["sd15"])) == Base("sd1", "epsilon", 64)
    assert look_up(str(folders["sd21"])) == Base("sd2", "v_prediction", 64)
    assert look_up(str(folders["sdxl"])) == Base("sdxl", "epsilon", 64)
    file = tiny.single_file(folders["sdxl"], tmp_path / "xl.safetensors")
    assert look_up(str(file)) == Base("sdxl", "epsilon", 1024)
    assert look_up(str(file), str(folders["sdxl"])).size == 64
    layer = LoraLayer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (99, None)):
        lora = Lora({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": dataclasses.replace(layer, down=torch.zeros(2, width))})
        assert family_of(lora) == family
    assert family_of(Lora({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": layer})) == "sdxl"
    assert family_of(Lora({"unet.conv_in": layer})) is None


@pytest.mark.parametrize(
    ("base", "architecture", "version", "v2"),
    [
        (Base("sd1", "epsilon", 512), "stable-diffusion-v1/lora", "sd_v1", "False"),
        (Base("sd2", "v_prediction", 768), "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        (Base("sd2", "epsilon", 512), "stable-diffusion-v2-512/lora", "sd_v2", "True"),
        (Base("sdxl", "v_prediction", 1024), "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
    ],
)
def test_metadata_have_the_keys_and_words_that_readers_know(base, architecture, version, v2):
    lora = Lora({"unet.conv_in": LoraLayer(torch.zeros(8, 4, 3, 3), torch.zeros(6, 8, 1, 1), 4.0)})
    lora.layers["unet.x.to_q"] = LoraLayer(torch.zeros(8, 4), torch.zeros(6, 8), 4.0)
    spec, ss = modelspec(base, "a title", lora=True), network(lora, base, "a title")
    assert all(isinstance(value, str) for value in (spec | ss).values())
    assert spec["modelspec.architecture"] == architecture
    assert spec["modelspec.prediction_type"] == {"epsilon": "epsilon", "v_prediction": "v"}[base.prediction]
    assert spec["modelspec.resolution"] == f"{base.size}x{base.size}"
    must = {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution")}
    assert must <= set(spec)
    assert (ss["ss_base_model_version"], ss["ss_v2"]) == (version, v2)
    assert (ss["ss_network_module"], ss["ss_network_dim"], ss["ss_network_alpha"]) == ("networks.lora", "8", "4.0")
    assert json.loads(ss["ss_network_args"]) == {"conv_dim": "8", "conv_alpha": "4.0"}
    assert ("ss_v_parameterization" in ss) == (base.prediction == "v_prediction")
    assert told_base(spec) == base
    assert told_base(ss).family == base.family
    assert told_base({}) is None
    assert network(varied(random_lora()), base, "")["ss_network_dim"] == "Dynamic"


# ---- what is no such file

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WHOLE = {f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.ones(4, 2)}
REFUSED = [
    ({f"{Q}.hada_w1_a": 0, f"{Q}.alpha": 0}, "a LoHa of LyCORIS"),
    ({f"{Q}.lokr_w1": 0}, "a LoKr"),
    ({f"{Q}.oft_blocks": 0}, "an OFT"),
    ({f"{Q}.a1.weight": 0}, "a GLoRA"),
    ({f"{Q}.on_input": 0, f"{Q}.weight": 0}, r"an \(IA\)3"),
    (WHOLE | {f"{Q}.lora_mid.weight": 0}, "Tucker"),
    (WHOLE | {"lora_unet_conv_in.diff": 0}, "whole differences"),
    (WHOLE | {f"{Q}.reshape_weight": 0}, "no plain LoRA"),
    (WHOLE | {f"{Q}.dora_scale": torch.ones(1, 4)}, "magnitudes of the weight's columns"),
    ({f"{Q}.lora_down.weight": 0}, "one of its two matrices"),
    ({f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.full((4, 2), torch.nan)}, "lora_up.weight is not finite"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": 0}, "no layer of an SD1.x"),
    ({"lora_te3_encoder_block_0_layer_0_k.lora_down.weight": 0}, "no layer of an SD1.x"),
    ({"unet.mid_block.x.lora_A.weight": 0}, "one of its two matrices"),
    ({"unet.x.lora_A.weight": 0, "unet.x.lora_B.weight": 0, "unet.x.lora_B.bias": 0}, "'unet.x.lora_B.bias' is no part"),
    ({"unet.x.to_q.lora_A.default.weight": 0}, "a checkpoint of training; give the run folder"),
    ({"model.diffusion_model.out.2.weight": 0}, "the checkpoint of a whole model"),
    ({"emb_params": 0}, "a textual inversion"),
    ({"transformer.x.lora_A.weight": 0}, "a transformer"),
    ({"base_model.model.x.lora_A.weight": 0}, "peft saves"),
    ({"down_blocks.0.resnets.0.conv1.weight": 0}, "a part of a diffusers folder"),
    ({"something": 0}, "its tensors' names are those of no LoRA"),
    ({}, "nothing in it"),
]


@pytest.mark.parametrize(("tensors", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_other_files_are_refused_by_name(tmp_path, tensors, words):
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) if isinstance(value, int) else value for name, value in tensors.items()}, file)
    with pytest.raises(UserError, match=f"other.safetensors: .*{words}"):
        read_lora_file(file)


def test_files_that_cannot_be_read(tmp_path):
    save_file(WHOLE, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    broken = {
        "cut": (data[:-1], "cut short"),
        "pickle": (b"\x80\x04", "a pickled"),
        "pointer": (b"version https://git-lfs\n", "git lfs pull"),
    }
    for name, (content, words) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            read_lora_file(tmp_path / name)
    for path, words in ((tmp_path, "a folder"), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match=words):
            read_lora_file(path)
    with pytest.raises(UserError, match="an sd1 has no text_encoder_2"):
        to_kohya(Lora({"text_encoder_2.text_model.x": random_lora().layers["unet.add_embedding.linear_2"]}), "sd1")
    mixed = random_lora(dora=True).layers | random_lora(["unet.conv_in"]).layers
    with pytest.raises(UserError, match="some of its layers are DoRAs"):
        to_diffusers(Lora(mixed))
