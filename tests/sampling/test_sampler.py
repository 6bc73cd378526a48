"""Sampling and proposing: seeds pair images between models, and a stopped run goes on."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges import scorers
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.pipelines import propose, sample
from dedpo_diffusion.sampling import png
from dedpo_diffusion.sampling import sampler as sampling
from support.adapters import diffusers_lora, save_lora
from support.doubles import Brightness
from support.sampling import PROMPTS, arguments, pixels


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path / "prompts.txt"


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
    assert list(rows[0]) == ["file", "prompt", "prompt_index", "seed", "category"]
    assert {row["category"] for row in rows} == {None}
    assert not list((tmp_path / "a").glob(".*"))


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


@pytest.mark.parametrize(("pairing", "most"), [("best_worst", 1), ("threshold", 6), ("rso", 1)])
def test_propose_pairs_images_by_their_rewards(tiny_model, prompts, tmp_path, capsys, monkeypatch, pairing, most):
    """Every pair says what its images were worth, and what was kept is told."""
    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Brightness())
    out, changes = tmp_path / "data", {"images_per_prompt": 4, "reward": "brightness", "temperature": 1.0, "threshold": 0.5}
    assert propose.main(arguments(tiny_model, prompts, out, pairing=pairing, **changes)) == 0
    pairs = list(PairReader(out).iter_pairs())
    assert len(pairs) == 3 * most
    for pair in pairs:
        worth = [np.asarray(decode_image(data, "here"), dtype=np.float64).mean() for data in (pair.image_0, pair.image_1)]
        assert [pair.source["reward_0"], pair.source["reward_1"]] == pytest.approx(worth)
        assert pair.source["seed_0"] < pair.source["seed_1"] and (pairing == "rso" or worth[0] != worth[1])
    assert f"{len(pairs)} pairs, paired {pairing}; " in " ".join(capsys.readouterr().out.split())


def replies(monkeypatch, value: float | None) -> None:
    """Make "brightness" a scorer that gives `value` to every image, or its own answer for None."""

    class Odd(Brightness):
        def score(self, prompts, images):
            found = super().score(prompts, images)
            return found if value is None else np.full(len(found), value)

    monkeypatch.setitem(scorers.SCORERS, "brightness", lambda location, **options: Odd())


@pytest.mark.parametrize(
    ("pairing", "value", "words"),
    [
        ("best_worst", 0.5, "3 of 3 prompts have none: all their images have one reward; take another --pairing, --threshold or --reward"),
        ("threshold", 0.5, "3 of 3 prompts have none: no two of their images differ by enough; take another"),
        ("best_worst", np.nan, f"scorer brightness gave nan for an image of prompt {PROMPTS[0]!r}; use another scorer"),
        ("rso", np.nan, "scorer brightness gave nan"),
        ("threshold", np.inf, "scorer brightness gave inf"),
    ],
)
def test_a_reward_that_tells_nothing_loses_no_image_and_a_better_one_goes_on(
    tiny_model, prompts, tmp_path, capsys, monkeypatch, pairing, value, words
):
    out, asked = tmp_path / "data", {"images_per_prompt": 4, "reward": "brightness", "threshold": 0.5, "pairing": pairing}
    replies(monkeypatch, value)
    assert propose.main(arguments(tiny_model, prompts, out, **asked)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert len(pixels(out / "proposals")) == 12 and not (out / "pairs").exists()

    replies(monkeypatch, None)
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: pytest.fail("no image is sampled again"))
    assert propose.main(arguments(tiny_model, prompts, out, **asked)) == 0
    assert len(PairReader(out)) >= 3


def test_rejection_sampling_by_a_constant_reward_takes_all_images_alike(tiny_model, prompts, tmp_path, monkeypatch):
    """All are as good as the best one, so each is accepted, and the first of them make the pair."""
    replies(monkeypatch, 0.5)
    assert propose.main(arguments(tiny_model, prompts, tmp_path / "data", images_per_prompt=4, reward="brightness", pairing="rso")) == 0
    pairs = list(PairReader(tmp_path / "data").iter_pairs())
    assert [pair.source["seed_1"] - pair.source["seed_0"] for pair in pairs] == [1, 1, 1]


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
        ({"pairing": "best_worst"}, "--pairing best_worst needs --reward SCORER"),
        ({"reward": "clip"}, "--pairing disjoint asks no --reward"),
        ({"pairing": "rso", "reward": "clip", "images_per_prompt": 4, "accepted": 3}, "accepted is 3; give an even number from 2"),
        ({"pairing": "threshold", "reward": "clip", "threshold": 0.3}, "threshold is 0.3"),
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


def test_images_that_are_not_finite_are_refused(tiny_model, prompts, tmp_path, capsys):
    """They would be whole PNGs, all black."""
    write_lora(tiny_model, tmp_path / "one.safetensors", 0.5)
    given = arguments(tiny_model, prompts, tmp_path / "a", lora=tmp_path / "one.safetensors", strength=1e30, seed=5)
    assert sample.main(given) == 2
    said = capsys.readouterr().err
    assert f"the image of seed 5 of {PROMPTS[0]!r} is not finite" in said and "smaller --strength" in said
    assert not list((tmp_path / "a").glob("*.png"))


def test_encoded_images_that_are_not_finite_are_refused(tiny_model):
    backbone = Backbone(str(tiny_model), device=torch.device("cpu"))
    words = backbone.encode_prompts(["a large cross"])
    vae = backbone.vae
    next(vae.decoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="the image of seed 3 is not finite"):
        sampling.sample_encoded(
            sampling.sampler_around(backbone, vae), words, words, [3], steps=1, guidance=2.0, shape=backbone.latent_shape(16)
        )


def test_a_folder_goes_on_under_another_spelling_of_its_name(tiny_model, prompts, tmp_path, monkeypatch):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a")) == 0
    next((tmp_path / "a").glob("*.png")).unlink()
    monkeypatch.chdir(tmp_path)
    assert sample.main(arguments(tiny_model, prompts, "a/")) == 0
    assert len(pixels(tmp_path / "a")) == 3


def test_an_adapter_that_does_not_exist(tiny_model, prompts, tmp_path, capsys):
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a", lora=tmp_path / "none.safetensors")) == 2
    assert "no such adapter file" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- noise, size, sampler


def starts(pipe, seeds, **options) -> torch.Tensor:
    """What the sampler starts from, at its own scale."""
    seen, inner = [], pipe.prepare_latents

    def watching(*args, **kwargs):
        seen.append(inner(*args, **kwargs).float() / pipe.scheduler.init_noise_sigma)
        return seen[-1].to(pipe.unet.dtype) * pipe.scheduler.init_noise_sigma

    pipe.prepare_latents = watching
    try:
        sampling.sample(pipe, ["a large cross"] * len(seeds), seeds, steps=1, guidance=2.0, **options)
    finally:
        pipe.prepare_latents = inner
    return seen[0]


def test_noise_is_a_function_of_the_seed_alone(folders):
    """Whatever the model (SD1.5's DDIM, SDXL's Euler), the company in the batch, the precision and the sampler."""
    seeds = list(range(40, 48))
    wanted = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise, _ = sampling.initial_noise(seeds, (4, 8, 8))
    assert torch.equal(noise, wanted)
    for kind, options in (("sd15", {}), ("sdxl", {}), ("sd15", {"dtype": "bfloat16", "scheduler": "euler_a"})):
        pipe = sampling.load_sampler(str(folders[kind]), device="cpu", **options)
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if "dtype" in options else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(starts(pipe, seeds), wanted, **tolerance)
        torch.testing.assert_close(starts(pipe, seeds[3:4]), wanted[3:4], **tolerance)


def test_height_width_and_sampler(tiny_model, prompts, tmp_path):
    out = {}
    for name in ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc"):
        assert sample.main(arguments(tiny_model, prompts, tmp_path / name, height=24, width=16, steps=4, scheduler=name, limit=1)) == 0
        [file] = (tmp_path / name).glob("*.png")
        image = Image.open(file)
        assert image.size == (16, 24)
        assert json.loads(image.text["dedpo"])["scheduler"]["class"] == sampling.SCHEDULERS[name]
        out[name] = image.tobytes()
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "own", height=24, width=16, steps=4, limit=1)) == 0
    assert pixels(tmp_path / "own")["00000-0.png"].tobytes() == out["ddim"]  # the tiny model's own
    assert out["ddim"] != out["euler_a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 16}, "height and width together"),
        ({"height": 16, "width": 16, "size": 16}, "height and width together"),
        ({"size": 20}, "multiples of 8"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seeds": 0}, "0 images of each prompt"),
        ({"seed": -1}, "--seed: -1 does not fit"),
        ({"limit": 9}, "from 1 to 3"),
        ({"prompts": "partiprompts"}, "one of the sets parti, geneval, hpsv2"),
        ({"strength": 0.5}, "1 strengths for 0 LoRA files"),
    ],
)
def test_mistakes_of_sample(tiny_model, prompts, tmp_path, capsys, changes, words):
    given = {"base": tiny_model, "prompts": prompts, "out": tmp_path / "a"} | changes
    assert sample.main(arguments(**given)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- what a PNG says


def test_an_image_can_be_made_again_from_what_it_says(tiny_model, prompts, tmp_path):
    write_lora(tiny_model, tmp_path / "one.safetensors", 0.5)
    changes = {"lora": tmp_path / "one.safetensors", "strength": 0.7, "negative": "grey", "scheduler": "euler_a", "batch": 1, "seed": 7}
    assert sample.main(arguments(tiny_model, prompts, tmp_path / "a", **changes)) == 0
    file = tmp_path / "a" / "00001-8.png"
    texts = Image.open(file).text
    assert (texts["prompt"], texts["seed"], texts["model"]) == (PROMPTS[1], "8", str(tiny_model))
    told = json.loads(texts["dedpo"])
    assert set(told["versions"]) >= {"torch", "diffusers", "dedpo_diffusion"}
    assert (told["lora"][0]["sha256"], told["model_fingerprint"]) == (
        sampling.file_digest(tmp_path / "one.safetensors"), json.loads((tmp_path / "a" / "identity.json").read_text())["model"],
    )  # fmt: skip
    names = {kind: name for name, kind in sampling.SCHEDULERS.items()}
    pipe = sampling.load_sampler(
        told["model"], config=told["model_config"], lora=[tmp_path / f"{lora['name']}.safetensors" for lora in told["lora"]],
        strength=[lora["strength"] for lora in told["lora"]], scheduler=names[told["scheduler"]["class"]], dtype=told["dtype"],
        device=told["device"],
    )  # fmt: skip
    assert sampling._schedule(pipe) == told["scheduler"]
    [again] = sampling.sample(
        pipe, [told["prompt"]], [told["seed"]], steps=told["steps"], guidance=told["guidance"], size=(told["height"], told["width"]),
        negative=told["negative"],
    )  # fmt: skip
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(file)))


def test_parameters_are_what_viewers_read(tiny_model, tmp_path):
    """One line for the prompt, one for the negative prompt, then "name: value" pairs; values with commas are JSON."""
    (tmp_path / "p.txt").write_text("a fox, café\n")
    write_lora(tiny_model, tmp_path / "one.safetensors", 0.5)
    changes = {"lora": tmp_path / "one.safetensors", "negative": "grey: no", "seed": 7, "height": 16, "width": 24, "scheduler": "dpmpp_2m"}
    assert sample.main(arguments(tiny_model, tmp_path / "p.txt", tmp_path / "a", **changes)) == 0
    prompt, negative, rest = Image.open(tmp_path / "a" / "00000-7.png").text["parameters"].split("\n")
    data = (tmp_path / "one.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    assert prompt == "a fox, café <lora:one:1>"
    assert negative == "Negative prompt: grey: no"
    assert rest.startswith("Steps: 2, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 24x16, Model: model, ")
    assert f'Lora hashes: "one: {digest}"' in rest


@pytest.mark.parametrize("name", ["a, b: c", 'x "y"'])
def test_values_that_would_end_early_are_quoted(name):
    assert json.loads(png._quoted(name)) == name


def test_categories_go_into_the_index_and_the_pairs(tiny_model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cross", "category": "x"}\n{"prompt": "a fox"}\n{"prompt": "a cat", "tag": "x"}\n')
    given = arguments(tiny_model, tmp_path / "p.jsonl", tmp_path / "a")
    assert sample.main(given) == 2  # category or tag
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cross", "category": "x"}\n{"prompt": "a fox"}\n{"prompt": "a cat", "category": "x"}\n')
    assert sample.main(given) == 0
    rows = pq.read_table(tmp_path / "a" / "index.parquet").to_pylist()
    assert [(row["prompt_index"], row["category"]) for row in rows] == [(0, "x"), (1, None), (2, "x")]
    given = arguments(tiny_model, tmp_path / "p.jsonl", tmp_path / "data", categories="x", seed=10)
    assert propose.main(given) == 0
    pairs = list(PairReader(tmp_path / "data").iter_pairs())
    assert [(pair.source["category"], pair.source["seed_0"]) for pair in pairs] == [("x", 10), ("x", 14)]


def test_the_scorer_that_is_named_next_can_judge_the_prompts():
    shapes = ["a small red circle on a white background", "a large blue square on a gray background"]
    assert sample.of_shapes(shapes)
    assert not sample.of_shapes([*shapes, "bond"]) and not sample.of_shapes([])
