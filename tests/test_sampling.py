"""Sampling and proposing: seeds pair images between models, and a stopped run goes on."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dedpo_diffusion import sampling
from dedpo_diffusion.decoding import decode_image
from dedpo_diffusion.models import Backbone
from dedpo_diffusion.pairs import PairReader
from dedpo_diffusion.pipelines import propose, sample
from dedpo_diffusion.weights import diffusers_lora, save_lora

PROMPTS = ["a small red circle on a white background", "a large blue cross on a gray background", "a large cross"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path / "prompts.txt"


def arguments(base, prompts, out, **changes) -> list[str]:
    settings = {"model": base, "prompts": prompts, "out": out, "steps": 2, "batch": 2, "device": "cpu"} | changes
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def pixels(folder) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def write_lora(model, path, scale: float) -> None:
    backbone = Backbone(str(model), device=torch.device("cpu"))
    backbone.add_lora(rank=4, alpha=4)
    tensors, config = diffusers_lora(backbone.trainable(), rank=4, alpha=4, targets=["to_q", "to_k", "to_v", "to_out.0"])
    generator = torch.Generator().manual_seed(0)
    save_lora(path, {k: scale * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}, config, {})


def test_index_names_every_image_with_its_prompt_and_seed(tiny_model, prompts, tmp_path):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a", seeds=2, seed=5)) == 0
    rows = pq.read_table(tmp_path / "a" / "index.parquet").to_pylist()
    assert [row["seed"] for row in rows] == [5, 6, 7, 8, 9, 10]
    assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(2)]
    assert {row["file"] for row in rows} == set(pixels(tmp_path / "a"))


def test_an_adapter_of_zeros_gives_the_base_images_and_a_real_one_others(tiny_model, prompts, tmp_path):
    """Same prompt, seed and noise for both models: nothing but the adapter can make a difference."""
    for name, scale in (("zero", 0.0), ("one", 0.5)):
        write_lora(tiny_model, tmp_path / f"{name}.safetensors", scale)
        assert sample.main(arguments(tiny_model, prompts, tmp_path / name, lora=tmp_path / f"{name}.safetensors")) == 0
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "base")) == 0
    base, zero, one = (pixels(tmp_path / name) for name in ("base", "zero", "one"))
    assert all(np.array_equal(base[file], zero[file]) for file in base)
    assert any(not np.array_equal(base[file], one[file]) for file in base)


def test_a_stopped_run_goes_on_and_ends_the_same(tiny_model, prompts, tmp_path, monkeypatch):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "whole", seeds=2)) == 0
    real, calls = sampling.sample, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample", stops)
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "part", seeds=2)) == 130
    assert not (tmp_path / "part" / "index.parquet").exists()
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "part", seeds=2)) == 0
    assert len(calls) == 4  # two batches before the stop, the stopped one, and that one again
    whole, part = pixels(tmp_path / "whole"), pixels(tmp_path / "part")
    assert list(whole) == list(part)
    assert all(np.array_equal(whole[file], part[file]) for file in whole)


def test_another_sample_in_the_folder_is_refused(tiny_model, prompts, tmp_path, capsys):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a")) == 0
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a", guidance=2.0)) == 2
    assert "guidance is 7.5 there, 2.0 now" in capsys.readouterr().err


@pytest.mark.parametrize(("pairing", "k", "expected"), [("disjoint", 2, 1), ("disjoint", 4, 2), ("all", 3, 3)])
def test_propose_pairs_images_of_one_prompt_and_records_seeds(tiny_model, prompts, tmp_path, pairing, k, expected):
    out = tmp_path / "data"
    assert propose.main(arguments(tiny_model, prompts, out, images_per_prompt=k, pairing=pairing, seed=100)) == 0
    reader = PairReader(out)
    assert len(reader) == 3 * expected
    assert reader.prompts() == [p for p in PROMPTS for _ in range(expected)]
    assert not (out / "proposals").exists()
    for row, pair in enumerate(reader.iter_pairs()):
        assert pair.source["seed_0"] < pair.source["seed_1"]
        assert 100 + k * (row // expected) <= pair.source["seed_0"] < 100 + k * (row // expected + 1)


def test_a_proposed_image_is_that_of_its_seed(tiny_model, prompts, tmp_path):
    assert propose.main(arguments(tiny_model, prompts, tmp_path / "data")) == 0
    pair = PairReader(tmp_path / "data").pair(1)
    pipe = sampling.load_sampler(str(tiny_model), device="cpu")
    seeds = [pair.source["seed_0"], pair.source["seed_1"]]
    again = sampling.sample(pipe, [pair.prompt] * 2, seeds, steps=2, guidance=7.5)
    for image, data in zip(again, (pair.image_0, pair.image_1), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(decode_image(data, "here")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images_per_prompt": 3}, "even number"),
        ({"images_per_prompt": 1, "pairing": "all"}, "from 2 on"),
        ({"model": "./none"}, "no such folder"),
    ],
)
def test_mistakes_of_propose(tiny_model, prompts, tmp_path, capsys, changes, words):
    assert propose.main(arguments(tiny_model, prompts, tmp_path / "data", **changes)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), (b"\n \n", "no prompt in it"), (b"caf\xe9\n", "not UTF-8")])
def test_prompt_files_that_cannot_be_used(tiny_model, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    assert sample.main(arguments(tiny_model, tmp_path / "p.txt", tmp_path / "a")) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "p.txt" in message
    assert not (tmp_path / "a").exists()


def test_an_adapter_that_does_not_exist(tiny_model, prompts, tmp_path, capsys):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a", lora=tmp_path / "none.safetensors")) == 2
    assert "no such adapter file" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
