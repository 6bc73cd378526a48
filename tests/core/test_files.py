"""Whole or absent: atomic files, run folders, checkpoints, pixel views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dedpo_diffusion.core import files
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pairs.pixels import pair_views
from dedpo_diffusion.weights.checkpoints import load_checkpoint, save_checkpoint
from dedpo_diffusion.weights.run_folder import MetricsLog, checkpoint_folder, checkpoints, first_difference, open_run, prune_checkpoints


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_ordinary_mode_even_from_private_writers(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "ordinary").touch()
    with files.atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    with files.atomic_folder(tmp_path / "a") as folder:
        (folder / "one").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "a") as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def trained_optimizer(seed: int, steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parameters = {"a": torch.nn.Parameter(torch.randn(3)), "b": torch.nn.Parameter(torch.randn(2, 2))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    advance(parameters, optimizer, steps)
    return parameters, optimizer


def advance(parameters, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.sin().sum() for p in parameters.values()).backward()
        optimizer.step()


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    whole, _ = trained_optimizer(0, 9)
    part, optimizer = trained_optimizer(0, 4)
    save_checkpoint(tmp_path / "c", part, optimizer, {"step": 4})
    fresh, optimizer = trained_optimizer(1, 0)
    assert load_checkpoint(tmp_path / "c", fresh, optimizer) == {"step": 4}
    advance(fresh, optimizer, 5)
    assert all(torch.equal(whole[name], fresh[name]) for name in whole)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    parameters, optimizer = trained_optimizer(0, 1)
    save_checkpoint(tmp_path / "c", parameters, optimizer, {})
    with pytest.raises(ValueError, match="not this model's"):
        load_checkpoint(tmp_path / "c", {"a": parameters["a"]}, optimizer)
    with pytest.raises(ValueError, match="has shape"):
        load_checkpoint(tmp_path / "c", {"a": torch.nn.Parameter(torch.zeros(4)), "b": parameters["b"]}, optimizer)


def test_half_written_checkpoints_are_not_seen(tmp_path):
    parameters, optimizer = trained_optimizer(0, 1)
    for step in (5, 10, 15):
        save_checkpoint(checkpoint_folder(tmp_path, step), parameters, optimizer, {"step": step})
    (checkpoint_folder(tmp_path, 20)).mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 10, 15]
    prune_checkpoints(tmp_path, 2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 15]


def test_metrics_after_the_checkpoint_are_cut_and_a_torn_line_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


def test_a_run_killed_while_it_claimed_its_folder_can_begin_again(tmp_path):
    (tmp_path / ".settings.yaml.123.tmp").write_text("half")
    open_run(tmp_path, {"a": 1}, {"model": "x"})
    (tmp_path / "identity.json").unlink()  # killed between the two files
    open_run(tmp_path, {"a": 1}, {"model": "x"})
    with pytest.raises(UserError, match="model is 'x' there, 'y' now"):
        open_run(tmp_path, {"a": 1}, {"model": "y"})
    with pytest.raises(UserError, match="a is 1 there, 2 now"):
        open_run(tmp_path, {"a": 2}, {"model": "x"})


def test_first_difference_is_named():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there, 2 now"
    assert first_difference({}, {"c": 3}) == "c is None there, 3 now"


def ramp(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def test_views_of_a_pair_share_relative_place_and_flip():
    views = pair_views((ramp(64, 32), ramp(160, 80)), 16, place=(0.25, 0.5), flip=True)[0]
    assert views.shape == (2, 3, 16, 16)
    torch.testing.assert_close(views[0], views[1], atol=0.06, rtol=0)
    plain = pair_views((ramp(64, 32), ramp(160, 80)), 16, place=(0.25, 0.5))[0]
    assert torch.equal(plain.flip(-1), views)
    assert plain[0, 0].mean() < pair_views((ramp(64, 32), ramp(64, 32)), 16, place=(0.9, 0.5))[0][0, 0].mean()


def test_an_image_of_the_right_size_is_not_touched():
    image = ramp(16, 16)
    pixels = pair_views((image, image), 16)[0][0]
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(image))
