"""Checkpoints that are damaged, and inputs that are no longer those of the run: noticed, named, never used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core import files
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Conditioning
from dedpo_diffusion.pipelines import export, train
from dedpo_diffusion.training import cache
from dedpo_diffusion.training.cache import PairCache
from dedpo_diffusion.weights import checkpoints
from dedpo_diffusion.weights import run_folder as runs
from dedpo_diffusion.weights.checkpoints import CHECKSUMS, check_checkpoint, save_checkpoint
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture

FILES = ["average.safetensors", "optimizer.safetensors", "parameters.safetensors", "state.json"]


def write_run(run: Path, *, steps: tuple[int, ...] = (3, 6)) -> Path:
    """Checkpoints of two small tensors, with everything that one may hold."""
    for step in steps:
        parameters = {"a": torch.nn.Parameter(torch.arange(3.0) + step), "b": torch.nn.Parameter(torch.ones(2, 2) * step)}
        optimizer = torch.optim.AdamW(parameters.values())
        sum(value.sum() for value in parameters.values()).backward()
        optimizer.step()
        save_checkpoint(runs.checkpoint_folder(run, step), parameters, optimizer, {"step": step}, parameters)
    return runs.checkpoint_folder(run, steps[-1])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))


def blank(file: Path) -> None:
    """What some file systems leave of a file that was not flushed: its size, but zeros."""
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = {"cut": cut, "flipped": flip, "blank": blank, "empty": lambda file: file.write_bytes(b""), "gone": Path.unlink}


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS])
@pytest.mark.parametrize("damage", [*DAMAGES])
def test_damage_of_every_kind_to_every_file_is_named_and_the_one_before_is_taken(tmp_path, capsys, name, damage):
    newest = write_run(tmp_path)
    assert runs.newest_checkpoint(tmp_path) == (6, newest)
    DAMAGES[damage](newest / name)
    if (name, damage) == (CHECKSUMS, "gone"):  # as one of an earlier version
        assert runs.newest_checkpoint(tmp_path) == (6, newest)
        return
    with pytest.raises(UserError, match=rf"step-00000006.{name}: (damaged|missing)"):
        check_checkpoint(newest)
    content = {file.name: file.read_bytes() for file in newest.iterdir()}
    assert runs.newest_checkpoint(tmp_path) == (3, runs.checkpoint_folder(tmp_path, 3))
    said = capsys.readouterr().out
    assert f"step-00000006/{name}" in said
    assert "damaged-step-00000006" in said
    assert {file.name: file.read_bytes() for file in (newest.parent / "damaged-step-00000006").iterdir()} == content
    assert runs.newest_checkpoint(tmp_path)[0] == 3
    assert capsys.readouterr().out == ""  # once


@pytest.mark.parametrize("name", [file for file in FILES if file != "state.json"])
def test_without_checksums_what_is_cut_or_blank_is_noticed_all_the_same(tmp_path, name):
    for damage in (cut, blank):
        newest = write_run(tmp_path)
        (newest / CHECKSUMS).unlink()
        assert runs.newest_checkpoint(tmp_path) == (6, newest)
        damage(newest / name)
        assert runs.newest_checkpoint(tmp_path)[0] == 3


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(tmp_path):
    for _ in range(3):
        cut(write_run(tmp_path) / "state.json")
        runs.newest_checkpoint(tmp_path)
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"step-00000003", "damaged-step-00000006", "damaged-step-00000006-1", "damaged-step-00000006-2"}


def test_where_none_is_whole_the_run_stops_and_nothing_is_touched(tmp_path):
    cut(write_run(tmp_path, steps=(3,)) / "parameters.safetensors")
    cut(write_run(tmp_path, steps=(6,)) / "optimizer.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step-00000006/optimizer.safetensors: damaged .* no other checkpoint is whole"):
            runs.newest_checkpoint(tmp_path)
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [3, 6]
    assert runs.newest_checkpoint(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["parameters", "average"])
def test_what_is_not_finite_replaces_no_checkpoint(tmp_path, bad, which):
    newest = write_run(tmp_path)
    before = (newest / "parameters.safetensors").read_bytes()
    parameters = {"a": torch.nn.Parameter(torch.ones(3))}
    broken = {"a": torch.tensor([1.0, bad, 1.0])}
    given = (parameters, broken) if which == "average" else (broken, parameters)
    with pytest.raises(UserError, match="not written, since a is no longer finite"):
        save_checkpoint(newest, given[0], torch.optim.AdamW(parameters.values()), {}, given[1])
    assert (newest / "parameters.safetensors").read_bytes() == before
    check_checkpoint(newest)


def test_a_pruned_checkpoint_never_looks_whole(tmp_path, monkeypatch):
    """Killed in the middle of removing one, a run finds the others, and removes the rest of it."""
    write_run(tmp_path, steps=(1, 2, 3))

    def dies(path, **_):
        (next(path.glob("param*"))).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("dedpo_diffusion.core.files.shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        runs.prune_checkpoints(tmp_path, 2)
    monkeypatch.undo()
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [2, 3]


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    names = {"dead": f".a.{files.HOST}.{process.pid}.tmp", "alive": f".a.{files.HOST}.{os.getpid()}.tmp", "elsewhere": ".a.other.1.tmp"}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text("half")
    (tmp_path / f".b.{files.HOST}.{process.pid}.tmp").write_text("half")
    (tmp_path / "kept.tmp").write_text("the user's")
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["alive"], names["elsewhere"], "kept.tmp"}


# ---- the command


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_pairs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(arguments(tiny_model, tiny_pairs, run, optim__average=0.9)) == 0
    return run


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_cut_goes_on_from_the_one_before(finished, tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings.replace(str(finished), str(run)))
    cut(run / "checkpoints" / "step-00000012" / "average.safetensors")
    assert export.main([str(run), "--out", str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "step-00000012/average.safetensors: damaged" in error
    assert "dedpo train" in error
    assert not (tmp_path / "x.safetensors").exists()
    assert train.main(arguments(tiny_model, tiny_pairs, run, optim__average=0.9)) == 0
    assert "resumes from step-00000009" in capsys.readouterr().out
    assert deviation(final(run), final(finished)) == (0, 0)
    for name in ("average", "optimizer"):
        file = f"checkpoints/step-00000012/{name}.safetensors"
        assert deviation(load_file(run / file), load_file(finished / file)) == (0, 0)
    assert metrics(run) == metrics(finished)
    assert export.main([str(run), "--out", str(tmp_path / "x.safetensors")]) == 0


def test_a_step_that_leaves_infinity_behind_is_not_saved(tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys):
    """Its loss and gradient were finite, only the step was too long: the line of metrics cannot tell."""
    real = torch.optim.AdamW.step

    def too_long(self, *given):
        found = real(self, *given)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data[0] = float("inf")
        calls.append(self)
        return found

    calls: list[object] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", too_long)
    changes = {"checkpoint_every": 2}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    assert "step-00000004: not written, since" in capsys.readouterr().err
    assert [step for step, _ in runs.checkpoints(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_a_gradient_that_breaks_between_log_lines_reaches_no_checkpoint(tiny_model, tiny_pairs, tmp_path, monkeypatch, capsys):
    real, calls = train.learn, []

    def poisoned(session, loaded):
        found = real(session, loaded)
        calls.append(1)
        if len(calls) == 5:  # step 5: neither logged nor saved
            next(iter(session.model.trainable().values())).grad[0] = float("nan")
        return found

    monkeypatch.setattr(train, "learn", poisoned)
    changes = {"log_every": 100, "checkpoint_every": 4}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 2
    assert "step 8: the loss is nan" in capsys.readouterr().err
    assert [step for step, _ in runs.checkpoints(tmp_path / "run")] == [4]
    assert all(torch.isfinite(value).all() for value in final(tmp_path / "run").values())
    monkeypatch.setattr(train, "learn", real)  # the cause is gone: the same command goes on, and equals a run that never met it
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 0
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", **changes)) == 0
    assert deviation(final(tmp_path / "run"), final(tmp_path / "whole")) == (0, 0)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


# ---- inputs that changed


def scaled(base: Path, folder: Path, part: str) -> Path:
    """The model with other weights in one part."""
    shutil.copytree(base, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * 1.5}, file, metadata={"format": "pt"})
    return folder


def folders(root: Path) -> list[Path]:
    """The caches in a folder, without the file that locks it."""
    return [path for path in root.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_base_model_that_changed_is_refused_and_gets_caches_of_its_own(tiny_model, tiny_pairs, tmp_path, capsys):
    """Another UNet shares the encoded pairs, but not the reference's errors; another VAE shares nothing."""
    root = tmp_path / "cache"
    options = {"data__cache": root, "data__reference_draws": 2, "optim__steps": 2}
    base = shutil.copytree(tiny_model, tmp_path / "model")
    assert train.main(arguments(base, tiny_pairs, tmp_path / "run", **options)) == 0
    (first,) = folders(root)
    (grid,) = first.glob("reference-*")
    held = {file: file.read_bytes() for file in first.rglob("*.safetensors")}
    for part, shared in (("unet", True), ("vae", False)):
        shutil.rmtree(base)
        scaled(tiny_model, base, part)
        capsys.readouterr()
        assert train.main(arguments(base, tiny_pairs, tmp_path / "run", **options)) == 2
        said = capsys.readouterr()
        assert "its inputs have changed since it began (base_model is " in " ".join(said.err.split())
        assert ("does not fit (encoders is " in " ".join(said.out.split())) != shared
        assert len(folders(root)) == (1 if shared else 2)
        assert len([path for path in first.glob("reference-*") if path != grid]) == 1
    assert {file: file.read_bytes() for file in held} == held
    shutil.rmtree(base)
    shutil.copytree(tiny_model, base)
    assert train.main(arguments(base, tiny_pairs, tmp_path / "run", **options)) == 0


