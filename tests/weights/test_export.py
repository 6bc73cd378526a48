"""`dedpo export`: what is written computes what was trained, at every strength, rank and precision, and says where it comes from."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.files import file_digest
from dedpo_diffusion.models.loading import own_memory
from dedpo_diffusion.pipelines import export
from dedpo_diffusion.weights import from_parameters, read_lora_file
from support.adapters import adapted, as_run, embeddings, image, live_embeddings, pipeline, prediction, whole_run
from support.original_names import original_names


def exported(source, out, *options) -> str:
    assert export.main([str(source), "--out", str(out), *map(str, options)]) == 0
    return out


def refused(capsys, source, out, *options) -> str:
    capsys.readouterr()
    assert export.main([str(source), "--out", str(out), *map(str, options)]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def runs(folders, tiny_pairs, tmp_path_factory):
    """A run of each kind, with the live model, its text encoders adapted too; SDXL's is an rslora."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    identity = {"base_model": "the base's", "pairs": "the pairs'", "targets": file_digest(tiny_pairs / "targets" / "soft.parquet")}
    for kind, options in (("sd15", {"targets": ["to_q", "to_out.0", "conv1"]}), ("sdxl", {"rslora": True})):
        options = options | {"text": True}
        model = adapted(folders[kind], **options)
        as_run(model, folders[kind], root / kind, data=tiny_pairs, identity=identity, **options)
        lora = from_parameters(model.trainable(), alpha=4.0, rslora=options.get("rslora", False))
        found[kind] = SimpleNamespace(run=root / kind, model=model, base=folders[kind], lora=lora)
    return found


def by_hand(file, base) -> dict[str, torch.Tensor]:
    """W + alpha / rank * up @ down, from a kohya file's own numbers, by the names of the parts' state dictionaries."""
    tensors, weights = load_file(file), {}
    names = original_names("sdxl") if base.unet.config.addition_embed_type else {}  # sd-scripts names SDXL by the original code
    original = {ours: theirs.replace(".", "_") for ours, theirs in names.items()}
    for part, prefixes in (("unet", ["lora_unet_"]), ("text_encoder", ["lora_te_", "lora_te1_"]), ("text_encoder_2", ["lora_te2_"])):
        module = getattr(base, part, None)
        for name, value in module.state_dict().items() if module is not None else ():
            path = name.removesuffix(".weight").replace(".", "_")
            text = "" if part == "unet" or path.startswith("text_model_") else "text_model_"
            for prefix in prefixes:
                key = f"{prefix}{text}{original.get(name.removesuffix('.weight'), path)}"
                if name.endswith(".weight") and f"{key}.alpha" in tensors:
                    down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
                    change = (up.flatten(1) @ down.flatten(1)).view(value.shape)
                    weights[f"{part}.{name}"] = value + tensors.pop(f"{key}.alpha") / len(down) * change
    assert not tensors
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_everything_that_is_written_is_the_trained_model(runs, tmp_path, kind, capsys):
    """Plain arithmetic on the LoRA file gives the merged weights; folder and single file sample the same image."""
    it = runs[kind]
    kohya = exported(it.run, tmp_path / "k.safetensors", "--format", "kohya")
    merged = exported(it.run, tmp_path / "merged", "--format", "merged")
    single = exported(it.run, tmp_path / "c.safetensors", "--format", "checkpoint", "--dtype", "float32")
    said = capsys.readouterr().out
    layers = len(it.lora.layers)
    assert f"a kohya LoRA for {'sdxl' if kind == 'sdxl' else 'sd1'}, {3 * layers} tensors, rank 8, alpha " in said and "step 7" in said

    folder, base = pipeline(merged), pipeline(it.base)
    file = own_memory(type(folder).from_single_file(str(single), config=str(it.base), local_files_only=True, dtype=torch.float32))
    weights = by_hand(kohya, base)
    assert len(weights) == layers
    for part in ("unet", "text_encoder", "text_encoder_2"):
        states = [getattr(pipe, part).state_dict() for pipe in (folder, base, file) if getattr(pipe, part, None) is not None]
        for name, value in states[0].items() if states else ():
            expected = weights.get(f"{part}.{name}", states[1][name])
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(states[2][name], value)
    torch.testing.assert_close(prediction(folder.unet), prediction(it.model.unet), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeddings(folder), live_embeddings(it.model), atol=1e-5, rtol=1e-5)
    file.scheduler = folder.scheduler
    pictures = [image(pipe) for pipe in (folder, file, base)]
    assert torch.equal(pictures[0], pictures[1])
    assert (pictures[0] - pictures[2]).abs().max() > 0.01


