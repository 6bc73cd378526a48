"""`dedpo train` with validation: training does not feel it, resume, images, the best step, what is refused."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dedpo_diffusion.core.records import Labels, Pair, Targets
from dedpo_diffusion.labels.files import write_labels, write_targets
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.sampling.sampler import load_sampler, sample
from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import picture, write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture

PROMPTS = ["a large red circle on a white background", "a small blue square on a black background"]
FULL = {"optim__average": 0.9, "lora__dropout": 0.2, "seed": 2}
SLOW = pytest.mark.slow
SAMPLED = {"steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Twelve pairs of pictures that are not trained on, ten of them with labels, and twelve more with labels "all"; and two prompts."""
    root = tmp_path_factory.mktemp("held")
    with PairWriter(root / "data") as writer:
        for k in range(24):
            writer.add(Pair(f"h{k}", PROMPTS[k % 2], picture(500 + 2 * k), picture(501 + 2 * k)))
    names = [f"h{k}" for k in (4, 0, 1, 3, 5, 6, 7, 8, 9, 11)]
    write_labels(root / "data", "human", Labels(names, np.array([1.0, 0.0, 1.0, 0.7, 0.5, 0.0, 0.0, 1.0, 1.0, 0.0])))
    write_labels(root / "data", "all", Labels([f"h{k}" for k in range(24)], np.arange(24) % 2 * 1.0))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def watched(held_out, **changes) -> dict:
    return {"validation__every": 5, "validation__pairs": held_out / "data", "validation__draws": 2} | changes


