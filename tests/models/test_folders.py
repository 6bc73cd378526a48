"""Diffusers folders as people keep them: half precision, shards, parts of another kind; what is missing is named by file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.folder import find_part
from dedpo_diffusion.models.loading import load_pipeline

UNET = "diffusion_pytorch_model"
FORMAT = {"format": "pt"}


@pytest.fixture(scope="module")
def kept(folders, tmp_path_factory) -> dict[str, Path]:
    """A model in full, in half precision, and both in shards, as diffusers saves them."""
    where = tmp_path_factory.mktemp("kept")
    pipe = load_pipeline(str(folders["sd15"])).to(torch.float16)
    ways = {
        "half": {"variant": "fp16"},
        "half shards": {"variant": "fp16", "max_shard_size": "100KB"},
        "shards": {"max_shard_size": "100KB"},
    }
    for name, options in ways.items():
        pipe.save_pretrained(where / name, **options)
    return {name: where / name for name in ways} | {"full": folders["sd15"]}


def weights(pipe) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def copied(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=FORMAT)


@pytest.mark.parametrize("way", ["half", "half shards", "shards"])
def test_every_way_of_keeping_weights_gives_the_same_model(kept, way, capsys):
    expected = {
        name: value.half().float() if value.is_floating_point() else value
        for name, value in weights(load_pipeline(str(kept["full"]))).items()
    }
    found = weights(load_pipeline(str(kept[way])))
    assert set(found) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert ("there only as a variant" in capsys.readouterr().out) == way.startswith("half")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_part_alone_may_be_in_half_precision(kept, tmp_path, part):
    mixed = copied(kept["full"], tmp_path / "mixed")
    shutil.rmtree(mixed / part)
    copied(kept["half shards"] / part, mixed / part)
    full, found = weights(load_pipeline(str(kept["full"]))), weights(load_pipeline(str(mixed)))
    for name, value in found.items():
        own = full[name].half().float() if name.startswith(f"{part}.") else full[name]
        assert torch.equal(value, own), name


def test_the_weights_in_full_are_taken_where_there_are_both(kept, tmp_path):
    both = copied(kept["full"], tmp_path / "both")
    shutil.copy(kept["half"] / "unet" / f"{UNET}.fp16.safetensors", both / "unet")
    save_file({"x": torch.zeros(1)}, both / "unet" / f"{UNET}.non_ema.safetensors")
    assert find_part(both / "unet", UNET).files == [both / "unet" / f"{UNET}.safetensors"]
    (both / "unet" / f"{UNET}.safetensors").unlink()
    assert find_part(both / "unet", UNET).variant == "fp16"
    (both / "unet" / f"{UNET}.fp16.safetensors").rename(both / "unet" / f"{UNET}.ema.safetensors")
    with pytest.raises(UserError, match="variants ema, non_ema and no"):
        find_part(both / "unet", UNET)


def lose_shard(folder: Path) -> str:
    file = sorted((folder / "unet").glob("*-of-*.safetensors"))[1]
    file.unlink()
    return f"{file}: no such file"


def lose_index(folder: Path) -> str:
    index = next((folder / "unet").glob("*.index*.json"))
    index.unlink()
    return f"{index}: no such file, which says what"


def empty_shard(folder: Path) -> str:
    file = sorted((folder / "unet").glob("*-of-*.safetensors"))[2]
    name = next(iter(load_file(file)))
    rewrite(file, lambda tensors: tensors.pop(name))
    return f"{file}: it lacks the tensor {name}"


def cut_shard(folder: Path) -> str:
    file = sorted((folder / "unet").glob("*-of-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file}: no safetensors file, or one cut short"


@pytest.mark.parametrize("harm", [lose_shard, lose_index, empty_shard, cut_shard])
@pytest.mark.parametrize("way", ["shards", "half shards"])
def test_shards_that_are_not_whole_are_named(kept, tmp_path, way, harm):
    folder = copied(kept[way], tmp_path / "model")
    words = harm(folder)
    with pytest.raises(UserError) as caught:
        load_pipeline(str(folder))
    assert str(caught.value).startswith(words)


def lose_part(folder: Path) -> str:
    shutil.rmtree(folder / "vae")
    return f"{folder / 'vae'}: no such folder"


def lose_weights(folder: Path) -> str:
    (folder / "text_encoder" / "model.safetensors").unlink()
    return f"{folder / 'text_encoder'}: no weights in model.safetensors"


def lose_config(folder: Path) -> str:
    (folder / "unet" / "config.json").unlink()
    return f"{folder / 'unet' / 'config.json'}: no such file"


def lose_scheduler(folder: Path) -> str:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    return f"{folder / 'scheduler' / 'scheduler_config.json'}: no such file"


def lose_words(folder: Path) -> str:
    shutil.rmtree(folder / "tokenizer")
    return f"{folder / 'tokenizer'}"


def lose_tensor(part: str, ending: str):
    def harm(folder: Path) -> str:
        file = next((folder / part).glob("*.safetensors"))
        name = next(name for name in sorted(load_file(file)) if name.endswith(ending))
        rewrite(file, lambda tensors: tensors.pop(name))
        return f"{file}: the weights lack the tensor {name}"

    harm.__name__ = f"lose_{part}_tensor"
    return harm


def spoil(part: str, ending: str, value: float):
    def harm(folder: Path) -> str:
        file = next((folder / part).glob("*.safetensors"))
        name = next(name for name in sorted(load_file(file)) if name.endswith(ending))
        rewrite(file, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
        return f"{file}: the tensor {name} has numbers that are not finite"

    harm.__name__ = f"spoil_{part}_{value}"
    return harm


def leave_a_lora(folder: Path) -> str:
    file = folder / "unet" / f"{UNET}.safetensors"
    rewrite(file, lambda tensors: tensors.update({"down_blocks.0.x.lora_A.weight": torch.zeros(1, 1)}))
    return f"{file}: down_blocks.0.x.lora_A.weight is of a LoRA"


@pytest.mark.parametrize(
    "harm",
    [
        lose_part, lose_weights, lose_config, lose_scheduler, lose_words, lose_tensor("unet", "attn1.to_q.weight"),
        lose_tensor("vae", "conv_in.bias"), lose_tensor("text_encoder", "q_proj.weight"), spoil("unet", "to_out.0.bias", float("nan")),
        spoil("vae", "conv_out.weight", float("inf")), spoil("text_encoder", "fc1.bias", float("-inf")), leave_a_lora,
    ],
    ids=lambda harm: harm.__name__,
)  # fmt: skip
def test_what_a_folder_lacks_is_named(kept, tmp_path, harm):
    folder = copied(kept["full"], tmp_path / "model")
    words = harm(folder)
    with pytest.raises(UserError) as caught:
        load_pipeline(str(folder))
    assert str(caught.value).startswith(words)


def test_numbers_that_only_half_precision_cannot_hold_are_told_apart(kept, tmp_path):
    folder = copied(kept["full"], tmp_path / "model")
    file = folder / "unet" / f"{UNET}.safetensors"
    rewrite(file, lambda tensors: tensors["conv_in.bias"].fill_(1e6))
    load_pipeline(str(folder))
    with pytest.raises(UserError, match=r"conv_in\.bias has numbers too large for float16; give --dtype bfloat16"):
        load_pipeline(str(folder), dtype=torch.float16)


def test_tensors_without_a_place_are_counted_aloud(kept, tmp_path, capsys):
    folder = copied(kept["full"], tmp_path / "model")
    rewrite(folder / "vae" / f"{UNET}.safetensors", lambda tensors: tensors.update({"loss.logvar": torch.zeros(1)}))
    rewrite(folder / "text_encoder" / "model.safetensors", lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(16)}))
    load_pipeline(str(folder))
    said = capsys.readouterr().out
    assert "1 tensors have no place in a AutoencoderKL and are not used (first: loss.logvar)" in said and "position_ids" not in said


def test_a_broken_index_is_named(kept, tmp_path):
    folder = copied(kept["shards"], tmp_path / "model")
    index = next((folder / "unet").glob("*.index.json"))
    for text in ("[", "{}", json.dumps({"weight_map": [1]})):
        index.write_text(text)
        with pytest.raises(UserError, match="it is no index of weights"):
            load_pipeline(str(folder))


def file_without(source: Path, to: Path, change) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, to)
    return to


@pytest.mark.slow
def test_what_a_single_file_lacks_is_named(folders, tmp_path):
    whole = tiny.single_file(folders["sdxl"], tmp_path / "whole.safetensors")
    names = list(load_file(whole))
    for ending in (".attn1.to_q.weight", "first_stage_model.decoder.conv_in.weight", ".in_proj_weight", "label_emb.0.2.bias"):
        name = next(name for name in names if name.endswith(ending))
        short = file_without(whole, tmp_path / "short.safetensors", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(UserError, match=r"short\.safetensors: it lacks the tensor .*download or merge it again") as caught:
            load_pipeline(str(short), config=str(folders["sdxl"]))
        assert name in str(caught.value)
        wide = file_without(
            whole, tmp_path / "wide.safetensors", lambda tensors, name=name: tensors.update({name: torch.zeros(3, *tensors[name].shape)})
        )
        with pytest.raises(UserError, match="has shape") as caught:
            load_pipeline(str(wide), config=str(folders["sdxl"]))
        assert name in str(caught.value)
        bad = file_without(whole, tmp_path / "bad.safetensors", lambda tensors, name=name: tensors[name].view(-1)[0].fill_(float("nan")))
        with pytest.raises(UserError, match=r"bad\.safetensors: the tensor .* numbers that are not finite") as caught:
            load_pipeline(str(bad), config=str(folders["sdxl"]))
        assert name in str(caught.value)


def test_what_a_single_file_holds_beside_is_refused_or_told(folders, tmp_path, capsys):
    whole = tiny.single_file(folders["sd15"], tmp_path / "whole.safetensors")
    stray = "model.diffusion_model.input_blocks.1.1.ip_adapter.weight"
    odd = file_without(whole, tmp_path / "odd.safetensors", lambda tensors: tensors.update({stray: torch.zeros(2)}))
    with pytest.raises(UserError, match="has no place in the architecture") as caught:
        load_pipeline(str(odd), config=str(folders["sd15"]))
    assert stray in str(caught.value)
    more = {"model_ema.decay": torch.zeros(1), "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)}
    load_pipeline(
        str(file_without(whole, tmp_path / "more.safetensors", lambda tensors: tensors.update(more))), config=str(folders["sd15"])
    )
    assert "1 tensors that belong to none of the model's parts are not used (first: model_ema.decay)" in capsys.readouterr().out
