"""data.groups: images of one prompt share timestep, noise and one prediction each; the same loss on average, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Conditioning, PairBatch
from dedpo_diffusion.dpo.noising import TimestepDraw, draw
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.training.groups import group_pairs, image_numbers
from dedpo_diffusion.training.sources import Encoded
from support.pictures import picture
from support.processes import together
from support.rankings import write_rankings
from support.schedules import STEPS, SmallWorld
from support.steps import backbone
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

# ---- which pairs go together


def images_in(groups, group: int, images: np.ndarray) -> list[int]:
    return [int(images[row, side]) for row, side in groups.images_of(group)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40), st.integers(2, 6), st.integers(0, 1))
def test_every_pair_is_in_one_group_that_has_its_images_and_no_more_than_allowed(pairs, most, kinds):
    images = np.array(pairs)
    shapes = np.array([(4, 8, 8 + 8 * (kinds * row % 2)) for row in range(len(pairs))])
    found = group_pairs(np.arange(len(pairs)), images, shapes, most)
    assert sorted(found.places.tolist()) == list(range(len(pairs))) and found.counts.sum() == len(pairs)
    assert found.sizes.max() <= most and found.sizes.min() >= 1
    for group in range(len(found)):
        there = images_in(found, group, images)
        assert len(set(there)) == len(there)
        mine = slice(found.pair_start[group], found.pair_start[group + 1])
        for place, (first, second) in zip(found.places[mine], found.members[mine], strict=True):
            assert (there[first], there[second]) == tuple(images[place])
            assert found.group_of[place] == group
        assert len({tuple(shapes[place]) for place in found.places[mine]}) == 1
    assert (np.diff(found.rows) > 0).all()


@pytest.mark.parametrize(("size", "most", "expected"), [(5, 9, [5]), (4, 4, [4]), (4, 3, None), (3, 2, [2, 2, 2])])
def test_a_whole_ranking_is_one_group_if_there_is_room(size, most, expected):
    images = np.random.default_rng(0).permutation(np.array(list(combinations(range(size), 2))))
    found = group_pairs(np.arange(len(images)), images, np.tile((4, 8, 8), (len(images), 1)), most)
    assert found.sizes.tolist() == expected if expected else found.sizes.max() == most
    if expected == [size]:
        assert found.counts.tolist() == [size * (size - 1) // 2]


def test_with_two_images_groups_are_the_pairs_in_their_order():
    images = np.array([(5, 4), (0, 1), (4, 5), (1, 2), (7, 3)])
    found = group_pairs(np.array([2, 3, 5, 8, 9]), images, np.tile((4, 8, 8), (5, 1)), 2)
    assert found.rows.tolist() == [2, 3, 8, 9]  # (4, 5) joins (5, 4), its mirror
    assert found.images_of(0).tolist() == [[2, 0], [2, 1]] and found.counts.tolist() == [2, 1, 1, 1]


def test_images_are_one_if_file_and_prompt_are_and_are_looked_for_once(tmp_path):
    folder = write_rankings(tmp_path / "data", [3, 2])
    found = image_numbers(PairReader(folder), tmp_path)
    names = {}
    for row, pair in enumerate(PairReader(folder).iter_pairs()):
        for side, image in enumerate((pair.image_0, pair.image_1)):
            assert names.setdefault(found[row, side], (pair.prompt, image)) == (pair.prompt, image)
    assert len(names) == 5
    assert np.array_equal(image_numbers(None, tmp_path), found)  # type: ignore[arg-type] - the dataset is not asked again


# ---- the same loss


class Flat:
    """A source of pairs of two shapes, in which there is nothing to see."""

    def __init__(self, wide: int) -> None:
        self.wide = wide

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        return np.column_stack([np.full(len(rows), 4), np.full(len(rows), 8), np.where(rows < self.wide, 16, 8)])

    def load(self, rows, visits, drop_caption, images=None) -> Encoded:
        nothing = torch.zeros(len(rows), 2 if images is None else images.shape[1], 4, 8, 8)
        return Encoded(nothing, nothing, Conditioning(torch.zeros(len(rows), 1, 1)))


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
@pytest.mark.parametrize(("most", "wide"), [(2, 0), (3, 0), (4, 0), (4, 5)])
def test_the_mean_gradient_over_all_groups_and_timesteps_is_that_of_the_pairs(tmp_path, sampling, most, wide):
    """By the probabilities, weights and fillings of the loader itself: rankings of 4, 3, 3 and 2 images, two pairs without weight."""
    reader = PairReader(write_rankings(tmp_path / "data", [4, 3, 3, 2], left_out=2))
    images, count = image_numbers(reader, tmp_path), len(reader)
    given = {"targets": "soft", "seed": 0, "sampling": sampling, "together": 2}
    plain = PairLoader(reader, Flat(wide), **given)
    loader = PairLoader(reader, Flat(wide), grouped=(images, most), **given)
    groups, world = loader.groups, SmallWorld(int(images.max()) + 1)
    assert groups is not None and loader.visits.probability.sum() == pytest.approx(1)
    which = images[loader.rows]
    target, weight = (values.double() for values in (plain.merged[0], plain.merged[1]))
    expected = world.plain(which.tolist(), target, weight) * len(which) / count
    found, most_pairs = torch.zeros(3, dtype=torch.float64), max(loader.pairs)
    for group in range(len(groups)):
        drawn = draw(0, 0, 1, (4, 8, 8), timesteps=TimestepDraw(0, STEPS), caption_dropout=0.0)
        loaded = loader._load_groups(groups, [group], [0], drawn, None, most_pairs)
        there = images_in(groups, group, images)
        pairs = [(there[a], there[b]) for a, b in loaded.members[0].tolist()]
        gradient = world.plain(pairs, loaded.target.double(), loaded.weight.double())
        found += loader.visits.probability[group] * gradient
        assert int(loaded.there.sum()) == groups.counts[group] and (loaded.weight[~loaded.there] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # weights are float32


def test_a_group_has_the_losses_and_the_gradient_of_its_pairs(tiny_model):
    """Three images and three pairs, one turned, against three pairs at the same timestep and noise; the balance is each pair's own."""
    model = backbone(tiny_model, trained=True)
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 3, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    text, t = torch.randn(2, 16, 16, generator=generator), torch.tensor([20, 700])
    members = torch.tensor([[[0, 1], [2, 0], [1, 2]], [[0, 1], [0, 2], [1, 2]]])
    target, weight = torch.rand(6, generator=generator) * 2 - 0.5, torch.rand(6, generator=generator)
    factor = torch.tensor([0.3, 1.7])
    grouped = PairBatch(images, Conditioning(text), target, weight, members=members, there=torch.ones(6, dtype=torch.bool))
    single = PairBatch(
        torch.stack([images[g, members[g, p]] for g in range(2) for p in range(3)]),
        Conditioning(text.repeat_interleave(3, dim=0)),
        target,
        weight,
    )
    for balance in ("output", "relative", "probability", "adadpo", "none"):
        both = []
        for batch, each in ((grouped, 1), (single, 3)):
            at = {
                name: value.repeat_interleave(each, dim=0)
                for name, value in {"timesteps": t, "noise": noise, "timestep_weight": factor}.items()
            }
            result = preference_step(model, batch, beta=200.0, balance=balance, **at)
            gradient = torch.autograd.grad(result.loss.mean(), list(model.trainable().values()))
            both.append((result, gradient))
        (one, mine), (other, theirs) = both
        for name in ("loss", "margin", "cosine", "policy_errors", "reference_errors", "coefficients", "pull"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5, msg=name)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))
        assert one.square.shape == (2,)


