"""Time to reward: when a curve passes a gain, ratios over seeds, and two arms end to end."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation.benchmarks import time_to_reward
from dedpo_diffusion.evaluation.benchmarks.time_to_reward import DEVICES, RewardSettings, check, ratios, reached, summarise
from support.training import fresh_accelerate_state  # noqa: F401 - a fixture


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": k, "seconds": seconds, "images": 10 * seconds, "gain": gain} for k, (seconds, gain) in enumerate(points, 1)]


def test_a_gain_is_read_off_straight_lines_from_nothing_on():
    found = curve((10.0, 0.1), (20.0, 0.05), (30.0, 0.25))
    assert reached(found, 0.05, "seconds") == pytest.approx(5.0)
    assert reached(found, 0.1, "seconds") == 10.0
    assert reached(found, 0.15, "seconds") == pytest.approx(25.0)
    assert reached(found, 0.15, "images") == pytest.approx(250.0)
    assert reached(found, 0.26, "seconds") is None


@given(st.lists(st.floats(-0.1, 0.3), min_size=1, max_size=6), st.floats(0.001, 0.2), st.floats(0.001, 0.2))
def test_a_larger_gain_is_never_reached_earlier(gains, one, other):
    found = curve(*((float(k), gain) for k, gain in enumerate(gains, 1)))
    first, second = (reached(found, gain, "seconds") for gain in sorted((one, other)))
    assert second is None or (first is not None and first <= second)
    assert (first is None) == (max(gains) < min(one, other))


def test_ratios_are_geometric_means_and_missed_marks_are_counted():
    curves = {
        "published": {0: curve((40.0, 0.2)), 1: curve((40.0, 0.2)), 2: curve((40.0, 0.2))},
        "cached": {0: curve((10.0, 0.2)), 1: curve((40.0, 0.4)), 2: curve((10.0, 0.1))},
    }
    found = ratios(curves, "cached", 1.0, "seconds")
    assert found["ratio"] == pytest.approx(math.sqrt(4 * 2)) and (found["seeds"], found["missed"]) == (2, 1)
    low, high = found["ci"]
    assert low * high == pytest.approx(found["ratio"] ** 2) and low < found["ratio"] < high
    half = ratios(curves, "cached", 0.5, "seconds")
    assert half["seeds"] == 3 and half["missed"] == 0 and half["ratio"] == pytest.approx(np.exp(np.mean(np.log([4, 2, 2]))))
    same = ratios(curves | {"cached": curves["published"]}, "cached", 1.0, "images")
    assert same["ratio"] == pytest.approx(1) and same["ci"] == pytest.approx([1, 1])
    table = summarise(curves, [0.5, 1.0])
    assert table["published"]["seconds"]["mean"] == 40 and "published_seconds_over_its" not in table["published"]
    assert table["cached"]["published_seconds_over_its"]["1"] == found


def test_a_published_run_that_gains_nothing_makes_no_mark():
    curves = {"published": {0: curve((40.0, -0.1))}, "cached": {0: curve((10.0, 0.2))}}
    assert ratios(curves, "cached", 1.0, "seconds") == {"seeds": 0, "missed": 1, "ratio": None, "ci": None}


def test_bad_settings(tmp_path):
    given = {"work": tmp_path, "out": tmp_path / "x.json"}
    for changed, words in (
        ({"arms": ["cached"]}, "published, which makes the marks"),
        ({"arms": ["published", "cashed"]}, "others of live, cached"),
        ({"steps": 10, "every": 3}, "multiple of every"),
        ({"images": 4}, "multiples of the 6 pairs"),
        ({"arms": ["published", "groups"]}, "more than two images"),
        ({"arms": ["published", "groups"], "images": 3, "pool": 1599, "pairs": 801}, "a divisor of twice the batch"),
    ):
        with pytest.raises(UserError, match=words):
            check(RewardSettings(**given, **changed))


def test_each_arm_adds_a_device_to_one_before_it():
    names = list(DEVICES)
    for name in names[1:]:
        added = [len(set(DEVICES[name].items()) - set(DEVICES[other].items())) for other in names[: names.index(name)]]
        assert min(added) == (2 if name == "groups" else 1), "groups, and how many of them are as many images"


@pytest.mark.slow
def test_two_arms_end_to_end_and_a_stopped_run_goes_on(tmp_path):
    out, work = tmp_path / "found.json", tmp_path / "work"
    argv = [
        "--work", str(work), "--out", str(out), "--arms", "published", "stored", "--seeds", "[0, 1]", "--steps", "2", "--every", "1",
        "--batch", "2", "--pool", "12", "--pairs", "8", "--prompts", "4", "--strengths", "[1, 2]",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert time_to_reward.main(argv) == 0
        found = json.loads(out.read_text())
        assert [len(curve) for seeds in found["curves"].values() for curve in seeds.values()] == [2] * 4
        for seeds in found["curves"].values():
            for points in seeds.values():
                assert [point["step"] for point in points] == [1, 2]
                assert 0 < points[0]["seconds"] < points[1]["seconds"] and 0 < points[0]["images"] < points[1]["images"]
        images = {arm: points["0"][1]["images"] - points["0"][0]["images"] for arm, points in found["curves"].items()}
        assert images == {"published": 2 * 2 * 2, "stored": 2 * 2}  # a step: two images a pair, and the reference's
        assert list(work.glob("runs/*")) == list(work.glob("caches/*")) == []
        kept = work / "done" / "stored-1.json"
        kept.unlink()
        before = {file: file.stat().st_mtime_ns for file in (work / "done").glob("*.json")}
        assert time_to_reward.main(argv) == 0
        assert kept.is_file() and all(file.stat().st_mtime_ns == then for file, then in before.items())
        assert json.loads(out.read_text())["curves"]["published"] == found["curves"]["published"]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_rankings_in_groups_take_as_many_images_a_step(tmp_path):
    """8 images a step, as 4 pairs and as 2 groups, with the reference's; `own` has the reference's errors from before the first step."""
    argv = [
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json"), "--arms", "published", "groups", "own", "--images", "4",
        "--seeds", "[0, 0]", "--steps", "2", "--every", "1", "--batch", "4", "--pool", "12", "--pairs", "12", "--prompts", "4",
        "--strengths", "[1, 2]",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert time_to_reward.main(argv) == 0
    finally:
        torch.set_num_threads(threads)
    curves = json.loads((tmp_path / "found.json").read_text())["curves"]
    images = {arm: points["0"][1]["images"] - points["0"][0]["images"] for arm, points in curves.items()}
    assert images == {"published": 16, "groups": 16, "own": 8}
