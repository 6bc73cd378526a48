"""`dedpo train` on tiny SD1.5, SD2.1 and SDXL: caches and views, adapters of every kind, whole UNets, resume, export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.pipelines import export, sample, train
from dedpo_diffusion.sampling.sampler import load_sampler
from dedpo_diffusion.sampling.sampler import sample as draw_images
from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

WHOLE = {"weights": "full", "optim.steps": 4, "optim.batch": 2, "checkpoint_every": 2, "optim.learning_rate": 1e-3}
SHORT = {"optim.steps": 4, "optim.batch": 2, "checkpoint_every": 2, "lora.rank": 2, "optim.learning_rate": 0.01}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", 12, size=(80, 64), shard_pairs=5)


def run(base, pairs, out, **changes) -> None:
    assert train.main(arguments(base, pairs, out, **SHORT | changes)) == 0


MOST = ["sd15", pytest.param("sd21", marks=pytest.mark.slow), "sdxl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOST)
def test_cached_equals_uncached_to_the_bit(folders, pairs, tmp_path, kind):
    run(folders[kind], pairs, tmp_path / "live")
    run(folders[kind], pairs, tmp_path / "one", data__cache=tmp_path / "cache")
    run(folders[kind], pairs, tmp_path / "two", data__cache=tmp_path / "cache")
    assert deviation(final(tmp_path / "one"), final(tmp_path / "two")) == (0, 0)
    assert deviation(final(tmp_path / "live"), final(tmp_path / "one")) == (0, 0)
    assert metrics(tmp_path / "live") == metrics(tmp_path / "one")
    assert metrics(tmp_path / "one")[0]["margin_abs_max"] == 0
    assert metrics(tmp_path / "one")[-1]["margin_abs_max"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOST[1:])
def test_stored_reference_errors_change_nothing(folders, pairs, tmp_path, kind, monkeypatch):
    """The same draws with the reference predicted in every step: taking the stored errors away from the step shows it."""
    from dedpo_diffusion.training import data as loader

    changes = {"data__cache": tmp_path / "cache", "data__reference_draws": 3, "data__flip": "true", "data__views": 2}
    run(folders[kind], pairs, tmp_path / "stored", **changes)
    real = loader.PairLoader.load
    monkeypatch.setattr(loader.PairLoader, "load", lambda self, *given: dataclasses.replace(real(self, *given), known=None))
    run(folders[kind], pairs, tmp_path / "predicted", **changes)
    assert deviation(final(tmp_path / "stored"), final(tmp_path / "predicted")) == (0, 0)
    assert metrics(tmp_path / "stored") == metrics(tmp_path / "predicted")


@pytest.mark.slow
def test_views_of_a_cache_are_several_and_another_cache_is_named(folders, pairs, tmp_path, capsys):
    from dedpo_diffusion.training.cache import PairCache

    changes = {"data__cache": tmp_path / "cache", "data__flip": "true", "data__crop": "random", "data__views": 3}
    run(folders["sdxl"], pairs, tmp_path / "one", **changes)
    cache = PairCache(next((tmp_path / "cache").glob("*/index.json")).parent)
    views = [cache.posterior(7, view) for view in range(3)]
    assert len({float(mean.sum()) for mean, _, _ in views}) == 3
    for _, _, sizes in views:
        assert sizes[0].tolist()[:2] == [64, 80]
        assert torch.equal(sizes[0], sizes[1])  # images of one size, cut alike
    assert "does not fit" not in capsys.readouterr().out
    run(folders["sdxl"], pairs, tmp_path / "two", **changes | {"data__views": 2})
    assert "does not fit (views is 3 there, 2 now)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__flip": "true"}, "data.views of 2 or more"),
        ({"data__views": 2}, "data.flip or data.crop=random"),
        ({"data__views": 0}, "at least 1"),
        ({"data__views": 3, "data__flip": "true"}, "makes two versions"),
    ],
)
def test_views_that_cannot_be(folders, pairs, tmp_path, capsys, changes, words):
    assert train.main(arguments(folders["sd15"], pairs, tmp_path / "run", data__cache=tmp_path / "cache", **SHORT | changes)) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["shard-00001", "text-00000"])
def test_a_damaged_cache_stops_the_run_by_the_files_name(folders, pairs, tmp_path, capsys, part):
    changes = {"data__cache": tmp_path / "cache"}
    run(folders["sd15"], pairs, tmp_path / "good", **changes)
    file = next((tmp_path / "cache").glob(f"*/{part}.safetensors"))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    for content in (bytes(flipped), whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert train.main(arguments(folders["sd15"], pairs, tmp_path / "bad", **SHORT | changes | {"optim.steps": 12})) == 2
        assert f"{part}.safetensors: damaged" in "".join(capsys.readouterr().err.split("\n"))
        assert not checkpoints(tmp_path / "bad") or load_file(checkpoints(tmp_path / "bad")[-1][1] / "parameters.safetensors")


FAST = {("sd15", 4)}
ADAPTERS = [
    {},
    {"lora.rslora": "true", "lora.alpha": 3},
    {"lora.dora": "true"},
    {"lora.targets": '["to_q","to_v","proj_in","ff.net.2"]', "lora.alpha": 5},
    {"lora.text_encoders": "true", "lora.alpha": 5},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(kind, changes, marks=() if (kind, k) in FAST else pytest.mark.slow)
        for kind in ("sdxl", "sd15")
        for k, changes in enumerate(ADAPTERS)
    ],
)
def test_an_exported_adapter_samples_what_was_trained(folders, pairs, tmp_path, kind, changes):
    """`load_lora_weights` on a fresh pipeline, and the merged folder, predict what the training UNet predicts."""
    run(folders[kind], pairs, tmp_path / "run", **{key.replace(".", "__"): value for key, value in changes.items()})
    file, folder = tmp_path / "adapter.safetensors", tmp_path / "merged"
    assert export.main([str(tmp_path / "run"), "--out", str(file)]) == 0
    assert export.main([str(tmp_path / "run"), "--format", "merged", "--out", str(folder)]) == 0
    assert json.loads((folder / "dedpo_settings.json").read_text())["step"] == 4
    numbers = {"steps": 3, "guidance": 4.0}
    images = {
        name: draw_images(pipe, ["a large cross"], [1], **numbers)[0].tobytes()
        for name, pipe in {
            "base": load_sampler(str(folders[kind])),
            "lora": load_sampler(str(folders[kind]), lora=file),
            "merged": load_sampler(str(folder)),
        }.items()
    }
    assert images["lora"] != images["base"]
    gaps = [abs(a - b) for a, b in zip(images["lora"], images["merged"], strict=True)]
    assert max(gaps) <= 2
    assert max(abs(a - b) for a, b in zip(images["base"], images["merged"], strict=True)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["false", "true"])
def test_a_run_goes_on_from_an_exported_adapter_at_another_alpha(folders, pairs, tmp_path, text):
    run(folders["sdxl"], pairs, tmp_path / "first", lora__alpha=6, lora__text_encoders=text)
    file = tmp_path / "first.safetensors"
    assert export.main([str(tmp_path / "first"), "--out", str(file)]) == 0
    changes = {"lora__alpha": 2, "lora__start": file, "optim__steps": 2, "optim__learning_rate": 1e-12, "lora__text_encoders": text}
    run(folders["sdxl"], pairs, tmp_path / "second", **changes)
    before, after = final(tmp_path / "first"), final(tmp_path / "second")
    for a in (name for name in before if "lora_A" in name):
        b = a.replace("lora_A", "lora_B")
        torch.testing.assert_close(3 * before[b] @ before[a], after[b] @ after[a], rtol=1e-4, atol=1e-7)  # 6 / 2 against 2 / 2
    assert metrics(tmp_path / "second")[0]["margin_abs_max"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_adapted_text_encoders_train_with_and_without_a_cache_and_resume(folders, pairs, tmp_path, monkeypatch, kind):
    changes = {"lora__text_encoders": "true", "data__caption_dropout": 0.4}
    run(folders[kind], pairs, tmp_path / "live", **changes)
    run(folders[kind], pairs, tmp_path / "cached", data__cache=tmp_path / "cache", **changes)
    assert deviation(final(tmp_path / "live"), final(tmp_path / "cached")) == (0, 0)
    stop_after(monkeypatch, 2)
    assert train.main(arguments(folders[kind], pairs, tmp_path / "part", **SHORT | changes)) == 130
    run(folders[kind], pairs, tmp_path / "part", **changes)
    assert deviation(final(tmp_path / "live"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "live")[0]["margin_abs_max"] == 0
    trained = {name: value for name, value in final(tmp_path / "live").items() if "lora_B" in name}
    layers = {"sd15": 3, "sdxl": 2 + 3}[kind]  # of SDXL's first encoder the last is not used
    assert sum(name.startswith("text_encoder") for name in trained) == 4 * layers
    # SD1.5's middle block sees a single place here, and attention to one place alone depends on neither queries nor keys
    alone = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    still = [name for name, value in trained.items() if not value.abs().max() > 0]
    assert all(kind == "sd15" and name.startswith(alone) for name in still), still


@pytest.mark.parametrize("content", [{"lora_unet_x.alpha": 1.0}, {}, None])
def test_files_that_are_no_adapter_to_go_on_from(folders, pairs, tmp_path, capsys, content):
    file = tmp_path / "start.safetensors"
    if content is None:
        file.write_bytes(b"no such thing")
    else:
        save_file({name: torch.tensor(value) for name, value in content.items()}, file)
    assert train.main(arguments(folders["sd15"], pairs, tmp_path / "run", lora__start=file, **SHORT)) == 2
    assert "start.safetensors" in "".join(capsys.readouterr().err.split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"data.reference_draws": 2}])
def test_a_whole_unet_trains_resumes_and_exports(folders, pairs, tmp_path, monkeypatch, capsys, changes):
    settings = WHOLE | {"data.cache": tmp_path / "cache"} | changes
    settings = {key.replace(".", "__"): value for key, value in settings.items()}
    assert train.main(arguments(folders["sdxl"], pairs, tmp_path / "whole", **settings)) == 0
    stop_after(monkeypatch, 2)
    assert train.main(arguments(folders["sdxl"], pairs, tmp_path / "part", **settings)) == 130
    assert train.main(arguments(folders["sdxl"], pairs, tmp_path / "part", **settings)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    base, trained = load_pipeline(str(folders["sdxl"])).unet.state_dict(), final(tmp_path / "whole")
    assert set(trained) == set(base)
    assert sum(not torch.equal(value, base[name]) for name, value in trained.items()) > 0.9 * len(base)

    assert export.main([str(tmp_path / "whole"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "--format merged" in capsys.readouterr().err
    assert export.main([str(tmp_path / "whole"), "--format", "merged", "--out", str(tmp_path / "model")]) == 0
    for name, value in load_pipeline(str(tmp_path / "model")).unet.state_dict().items():
        assert torch.equal(value, trained[name])


@pytest.mark.slow
def test_samples_of_a_single_file_are_those_of_its_folder(folders, tmp_path):
    file = tiny.single_file(folders["sdxl"], tmp_path / "model.safetensors")
    (tmp_path / "prompts.txt").write_text("a large cross\n")
    shared = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--seeds", "1"]
    folder = str(folders["sdxl"])
    assert sample.main(["--model", str(file), "--model_config", folder, "--out", str(tmp_path / "one"), *shared]) == 0
    assert sample.main(["--model", folder, "--out", str(tmp_path / "other"), *shared]) == 0
    one, other = (Image.open(next((tmp_path / name).glob("*.png"))).tobytes() for name in ("one", "other"))
    assert one == other


RECIPES = sorted(file for file in (Path(train.__file__).parents[1] / "configs").glob("sd*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(file, id=file.stem, marks=() if file.stem == "sd15_full" else pytest.mark.slow) for file in RECIPES],
)
def test_every_recipe_can_be_tried_and_leaves_nothing(recipe, tmp_path, capsys):
    kind = "sdxl" if "sdxl" in recipe.stem else "sd15"
    command = ["--config", str(recipe), "--data.pairs", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--smoke", kind]
    assert train.main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "these settings train" in out
    assert not list(tmp_path.iterdir())
    text = recipe.read_text()
    command = text.splitlines()[0]
    assert command.startswith(("# dedpo train ", "# accelerate launch ")) and f" --config configs/{recipe.name} " in command
    assert "Memory" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("how", ["true", "selective"])
def test_activations_that_are_computed_again_change_nothing(folders, pairs, tmp_path, kind, how):
    run(folders[kind], pairs, tmp_path / "kept", data__cache=tmp_path / "cache")
    run(folders[kind], pairs, tmp_path / "again", data__cache=tmp_path / "cache", gradient_checkpointing=how)
    assert deviation(final(tmp_path / "kept"), final(tmp_path / "again")) == (0, 0)
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "again")


@pytest.mark.slow
def test_compilation_rounds_and_does_no_more(folders, pairs, tmp_path):
    run(folders["sdxl"], pairs, tmp_path / "plain", data__cache=tmp_path / "cache")
    run(folders["sdxl"], pairs, tmp_path / "fast", data__cache=tmp_path / "cache", compile="true")
    assert metrics(tmp_path / "fast")[0]["margin_abs_max"] == 0  # the reference is computed as the policy is
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "fast"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
    assert metrics(tmp_path / "fast")[-1]["margin_abs_max"] > 0


@pytest.mark.slow
def test_stored_reference_errors_are_not_those_of_another_batch(folders, pairs, tmp_path):
    """At margin 0 the policy is computed just as what was stored was."""
    stored = {"data__cache": tmp_path / "cache", "data__reference_draws": 1, "mixed_precision": "bf16", "optim__steps": 1}
    run(folders["sd15"], pairs, tmp_path / "one", **stored)
    run(folders["sd15"], pairs, tmp_path / "other", **stored, optim__batch=3)
    for name in ("one", "other"):
        assert metrics(tmp_path / name)[0]["margin_abs_max"] == 0
    assert len(list((tmp_path / "cache").glob("*/reference-*"))) == 2
