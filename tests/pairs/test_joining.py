"""Joining pair datasets: nothing is lost, labels keep what they mean, and a merge of the joined pairs is unbiased where shares differ."""

from __future__ import annotations

import numpy as np
import pytest

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels, Pair, Votes
from dedpo_diffusion.debias import merge_labels
from dedpo_diffusion.labels.files import CALIBRATED, align, label_names, read_labels, read_votes, write_labels, write_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.joining import join
from dedpo_diffusion.pipelines import pairs as stage
from support.pictures import picture


def dataset(folder, name: str, count: int, labelled: int, **extra):
    """`count` pairs called name-0, ..., all labelled by a judge and the first `labelled` by people."""
    with PairWriter(folder / name) as writer:
        for k in range(count):
            writer.add(Pair(f"{name}-{k}", f"prompt {k % 3}", picture(k), picture(k + 1000), {"model": "m"} if k % 2 else {}))
    ids = [f"{name}-{k}" for k in range(count)]
    write_labels(folder / name, "clip", Labels(ids, np.linspace(0.2, 0.9, count), {"score_0": [1.0] * count}), origin="clip")
    if labelled:
        found = {key: values[:labelled] for key, values in extra.items()}
        write_labels(folder / name, "human", Labels(ids[:labelled], np.tile([1.0, 0.0], count)[:labelled], found))
    return folder / name


def test_pairs_labels_and_votes_are_all_there(tmp_path):
    folders = [dataset(tmp_path, "a", 6, 3), dataset(tmp_path, "b", 4, 2)]
    for folder in folders:
        ids = [f"{folder.name}-0"] * 2
        write_votes(folder, "human", Votes(ids, np.array([1.0, 0.0]), np.array([1, 2]), ["ann", None], {"ranking": ["r", None]}))
    assert join(folders, tmp_path / "out") == []
    reader, parts = PairReader(tmp_path / "out"), [PairReader(folder) for folder in folders]
    assert reader.ids() == [pair_id for part in parts for pair_id in part.ids()]
    for k, pair in enumerate(pair for part in parts for pair in part.iter_pairs()):
        got = reader.pair(k)
        assert (got.prompt, got.image_0, got.image_1) == (pair.prompt, pair.image_0, pair.image_1)
        assert got.source["dataset"] == ("a" if k < 6 else "b") and got.source.get("model") == pair.source.get("model")
    for name in ("clip", "human"):
        joined = read_labels(tmp_path / "out", name)
        both = [read_labels(folder, name) for folder in folders]
        assert joined.pair_id == both[0].pair_id + both[1].pair_id
        np.testing.assert_array_equal(joined.label_0, np.concatenate([each.label_0 for each in both]))
    votes = read_votes(tmp_path / "out", "human")
    assert votes.rater == ["ann", None] * 2 and votes.votes.tolist() == [1, 2, 1, 2]
    assert votes.extra["ranking"] == ["0-r", None, "1-r", None]  # another ranking, whatever it was called


def test_joined_again_is_joined_at_once(tmp_path):
    a, b, c = (dataset(tmp_path, name, 4, 2) for name in "abc")
    join([a, b, c], tmp_path / "once")
    join([a, b], tmp_path / "ab")
    join([tmp_path / "ab", c], tmp_path / "twice")
    once, twice = (PairReader(tmp_path / name) for name in ("once", "twice"))
    assert list(once.iter_pairs()) == list(twice.iter_pairs())
    for name in label_names(tmp_path / "once"):
        first, second = (read_labels(tmp_path / folder, name) for folder in ("once", "twice"))
        assert (first.pair_id, first.label_0.tolist(), first.extra) == (second.pair_id, second.label_0.tolist(), second.extra)


