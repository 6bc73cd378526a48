"""Pairs that keep their shape: which shapes there are, which pair gets which, and steps of one shape each."""

from __future__ import annotations

import dataclasses
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dedpo_diffusion.core.records import Pair, Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.pixels import WIDEST, bucket_shapes, nearest_shape, not_square, pair_views
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.training import setup
from dedpo_diffusion.training.cache import PairCache
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.training.pair_sampler import BucketedPairSampler, PairSampler
from support.pictures import picture
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture


@given(st.sampled_from([64, 512, 768, 1024]), st.sampled_from([8, 32, 64]))
def test_shapes_have_about_the_area_and_every_one_has_its_mirror_or_less(size, multiple):
    shapes = bucket_shapes(size, multiple)
    assert (size, size) in shapes
    assert len({width for _, width in shapes}) == len(shapes)
    for height, width in shapes:
        assert height % multiple == 0 and width % multiple == 0
        assert height * width <= size * size < (height + multiple) * width
        assert max(height, width) <= WIDEST * min(height, width)


def test_the_shapes_at_1024_are_those_that_sdxl_was_trained_on():
    known = [(1344, 768), (1216, 832), (1152, 896), (1024, 1024), (896, 1152), (832, 1216), (768, 1344)]
    assert set(known) <= set(bucket_shapes(1024, 64))


def test_every_size_that_a_model_takes_has_its_square(folders):
    model = Backbone(str(folders["sdxl"]), device=torch.device("cpu"))
    for size in range(model.whole, 2049, model.whole):
        assert (size, size) in model.shapes(size)


def test_a_pair_gets_the_shape_nearest_to_the_mean_of_its_ratios():
    shapes = bucket_shapes(128, 32)
    blank = {size: Image.new("RGB", size) for size in [(100, 100), (300, 150), (150, 300), (900, 100)]}
    assert nearest_shape((blank[100, 100], blank[100, 100]), shapes) == (128, 128)
    assert nearest_shape((blank[300, 150], blank[150, 300]), shapes) == (128, 128)
    wide, tall = nearest_shape((blank[300, 150],) * 2, shapes), nearest_shape((blank[150, 300],) * 2, shapes)
    assert wide[0] < wide[1] and tall[0] > tall[1]
    assert nearest_shape((blank[900, 100],) * 2, shapes) == max(shapes, key=lambda shape: shape[1] / shape[0])


@given(st.tuples(st.integers(10, 90), st.integers(10, 90)), st.sampled_from(bucket_shapes(64, 16)), st.floats(0, 1), st.booleans())
def test_a_crop_of_a_shape_lies_within_the_image_that_just_covers_it(size, shape, place, flip):
    image = Image.new("RGB", size)
    pixels, told = pair_views((image, image), shape, place=(place, 1 - place), flip=flip)
    assert pixels.shape == (2, 3, *shape)
    high, wide, top, left, *crop = told[0].tolist()
    assert (wide, high) == size and tuple(crop) == shape
    scale = max(shape[0] / size[1], shape[1] / size[0])
    assert 0 <= top <= max(0, round(size[1] * scale) - shape[0]) and 0 <= left <= max(0, round(size[0] * scale) - shape[1])


def test_a_step_takes_one_bucket_and_every_place_its_share():
    rng = np.random.default_rng(0)
    buckets = [np.array([0, 3, 5]), np.array([1]), np.array([2, 4, 6, 7])]
    inner = [rng.dirichlet(np.ones(len(bucket))) for bucket in buckets]
    share, together, steps = np.array([0.5, 0.1, 0.4]), 6, 4000

    def visits():
        return BucketedPairSampler(5, buckets, [PairSampler(5, part) for part in inner], share, together)

    one = visits()
    assert one.probability.sum() == pytest.approx(1)
    np.testing.assert_allclose(one.probability[buckets[2]], 0.4 * inner[2])
    counts = np.zeros(8)
    for step in range(steps):
        places = one.rows(step * together, (step + 1) * together)
        assert set(places) <= set(buckets[one.bucket(step)])
        counts += np.bincount(places, minlength=8)
    expected = steps * together * one.probability
    assert np.abs(counts - expected).max() < 4 * math.sqrt(steps) * together * 0.5
    late = visits()  # as a resumed run asks, and another split of the step
    assert late.rows(90 * together, 90 * together + 2) + late.rows(90 * together + 2, 91 * together) == one.rows(
        90 * together, 91 * together
    )


def test_a_rare_bucket_gets_its_share():
    """Also one that a step in hundreds takes."""
    for shares in ([0.997, 0.003], [0.5, 0.25, 0.247, 0.003]):
        buckets = [np.array([k]) for k in range(len(shares))]
        one = BucketedPairSampler(0, buckets, [PairSampler(0, np.ones(1)) for _ in buckets], np.array(shares), 1)
        counts = np.bincount([one.bucket(step) for step in range(20_000)], minlength=len(shares))
        assert np.abs(counts - 20_000 * np.array(shares)).max() < 4 * math.sqrt(20_000) * 0.5
        assert abs(counts[-1] - 60) < 4 * math.sqrt(60)


