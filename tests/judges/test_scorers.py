"""Scorers and the Bradley-Terry judge: their arithmetic by hand, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.bradley_terry import BradleyTerry
from dedpo_diffusion.judges.judge import Question, probability
from dedpo_diffusion.judges.scorers import load_scorer
from dedpo_diffusion.shapes import oracle, world
from support.doubles import Brightness
from support.judges import PROMPTS, build_judge, count_rows, load, pictures


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine that never saw the hub, and does not now."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def judge(tmp_path_factory) -> Path:
    return build_judge(tmp_path_factory.mktemp("judge") / "judge")


@torch.no_grad()
def by_hand(folder: Path, prompt: str, image: Image.Image) -> float:
    """exp(logit_scale) * cosine from the towers and the projections, one image at a time, pixels to [-1, 1] by numpy."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
    read = model.text_projection(model.text_model(input_ids=tokenizer([prompt], return_tensors="pt").input_ids).pooler_output)[0]
    return float(model.logit_scale.exp() * (seen @ read) / (seen.norm() * read.norm()))


def test_pickscore_is_the_scaled_cosine(judge):
    """Tolerance: float32 through other batch shapes, on scores of size 1."""
    found = load(f"pickscore={judge}").score(PROMPTS, pictures())
    assert found.shape == (5,) and found.dtype == np.float64
    np.testing.assert_allclose(found, [by_hand(judge, p, i) for p, i in zip(PROMPTS, pictures(), strict=True)], atol=1e-5)
    assert np.ptp(found) > 0.01  # the test would see mixed-up rows
    assert np.abs(found).max() <= np.exp(1.5)


def test_a_score_depends_on_its_own_prompt_and_image_alone(judge):
    together = load(f"pickscore={judge}").score([*PROMPTS, PROMPTS[0]], [*pictures(), pictures()[1]])
    np.testing.assert_allclose(load(f"pickscore={judge}", batch=2).score(PROMPTS, pictures()), together[:5], atol=1e-5)
    np.testing.assert_allclose(load(f"pickscore={judge}").score([PROMPTS[0]], [pictures()[1]]), together[5:], atol=1e-5)
    assert load(f"pickscore={judge}").score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 prompts, but 5 images"):
        load(f"pickscore={judge}").score(PROMPTS[:2], pictures())


def test_permuting_the_pairs_permutes_the_scores(judge):
    scorer, order, images = load(f"pickscore={judge}", batch=2), [3, 1, 4, 0, 2], pictures()
    there = scorer.score(PROMPTS, images)
    back = scorer.score([PROMPTS[k] for k in order], [images[k] for k in order])
    np.testing.assert_allclose(back, there[order], atol=1e-6)


