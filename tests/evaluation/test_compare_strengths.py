"""`dedpo compare` on arms that are strengths of a LoRA: which they are, the best of each, the words, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.evaluation import score
from dedpo_diffusion.evaluation.compare import compare, main
from dedpo_diffusion.evaluation.comparison.arms import load_arms
from dedpo_diffusion.evaluation.comparison.embeddings import Embeddings, write_embeddings
from dedpo_diffusion.evaluation.comparison.intervals import mean_interval, win_rate
from dedpo_diffusion.evaluation.comparison.loras import find_loras
from dedpo_diffusion.evaluation.comparison.people import write_votes
from dedpo_diffusion.evaluation.comparison.strengths import halves
from dedpo_diffusion.evaluation.report.frontier import curves, draw_frontier, framed, strengths_section
from support.reports import Page, shown_verdict
from support.samples import write_samples
from support.scores import BASE, CLUSTERS, put_scores, settings
from support.sweeps import STRENGTHS, tell, write_base, write_sweep

GAINS = {  # by LoRA: the gain at each strength, prompt noise aside
    "human": (0.05, 0.10, 0.06, -0.1),
    "tuned": (0.05, 0.12, 0.30, 0.20),
}


def scores(lora: str, *, seed: int = 0) -> dict[float, dict[str, np.ndarray]]:
    """By strength: truth as GAINS has it, and a proxy that rises with the strength."""
    rng = np.random.default_rng((seed, len(lora), ord(lora[0])))
    noise = 0.02 * rng.normal(size=(len(STRENGTHS), 12))
    rows = zip(STRENGTHS, GAINS[lora], noise, strict=True)
    return {s: {"truth": BASE + gain + apart, "proxy": BASE + 0.1 * s + apart[::-1]} for s, gain, apart in rows}


@pytest.fixture
def folders(tmp_path):
    """The base, and two folders of four strengths."""
    base = write_base(tmp_path / "base", truth=BASE, proxy=BASE)
    return [base, *(write_sweep(tmp_path / lora, lora, scores(lora)) for lora in GAINS)]


def embed(folders, *, lacking=()):
    """Embeddings that drift further from the base's with the strength."""
    rng = np.random.default_rng(0)
    start, away = rng.normal(size=(2, 12, 8))
    for folder in [folders[0], *(place for parent in folders[1:] for place in sorted(parent.iterdir()))]:
        if folder.name not in lacking:
            strength = 0.0 if folder == folders[0] else float(folder.name.removeprefix("strength-"))
            found = start + strength * away
            found /= np.linalg.norm(found, axis=1, keepdims=True)
            write_embeddings(folder, score.read_index(folder), "clip", Embeddings("clip-1", found.astype(np.float32)))


def truth_of(folder) -> np.ndarray:
    return score_of(folder, "truth")


def score_of(folder, scorer) -> np.ndarray:
    rows = score.read_scores(folder, score.read_index(folder))
    return np.array([row["score"] for row in rows if row["scorer"] == scorer])


# ---- which arms


def test_a_folder_of_strengths_stands_for_all_of_them(folders):
    listed = [folders[0], *(folder / f"strength-{s:g}" for folder in folders[1:] for s in STRENGTHS)]
    found = compare(settings(folders))
    assert found == compare(settings(listed)) and found["schema"] == 3
    assert list(found["arms"]) == [
        "base", "human/strength-0.5", "human", "human/strength-2", "human/strength-3",
        "tuned/strength-0.5", "tuned", "tuned/strength-2", "tuned/strength-3",
    ]  # fmt: skip
    assert list(found["loras"]) == ["human", "tuned"]
    entry = found["loras"]["tuned"]
    assert [(at["strength"], at["arm"]) for at in entry["strengths"]] == list(zip(STRENGTHS, list(found["arms"])[5:], strict=True))
    assert (entry["file"], entry["sha256"]) == ("tuned.safetensors", json.loads((listed[-1] / "identity.json").read_text())["lora"])
    for at in entry["strengths"]:
        for scorer in ("truth", "proxy"):
            own = found["arms"][at["arm"]]["by_scorer"][scorer]["gain_over_base"]
            assert at["gain"][scorer] == {key: own[key] for key in ("mean", "ci")}
        assert at["drift"] == {}


