"""data.label_share: which part of a run goes to pairs that people labelled, in real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import train
from support.rankings import write_rankings
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

USUAL = {"optim__steps": 4, "checkpoint_every": 2, "optim__batch": 2, "data__sampling": "importance", "data__targets": "adapted"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten pairs of which people labelled three, merged as adapted, and as tuned."""
    folder = write_rankings(tmp_path_factory.mktemp("shared") / "data", [4, 3, 2])
    ids, rng = PairReader(folder).ids(), np.random.default_rng(0)
    human = np.where(np.arange(len(ids)) < 3, 1.0, np.nan)
    for method in ("adapted", "tuned"):
        found = merge_labels(human, rng.uniform(0.6, 0.95, len(ids)), method=method)
        columns = {"human": found.human, "judge": found.judge, "inverse": found.inverse, "power": found.powers}
        write_targets(folder, method, Targets(ids, found.target, found.weight, **columns), found.report)
    return folder


def told(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def begun(run) -> dict:
    return json.loads((run / "identity.json").read_text())


def test_the_run_says_its_share_and_visits_by_it(tiny_model, pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, pairs, tmp_path / "short", **USUAL)) == 0
    said = told(capsys)
    assert "3 pairs that people labelled get 100% of 8 visits" in said and "worth less than people's again" in said
    assert "7 of 10 pairs carry no weight" in said
    assert train.main(arguments(tiny_model, pairs, tmp_path / "given", **USUAL | {"data__label_share": 0.25})) == 0
    said = told(capsys)
    assert "get 25% of 8 visits" in said and "carry no weight" not in said and "worth less" not in said
    assert float(begun(tmp_path / "given")["label_share"]) == 0.25
    assert train.main(arguments(tiny_model, pairs, tmp_path / "merged", **USUAL | {"data__label_share": "merged"})) == 0
    assert "people labelled get" not in told(capsys) and "label_share" not in begun(tmp_path / "merged")


@pytest.mark.slow
def test_a_longer_run_keeps_the_share_that_it_began_with(tiny_model, pairs, tmp_path, monkeypatch):
    """So a run that was raised to more steps is the run of so many steps with that share, to the bit."""
    run, options = tmp_path / "run", USUAL | {"data__label_share": "auto"}
    assert train.main(arguments(tiny_model, pairs, run, **options)) == 0
    share = begun(run)["label_share"]
    assert train.main(arguments(tiny_model, pairs, run, **options | {"optim__steps": 8})) == 0
    assert begun(run)["label_share"] == share
    whole = arguments(tiny_model, pairs, tmp_path / "whole", **options | {"optim__steps": 8, "data__label_share": share})
    assert train.main(whole) == 0
    assert deviation(final(run), final(tmp_path / "whole")) == (0, 0)
    stop_after(monkeypatch, 2)
    part = arguments(tiny_model, pairs, tmp_path / "part", **options)
    assert train.main(part) == 130 and train.main(part) == 0
    assert metrics(tmp_path / "part") == metrics(run)[: len(metrics(tmp_path / "part"))]


def test_a_run_of_an_earlier_version_keeps_its_weights(tiny_model, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(arguments(tiny_model, pairs, run, **USUAL)) == 0
    held = begun(run)
    del held["label_share"]
    (run / "identity.json").write_text(json.dumps(held))
    told(capsys)
    assert train.main(arguments(tiny_model, pairs, run, **USUAL | {"optim__steps": 6})) == 0
    assert "people labelled get" not in told(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data__label_share": 1.5}, "data.label_share is 1.5: give a number from 0 to 1, auto, or merged"),
        ({"data__label_share": "half"}, "label_share"),
        ({"data__label_share": 0.5, "data__targets": "tuned"}, "is for targets of method adapted, and"),
    ],
)
def test_shares_that_cannot_be_taken_are_refused(tiny_model, pairs, tmp_path, capsys, options, words):
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", **USUAL | options)) == 2
    assert words in told(capsys)


def test_other_methods_stay_as_they_were_merged(tiny_model, pairs, tmp_path, capsys):
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", **USUAL | {"data__targets": "tuned"})) == 0
    assert "people labelled get" not in told(capsys) and "label_share" not in begun(tmp_path / "run")


@pytest.mark.slow
def test_smoke_tries_a_share_on_targets_that_have_none(tiny_model, pairs, tmp_path, capsys):
    argv = arguments(tiny_model, pairs, tmp_path / "run", **USUAL | {"data__label_share": 0.5})
    assert train.main([*argv, "--smoke", "sd15"]) == 0, told(capsys)
