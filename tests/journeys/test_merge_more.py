"""`dedpo merge` with several judges, rules and propensities; its doubts, its curve, its picture and its plan."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dedpo_diffusion.core.records import Labels, Pair
from dedpo_diffusion.debias import estimate_propensity, merge_labels
from dedpo_diffusion.evaluation.report import page
from dedpo_diffusion.labels.files import CALIBRATED, read_targets, write_labels
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines.merge import main
from support.pictures import write_pairs

N, ASKED = 400, 160
IDS = [f"p{i}" for i in range(N)]
MODEL = np.array(["sd15", "sdxl"], dtype=object)[np.arange(N) % 2]
RNG = np.random.default_rng(0)
TRUTH = (RNG.random(N) < 0.5).astype(float)
PLAIN = ["--picture", "false"]


def judge(accuracy):
    right = RNG.random(N) < accuracy
    return 0.5 + np.where(right, 1, -1) * (TRUTH - 0.5) * (0.1 + 0.8 * RNG.random(N))


JUDGES = {"clip": judge(np.where(MODEL == "sd15", 0.95, 0.6)), "vlm": judge(0.75)}
ROWS = RNG.permutation(N)[:ASKED]
HUMAN = np.full(N, np.nan)
HUMAN[ROWS] = TRUTH[ROWS]


def write(folder, human=HUMAN, **judges):
    """400 pairs of two models, with a number, a page and a rare tag; human labels of some; judges of all."""
    with PairWriter(folder) as writer:
        for i, pair_id in enumerate(IDS):
            source = {"model": MODEL[i], "number": float(np.sin(i)), "page": f"page {i}", "tag": "rare" if i < 4 else "usual"}
            writer.add(Pair(pair_id, f"prompt {i % 40}", b"0", b"1", source))
    asked = np.flatnonzero(~np.isnan(human))
    write_labels(folder, "human", Labels([IDS[i] for i in asked], human[asked]))
    for name, labels in (judges or JUDGES).items():
        write_labels(folder, name, Labels(IDS, labels))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("merge") / "d")


def merged(folder, name, *options):
    assert main([str(folder), "--name", name, *options, *PLAIN]) == 0
    return read_targets(folder, name), json.loads((folder / "targets" / f"{name}.json").read_text())


def same(targets, expected):
    for column in ("target", "weight", "human", "judge", "inverse"):
        np.testing.assert_array_equal(getattr(targets, column), getattr(expected, column), err_msg=column)
    np.testing.assert_array_equal(targets.power, expected.powers)


BOTH = np.stack(list(JUDGES.values()), axis=1)


# ---- options reach the estimator


@pytest.mark.parametrize("given", [["--judges", "clip,vlm"], ["--judges", "clip", "vlm"]])
def test_several_judges_each_get_a_power(made, given):
    targets, report = merged(made, "several", *given)
    expected = merge_labels(HUMAN, BOTH, judges=["clip", "vlm"])
    same(targets, expected)
    assert [entry["name"] for entry in report["judges"]] == ["clip", "vlm"] and report["judge"] == "clip, vlm"
    assert {role: entry["file"] for role, entry in report["label_files"].items()} == {
        "human": "labels/human.parquet", "judge": "labels/clip.parquet", "judge 2": "labels/vlm.parquet",
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["half", "minus_se", "cross_fitted"])
def test_rules_reach_the_estimator(made, rule):
    targets, report = merged(made, rule, "--judge", "vlm", "--rule", rule, "--seed", "3")
    number: dict[int, int] = {}  # prompts in the order of their first label
    prompts = np.array([-1 if np.isnan(z) else number.setdefault(i % 40, len(number)) for i, z in enumerate(HUMAN)])
    same(targets, merge_labels(HUMAN, JUDGES["vlm"], rule=rule, seed=3, clusters=prompts))
    assert report["rule"] == rule


def test_a_fold_is_merged_without_its_pairs(made):
    options = ["--judges", "clip,vlm", "--folds", "2"]
    merged(made, "parts", *options)
    for k in range(2):
        found = read_targets(made, f"parts-fold-{k}")
        rest = found.weight > 0
        expected = merge_labels(HUMAN[rest], BOTH[rest])
        np.testing.assert_array_equal(found.target[rest], expected.target)
        assert (found.inverse[~rest] == 0).all() and np.isnan(found.human[~rest]).all() and (found.power[~rest] == 0).all()


# ---- propensities


@pytest.fixture
def skewed(tmp_path):
    """People were asked mostly where a number is large; what they were asked is stored too."""
    number = np.sin(np.arange(N))
    chance = np.where(number > 0, 0.6, 0.15)
    human = np.where(np.random.default_rng(5).random(N) < chance, TRUTH, np.nan)
    folder = write(tmp_path / "d", human, vlm=JUDGES["vlm"])
    return folder, human, chance


def test_labels_that_are_not_at_random_are_doubted_and_the_column_is_named(skewed, capsys):
    folder, _, _ = skewed
    _, report = merged(folder, "naively")
    assert [warning["column"] for warning in report["warnings"]] == ["source_number"]
    assert report["warnings"][0]["text"] in capsys.readouterr().out.splitlines()


def test_estimated_propensities_are_those_of_judge_numbers_and_texts_and_end_the_doubt(skewed, capsys):
    folder, human, _ = skewed
    targets, report = merged(folder, "estimated", "--propensities", "estimate")
    g, number = JUDGES["vlm"], np.sin(np.arange(N))
    texts = [MODEL == "sd15", MODEL == "sdxl", np.arange(N) < 4, np.arange(N) >= 4]
    found = estimate_propensity(~np.isnan(human), np.stack([g, np.abs(g - 0.5), *texts[:2], number, *texts[2:]], axis=1).astype(float))
    expected = merge_labels(human, g, propensity=found.p)
    np.testing.assert_allclose(targets.target, expected.target, atol=1e-9)
    np.testing.assert_allclose(targets.weight, expected.weight, atol=1e-9)
    assert report["warnings"] == [] and report["propensities"] is True
    of_texts = ["source_model = sd15", "source_model = sdxl", "source_number", "source_tag = rare", "source_tag = usual"]
    assert report["propensity_model"]["columns"] == ["label of vlm", "confidence of vlm", *of_texts]
    told = next(text for text in report["sentences"] if "tell them apart (AUC" in text)
    assert "from 7 columns (source_page left out: too many values)" in told
    assert "more than 50 values, so no part of the model: source_page" in capsys.readouterr().out
    assert report["curve"] is None and "What further labels would add is not estimated" in report["sentences"][-1]


def test_propensities_that_do_not_make_up_for_who_was_asked_are_doubted(tmp_path):
    """People were asked where a number is near 0, which a logistic model cannot say: the labels stay unlike all pairs."""
    number = np.sin(np.arange(N))
    human = np.where(np.random.default_rng(2).random(N) < np.where(np.abs(number) < 0.6, 0.7, 0.1), TRUTH, np.nan)
    folder = write(tmp_path / "d", human, vlm=JUDGES["vlm"])
    _, report = merged(folder, "estimated", "--propensities", "estimate")
    [warning] = report["warnings"]
    assert (warning["kind"], warning["test"], warning["column"]) == ("not_at_random", "balance", "source_number")
    assert "weighted by their propensities, still differ from all pairs in source_number (mean" in warning["text"]


def test_a_text_column_that_decided_who_was_asked_is_made_up_for(tmp_path):
    human = np.where(np.random.default_rng(6).random(N) < np.where(MODEL == "sd15", 0.6, 0.15), TRUTH, np.nan)
    folder = write(tmp_path / "d", human, vlm=JUDGES["vlm"])
    assert [warning["column"] for warning in merged(folder, "naively")[1]["warnings"]] == ["source_model"]
    targets, report = merged(folder, "estimated", "--propensities", "estimate")
    assert report["warnings"] == []
    assert targets.weight[(MODEL == "sd15") & ~np.isnan(human)].mean() < targets.weight[(MODEL == "sdxl") & ~np.isnan(human)].mean()


def test_an_infinite_number_counts_as_unknown(tmp_path):
    folder = tmp_path / "d"
    with PairWriter(folder) as writer:
        for i, pair_id in enumerate(IDS):
            writer.add(Pair(pair_id, f"prompt {i % 40}", b"0", b"1", {"ratio": np.inf if i % 3 == 0 else float(np.sin(i))}))
    rows = np.flatnonzero(np.arange(N) % 2 == 0)
    write_labels(folder, "human", Labels([IDS[i] for i in rows], TRUTH[rows]))
    write_labels(folder, "vlm", Labels(IDS, JUDGES["vlm"]))
    assert merged(folder, "sure")[1]["warnings"] == []


def test_stored_propensities_can_be_left_aside(skewed, capsys):
    folder, human, chance = skewed
    rows = np.flatnonzero(~np.isnan(human))
    write_labels(folder, "human", Labels([IDS[i] for i in rows], human[rows], {"propensity": chance[rows].tolist()}))
    targets, report = merged(folder, "stored")
    same(targets, merge_labels(human, JUDGES["vlm"], propensity=chance))
    assert report["warnings"] == [] and report["propensity_model"] == {"from": "stored"}
    targets, report = merged(folder, "none", "--propensities", "none")
    same(targets, merge_labels(human, JUDGES["vlm"]))
    assert len(report["warnings"]) == 1 and "the stored propensities are not used" in capsys.readouterr().out


# ---- other doubts


def test_a_merge_without_trouble_has_no_doubts(made):
    assert merged(made, "fine", "--judges", "clip,vlm")[1]["warnings"] == []


def test_a_judge_that_knows_the_answers_and_wild_targets_are_doubted(tmp_path):
    human = np.where(MODEL == "sdxl", np.nan, HUMAN)
    seen = np.where(np.isnan(human), 0.5 + 0.1 * (JUDGES["vlm"] - 0.5), 0.05 + 0.9 * TRUTH)
    folder = write(tmp_path / "d", human, seen=seen)
    _, report = merged(folder, "bad", "--power", "1")
    warnings = {warning["kind"]: warning for warning in report["warnings"]}
    assert set(warnings) == {"few_labels", "not_at_random", "seen", "overshoot"}
    assert warnings["seen"]["judge"] == "seen"
    assert warnings["overshoot"]["overshoot"] == pytest.approx(5.0)


# ---- curve, picture, page


def test_the_curve_starts_at_the_worth_of_the_report(made):
    report = merged(made, "curve", "--judge", "clip")[1]
    more = report["curve"]["human_labels"]
    assert more["n"][0] == ASKED and more["n"][-1] == N
    assert more["value"][0] == pytest.approx(report["effective_human_labels"]["value"])
    for method in ("naive", "human_only"):
        assert merged(made, method, "--judge", "clip", "--method", method)[1]["curve"] is None


@pytest.mark.slow
def test_the_picture_is_drawn_and_an_older_one_does_not_outlive_its_targets(made):
    picture = made / "targets" / "drawn.png"
    assert main([str(made), "--name", "drawn", "--judges", "clip,vlm"]) == 0
    with Image.open(picture) as image:
        assert image.size == (1400, 960) and len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert main([str(made), "--name", "drawn", "--judge", "clip"]) == 0
    with Image.open(picture) as image:
        assert image.size == (1400, 560)
    assert main([str(made), "--name", "drawn", "--judge", "clip", "--method", "human_only"]) == 0
    assert not picture.exists()


def test_the_page_shows_judges_curves_and_warnings(made):
    _, report = merged(made, "shown", "--judges", "clip,vlm", "--power", "[0.5, 0.5]")
    assert report["warnings"]
    told = page.label_section([made / "targets" / "shown.json"])
    for entry in report["judges"]:
        assert f"<tr><th>{entry['name']}</th>" in told
    for words, key, form in (("bias of the judge", "judge_bias", ".3f"), ("the same at power 1", "effective_human_labels_power_1", ".0f")):
        assert words in told and page.shown(report[key], form) in told
    [stretched] = [warning["text"] for warning in report["warnings"] if warning["kind"] == "overshoot"]
    assert f'<p class="note">T{stretched.removeprefix("Warning: t")}</p>' in told and "Warning: " not in told
    assert told.count("<svg") == 2 and told.count("<section>") == told.count("</section>") == 2


# ---- the plan


def test_a_plan_tells_doubts_too(skewed, capsys):
    folder, _, _ = skewed
    assert main([str(folder), "--plan", "300"]) == 0
    told = json.loads((folder / "targets" / "tuned.plan.json").read_text())
    assert [warning["column"] for warning in told["warnings"]] == ["source_number"]
    assert told["warnings"][0]["text"] in capsys.readouterr().out.splitlines()


def test_a_plan_is_printed_and_written_and_no_targets_are(made, capsys):
    assert main([str(made), "--name", "ahead", "--judge", "clip", "--plan", "300"]) == 0
    assert sorted(path.name for path in made.glob("targets/ahead*")) == ["ahead.plan.json"]
    told = json.loads((made / "targets" / "ahead.plan.json").read_text())
    assert told["wanted"] == 300 and told["judges"] == ["clip"]
    assert 0 < told["more"] < told["without_judge"] == 140
    printed = capsys.readouterr().out
    assert all(sentence in printed.splitlines() for sentence in told["sentences"])
    assert told["warnings"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--judge", "clip", "--judges", "vlm"], "--judge names one judge, --judges several"),
        (["--judges", "clip,clip"], "names one of clip, clip twice"),
        (["--judges", "clip,human"], "both name 'human'"),
        (["--judge", "clip", "--strata", "model"], "strata is gone; leave it out"),
        (["--judges", "clip,vlm", "--power", "0.5"], "power has 1 numbers, but there are 2 judges"),
        (["--judge", "clip", "--plan", "0"], "--plan is 0.0; give the number of human labels"),
        (["--judge", "clip", "--plan", "300", "--method", "naive"], "--plan needs a judge"),
        (["--judge", "clip", "--plan", "300", "--folds", "2"], "leave out --folds or --plan"),
        (["--judge", "clip", "--plan", "300", "--name", "../../escaped"], "cannot name a file"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(made, capsys, options, words):
    assert main([str(made), "--name", "refused", *options]) == 2
    assert words in capsys.readouterr().err and not list(made.glob("targets/refused*"))


@pytest.mark.parametrize(("origin", "warned"), [(None, True), (CALIBRATED, False)])
def test_labels_from_other_maps_where_people_answered_are_no_sign_of_a_choice(tmp_path, origin, warned):
    """A cross-fitted judge may be less sure on labelled pairs; of a plain judge that says that people were asked about hard pairs."""
    folder, count = write_pairs(tmp_path / "data", 200), 200
    ids = [f"p{k}" for k in range(count)]
    sure = np.where(np.arange(count) < 60, 0.6, 0.9)
    write_labels(folder, "judge", Labels(ids, sure), origin=origin)
    write_labels(folder, "human", Labels(ids[:60], np.tile([1.0, 1.0, 0.0], 20)))
    assert main([str(folder), "--judge", "judge"]) == 0
    warnings = json.loads((folder / "targets" / "tuned.json").read_text())["warnings"]
    assert any("confidence of judge" in entry["text"] for entry in warnings) == warned