def test_changed_pairs_are_refused(tiny_model, tiny_pairs, tmp_path, capsys):
    from support.pictures import write_pairs

    pairs = write_pairs(tmp_path / "data")
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", optim__steps=1)) == 0
    shutil.rmtree(pairs)
    write_pairs(pairs, shard_pairs=9)
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", optim__steps=1)) == 2
    assert "its inputs have changed since it began (pairs is " in " ".join(capsys.readouterr().err.split())


# ---- what encodes to NaN


def fill(folder: Path, *, views: int = 1, image: int | None = None, prompt: str = "none", bad: float = float("nan")) -> None:
    """A cache of 5 pairs in 2 shards, one of whose images or prompts encodes to something that is not finite."""

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = pixels[:, :1].clone()
        mean[mean == image] = bad
        return mean, torch.ones_like(mean)

    def embed(prompts) -> Conditioning:
        return Conditioning(torch.stack([torch.full((2, 3), bad if text == prompt else 1.0) for text in prompts]))

    def read(shard: int):
        for row in range(3 * shard, min(3 * shard + 3, 5)):
            for _ in range(views):
                yield torch.full((2, 3, 4, 4), float(row)), torch.zeros(2, 6)

    cache.fill(
        folder, identity={"views": views}, prompts=[f"prompt {k}" for k in range(5)], shards=[3, 2], read_shard=read,
        encode_images=encode, encode_prompts=embed, locate="row {} of it".format,
    )  # fmt: skip


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_encodes_to_nan_is_named_and_not_stored(tmp_path, views, bad):
    with pytest.raises(UserError, match=r"row 4 of it: the VAE's numbers"):
        fill(tmp_path / "c", views=views, image=4, bad=bad)
    assert cache.read_index(tmp_path / "c") is None
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["shard-00000.safetensors"]
    fill(tmp_path / "c", views=views)
    assert PairCache(tmp_path / "c").posterior(4)[0].flatten()[0] == 4


def test_a_prompt_that_encodes_to_nan_is_named_and_not_stored(tmp_path):
    with pytest.raises(UserError, match="'prompt 2'"):
        fill(tmp_path / "c", prompt="prompt 2")
    assert not list((tmp_path / "c").glob("text-*"))


def test_checksums_are_json_of_every_other_file(tmp_path):
    newest = write_run(tmp_path)
    assert sorted(json.loads((newest / CHECKSUMS).read_text())) == FILES
    assert checkpoints.load_part(newest, "average") is not None
