"""data.cluster_weights: each pair of a prompt of many counts less; the sum of weights, labels and the order of rows do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.records import Targets
from dedpo_diffusion.labels.files import read_targets, write_targets
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines import train
from dedpo_diffusion.training.cluster_weights import cluster_factors
from dedpo_diffusion.training.data import PairLoader
from support.rankings import write_rankings
from support.training import arguments, deviation, final, fresh_accelerate_state, metrics, stop_after  # noqa: F401 - one is a fixture

# ---- the factors


@pytest.mark.parametrize(("kind", "expected"), [("none", [4, 1, 3]), ("sqrt", [2, 1, 3**0.5]), ("equal", [1, 1, 1])])
def test_a_prompt_counts_in_proportion_to_its_pairs_to_their_root_or_like_any_other(kind, expected):
    prompts = list("aabacacc")  # 4 of a, 1 of b, 3 of c
    factor = cluster_factors(prompts, kind, np.ones(8))
    totals = np.array([factor[[prompt == name for prompt in prompts]].sum() for name in "abc"])
    np.testing.assert_allclose(totals, np.array(expected) * 8 / sum(expected), rtol=1e-14)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=1, max_size=40), st.sampled_from(["none", "sqrt", "equal"]))
def test_the_sum_of_the_weights_stays_and_the_order_of_the_rows_is_of_no_matter(rows, kind):
    prompts, weight = [str(prompt) for prompt, _ in rows], np.array([w for _, w in rows])
    factor = cluster_factors(prompts, kind, weight)
    assert (factor > 0).all() and float(weight @ factor) == pytest.approx(weight.sum())
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    turned = cluster_factors([prompts[k] for k in order], kind, weight[order])
    assert np.array_equal(turned, factor[order])


def test_who_was_labelled_has_no_part_in_how_prompts_compare():
    """Whatever carries weight, here only some labelled pairs: the factors of any two pairs stay in one ratio."""
    prompts, rng = list("aaabbbbbbc"), np.random.default_rng(0)
    everyone = cluster_factors(prompts, "sqrt", np.ones(10))
    for _ in range(20):
        h = np.where(rng.random(10) < 0.4, 2.5, 0.0) + 1e-9
        factor = cluster_factors(prompts, "sqrt", h)
        np.testing.assert_allclose(factor / factor[0], everyone / everyone[0])


# ---- the loader


class Flat:
    """A source of pairs of one shape that are never asked for."""

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        return np.tile((4, 8, 8), (len(rows), 1))


def loader_of(folder, kind: str, **options) -> PairLoader:
    given = {"targets": "soft", "seed": 0, "sampling": "importance", "together": 2} | options
    return PairLoader(PairReader(folder), Flat(), cluster_weights=kind, **given)


def by_pair(loader: PairLoader, folder) -> dict[str, float]:
    """What each visited pair counts in the mean over visits: its weight times how often it is visited."""
    ids = PairReader(folder).ids()
    counted = loader.weight.double().numpy() * loader.visits.probability
    return {ids[row]: float(value) for row, value in zip(loader.rows, counted, strict=True)}


def test_the_mean_over_visits_is_the_weighted_mean_and_none_changes_nothing(tmp_path, capsys):
    folder = write_rankings(tmp_path / "data", [4, 3, 2])
    plain, equal = (by_pair(loader_of(folder, kind), folder) for kind in ("none", "equal"))
    told = " ".join(capsys.readouterr().out.split())
    assert "data.cluster_weights equal: 3 prompts of 1 to 6 pairs" in told and told.count("data.cluster_weights") == 1
    merged, prompts = read_targets(folder, "soft"), PairReader(folder).prompts()
    assert plain == pytest.approx(dict(zip(merged.pair_id, merged.weight / 10, strict=True)), rel=1e-6)
    factor = cluster_factors(prompts, "equal", merged.weight)
    assert equal == pytest.approx(dict(zip(merged.pair_id, merged.weight * factor / 10, strict=True)), rel=1e-6)
    assert sum(equal.values()) == pytest.approx(sum(plain.values()), rel=1e-6)


def test_rows_in_another_order_give_the_same_weights(tmp_path):
    folder = write_rankings(tmp_path / "data", [4, 3, 2], left_out=1)
    pairs, merged = list(PairReader(folder).iter_pairs()), read_targets(folder, "soft")
    order = np.random.default_rng(3).permutation(len(pairs))
    with PairWriter(tmp_path / "turned") as writer:
        for k in order:
            writer.add(pairs[k])
    write_targets(tmp_path / "turned", "soft", Targets([merged.pair_id[k] for k in order], merged.target[order], merged.weight[order]), {})
    assert by_pair(loader_of(folder, "sqrt"), folder) == pytest.approx(by_pair(loader_of(tmp_path / "turned", "sqrt"), tmp_path / "turned"))


# ---- real runs


USUAL = {"optim__steps": 6, "checkpoint_every": 2, "optim__batch": 2, "data__sampling": "importance"}


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["null", "4"])
def test_a_run_resumes_to_the_bit_and_differs_from_one_without(tiny_model, tmp_path, monkeypatch, capsys, groups):
    pairs, cache = write_rankings(tmp_path / "data", [4, 3, 2], left_out=1), tmp_path / "cache"
    runs = {"whole": "equal", "part": "equal", "plain": "none"}
    options = USUAL | {"data__cache": cache, "data__groups": groups}
    argv = {name: arguments(tiny_model, pairs, tmp_path / name, data__cluster_weights=kind, **options) for name, kind in runs.items()}
    assert train.main(argv["whole"]) == 0
    assert "data.cluster_weights equal" in capsys.readouterr().out
    assert train.main(argv["plain"]) == 0
    stop_after(monkeypatch, 2)
    assert train.main(argv["part"]) == 130
    assert train.main(argv["part"]) == 0
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "part")) == (0, 0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    assert deviation(final(tmp_path / "whole"), final(tmp_path / "plain"))[0] > 0


@pytest.mark.parametrize("power", ["adaptive", "measured"])
def test_a_power_that_counts_pairs_alike_is_refused(tmp_path, power, capsys):
    options = {"data__cluster_weights": "sqrt", "objective__power": power}
    assert train.main(arguments(tmp_path / "none", tmp_path / "pairs", tmp_path / "run", **options)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"data.cluster_weights=sqrt does not go with objective.power={power}" in told


def test_another_name_is_refused(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "none", tmp_path / "pairs", tmp_path / "run", data__cluster_weights="half")) == 2
    assert "cluster_weights" in capsys.readouterr().err