def test_labels_of_unequal_shares_carry_their_propensity(tmp_path):
    join([dataset(tmp_path, "a", 8, 2), dataset(tmp_path, "b", 4, 4)], tmp_path / "out")
    assert read_labels(tmp_path / "out", "human").extra["propensity"] == [0.25] * 2 + [1.0] * 4
    join([tmp_path / "a", dataset(tmp_path, "c", 8, 2)], tmp_path / "even")
    assert "propensity" not in read_labels(tmp_path / "even", "human").extra
    stored = dataset(tmp_path, "d", 4, 2, propensity=[0.1, 0.7])
    join([tmp_path / "a", stored], tmp_path / "stored")
    assert read_labels(tmp_path / "stored", "human").extra["propensity"] == [0.25, 0.25, 0.1, 0.7]


@pytest.mark.slow
def test_a_merge_with_these_propensities_is_unbiased_and_without_them_it_is_not():
    """People answer 1 on all pairs of the first dataset and 0 on all of the second; the judge says the opposite of both."""
    truth = np.repeat([1.0, 0.0], 400)
    share, rng = np.repeat([0.05, 0.5], 400), np.random.default_rng(0)
    found = {True: [], False: []}
    for _ in range(300):
        human = np.where(rng.random(800) < share, truth, np.nan)
        for stated in found:
            merged = merge_labels(human, 1 - truth, method="dedpo", propensity=share if stated else None)
            found[stated].append((merged.weight * (merged.target - 0.5)).mean())
    error = {stated: abs(np.mean(values) - (truth - 0.5).mean()) / (np.std(values) / 300**0.5) for stated, values in found.items()}
    assert error[True] < 4 < 20 < error[False]


def test_what_stays_behind_is_told(tmp_path):
    a, b = dataset(tmp_path, "a", 4, 2), dataset(tmp_path, "b", 4, 0)
    write_labels(a, "adapt", Labels(["a-0"], np.array([0.5]), {}), origin=CALIBRATED)
    write_labels(a, "vlm", Labels([f"a-{k}" for k in range(4)], np.full(4, 0.5), {}))
    told = join([a, b], tmp_path / "out")
    assert label_names(tmp_path / "out") == ["clip", "human"]
    assert [line.split(":")[0] for line in told] == ["labels adapt stay behind", "labels human", "labels vlm stay behind"]
    assert "nobody labelled" in told[1] and "b" in told[1]
    ids = PairReader(tmp_path / "out").ids()
    assert np.isnan(align(read_labels(tmp_path / "out", "human"), ids, folder=tmp_path / "out", name="human")).sum() == 6


def test_clusters_of_two_datasets_stay_apart(tmp_path):
    a, b = (dataset(tmp_path, name, 4, 2, cluster=["x", "x"]) for name in "ab")
    c = dataset(tmp_path, "c", 4, 2)
    join([a, b, c], tmp_path / "out")
    found = read_labels(tmp_path / "out", "human").extra["cluster"]
    assert found[0] == found[1] != found[2] == found[3] and len(set(found)) == 4


def test_bad_input(tmp_path, capsys):
    a = dataset(tmp_path, "a", 4, 2)
    dataset(tmp_path / "x", "a", 4, 2)
    with pytest.raises(UserError, match="two of the datasets are called a"):
        join([a, tmp_path / "x" / "a"], tmp_path / "out")
    (tmp_path / "x" / "a").rename(tmp_path / "x" / "b")
    with pytest.raises(UserError, match=r"pair_id 'a-0' is in .* give every pair once"):
        join([a, tmp_path / "x" / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for given, message in (
        (["join", str(a)], "--others is missing"),
        (["export", str(a)], "--to is missing"),
        (["export", str(a), "--to", "csv", "--others", str(a)], "--others is for `dedpo pairs join`"),
        (["join", str(a), "--others", str(tmp_path / "none")], "holds no parquet files"),
    ):
        assert stage.main([*given, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    a, b = dataset(tmp_path, "a", 4, 2), dataset(tmp_path, "b", 4, 1)
    assert stage.main(["join", str(a), "--others", str(b), "--out", str(tmp_path / "out")]) == 0
    assert "8 pairs of 2 datasets" in capsys.readouterr().out
    assert stage.main(["join", str(a), "--others", str(b), "--out", str(tmp_path / "out")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