def test_an_image_and_a_prompt_that_occur_often_are_embedded_once(judge):
    scorer, (a, b, c) = load(f"pickscore={judge}", batch=2), pictures(3)
    seen, read = count_rows(scorer.model.vision_model), count_rows(scorer.model.text_model)
    prompts, images = [*PROMPTS[:1] * 4, *PROMPTS[1:2] * 2], [a, b, a, c, c, a]
    found = scorer.score(prompts, images)
    assert seen == [2, 1] and read == [2]
    np.testing.assert_allclose(found, [by_hand(judge, *pair) for pair in zip(prompts, images, strict=True)], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_towers_of_low_precision_keep_float32_scores_near(judge, dtype):
    """The towers round to 8 (bfloat16) or 11 bits; norms, products and the scale of e^1.5 do not."""
    low, full = load(f"pickscore={judge}", dtype=dtype), load(f"pickscore={judge}")
    assert {p.dtype for p in low.model.parameters()} == {getattr(torch, dtype)}
    found, wanted = low.score(PROMPTS, pictures()), full.score(PROMPTS, pictures())
    np.testing.assert_allclose(found, wanted, atol=0.05 if dtype == "bfloat16" else 0.01)
    assert not np.array_equal(found, wanted)
    assert not np.array_equal(found, torch.from_numpy(found).to(getattr(torch, dtype)).double())  # the score itself is not rounded
    assert low.version == f"{full.version}-{dtype}"


def test_a_half_precision_file_is_computed_in_float32(judge, tmp_path):
    from transformers import CLIPModel

    shutil.copytree(judge, tmp_path / "half")
    CLIPModel.from_pretrained(judge, dtype=torch.float16).save_pretrained(tmp_path / "half")
    scorer = load(f"pickscore={tmp_path / 'half'}")
    assert {p.dtype for p in scorer.model.parameters()} == {torch.float32}
    np.testing.assert_allclose(scorer.score(PROMPTS, pictures()), load(f"pickscore={judge}").score(PROMPTS, pictures()), atol=0.02)


def test_the_version_is_the_digest_of_the_weights(judge, tmp_path):
    digest = hashlib.sha256((judge / "model.safetensors").read_bytes()).hexdigest()
    assert load(f"pickscore={judge}").version == f"pickscore-{digest[:12]}-logit"
    assert load(f"pickscore={build_judge(tmp_path / 'other', seed=1)}").version != load(f"pickscore={judge}").version


def test_longer_prompts_are_cut_and_that_is_said(judge, capsys):
    long = PROMPTS[0] + " red" * 20
    scorer = load(f"pickscore={judge}")
    assert np.isfinite(scorer.score([long], pictures(1))).all()
    assert "reads 16 tokens" in capsys.readouterr().out
    scorer.score([*PROMPTS[1:], long], pictures())
    assert capsys.readouterr().out == ""  # said once


def test_pickscore_takes_any_size_and_mode(judge):
    scorer, image = load(f"pickscore={judge}"), pictures(1, size=(96, 80))[0]
    one, other = scorer.score(PROMPTS[:2], [image.convert("L"), image.convert("RGBA")])
    assert np.isfinite([one, other]).all()
    grey = Image.merge("RGB", [image.convert("L")] * 3)
    np.testing.assert_allclose(scorer.score(PROMPTS[:2], [grey, image]), [one, other], atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "dtype", "remedy"),
    [
        ("vision_model", "float32", "take --dtype bfloat16"),
        pytest.param("text_model", "float32", "take --dtype bfloat16", marks=pytest.mark.slow),
        pytest.param("vision_model", "bfloat16", "give another --device", marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_stops_the_run_with_a_remedy(judge, tower, dtype, remedy):
    def fail(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    scorer, images = load(f"pickscore={judge}", batch=4, dtype=dtype), pictures()
    getattr(scorer.model, tower).register_forward_pre_hook(fail)
    with pytest.raises(UserError) as caught:
        scorer.score(PROMPTS, images)
    assert str(caught.value) == f"pickscore: the GPU's memory is too small, even for one of the images at a time; {remedy}"


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_little_memory_halves_the_batch_and_leaves_the_scores(judge, tower, capsys):
    """As the smaller batch gives them bit for bit, and as the whole one up to float32 rounding."""

    def refuse(module, given, more):
        (rows,) = {len(value) for value in (*given, *more.values()) if isinstance(value, torch.Tensor)}
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    images = pictures()
    whole, two, halved = (load(f"pickscore={judge}", batch=batch) for batch in (8, 2, 4))
    getattr(halved.model, tower).register_forward_pre_hook(refuse, with_kwargs=True)
    found = halved.score_and_embed(PROMPTS, images)
    assert capsys.readouterr().out == "pickscore: the GPU's memory is too small for 4 images at once; going on with 2\n"
    np.testing.assert_allclose(found[0], whole.score(PROMPTS, images), atol=1e-5)
    np.testing.assert_array_equal(halved.score_and_embed(PROMPTS, images)[0], two.score(PROMPTS, images))
    assert halved.version == whole.version and capsys.readouterr().out == ""


def test_a_batch_that_fits_is_measured_on_the_first_images(judge, monkeypatch):
    """On a device with room for the towers and three images' activations, of four images two go together."""
    from dedpo_diffusion.evaluation.benchmarks.allocations import AllocationCounter
    from dedpo_diffusion.judges.scorers import embedding

    class Counted:
        def __init__(self):
            self.peaks = []

        def peak(self, call):
            with AllocationCounter() as counter:
                call()
            self.peaks.append(counter.peak)
            return counter.peak

        def room(self):
            one, two = self.peaks
            return (one + 2 * (two - one)) / 0.85

    monkeypatch.setattr(embedding, "meter_of", lambda device: Counted())
    scorer, images = load(f"pickscore={judge}", batch=4), pictures()
    rows = count_rows(scorer.model.vision_model)
    found = scorer.score(PROMPTS, images)
    assert rows == [1, 2, 2, 2, 1]  # measured on one and on two
    scorer.score(PROMPTS, images)
    assert rows == [1, 2, 2, 2, 1, 2, 2, 1]  # and never again
    np.testing.assert_array_equal(found, load(f"pickscore={judge}", batch=2).score(PROMPTS, images))


def test_oracle_reward_is_the_oracle():
    rng = np.random.default_rng(0)
    images = [world.render(world.sample_scene(rng, clutter=0.5)) for _ in PROMPTS]
    scorer = load("oracle_reward")
    np.testing.assert_array_equal(scorer.score(PROMPTS, images), oracle.reward(PROMPTS, images))
    assert (scorer.name, scorer.version) == ("oracle_reward", "shapes-oracle-1")


def break_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def change_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "type 'bert'"),
        (lambda folder: (folder / "config.json").unlink(), "no CLIP folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "cannot be loaded"),
        (lambda folder: change_weights(folder, lambda weights: weights.pop("visual_projection.weight")), "lack visual_projection"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (lambda folder: [path.unlink() for path in folder.glob("*token*")], "a tokenizer of 2 tokens"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no CLIPProcessor"),
    ],
)
def test_folders_that_are_no_clip_model(judge, tmp_path, damage, message):
    shutil.copytree(judge, tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(UserError, match=message):
        load(f"pickscore={tmp_path / 'bad'}")


def test_weights_that_the_model_has_no_place_for_are_counted(judge, tmp_path, capsys):
    load(f"pickscore={judge}")
    assert capsys.readouterr().out == ""
    shutil.copytree(judge, tmp_path / "more")
    change_weights(tmp_path / "more", lambda weights: weights.update(stray=torch.zeros(1)))
    load(f"pickscore={tmp_path / 'more'}")
    assert "pickscore: 1 weights in" in (said := capsys.readouterr().out) and "(first: stray)" in said


@pytest.mark.parametrize(
    ("spec", "batch", "message"),
    [
        (
            "pikscore",
            4,
            r"no scorer 'pikscore' .*; known: pickscore, clip, hps, aesthetic, adapted, http; for Shapes only: oracle_.* mean 'pickscore'",
        ),
        ("oracle_reward=here", 4, "has no location"),
        ("pickscore=/no/such/folder", 4, "/no/such/folder: no such folder"),
        ("oracle_reward", 0, "batch is 0"),
    ],
)
def test_specs_that_name_nothing(spec, batch, message, no_hub):
    with pytest.raises(UserError, match=message):
        load(spec, batch)


def test_without_a_hub_one_line_says_what_to_give(no_hub):
    with pytest.raises(UserError, match=r"^pickscore: yuvalkirstain/PickScore_v1 is no folder here .*; give pickscore=FOLDER$"):
        load("pickscore")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_devices_that_are_not_here(judge, device):
    with pytest.raises(UserError, match=rf"^device {device} cannot be used here \(.*\); give another --device, or none$"):
        load_scorer(f"pickscore={judge}", device=device, batch=4)


def test_a_precision_that_does_not_exist():
    with pytest.raises(UserError, match="dtype is 'float8'"):
        load("oracle_reward", dtype="float8")


def test_the_oracle_refuses_other_prompts():
    with pytest.raises(UserError, match="oracle_reward judges Shapes images only: not a Shapes prompt: 'a cat'"):
        load("oracle_reward").score(["a cat"], pictures(1))


def grey(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (level,) * 3) for level in levels]


def test_bradley_terry_by_hand():
    """Levels 102 and 100 at temperature 2: sigmoid(1) = 0.73105857863; equal levels: 1/2."""
    found = BradleyTerry(Brightness(), temperature=2.0).prefer(["", ""], grey(102, 7), grey(100, 7))
    np.testing.assert_allclose(found, [0.73105857863, 0.5], atol=1e-11)


def test_swapping_the_images_turns_the_label_around_and_no_score_overflows():
    judge = BradleyTerry(Brightness(), temperature=0.1)
    there, back = judge.prefer([""] * 2, grey(255, 3), grey(0, 4)), judge.prefer([""] * 2, grey(0, 4), grey(255, 3))
    np.testing.assert_allclose(there, 1 - back, atol=1e-15)
    assert there[0] == 1.0 and back[0] == pytest.approx(0.0, abs=1e-300)
    np.testing.assert_array_equal(probability(np.array([[1e308, -1e300], [-1e308, 1e300]]), 0.1), [1.0, 0.0])
    np.testing.assert_allclose(probability(np.array([[-60.0, 0.0]]), 0.1), [np.exp(-600.0)], rtol=1e-12)  # no rounding to 0
    assert np.isnan(probability(np.array([[np.nan, np.nan]]), 0.1)).all()


def test_answers_keep_their_pair_and_side():
    asked = [Question(f"p{k}", "", image_0, image_1) for k, (image_0, image_1) in enumerate(zip(grey(1, 2, 3), grey(4, 5, 6), strict=True))]
    answers = BradleyTerry(Brightness()).answer(asked)
    np.testing.assert_array_equal(answers.scores, [[1, 4], [2, 5], [3, 6]])
    assert answers.missing == [""] * 3 and answers.extra == {}
    assert BradleyTerry(Brightness()).answer([]).scores.shape == (0, 2)


def test_the_judge_version_tells_the_temperature_apart():
    versions = {BradleyTerry(Brightness(), temperature=t).version for t in (1.0, 2.0, 1.0000001)}
    assert len(versions) == 3 and all("brightness-1" in version for version in versions)


def test_without_a_temperature_the_scorers_own_is_taken(monkeypatch):
    monkeypatch.setattr(Brightness, "temperature", 4.0)
    judge = BradleyTerry(Brightness())
    assert judge.temperature == 4.0 and judge.version == BradleyTerry(Brightness(), temperature=4.0).version
    np.testing.assert_allclose(judge.prefer([""], grey(104), grey(100)), [0.73105857863], atol=1e-11)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense(temperature):
    with pytest.raises(UserError, match="must be a positive number"):
        BradleyTerry(Brightness(), temperature=temperature)


def test_a_score_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(Brightness, "score", lambda self, prompts, images: np.array([1.0, 2.0, 3.0, np.nan]))
    with pytest.raises(UserError, match="gave nan for an image of prompt 'b'"):
        BradleyTerry(Brightness()).prefer(["a", "b"], grey(1, 2), grey(3, 4))
