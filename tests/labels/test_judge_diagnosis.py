"""Where a judge errs: planted biases are named, nothing is named without one, and sides mean nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from dedpo_diffusion.labels.calibration import calibrate
from dedpo_diffusion.labels.image_statistics import image_statistics
from dedpo_diffusion.labels.judge_diagnosis import diagnose
from dedpo_diffusion.shapes import oracle, world
from support.scenes import scenes


@dataclasses.dataclass
class Shapes:
    """N pairs: true rewards (N, 2), `blind` ones without the term for cleanliness, statistics (N, 2)."""

    prompts: list[str]
    images: list[tuple[Image.Image, Image.Image]]
    rewards: np.ndarray
    blind: np.ndarray
    statistics: dict[str, np.ndarray]

    @property
    def logit(self) -> np.ndarray:
        return (self.rewards[:, 0] - self.rewards[:, 1]) / oracle.TEMPERATURE

    def people(self, rng: np.random.Generator) -> np.ndarray:
        return (rng.random(len(self.logit)) < expit(self.logit)).astype(float)

    def apart(self, name: str) -> np.ndarray:
        """(N,) difference of a statistic, in its standard deviations."""
        d = self.statistics[name][:, 0] - self.statistics[name][:, 1]
        return d / d.std()

    def diagnose(self, z: np.ndarray, g: np.ndarray, **options) -> dict:
        return diagnose(z, g, prompts=self.prompts, statistics=self.statistics, **{"resamples": 50, **options})


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    prompts, images = scenes(320, 0)
    found = [[image_statistics(image) for image in two] for two in images]
    statistics = {key: np.array([[one[key], other[key]] for one, other in found]) for key in found[0][0]}
    read = [[oracle.terms(prompt, oracle.read(image)) for image in two] for prompt, two in zip(prompts, images, strict=True)]
    terms = np.array([[[terms[name] for name in oracle.TERMS] for terms in two] for two in read])
    assert oracle.TERMS[-1] == "clean"
    return Shapes(prompts, images, terms.mean(axis=-1), terms[..., :-1].mean(axis=-1), statistics)


def named(report: dict) -> list[str]:
    return [lean["statistic"] for lean in report["leans"] if lean["named"]]


# ---- image statistics


def test_a_mirrored_image_has_the_same_statistics(shapes):
    for image in [two[0] for two in shapes.images[:5]] + [Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50)]:
        there = image_statistics(image)
        for turned in (ImageOps.mirror(image), ImageOps.flip(image)):
            assert image_statistics(turned) == pytest.approx(there, abs=2e-3)


def test_each_statistic_means_what_its_name_says(shapes):
    image = shapes.images[0][0]
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    plain = image_statistics(image)
    assert image_statistics(image.point(lambda v: v + 10))["brightness"] == pytest.approx(plain["brightness"] + 10 / 255, abs=0.01)
    assert image_statistics(image.point(lambda v: 128 + (v - 128) // 3))["contrast"] < plain["contrast"]
    assert image_statistics(image.convert("L"))["saturation"] == 0 < plain["saturation"]
    assert image_statistics(image.filter(ImageFilter.GaussianBlur(2)))["sharpness"] < plain["sharpness"]
    assert image_statistics(noise)["detail"] > plain["detail"] > image_statistics(Image.new("RGB", (9, 9)))["detail"] == 0
    red, grey = (image_statistics(Image.new("RGB", (300, 100), colour)) for colour in ((255, 0, 0), (127, 127, 127)))
    assert red["warmth"] == red["saturation"] == 1 and grey["warmth"] == 0
    assert grey["sharpness"] == -6 and grey["brightness"] == pytest.approx(127 / 255) and grey["contrast"] < 1e-6
    assert (red["pixels"], red["aspect"]) == (0.03, 3.0)


def test_clutter_is_detail():
    rng = np.random.default_rng(0)
    attributes = world.VOCABULARY[5]
    clean, cluttered = (
        np.mean([image_statistics(world.render(world.sample_scene(rng, attributes, clutter=share)))["detail"] for _ in range(10)])
        for share in (0.0, 1.0)
    )
    assert cluttered > 1.2 * clean


def test_statistics_do_not_grow_with_the_image(shapes):
    image = shapes.images[0][0].resize((256, 256), Image.Resampling.BILINEAR)
    large = image_statistics(image.resize((1024, 1024), Image.Resampling.NEAREST))
    assert large == pytest.approx(image_statistics(image) | {"pixels": 1024**2 / 1e6}, abs=1e-3)


# ---- planted biases


@pytest.mark.parametrize("name", ["brightness", "saturation", "detail"])
def test_a_planted_bias_is_named_first(shapes, name):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        for scale in (0.5, 4.0):  # over- and under-confidence are no lean
            d = (shapes.logit + 4 * shapes.apart(name)) * scale
            report = shapes.diagnose(shapes.people(rng), expit(d), scores=np.stack([d, np.zeros_like(d)], axis=1))
            first = report["leans"][0]
            assert first["statistic"] == name and first["named"] and first["value"] > 0 and first["kind"] == "likes"
            assert first["ci"][0] > 0 and first["joint"]["value"] > 0 and first["follows"] is None
            assert "leans to the " in report["sentences"][1] and "relative to people" in report["sentences"][1]


def test_a_judge_blind_to_clutter_overlooks_it(shapes):
    scores = shapes.blind / oracle.TEMPERATURE
    report = shapes.diagnose(shapes.people(np.random.default_rng(1)), expit(scores[:, 0] - scores[:, 1]), scores=scores)
    detail = next(lean for lean in report["leans"] if lean["statistic"] == "detail")
    assert detail["named"] and detail["people"] < detail["judge"] and detail["kind"] == "overlooks"
    assert report["leans"][0]["statistic"] in {"detail", detail["follows"]}


def test_what_only_goes_along_is_marked(shapes):
    rng = np.random.default_rng(0)
    glow = shapes.statistics["brightness"] + 0.1 * rng.standard_normal((len(shapes.logit), 2))
    d = shapes.logit + 6 * shapes.apart("brightness")
    statistics = {"glow": glow, "brightness": shapes.statistics["brightness"]}
    report = diagnose(shapes.people(rng), expit(d), prompts=shapes.prompts, statistics=statistics, resamples=50)
    assert named(report) == ["brightness", "glow"]
    assert report["leans"][1]["follows"] == "brightness" and "Along with it go glow" in report["sentences"][1]


@pytest.mark.slow
def test_a_judge_like_people_is_rarely_accused(shapes):
    """The chance of any accusation is 5 % by Holm: more than 2 of 20 have a probability of 8 %, more than 16 of 200 one of 2 %."""
    rng = np.random.default_rng(11)
    assert sum(bool(named(shapes.diagnose(shapes.people(rng), expit(shapes.logit)))) for _ in range(20)) <= 2
    quick = dataclasses.replace(shapes, prompts=[str(shapes.prompts.index(prompt)) for prompt in shapes.prompts])  # no words to look at
    hard = [bool(named(quick.diagnose(shapes.people(rng), shapes.people(rng), resamples=2))) for _ in range(200)]
    assert sum(hard) <= 16


# ---- how good the labels are


def test_auc_is_sklearns_on_the_data_and_their_mirror_image(shapes):
    rng = np.random.default_rng(0)
    z, d = shapes.people(rng), np.round(shapes.logit + rng.standard_normal(len(shapes.logit)))  # rounded: with ties
    z[:20] = 0.5
    report = shapes.diagnose(z, expit(d), scores=np.stack([d, np.zeros_like(d)], axis=1), resamples=300)
    truth = roc_auc_score(np.concatenate([z[20:], 1 - z[20:]]), np.concatenate([d[20:], -d[20:]]))
    assert report["auc"]["value"] == pytest.approx(truth, abs=1e-12) and report["auc"]["n"] == len(z) - 20
    assert report["auc"]["ci"][0] < truth < report["auc"]["ci"][1]


def test_swapping_all_sides_changes_nothing(shapes):
    rng = np.random.default_rng(0)
    z, g = shapes.people(rng), expit(np.round(shapes.logit + 2 * shapes.apart("brightness"), 1))
    z[:9] = 0.5
    there = shapes.diagnose(z, g)
    swapped = {name: values[:, ::-1] for name, values in shapes.statistics.items()}
    back = diagnose(1 - z, 1 - g, prompts=shapes.prompts, statistics=swapped, resamples=50)
    for key in ("agreement", "auc", "log_loss", "calibration_error", "confidence", "right"):
        assert back[key] == pytest.approx(there[key], abs=1e-9) if isinstance(there[key], float) else close(back[key], there[key]), key
    assert back["by_word"] == there["by_word"] and back["sentences"] == there["sentences"]
    for one, other in zip(back["leans"], there["leans"], strict=True):
        assert one["statistic"] == other["statistic"] and close(one, other)
    assert back["by_statistic"] == there["by_statistic"]
    assert back["side"]["bias"]["value"] == pytest.approx(-there["side"]["bias"]["value"])


def close(one: dict, other: dict) -> bool:
    return all(one[key] == pytest.approx(other[key], abs=1e-6) for key in ("value", "ci", "n"))


def test_a_calibrated_judge_has_hardly_any_calibration_error():
    """With 10000 pairs the mean gap of a bin is about 0.8 sqrt(0.16 / 1000) = 0.01."""
    rng = np.random.default_rng(0)
    g = rng.random(10000)
    z = (rng.random(len(g)) < g).astype(float)
    prompts = [str(k % 50) for k in range(len(g))]
    found = diagnose(z, g, prompts=prompts, statistics={}, resamples=20)
    error = found["calibration_error"]
    assert error["value"] < 0.02 and error["ci"][0] < error["value"] < 2 * error["by_chance"]
    assert sum(found["histogram"]) == len(g) and all(point["ci"][0] < point["observed"] < point["ci"][1] for point in found["reliability"])
    bold = diagnose(z, expit(4 * np.log(g / (1 - g))), prompts=prompts, statistics={}, resamples=20)
    assert bold["calibration_error"]["value"] > 0.1 and "over-confident" in " ".join(bold["sentences"])


@pytest.mark.slow
def test_the_interval_of_the_calibration_error_holds_its_value_and_rarely_accuses_a_calibrated_judge():
    """An accusation has a chance of 2 to 3 %: more than 6 of 60 have one below 1 %."""
    accused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        g = rng.random(120)
        z, prompts = (rng.random(len(g)) < g).astype(float), [str(k % 60) for k in range(len(g))]
        found = diagnose(z, g, prompts=prompts, statistics={}, resamples=100)
        error, said = found["calibration_error"], " ".join(found["sentences"])
        assert error["ci"][0] <= error["value"] <= error["ci"][1]
        accused += "over-confident" in said or "too cautious" in said
    assert accused <= 6


def test_a_label_file_has_one_log_loss_wherever_it_is_told(shapes):
    z = shapes.people(np.random.default_rng(0))
    hard = (shapes.logit > 0).astype(float)  # wrong sure answers, which cost what the bound lets them
    there = calibrate(shapes.logit[:, None], z, own=hard[:, None])
    assert there.report["judges"][0]["log_loss"]["value"] == pytest.approx(shapes.diagnose(z, hard)["log_loss"]["value"], rel=1e-12)


def test_log_loss_by_hand():
    """-(ln 0.8 + ln 0.4) / 2 = 0.5697; hard wrong answers cost ln 1e6 and are counted."""
    found = diagnose(np.array([1.0, 0.0]), np.array([0.8, 0.6]), prompts=["a", "b"], statistics={})
    assert found["log_loss"] == {"value": pytest.approx(0.5697171415), "ci": None, "n": 2, "held": 0}
    hard = diagnose(np.array([1.0, 0.0]), np.array([1.0, 1.0]), prompts=["a", "b"], statistics={})["log_loss"]
    assert hard["held"] == 2 and hard["value"] == pytest.approx(np.log(1e6) / 2, abs=1e-5)


# ---- parts of the pairs, missing answers, words


def test_copies_of_a_pair_narrow_no_interval():
    """Each pair thirty times, all under its own prompt, tells as much as the pairs do once: so every share's interval is as wide."""
    rng = np.random.default_rng(0)
    z, g, prompts = (rng.random(60) < 0.7).astype(float), rng.uniform(0.3, 0.9, 60), [f"prompt {k}" for k in range(60)]
    apart = {"brightness": rng.normal(size=(60, 2))}
    once = diagnose(z, g, prompts=prompts, statistics=apart, resamples=20)
    rows = np.repeat(np.arange(60), 30)
    copied = {name: values[rows] for name, values in apart.items()}
    copies = diagnose(z[rows], g[rows], prompts=[prompts[row] for row in rows], statistics=copied, resamples=20)
    for found, alone in ((copies["agreement"], once["agreement"]), (copies["side"]["image_0"], once["side"]["image_0"])):
        assert found["value"] == alone["value"] and found["ci"] == pytest.approx(alone["ci"], abs=0.01)  # clusters count C / (C - 1)
        assert found["n"] == 30 * alone["n"] and found["clusters"] == alone["n"]
    assert {entry["n"] for entry in once["reliability"]} == {10} and {entry["n"] for entry in copies["reliability"]} == {180}
    for entry in [*copies["reliability"], *copies["by_margin"], *copies["by_statistic"]["brightness"]["by_difference"]]:
        assert entry["ci"][1] - entry["ci"][0] > 0.2  # 180 pairs of their own have at most 0.15