def test_the_square_of_a_group_is_the_squared_gradient_of_its_predictions(tiny_model):
    model, kept = backbone(tiny_model, trained=True), []
    real = model.predict

    def keeping(*given, reference=False):
        found = real(*given, reference=reference)
        if not reference:
            found.retain_grad()
            kept.append(found)
        return found

    model.predict = keeping
    members = torch.tensor([[[0, 1], [2, 0], [2, 3]]])
    batch = PairBatch(torch.randn(1, 4, 4, 8, 8), Conditioning(torch.randn(1, 16, 16)), torch.rand(3), torch.ones(3), members=members)
    result = preference_step(model, batch, timesteps=torch.tensor([300]), noise=torch.randn(1, 4, 8, 8), beta=200.0)
    result.loss.sum().backward()
    torch.testing.assert_close(result.square, kept[0].grad.square().sum()[None])


# ---- real runs


USUAL = {"optim__steps": 6, "checkpoint_every": 2, "optim__batch": 2, "data__sampling": "importance"}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_rankings(tmp_path_factory.mktemp("ranked") / "data", [4, 4, 3, 2], left_out=1)


def run(model, pairs, out, cache, **changes) -> list[str]:
    return arguments(model, pairs, out, data__cache=cache, **(USUAL | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"data__reference_draws": 2}, {"objective__timestep_sampling": "measured"}], ids=["", "stored", "measured"]
)
def test_groups_of_two_equal_pairs_to_the_bit(tiny_model, tiny_pairs, tmp_path, changes):
    for name, groups in {"pairs": {}, "groups": {"data__groups": 2}}.items():
        assert train.main(run(tiny_model, tiny_pairs, tmp_path / name, tmp_path / f"cache-{name}", **changes, **groups)) == 0
    assert deviation(final(tmp_path / "pairs"), final(tmp_path / "groups")) == (0, 0)
    assert metrics(tmp_path / "pairs") == metrics(tmp_path / "groups")
    assert metrics(tmp_path / "pairs")[-1]["margin_abs_max"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective__timestep_sampling": "measured", "objective__timestep_pairs": 2},
        pytest.param({"data__reference_draws": 3, "data__flip": "true", "data__views": 2}, marks=pytest.mark.slow),
        pytest.param({"objective__kind": "kto", "data__caption_dropout": 0.3, "optim__accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"data__reference_draws": 1, "data__noise": "inverted", "data__inversion_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["measured", "stored", "kto", "inverted"],
)
def test_rankings_train_resume_and_are_told(tiny_model, ranked, tmp_path, monkeypatch, capsys, changes):
    command = {name: run(tiny_model, ranked, tmp_path / name, tmp_path / "cache", data__groups=4, **changes) for name in ("whole", "part")}
    assert train.main(command["whole"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "15 pairs in 4 groups of 2 to 4 images" in told
    stop_after(monkeypatch, 2)
    assert train.main(command["part"]) == 130
    assert train.main(command["part"]) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "part")
    for line in lines:  # pairs that fill up count in no figure; a step of 2 groups of 4 has 12 pairs, or 11 where one has no weight
        assert sum(bucket["count"] for bucket in line["buckets"]) <= 12 * (2 if "optim__accumulation" in changes else 1)
    assert lines[0]["margin_abs_max"] == 0 and lines[-1]["margin_abs_max"] > 0


def test_a_group_goes_through_the_model_once(tiny_model, tmp_path, monkeypatch):
    from dedpo_diffusion.models.backbone import Backbone

    pairs, seen = write_rankings(tmp_path / "data", [4, 4]), []
    real = Backbone.predict

    def counting(self, noisy, *given, reference=False):
        seen.append((noisy.shape[:2], reference))
        return real(self, noisy, *given, reference=reference)

    monkeypatch.setattr(Backbone, "predict", counting)
    assert train.main(run(tiny_model, pairs, tmp_path / "run", tmp_path / "cache", data__groups=4, optim__steps=2)) == 0
    assert seen == [((2, 4), True), ((2, 4), False)] * 2
    [line, _] = metrics(tmp_path / "run")
    assert sum(bucket["count"] for bucket in line["buckets"]) == 12 and len(line["buckets"]) <= 2


@pytest.mark.slow
def test_stored_errors_of_groups_are_those_of_the_same_draws(tiny_model, ranked, tmp_path, monkeypatch):
    changes = {"data__groups": 4, "data__reference_draws": 2}
    assert train.main(run(tiny_model, ranked, tmp_path / "stored", tmp_path / "cache", **changes)) == 0
    real = PairLoader.load
    monkeypatch.setattr(PairLoader, "load", lambda self, *given: dataclasses.replace(real(self, *given), known=None))
    assert train.main(run(tiny_model, ranked, tmp_path / "computed", tmp_path / "cache", **changes)) == 0
    assert deviation(final(tmp_path / "stored"), final(tmp_path / "computed")) == (0, 0)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_shapes_may_differ(folders, tmp_path):
    pairs = write_rankings(tmp_path / "data", [4, 3], shape=(128, 128))
    from dedpo_diffusion.core.records import Pair, Targets
    from dedpo_diffusion.labels.files import write_targets
    from dedpo_diffusion.pairs.dataset import PairWriter

    mixed, made = tmp_path / "mixed", [*PairReader(pairs).iter_pairs()]
    made += [Pair(f"w{a}{b}", "wide", picture(a, (256, 128)), picture(b, (256, 128))) for a, b in combinations(range(3), 2)]
    with PairWriter(mixed) as writer:
        for pair in made:
            writer.add(pair)
    write_targets(mixed, "soft", Targets([pair.pair_id for pair in made], np.arange(12) % 2 * 1.0, np.ones(12)), {})
    changes = {
        "data__groups": 4,
        "data__buckets": "true",
        "data__size": 128,
        "optim__learning_rate": 3e-4,
        "lora__rank": 2,
        "optim__steps": 5,
    }
    one = run(folders["sdxl"], mixed, tmp_path / "one", tmp_path / "cache", **changes)
    two = run(folders["sdxl"], mixed, tmp_path / "two", tmp_path / "cache", **(changes | {"optim__batch": 1}))
    assert train.main(one) == 0
    done = together(2, tmp_path, [{"arguments": two}])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(4 images)" in done.stdout and "(3 images)" in done.stdout
    for key, close in {"loss": 1e-5, "margin_abs_max": 1e-4, "gradient_norm": 1e-3}.items():
        numbers = [[line[key] for line in metrics(tmp_path / name)] for name in ("one", "two")]
        np.testing.assert_allclose(*numbers, rtol=1e-4, atol=close)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__groups": 1}, "data.groups is 1"),
        ({"data__groups": 4, "data__cache": "null"}, "data.groups needs data.cache"),
        ({"data__groups": 4, "data__crop": "random", "data__views": 2}, "data.crop=random"),
        ({"data__groups": 4, "objective__power": "adaptive"}, "objective.power=adaptive"),
        ({"data__groups": 4, "objective__power": "measured"}, "objective.power=measured"),
    ],
)
def test_refusals(tiny_model, ranked, tmp_path, capsys, changes, words):
    changes = {"data__cache": tmp_path / "cache"} | changes
    command = arguments(tiny_model, ranked, tmp_path / "run", **changes)
    assert train.main(command) == 2
    assert words in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


# ---- where rankings come from


def all_together(folder, cache) -> tuple[list[int], list[int]]:
    """Images and pairs of each group of a dataset, with room for all."""
    reader = PairReader(folder)
    found = group_pairs(np.arange(len(reader)), image_numbers(reader, cache), np.tile((4, 8, 8), (len(reader), 1)), 9)
    return found.sizes.tolist(), found.counts.tolist()


@pytest.mark.slow
def test_all_pairs_of_proposed_images_are_groups(tiny_model, tmp_path):
    from dedpo_diffusion.pipelines import propose

    (tmp_path / "prompts.txt").write_text("a large red circle\na small cross\n")
    given = {"model": tiny_model, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "pairs", "images_per_prompt": 4, "pairing": "all"}
    given |= {"steps": 2, "device": "cpu"}
    assert propose.main([part for name, value in given.items() for part in (f"--{name}", str(value))]) == 0
    assert all_together(tmp_path / "pairs", tmp_path) == ([4, 4], [6, 6])


def test_rankings_that_are_imported_are_groups(tmp_path):
    """ImageReward's database of prompts with 3, 4 and 5 images."""
    from dedpo_diffusion.pipelines import ingest
    from support.format_rows import write_database

    write_database(tmp_path / "source")
    assert ingest.main(["imagereward", str(tmp_path / "source"), "--out", str(tmp_path / "pairs")]) == 0
    assert all_together(tmp_path / "pairs", tmp_path) == ([3, 4, 5], [3, 6, 10])


def test_rankings_of_hpdv2_are_groups(tmp_path):
    """Its test list: rankings of 3 and 4 images, each image in several pairs."""
    from dedpo_diffusion.pipelines import ingest

    rows = []
    for prompt, size in enumerate((3, 4)):
        names = [f"{prompt}{k}.jpg" for k in range(size)]
        for k, name in enumerate(names):
            (tmp_path / "test").mkdir(exist_ok=True)
            (tmp_path / "test" / name).write_bytes(picture(10 * prompt + k, format="JPEG"))
        rows.append({"prompt": f"prompt {prompt}", "image_path": names, "rank": list(range(1, size + 1))})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert ingest.main(["hpdv2", str(tmp_path), "--out", str(tmp_path / "pairs"), "--split", "test"]) == 0
    assert all_together(tmp_path / "pairs", tmp_path) == ([3, 4], [3, 6])