def test_one_lora_is_one_file_of_one_model_sampled_alike(tmp_path):
    """By digest, wherever the folders lie; another model, step count, file or a second LoRA makes another."""
    given = {
        "a": ("x", 1.0, {}),
        "b": ("x", 2.0, {}),
        "c": ("x", 2.0, {"model": "other"}),
        "d": ("x", 3.0, {"steps": 9}),
        "e": ("y", 2.0, {}),
    }
    base, found = write_base(tmp_path / "base", truth=BASE), []
    for name, (lora, strength, more) in given.items():
        found.append(tell(put_scores(write_samples(tmp_path / name), truth=BASE), lora, strength, **more))
    both = put_scores(write_samples(tmp_path / "both"), truth=BASE)
    (both / "settings.yaml").write_text(yaml.safe_dump({"lora": ["loras/x.safetensors", "y"], "strength": [1.0, 3.0]}))
    bare = put_scores(write_samples(tmp_path / "bare"), truth=BASE)
    arms, _ = load_arms([base, *found, both, bare])
    (lora,), notes = find_loras(arms)
    assert (lora.name, lora.strengths, [arm.name for arm in lora.arms]) == ("x", (1.0, 2.0), ["a", "b"]) and notes == []
    twin = tell(put_scores(write_samples(tmp_path / "twin"), truth=BASE), "x", 2.0)
    (lora,), notes = find_loras(load_arms([base, *found, twin])[0])
    assert [arm.name for arm in lora.arms] == ["a", "b"]
    assert notes == ["b and twin are both strength 2 of one LoRA; its curve takes b."]


def test_loras_of_one_file_name_are_told_apart(tmp_path):
    base, found = write_base(tmp_path / "base", truth=BASE), []
    for digest in "pq":
        for strength in (1.0, 2.0):
            folder = tell(put_scores(write_samples(tmp_path / f"{digest}{strength:g}"), truth=BASE), "lora", strength)
            identity = json.loads((folder / "identity.json").read_text())
            (folder / "identity.json").write_text(json.dumps(identity | {"lora": digest * 64}))
            found.append(folder)
    loras, _ = find_loras(load_arms([base, *found])[0])
    assert [lora.name for lora in loras] == ["lora", f"lora-{'q' * 8}"]


def test_without_strengths_nothing_is_new(tmp_path):
    base = write_base(tmp_path / "base", truth=BASE)
    one = tell(put_scores(write_samples(tmp_path / "tuned"), truth=BASE + 0.1 + 0.01 * np.sin(np.arange(12))), "tuned", 0.7)
    found = compare(settings([base, one]))
    assert found["loras"] == {} and found["notes"] == [] and "best_strength" not in found["arms"]["tuned"]
    assert found["verdict"].startswith("On truth, tuned is better than base: gain +0.1")


# ---- the numbers


def test_the_gain_at_the_best_strength_is_worked_out_by_hand(folders):
    found, half = compare(settings(folders, seed=4)), halves(CLUSTERS, 4)
    at, gains = {}, {}
    for lora in GAINS:
        entry = found["loras"][lora]
        values = np.stack([truth_of(folders[0].parent / lora / f"strength-{s:g}") for s in STRENGTHS])
        picked = [STRENGTHS[int(np.argmax((values - BASE)[:, half != side].mean(axis=1)))] for side in (0, 1)]
        assert entry["chosen"] == picked and entry["choose_by"] == "truth"
        assert entry["best_strength"] == STRENGTHS[int(np.argmax(values.mean(axis=1)))]
        at[lora] = np.where(half == 0, values[STRENGTHS.index(picked[0])], values[STRENGTHS.index(picked[1])])
        gains[lora] = mean_interval(at[lora] - BASE, CLUSTERS, resamples=500, seed=4)
        for held in (entry["gain_at_best_strength"], found["arms"][lora]["gain_at_best_strength"]):
            np.testing.assert_allclose([held["mean"], *held["ci"]], [gains[lora].mean, gains[lora].low, gains[lora].high], rtol=1e-9)
        assert found["arms"][lora]["best_strength"] == entry["best_strength"]
        won = win_rate(at[lora], BASE, CLUSTERS, resamples=500, seed=4)
        assert entry["win_rate_at_best_strength"]["mean"] == pytest.approx(won.mean)
        proxy = np.stack([score_of(folders[0].parent / lora / f"strength-{s:g}", "proxy") for s in picked])
        shown = np.where(half == 0, proxy[0], proxy[1])
        assert entry["by_scorer"]["proxy"]["gain_over_base"]["mean"] == pytest.approx((shown - BASE).mean())
        assert entry["scores"]["truth"]["mean"] == pytest.approx(at[lora].mean())
    gap = mean_interval(at["tuned"] - at["human"], CLUSTERS, resamples=500, seed=4)
    there, back = found["loras"]["tuned"]["best_minus"]["human"], found["loras"]["human"]["best_minus"]["tuned"]
    np.testing.assert_allclose([there["mean"], *there["ci"]], [gap.mean, gap.low, gap.high], rtol=1e-9)
    np.testing.assert_allclose([back["mean"], *back["ci"]], [-gap.mean, -gap.high, -gap.low], rtol=1e-9)
    by_scorer = found["loras"]["tuned"]["best_minus_by_scorer"]
    assert by_scorer.keys() == {"human"} and by_scorer["human"].keys() == {"truth", "proxy"} and by_scorer["human"]["truth"] == there
    assert by_scorer["human"]["proxy"]["mean"] == pytest.approx(
        found["loras"]["tuned"]["scores"]["proxy"]["mean"] - found["loras"]["human"]["scores"]["proxy"]["mean"]
    )
    won = win_rate(at["tuned"], at["human"], CLUSTERS, resamples=500, seed=4)
    assert found["loras"]["tuned"]["best_wins"]["human"]["mean"] == pytest.approx(won.mean)