def test_what_a_file_says_of_itself_and_the_same_bytes_twice(runs, tiny_pairs, tmp_path):
    it = runs["sd15"]
    for layout in ("diffusers", "kohya", "checkpoint"):
        files = [exported(it.run, tmp_path / f"{layout}{k}.safetensors", "--format", layout) for k in range(2)]
        data = files[0].read_bytes()
        assert data == files[1].read_bytes()
        with safe_open(files[0], "pt") as file:
            told = file.metadata()
        settings, sources = json.loads(told["dedpo_settings"]), json.loads(told["dedpo_sources"])
        assert (settings["step"], settings["lora"]["alpha"], settings["model"]) == (7, 4.0, it.base.name)
        assert "/" not in told["dedpo_settings"]  # paths tell of the machine and its users
        targets = tiny_pairs / "targets"
        assert sources["targets"] == file_digest(targets / "soft.parquet")
        assert sources["label_report"] == file_digest(targets / "soft.json")
        assert (sources["base_model"], sources["pairs"]) == ("the base's", "the pairs'")
        assert "dedpo_made" not in told
        if layout != "diffusers":
            digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
            assert told["modelspec.hash_sha256"] == f"0x{digest}"
            assert told["modelspec.title"] == "sd15"
            assert told.get("sshs_model_hash", digest) == digest
    assert {value.dtype for value in load_file(files[0]).values()} == {torch.float16}
    assert json.loads(told["dedpo_settings"])["objective"]["beta"] == 2000.0


def test_a_file_becomes_the_other_layout_and_back(runs, tmp_path):
    it = runs["sdxl"]
    first = exported(it.run, tmp_path / "d.safetensors")
    kohya = exported(first, tmp_path / "k.safetensors", "--format", "kohya")
    again = exported(kohya, tmp_path / "e.safetensors")
    assert set(load_file(first)) == set(load_file(again))
    lora = read_lora_file(again)
    for name, layer in it.lora.layers.items():
        torch.testing.assert_close(lora.layers[name].delta(), layer.delta(), atol=1e-7, rtol=1e-6)
    direct = load_file(exported(it.run, tmp_path / "l.safetensors", "--format", "kohya"))
    assert {name: value.shape for name, value in load_file(kohya).items()} == {name: value.shape for name, value in direct.items()}
    for layout in ("kohya", "diffusers"):  # what a file has become stays as it is
        files = [exported(source, tmp_path / f"{name}.safetensors", "--format", layout) for source, name in ((again, "f"), (kohya, "g"))]
        one, other = map(load_file, files)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    made = json.loads(lora.metadata["dedpo_made"])
    assert made["from"]["sha256"] == file_digest(kohya) and made["from"]["made"]["from"]["sha256"] == file_digest(first)
    assert json.loads(lora.metadata["dedpo_settings"])["step"] == 7
    half = exported(it.run, tmp_path / "h.safetensors", "--format", "kohya", "--dtype", "bfloat16")
    kinds = {name.partition(".")[2]: value.dtype for name, value in load_file(half).items()}
    assert kinds == {"lora_down.weight": torch.bfloat16, "lora_up.weight": torch.bfloat16, "alpha": torch.float32}


