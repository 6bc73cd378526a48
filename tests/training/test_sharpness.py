"""objective.sharpness in the training command: what is said, what beta becomes, resumed runs, refusals, and what others read of the run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.judges.self_training import read_policy
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.weights.run_folder import read_settings
from support.pictures import write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

IDS = [f"p{k}" for k in range(24)]
SOFT = np.where(np.arange(24) % 3 == 0, 0.75, 0.4)  # two thirds stop at log 1.5, the others at log 3
TYPICAL = -np.log(0.4 / 0.6)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Random pictures, with targets that stop (gentle), of which few never do (mixed), and that never do (hard, stretched), and ties."""
    folder = write_pairs(tmp_path_factory.mktemp("sharp") / "data")
    stretched, mixed = np.where(np.arange(24) < 16, 1.5, 0.5), np.where(np.arange(24) < 3, [1.0, 0.0, -0.5] * 8, SOFT)
    every = {"gentle": SOFT, "mixed": mixed, "hard": (SOFT > 0.5) * 1.0, "stretched": stretched, "ties": np.full(24, 0.5)}
    for name, target in every.items():
        write_targets(folder, name, Targets(IDS, target, np.ones(24)), {})
    return folder


def options(base, pairs, out, **changes):
    few = {"optim__steps": 4, "checkpoint_every": 2, "data__caption_dropout": 0.0, "data__targets": "gentle"}
    return arguments(base, pairs, out, **(few | changes))


@pytest.fixture(scope="module")
def plain(tiny_model, pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    assert train.main(options(tiny_model, pairs, run, objective__beta=80)) == 0
    return run


def test_a_sharpness_is_the_training_at_the_beta_that_it_names(plain, tiny_model, pairs, tmp_path, capsys):
    run, wanted = tmp_path / "run", 2.5 * TYPICAL
    assert train.main(options(tiny_model, pairs, run, objective__beta=200, objective__sharpness=wanted)) == 0
    told = capsys.readouterr().out
    assert f"pairs stop at a margin of 0.405 (median by weight; mean {(2 * TYPICAL + np.log(3)) / 3:.3g})" in told
    assert "then fallen by 0.0101 against" in told  # 2 x 0.405 / 80
    assert "objective.sharpness 1.01366: beta is 80 in place of 200" in told and "beta 80 on mean errors" in told
    assert "never stop" not in told
    assert deviation(final(plain), final(run))[0] < 1e-7
    assert metrics(run)[-1]["margin"] == pytest.approx(metrics(plain)[-1]["margin"], rel=1e-4)
    kept = read_settings(run)["objective"]
    assert (kept["beta"], kept["sharpness"]) == (200, wanted)
    assert float(json.loads((run / "identity.json").read_text())["beta"]) == pytest.approx(80)
    reader = PairReader(pairs)
    assert read_policy(run, reader, reader.fingerprint()).beta == pytest.approx(80)  # the judge's margins are those of training


def test_the_sharpness_that_targets_have_changes_no_bit(plain, tiny_model, pairs, tmp_path):
    assert train.main(options(tiny_model, pairs, tmp_path / "run", objective__beta=80, objective__sharpness=repr(float(TYPICAL)))) == 0
    assert deviation(final(plain), final(tmp_path / "run")) == (0, 0)
    assert (plain / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_its_sharpness_and_refuses_another(tiny_model, pairs, tmp_path, monkeypatch, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main(options(tiny_model, pairs, whole, objective__sharpness=3)) == 0
    stop_after(monkeypatch, 2)
    assert train.main(options(tiny_model, pairs, part, objective__sharpness=3)) == 130
    capsys.readouterr()
    for changes, words in (({"objective__sharpness": 4}, "is 3.0 there, 4.0 now"), ({}, "is 3.0 there, None now")):
        assert train.main(options(tiny_model, pairs, part, **changes)) == 2
        assert f"objective.sharpness {words}" in capsys.readouterr().err
    assert train.main(options(tiny_model, pairs, part, objective__sharpness=3)) == 0
    assert deviation(final(whole), final(part)) == (0, 0)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("hard", ["100.0% of the weight is on hard labels, which never stop"]),
        (
            "stretched",
            ["66.7% of the weight is on targets outside [0, 1], which never stop", "pairs that stop do so at a mean margin of 0\n"],
        ),
        ("mixed", ["pairs stop at a margin of 0.405", "8.3% of the weight is on hard labels and 4.2% of the weight is on targets outside"]),
    ],
)
def test_labels_that_never_stop_are_told(tiny_model, pairs, tmp_path, capsys, targets, words):
    assert train.main(options(tiny_model, pairs, tmp_path / "run", data__targets=targets, optim__steps=1)) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__targets": "hard"}, "on targets 'hard': 100.0% of the weight is on targets that never stop"),
        ({"data__targets": "stretched"}, "66.7% of the weight is on targets that never stop"),
        ({"data__targets": "ties"}, "at least half of the weight is on ties"),
        ({"objective__kind": "kto", "objective__balance": "none"}, "objective.kind=kto has no such margin"),
        ({"objective__sharpness": 0}, "objective.sharpness is 0.0; it must be a positive number"),
        ({"objective__sharpness": ".inf"}, "objective.sharpness is inf"),
        ({"objective__power": "adaptive"}, "objective.power=adaptive changes"),
    ],
)
def test_a_sharpness_that_means_nothing_is_refused_and_nothing_written(tiny_model, pairs, tmp_path, capsys, changes, words):
    out = tmp_path / "run"
    assert train.main(options(tiny_model, pairs, out, **({"objective__sharpness": 2} | changes))) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["ipo", "cdpo"])
def test_hard_labels_have_a_sharpness_where_the_objective_stops_at_them(tiny_model, pairs, tmp_path, capsys, kind):
    stop = {"ipo": 0.5, "cdpo": np.log(9)}[kind]
    changes = {"objective__kind": kind, "objective__sharpness": 4, "data__targets": "hard", "optim__steps": 1}
    assert train.main(options(tiny_model, pairs, tmp_path / "run", **changes)) == 0
    assert f"beta is {200 * stop / 4:.6g} in place of 200" in capsys.readouterr().out


def test_smoke_tries_a_sharpness_with_beta_as_given(tiny_model, pairs, tmp_path, capsys):
    assert train.main([*options(tiny_model, pairs, tmp_path / "run", objective__sharpness=2), "--smoke", "sd15"]) == 0
    assert "tried with beta as given" in capsys.readouterr().out


def test_the_embedded_model_trains_at_a_sharpness(pairs, tmp_path, capsys):
    argv = options("shapes", pairs, tmp_path / "run", objective__sharpness=4, optim__steps=3, checkpoint_every=3)
    assert train.main(argv) == 0
    assert f"beta is {200 * TYPICAL / 4:.6g} in place of 200" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[0]["margin_abs_max"] == 0 and metrics(tmp_path / "run")[-1]["margin_abs_max"] > 0