def test_a_lora_is_warned_of_at_its_best_strength(tmp_path):
    """Both please the proxy; at every strength one loses by the held-out truth, and the other wins by it."""
    base = write_base(tmp_path / "base", truth=BASE, proxy=BASE)
    rng, made = np.random.default_rng(3), {"good": 0.2, "bad": -0.2}
    for lora, gain in made.items():
        noise = 0.02 * rng.normal(size=(2, 12))
        write_sweep(
            tmp_path / lora, lora, {s: {"truth": BASE + gain + noise[0], "proxy": BASE + 0.2 * s + noise[1]} for s in STRENGTHS}
        )  # fmt: skip
    loras = compare(settings([base, *(tmp_path / lora for lora in made)], held_out=["truth"]))["loras"]
    assert loras["good"]["warnings"] == []
    [words] = loras["bad"]["warnings"]
    assert words.startswith("Looks over-optimised: it rises on proxy (+") and "falls on truth (-0." in words


def test_the_order_of_folders_and_rows_changes_no_number(folders):
    before = compare(settings(folders))["loras"]
    listed = [place for folder in folders[1:] for place in folder.iterdir()]
    rng = np.random.default_rng(0)
    after = compare(settings([folders[0], *(listed[k] for k in rng.permutation(len(listed)))]))["loras"]
    for name, entry in before.items():
        assert after[name].keys() == entry.keys() and after[name]["chosen"] == entry["chosen"]
        for key in ("gain_at_best_strength", "best_minus", "win_rate_at_best_strength", "best_strength", "strengths"):
            assert json.dumps(after[name][key])[:40] == json.dumps(entry[key])[:40]
        np.testing.assert_allclose(after[name]["gain_at_best_strength"]["ci"], entry["gain_at_best_strength"]["ci"], rtol=1e-9)


def test_scores_of_a_half_do_not_move_the_strength_that_it_is_judged_at(folders):
    before, half = compare(settings(folders))["loras"]["tuned"]["chosen"], halves(CLUSTERS, 0)
    for strength, gain in zip(STRENGTHS, (3.0, 0.0, -1.0, 0.5), strict=True):
        folder = folders[2] / f"strength-{strength:g}"
        put_scores(folder, truth=np.where(half == 0, BASE + gain, truth_of(folder)), proxy=score_of(folder, "proxy"))
    found = compare(settings(folders))
    assert found["loras"]["tuned"]["chosen"] == [before[0], 0.5]
    assert "The two halves of the prompts disagree on the best strength of tuned: 0.5 and 2, by truth." in found["notes"]
    assert "tuned at strength 0.5 or 2" in found["verdict"]


def test_another_scorer_may_choose(folders):
    found = compare(settings(folders, choose_by="proxy"))
    entry = found["loras"]["human"]
    assert entry["choose_by"] == "proxy" and entry["best_strength"] == 3.0 and entry["chosen"] == [3.0, 3.0]
    own = found["arms"]["human/strength-3"]["gain_over_base"]
    assert entry["gain_at_best_strength"]["mean"] == pytest.approx(own["mean"])  # judged by truth
    assert "human is best at 3, the largest strength that was sampled; a larger one may be better still." in found["notes"]


# ---- people


