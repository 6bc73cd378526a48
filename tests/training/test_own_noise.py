"""data.noise: each image's own noise beside the stored draws, from seeds and by inversion; independent noise; resume and refusals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from dedpo_diffusion.core.console import Progress
from dedpo_diffusion.core.records import Pair, PairBatch, Targets
from dedpo_diffusion.dpo.inversion import TOLERANCE, ddim_step, knots_through, noise_levels
from dedpo_diffusion.dpo.noising import TimestepDraw, draw, image_noise
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines import propose, train
from dedpo_diffusion.sampling.sampler import initial_noise
from dedpo_diffusion.settings import DataSettings
from dedpo_diffusion.training.cache import cache_folder
from dedpo_diffusion.training.own_noise import OwnNoise, sampled_seed
from dedpo_diffusion.training.reference_grid import ReferenceGrid
from dedpo_diffusion.training.sources import CachedSource, cache_identity, open_cache
from support.pictures import picture
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

DRAWS, LEVELS = 2, 10


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    """Two pairs of the Shapes model's own images, and one with an image that says nothing."""
    folder = tmp_path_factory.mktemp("proposed")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    argv = ["--model", "shapes", "--prompts", folder / "prompts.txt", "--out", folder / "made", "--steps", "2", "--seed", "5"]
    assert propose.main([str(part) for part in [*argv, "--device", "cpu"]]) == 0
    pairs = list(PairReader(folder / "made").iter_pairs())
    with PairWriter(folder / "pairs") as writer:
        for pair in pairs:
            writer.add(pair)
        writer.add(Pair("mixed", "a red circle", pairs[0].image_0, picture(0, (64, 64)), {}))
    write_targets(folder / "pairs", "soft", Targets([*(pair.pair_id for pair in pairs), "mixed"], [1.0, 0.0, 1.0], [1.0] * 3), {})
    return folder / "pairs"


def stored(pairs, root, *, adapter=False):
    """A grid of all pairs with each image's own noise, and its model."""
    model, reader = Backbone("shapes", device=torch.device("cpu")), PairReader(pairs)
    data, fingerprint = DataSettings(pairs), reader.fingerprint()
    cache = open_cache(reader, model, data, root=root, fingerprint=fingerprint, size=model.size)
    if adapter:
        model.add_lora(rank=4, alpha=4)
        for parameter in model.trainable().values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    grid = ReferenceGrid(
        cache_folder(root, cache_identity(model, data, pairs=fingerprint, size=model.size)), CachedSource(cache, model.channels), model,
        np.arange(3), pairs=len(reader), draws=DRAWS, timesteps=TimestepDraw(0, 1000, strata=True), caption_dropout=0.0, batch=3,
        noise=OwnNoise("inverted", "shapes", reader, LEVELS),
    )  # fmt: skip
    return grid, model


