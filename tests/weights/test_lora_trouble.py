"""LoRA files that are damaged, or that cannot be meant, and strengths that are no numbers: words for each, and nothing written."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pipelines import export, inspect_weights
from dedpo_diffusion.weights import Lora, LoraLayer, read_lora_file
from dedpo_diffusion.weights.algebra import one_alpha
from dedpo_diffusion.weights.base_model import Base, told_base
from dedpo_diffusion.weights.diffusers_layout import CONFIG
from dedpo_diffusion.weights.inspection import inspect_path
from support.adapters import adapted, as_run

FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def kohya(path, metadata=None, **changes):
    """A LoRA of SD1.x with one layer; changes: down, up, alpha, or None to leave one out."""
    parts = {"lora_down.weight": torch.ones(2, 768), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2.0)}
    parts |= {{"down": "lora_down.weight", "up": "lora_up.weight"}.get(name, name): value for name, value in changes.items()}
    save_file({f"{FLAT}.{name}": value for name, value in parts.items() if value is not None}, path, metadata=metadata)
    return path


def diffusers(path, config=None, **changes):
    parts = {"lora_A.weight": torch.ones(2, 768), "lora_B.weight": torch.ones(4, 2)} | changes
    save_file({f"{DOTTED}.{name}": value for name, value in parts.items()}, path, metadata=None if config is None else {CONFIG: config})
    return path


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert export.main([str(part) for part in argv]) == 2
    return " ".join(capsys.readouterr().err.split())


# ---- strengths and alphas


@pytest.mark.parametrize("strength", ["nan", "inf", "0", "-100"])
def test_strengths_follow_one_rule(tmp_path, capsys, strength):
    file, out = kohya(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    other = kohya(tmp_path / "b.safetensors")
    own = [["--strength", strength]] if math.isfinite(float(strength)) else []  # the others are no numbers for the parser of options
    for options in (*own, ["--add", f"{other}={strength}"]):
        assert "give a number other than 0 between -100 and 100" in refused(capsys, file, "--out", out, *options)
        assert not out.exists()


def test_alphas_of_zero_leave_the_other_layers_as_they_are():
    layer = LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 0.0)
    layers = {"unet.a": layer, "unet.b": layer, "unet.c": LoraLayer(layer.down, layer.up, 3.0)}
    found = one_alpha(Lora(layers)).layers
    assert {one.alpha for one in found.values()} == {3.0}
    for name, old in layers.items():
        assert torch.equal(found[name].delta(), old.delta())
    assert {one.alpha for one in one_alpha(Lora({"unet.a": layer})).layers.values()} == {1.0}


def test_a_number_beyond_float32_is_told_of_with_a_remedy_that_helps(tmp_path, capsys):
    file = kohya(tmp_path / "a.safetensors", up=torch.full((4, 2), 3e38))
    other = kohya(tmp_path / "b.safetensors", up=torch.full((4, 2), 3e38))
    said = refused(capsys, file, "--add", f"{other}=2", "--out", tmp_path / "out.safetensors")
    assert "not finite as float32" in said and "--dtype" not in said


# ---- one check of every layer

ODD = [
    ({"up": torch.ones(4, 3)}, "of different ranks"),
    ({"alpha": torch.ones(3)}, "alpha of .* one finite number"),
    ({"down": torch.ones(2)}, "of dimensions that no LoRA has"),
    ({"up": torch.ones(4, 2, 3, 3)}, "of dimensions that no LoRA has"),
    ({"down": torch.ones(0, 768), "up": torch.ones(4, 0)}, "of dimensions that no LoRA has"),
    ({"dora_scale": torch.ones(3, 1)}, "3 magnitudes for 4 rows"),
]


@pytest.mark.parametrize(("changes", "words"), ODD, ids=[words for _, words in ODD])
def test_layers_that_are_none_are_refused(tmp_path, capsys, changes, words):
    file, out = kohya(tmp_path / "a.safetensors", **changes), tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=f"a.safetensors: .*{words}"):
        read_lora_file(file)
    refused(capsys, file, "--format", "kohya", "--out", out)
    assert not out.exists()


def test_the_same_check_in_the_layout_of_diffusers(tmp_path):
    file = diffusers(tmp_path / "a.safetensors", **{"lora_B.weight": torch.ones(4, 3)})
    with pytest.raises(UserError, match=f"{DOTTED} are of different ranks"):
        read_lora_file(file)
    file = diffusers(tmp_path / "b.safetensors", lora_magnitude_vector=torch.ones(3))
    with pytest.raises(UserError, match="3 magnitudes for 4 rows"):
        read_lora_file(file)
    file = diffusers(tmp_path / "c.safetensors", alpha=torch.ones(2))
    with pytest.raises(UserError, match="one finite number"):
        read_lora_file(file)


def test_an_up_that_has_other_ends_than_its_down_fits(tmp_path):
    layer = read_lora_file(kohya(tmp_path / "a.safetensors", up=torch.ones(4, 2, 1, 1))).layers[DOTTED]
    assert layer.up.shape == (4, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[1]", "no JSON dictionary"), ('"r"', "no JSON dictionary"), ("{", "no JSON"), ('{"unet.lora_alpha": NaN}', "no JSON"),
        ('{"unet.lora_alpha": null}', "alpha is None"), ('{"unet.lora_alpha": 1e999}', "alpha is inf"),
        ('{"unet.lora_alpha": "4"}', "alpha is '4'"), ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}', "no regular expression"),
        ('{"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}', "no dictionary"),
    ],
)  # fmt: skip
def test_configurations_that_no_reader_takes(tmp_path, capsys, config, words):
    file = diffusers(tmp_path / "a.safetensors", config)
    with pytest.raises(UserError, match=f"a.safetensors: its {CONFIG} .*{words}"):
        read_lora_file(file)
    assert words in refused(capsys, file, "--out", tmp_path / "out.safetensors")


def test_two_names_of_one_layer_are_refused(tmp_path):
    twice = FLAT.replace("mid_block_attentions_0", "middle_block_1")
    tensors = load_file(kohya(tmp_path / "a.safetensors"))
    save_file(tensors | {key.replace(FLAT, twice): value * 2 for key, value in tensors.items()}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=f"{DOTTED} is in it under two names"):
        read_lora_file(tmp_path / "b.safetensors")
    old = {f"{DOTTED}.lora.down.weight": torch.zeros(2, 768), f"{DOTTED}.lora.up.weight": torch.ones(4, 2)}
    save_file(load_file(diffusers(tmp_path / "c.safetensors")) | old, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="under two names"):
        read_lora_file(tmp_path / "d.safetensors")


# ---- what would be overwritten, what can be extracted


def test_no_file_that_is_read_is_overwritten(tmp_path, capsys):
    file, other = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors")
    before = [one.read_bytes() for one in (file, other)]
    (tmp_path / "x").mkdir()
    for out in (file, other, tmp_path / "x" / ".." / "a.safetensors"):
        assert "would be overwritten" in refused(capsys, file, "--add", f"{other}=0.5", "--out", out)
    assert [one.read_bytes() for one in (file, other)] == before


def test_a_dora_that_is_added_is_extracted(tiny_model, tiny_pairs, tmp_path, capsys):
    plain = as_run(adapted(tiny_model, targets=["to_q"]), tiny_model, tmp_path / "plain", data=tiny_pairs, targets=["to_q"])
    dora = as_run(
        adapted(tiny_model, dora=True, targets=["to_q"]), tiny_model, tmp_path / "d", data=tiny_pairs, dora=True, targets=["to_q"]
    )
    file, out = tmp_path / "dora.safetensors", tmp_path / "out.safetensors"
    assert export.main([str(dora), "--out", str(file)]) == 0
    assert "--rank" in refused(capsys, plain, "--add", file, "--out", out)
    assert export.main([str(plain), "--add", f"{file}=0.5", "--rank", "4", "--out", str(out)]) == 0
    found = read_lora_file(out).layers
    assert found and all(layer.magnitude is None and math.isfinite(layer.alpha) for layer in found.values())


# ---- what metadata say

SETTINGS = [
    ("dedpo_settings", "[1]", "no JSON dictionary"), ("dedpo_settings", '{"model": 3}', "give --model"),
    ("dedpo_sources", "3", "no JSON dictionary"), ("dedpo_made", '{"strength": NaN}', "no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "words"), SETTINGS)
def test_broken_settings_are_told_in_words(tmp_path, capsys, key, text, words):
    file = kohya(tmp_path / "a.safetensors", {key: text})
    said = refused(capsys, file, "--format", "kohya", "--out", tmp_path / "out.safetensors")
    assert words in said and key in said
    assert inspect_weights.main([str(file)]) == 0
    assert inspect_weights.main([str(file), "--json", "true"]) == 0


@pytest.mark.parametrize(
    "trained", [{"data": 3}, {"lora": {"rank": 1, "alpha": "x"}}, {"lora": [1]}, {"objective": {"options": {"a": "b"}}}]
)
def test_odd_settings_are_a_warning_of_inspect(tmp_path, trained):
    report = inspect_path(kohya(tmp_path / "a.safetensors", {"dedpo_settings": json.dumps(trained)}))
    assert report["settings"] is None and any("cannot be read" in text for text in report["warnings"])


@pytest.mark.parametrize("config", ["[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}'])
def test_broken_configurations_are_a_warning_of_inspect(tmp_path, config):
    assert any(f"{CONFIG} cannot be read" in text for text in inspect_path(diffusers(tmp_path / "a.safetensors", config))["warnings"])


def test_damaged_files_of_folders_are_told_in_words(tiny_model, tiny_pairs, tmp_path, capsys):
    run = as_run(adapted(tiny_model, targets=["to_q"]), tiny_model, tmp_path / "run", data=tiny_pairs, targets=["to_q"])
    out = tmp_path / "out.safetensors"
    (run / "best").mkdir()
    (run / "best" / "state.json").write_text('{"step": 7}')
    assert "which step was best" in " ".join(inspect_path(run)["warnings"])
    assert "state.json: it does not say" in refused(capsys, run, "--out", out)
    (run / "best" / "state.json").unlink()
    (run / "identity.json").write_text("[")
    assert "identity.json: cannot be read" in refused(capsys, run, "--out", out)
    for text in ("a: [", "3", "model: x\ndata: {}\nobjective: {}\nlora: {alpha: x}\n"):
        (run / "settings.yaml").write_text(text)
        assert "settings.yaml: " in refused(capsys, run, "--out", out)


def test_a_width_for_each_block_tells_the_base(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text('{"cross_attention_dim": [1024, 1024]}')
    assert inspect_path(tmp_path)["base"]["family"] == "sd2"


def test_what_diffusers_computes_otherwise_is_no_yes(tmp_path):
    report = inspect_path(kohya(tmp_path / "dora.safetensors", dora_scale=torch.ones(4, 1)))
    assert all(report["readers"][name].startswith("not as trained") for name in ("diffusers", "AUTOMATIC1111"))
    assert any("programs disagree on a DoRA" in text and "--rank" in text for text in report["warnings"])
    second = {
        key.replace("to_k", "to_v"): value for key, value in load_file(kohya(tmp_path / "a.safetensors", alpha=torch.tensor(1.0))).items()
    }
    for alpha, several in ((1.0, False), (4.0, True)):
        file = tmp_path / "b.safetensors"
        save_file(second | load_file(kohya(tmp_path / "c.safetensors", alpha=torch.tensor(alpha))), file)
        report = inspect_path(file)
        assert (report["readers"]["diffusers"] != "yes") == several
        assert any("several alphas" in text and "--format kohya" in text for text in report["warnings"]) == several


def test_a_base_that_is_not_here_does_not_stop_a_conversion_that_needs_none(tmp_path, capsys):
    gone = {"dedpo_settings": json.dumps({"model": str(tmp_path / "gone")})}
    out = tmp_path / "out.safetensors"
    assert export.main([str(kohya(tmp_path / "a.safetensors", gone)), "--format", "kohya", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: " in said and "those of an sd1" in said and "--model" in said
    assert told_base(read_lora_file(out).metadata) == Base("sd1")
    unclear = kohya(tmp_path / "b.safetensors", gone, down=torch.ones(2, 5))
    assert "give --model, where the base model is now" in refused(capsys, unclear, "--format", "kohya", "--out", out)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_what_others_say_of_their_file_stays(tmp_path, layout):
    said = {f"modelspec.{name}": name for name in ("author", "license", "description", "trigger_phrase", "usage_hint", "tags")}
    out = tmp_path / "out.safetensors"
    assert export.main([str(kohya(tmp_path / "a.safetensors", said)), "--format", layout, "--out", str(out)]) == 0
    assert said.items() <= read_lora_file(out).metadata.items()


def test_predictions_and_refiners_by_the_words_of_kohya(tmp_path):
    assert told_base({"ss_base_model_version": "sd_v2_v"}) == Base("sd2", "v_prediction")
    assert told_base({"ss_base_model_version": "sdxl_base_v1-0", "ss_v_parameterization": "True"}) == Base("sdxl", "v_prediction")
    assert told_base({"ss_base_model_version": "sd_v2"}) == Base("sd2")
    for key, word in (("modelspec.architecture", "stable-diffusion-xl-v1-refiner/lora"), ("ss_base_model_version", "sdxl_refiner_v1-0")):
        assert told_base({key: word}) is None
        file = kohya(tmp_path / "a.safetensors", {key: word})
        with pytest.raises(UserError, match="refiner"):
            read_lora_file(file)