def vote(base, arm, preferred, rows=range(12)):
    of_base, of_arm = score.read_index(base), score.read_index(arm)
    answers = [
        {
            "file_base": of_base[k]["file"], **{key: of_arm[k][key] for key in ("file", "prompt", "prompt_index", "seed")}, "rater": "ann",
            "preferred": float(preferred[k]), "repeat": False, "swapped": False, "seconds": 1.0, "time": f"t{k}",
        }
        for k in rows
    ]  # fmt: skip
    digests = {"base_images": score.images_digest(base, of_base), "arm_images": score.images_digest(arm, of_arm)}
    write_votes(arm, "vs-base", answers, {**digests, "base": base.name, "session": "s", "design": {}})


def test_people_choose_among_the_strengths_that_they_judged(tmp_path):
    """They like strength 2 best, and the scorer 3; each strength is voted on in part of the pairs."""
    base = write_base(tmp_path / "base", truth=BASE)
    lora = write_sweep(tmp_path / "tuned", "tuned", {s: {"truth": BASE + 0.1 * s} for s in (1.0, 2.0, 3.0)})
    answers = {1.0: [1, 0.5] * 6, 2.0: [1, 1, 1, 0.5] * 3, 3.0: [0, 0.5] * 6}
    for strength, preferred in answers.items():
        vote(base, lora / f"strength-{strength:g}", preferred, [k for k in range(12) if k % 6 != int(strength)])
    found = compare(settings([base, lora], held_out=[]))
    entry = found["loras"]["tuned"]
    assert (found["primary"], entry["choose_by"], entry["best_strength"]) == ("people", "people", 2.0)
    rows = [k for k in range(12) if k % 6 != 2]
    assert entry["chosen"] == [2.0, 2.0]
    assert entry["gain_at_best_strength"]["mean"] == pytest.approx(np.mean([2 * answers[2.0][k] - 1 for k in rows]))
    assert entry["by_scorer"]["people"]["n"] == 10 and entry["best_minus"] == {}
    assert found["verdict"].startswith("On people, tuned at strength 2 (chosen on other prompts) is better than base: gain +0.7")
    out = tmp_path / "out" / "report.html"
    assert main([str(base), str(lora), "--out", str(out), "--resamples", "500"]) == 0
    page = Page(out.read_text())
    assert (
        page.open == []
        and shown_verdict(found) in page.text
        and json.loads(page.blocks["known"])["arms"] == ["base", "tuned at strength 2"]
    )


def test_votes_that_cannot_choose(tmp_path):
    base = write_base(tmp_path / "base", truth=BASE)
    lora = write_sweep(tmp_path / "tuned", "tuned", {s: {"truth": BASE + 0.1 * s} for s in (1.0, 2.0)})
    vote(base, lora / "strength-1", [1] * 12)
    found = compare(settings([base, lora]))
    assert found["loras"]["tuned"]["choose_by"] == "truth"
    with pytest.raises(
        UserError, match=r"--choose_by people: people have not judged every strength of tuned in both halves .* run `dedpo vote"
    ):
        compare(settings([base, lora], choose_by="people"))
    found = compare(settings([base, lora], primary="people", out=tmp_path / "out" / "report.html"))
    assert found["loras"]["tuned"]["gain_at_best_strength"] is None  # they did not see strength 2, which the scorer chose
    assert (
        "On people, tuned and base cannot be told apart: gain +1.000" in found["verdict"]
        and "tuned/strength-2 cannot be ranked" in found["verdict"]
    )
    strengths_section(found)
    draw_frontier(found, tmp_path / "frontier.png")
    first = [k for k in range(12) if halves(CLUSTERS, 0)[k] == 0]
    vote(base, lora / "strength-2", [1] * 12, first)
    found = compare(settings([base, lora], held_out=[]))
    assert (found["primary"], found["loras"]["tuned"]["choose_by"]) == ("people", "truth")
    assert any(note.startswith("truth chooses the best strengths, since people have not judged every strength") for note in found["notes"])


# ---- the words and the page


def test_the_verdict_speaks_of_loras_at_their_best_strength(folders, tmp_path):
    words = compare(settings(folders))["verdict"]
    assert words.startswith("On truth, tuned at strength 2 (chosen on other prompts) is better than base: gain +0.2")
    assert "of 2 arms tuned at strength 2 has the largest gain, ahead of human at strength 1 (+0." in words
    merged = put_scores(write_samples(tmp_path / "merged"), truth=BASE + 0.5 + 0.01 * np.sin(np.arange(12)), proxy=BASE)
    found = compare(settings([*folders, merged]))
    assert found["verdict"].startswith("On truth, merged is better than base: gain +0.5")
    assert "ahead of human at strength 1 (+0.4" in found["verdict"] and "and tuned at strength 2 (+0.2" in found["verdict"]
    assert found["loras"]["tuned"]["best_minus"]["merged"]["mean"] == pytest.approx(-0.2, abs=0.03)
    assert "merged" not in found["loras"]


