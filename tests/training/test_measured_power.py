"""objective.power=measured: the noise ratio of real runs, over processes and stops, and the targets that follow from it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.dpo.gradient_noise import NoiseRatio, noise_ratio
from dedpo_diffusion.dpo.noising import draw
from dedpo_diffusion.dpo.step import preference_step
from dedpo_diffusion.labels.files import read_targets, write_labels, write_targets
from dedpo_diffusion.pipelines import export, merge, train
from dedpo_diffusion.settings import DataSettings, ObjectiveSettings, TrainSettings
from dedpo_diffusion.training import measured_power as measured
from dedpo_diffusion.training.setup import prepare, timestep_draw
from dedpo_diffusion.training.sharding import build_accelerator
from support.pictures import build_tiny_model, write_pairs
from support.processes import together
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

PAIRS, LABELLED = 40, 20
MERGES = {
    "tuned": ["--method", "tuned"], "dedpo": ["--method", "dedpo"], "given": ["--method", "tuned", "--power", "0.3"],
    "adapted": ["--method", "adapted", "--correction", "1"], "naive": ["--method", "naive"], "human_only": ["--method", "human_only"],
    "half": ["--method", "tuned", "--rule", "half"], "both": ["--method", "tuned", "--judges", "clip,other"],
    "short": ["--visits", "1", "--noise_ratio", "1000"],
    "long": ["--visits", "100", "--noise_ratio", "4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Random, but it sees its pictures clearly and errs by much the same whatever the noise: so that pairs have gradients of their own."""
    folder = build_tiny_model(tmp_path_factory.mktemp("base"))
    unet, vae = (folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    weights = load_file(unet)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] + 3}, unet)
    weights = load_file(vae)
    weights["quant_conv.weight"][:4] *= 300  # the means of the posterior
    weights["quant_conv.weight"][4:], weights["quant_conv.bias"][4:] = 0, -20  # and its variances
    save_file(weights, vae)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Random pictures; half have human labels, and a judge repeats four in five of them. Merged in many ways."""
    folder = write_pairs(tmp_path_factory.mktemp("pairs") / "data", PAIRS)
    rng, ids = np.random.default_rng(0), [f"p{k}" for k in range(PAIRS)]
    human = (rng.random(PAIRS) < 0.5).astype(float)
    write_labels(folder, "human", Labels(ids[:LABELLED], human[:LABELLED]))
    for name, wrong in (("clip", 5), ("other", 3)):
        write_labels(folder, name, Labels(ids, np.where(np.arange(PAIRS) % wrong == 0, 1 - human, human) * 0.9 + 0.05))
    for name, options in MERGES.items():
        judge = [] if "--judges" in options else ["--judge", "clip"]
        assert merge.main([str(folder), "--name", name, *judge, *options]) == 0
    targets = read_targets(folder, "tuned")
    bare = dataclasses.replace(targets, human=None, judge=None, inverse=None, power=None)
    report = json.loads((folder / "targets" / "tuned.json").read_text())
    write_targets(folder, "bare", bare, report)
    write_targets(folder, "other", dataclasses.replace(targets, weight=2 * targets.weight), report)
    write_targets(folder, "mixed_up", targets, report | {"power": 0.9 * report["power"]})
    write_targets(folder, "unsaid", targets, {})
    weight = np.where(np.arange(PAIRS) < 10, targets.weight, 0.0)
    few = {name: np.where(np.arange(PAIRS) < 10, getattr(targets, name), left) for name, left in LEFT_OUT.items()}
    write_targets(folder, "few", dataclasses.replace(targets, weight=weight, **few), report)
    return folder


LEFT_OUT = {"human": np.nan, "judge": np.nan, "inverse": 0.0, "power": 0.0}


def options(base, pairs, out, **changes):
    usual = {"data__targets": "tuned", "objective__power": "measured", "objective__power_pairs": 16, "data__sampling": "importance"}
    usual |= {"objective__power_draws": 3, "objective__timesteps": "[0, 200]", "seed": 3, "data__caption_dropout": 0.0}
    return arguments(base, pairs, out, **(usual | {"optim__steps": 4, "checkpoint_every": 2} | changes))


def told(run):
    return json.loads((run / "power.json").read_text())


# ---- the measurement


def world(base, pairs, out, **objective):
    """Settings, model, loader and timesteps of a run, as `set_up` makes them."""
    given = ObjectiveSettings(power="measured", beta=200.0, timesteps=(0, 200), **objective)
    settings = TrainSettings(str(base), out, DataSettings(pairs, "tuned", caption_dropout=0.3), objective=given, seed=3, device="cpu")
    scalable = measured.open_scalable(settings)
    model, loader, _, _ = prepare(settings, build_accelerator(settings), scalable)
    return settings, model, loader, timestep_draw(settings.objective, len(model.process))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{}, {"kind": "ipo", "balance": "none", "timestep_weighting": "min_snr"}])
def test_the_ratio_is_that_of_explicit_gradients_of_the_runs_loss(base, pairs, tmp_path, objective):
    """Sixteen pairs by hand, three draws each: draw, encode, the loss of label 1 at margin 0, backward, all pairs of draws."""
    settings, model, loader, timesteps = world(base, pairs, tmp_path, power_pairs=16, power_draws=3, **objective)
    found = measured.own_moments(settings, model, loader, timesteps, 0, 1).numpy()
    places, chosen = measured.measured_places(settings, loader), settings.objective
    assert len(set(places)) == 16
    step = {"beta": 200.0, "kind": chosen.kind, "balance": chosen.balance}
    rows = []
    for place in places:
        gradients = []
        for number in range(3 * place, 3 * place + 3):  # every pair is visited: places are rows
            draws = draw(3, number, 1, (4, 8, 8), timesteps=timesteps, caption_dropout=0.3, stream=measured.STREAM)
            batch, _ = loader.batch(loader.at([place], [number], draws), model)
            batch = dataclasses.replace(batch, target=torch.ones(1), weight=torch.ones(1))
            factor = timesteps.weights(model.process, draws.timesteps)
            result = preference_step(model, batch, timesteps=draws.timesteps, noise=draws.noise, timestep_weight=factor, **step)
            result.loss.sum().backward()
            assert result.margin.item() == 0  # the reference itself gives the same errors
            gradients.append(torch.cat([p.grad.flatten().double() for p in model.trainable().values()]).numpy())
            model.unet.zero_grad()
        gram = np.stack(gradients) @ np.stack(gradients).T
        rows.append([(gram.sum() - np.trace(gram)) / 6, np.trace(gram) / 3])
    np.testing.assert_allclose(found, rows, rtol=2e-4, atol=1e-6 * np.abs(rows).max())
    pair, visit = np.mean(rows, axis=0)
    assert pair > 0 and noise_ratio(found).value == pytest.approx(visit / pair, rel=1e-4)


@pytest.mark.slow
def test_processes_measure_their_shares_of_the_same_numbers(base, pairs, tmp_path):
    given = world(base, pairs, tmp_path, power_pairs=16, power_draws=2)
    alone = measured.own_moments(*given, 0, 1)
    assert (alone[:, 1] > 0).all()
    for processes in (3, 20):  # 20: more than there are pairs
        shares = torch.stack([measured.own_moments(*given, rank, processes) for rank in range(processes)])
        assert torch.equal(shares.sum(dim=0), alone)
        assert ((shares[:, :, 1] > 0).sum(dim=0) == 1).all()  # no pair twice


# ---- the power


def ratio(value, error=0.5):
    return NoiseRatio(value, error, value, 1.0, 0.1, 64)


@pytest.mark.parametrize(("name", "judges"), [("tuned", ["clip"]), ("both", ["clip", "other"])])
def test_power_and_targets_are_those_of_a_merge_for_this_run(pairs, tmp_path, name, judges):
    """Whatever the judges, the same bits."""
    settings = TrainSettings("x", tmp_path, DataSettings(pairs, name), objective=ObjectiveSettings(power="measured"))
    made = measured.choose_power(measured.open_scalable(settings), ratio(5.0), 150, 0)
    argv = ["--judge", "clip"] if judges == ["clip"] else ["--judges", "clip,other"]
    extra = [part for part in MERGES[name] if part not in ("--judges", "clip,other")]
    assert merge.main([str(pairs), "--name", "expected", *argv, *extra, "--visits", "150", "--noise_ratio", "5"]) == 0
    expected, report = read_targets(pairs, "expected"), json.loads((pairs / "targets" / "expected.json").read_text())
    assert 0 < report["run"]["scale"] < 1
    for column in ("target", "weight", "power"):
        np.testing.assert_array_equal(getattr(made.targets, column), getattr(expected, column))
    for found, other in ((made.report["power"], report["power"]), (made.report["run"]["endless_power"], report["run"]["endless_power"])):
        assert found == pytest.approx(other, rel=1e-14)  # means of the same numbers
    worth = made.report["run"]["effective_human_labels"]["value"]
    assert worth == pytest.approx(report["run"]["effective_human_labels"]["value"], rel=1e-12)


def test_targets_that_were_merged_for_another_run_or_at_a_given_power_get_the_power_of_their_labels(pairs, tmp_path):
    def powers(name, overshoot=2.0):
        objective = ObjectiveSettings(power="measured", max_overshoot=overshoot)
        return measured.open_scalable(TrainSettings("x", tmp_path, DataSettings(pairs, name), objective=objective)).merged.power

    tuned = read_targets(pairs, "tuned").power
    for name in ("long", "dedpo", "given"):
        assert read_targets(pairs, name).power[0] != pytest.approx(tuned[0])
        np.testing.assert_allclose(powers(name), tuned, rtol=1e-12)
    assert powers("dedpo", 1.1)[0] == pytest.approx((1 - 1 / 1.1) / 0.5)  # held at the cap


def test_the_power_falls_with_noise_and_rises_with_length_to_that_of_endless_training(pairs, tmp_path):
    settings = TrainSettings("x", tmp_path, DataSettings(pairs, "tuned"), objective=ObjectiveSettings(power="measured"))
    found = measured.open_scalable(settings)
    by_noise = [measured.choose_power(found, ratio(value), 150, 0).report["power"] for value in (1.0, 2.0, 5.0, 20.0, 1000.0)]
    assert by_noise == sorted(by_noise, reverse=True) and by_noise[-1] == 0
    endless = read_targets(pairs, "tuned").power[0]
    assert by_noise[0] == pytest.approx(endless, abs=1e-6)
    assert measured.choose_power(found, ratio(5.0), 10**9, 0).report["power"] == pytest.approx(endless, abs=1e-6)
    low, high = measured.choose_power(found, ratio(5.0, 1.0), 150, 0).report["power_ci"]
    assert low < by_noise[2] < high <= endless
    silent = measured.choose_power(found, ratio(1000.0), 150, 0)
    assert (silent.targets.weight[LABELLED:] == 0).all() and "it trains on the human labels alone" in silent.report["sentences"][-1]


# ---- the run


@pytest.fixture(scope="module")
def finished(base, pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(options(base, pairs, run)) == 0
    return run


@pytest.mark.slow
def test_a_run_says_and_keeps_what_it_measured(base, pairs, tmp_path, capsys):
    assert train.main(options(base, pairs, tmp_path / "run")) == 0
    words, kept = " ".join(capsys.readouterr().out.split()), told(tmp_path / "run")
    assert kept["run"]["visits"] == 16 and kept["measured"]["pairs"] == 16
    assert kept["measured"]["value"] == pytest.approx(kept["measured"]["visit"] / kept["measured"]["pair"])
    assert f"The noise ratio is {kept['measured']['value']:.3g} (standard error {kept['measured']['standard_error']:.2g})" in words
    assert f"The power used in this run is {kept['power']:.2f}; endless training would take {kept['run']['endless_power']:.2f}" in words
    assert "In a run of 16 visits at noise ratio" in words and "these labels are worth about" in words
    assert [text for text in kept["sentences"] if text not in words] == []


@pytest.mark.slow
def test_a_run_equals_one_on_targets_merged_at_the_resulting_power(finished, base, pairs, tmp_path):
    power = told(finished)["power"]
    assert 0.01 < power < 0.95 * told(finished)["run"]["endless_power"]  # or another rule would do as well
    assert merge.main([str(pairs), "--name", "by_hand", "--judge", "clip", "--method", "tuned", "--power", repr(power)]) == 0
    argv = options(base, pairs, tmp_path / "run", data__targets="by_hand", objective__power="fixed")
    assert train.main(argv) == 0
    assert deviation(final(finished), final(tmp_path / "run")) == (0, 0)
    assert [line["loss"] for line in metrics(finished)] == [line["loss"] for line in metrics(tmp_path / "run")]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_ratio_it_measured(finished, base, pairs, tmp_path, monkeypatch):
    argv = options(base, pairs, tmp_path / "run")
    stop_after(monkeypatch, 2)
    assert train.main(argv) == 130
    first = (tmp_path / "run" / "power.json").read_bytes()

    def measure_again(*_, **__):
        raise AssertionError("it measured again")

    monkeypatch.setattr(measured, "measure_noise", measure_again)
    assert train.main(argv) == 0
    assert deviation(final(finished), final(tmp_path / "run")) == (0, 0)
    assert (tmp_path / "run" / "power.json").read_bytes() == first == (finished / "power.json").read_bytes()
    kept = told(tmp_path / "run")  # it is read indeed: another ratio, another power
    kept["measured"]["value"] = 1.0
    (tmp_path / "run" / "power.json").write_text(json.dumps(kept))
    assert train.main(argv) == 0
    assert told(tmp_path / "run")["power"] == pytest.approx(kept["run"]["endless_power"], abs=1e-6) != kept["power"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "{}", '{"measured": {"value": 3}}'])
def test_a_damaged_measurement_is_named(finished, base, pairs, tmp_path, capsys, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "power.json").write_text(text)
    assert train.main(options(base, pairs, tmp_path / "run")) == 2
    assert "power.json: damaged" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_cache_stored_references_and_accumulation_change_nothing_that_is_measured(finished, base, pairs, tmp_path):
    cached = {"data__cache": tmp_path / "cache", "optim__batch": 2, "optim__accumulation": 2}
    for name, changes in {"cached": cached, "stored": cached | {"data__reference_draws": 1}}.items():
        assert train.main(options(base, pairs, tmp_path / name, **changes)) == 0
        assert told(tmp_path / name) == told(finished)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(finished, base, pairs, tmp_path, way):
    from support.processes import FSDP

    full = {"weights": "full", "optim__learning_rate": 1e-5} if way == "fsdp" else {}
    if full:
        finished = tmp_path / "one"
        assert train.main(options(base, pairs, finished, **full)) == 0
    argv = options(base, pairs, tmp_path / "two", optim__batch=2, **full)
    done = together(2, tmp_path, [{"arguments": argv, "env": FSDP if full else {}}])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The noise ratio is") == 1
    one, two = told(finished), told(tmp_path / "two")
    assert two["measured"] == pytest.approx(one["measured"], rel=1e-9) and two["power"] == pytest.approx(one["power"], rel=1e-9)
    for lines in zip(metrics(finished), metrics(tmp_path / "two"), strict=True):
        assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], abs=2e-4)  # rounding, at a high learning rate


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "bf16"}, {"weights": "full", "optim__learning_rate": 1e-5}, {"lora__dropout": 0.2, "lora__text_encoders": "true"},
     {"lora__dora": "true", "gradient_checkpointing": "true"}],
    ids=["bf16", "full", "dropout", "dora"],
)  # fmt: skip
def test_other_ways_of_training_measure_too(finished, base, pairs, tmp_path, changes):
    assert train.main(options(base, pairs, tmp_path / "run", **changes)) == 0
    value = told(tmp_path / "run")["measured"]["value"]
    assert value >= 1 and math.isfinite(value)
    if "mixed_precision" in changes:
        assert value == pytest.approx(told(finished)["measured"]["value"], rel=0.1)


@pytest.mark.slow
def test_a_file_says_which_power_it_was_trained_with(finished, tmp_path, capsys):
    out, kept = tmp_path / "lora.safetensors", told(finished)
    assert export.main([str(finished), "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        shared = json.loads(file.metadata()["dedpo_settings"])
    facts = {"power": kept["power"], "noise_ratio": kept["measured"]["value"], "standard_error": kept["measured"]["standard_error"]}
    assert shared["measured_power"] == facts | {"endless_power": kept["run"]["endless_power"], "visits": 16}
    from dedpo_diffusion.weights.provenance import in_short

    assert in_short(shared)["power in training"].startswith(f"{kept['power']:.3g}, measured at noise ratio {facts['noise_ratio']:.3g}")
    held = (finished / "power.json").read_bytes()
    (finished / "power.json").unlink()
    capsys.readouterr()
    assert export.main([str(finished), "--out", str(tmp_path / "other.safetensors")]) == 2
    assert "power.json: cannot be read" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "other.safetensors").exists()
    (finished / "power.json").write_bytes(held)


@pytest.mark.slow
def test_the_settings_can_be_tried_on_a_tiny_model(base, pairs, tmp_path, capsys):
    assert train.main(options(base, pairs, tmp_path / "run", smoke="sd15")) == 0
    assert "objective.power=measured finds nothing but noise in a random model" in " ".join(capsys.readouterr().out.split())


# ---- what cannot be


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data__targets": "adapted"},
            "are of method adapted, and objective.power=measured sets the power of method tuned or dedpo; merge",
        ),
        ({"data__targets": "naive"}, "are of method naive"),
        ({"data__targets": "human_only"}, "are of method human_only"),
        ({"data__targets": "half"}, "rule half chose the power of these targets"),
        ({"data__targets": "short"}, "merge without --visits and --noise_ratio"),
        ({"data__targets": "bare"}, "does not say what its targets were merged from"),
        ({"data__targets": "other"}, "its weights are not those of its powers"),
        ({"data__targets": "mixed_up"}, "are not of one merge"),
        ({"data__targets": "unsaid"}, "does not say by which method"),
        ({"data__targets": "few"}, "needs 16 pairs that carry weight, and targets 'few' have 10"),
        ({"data__targets": "nowhere"}, "there is no"),
        ({"objective__kind": "kto"}, "take sigmoid, linear, ipo or cdpo"),
        ({"objective__kind": "dr_dpo"}, "take sigmoid, linear, ipo or cdpo"),
        ({"objective__power_pairs": 15}, "objective.power_pairs is 15; a noise ratio needs at least 16 pairs"),
        ({"objective__power_draws": 1}, "objective.power_draws is 1; a noise ratio compares at least 2 draws"),
        ({"objective__max_overshoot": 0.5}, "objective.max_overshoot is 0.5"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_written(base, pairs, tmp_path, capsys, changes, words):
    assert train.main(options(base, pairs, tmp_path / "run", **changes)) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("dedpo train: error: ") and words in message
    assert not (tmp_path / "run").exists()


def test_targets_without_their_report_are_refused(base, pairs, tmp_path, capsys):
    write_targets(pairs, "lonely", read_targets(pairs, "tuned"), {})
    (pairs / "targets" / "lonely.json").unlink()
    assert train.main(options(base, pairs, tmp_path / "run", data__targets="lonely")) == 2
    assert "lonely.json: cannot be read" in " ".join(capsys.readouterr().err.split())


def test_gradients_with_nothing_in_common_are_told_before_anything_is_written(base, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "pair_moments", lambda *_: (-1.0, 2.0))
    assert train.main(options(base, pairs, tmp_path / "run")) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "nothing in common, on average over 16 pairs. Measure on more pairs (objective.power_pairs)" in message
    assert not (tmp_path / "run").exists()


def test_a_fold_keeps_the_pairs_out_that_it_leaves_out(pairs, tmp_path):
    assert merge.main([str(pairs), "--name", "folded", "--judge", "clip", "--folds", "2"]) == 0
    settings = TrainSettings("x", tmp_path, DataSettings(pairs, "folded-fold-0"), objective=ObjectiveSettings(power="measured"))
    made, stored = measured.choose_power(measured.open_scalable(settings), ratio(3.0), 1000, 0), read_targets(pairs, "folded-fold-0")
    out = np.isnan(stored.judge)
    assert 0 < out.sum() < PAIRS and (made.targets.weight[out] == 0).all() and (made.targets.weight[~out] > 0).all()
    z, g = stored.human[~out], stored.judge[~out]
    expected = merge_labels(z, g, visits=1000, noise_ratio=3.0)
    np.testing.assert_array_equal(made.targets.target[~out], expected.target)
