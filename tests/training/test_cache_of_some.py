"""Caches of the pairs that a run visits, where these are few: which folder, what it holds, and that nothing else changes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dedpo_diffusion.core import caches
from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.labels.files import write_targets
from dedpo_diffusion.pipelines import cache as listing
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.training.cache import PairCache, cache_folder, choose_folder
from support.pictures import write_pairs
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics  # noqa: F401 - one is a fixture

FEW = [1, 4, 10, 11, 17, 19]  # of 24 in shards of 10: two in the first, four in the second, none in the third
SHORT = {"optim__steps": 3, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = write_pairs(tmp_path_factory.mktemp("pairs") / "data")
    weight = np.zeros(24)
    weight[FEW] = 4.0
    write_targets(folder, "few", Targets([f"p{k}" for k in range(24)], np.tile([0.0, 1.0, 0.3], 8), weight), {"power": 0.0})
    return folder


def words(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def finished(folder):
    folder.mkdir()
    (folder / "index.json").write_text("{}")


def test_few_pairs_have_a_cache_of_their_own_unless_one_of_all_is_there(tmp_path):
    identity, few = {"pairs": "abc"}, np.array([2, 5])
    whole = cache_folder(tmp_path, identity)
    for rows in (None, np.arange(5), np.arange(10)):  # half of them or more
        assert choose_folder(tmp_path, identity, 10, rows) == (whole, None)
    own, held = choose_folder(tmp_path, identity, 10, few)
    assert own != whole and list(held) == [2, 5]
    assert choose_folder(tmp_path, identity, 10, few.astype(np.int32))[0] == own
    assert len({choose_folder(tmp_path, identity, 10, np.array(rows))[0] for rows in ([2, 5], [2, 6], [2, 5, 6], [5])}) == 4
    finished(whole)
    assert choose_folder(tmp_path, identity, 10, few) == (whole, None)
    finished(own)  # a run that began with it goes on with it
    assert choose_folder(tmp_path, identity, 10, few)[0] == own


STORED = pytest.param({"data__reference_draws": 3}, marks=pytest.mark.slow, id="stored")


@pytest.mark.parametrize("stored", [pytest.param({}, id="plain"), STORED])
def test_a_run_on_few_pairs_encodes_these_alone_and_is_the_same_to_the_bit(tiny_model, pairs, tmp_path, capsys, stored):
    changes = SHORT | stored | {"data__targets": "few"}
    root, other = tmp_path / "cache", tmp_path / "other"
    assert train.main(arguments(tiny_model, pairs, tmp_path / "few", data__cache=root, **changes)) == 0
    said = words(capsys)
    assert "6 of 24 pairs, those that this run visits, are encoded once" in said
    [held] = caches.list_caches(root)
    assert listing.main(["--folder", str(root)]) == 0
    assert f"6 of 24 of pairs {pairs.resolve()}, model {tiny_model}" in words(capsys)
    assert train.main(arguments(tiny_model, pairs, tmp_path / "all", data__cache=other, data__targets="soft", **SHORT)) == 0
    capsys.readouterr()
    assert train.main(arguments(tiny_model, pairs, tmp_path / "again", data__cache=other, **changes)) == 0
    assert "encoded once" not in words(capsys) and len(caches.list_caches(other)) == 1  # the one of all is there
    assert deviation(final(tmp_path / "few"), final(tmp_path / "again")) == (0, 0)
    assert metrics(tmp_path / "few") == metrics(tmp_path / "again")
    some, every = PairCache(held.folder), PairCache(caches.list_caches(other)[0].folder)
    assert some.rows.tolist() == FEW and some.counts == [2, 4, 0] and every.rows is None
    for row in FEW:
        for one, two in zip(some.posterior(row), every.posterior(row), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(some.embedding(row).text, every.embedding(row).text)
    assert torch.equal(some.originals(), every.originals()[FEW])
    for unknown in (0, 12, 23):
        with pytest.raises(ValueError, match=f"does not hold row {unknown}"):
            some.posterior(unknown)


@pytest.mark.slow
def test_the_references_errors_are_computed_for_visited_pairs_alone_and_added_to(tiny_model, pairs, tmp_path):
    changes = SHORT | {"data__reference_draws": 2}
    for name in ("one", "two"):
        assert train.main(arguments(tiny_model, pairs, tmp_path / "filled", data__cache=tmp_path / name, **SHORT)) == 0
        shutil.rmtree(tmp_path / "filled")

    def errors(name: str) -> torch.Tensor:
        return load_file(next((tmp_path / name).glob("*/reference-*/shard-00000.safetensors")))["errors"]

    few = changes | {"data__targets": "few", "data__cache": tmp_path / "one"}
    assert train.main(arguments(tiny_model, pairs, tmp_path / "few", **few)) == 0
    first = errors("one")
    assert (~first.isnan().flatten(1).any(dim=1)).nonzero().flatten().tolist() == FEW
    assert first.isnan().flatten(1).all(dim=1).sum() == 24 - len(FEW)
    assert train.main(arguments(tiny_model, pairs, tmp_path / "all", data__cache=tmp_path / "one", **changes)) == 0
    assert train.main(arguments(tiny_model, pairs, tmp_path / "at once", data__cache=tmp_path / "two", **changes)) == 0
    assert torch.equal(errors("one"), errors("two")) and torch.equal(errors("one")[FEW], first[FEW])
    assert deviation(final(tmp_path / "all"), final(tmp_path / "at once")) == (0, 0)


def test_targets_without_weight_are_refused_before_anything_is_encoded(tiny_model, pairs, tmp_path, capsys):
    write_targets(pairs, "none", Targets([f"p{k}" for k in range(24)], np.full(24, 0.5), np.zeros(24)), {"power": 0.0})
    changes = SHORT | {"data__targets": "none", "data__cache": tmp_path / "cache"}
    assert train.main(arguments(tiny_model, pairs, tmp_path / "run", **changes)) == 2
    assert "no pair carries any weight" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()
