"""LoRAs as ComfyUI, OneTrainer and diffusers save them are read; what inspect advises helps; merged folders load anywhere."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pipelines import export
from dedpo_diffusion.weights import Lora, LoraLayer, read_lora_file, to_diffusers
from dedpo_diffusion.weights.algebra import folded, one_alpha, one_rank
from dedpo_diffusion.weights.diffusers_layout import CONFIG
from dedpo_diffusion.weights.inspection import inspect_path
from dedpo_diffusion.weights.names import sdxl_original, unet_path
from support.adapters import adapted, as_run, pipeline, prediction
from support.original_names import original_names

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
THEIR_Q = "input_blocks.4.1.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn.out_proj"


def factors(*names, ends=("lora_down.weight", "lora_up.weight"), alpha=None, out=16, into=16):
    """Tensors of a LoRA of rank 2 on these layers, the same numbers whatever they are called."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in names:
        tensors[f"{name}.{ends[0]}"] = torch.randn(2, into, generator=generator)
        tensors[f"{name}.{ends[1]}"] = torch.randn(out, 2, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


# ---- the names of others


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_layer_is_found_under_every_name(tmp_path, kind):
    for prefix in ("diffusion_model.", "unet.", ""):
        names = original_names(kind)
        tensors = {}
        for k, theirs in enumerate(names.values()):
            tensors |= {
                f"{prefix}{theirs}.lora_down.weight": torch.full((2, 3), float(k)),
                f"{prefix}{theirs}.lora_up.weight": torch.ones(4, 2),
            }
        save_file(tensors, tmp_path / "x.safetensors")
        read = read_lora_file(tmp_path / "x.safetensors").layers
        assert {name: layer.down[0, 0].item() for name, layer in read.items()} == {f"unet.{ours}": k for k, ours in enumerate(names)}


def test_the_names_of_sdxl_lead_there_and_back():
    names = original_names("sdxl")
    assert {ours: sdxl_original(ours) for ours in names} == names
    assert {unet_path(theirs.replace(".", "_")) for theirs in names.values()} == set(names)
    for other in ("down_blocks.0.resnets.2.conv1", "up_blocks.0.resnets.3.conv1", "mid_block.attentions.1.proj_in", "down_blocks.0.x", "x"):
        assert sdxl_original(other) is None


A_B = ("lora_A.weight", "lora_B.weight")
OLD = ("down.weight", "up.weight")
SAME = {  # names of one LoRA on the layer q and, where the program writes them, on text encoders
    "ComfyUI": (factors, [f"diffusion_model.{THEIR_Q}.to_q", f"text_encoders.clip_l.transformer.{TEXT}"], {}),
    "ComfyUI, SD2": (factors, [f"diffusion_model.{THEIR_Q}.to_q", f"text_encoders.clip_h.transformer.{TEXT}"], {}),
    "OneTrainer": (factors, [f"unet.{THEIR_Q}.to_q", f"text_encoder.{TEXT}"], {}),
    "the original code": (factors, [f"{THEIR_Q}.to_q"], {}),
    "save_lora_adapter": (factors, [f"{Q}.to_q"], {"ends": A_B}),
    "save_attn_procs": (factors, [f"{Q}.processor.to_q_lora"], {"ends": OLD}),
    "kohya's ends": (factors, [f"unet.{Q}.to_q", f"text_encoder.{TEXT.removeprefix('text_model.')}"], {}),
}


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_one_lora_under_many_names(tmp_path, what, alpha):
    make, names, options = SAME[what]
    file = tmp_path / "x.safetensors"
    save_file(make(*names, alpha=alpha if "processor" not in names[0] else None, **options), file)
    read = read_lora_file(file).layers
    wanted = factors("a", "b")
    expected = {f"unet.{Q}.to_q": "a", f"text_encoder.{TEXT}": "b"}
    assert set(read) == set(list(expected)[: len(names)])
    scale = 0.5 if alpha and "processor" not in names[0] else 1.0
    for name, layer in read.items():
        down, up = (wanted[f"{expected[name]}.lora_{way}.weight"] for way in ("down", "up"))
        torch.testing.assert_close(layer.delta(), scale * up @ down)


def test_a_unet_that_diffusers_saves_by_itself_has_its_alpha(folders, tmp_path):
    model = adapted(folders["sd15"], rank=4, alpha=2.0)
    model.unet.save_lora_adapter(tmp_path, weight_name="x.safetensors")
    read = read_lora_file(tmp_path / "x.safetensors")
    assert {(layer.rank, layer.scale) for layer in read.layers.values()} == {(4, 0.5)}
    assert export.main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "y.safetensors")]) == 0
    torch.testing.assert_close(
        prediction(pipeline(folders["sd15"], tmp_path / "y.safetensors").unet), prediction(model.unet), atol=1e-5, rtol=1e-5
    )