def test_strength_rank_and_others_added(runs, tmp_path, capsys):
    it = runs["sd15"]
    other = exported(it.run, tmp_path / "o.safetensors", "--format", "kohya", "--strength", "-0.5")
    both = exported(it.run, tmp_path / "b.safetensors", "--strength", 2, "--add", f"{other}=3", other)
    lora = read_lora_file(both)
    assert lora.ranks() == [24]
    for name, layer in it.lora.layers.items():
        torch.testing.assert_close(lora.layers[name].delta(), (2 - 1.5 - 0.5) * layer.delta(), atol=1e-6, rtol=1e-5)
    made = json.loads(lora.metadata["dedpo_made"])
    assert made["strength"] == 2.0
    assert [(entry["file"], entry["strength"]) for entry in made["added"]] == [("o.safetensors", 3.0), ("o.safetensors", 1.0)]
    part = tmp_path / "part.safetensors"
    save_file({name: value for name, value in load_file(other).items() if "conv1" in name}, part)
    uneven = exported(it.run, tmp_path / "u.safetensors", "--add", f"{part}=3", "--format", "kohya")
    assert len({value.item() for name, value in load_file(uneven).items() if name.endswith(".alpha")}) == 1  # diffusers takes one alone
    lora = read_lora_file(uneven)
    assert lora.ranks() == [16]  # filled up with zeros: readers take several ranks for one, or refuse them
    for name, layer in it.lora.layers.items():
        torch.testing.assert_close(lora.layers[name].delta(), (-0.5 if "conv1" in name else 1) * layer.delta(), atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    small = read_lora_file(exported(it.run, tmp_path / "s.safetensors", "--rank", 3))
    deltas = [(layer.delta(), small.layers[name].delta()) for name, layer in it.lora.layers.items()]
    error = (sum((a - b).square().sum() for a, b in deltas) / sum(a.square().sum() for a, _ in deltas)).sqrt().item()
    assert small.ranks() == [3]
    assert json.loads(small.metadata["dedpo_made"])["relative_error"] == pytest.approx(error, abs=1e-5)
    assert f"rank 3 leaves out {error:.1%}" in capsys.readouterr().out
    merged = pipeline(exported(it.run, tmp_path / "m", "--format", "merged", "--strength", 0.5, "--add", other))
    assert (prediction(merged.unet) - prediction(pipeline(it.base).unet)).abs().max() < 1e-5  # half of it, less half of it


@pytest.mark.parametrize("kind", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd15", "sdxl"))])
def test_a_whole_fine_tune(folders, tiny_model, tiny_pairs, tmp_path, capsys, kind):
    model = folders[kind] if kind else tiny_model
    run, base = whole_run(model, tmp_path / "whole", data=tiny_pairs), pipeline(model)
    trained = load_file(next(run.glob("checkpoints/*/parameters.safetensors")))
    if kind:
        single = exported(run, tmp_path / "c.safetensors", "--format", "checkpoint", "--dtype", "float32")
        file = type(base).from_single_file(str(single), config=str(model), local_files_only=True, dtype=torch.float32)
        assert all(torch.equal(value, trained[name]) for name, value in file.unet.state_dict().items())
        with safe_open(single, "pt") as opened:
            told = opened.metadata()
        assert told["modelspec.architecture"] == {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[kind]
    half = pipeline(exported(run, tmp_path / "half", "--format", "merged", "--strength", 0.5)).unet.state_dict()
    weights = base.unet.state_dict()
    for name, value in half.items():
        torch.testing.assert_close(value, (weights[name] + trained[name]) / 2, atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    for rank, exact in ((2, True), (1, False)):
        lora = read_lora_file(exported(run, tmp_path / "x.safetensors", "--rank", rank, "--format", "kohya"))
        missed = whole = 0.0
        for name, value in trained.items():
            change = value - weights[name]
            layer = lora.layers.get(f"unet.{name.removesuffix('.weight')}") if value.ndim > 1 else None
            left = change if layer is None else change - layer.delta()
            assert not exact or layer is None or left.norm() < 1e-4 * change.norm()
            missed, whole = missed + left.square().sum().item(), whole + change.square().sum().item()
        assert json.loads(lora.metadata["dedpo_made"])["relative_error"] == pytest.approx((missed / whole) ** 0.5, abs=1e-4)
        assert "tensors that are no matrices" in capsys.readouterr().out
    assert "--rank to extract" in refused(capsys, run, tmp_path / "y.safetensors")


def test_a_dora(tiny_model, tiny_pairs, tmp_path, capsys):
    model = adapted(tiny_model, dora=True, targets=["to_q", "conv1"])
    run = as_run(model, tiny_model, tmp_path / "run", data=tiny_pairs, dora=True, targets=["to_q", "conv1"])
    ours = prediction16(model.unet)
    merged = pipeline(exported(run, tmp_path / "m", "--format", "merged"))
    torch.testing.assert_close(prediction16(merged.unet), ours, atol=1e-5, rtol=1e-5)
    kohya = exported(run, tmp_path / "k.safetensors", "--format", "kohya")
    assert "programs disagree on a DoRA's magnitudes" in capsys.readouterr().out
    for key, value in load_file(kohya).items():
        if key.endswith(".dora_scale"):
            assert value.shape == (len(value), *[1] * (3 if "conv1" in key else 1))
            module = model.unet.get_submodule("up_blocks.1.resnets.0.conv1") if "up_blocks_1_resnets_0_conv1" in key else None
            if module is not None:
                assert torch.equal(value.flatten(), module.lora_magnitude_vector["default"].weight.flatten())
    assert "is not there; give --model" in refused(capsys, kohya, tmp_path / "p.safetensors", "--rank", 32)
    plain = exported(
        kohya, tmp_path / "p.safetensors", "--rank", 32, "--model", tiny_model
    )  # the whole change of the weights, as a plain LoRA
    assert all(layer.magnitude is None for layer in read_lora_file(plain).layers.values())
    torch.testing.assert_close(prediction16(pipeline(tiny_model, plain).unet), ours, atol=1e-5, rtol=1e-5)
    assert "no other strength" in refused(capsys, run, tmp_path / "x.safetensors", "--strength", 0.5)
    assert "cannot be added" in refused(capsys, run, tmp_path / "x.safetensors", "--add", plain)
    half = pipeline(exported(run, tmp_path / "h", "--format", "merged", "--strength", 0.5)).unet.state_dict()
    whole, base = merged.unet.state_dict(), pipeline(tiny_model).unet.state_dict()
    for name, value in half.items():
        torch.testing.assert_close(value, (whole[name] + base[name]) / 2, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def prediction16(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    return unet(x, torch.tensor([10, 700]), text).sample


@pytest.mark.parametrize("zero", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_v_prediction_is_marked(folders, tiny_pairs, tmp_path, capsys, zero):
    import shutil

    base = shutil.copytree(folders["sd21"], tmp_path / "base")
    schedule = base / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"rescale_betas_zero_snr": zero}))
    run = as_run(adapted(base), base, tmp_path / "run", data=tiny_pairs)
    file = exported(run, tmp_path / "c.safetensors", "--format", "checkpoint", "--dtype", "bfloat16")
    with safe_open(file, "pt") as opened:
        assert {"v_pred", "ztsnr"} & set(opened.keys()) == ({"v_pred", "ztsnr"} if zero else {"v_pred"})
        told = opened.metadata()
    assert (told["modelspec.architecture"], told["modelspec.prediction_type"]) == ("stable-diffusion-v2-768-v", "v")
    said = capsys.readouterr().out
    assert "predicts v" in said and "Forge takes it for noise" in said and "clip missing" in said and ("zero terminal SNR" in said) == zero
    folder = exported(run, tmp_path / "advised", "--format", "merged")  # what is advised for diffusers
    assert pipeline(folder).scheduler.config.prediction_type == "v_prediction"
    if zero:
        read = type(pipeline(base)).from_single_file(str(file), config=str(base), local_files_only=True, dtype=torch.bfloat16)
        merged = pipeline(exported(run, tmp_path / "m", "--format", "merged", "--dtype", "bfloat16")).unet.state_dict()
        assert all(torch.equal(value, merged[name].to(value.dtype)) for name, value in read.unet.state_dict().items())
    with safe_open(exported(run, tmp_path / "k.safetensors", "--format", "kohya"), "pt") as opened:
        told = opened.metadata()
    assert (told["ss_v2"], told["ss_base_model_version"], told["ss_v_parameterization"]) == ("True", "sd_v2_v", "True")


def test_a_run_starts_from_a_kohya_file(runs, tiny_pairs, tmp_path):
    from dedpo_diffusion.models.backbone import Backbone
    from dedpo_diffusion.settings import DataSettings, LoraSettings, TrainSettings
    from dedpo_diffusion.training.base import add_lora

    it = runs["sd15"]
    targets = ["to_q", "to_out.0", "conv1"]
    lora = LoraSettings(
        rank=8, alpha=2.0, targets=targets, text_encoders=True, start=exported(it.run, tmp_path / "k.safetensors", "--format", "kohya")
    )
    model = Backbone(str(it.base), device=torch.device("cpu"))
    add_lora(TrainSettings(model=str(it.base), out=tmp_path, data=DataSettings(tiny_pairs), lora=lora), model)
    torch.testing.assert_close(prediction(model.unet), prediction(it.model.unet), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(live_embeddings(model), live_embeddings(it.model), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_meant_is_refused(runs, folders, tmp_path, capsys):
    it, out = runs["sd15"], tmp_path / "x.safetensors"
    file = exported(it.run, tmp_path / "lora.safetensors", "--format", "kohya")
    unknown = tmp_path / "unknown.safetensors"
    save_file({f"unet.conv_in.lora_{k}.weight": torch.ones(*shape) for k, shape in (("A", (2, 4, 3, 3)), ("B", (8, 2, 1, 1)))}, unknown)
    for source, options, words in (
        (it.run, ["--rank", 4, "--format", "merged"], "--rank is of a LoRA"),
        (it.run, ["--rank", 0], "at least 1"),
        (it.run, ["--strength", 0], "other than 0"),
        (it.run, ["--strength", 1e9], "other than 0"),
        (it.run, ["--format", "merged"], "a folder that does not exist yet"),
        (it.run, ["--add", "none.safetensors"], "none.safetensors: no such file"),
        (it.run, ["--add", f"{file}=much"], "'much' is no number"),
        (runs["sdxl"].run, ["--format", "kohya", "--model", folders["sd15"]], "a LoRA of an sdxl, and the base model is an sd1"),
        (it.run, ["--model", tmp_path / "gone", "--format", "kohya"], "no such folder or file"),
        (file, ["--checkpoint", "best"], "--checkpoint is of a run"),
        (file, ["--average", "false"], "--average is of a run"),
        (unknown, ["--format", "kohya"], "give --model"),
        (unknown, ["--format", "checkpoint"], "give --model"),
        (tmp_path / "gone", [], "gone; give the folder of a run"),
        (tmp_path, [], "no settings.yaml"),
    ):
        assert words in refused(capsys, source, out, *options), words
        assert not out.exists()
    assert "belongs to another model" in refused(capsys, it.run, tmp_path / "m", "--format", "merged", "--model", folders["sdxl"])
    assert not (tmp_path / "m").exists()


def test_a_weight_beyond_half_precision_is_refused(runs, tmp_path, capsys):
    it = runs["sd15"]
    big = exported(it.run, tmp_path / "big.safetensors", "--format", "kohya")
    tensors = load_file(big)
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] * 1e7}, big)
    assert "not finite as float16" in refused(capsys, big, tmp_path / "x.safetensors", "--dtype", "float16")
    with_model = ("--model", it.base, "--format", "checkpoint")
    assert "not finite as float16" in refused(capsys, big, tmp_path / "x.safetensors", *with_model)
    assert exported(big, tmp_path / "x.safetensors", *with_model, "--dtype", "bfloat16")


def test_a_report_that_changed_is_not_named(runs, tmp_path, capsys):
    from dedpo_diffusion.weights.run_folder import read_settings
    from dedpo_diffusion.weights.source import digests

    run = runs["sd15"].run
    trained = read_settings(run)
    assert "label_report" in digests(run, trained)
    trained["data"]["pairs"] = str(tmp_path)
    assert "label_report" not in digests(run, trained)
    assert "its digest is not stored" in capsys.readouterr().out