def test_a_picture_ends_a_little_below_zero_and_says_whose_curve_goes_on(folders):
    deep = {s: {"truth": BASE + (0.1 if s < 2 else -3.0)} for s in STRENGTHS}
    write_sweep(folders[0].parent / "deep", "deep", deep)
    found = compare(settings([*folders, folders[0].parent / "deep"]))
    whole = curves(found, "truth")
    cut, words = framed(whole)
    floor, top = (end(y for curve in lines for _, y in curve.points) for end, lines in ((min, cut), (max, whole)))
    assert -0.6 * top < floor < -0.4 * top and min(y for curve in whole for _, y in curve.points) < floor
    assert "deep goes on below it" in words and "tuned" not in words
    assert [cut[k] is whole[k] for k in range(3)] == [curve.name != "deep" for curve in whole]
    assert "deep goes on below it" in strengths_section(found)


def test_the_command_draws_the_frontier(folders, tmp_path, capsys):
    embed(folders)
    out = tmp_path / "made" / "report.html"
    assert main([*map(str, folders), "--out", str(out), "--resamples", "500", "--held_out+", "truth"]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["contact_sheet.png", "frontier.png", "report.html", "results.json"]
    found, text = json.loads((out.parent / "results.json").read_text()), out.read_text()
    drifts = [at["drift"]["clip"]["mean"] for at in found["loras"]["tuned"]["strengths"]]
    assert drifts == sorted(drifts) and drifts[0] > 0
    assert Image.open(out.parent / "frontier.png").size == (960, 600)
    page = Page(text)
    assert page.open == [] and shown_verdict(found) in page.text
    assert "drift from base (by clip)" in page.text and "Here both halves chose alike for every LoRA." in page.text
    strengths = text[text.index('<h2 id="strengths">') : text.index('<h2 id="scores">')]
    assert strengths.count("<polyline") == strengths.count("<polygon") == 2 * 2 and strengths.count("<svg") == 2  # LoRAs x scorers
    assert [f">{s:g}</text>" in strengths for s in STRENGTHS] == [True] * 4
    assert 'aria-label="gain over base on truth against drift from base (by clip)"' in strengths
    known = json.loads(page.blocks["known"])
    assert known["arms"] == ["base", "human at strength 1", "tuned at strength 2"]  # of each LoRA the images of its best
    said = capsys.readouterr().out
    assert "tuned is best at strength 2 by truth; with each half" in said and "frontier.png" in said


def test_without_embeddings_the_curve_goes_over_strength(folders):
    found = compare(settings(folders))
    (_, curve) = curves(found, "truth")
    assert [x for x, _ in curve.points] == [0, *STRENGTHS] and curve.labels == ["", "0.5", "1", "2", "3"]
    assert curve.mark == curve.points[3]
    assert "strength of the LoRA" in strengths_section(found)
    embed(folders, lacking=["strength-3"])
    assert "strength of the LoRA" in strengths_section(compare(settings(folders)))


# ---- what is refused


def test_folders_that_cannot_be_meant(folders):
    with pytest.raises(UserError, match="tuned holds several strengths of a LoRA, and the first folder is the base"):
        compare(settings(folders[::-1]))
    with pytest.raises(UserError, match="--choose_by beauty: no scorer that all folders share"):
        compare(settings(folders, choose_by="beauty"))
    with pytest.raises(UserError, match="--choose_by chooses among strengths of a LoRA, and no LoRA here was sampled at several"):
        compare(settings([folders[0], folders[1] / "strength-1"], choose_by="truth"))
    (folders[2] / "strength-3" / "index.parquet").unlink()
    with pytest.raises(UserError, match=r"tuned/strength-3 is not sampled to its end; give the same `dedpo sample` again"):
        compare(settings(folders))


def test_an_identity_that_cannot_be_read(folders):
    (folders[1] / "strength-2" / "identity.json").write_text("[1]")
    with pytest.raises(UserError, match=r"strength-2/identity.json cannot be read as JSON"):
        compare(settings(folders))


def test_scores_are_given_to_all_strengths_of_a_folder(folders):
    for place in folders[1].iterdir():
        (place / "scores.parquet").unlink()
    shutil.rmtree(folders[2])
    assert score.main([str(folders[1]), "--device", "cpu", "--with", "oracle_clean"]) == 0
    assert all((place / "scores.parquet").is_file() for place in folders[1].iterdir())
