"""Options of the training command on a tiny Stable Diffusion: stored reference errors, a power that follows, objectives."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from dedpo_diffusion import merge_labels
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.dpo.balance import probability_scale
from dedpo_diffusion.dpo.noising import TimestepDraw, draw
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.models import memory
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.settings import DataSettings, TrainSettings
from dedpo_diffusion.training.data import PairLoader
from dedpo_diffusion.training.setup import open_grid, with_targets
from dedpo_diffusion.training.sources import CachedSource, open_cache
from support.pictures import write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture


@pytest.fixture(scope="module")
def merged_pairs(tmp_path_factory):
    """Random pictures; a third has human labels, and a judge that repeats three in four of them; targets "tuned" with all columns."""
    pairs = write_pairs(tmp_path_factory.mktemp("merged") / "data")
    rng = np.random.default_rng(0)
    z = np.where(np.arange(24) < 8, (rng.random(24) < 0.5).astype(float), np.nan)
    repeated = np.where(np.arange(24) % 4 == 0, 1 - z, z)
    judge = np.where(np.isnan(z), rng.random(24), 0.05 + 0.85 * np.nan_to_num(repeated))
    found = merge_labels(z, judge, power=0.4)
    ids, inverse = [f"p{k}" for k in range(24)], np.where(np.isnan(z), 0.0, 3.0)
    made_of = {"human": z, "judge": judge, "inverse": inverse, "power": np.full(24, 0.4)}
    write_targets(pairs, "tuned", Targets(ids, found.target, found.weight, **made_of), {})
    write_targets(pairs, "plain", Targets(ids, judge, np.ones(24)), {})
    return pairs


def options(base, pairs, out, **changes):
    return arguments(base, pairs, out, **({"data__targets": "tuned", "data__caption_dropout": 0.0, "optim__steps": 8} | changes))


# ---- reference errors drawn beforehand


def test_with_stored_reference_errors_no_later_run_predicts_with_the_reference(tiny_model, merged_pairs, tmp_path, monkeypatch):
    changes = {"data__cache": tmp_path / "cache", "data__reference_draws": 3, "data__caption_dropout": 0.3}
    asked = []
    real = Backbone.predict

    def counting(self, *arguments, reference=False):
        asked.append(reference)
        return real(self, *arguments, reference=reference)

    monkeypatch.setattr(Backbone, "predict", counting)
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "first", **changes)) == 0
    assert sum(asked) == 24 * 3 / 4  # 3 draws of each pair, a batch of 4 at a time, before the first step
    asked.clear()
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "second", **changes)) == 0
    assert len(asked) == 8 and not any(asked)
    assert deviation(final(tmp_path / "first"), final(tmp_path / "second")) == (0, 0)
    assert metrics(tmp_path / "first")[0]["margin_abs_max"] == 0


@pytest.mark.slow
def test_stored_reference_errors_are_those_of_the_same_draws(tiny_model, merged_pairs, tmp_path, monkeypatch):
    changes = {"data__cache": tmp_path / "cache", "data__reference_draws": 3}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "stored", **changes)) == 0
    real = PairLoader.load
    monkeypatch.setattr(PairLoader, "load", lambda self, *arguments: dataclasses.replace(real(self, *arguments), known=None))
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "computed", **changes)) == 0
    assert deviation(final(tmp_path / "stored"), final(tmp_path / "computed")) == (0, 0)
    assert metrics(tmp_path / "stored") == metrics(tmp_path / "computed")


# ---- a power that follows


@pytest.mark.slow
def test_a_power_that_follows_is_logged_moves_and_survives_a_stop(tiny_model, merged_pairs, tmp_path, monkeypatch):
    changes = {"objective__power": "adaptive", "objective__power_decay": 0.5, "checkpoint_every": 2}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "whole", **changes)) == 0
    powers = [line["power"] for line in metrics(tmp_path / "whole")]
    assert powers[0] == 0.4 and len(set(powers)) > 4 and all(0 <= power <= 0.75 for power in powers)
    stop_after(monkeypatch, 4)
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "part", **changes)) == 130
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "part", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")


@pytest.mark.slow
def test_a_power_that_stays_equals_the_fixed_one(tiny_model, merged_pairs, tmp_path, monkeypatch):
    from dedpo_diffusion.dpo.adaptive_power import AdaptivePower

    assert train.main(options(tiny_model, merged_pairs, tmp_path / "fixed")) == 0
    monkeypatch.setattr(AdaptivePower, "update", lambda self, sums: None)
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "still", objective__power="adaptive")) == 0
    largest, mean = deviation(final(tmp_path / "fixed"), final(tmp_path / "still"))
    assert largest < 2e-3 and mean < 2e-5


# ---- an adapter to go on from


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_adapter_survives_a_stop_bit_for_bit(tiny_model, merged_pairs, tmp_path, monkeypatch):
    """The reference is the base with that adapter, whichever checkpoint training resumes at."""
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "first")) == 0
    assert export.main([str(tmp_path / "first"), "--out", str(tmp_path / "first.safetensors")]) == 0
    changes = {"lora__start": tmp_path / "first.safetensors", "checkpoint_every": 2}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "whole", **changes)) == 0
    stop_after(monkeypatch, 6)
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "part", **changes)) == 130
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "part", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    assert metrics(tmp_path / "whole")[0]["margin_abs_max"] == 0 < metrics(tmp_path / "whole")[-1]["margin_abs_max"]


# ---- the rest


@pytest.mark.parametrize(
    "changes",
    [
        {"data__sampling": "uniform"},
        {"objective__kind": "ipo", "objective__balance": "probability"},
        {"objective__kind": "kto", "objective__options": '{"undesirable": 2.0}'},
        {"objective__kind": "cdpo"},
        {"objective__kind": "mapo", "objective__timestep_sampling": "logit_normal", "objective__timestep_weighting": "min_snr"},
        {"objective__kind": "dr_dpo", "data__targets": "plain", "objective__timesteps": "[100, 600]"},
    ],
)
def test_options_train_and_are_recorded(tiny_model, merged_pairs, tmp_path, changes):
    import yaml

    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **({"optim__steps": 3} | changes))) == 0
    assert metrics(tmp_path / "run")[-1]["gradient_norm"] > 0
    assert max(value.abs().max().item() for name, value in final(tmp_path / "run").items() if "lora_B" in name) > 0
    held = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    for name, value in changes.items():
        room, key = name.split("__")
        assert held[room][key] == yaml.safe_load(str(value))


@pytest.mark.parametrize(
    ("changes", "balance"),
    [
        ({}, "none"),
        ({"objective__balance": "output"}, "output"),
        ({"objective__kind": "sft"}, "none"),
        ({"objective__kind": "kto", "objective__balance": "none"}, "none"),
    ],
)
def test_the_balance_is_none_unless_asked_for_and_said_and_recorded(tiny_model, merged_pairs, tmp_path, capsys, changes, balance):
    import yaml

    asked = {"optim__steps": 1, **changes}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **asked)) == 0
    assert f"balance {balance}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["objective"]["balance"] == balance
    [line] = metrics(tmp_path / "run")
    assert (line["winner_coefficient"] == 1.0) == (balance == "none")
    assert (line["margin"] is None) == (asked.get("objective__kind") == "sft") == (line["winner_drift"] is None)
    assert line["loss"] is not None
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **asked)) == 0  # the same run, to be resumed


def first_of_one_pair(tiny_model, merged_pairs, tmp_path, **changes) -> dict:
    """Metrics of the first step, of one pair; its bucket holds that pair alone. Margin 0, so policy and reference errors agree."""
    asked = {"optim__steps": 1, "optim__batch": 1, "data__targets": "plain", **changes}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **asked)) == 0
    [line] = metrics(tmp_path / "run")
    return line


@pytest.mark.parametrize("mode", ["output", "relative", "probability", "adadpo"])
@pytest.mark.parametrize("clip", [10.0, 0.0004])
def test_the_balance_of_the_settings_is_the_balance_of_the_step(tiny_model, merged_pairs, tmp_path, mode, clip):
    """error_ratio is sqrt(e_l / e_w) and reference_error (e_w + e_l) / 2, which give e_w and e_l; the coefficients are as exp(u)."""
    changes = {"objective__balance": mode, "objective__balance_clip": clip, "objective__balance_tempering": 1.0}
    line = first_of_one_pair(tiny_model, merged_pairs, tmp_path, **changes)
    ratio = line["buckets"][0]["error_ratio"]
    winner = 2 * line["reference_error"] / (1 + ratio**2)
    timestep = draw(0, 0, 1, (4, 8, 8), timesteps=TimestepDraw(0, 1000, strata=True), caption_dropout=0.0).timesteps
    scale = probability_scale(Backbone(str(tiny_model), device=torch.device("cpu")).process.alphas_cumprod, timestep, 256, tempering=1.0)
    by_probability = 0.5 * scale.item() * winner * (ratio**2 - 1)
    u = {"output": np.log(ratio), "relative": 0.0, "probability": by_probability, "adadpo": min(by_probability, np.log(2))}[mode]
    assert mode == "relative" or abs(u) > 0.0005
    assert line["buckets"][0]["ratio"] == pytest.approx(np.exp(np.clip(u, -clip, clip)), rel=1e-5)
    assert mode != "adadpo" or line["loser_coefficient"] == 1


def test_reference_errors_are_kept_apart_by_the_kernels_that_compute_them(tiny_model, merged_pairs, tmp_path):
    """Of no rows, so that the folders are made and nothing is computed."""
    model, reader = Backbone(str(tiny_model), device=torch.device("cpu")), PairReader(merged_pairs)
    data = DataSettings(merged_pairs, "plain", cache=tmp_path, reference_draws=1)
    cache = open_cache(reader, model, data, root=tmp_path, fingerprint="p", size=model.size)
    loader = PairLoader(reader, CachedSource(cache, model.channels), targets="plain", seed=0, sampling="uniform", together=4)
    loader.rows = loader.rows[:0]
    settings = TrainSettings(model=str(tiny_model), out=tmp_path / "run", data=data)
    changes = ({}, {"compile": True}, {"attention": "xformers"}, {"seed": 1})
    ways = [dataclasses.replace(settings, **changed) for changed in changes]
    folders = [open_grid(way, reader, loader.source, model, loader).folder for way in ways]
    assert len(set(folders)) == 3 and folders[3] == folders[0]


def test_timesteps_and_their_weights_are_those_of_the_settings(tiny_model, merged_pairs, tmp_path):
    """At margin 0 the loss is log 2 times the mean weight of the drawn timesteps; all pairs weigh 1."""
    changes = {"sampling": "logit_normal", "location": -0.5, "spread": 0.7, "weighting": "min_snr"}
    changed = {f"objective__timestep_{name}": value for name, value in changes.items()}
    changed |= {"objective__timesteps": "[50, 600]", "objective__snr_gamma": 0.8, "data__targets": "plain", "optim__steps": 1}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **changed)) == 0
    how = TimestepDraw(50, 600, **changes, gamma=0.8, strata=True)
    timesteps = draw(0, 0, 4, (4, 8, 8), timesteps=how, caption_dropout=0.0).timesteps
    weights = how.weights(Backbone(str(tiny_model), device=torch.device("cpu")).process, timesteps)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(np.log(2) * weights.mean().item(), rel=1e-5)
    assert weights.mean() < 0.9
    assert sum(bucket["count"] for bucket in line["buckets"]) == 4
    assert [bucket["first"] for bucket in line["buckets"]] == sorted({int(t) // 100 * 100 for t in timesteps})


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tiny_model, merged_pairs, tmp_path):
    """Two by two pairs against one by four, with a power that follows: sums in another order, and nothing else."""
    small = {"optim__steps": 4, "optim__learning_rate": 3e-4}
    small |= {"objective__power": "adaptive", "objective__power_decay": 0.5}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "one", **small)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), train.__file__]
    command = [*launch, *options(tiny_model, merged_pairs, tmp_path / "two", optim__batch=2, **small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(2 x 2 x 1)" in done.stdout
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name, close in {"loss": 3e-5, "power": 3e-5, "margin_abs_max": 1e-4}.items():
        np.testing.assert_allclose(*([line[name] for line in lines] for lines in (one, two)), rtol=0, atol=close)
    assert max(line["margin_abs_max"] for line in one) > 1e-3 and len({line["power"] for line in one}) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__kind": "dr_dpo"}, "not affine in the label"),
        ({"objective__options": '{"tau": 1.0}'}, "no option 'tau'"),
        ({"objective__timesteps": "[0, 1001]"}, "ends at 1000"),
        ({"objective__timesteps": "[5, 5]"}, "holds some"),
        ({"objective__beta": 0, "objective__kind": "mapo"}, "objective.beta is 0"),
        ({"objective__beta": ".inf"}, "objective.beta is inf"),
        ({"objective__margin_cap": -1, "objective__kind": "ipo"}, "objective.margin_cap is -1"),
        ({"objective__balance_clip": 0}, "objective.balance_clip is 0"),
        ({"objective__balance_tempering": ".nan"}, "objective.balance_tempering is nan"),
        ({"objective__kind": "cdpo", "objective__options": "{flips: .nan}"}, "flips is nan"),
        ({"objective__kind": "kto", "objective__balance": "output"}, "objective.kind=kto does not, so leave it out"),
        ({"objective__kind": "sft", "objective__balance": "relative"}, "objective.kind=sft does not, so leave it out"),
        ({"objective__kind": "dr_dpo", "objective__balance": "adadpo"}, "affine in the label, which objective.kind=dr_dpo is not"),
        ({"objective__power": "measured", "objective__balance": "adadpo"}, "which objective.balance=adadpo makes unequal"),
        ({"objective__kind": "cdpo", "objective__power": "adaptive"}, "not of cdpo"),
        ({"objective__kind": "dr_dpo", "objective__power": "adaptive"}, "not of dr_dpo"),
        ({"data__reference_draws": 2, "data__cache": "null"}, "needs data.cache"),
        ({"data__sampling": "stratified"}, "data.sampling=stratified is gone"),
        ({"objective__power": "adaptive", "data__targets": "plain"}, "run `dedpo merge` again"),
        ({"objective__power": "adaptive", "objective__power_decay": 1.0}, "decay"),
        ({"objective__power": "adaptive", "objective__max_overshoot": 0.5}, "max_overshoot"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_written(tiny_model, merged_pairs, tmp_path, capsys, changes, words):
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err
    assert message.startswith("dedpo train: error: ")
    assert words in message
    assert not (tmp_path / "run").exists()


# ---- on a CPU


@pytest.mark.parametrize("device", ["cpu", None])
def test_float16_needs_a_gpu(tiny_model, merged_pairs, tmp_path, capsys, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = options(tiny_model, merged_pairs, tmp_path / "run", mixed_precision="fp16")
    if device is None:
        del given[given.index("--device") : given.index("--device") + 2]
    assert train.main(given) == 2
    assert "mixed_precision=fp16 needs a GPU, and this trains on the CPU; give --mixed_precision bf16, or no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "accumulation", "said"), [(2, 2, True), (1, 1, False)])
def test_a_large_model_on_a_cpu_says_how_long_it_takes(tiny_model, merged_pairs, tmp_path, capsys, monkeypatch, steps, accumulation, said):
    """Before anything is encoded; and after two passes, if there are more."""
    given = {"optim__steps": steps, "optim__accumulation": accumulation, "data__cache": tmp_path / "cache"}
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "small", **given)) == 0
    assert "CPU" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(options(tiny_model, merged_pairs, tmp_path / "large", **given)) == 0
    out = capsys.readouterr().out
    assert out.index(f"no GPU is here: {tiny_model} runs on the CPU.") < out.index("24 pairs, ")
    assert len(re.findall(r"on the CPU this would take about \d+ seconds? in all", out)) == said


def test_targets_are_the_only_ones_there_are_unless_they_are_named(tmp_path):
    pairs, settings = write_pairs(tmp_path / "data"), TrainSettings("m", tmp_path / "run", DataSettings(tmp_path / "data"))
    assert with_targets(settings).data.targets == "soft"
    write_targets(pairs, "other", Targets(["p0"], np.ones(1), np.ones(1)), {})
    with pytest.raises(UserError, match=r"holds several targets \(other, soft\); name one with data.targets"):
        with_targets(settings)
    named = dataclasses.replace(settings, data=dataclasses.replace(settings.data, targets="other"))
    assert with_targets(named) is named
    none = dataclasses.replace(settings, data=DataSettings(tmp_path / "none"))
    assert with_targets(none) is none  # that there are none is told where they are read
