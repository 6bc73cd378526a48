"""The training command on a real (tiny, random) Stable Diffusion: resume, accumulation, cache, refusals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.weights.run_folder import checkpoints
from support.pictures import picture, write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

REPOSITORY = Path(train.__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_pairs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, run)) == 0
    return run


def test_first_step_starts_at_log_two_and_the_adapter_then_moves(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert lines[0]["margin_abs_max"] == 0.0
    assert lines[-1]["margin_abs_max"] > 1e-3
    assert max(value.abs().max().item() for name, value in final(finished).items() if "lora_B" in name) > 1e-3


def test_run_folder_holds_what_it_should(finished):
    for name in ("settings.yaml", "identity.json", "metrics.jsonl", "tensorboard"):
        assert (finished / name).exists(), name
    assert [step for step, _ in checkpoints(finished)] == [9, 12]
    assert sum(bucket["count"] for bucket in metrics(finished)[3]["buckets"]) <= 4


def test_the_same_command_again_changes_nothing(finished, tiny_model, tiny_pairs):
    before = final(finished), (finished / "metrics.jsonl").read_bytes()
    assert train.main(arguments(tiny_model, tiny_pairs, finished)) == 0
    assert deviation(before[0], final(finished)) == (0, 0)
    assert (finished / "metrics.jsonl").read_bytes() == before[1]


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", [2, 8])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(finished, tiny_model, tiny_pairs, tmp_path, wait_for):
    """SIGKILL as soon as a given step is logged, which may be between checkpoints; then the same command."""
    command = [sys.executable, str(REPOSITORY / "pipelines" / "train.py"), *arguments(tiny_model, tiny_pairs, tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) >= wait_for):
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    reached = [step for step, _ in checkpoints(tmp_path / "run")]
    assert 12 not in reached, "the run was over before it could be killed"
    assert subprocess.run(command, capture_output=True, check=True).returncode == 0
    assert deviation(final(finished), final(tmp_path / "run")) == (0, 0)
    assert log.read_bytes() == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_interrupted_between_log_lines_and_resumed(tiny_model, tiny_pairs, tmp_path, monkeypatch):
    """The first step after a resume need not be one that is logged."""
    changes = {"log_every": 5, "checkpoint_every": 3}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", **changes)) == 0
    stop_after(monkeypatch, 6)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)) == 130
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "part", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert [line["step"] for line in metrics(tmp_path / "part")] == [1, 3, 5, 6, 9, 10, 12]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")


@pytest.mark.slow
def test_accumulation_gives_the_same_trajectory(finished, tiny_model, tiny_pairs, tmp_path):
    """4 x 1 against 1 x 4: only float32 summation order differs.

    AdamW divides by the root of the second moment, so an entry whose gradient is rounding noise moves by up to the
    learning rate (0.003) a step in either run; the mean shows that these are few.
    """
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__batch=1, optim__accumulation=4)) == 0
    largest, mean = deviation(final(finished), final(tmp_path / "run"))
    assert largest < 2e-3, (largest, mean)
    assert mean < 2e-5, (largest, mean)
    for one, other in zip(metrics(finished), metrics(tmp_path / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_cached_and_uncached_runs_are_identical(finished, tiny_model, tiny_pairs, tmp_path):
    """Same draws, same encoder: the cache only stores what the live run computes (batched encodes round at 1e-7)."""
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", data__cache=tmp_path / "cache")) == 0
    largest, mean = deviation(final(finished), final(tmp_path / "run"))
    assert largest < 2e-3, (largest, mean)
    assert mean < 2e-5, (largest, mean)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "again", data__cache=tmp_path / "cache")) == 0
    assert deviation(final(tmp_path / "run"), final(tmp_path / "again")) == (0, 0)


def test_bfloat16_keeps_the_adapter_in_float32_and_starts_at_margin_zero(tiny_model, tiny_pairs, tmp_path):
    run = tmp_path / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, run, mixed_precision="bf16", optim__steps=3, gradient_checkpointing="true")) == 0
    assert {value.dtype for value in final(run).values()} == {torch.float32}
    assert metrics(run)[0]["margin_abs_max"] == 0.0
    assert metrics(run)[-1]["margin_abs_max"] > 0


def test_pairs_without_weight_are_not_visited_and_the_mean_is_kept(tiny_model, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "data")
    ids = [f"p{k}" for k in range(24)]
    weight = [4.0 if k % 4 == 0 else 0.0 for k in range(24)]
    write_targets(pairs, "few", Targets(ids, [1.0] * 24, weight), {"power": 0.0})
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", data__targets="few", optim__steps=1)) == 0
    assert "18 of 24 pairs carry no weight" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # 4 times a share of 1/4


def test_flip_and_crop_treat_both_images_alike(tiny_model, tmp_path):
    """Two equal images stay equal through every view, whatever their size; so all margins stay 0."""
    from dedpo_diffusion.core.records import Pair
    from dedpo_diffusion.pairs.dataset import PairWriter

    with PairWriter(tmp_path / "data") as writer:
        for k in range(4):
            writer.add(Pair(f"p{k}", "a large cross", picture(k, (40, 24)), picture(k, (40, 24))))
    write_targets(tmp_path / "data", "soft", Targets([f"p{k}" for k in range(4)], [1.0] * 4, [1.0] * 4), {})
    changes = {"data__flip": "true", "data__crop": "random", "optim__steps": 4}
    assert train.main(arguments(tiny_model, tmp_path / "data", tmp_path / "run", **changes)) == 0
    # the VAE's posterior is drawn for each image apart, so equality is only up to that draw's spread: compare the pixels
    from dedpo_diffusion.dpo.noising import step_generator
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.settings import DataSettings
    from dedpo_diffusion.training.sources import view_pair

    pair = PairReader(tmp_path / "data").pair(0)
    data = DataSettings(tmp_path / "data", flip=True, crop="random")
    views = [view_pair(pair, "here", [(16, 16)], data, step_generator(0, visit)) for visit in range(3)]
    for pixels, sizes in views:
        assert torch.equal(pixels[0], pixels[1])
        assert torch.equal(sizes[0], sizes[1])
    assert not torch.equal(views[0][0], views[1][0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__targets": "tuned"}, "targets"),
        ({"data__size": 15}, "no multiple of"),
        ({"lora__targets": "[nonsense]"}, "nonsense"),
        ({"model": "/nowhere/model"}, "no such folder"),
        ({"data__cache": "cache", "data__flip": "true"}, "data.cache"),
        ({"attention": "xformers"}, "needs a CUDA device"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
        ({"optim__accumulation": 0}, "optim.accumulation is 0"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tiny_model, tiny_pairs, tmp_path, capsys, changes, words):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err
    assert message.startswith("dedpo train: error: ")
    assert words in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_is_an_error(tiny_model, tiny_pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__learning_rte=1)) == 2
    assert "learning_rte" in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_by_the_name_of_the_difference(finished, tiny_model, tiny_pairs, tmp_path, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train.main(arguments(tiny_model, tiny_pairs, finished, optim__learning_rate=0.01)) == 2
    assert "optim.learning_rate is 0.003 there, 0.01 now" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "mine")) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_changed_targets_stop_a_resume(tiny_model, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "data")
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", optim__steps=2)) == 0
    write_targets(pairs, "soft", Targets([f"p{k}" for k in range(24)], [1.0] * 24, [1.0] * 24), {})
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", optim__steps=2)) == 2
    assert "targets is" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_model, tiny_pairs, tmp_path, capsys):
    changes = {"optim__learning_rate": 1e30, "optim__warmup": 1, "optim__clip": 1e30, "checkpoint_every": 1}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    assert "Lower optim.learning_rate" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in final(tmp_path / "run").values())


def test_an_image_that_encodes_to_nan_is_told_apart_from_a_rate_that_is_too_high(tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys):
    from dedpo_diffusion.models.backbone import Backbone

    real = Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda self, pixels: tuple(value * float("nan") for value in real(self, pixels)))
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run")) == 2
    assert "step 1: the VAE's numbers of an image are not finite" in " ".join(capsys.readouterr().err.split())
