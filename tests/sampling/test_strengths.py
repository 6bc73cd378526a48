"""Several strengths of one LoRA in one run: a folder each, equal to the bit to one that was sampled by itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pipelines import sample as stage
from dedpo_diffusion.sampling import sampler as sampling
from dedpo_diffusion.sampling.strength_folders import check_sweep, folder_strength, strength_folder
from support.adapters import random_lora
from support.sampling import PROMPTS, arguments, pixels

STRENGTHS = ["0.5", "1", "2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    """A LoRA of the UNet."""
    return random_lora(tiny_model, tmp_path_factory.mktemp("lora") / "tuned.safetensors")


def sampled(model, prompts, out, lora, *strengths) -> int:
    return stage.main([*arguments(model, prompts, out), "--lora", str(lora), "--strength", *strengths])


def contents(folder) -> dict[str, bytes]:
    """Every file, but for the name of the folder in its settings."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    settings = yaml.safe_load(found["settings.yaml"])
    del settings["out"]
    return found | {"settings.yaml": json.dumps(settings).encode()}


@pytest.mark.parametrize("text", [False, True])
def test_each_strength_is_what_is_sampled_by_itself(tiny_model, prompts, tmp_path, monkeypatch, text):
    lora = random_lora(tiny_model, tmp_path / "tuned.safetensors", text=text)
    loads, real = [], sampling.load_sampler
    monkeypatch.setattr(sampling, "load_sampler", lambda *args, **more: loads.append(args) or real(*args, **more))
    out = tmp_path / "tuned"
    assert sampled(tiny_model, prompts, out, lora, *STRENGTHS) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"strength-{strength}" for strength in STRENGTHS]
    assert len(loads) == 1
    for strength in STRENGTHS:
        alone = tmp_path / f"alone-{strength}"
        assert sampled(tiny_model, prompts, alone, lora, strength) == 0
        assert contents(out / f"strength-{strength}") == contents(alone)
        with Image.open(next(alone.glob("*.png"))) as image:
            assert json.loads(image.text["dedpo"])["lora"][0]["strength"] == float(strength)
    shown = [np.stack(list(pixels(out / f"strength-{strength}").values())).astype(int) for strength in STRENGTHS]
    assert min(np.abs(shown[0] - shown[1]).max(), np.abs(shown[1] - shown[2]).max()) > 10


@pytest.mark.slow
def test_prompts_are_encoded_once_unless_the_lora_changes_the_encoder(tiny_model, prompts, tmp_path, monkeypatch):
    """Two batches, each with its negative prompts; three strengths."""
    counts, real = [], sampling.load_sampler

    def load(*args, **more):
        pipe = real(*args, **more)
        pipe.text_encoder.register_forward_hook(lambda *_: counts.append(1))
        return pipe

    monkeypatch.setattr(sampling, "load_sampler", load)
    for text, wanted in ((False, 4), (True, 12)):
        counts.clear()
        lora = random_lora(tiny_model, tmp_path / f"{text}.safetensors", text=text)
        assert sampled(tiny_model, prompts, tmp_path / str(text), lora, *STRENGTHS) == 0
        assert len(counts) == wanted


