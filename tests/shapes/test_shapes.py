"""The embedded world: grammar, renderer, oracle, simulated human, and the trained models that are carried."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import resolve_model
from dedpo_diffusion.shapes import oracle, world

MODEL = Path(resolve_model("shapes"))


def scenes(seed: int, count: int, clutter: float = 0.5) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, clutter=clutter) for _ in range(count)]


def test_every_prompt_reads_back():
    assert len(world.VOCABULARY) == 144
    assert [world.parse_prompt(a.prompt) for a in world.VOCABULARY] == list(world.VOCABULARY)
    with pytest.raises(ValueError, match="not a Shapes prompt"):
        world.parse_prompt("a small red dog on a white background")


@pytest.mark.parametrize("shape", world.SHAPES)
def test_outlines_have_the_area_of_the_square(shape):
    x, y = np.array(world.outline(shape, (3.0, 7.0), 10.0)).T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    assert area == pytest.approx(400, rel=0.01)  # the circle is a polygon of 48 corners


def test_oracle_reads_what_was_drawn():
    drawn = scenes(0, 400)
    for scene in drawn:
        reading = oracle.read(world.render(scene))
        assert all(oracle.matches(scene.attributes.prompt, reading).values()), scene
        assert reading.is_cluttered == bool(scene.dots), scene


def test_reward_falls_with_every_single_fault():
    prompt = "a large red circle on a white background"

    def value(**changes: str) -> float:
        words = {"size": "large", "colour": "red", "shape": "circle", "background": "white"} | changes
        rng = np.random.default_rng(1)
        return oracle.reward([prompt], [world.render(world.sample_scene(rng, world.Attributes(**words), clutter=0.0))])[0]

    best = value()
    assert best > 0.97
    for fault in ({"size": "small"}, {"colour": "blue"}, {"shape": "square"}, {"background": "black"}):
        assert value(**fault) < best - 0.1, fault


def test_clutter_costs_reward():
    attributes = world.Attributes("small", "green", "cross", "gray")
    clean, cluttered = (
        oracle.reward([attributes.prompt], [world.render(world.sample_scene(np.random.default_rng(2), attributes, clutter=c))])[0]
        for c in (0.0, 1.0)
    )
    assert cluttered < clean - 0.05


def test_oracle_survives_pictures_without_an_object():
    for image in (Image.new("RGB", (64, 64), "white"), Image.effect_noise((64, 64), 90).convert("RGB"), Image.new("L", (20, 31))):
        values = oracle.terms("a large red circle on a white background", oracle.read(image))
        assert all(0 <= value <= 1 for value in values.values())


def test_human_answers_follow_bradley_terry():
    rewards = np.full(20000, 0.55), np.full(20000, 0.50)
    likely = oracle.preference(*rewards)[0]
    assert likely == pytest.approx(1 / (1 + np.exp(-1)))  # a difference of one temperature
    answers = oracle.answers(np.random.default_rng(0), *rewards)
    assert set(answers) == {0.0, 1.0}
    assert abs(answers.mean() - likely) < 4 * np.sqrt(likely * (1 - likely) / 20000)
    np.testing.assert_allclose(oracle.preference(*rewards), 1 - oracle.preference(*rewards[::-1]))


# ---- the models that are carried


def test_the_carried_model_is_small_and_in_the_ordinary_layout():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_vae_reconstructs_held_out_renders():
    from dedpo_diffusion.shapes.pretrain import pixels_of

    vae = Backbone("shapes", device=torch.device("cpu")).vae
    images = pixels_of(scenes(77, 64))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * torch.log10((decoded - images).square().mean(dim=(1, 2, 3)) / 4)
    assert psnr.mean() >= 26


@pytest.mark.slow
def test_base_model_is_recognisable_and_imperfect():
    """All attributes right in 35 to 75 % of 96 images, and about half cluttered; 96 images leave +-10 points."""
    from dedpo_diffusion.sampling.sampler import load_sampler, sample

    rng = np.random.default_rng(5)
    prompts = [world.VOCABULARY[i].prompt for i in rng.integers(len(world.VOCABULARY), size=96)]
    images = sample(load_sampler("shapes", device="cpu"), prompts, list(range(96)), steps=12, guidance=1.5)
    readings = [oracle.read(image) for image in images]
    right = np.mean([all(oracle.matches(p, r).values()) for p, r in zip(prompts, readings, strict=True)])
    cluttered = np.mean([reading.is_cluttered for reading in readings])
    assert 0.25 <= right <= 0.85, right
    assert 0.25 <= cluttered <= 0.75, cluttered


@pytest.mark.slow
def test_judge_is_informative_and_likes_clutter():
    """Right against wrong caption of clean renders: far above chance, far from perfect; and busy beats clean."""
    from dedpo_diffusion.judges.scorers import load_scorer

    judge = load_scorer(f"pickscore={MODEL / 'judge'}", device="cpu", batch=64)
    drawn = scenes(9, 400, clutter=0.0)
    images = [world.render(scene) for scene in drawn]
    others = [scene.attributes.prompt for scene in drawn[1:] + drawn[:1]]
    prompts = [scene.attributes.prompt for scene in drawn]
    better = judge.score(prompts, images) > judge.score(others, images)
    assert better.mean() > 0.7
    busy = [world.render(world.sample_scene(np.random.default_rng(k), s.attributes, clutter=1.0)) for k, s in enumerate(drawn)]
    assert (judge.score(prompts, busy) > judge.score(prompts, images)).mean() > 0.5
