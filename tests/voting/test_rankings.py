"""Rankings of a prompt's images: groups, comparisons as one cluster, propensities, and the command over real HTTP."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Labels
from dedpo_diffusion.labels.files import read_labels, read_votes, write_labels
from dedpo_diffusion.pairs.dataset import PairReader
from dedpo_diffusion.pipelines import merge as merge_stage
from dedpo_diffusion.pipelines.vote import main
from dedpo_diffusion.settings import VoteSettings
from dedpo_diffusion.voting.opening import open_pairs
from dedpo_diffusion.voting.plan import Plan
from dedpo_diffusion.voting.rankings import Group, arrangement, find_groups, group_pairs, group_weights, ranks, written
from support.voting import client_of, command, finish, image_numbers, in_process, make_pairs, make_ranked, post

# ---- groups


def everyone(images: int, prompt: str = "x") -> list[tuple[str, str, bytes, bytes]]:
    return [(f"{prompt}{a}{b}", prompt, bytes([a]), bytes([b])) for a, b in itertools.combinations(range(images), 2)]


@pytest.mark.parametrize("images", [2, 3, 4, 9])
def test_all_pairs_of_k_images_are_one_group(images):
    [group] = group_pairs(everyone(images))
    assert group.size == images and len(group.pairs) == images * (images - 1) // 2 and group.complete


@given(st.randoms(use_true_random=False), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_the_order_of_pairs_and_sides_changes_no_group(random, images):
    pairs = everyone(images) + everyone(3, "y")
    turned = [(pair, prompt, *((b, a) if random.random() < 0.5 else (a, b))) for pair, prompt, a, b in pairs]
    random.shuffle(turned)

    def sets(groups):
        return {(group.prompt, group.size, len(group.pairs)) for group in groups}

    assert sets(group_pairs(turned)) == sets(group_pairs(pairs)) == {("x", images, images * (images - 1) // 2), ("y", 3, 3)}


def test_images_that_no_pair_joins_are_groups_of_their_own_and_the_same_image_twice_is_no_comparison():
    a, b, c, d = (bytes([k]) for k in range(4))
    groups = group_pairs([("p", "x", a, b), ("q", "x", c, d), ("r", "y", a, b), ("s", "x", a, a), ("t", "x", b, a)])
    assert [(group.name, group.size, group.pairs) for group in groups] == [
        ("p", 2, ((0, 0, 1), (4, 1, 0))),
        ("q", 2, ((1, 0, 1),)),
        ("r", 2, ((2, 0, 1),)),
    ]


def test_what_cannot_be_ranked_is_told(tmp_path):
    make_ranked(tmp_path / "d", prompts=2, images=11, keep=lambda p, a, b: p == 0 or (b < 4 and (a, b) != (0, 1)))
    kept, texts = find_groups(PairReader(tmp_path / "d"))
    assert [group.size for group in kept] == [4] and not kept[0].complete
    assert "1 prompts have more than 9 images" in texts[0] and "1 of 1 prompts lack some pairs" in texts[1]


def test_a_dataset_without_rankings_says_how_to_make_one(tmp_path):
    with (
        pytest.raises(UserError, match=r"nothing to rank; leave out --rank, or make pairs with .*--pairing all"),
        open_pairs(VoteSettings([make_pairs(tmp_path / "d", 3)], rank=True)),
    ):
        pass


# ---- rankings as text, and on the page


@given(st.permutations(list(range(5))), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_ranking_survives_being_written(order, tied):
    tiers: list[list[int]] = []
    for image, equal in zip(order, tied, strict=True):
        if equal and tiers:
            tiers[-1].append(image)
        else:
            tiers.append([image])
    assert ranks(written(tiers)) == {image: rank for rank, tier in enumerate(tiers) for image in tier}


def test_places_are_fair_and_a_repetition_shows_the_opposite():
    group = Group("g", "x", ((0, 0), (0, 1), (1, 1)), ())
    plan = Plan(["g"], seed=0)
    counts = np.zeros((3, 3))
    for rater in range(3000):
        shown = arrangement(plan, f"r{rater}", group, again=False)
        assert arrangement(plan, f"r{rater}", group, again=True) == shown[::-1]
        counts[range(3), shown] += 1
    assert abs(counts / 3000 - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 3000)


# ---- the command


def rank_all(client, rater: str, order_of, answers: list | None = None) -> list[dict]:
    """Rank everything as `order_of` says: (prompt, number) of each place -> places best first, in tiers."""
    known, sent = image_numbers(), []
    while (state := client.get("/api/next", params={"rater": rater}).json())["item"]:
        item = state["item"]
        shown = [known[client.get(url).content] for url in item["images"]]
        answer = order_of(shown)
        sent.append({"shown": shown, "answer": answer})
        post(client, "/api/vote", rater=rater, ticket=item["ticket"], answer=answer, seconds=6.0)
    return sent


def by_number(shown):
    """The lower its number the better, but images 1 and 2 tie."""
    places = {number: place for place, (_, number) in enumerate(shown)}
    return [[places[0]], [places[1], places[2]], [places[3]]]


def test_a_ranking_becomes_its_comparisons_as_one_cluster(tmp_path):
    folder = make_ranked(tmp_path / "d")
    with command(folder, "--rank", "true", "--repeats", "0", "--overlap", "1") as process:
        client = client_of(process.url)
        assert "drag an image" in client.get("/").text and client.get("/static/rank.js").status_code == 200
        sent = rank_all(client, "ann", by_number)
        code, out, _ = finish(process)
    assert code == 0 and len(sent) == 4 and "4 rankings (24 comparisons) by 1 person give 24 labels" in out
    votes, labels = read_votes(folder, "human"), read_labels(folder, "human")
    truth = {"01": 1.0, "02": 1.0, "03": 1.0, "12": 0.5, "13": 1.0, "23": 1.0}
    assert {pair: value for pair, value in zip(votes.pair_id, votes.label_0, strict=True)} == {
        f"p{p}-{ab}": value for p in range(4) for ab, value in truth.items()
    }
    clusters = dict(zip(votes.pair_id, votes.extra["ranking"], strict=True))
    assert len(set(clusters.values())) == 4 and all(clusters[f"p{p}-01"] == clusters[f"p{p}-23"] for p in range(4))
    assert labels.extra["cluster"] == [f"p{pair[1]}-01" for pair in labels.pair_id] and set(votes.extra["seconds"]) == {1.0}
    lines = [json.loads(line) for line in (folder / "votes" / "human.rankings.jsonl").read_text().splitlines()]
    assert [line["ranking"] for line in lines] == ["1", "2", "3", "4"] and [len(tier) for tier in lines[0]["tiers"]] == [1, 2, 1]
    assert "propensity" not in labels.extra


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("left", 400), ([], 400), ([[0, 1], [1, 2, 3]], 400), ([[0], [1], [2]], 400), ([[0], [1], [2], [4]], 400),
        ([[0, 1, 2, 3], []], 400), ([["0"], [1], [2], [3]], 400),
        ([[True], [1], [2], [3]], 400), ("0>1>2>3", 400), ([[3], [1, 0], [2]], 200), ("skip", 200),
    ],
)  # fmt: skip
def test_only_whole_rankings_are_taken(tmp_path, answer, status):
    with in_process(VoteSettings([make_ranked(tmp_path / "d")], rank=True, port=0)) as (service, url):
        client = client_of(url)
        ticket = client.get("/api/next", params={"rater": "ann"}).json()["item"]["ticket"]
        for _ in range(2):  # the same again changes nothing
            got = client.post("/api/vote", json={"rater": "ann", "ticket": ticket, "answer": answer, "seconds": 1})
            assert got.status_code == status, got.text
        assert len(service.store.events()) == (status == 200)
        assert client.get(f"/image/{ticket}/4").status_code == client.get(f"/image/{ticket}/left").status_code == 404


def test_undo_gives_the_same_images_again_in_the_same_places(tmp_path):
    with in_process(VoteSettings([make_ranked(tmp_path / "d")], rank=True, port=0, repeats=0.0)) as (service, url):
        client = client_of(url)
        first = client.get("/api/next", params={"rater": "ann"}).json()["item"]
        post(client, "/api/vote", rater="ann", ticket=first["ticket"], answer=[[0], [1], [2], [3]], seconds=1)
        assert post(client, "/api/undo", rater="ann")["item"] == first
        assert service.session()["votes"] == 0


def test_pairs_and_rankings_of_one_name_do_not_mix(tmp_path, capsys):
    folder = make_ranked(tmp_path / "d")
    for mine, other in (("true", "false"), ("false", "true")):
        name = f"human-{mine}"
        with command(folder, "--rank", mine, "--name", name):
            pass
        assert main([str(folder), "--rank", other, "--name", name, "--export_only", "true"]) != 0
        assert "was begun with rank" in capsys.readouterr().err


# ---- propensities: order by disagreement


def test_a_label_carries_its_groups_propensity(tmp_path):
    folder = make_ranked(tmp_path / "d", prompts=12)
    ids = PairReader(folder).ids()
    write_labels(folder, "judge", Labels(ids, np.random.default_rng(0).random(len(ids)), {}))
    asked = VoteSettings([folder], rank=True, port=0, order="disagreement", repeats=0.0, overlap=0.0)
    known = image_numbers(12)
    with in_process(asked) as (service, url):
        client = client_of(url)
        for _ in range(5):
            item = client.get("/api/next", params={"rater": "ann"}).json()["item"]
            assert all(client.get(image).content in known for image in item["images"])
            post(client, "/api/vote", rater="ann", ticket=item["ticket"], answer=[[0], [1], [2], [3]], seconds=1)
        assert post(client, "/api/export")["labels"] == 30
        plan, groups = service.plan, service.groups
    labels = read_labels(folder, "human")
    expected = dict(zip([groups[k].name for k in plan.order[:5]], plan.propensity(plan.order[:5], 5), strict=True))
    assert len(expected) == 5 and min(expected.values()) < 1
    assert labels.extra["propensity"] == [expected[cluster] for cluster in labels.extra["cluster"]]


def test_a_groups_pull_is_the_mean_of_its_pairs():
    groups = group_pairs(everyone(3) + everyone(2, "y"))
    np.testing.assert_allclose(group_weights(groups, np.array([0.1, 0.2, 0.6, 0.5])), [0.3, 0.5])


def test_propensities_make_the_mean_over_groups_unbiased():
    """sum(z / p) over the groups that came up estimates the sum over all, over many seeds."""
    rng = np.random.default_rng(0)
    weights, values, found = rng.uniform(0.5, 1, 40), rng.uniform(0, 1, 40), []
    for seed in range(400):
        plan = Plan([f"g{k}" for k in range(40)], seed=seed, weights=weights)
        asked = plan.order[:10]
        found.append(float(np.sum(values[asked] / plan.propensity(asked, 10))))
    assert abs(np.mean(found) - values.sum()) < 4 * np.std(found) / 20


# ---- merge


def test_merge_says_that_comparisons_of_a_ranking_depend_on_each_other(tmp_path, capsys):
    folder: Path = make_ranked(tmp_path / "d", prompts=30)
    ids = PairReader(folder).ids()
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(30) < 0.7, 6)  # a judge that errs on whole prompts
    human = rng.integers(0, 2, len(ids)).astype(float)
    write_labels(folder, "judge", Labels(ids, np.where(right, human, 1 - human) * 0.8 + 0.1, {}))
    some = np.arange(len(ids)) < 120
    told = Labels([ids[k] for k in np.flatnonzero(some)], human[some], {"cluster": [f"c{k // 6}" for k in np.flatnonzero(some)]})
    write_labels(folder, "human", told)
    assert merge_stage.main([str(folder), "--picture", "false"]) == 0
    told_of = json.loads((folder / "targets" / "tuned.json").read_text())
    assert told_of["clusters"] == 20 and told_of["agreement"]["independent"] < 30 < told_of["agreement"]["n"] == 120
    assert "the 120 come from 20 independent ones" in capsys.readouterr().out
    write_labels(folder, "human", Labels(told.pair_id, told.label_0, {}))
    assert merge_stage.main([str(folder), "--picture", "false"]) == 0
    assert "the 120 come from 20 independent ones" in capsys.readouterr().out  # pairs of one prompt, ranked or not
