"""Attribute accuracy through the oracle of Shapes: a render is right in what its prompt asks for, and wrong exactly in what differs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.judges.bradley_terry import BradleyTerry
from dedpo_diffusion.judges.scorers import Embedder, load_scorer
from dedpo_diffusion.shapes import oracle, world

NAMES = ("oracle_accuracy", "oracle_shape", "oracle_colour", "oracle_size", "oracle_background", "oracle_clean")


def load(name):
    return load_scorer(name, device=None, batch=4)


def render(attributes, seed, *, clutter=0.0):
    return world.render(world.sample_scene(np.random.default_rng(seed), attributes, clutter=clutter))


def scores(prompts, images):
    return {name: load(name).score(prompts, images) for name in NAMES}


def test_a_render_of_the_prompt_is_right_in_everything():
    wanted = world.VOCABULARY[::5]  # every word is among them
    found = scores([attributes.prompt for attributes in wanted], [render(attributes, k) for k, attributes in enumerate(wanted)])
    for name in NAMES:
        assert found[name].dtype == np.float64 and found[name].tolist() == [1.0] * 29, name


def test_a_render_of_another_prompt_is_wrong_exactly_in_what_differs():
    rng = np.random.default_rng(1)
    wanted, drawn = ([world.VOCABULARY[k] for k in rng.integers(144, size=50)] for _ in range(2))
    cluttered = rng.random(50) < 0.5
    images = [render(attributes, k, clutter=float(cluttered[k])) for k, attributes in enumerate(drawn)]
    found = scores([attributes.prompt for attributes in wanted], images)
    for field in dataclasses.fields(world.Attributes):
        same = [getattr(a, field.name) == getattr(b, field.name) for a, b in zip(wanted, drawn, strict=True)]
        np.testing.assert_array_equal(found[f"oracle_{field.name}"], same)
        assert 0 < sum(same) < 50
    np.testing.assert_array_equal(found["oracle_clean"], ~cluttered)
    product = np.prod([found[name] for name in NAMES[1:]], axis=0)
    np.testing.assert_array_equal(found["oracle_accuracy"], product)
    right = world.VOCABULARY[0]
    assert scores([right.prompt], [render(right, 0, clutter=1.0)])["oracle_accuracy"] == 0  # clutter alone spoils it


def test_without_an_object_nothing_of_an_object_is_right():
    found = scores(["a large red circle on a white background"], [Image.new("RGB", (64, 64), "white")])
    assert [float(found[name][0]) for name in NAMES] == [0, 0, 0, 0, 1, 1]


def test_the_scorers_are_those_of_the_terms_each_with_a_version_of_its_own():
    assert [name.removeprefix("oracle_") for name in NAMES[1:]] == list(oracle.TERMS)
    found = [load(name) for name in NAMES]
    assert [scorer.name for scorer in found] == list(NAMES)
    assert [scorer.version for scorer in found] == [f"shapes-oracle-1-{name.removeprefix('oracle_')}" for name in NAMES]
    assert not any(isinstance(scorer, Embedder) for scorer in found)


@pytest.mark.parametrize("name", NAMES)
def test_they_judge_pairs_too_with_ties_as_half(name):
    right, wrong = render(world.VOCABULARY[0], 0), render(world.VOCABULARY[-1], 0, clutter=1.0)
    found = BradleyTerry(load(name)).prefer([world.VOCABULARY[0].prompt] * 3, [right, wrong, right], [wrong, right, right])
    np.testing.assert_allclose(found, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0.5])


@pytest.mark.parametrize("name", NAMES)
def test_what_they_refuse(name):
    with pytest.raises(UserError, match=f"^scorer {name} is a program and has no location: leave out '=x'"):
        load(f"{name}=x")
    with pytest.raises(UserError, match=f"^scorer {name} judges Shapes images only: not a Shapes prompt: 'a cat'"):
        load(name).score(["a cat"], [Image.new("RGB", (64, 64))])
