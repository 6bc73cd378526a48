"""How sample folders are brought together: reconciled by a stated rule, or refused with folder, row and remedy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.compare import compare
from dedpo_diffusion.evaluation.comparison.arms import categories, load_arms
from support.samples import PROMPTS, write_samples
from support.scores import BASE, put_scores, settings

STEPS = 0.1 * np.arange(12) - 0.3


@pytest.fixture
def pair(tmp_path):
    """Base and arm, the arm's gain another one in every row."""
    return [put_scores(write_samples(tmp_path / name), truth=BASE + gain) for name, gain in (("base", 0), ("tuned", STEPS))]


def rewrite(folder, change, scores=None):
    """Change the list of the index's rows, and score it again: by row of the new index, or as before by file."""
    before = {row["file"]: row["score"] for row in score.read_scores(folder, score.read_index(folder))}
    rows = change(score.read_index(folder))
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    put_scores(folder, truth=[before[row["file"]] for row in rows] if scores is None else scores)


def numbers(found):
    return {key: value for key, value in found.items() if key != "notes"}


# ---- reconciled


def reordered(rows):
    """Rows as of a prompt file in another order: rows and prompt_index in reverse."""
    return [row | {"prompt_index": len(PROMPTS) - 1 - row["prompt_index"]} for row in rows[::-1]]


def renumbered(rows):
    return [row | {"prompt_index": 3 * row["prompt_index"] + 17} for row in rows]


@pytest.mark.parametrize("change", [reordered, lambda rows: rows[5:] + rows[:5]])
@pytest.mark.parametrize("which", [0, 1])
def test_other_orders_are_paired_by_prompt_and_seed_and_told(pair, change, which):
    """Whichever folder it is; every gain is of its own pair."""
    before = compare(settings(pair))
    rewrite(pair[which], change)
    after = compare(settings(pair))
    assert numbers(after) == numbers(before)
    assert after["notes"] == ["tuned lists its images in another order than base; they are paired by prompt and seed."]
    arms, _ = load_arms(pair)
    assert [(row["prompt"], row["seed"]) for row in arms[0].rows] == [(row["prompt"], row["seed"]) for row in arms[1].rows]
    np.testing.assert_allclose(np.sort(arms[1].scores["truth"] - arms[0].scores["truth"]), STEPS, atol=1e-12)


def test_the_numbers_of_prompts_do_not_matter(pair):
    before = compare(settings(pair))
    rewrite(pair[1], renumbered)
    assert compare(settings(pair)) == before


def test_a_prompt_that_is_listed_twice_is_one_cluster(pair):
    """Prompts 0 and 1 have one text: five clusters of six entries, and an interval as of five."""

    def twice(rows):
        return [row | {"prompt": PROMPTS[1]} if row["prompt_index"] == 0 else row for row in rows]

    for folder in pair:
        rewrite(folder, twice)
    found = compare(settings(pair))
    assert found["n_prompts"] == 5 and found["notes"] == ["Of 6 prompts 5 differ; equal ones count as one prompt."]
    arms, _ = load_arms(pair)
    assert sorted(np.bincount(arms[0].prompts)) == [2, 2, 2, 2, 4] and (arms[0].prompts == arms[1].prompts).all()


def test_a_scorer_that_one_folder_lacks_is_left_out_and_told(pair):
    put_scores(pair[0], truth=BASE, beauty=BASE)
    found = compare(settings(pair))
    assert list(found["scorers"]) == ["truth"] and found["notes"] == ["beauty is left out: tuned has no scores of it."]


def with_categories(names):
    return lambda rows: [row | {"category": name} for row, name in zip(rows, names, strict=True)]


def test_categories_are_of_the_first_folder_that_has_them(pair):
    names = ["shape", "shape", None, *["size"] * 9]
    rewrite(pair[1], with_categories(names))
    arms, _ = load_arms(pair)
    assert categories(arms) == (names, [])
    rewrite(pair[0], with_categories(["colour", *names[1:]]))
    arms, _ = load_arms(pair)
    told = "1 image of tuned is of another category there than in base, whose categories count."
    assert categories(arms) == (["colour", *names[1:]], [told])


def resize(folder, size, *files):
    for file in files:
        Image.new("RGB", size).save(folder / file)
    put_scores(folder, truth=BASE)


def test_several_sizes_that_agree_between_arms_are_told(pair):
    for folder in pair:
        resize(folder, (96, 64), "1-0.png")
    assert compare(settings(pair))["notes"] == ["The images are of 2 sizes: 64 x 64, 96 x 64; each pair has one."]


# ---- refused


def damage_image(folder):
    (folder / "2-1.png").write_bytes(b"no image")
    put_scores(folder, truth=BASE)


def seeds_moved(rows):
    return [row | {"seed": row["seed"] + 5000} if row["prompt_index"] == 2 else row for row in rows]


def twice(folder):
    """The second image of prompt 0 is listed as one of its first too."""
    rows = score.read_index(folder)
    pq.write_table(pa.Table.from_pylist([*rows[1:], rows[1] | {"file": "0-0.png"}]), folder / "index.parquet")


def two_versions(folder):
    rows = score.read_scores(folder, score.read_index(folder))
    score.write_scores(folder, score.read_index(folder), [row | {"version": f"truth-{k // 6}"} for k, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: rewrite(f, seeds_moved),
            r"tuned is not paired with .*base: it has no image of prompt '.*' with seed 104, which is 2-0.png there",
        ),
        (
            lambda f: rewrite(f, lambda rows: rows[:10]),
            r"no image of .* seed 110, .*\(2 of the 12 images there have no partner here, 0 of 10 here none there\)",
        ),
        (twice, r"with seed 101 in row 0 and again in row 11"),
        (
            lambda f: resize(f, (32, 32), *(f"{i}-{k}.png" for i in range(6) for k in range(2))),
            "0-0.png is 32 x 32 pixels, .*0-0.png 64 x 64",
        ),
        (lambda f: resize(f, (64, 32), "3-1.png"), "tuned/3-1.png is 64 x 32 pixels, .*base/3-1.png 64 x 64: .* the same size"),
        (damage_image, "2-1.png: the image cannot be decoded"),
        (two_versions, "tuned holds no scores; run `dedpo score"),
    ],
)
def test_folders_that_do_not_go_together(pair, damage, message):
    damage(pair[1])
    with pytest.raises(UserError, match=message):
        compare(settings(pair))


def test_an_arm_with_more_images_than_the_base_is_refused(pair):
    rewrite(pair[0], lambda rows: rows[:10])
    with pytest.raises(UserError, match=r"tuned is not paired .*: it has an image of prompt .* seed 110, which is not there \(0 of the 10"):
        compare(settings(pair))


def test_categories_that_only_one_folder_tells_are_counted_apart_and_empty_ones_stay(pair):
    rewrite(pair[0], with_categories(["", "", None, None, *["size"] * 8]))
    rewrite(pair[1], with_categories(["", "shape", "shape", None, None, *["size"] * 7]))
    names, notes = categories(load_arms(pair)[0])
    assert names[:4] == ["", "", None, None]
    assert notes == [
        "1 image of tuned is of another category there than in base, whose categories count.",
        "1 image of tuned has a category there and none in base, whose categories count.",
    ]