def test_a_word_on_which_the_judge_fails_stands_out(shapes):
    rng = np.random.default_rng(3)
    z = shapes.people(rng)
    cross = np.array(["cross" in prompt for prompt in shapes.prompts])
    g = np.where(rng.random(len(z)) < np.where(cross, 0.4, 0.85), z, 1 - z)
    model = ["a" if flag else "b" for flag in cross]
    report = shapes.diagnose(z, g, groups={"model": model})
    worst, *rest = report["by_word"]
    assert worst["is"] == "cross" and worst["p"] < 0.001 and worst["n"] == cross.sum() and worst["others"] > 0.75
    assert all(entry["p"] > 0.05 or entry["value"] > entry["others"] for entry in rest)
    assert [entry["is"] for entry in report["by_group"]["model"]] == ["a", "b"]
    assert any("where the prompt says 'cross'" in text and "elsewhere on 8" in text for text in report["sentences"])
    assert not {"the", "background"} & {entry["is"] for entry in report["by_word"]}  # one says nothing, one is in every prompt


def test_agreement_by_an_image_statistic_shows_a_lean_as_a_split():
    """People choose at random; the judge always chooses the brighter image, and says the truth where that is hardly brighter."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.random(400), np.full(400, 0.5)], axis=1)
    apart = values[:, 0] - values[:, 1]
    z = (rng.random(400) < 0.5).astype(float)
    plain = np.abs(apart) < 0.09
    g = np.where(plain, z, apart > 0)
    statistics = {"brightness": values, "aspect": np.ones((400, 2))}
    report = diagnose(z, g, prompts=[str(k) for k in range(400)], statistics=statistics, resamples=20)
    (found,) = report["by_statistic"].values()  # aspect never differs
    visible = np.abs(apart) >= 0.5 * np.sqrt(np.mean(apart**2))
    higher = visible & ((z == 1) == (apart > 0))
    assert (found["chose_higher"]["value"], found["chose_higher"]["n"]) == (1.0, higher.sum())
    assert (found["chose_lower"]["value"], found["chose_lower"]["n"]) == (0.0, (visible & ~higher).sum())
    fifths = found["by_difference"]
    assert [part["n"] for part in fifths] == [80] * 5 and fifths[0]["low"] == np.abs(apart).min()
    assert fifths[0]["value"] > 0.9 and all(0.3 < part["value"] < 0.7 for part in fifths[1:])
    assert all(one["high"] <= other["low"] for one, other in itertools.pairwise(fifths))
    assert "Where people chose that image it agrees with them on 100%, where they chose the other on 0%" in report["sentences"][1]


def test_pairs_without_both_labels_are_left_out(shapes):
    rng = np.random.default_rng(0)
    z, g = shapes.people(rng), expit(shapes.logit)
    half = np.arange(len(z)) % 2 == 0
    prompts, statistics = [p for p, k in zip(shapes.prompts, half, strict=True) if k], {k: v[half] for k, v in shapes.statistics.items()}
    kept = Shapes(prompts, [], shapes.rewards, shapes.blind, statistics)
    order = [None if k % 3 else bool(k % 2) for k in range(len(z))]
    there = kept.diagnose(z[half], g[half], order_consistent=[order[k] for k in np.flatnonzero(half)])
    for gone in ((np.where(half, z, np.nan), g), (z, np.where(half, g, np.nan))):
        report = shapes.diagnose(*gone, order_consistent=order)
        assert report == there
    assert there["n"] == half.sum() and there["order_consistency"]["n"] == sum(order[k] is not None for k in np.flatnonzero(half))
    with pytest.raises(ValueError, match="no pair has both"):
        shapes.diagnose(np.full(len(z), np.nan), g)


@pytest.mark.parametrize(
    ("human_labels", "judge_labels"),
    [([1.0], [0.3]), ([0.5] * 30, [0.2] * 30), ([1.0, 0.0] * 20, [0.5] * 40), ([1.0, 0.0] * 20, [0.0, 1.0] * 20), ([1.0] * 40, [1.0] * 40)],
)
def test_odd_labels_make_a_report_all_the_same(shapes, human_labels, judge_labels):
    n = len(human_labels)
    statistics = {name: values[:n] for name, values in shapes.statistics.items()}
    report = diagnose(np.array(human_labels), np.array(judge_labels), prompts=shapes.prompts[:n], statistics=statistics, resamples=20)
    json.dumps(report, allow_nan=False)
    assert report["sentences"]


def test_a_judge_below_a_coin_is_warned_of(shapes):
    z = shapes.people(np.random.default_rng(0))
    report = shapes.diagnose(z, expit(-shapes.logit))
    assert report["sentences"][0].startswith("Warning: it agrees less often than a coin")
    assert 4 <= len(report["sentences"]) <= 8 and "no more often than a coin" in report["compared"]


def test_a_few_answers_below_a_half_do_not_ask_for_inverting():
    human, judge = np.array([1.0, 0.0] * 13), np.array([0.8] * 26)
    judge[0] = 0.2  # 12 of 26 agree
    report = diagnose(human, judge, prompts=[f"p{k}" for k in range(26)], statistics={}, resamples=20)
    assert report["agreement"]["value"] < 0.5 < report["agreement"]["ci"][1]
    first = report["sentences"][0]
    assert "no better than a coin, as far as so few answers tell" in first and "invert" not in first


def test_a_lean_that_never_varies_is_named():
    """People always choose the darker image, the judge always the brighter one: no spread, and no doubt."""
    rng = np.random.default_rng(0)
    values = rng.random((60, 2))
    bright = (values[:, 0] > values[:, 1]).astype(float)
    report = diagnose(1 - bright, bright, prompts=[str(k) for k in range(60)], statistics={"brightness": values}, resamples=20)
    assert named(report) == ["brightness"] and report["leans"][0]["value"] == 1.0 and report["leans"][0]["kind"] == "likes"
