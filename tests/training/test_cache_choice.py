"""data.cache and data.reference_draws of auto: when they pay, what a full disk and another version do, and that nothing else changes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from dedpo_diffusion.core import caches
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.settings import DataSettings, OptimSettings, TrainSettings
from dedpo_diffusion.training import cache, cache_choice
from dedpo_diffusion.training.cache_choice import decide
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture


def chosen(pairs: int = 1000, processes: int = 1, steps: int = 500, **data) -> DataSettings:
    return decide(TrainSettings("m", Path("out"), DataSettings(Path("p"), **data), optim=OptimSettings(steps=steps)), pairs, processes).data


def test_a_cache_is_kept_where_pairs_are_visited_again_and_it_saves_much():
    assert chosen(steps=500).cache == caches.user_root()  # 4 a step: 2000 visits of 1000 pairs
    assert chosen(steps=499).cache is None
    assert chosen(steps=250, processes=2).cache == caches.user_root()
    assert chosen(pairs=10, steps=250).cache is None  # it saves too little
    assert chosen(flip=True).cache is None  # drawn anew at every visit
    assert chosen(flip=True, views=2, steps=1000).cache == caches.user_root()
    assert chosen(cache=None).cache is None and chosen(cache=Path("c"), steps=1).cache == Path("c")


def test_what_needs_a_cache_gets_one():
    for option in ({"buckets": True}, {"groups": 3}, {"reference_draws": 2}):
        assert chosen(steps=1, **option).cache == caches.user_root()


def test_reference_errors_are_stored_where_pairs_are_visited_more_often_than_they_have_draws(capsys):
    assert chosen(pairs=100, steps=201, reference_draws="auto").reference_draws == 8
    assert "8.0 visits of each pair: the reference's errors are stored at 8 draws of each" in capsys.readouterr().out
    assert chosen(pairs=100, steps=200, reference_draws="auto").reference_draws is None
    assert "computed at every visit" in capsys.readouterr().out
    assert chosen(pairs=100, steps=1, reference_draws="auto", noise="inverted").reference_draws == 8


@pytest.fixture
def eager(monkeypatch, tmp_path):
    """A cache pays from the first visit on, in a folder of this test."""
    monkeypatch.setattr(cache_choice, "VISITS", 0)
    monkeypatch.setattr(cache_choice, "SAVED", -1000)
    monkeypatch.setenv("DEDPO_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


FEW = {"optim__steps": 3, "checkpoint_every": 3}


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_users_cache_changes_nothing_of_a_run_and_is_told(tiny_model, tiny_pairs, tmp_path, eager, capsys):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "live", data__cache="null", **FEW)) == 0
    assert not eager.exists() and "encoded once" not in said(capsys)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "kept", **FEW)) == 0
    [held] = caches.list_caches(eager)
    assert held.whole and held.about["pairs"] == str(tiny_pairs.resolve()) and held.about["model"] == str(tiny_model)
    words = said(capsys)
    assert f"encoded once, into {held.folder}: about" in words and f"{held.folder} holds {size_words(held.size)}" in words
    number, unit = words.split(f"{held.folder}: about ")[1].split()[:2]
    expected = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert 0.3 < expected / held.size < 1.5  # these files are so small that their headers count
    assert deviation(final(tmp_path / "live"), final(tmp_path / "kept")) == (0, 0)
    assert metrics(tmp_path / "live") == metrics(tmp_path / "kept")
    assert not caches.in_use(held.folder)
    assert "cache: auto" in (tmp_path / "kept" / "settings.yaml").read_text()


def test_a_run_goes_on_without_the_cache_that_it_began_with(tiny_model, tiny_pairs, tmp_path, eager):
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "whole", **FEW)) == 0
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **FEW | {"optim__steps": 2, "checkpoint_every": 2})) == 0
    [held] = caches.list_caches(eager)
    caches.remove(held.folder)
    changes = {"optim__steps": 3, "checkpoint_every": 2, "data__cache": "null"}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **changes)) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "run")) == (0, 0)


@pytest.mark.parametrize("meets", ["room", "fill"])
def test_a_disk_too_full_for_a_cache_loses_nothing(tiny_model, tiny_pairs, tmp_path, eager, capsys, monkeypatch, meets):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if meets == "room":
        monkeypatch.setattr(cache, "ROOM", 0.0)
    else:
        monkeypatch.setattr(cache, "save_file", full)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", **FEW)) == 0
    assert "has no room for a cache of these pairs; they are encoded at every visit" in said(capsys)
    assert caches.list_caches(eager) == [] and not list(eager.rglob("*.safetensors"))
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "live", data__cache="null", **FEW)) == 0
    assert deviation(final(tmp_path / "live"), final(tmp_path / "run")) == (0, 0)


def test_a_full_disk_stops_a_run_that_asked_for_a_cache(tiny_model, tiny_pairs, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "run", data__cache=tmp_path / "cache", **FEW)) == 2
    assert "no space left on its disk" in said(capsys)
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_cache_of_another_version_is_refused_or_made_anew_in_words(tiny_model, tiny_pairs, tmp_path, capsys, monkeypatch):
    changes = FEW | {"data__cache": tmp_path / "cache"}
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "one", **changes)) == 0
    [held] = caches.list_caches(tmp_path / "cache")
    about = held.folder / "about.json"
    about.write_text(json.dumps(held.about | {"layout": 3}))
    capsys.readouterr()
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "two", **changes)) == 2
    assert "made by another version of this program; remove it" in said(capsys)
    about.write_text(json.dumps(held.about))
    monkeypatch.setattr(cache, "LAYOUT", 5)  # a later version
    assert train.main(arguments(tiny_model, tiny_pairs, tmp_path / "two", **changes)) == 0
    assert f"{held.folder} was made by another version; it is made anew" in said(capsys)
    assert len(caches.list_caches(tmp_path / "cache")) == 2
    assert deviation(final(tmp_path / "one"), final(tmp_path / "two")) == (0, 0)