SIZES = [(140, 128), (220, 128), (128, 128), (128, 240), (256, 128), (100, 100)]
SHORT = {"optim__steps": 4, "optim__batch": 2, "checkpoint_every": 2, "lora__rank": 2, "optim__learning_rate": 0.01, "data__size": 128}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six square pairs, four wide ones and two tall ones."""
    folder = tmp_path_factory.mktemp("mixed") / "data"
    sizes = SIZES * 2
    with PairWriter(folder, shard_pairs=5) as writer:
        for k, size in enumerate(sizes):
            writer.add(Pair(f"p{k}", f"prompt {k % 3}", picture(2 * k, size), picture(2 * k + 1, size)))
    target = np.array([0.0, 1.0, 0.5, 1.6, -0.7, 0.8])[np.arange(12) % 6]
    write_targets(folder, "soft", Targets([f"p{k}" for k in range(12)], target, np.ones(12)), {"power": 0.4})
    return folder


@pytest.mark.slow
def test_pairs_keep_their_shape_and_stored_reference_errors_and_a_stop_change_nothing(folders, mixed, tmp_path, monkeypatch, capsys):
    changes = SHORT | {"data__buckets": "true", "data__cache": tmp_path / "cache", "data__reference_draws": 2, "optim__steps": 8}
    command = {name: arguments(folders["sdxl"], mixed, tmp_path / name, **changes) for name in ("whole", "part", "predicted")}
    assert train.main(command["whole"]) == 0
    assert "pairs by height x width" in " ".join(capsys.readouterr().out.split())
    cache = PairCache(next((tmp_path / "cache").glob("*/index.json")).parent)
    shapes = [tuple(shape) for shape in cache.shapes.tolist()]
    expected = [nearest_shape((Image.new("RGB", size),) * 2, bucket_shapes(128, 32)) for size in SIZES]
    assert shapes == [(height // 8, width // 8) for height, width in expected] * 2 and len(set(shapes)) >= 3
    for row, shape in enumerate(shapes):
        mean, std, told = cache.posterior(row)
        assert mean.shape == std.shape == (2, 4, *shape)
        width, height = SIZES[row % 6]
        assert told[0].tolist()[:2] == [height, width] and told[0].tolist()[4:] == [8 * shape[0], 8 * shape[1]]
    stop_after(monkeypatch, 4)
    assert train.main(command["part"]) == 130
    assert train.main(command["part"]) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    real = PairLoader.load
    monkeypatch.setattr(PairLoader, "load", lambda self, *given: dataclasses.replace(real(self, *given), known=None))
    assert train.main(command["predicted"]) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "predicted")) == (0, 0)
    assert all(torch.isfinite(value).all() for value in final(tmp_path / "whole").values())
    assert metrics(tmp_path / "whole")[0]["margin_abs_max"] == 0


def test_shapes_without_a_cache_are_refused(folders, mixed, tmp_path, capsys):
    assert train.main(arguments(folders["sdxl"], mixed, tmp_path / "run", data__buckets="true", data__cache="null", **SHORT)) == 2
    assert "data.buckets needs data.cache" in " ".join(capsys.readouterr().err.split())


# ---- what a square crops


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_square_is_one_whichever_way_it_is_turned(width, height):
    assert bool(not_square(np.array(width), np.array(height))) == bool(not_square(np.array(height), np.array(width)))
    assert not not_square(np.array(width), np.array(width))
    if max(width, height) >= 1.1 * min(width, height):
        assert not_square(np.array(width), np.array(height))


def test_what_no_bucket_would_keep_is_not_counted():
    """At 1024 px buckets are 64 px apart: the nearest to 1024 x 1000 is the square, to 1152 x 896 it is not."""
    shapes = bucket_shapes(1024, 64)
    for size, oblong in (((1024, 1000), False), ((1152, 896), True)):
        assert bool(not_square(*map(np.array, size))) == oblong
        assert (nearest_shape((Image.new("RGB", size),) * 2, shapes) != (1024, 1024)) == oblong


@pytest.mark.parametrize("cached", [True, False])
def test_train_says_how_many_images_it_crops(folders, mixed, tmp_path, capsys, cached):
    """Counted by hand over both images of every pair; mirrored views count once."""
    given = SHORT | {"optim__steps": 1} | ({"data__cache": tmp_path / "cache", "data__flip": "true", "data__views": 2} if cached else {})
    assert train.main(arguments(folders["sdxl"], mixed, tmp_path / "run", **given)) == 0
    images = 2 * len(PairReader(mixed))
    cropped = sum(max(SIZES[row % 6]) > 1.05 * min(SIZES[row % 6]) for row in range(images // 2)) * 2
    assert 0 < cropped < images
    words = f"{cropped} of {images} images are not square: they will be cropped to the centre; --data.buckets true keeps their shape\n"
    assert capsys.readouterr().out.count(words) == 1


@pytest.mark.slow
def test_of_many_pairs_without_a_cache_the_first_are_looked_at(folders, mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup, "LOOKED_AT", 6)
    assert train.main(arguments(folders["sdxl"], mixed, tmp_path / "run", **SHORT | {"optim__steps": 1})) == 0
    assert "of the first pairs, " in (out := capsys.readouterr().out) and " of 12 images are not square" in out


@pytest.mark.slow
def test_squares_and_buckets_need_no_word(folders, tiny_pairs, mixed, tmp_path, capsys):
    given = SHORT | {"optim__steps": 1}
    assert train.main(arguments(folders["sd15"], tiny_pairs, tmp_path / "square", **given)) == 0
    assert train.main(arguments(folders["sdxl"], mixed, tmp_path / "run", data__buckets="true", data__cache=tmp_path / "c", **given)) == 0
    assert "not square" not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["sd15_lora", "sd15_full", "sdxl_lora", "sdxl_lora_12gb", "sdxl_full_fsdp"])
def test_the_recipes_keep_the_shape_of_pictures(recipe):
    data = yaml.safe_load((files("dedpo_diffusion.configs") / f"{recipe}.yaml").read_text())["data"]
    assert data["buckets"] is True and data["cache"]
