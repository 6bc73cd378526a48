"""objective.timestep_sampling=measured and timestep_weighting=equal_noise in real runs: measured, followed, logged, resumed, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dedpo_diffusion.dpo.noising import draw
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, TrainSettings
from dedpo_diffusion.training import measured_timesteps as measured
from dedpo_diffusion.training.setup import prepare, timestep_draw
from dedpo_diffusion.training.sharding import build_accelerator
from support.processes import together
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

MEASURED, EQUAL = {"objective__timestep_sampling": "measured"}, {"objective__timestep_weighting": "equal_noise"}
USUAL = {"objective__timestep_pairs": 3, "objective__timestep_decay": 0.5, "optim__steps": 8, "checkpoint_every": 2}


def options(base, pairs, out, **changes):
    return arguments(base, pairs, out, **(USUAL | changes))


def told(run):
    return json.loads((run / "timesteps.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("asked", [MEASURED, EQUAL], ids=["measured", "equal_noise"])
def test_moments_are_kept_logged_move_and_survive_a_stop(tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys, asked):
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "whole", **asked)) == 0
    assert ("draws" if asked is MEASURED else "weights") + " of timesteps, by tenth: 0-99 " in " ".join(capsys.readouterr().out.split())
    found = told(tmp_path / "whole")
    assert found["pairs"] == 3 and len(found["gradient"]) == len(found["output"]) == 10
    lines = [line["timestep_moments"] for line in metrics(tmp_path / "whole")]
    np.testing.assert_allclose([part["moment"] for part in lines[0]], found["gradient"])
    assert len({json.dumps(line) for line in lines}) == 8
    for line in lines:
        assert sum(part["share"] for part in line) == pytest.approx(1)
        assert sum(part["share"] * part["weight"] for part in line) == pytest.approx(1)
    stop_after(monkeypatch, 4)
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "part", **asked)) == 130
    monkeypatch.setattr(measured, "measure", None)  # a resumed run reads
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "part", **asked)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")


def world(base, pairs, out, **objective):
    """Settings, model, loader and timesteps of a run, as `set_up` makes them."""
    wanted = ObjectiveSettings(beta=200.0, timestep_sampling="measured", **objective)
    given = TrainSettings(str(base), out, DataSettings(pairs, "soft", caption_dropout=0.3), objective=wanted, seed=3, device="cpu")
    settings = given
    model, loader, _, _ = prepare(settings, build_accelerator(settings))
    return settings, model, loader, timestep_draw(settings.objective, len(model.process))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{"timesteps": (0, 200)}, {"kind": "sft", "timestep_weighting": "min_snr"}])
def test_the_moments_are_those_of_explicit_gradients(tiny_model, tiny_pairs, tmp_path, objective):
    settings, model, loader, timesteps = given = world(tiny_model, tiny_pairs, tmp_path, timestep_pairs=2, **objective)
    alone = measured.own_squares(*given, 0, 1)
    assert alone.shape == (2, 10, 2) and (alone > 0).all()
    shares = torch.stack([measured.own_squares(*given, rank, 3) for rank in range(3)])
    assert torch.equal(shares.sum(dim=0), alone)
    [place, _], tenth, size = measured.measured_places(settings, loader), 3, (timesteps.last - timesteps.first) // 10
    number, row = 10 * int(loader.rows[place]) + tenth, int(loader.rows[place])
    here = type(timesteps)(3 * size, 4 * size, weighting=timesteps.weighting, strata=True)
    drawn = draw(3, number, 1, (4, 8, 8), timesteps=here, caption_dropout=0.3, stream=measured.STREAM)
    assert 3 * size <= drawn.timesteps.item() < 4 * size and row >= 0
    _, found = measured.visit_gradient(settings, model, loader, timesteps, place, number, drawn)
    assert alone[0, tenth, 0].item() == pytest.approx(sum(value.double().square().sum().item() for value in found), rel=1e-6)


@pytest.mark.slow
def test_two_processes_draw_the_timesteps_of_one(tiny_model, tiny_pairs, tmp_path):
    small = {"optim__steps": 4, "optim__learning_rate": 3e-4}
    runs = {"measured": MEASURED, "equal": EQUAL}
    for name, asked in runs.items():
        assert train.main(options(tiny_model, tiny_pairs, tmp_path / f"{name}-1", **small, **asked)) == 0
    jobs = [
        {"arguments": options(tiny_model, tiny_pairs, tmp_path / f"{name}-2", optim__batch=2, **small, **asked)}
        for name, asked in runs.items()
    ]
    done = together(2, tmp_path, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in runs:
        one, two = metrics(tmp_path / f"{name}-1"), metrics(tmp_path / f"{name}-2")
        np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in (one, two)), rtol=1e-4)
        for mine, other in zip(one, two, strict=True):
            assert [(b["first"], b["count"]) for b in mine["buckets"]] == [(b["first"], b["count"]) for b in other["buckets"]]
            moments = [[part["moment"] for part in line["timestep_moments"]] for line in (mine, other)]
            np.testing.assert_allclose(*moments, rtol=1e-3)


def test_a_power_is_measured_at_the_draws_that_the_run_takes(tiny_model, tiny_pairs, tmp_path):
    """With all of a tenth's weight on it, the visits of `power=measured` lie there."""
    from dedpo_diffusion.dpo.timestep_moments import TimestepMoments
    from dedpo_diffusion.training.visit_gradients import weigh

    settings, model, loader, timesteps = world(tiny_model, tiny_pairs, tmp_path)
    moments = TimestepMoments(0, 1000, torch.tensor([1e8] + [1.0] * 9), torch.ones(10), equal_noise=False, decay=0.5)
    drawn = draw(0, 0, 40, (4, 8, 8), timesteps=timesteps, caption_dropout=0.0)
    placed, factor = weigh(drawn, timesteps, model, moments)
    first = placed.timesteps < 100
    assert 0.9 <= first.double().mean() <= 0.93
    torch.testing.assert_close(factor[first].double(), (0.1 / moments.shares[:1]).expand(int(first.sum())), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (MEASURED | EQUAL, "equal_noise goes with objective.timestep_sampling=uniform, not measured"),
        (EQUAL | {"objective__timestep_sampling": "logit_normal"}, "not logit_normal"),
        (MEASURED | {"data__reference_draws": 2, "data__cache": "CACHE"}, "leave one of them out"),
        (MEASURED | {"objective__timestep_pairs": 0}, "timestep_pairs is 0"),
        (EQUAL | {"objective__timestep_decay": 1}, "timestep_decay is 1"),
    ],
)
def test_refusals(tiny_model, tiny_pairs, tmp_path, capsys, changes, words):
    changes = {name: tmp_path / "cache" if value == "CACHE" else value for name, value in changes.items()}
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    assert words in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_measurement_is_named(tiny_model, tiny_pairs, tmp_path, capsys):
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "run", **MEASURED, optim__steps=1)) == 0
    (tmp_path / "run" / "timesteps.json").write_text('{"gradient": [1.0, NaN], "output": [1.0]}')
    assert train.main(options(tiny_model, tiny_pairs, tmp_path / "run", **MEASURED, optim__steps=1)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "timesteps.json: damaged" in said and "it is measured anew" in said