@pytest.mark.slow
def test_own_noise_lies_on_the_references_trajectory_at_exactly_the_draws_timesteps(proposed, tmp_path):
    """From x_t of each stored draw, DDIM over the steps below it leads to the image."""
    grid, model = stored(proposed, tmp_path)
    levels = noise_levels(model.process, LEVELS)
    encoded = grid.source.fetch([1], [0], torch.zeros(1, dtype=torch.bool))
    clean, every = encoded.mean * model.scale, grid._timesteps(1)
    knots = knots_through(levels, every[None])[0].unique()
    for number in range(DRAWS):
        draws, known = grid.at([1], [number])
        assert draws.timesteps.tolist() == [every[number]] and draws.noise.shape == (1, 2, *clean.shape[2:])
        assert not draws.posterior.any()
        noisy = model.process.add_noise(clean, image_noise(draws.noise), draws.timesteps)
        path = knots[knots <= every[number]].tolist()
        for t, earlier in zip(path[::-1], [*path[:-1][::-1], -1], strict=True):
            ask = lambda x, t: model.predict(x, t, encoded.conditioning, reference=True)  # noqa: E731
            noisy = ddim_step(model.process, ask, noisy, torch.tensor([t]), torch.tensor([earlier]))
        assert (noisy - clean).abs().max() < 1e-3
        again = model.errors(clean, draws.noise, draws.timesteps, encoded.conditioning, reference=True)
        torch.testing.assert_close(known, again, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_reference_never_sees_the_adapter(proposed, tmp_path):
    grid, _ = stored(proposed, tmp_path / "a")
    other, model = stored(proposed, tmp_path / "b", adapter=True)
    for row in range(3):
        (one, errors), (two, adapted) = (made.at([row] * DRAWS, range(DRAWS)) for made in (grid, other))
        assert torch.equal(one.noise, two.noise) and torch.equal(errors, adapted)
    given = other.source.fetch([0], [0], torch.zeros(1, dtype=torch.bool))
    draws, known = other.at([0], [0])
    policy = model.errors(given.mean * model.scale, draws.noise, draws.timesteps, given.conditioning)
    assert not torch.allclose(policy, known, rtol=1e-2)  # the adapter does something


def test_images_that_tell_their_seed_have_the_noise_they_were_sampled_from(proposed, tmp_path, capsys):
    """No matter at which timestep; a pair with one foreign image is inverted whole, as all are with `inverted`."""
    model, reader = Backbone("shapes", device=torch.device("cpu")), PairReader(proposed)
    own = OwnNoise("own", "shapes", reader, 2)
    pairs = np.array([(row, side) for row in range(3) for side in range(2)]).reshape(3, 2, 2)
    seeds = [own._seeds(images, 64, 64) for images in pairs]
    assert seeds == [[5, 6], [7, 8], [-1, -1]]
    assert OwnNoise("inverted", "shapes", reader, 2)._seeds(pairs[0], 64, 64) == [-1, -1]
    image = reader.pair(0).image_0
    assert sampled_seed(image, "shapes", 64, 64) == 5
    assert (
        sampled_seed(image, "another", 64, 64)
        is sampled_seed(image, "shapes", 32, 64)
        is sampled_seed(b"nothing", "shapes", 64, 64)
        is None
    )

    data, fingerprint = DataSettings(proposed), reader.fingerprint()
    cache = open_cache(reader, model, data, root=tmp_path, fingerprint=fingerprint, size=64)
    own.begin(tmp_path, 64)
    source, shape = CachedSource(cache, model.channels), model.latent_shape(64)
    with Progress("own noise", 2) as progress:
        known = own.fill(
            0, np.arange(2), model, source, images=lambda row: pairs[row], timesteps=lambda row: torch.tensor([3, 900]), batch=2,
            progress=progress,
        )  # fmt: skip
    assert known == (2, 0, 0)
    for number in range(2):
        assert torch.equal(own.at(1, number, 2, 2, shape), initial_noise([7, 8], shape)[0])


@pytest.mark.parametrize("kind", ["independent", pytest.param("inverted", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_bit(proposed, tmp_path, monkeypatch, kind):
    changes = {"data__noise": kind, "data__cache": tmp_path / "cache", "optim__steps": 2, "checkpoint_every": 1, "data__caption_dropout": 0}
    changes |= {"data__reference_draws": DRAWS, "data__inversion_steps": 6} if kind == "inverted" else {}
    assert train.main(arguments("shapes", proposed, tmp_path / "whole", **changes)) == 0
    stop_after(monkeypatch, 1)
    assert train.main(arguments("shapes", proposed, tmp_path / "part", **changes)) == 130
    assert train.main(arguments("shapes", proposed, tmp_path / "part", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    assert metrics(tmp_path / "whole")[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    if kind == "inverted":
        files = {file.name.split("-")[0]: file for file in tmp_path.glob("cache/*/reference-*/*")}
        assert set(files) == {"noise", "shard"}
        content = files["noise"].read_bytes()
        files["noise"].unlink()  # as a run that was killed before it leaves it
        assert train.main(arguments("shapes", proposed, tmp_path / "again", **changes)) == 0
        assert files["noise"].read_bytes() == content
        assert deviation(final(tmp_path / "whole"), final(tmp_path / "again")) == (0, 0)


def test_shared_noise_is_what_it_was_and_independent_noise_differs_by_image():
    how = {"timesteps": TimestepDraw(0, 1000), "caption_dropout": 0.0}
    shared, apart = draw(0, 3, 4, (2, 8, 8), **how), draw(0, 3, 4, (2, 8, 8), **how, independent=True)
    assert shared.noise.shape == (4, 2, 8, 8) and apart.noise.shape == (4, 2, 2, 8, 8)
    assert torch.equal(shared.timesteps, apart.timesteps) and not torch.equal(apart.noise[:, 0], apart.noise[:, 1])
    assert torch.equal(image_noise(shared.noise)[:, 0], shared.noise) and image_noise(apart.noise) is apart.noise


def test_equal_noise_of_both_images_is_shared_noise(tiny_model):
    model = Backbone(str(tiny_model), device=torch.device("cpu"))
    latents, noise = torch.randn(2, 2, *model.latent_shape(model.size)), torch.randn(2, *model.latent_shape(model.size))
    given = PairBatch(latents, model.encode_prompts(["a", "b"]), torch.ones(2), torch.ones(2))
    t = torch.tensor([10, 700])
    one, two = (
        preference_step(model, given, timesteps=t, noise=n, beta=100.0) for n in (noise, noise[:, None].expand_as(latents).contiguous())
    )
    for name in (field.name for field in dataclasses.fields(one)):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__noise": "own"}, "data.noise=own needs data.reference_draws"),
        ({"data__noise": "inverted", "data__reference_draws": 2, "data__flip": "true", "data__views": 2}, "does not go with data.flip"),
        ({"data__noise": "independent", "objective__timestep_sampling": "measured"}, "both images share"),
        ({"data__noise": "inverted", "data__reference_draws": 2, "data__inversion_steps": 1}, "data.inversion_steps is 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tiny_model, tiny_pairs, tmp_path, capsys, changes, words):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", data__cache=tmp_path / "cache", **changes)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_the_facts_of_a_sampled_image_stand_in_its_file(proposed):
    from dedpo_diffusion.sampling.png import told_facts

    facts = told_facts(PairReader(proposed).pair(1).image_1)
    assert facts["seed"] == 8 and facts["scheduler"]["class"] == "DPMSolverMultistepScheduler" and facts["guidance"] == 7.5
    assert told_facts(b"") == {} and json.dumps(facts) and TOLERANCE < 1e-5