REFUSED = [
    (factors(f"diffusion_model.{THEIR_Q}.to_q") | {f"diffusion_model.{THEIR_Q}.to_out.0.diff_b": torch.ones(4)}, "bias_diff"),
    (factors(f"unet.{Q}.to_q") | {f"unet.{Q}.to_q.dora_scale": torch.ones(1, 16)}, "magnitudes of the weight's columns .*OneTrainer"),
    (factors("diffusion_model.double_blocks.0.img_attn.qkv"), "a transformer"),
    (factors("lora_unet_conv_in") | {"bundle_emb.word.clip_l": torch.ones(2, 4)}, "a textual inversion in it beside the LoRA"),
    (factors(f"diffusion_model.{THEIR_Q}.to_q", "diffusion_model.input_blocks.99.7.odd"), "input_blocks.99.7.odd.* is no part"),
]


@pytest.mark.parametrize(("tensors", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_read_is_told_in_its_own_words(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        read_lora_file(tmp_path / "x.safetensors")
    assert not any("writes what" in text for text in inspect_path(tmp_path / "x.safetensors")["warnings"])


# ---- what inspect says and advises

FLAT = "lora_unet_" + Q.replace(".", "_")
ADVISED = {
    "OneTrainer": factors(f"unet.{THEIR_Q}.to_q"),
    "ComfyUI": factors(f"diffusion_model.{THEIR_Q}.to_q"),
    "save_lora_adapter": factors(f"{Q}.to_q", ends=A_B),
    "save_attn_procs": factors(f"{Q}.processor.to_q_lora", ends=OLD),
    "sizes under diffusers' name": factors(f"{FLAT}_to_q") | factors("lora_unet_add_embedding_linear_1", out=32, into=80),
    "both namings": factors(f"{FLAT}_to_q", f"lora_unet_{THEIR_Q.replace('.', '_')}_to_k"),
    "several ranks and alphas": factors(f"{FLAT}_to_q", alpha=1)
    | {f"{FLAT}_to_k.{end}": value for end, value in (("lora_down.weight", torch.ones(3, 16)), ("lora_up.weight", torch.ones(16, 3)))},
}


@pytest.mark.parametrize("what", ADVISED)
def test_the_export_that_is_advised_can_be_run_and_helps(folders, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    save_file(ADVISED[what], "x.safetensors", metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    texts = inspect_path(tmp_path / "x.safetensors")["warnings"]
    commands = {found for text in texts for found in re.findall(r"`dedpo (export [^`]*--format kohya[^`]*)`", text)}
    assert commands, texts
    for command in commands:
        argv = shlex.split(command.replace("BASE", str(folders["sdxl"])))
        assert export.main(argv[1:]) == 0
        after = inspect_path(tmp_path / argv[argv.index("--out") + 1])
        assert set(after["readers"].values()) == {"yes"}
        assert not any("export" in text for text in after["warnings"])


def test_no_export_is_promised_that_does_not_help(tmp_path):
    """Only ComfyUI reads a projection of SDXL's second text encoder, whatever the file's layout."""
    file = tmp_path / "x.safetensors"
    save_file(factors(f"{FLAT}_to_q") | factors("lora_te2_text_projection", out=32, into=40), file)
    report = inspect_path(file)
    assert report["readers"] == {"diffusers": "no", "ComfyUI": "yes", "AUTOMATIC1111": "1 of 2 layers"}
    text = next(text for text in report["warnings"] if "leave layers out" in text)
    assert "writes what ComfyUI reads" in text and "all of them" not in text


def test_a_base_that_nothing_shows_is_asked_for(tmp_path):
    save_file(factors(f"diffusion_model.{THEIR_Q}.to_q"), tmp_path / "x.safetensors")
    assert any("--model BASE`" in text for text in inspect_path(tmp_path / "x.safetensors")["warnings"])


def test_our_own_files_are_read_by_all(folders, tmp_path):
    lora = Lora({f"unet.{Q}.to_q": LoraLayer(torch.ones(2, 16), torch.ones(16, 2), 1.0), "unet.conv_in": LoraLayer(torch.ones(1, 4, 3, 3),
                 torch.ones(8, 1, 1, 1), 3.0)})  # fmt: skip
    tensors, config = to_diffusers(lora)
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.rank_pattern"], config["unet.alpha_pattern"]) == (2, 2, {}, {})
    save_file(tensors, tmp_path / "x.safetensors", metadata={CONFIG: json.dumps(config)})
    assert inspect_path(tmp_path / "x.safetensors")["readers"]["diffusers"] == "yes"


def test_one_rank_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"unet.{rank}": LoraLayer(
            torch.randn(rank, 3, generator=generator, dtype=torch.float64).to(dtype), torch.randn(5, rank, generator=generator).to(dtype),
            alpha, rslora, torch.rand(5, generator=generator) if dora else None,
        )
        for rank, alpha, rslora, dora, dtype in ((1, 3.0, True, False, torch.float32), (4, -2.0, False, True, torch.float32),
                                                 (7, 0.0, False, False, torch.bfloat16))
    }  # fmt: skip
    lora = Lora(layers)
    weight = torch.randn(5, 3, generator=generator)
    for change in (one_rank, one_alpha, folded):
        made = change(lora)
        assert made.ranks() == [7]
        for name, layer in layers.items():
            assert made.layers[name].up.dtype == layer.up.dtype
            torch.testing.assert_close(made.layers[name].merged(weight), layer.merged(weight))
    assert {layer.scale for layer in folded(lora).layers.values()} == {1.0}
    assert one_rank(Lora({})).layers == {}


# ---- merged folders


@pytest.fixture(scope="module")
def merged(folders, tiny_pairs, tmp_path_factory):
    """A merged folder of an SDXL whose text encoders were trained too."""
    root = tmp_path_factory.mktemp("merged")
    run = as_run(adapted(folders["sdxl"], text=True), folders["sdxl"], root / "run", data=tiny_pairs, text=True)
    assert export.main([str(run), "--format", "merged", "--out", str(root / "out")]) == 0
    return root / "out"


def test_a_merged_folder_has_what_older_versions_look_for(merged):
    from tokenizers.models import BPE

    for name in ("text_encoder", "text_encoder_2"):
        with safe_open(merged / name / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert "text_model.embeddings.token_embedding.weight" in names
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    for folder in ("tokenizer", "tokenizer_2"):
        vocabulary, merges = BPE.read_file(str(merged / folder / "vocab.json"), str(merged / folder / "merges.txt"))
        model = json.loads((merged / folder / "tokenizer.json").read_text())["model"]
        assert vocabulary == model["vocab"]
        assert [list(pair) for pair in merges] == [list(pair) for pair in model["merges"]] and merges


def test_a_merged_folder_tells_nothing_of_the_machine(merged, folders):
    said = "\n".join(path.read_text() for path in merged.rglob("*.json"))
    assert str(folders["sdxl"]) not in said and str(merged.parent) not in said and "name_or_path" not in said


# ---- lora.start


def test_a_start_that_no_setting_fits_is_told_with_a_way_that_works(folders, tmp_path):
    names = ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj")
    save_file(factors(names[0], out=64, into=32) | factors(names[1], out=32, into=32), tmp_path / "x.safetensors")
    from dedpo_diffusion.weights import to_parameters

    model = Backbone(str(folders["sd15"]), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"mlp.fc1, and of the text encoders attention alone .* --format merged"):
        model.add_lora(rank=2, alpha=2, text=True, start=to_parameters(read_lora_file(tmp_path / "x.safetensors"), scale=1.0))
    command = ["--model", str(folders["sd15"]), "--format", "merged", "--out", str(tmp_path / "base")]
    assert export.main([str(tmp_path / "x.safetensors"), *command]) == 0
    changed, before = (load_file(base / "text_encoder" / "model.safetensors") for base in (tmp_path / "base", folders["sd15"]))
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(changed[f"text_model.{name}"], before.get(name, before.get(f"text_model.{name}")))