def with_images(held_out, **changes) -> dict:
    given = {f"validation__{name}": value for name, value in SAMPLED.items()} | {"validation__prompts": held_out / "prompts.txt"}
    return watched(held_out, **given, validation__scorers='["oracle_reward"]', validation__seed=7) | changes


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def state(run) -> dict:
    return json.loads((run / "best" / "state.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_pairs, held_out, tmp_path_factory):
    """A run with everything: a cache, a moving average, dropout, held-out pairs, images and a scorer."""
    root = tmp_path_factory.mktemp("whole")
    command = arguments(tiny_model, tiny_pairs, root / "run", **FULL, data__cache=root / "cache", **with_images(held_out))
    assert train.main(command) == 0
    return root


def test_a_validation_says_what_it_should(whole):
    found = lines(whole / "run")
    assert [line["step"] for line in found] == [5, 10, 12]
    for line in found:
        assert (line["pairs"], line["draws"], line["objective"]) == (10, 2, "sigmoid")
        assert line["start_loss"] == pytest.approx(math.log(2))
        assert line["loss"] == pytest.approx(np.mean(line["pair_loss"])) != line["start_loss"]
        assert line["loss_ci"][0] < line["loss"] < line["loss_ci"][1]
        assert line["accuracy_ci"][0] <= line["accuracy"] <= line["accuracy_ci"][1]
        assert sum(part["count"] for part in line["buckets"]) == 18  # of a pair that is a tie, nothing is asked
        score = line["scores"]["oracle_reward"]
        assert score["version"] == "shapes-oracle-1" and score["gain"] == pytest.approx(score["mean"] - score["start"])
    assert list((whole / "run" / "tensorboard" / "validation").iterdir())


def test_training_does_not_feel_validation(whole, tiny_model, tiny_pairs, tmp_path):
    """Bit for bit, with dropout and a moving average; and `metrics.jsonl` is the same."""
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **FULL, data__cache=whole / "cache")) == 0
    for name in ("parameters", "average", "optimizer"):
        one, other = (load_file(checkpoints(run)[-1][1] / f"{name}.safetensors") for run in (whole / "run", tmp_path / "run"))
        assert deviation(one, other) == (0, 0), name
    assert metrics(whole / "run") == metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "validation.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "step", "kept", "told"),
    [
        pytest.param("save", 6, 3, 1, marks=SLOW),
        pytest.param("save", 12, 9, 2, marks=SLOW),
        ("measure", 12, 12, 2),
        pytest.param("keep_best", 5, 3, 0, marks=SLOW),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(whole, tiny_model, tiny_pairs, held_out, tmp_path, monkeypatch, what, step, kept, told):
    """Stopped before a checkpoint that comes after a validation; between a checkpoint and its validation; within a validation."""
    from dedpo_diffusion.training.validation import Validation

    command = arguments(tiny_model, tiny_pairs, tmp_path / "run", **FULL, data__cache=whole / "cache", **with_images(held_out))
    owner, name = {"save": (train, "save"), "measure": (Validation, "measure"), "keep_best": (Validation, "_keep_best")}[what]
    real = getattr(owner, name)

    def stop_before(*given):
        if (given[-1]["step"] if isinstance(given[-1], dict) else given[-1]) == step:
            monkeypatch.setattr(owner, name, real)
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(owner, name, stop_before)
    assert train.main(command) == 130
    assert checkpoints(tmp_path / "run")[-1][0] == kept
    assert len(lines(tmp_path / "run")) == told
    assert train.main(command) == 0
    assert deviation(final(whole / "run"), final(tmp_path / "run")) == (0, 0)
    for name in ("validation.jsonl", "best/state.json", "best/parameters.safetensors", "best/average.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    images = sorted((whole / "run" / "samples").glob("*/*.png"))
    assert len(images) == 4 * (len(PROMPTS) + 1)
    for file in images:
        assert Image.open(file).tobytes() == Image.open(tmp_path / "run" / file.relative_to(whole / "run")).tobytes(), file


def test_the_best_step_is_kept_and_exported(whole, tmp_path, capsys):
    """No best step here is one of a checkpoint: validations are at 5, 10 and 12, checkpoints at 9 and 12."""
    found = lines(whole / "run")
    losses = [line["loss"] for line in found]
    expected = found[int(np.argmin(losses))]
    assert state(whole / "run") == {"step": expected["step"], "by": "held-out loss", "value": min(losses)}
    assert expected["step"] != 12
    assert export.main([str(whole / "run"), "--out", str(tmp_path / "last.safetensors")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"step {expected['step']} was best, which --checkpoint best takes" in told and "step 12" in told
    assert export.main([str(whole / "run"), "--checkpoint", "best", "--out", str(tmp_path / "best.safetensors")]) == 0
    assert f"step {expected['step']}" in capsys.readouterr().out.splitlines()[-2]  # the last one names the next command


def pictures(run, step: int) -> list[Image.Image]:
    return [Image.open(run / "samples" / f"step-{step:08d}" / f"{k:05d}-{7 + k}.png") for k in range(len(PROMPTS))]


def test_images_are_those_of_the_base_and_of_the_exported_average(whole, tiny_model, tmp_path):
    """By a pipeline that diffusers loads from files, with the text encoders that training had dropped."""
    file, step = tmp_path / "best.safetensors", state(whole / "run")["step"]
    assert export.main([str(whole / "run"), "--checkpoint", "best", "--out", str(file)]) == 0
    for lora, at in ((None, 0), (file, step)):
        images = sample(load_sampler(str(tiny_model), lora=lora), PROMPTS, [7, 8], **SAMPLED)
        for image, mine in zip(images, pictures(whole / "run", at), strict=True):
            assert np.abs(np.subtract(image, mine, dtype=int)).max() <= 1
    assert pictures(whole / "run", 0)[0].tobytes() != pictures(whole / "run", step)[0].tobytes()
    width = Image.open(whole / "run" / "samples" / f"step-{step:08d}" / "grid.png").width
    assert width > Image.open(whole / "run" / "samples" / "step-00000000" / "grid.png").width


@pytest.mark.slow
def test_what_is_validated_is_the_moving_average(tiny_model, tiny_pairs, held_out, tmp_path):
    """An average that keeps nothing but the last step is the last step; one that keeps more has other losses."""
    found = {}
    for average in ("null", 0.0, 0.9):
        changes = {"optim__steps": 3, "optim__average": average, "optim__warmup": 1}
        run = tmp_path / str(average)
        assert train.main(arguments(tiny_model, tiny_pairs, run, **watched(held_out), **changes)) == 0
        found[average] = (run / "validation.jsonl").read_text()
    assert found["null"] == found[0.0] != found[0.9]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_images_of_other_architectures_and_no_cache(folders, tiny_pairs, held_out, tmp_path, kind):
    run, file = tmp_path / "run", tmp_path / "last.safetensors"
    changes = {"optim__steps": 2, "optim__batch": 2, "validation__pairs": "null", "objective__kind": "sft"}
    assert train.main(arguments(folders[kind], tiny_pairs, run, **with_images(held_out, **changes))) == 0
    [line] = lines(run)
    assert set(line) == {"step", "scores"}
    assert state(run) == {"step": 2, "by": "mean oracle_reward", "value": line["scores"]["oracle_reward"]["mean"]}
    assert export.main([str(run), "--out", str(file)]) == 0
    for lora, at in ((None, 0), (file, 2)):
        images = sample(load_sampler(str(folders[kind]), lora=lora), PROMPTS, [7, 8], **SAMPLED)
        for image, mine in zip(images, pictures(run, at), strict=True):
            assert np.abs(np.subtract(image, mine, dtype=int)).max() <= 1


@pytest.mark.slow
def test_live_and_cached_pairs_and_batches_of_another_size_say_the_same(whole, tiny_model, tiny_pairs, held_out, tmp_path):
    """After one step, which is the same up to rounding; the encoder's and the batches' rounding are seen too."""
    changes = {"optim__learning_rate": 0.01, "optim__steps": 1, "optim__warmup": 1}
    ways = {"live": {}, "cached": {"data__cache": whole / "cache"}, "small": {"optim__batch": 1, "optim__accumulation": 4}}
    for name, more in ways.items():
        assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / name, **watched(held_out), **changes | more)) == 0
    live, cached, small = (lines(tmp_path / name)[0]["pair_loss"] for name in ways)
    np.testing.assert_allclose(live, cached, atol=1e-3)
    np.testing.assert_allclose(live, small, atol=1e-3)
    assert np.ptp(live) > 0.02


@pytest.mark.slow
def test_a_whole_unet_without_a_reference_is_validated_too(folders, tiny_pairs, held_out, tmp_path):
    changes = {"weights": "full", "optim__steps": 2, "optim__batch": 2, "objective__kind": "sft"}
    assert train.main(arguments(folders["sd15"], tiny_pairs, tmp_path / "run", **watched(held_out), **changes)) == 0
    [line] = lines(tmp_path / "run")
    assert line["objective"] == "sft" and line["loss"] != line["start_loss"]


@pytest.mark.parametrize("health", [pytest.param("warn", marks=SLOW), "stop"])
def test_a_held_out_loss_that_rises_is_told_or_stops_the_run(tiny_model, tiny_pairs, held_out, tmp_path, capsys, health):
    changes = {"optim__learning_rate": 0.3, "objective__beta": 20000, "optim__steps": 6, "optim__warmup": 1, "validation__human": "all"}
    command = arguments(tiny_model, tiny_pairs, tmp_path / "run", **watched(held_out, validation__every=1), **changes, health=health)
    assert train.main(command) == (2 if health == "stop" else 0)
    said = capsys.readouterr()
    assert said.out.count("held-out loss rises") == (health == "warn") and said.err.count("held-out loss rises") == (health == "stop")


# ---- what is held out


def both(tmp_path, weight, count: int = 6):
    """A dataset whose six first pairs people labelled, with these weights in its targets."""
    pairs = write_pairs(tmp_path / "data", count)
    ids = [f"p{k}" for k in range(count)]
    write_targets(pairs, "part", Targets(ids, np.full(count, 0.9), np.asarray(weight, dtype=float)), {})
    write_labels(pairs, "human", Labels(ids[:6], np.array([0.0, 1.0] * 3)))
    return pairs


def test_of_a_dataset_that_is_trained_on_the_pairs_without_weight_are_held_out(tiny_model, tmp_path, capsys):
    pairs = both(tmp_path, [0, 1, 0, 1, 1, 0, 0, 1], 8)
    changes = {"data__targets": "part", "optim__steps": 1, "validation__every": 5, "validation__pairs": pairs}
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", **changes)) == 0
    assert lines(tmp_path / "run")[0]["pairs"] == 3
    write_targets(pairs, "part", Targets([f"p{k}" for k in range(8)], np.full(8, 0.9), np.ones(8)), {})
    assert train.main(arguments(tiny_model, pairs, tmp_path / "other", **changes)) == 2
    assert "every pair with a label is trained on" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


def test_an_image_that_is_trained_on_is_no_held_out_one(tiny_model, tmp_path, capsys):
    """One image of one pair, in a dataset of another name; where the trained pair has no weight, nothing is wrong."""
    with PairWriter(tmp_path / "held") as writer:
        writer.add(Pair("a", "a large cross", picture(900), picture(5)))  # image 1 of pair p2
        writer.add(Pair("b", "a large cross", picture(901), picture(902)))
    write_labels(tmp_path / "held", "people", Labels(["a", "b"], np.array([0.0, 1.0])))
    changes = {"data__targets": "part", "optim__steps": 1, "validation__every": 5, "validation__pairs": tmp_path / "held"}
    changes["validation__human"] = "people"
    assert train.main(arguments(tiny_model, both(tmp_path, [1] * 6), tmp_path / "run", **changes)) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 held-out pairs have an image that is trained on" in message and "row 0" in message
    assert not (tmp_path / "run").exists()
    write_targets(tmp_path / "data", "part", Targets([f"p{k}" for k in range(6)], np.full(6, 0.9), np.array([1, 1, 0, 1, 1, 1.0])), {})
    assert train.main(arguments(tiny_model, tmp_path / "data", tmp_path / "run", **changes)) == 0


def test_changed_held_out_labels_stop_a_resume(tiny_model, tiny_pairs, tmp_path, capsys):
    with PairWriter(tmp_path / "held") as writer:
        writer.add(Pair("a", "a large cross", picture(900), picture(901)))
    write_labels(tmp_path / "held", "human", Labels(["a"], np.array([0.0])))
    changes = {"optim__steps": 1, "validation__every": 1, "validation__pairs": tmp_path / "held"}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 0
    assert lines(tmp_path / "run")[0]["loss_ci"] is None
    write_labels(tmp_path / "held", "human", Labels(["a"], np.array([1.0])))
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    assert "held_out_labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": "null"}, "validation.pairs is given, but validation.every is not"),
        ({"every": 0}, "validation.every is 0"),
        ({"draws": 0}, "validation.draws is 0"),
        ({"pairs": "null"}, "nothing to look at"),
        ({"scorers": '["oracle_reward"]'}, "give validation.prompts"),
        ({"human": "nobody"}, "nobody.parquet"),
        ({"pairs": "/nowhere"}, "holds no parquet files"),
        ({"prompts": "/nowhere.txt"}, "/nowhere.txt: cannot be read"),
        ({"prompts": "PROMPTS", "scorers": '["beauty"]'}, "no scorer 'beauty'"),
        ({"prompts": "PROMPTS", "scorers": '["oracle_reward", "oracle_reward"]'}, "named twice"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tiny_model, tiny_pairs, held_out, tmp_path, capsys, changes, words):
    given = {f"validation__{name}": held_out / "prompts.txt" if value == "PROMPTS" else value for name, value in changes.items()}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **watched(held_out, **given))) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_run_without_validation_has_no_best_step(tiny_model, tiny_pairs, held_out, tmp_path, capsys):
    changes = watched(held_out, optim__steps=1, validation__keep_best="false")
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 0
    assert not (tmp_path / "run" / "best").exists()
    assert export.main([str(tmp_path / "run"), "--checkpoint", "best", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "no best step is known" in capsys.readouterr().err


@pytest.mark.slow
def test_settings_with_validation_can_be_tried(held_out, tmp_path):
    changes = with_images(held_out, data__pairs="none", data__cache="cache", smoke="sdxl")
    assert train.main(arguments("none", tmp_path / "none", tmp_path / "run", **changes)) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_validate_as_one(tiny_model, tiny_pairs, held_out, tmp_path):
    """An odd number of pairs for each, images on one alone: the numbers are those of one process to rounding."""
    small = {"optim__steps": 4, "optim__learning_rate": 3e-4, "validation__every": 2, "optim__average": 0.5}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "one", **with_images(held_out, **small))) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), train.__file__]
    command = [*launch, *arguments(tiny_model, tiny_pairs, tmp_path / "two", optim__batch=2, **with_images(held_out, **small))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        np.testing.assert_allclose(one["pair_loss"], two["pair_loss"], atol=1e-4)
        assert one["scores"]["oracle_reward"]["mean"] == pytest.approx(two["scores"]["oracle_reward"]["mean"], abs=0.05)
    assert state(tmp_path / "one")["step"] == state(tmp_path / "two")["step"]