def test_a_stopped_run_goes_on_and_a_strength_more_is_added(tiny_model, prompts, lora, tmp_path, monkeypatch, capsys):
    whole, out, drawn, real = tmp_path / "whole", tmp_path / "out", [], sampling.sample
    assert sampled(tiny_model, prompts, whole, lora, *STRENGTHS) == 0

    def stopped(*args, **more):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(args[2])
        return real(*args, **more)

    monkeypatch.setattr(sampling, "sample", stopped)
    assert sampled(tiny_model, prompts, out, lora, *STRENGTHS[:2], "3") == 130
    monkeypatch.setattr(sampling, "sample", lambda *args, **more: drawn.append(args[2]) or real(*args, **more))
    capsys.readouterr()
    assert sampled(tiny_model, prompts, out, lora, *STRENGTHS) == 0
    said = capsys.readouterr().out
    assert drawn == [[0, 1]] * 3 + [[2]] + [[0, 1], [2], [2]]  # two batches of three strengths; none is drawn twice
    assert "5 of 9 images are there already; resuming" in said
    for strength in STRENGTHS:
        assert contents(out / f"strength-{strength}") == contents(whole / f"strength-{strength}")
    assert not (out / "strength-3" / "index.parquet").exists()
    assert sampled(tiny_model, prompts, out, lora, *STRENGTHS) == 0 and len(drawn) == 7


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        (["1", "-0.5"], "--strength -0.5: several strengths of one LoRA go from 0 upwards; sample a negative one by itself"),
        (["1", "2", "1.0"], "--strength 1 is given twice"),
        (["1", ".nan"], "--strength nan: not a finite number"),
        ([".inf"], "--strength inf: not a finite number"),
    ],
)
def test_strengths_that_cannot_be_meant(tiny_model, prompts, lora, tmp_path, capsys, monkeypatch, strengths, words):
    monkeypatch.setattr(sampling, "load_sampler", None)  # not reached
    given = [*arguments(tiny_model, prompts, tmp_path / "a"), "--lora", str(lora), "--strength", *strengths]
    assert stage.main(given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_strengths_are_of_one_lora(tiny_model, prompts, lora, tmp_path, capsys):
    given = arguments(tiny_model, prompts, tmp_path / "a")
    assert stage.main([*given, "--strength", "1", "2"]) == 2
    said = capsys.readouterr().err
    assert "2 strengths for 0 LoRA files" in said and "A merged model has no strength of its own" in said
    assert stage.main([*given, "--lora", str(lora), str(lora), "--strength", "1", "2", "3"]) == 2
    said = capsys.readouterr().err
    assert "3 strengths for 2 LoRA files" in said and "make them one file first" in said
    assert not (tmp_path / "a").exists()


def test_the_folder_of_the_strengths_is_no_sample_folder(tiny_model, prompts, lora, tmp_path, capsys):
    assert sampled(tiny_model, prompts, tmp_path / "a", lora, "1") == 0
    before = contents(tmp_path / "a")
    assert sampled(tiny_model, prompts, tmp_path / "a", lora, *STRENGTHS) == 2
    assert "it is a sample folder itself" in capsys.readouterr().err and contents(tmp_path / "a") == before


def test_names_of_folders_tell_strengths_apart(tmp_path):
    assert [strength_folder(value) for value in (0.0, 0.5, 1.0, 2.0, 12.0)] == [f"strength-{x}" for x in ("0", "0.5", "1", "2", "12")]
    close = [1.0, math.nextafter(1.0, 2.0), 1.0000001]
    assert len({strength_folder(value) for value in close}) == 3
    assert [folder_strength(tmp_path / strength_folder(value)) for value in close] == close
    for name in ("strength-", "strength-x", "strength-1.0", "strength-nan", "tuned", "1"):
        assert folder_strength(tmp_path / name) is None
    check_sweep(close, tmp_path / "a")
    with pytest.raises(UserError, match="given twice"):
        check_sweep([0.0, -0.0], tmp_path / "a")


@pytest.mark.slow
def test_processes_share_the_strengths(tiny_model, prompts, lora, tmp_path):
    """Two that know nothing of each other, one of which is killed, and a third: the images of a quiet run."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert sampled(tiny_model, prompts, whole, lora, *STRENGTHS) == 0
    stage_file = Path(__file__).parents[2] / "pipelines" / "sample.py"
    given = [sys.executable, str(stage_file), *arguments(tiny_model, prompts, out), "--lora", str(lora), "--strength", *STRENGTHS]
    both = [subprocess.Popen(given) for _ in range(2)]
    while both[0].poll() is None and not list(out.glob("*/*.png")):
        time.sleep(0.005)
    both[0].kill()
    both[0].wait()
    third = subprocess.Popen(given)
    assert [both[1].wait(), third.wait()] == [0, 0]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for strength in STRENGTHS:
        assert contents(out / f"strength-{strength}") == contents(whole / f"strength-{strength}")
