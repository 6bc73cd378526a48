"""Nothing is claimed before it works: a failed start leaves no folder that refuses the corrected command; and a finished run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.pipelines import propose, sample, train
from dedpo_diffusion.settings import ObjectiveSettings, OptimSettings, TrainSettings
from dedpo_diffusion.training.setup import never_longer
from support import sampling
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture


@pytest.fixture(scope="module")
def broken_model(tiny_model, tmp_path_factory) -> Path:
    """A model that loads, and whose first step gives no number."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"] = torch.full_like(weights["conv_out.weight"], 3e38)  # sums of it are infinite
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def damaged_pairs(tiny_pairs, tmp_path_factory) -> Path:
    """Pairs whose file is cut off."""
    folder = tmp_path_factory.mktemp("damaged") / "pairs"
    shutil.copytree(tiny_pairs, folder)
    for file in (folder / "pairs").glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    return folder


FAILURES = {
    "seed": ({"seed": -1}, "--seed: -1 does not fit"),
    "balance": ({"objective.kind": "kto", "objective.balance": "output"}, "objective.balance is derived for"),
    "range of timesteps": ({"objective.timesteps": "[0, 5000]"}, "the model's schedule ends at"),
    "rank": ({"lora.rank": 0}, "lora.rank is 0"),
    "targets of the LoRA": ({"lora.targets": '["nonsense"]'}, "nonsense"),
    "no such targets": ({"data.targets": "nobody"}, "nobody"),
    "no such model": ({"model": "/nowhere/model"}, "/nowhere/model"),
    "cut off pairs": ({"data.pairs": "DAMAGED"}, "cannot be read as parquet"),
    "no number at step 1": ({"model": "BROKEN"}, "step 1: the loss is nan"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_start_leaves_no_folder(name, tiny_model, tiny_pairs, broken_model, damaged_pairs, tmp_path, capsys):
    changes, words = FAILURES[name]
    changes = {key: {"BROKEN": broken_model, "DAMAGED": damaged_pairs}.get(value, value) for key, value in changes.items()}
    run = tmp_path / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, run, optim__steps=2, **changes)) == 2
    assert words in capsys.readouterr().err
    assert not run.exists() and not list(tmp_path.iterdir())


def test_the_corrected_command_trains_into_the_folder_of_the_failed_one(tiny_model, tiny_pairs, broken_model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert train.main(arguments(broken_model, tiny_pairs, run, optim__steps=2)) == 2
    assert train.main(arguments(tiny_model, tiny_pairs, run, optim__steps=2, seed=3)) == 0
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert not list(run.glob(".*"))


def test_a_run_that_fails_later_keeps_its_folder(tiny_model, tiny_pairs, tmp_path, capsys):
    """A huge learning rate: step 1 is sound, and what it leaves is not."""
    run = tmp_path / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, run, optim__learning_rate=1e30, optim__clip=1e30, optim__warmup=0)) == 2
    assert "the loss is" in capsys.readouterr().err and metrics(run)[0]["step"] == 1
    assert train.main(arguments(tiny_model, tiny_pairs, run)) == 2
    assert "holds another run (optim.learning_rate" in capsys.readouterr().err


def test_too_little_memory_is_said_with_what_helps_and_leaves_no_folder(tiny_model, tiny_pairs, tmp_path, capsys, monkeypatch):
    """A step on the CPU that asks torch for more memory than there is."""
    real = train.learn

    def hungry(session, loaded):
        torch.empty(2**48)
        return real(session, loaded)

    monkeypatch.setattr(train, "learn", hungry)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "too little memory" in said and "halve optim.batch (it is 4)" in said and not (tmp_path / "run").exists()


# ---- more steps


@pytest.mark.slow
def test_a_finished_run_goes_on_and_equals_one_that_was_longer_from_the_start(tiny_model, tiny_pairs, tmp_path, capsys):
    for steps in (5, 8):
        assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=steps)) == 0
    assert "optim.steps is raised from 5 to 8" in capsys.readouterr().out
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", optim__steps=8)) == 0
    assert deviation(final(tmp_path / "run"), final(tmp_path / "whole")) == (0, 0)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=6)) == 2
    assert "optim.steps is 8 there, 6 now" in capsys.readouterr().err


def test_a_cosine_run_says_why_it_cannot_go_on(tiny_model, tiny_pairs, tmp_path, capsys):
    options = {"optim__schedule": "cosine"}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=2, **options)) == 0
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", optim__steps=4, **options)) == 2
    said = capsys.readouterr().err
    assert "optim.steps is 2 there, 4 now, and the cosine schedule spreads its learning rates over all steps" in said


def test_targets_that_were_chosen_for_the_steps_keep_them():
    def reason(**changes):
        return never_longer(TrainSettings(model="m", data=None, out=Path("o"), **changes))

    assert reason() is None
    assert "chose the targets" in reason(objective=ObjectiveSettings(power="measured"))
    assert "cosine" in reason(optim=OptimSettings(schedule="cosine"))


# ---- samples


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na grey owl\n")
    return tmp_path / "prompts.txt"


def test_a_sample_folder_is_taken_once_an_image_is_in_it(tiny_model, broken_model, prompts, tmp_path, capsys):
    folder = tmp_path / "samples"
    assert sample.main(sampling.arguments(broken_model, prompts, folder)) == 2
    assert "is not finite" in capsys.readouterr().err and not folder.exists()
    assert sample.main(sampling.arguments(tiny_model, prompts, folder)) == 0
    assert len(list(folder.glob("*.png"))) == 2 and not list(folder.glob(".*"))
    assert sample.main(sampling.arguments(broken_model, prompts, folder)) == 2  # a finished folder refuses, and stays
    assert "holds another run" in capsys.readouterr().err and len(list(folder.glob("*.png"))) == 2


@pytest.mark.parametrize("change", [{"size": 13}, {"model": "/nowhere/model"}, {"seed": -1}, {"lora": "no.safetensors"}])
def test_failed_starts_of_sampling_leave_no_folder(tiny_model, prompts, tmp_path, change):
    model = change.pop("model", tiny_model)
    assert sample.main(sampling.arguments(model, prompts, tmp_path / "samples", **change)) == 2
    assert not (tmp_path / "samples").exists()


def test_proposing_begins_anew_after_a_failed_start(tiny_model, broken_model, prompts, tmp_path):
    def words(model):
        given = {"model": model, "prompts": prompts, "steps": 2, "images_per_prompt": 2, "device": "cpu", "out": tmp_path / "pairs"}
        return [part for key, value in given.items() for part in (f"--{key}", str(value))]

    assert propose.main(words(broken_model)) == 2
    assert propose.main(words(tiny_model)) == 0
