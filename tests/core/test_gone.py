"""Options and values of earlier versions are refused by name, wherever they are given."""

from __future__ import annotations

import pytest

from dedpo_diffusion.core.gone import GONE, first_gone
from dedpo_diffusion.pipelines import main
from dedpo_diffusion.settings.training import Kind, ObjectiveSettings, OptimSettings, TrainSettings

REMOVED = [name.removeprefix("objective.kind=") for name in GONE if name.startswith("objective.kind=")]


@pytest.mark.parametrize("name", GONE)
def test_every_way_of_giving_it_is_noticed(name, tmp_path):
    option, _, value = name.partition("=")
    value = value or "2"
    *rooms, key = option.split(".")
    nested = {key: value}
    for room in reversed(rooms):
        nested = {room: nested}
    nested_text, file = str(nested).replace("'", '"'), tmp_path / "settings.yaml"
    file.write_text(nested_text)
    ways = [[f"--{option}", value], [f"--{option}={value}"]]
    ways += [[f"--{room}", f'{{"{key}": "{value}"}}'] for room in rooms]
    ways += [["--config", str(file)], [f"--config={file}"], ["--config", nested_text]]
    for way in ways:
        assert first_gone(["--out", "run", *way, "--seed", "1"]) == f"{name} {GONE[name]}"


def test_what_is_still_there_is_let_through(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    for given in (
        ["--objective.kind", "ipo"], ["--objective.power=adaptive"], ["--rounds", "2"], ["rounds"], ["--config"], ["--out", "hinge"],
        ["--config", str(tmp_path / "missing.yaml")], ["--config", str(tmp_path / "broken.yaml")], ["--config", "x" * 5000], [],
    ):  # fmt: skip
        assert first_gone(given) is None


def test_it_names_what_there_is():
    kinds = Kind.__args__
    assert not set(REMOVED) & set(kinds) and len(REMOVED) == 10
    for kind in REMOVED:
        assert f"objective.kind takes {', '.join(kinds[:-1])} or {kinds[-1]}" in GONE[f"objective.kind={kind}"]
    assert not {"rounds", "extrapolation"} & set(OptimSettings.__dataclass_fields__)
    assert "adafactor" not in OptimSettings.__annotations__["optimizer"]
    assert "guard" not in ObjectiveSettings.__dataclass_fields__ and "channels_last" not in TrainSettings.__dataclass_fields__


@pytest.mark.parametrize("stage", ["train", "merge"])
def test_a_stage_refuses_it_in_one_line(stage, capsys):
    assert main([stage, "--objective.power", "follow"]) == 2
    found = capsys.readouterr()
    assert found.err == f"dedpo {stage}: error: objective.power=follow is now objective.power=adaptive\n" and not found.out
